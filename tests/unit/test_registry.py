"""Finding proposers by name: ours, a third party's, and a broken one."""

from importlib.metadata import EntryPoint

import pytest

from proposers import Proposer, registry


class Stub(Proposer):
    def start(self, request_id, prompt):  # type: ignore[no-untyped-def]
        raise NotImplementedError


NOT_A_PROPOSER = 3


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three installed entry points: a good one, one whose module is missing, one that is not a proposer."""
    found = [
        EntryPoint("stub", f"{__name__}:Stub", registry.ENTRY_POINT_GROUP),
        EntryPoint("broken", "no_such_module:Thing", registry.ENTRY_POINT_GROUP),
        EntryPoint("number", f"{__name__}:NOT_A_PROPOSER", registry.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: found if group == registry.ENTRY_POINT_GROUP else [])


def test_ours_are_known() -> None:
    assert {"prompt_lookup", "lookahead", "token_recycling"} <= set(registry.names())
    for name in ("prompt_lookup", "lookahead", "token_recycling"):
        assert issubclass(registry.get(name), Proposer)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown proposer 'prompt_lokup'; known are: .*prompt_lookup"):
        registry.get("prompt_lokup")


def test_a_name_can_be_taken_once_but_the_same_class_may_come_again() -> None:
    registry.register("mine")(Stub)
    registry.register("mine")(Stub)
    with pytest.raises(ValueError, match=r"'prompt_lookup' is taken by proposers.prompt_lookup.PromptLookup"):
        registry.register("prompt_lookup")(Stub)


@pytest.mark.usefixtures("third_party")
def test_a_third_party_proposer_is_found_by_its_entry_point() -> None:
    assert "stub" in registry.names()
    assert registry.get("stub").__name__ == "Stub"


@pytest.mark.usefixtures("third_party")
def test_a_broken_third_party_hurts_only_who_asks_for_it() -> None:
    assert issubclass(registry.get("prompt_lookup"), Proposer)
    assert "broken" in registry.names()
    with pytest.raises(ValueError, match=r"'broken'.*no_such_module:Thing.*can't be loaded: ModuleNotFoundError"):
        registry.get("broken")
    with pytest.raises(ValueError, match=r"'number'.*is not a subclass of proposers.Proposer: 3"):
        registry.get("number")
