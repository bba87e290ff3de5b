"""What requests share: found by others at once, bounded, oldest out first, never across namespaces."""

from __future__ import annotations

import copy
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from proposers import DraftTree, Lookahead, LookaheadOptions, PromptLookup, PromptLookupOptions, Proposer, RequestInfo
from proposers.shared_text import SharedText
from proposers.text_index import BLOCK

OUTPUT = np.random.default_rng(0).integers(1000, 30_000, 300).astype(np.int32)
A, B = RequestInfo(namespace="a"), RequestInfo(namespace="b")


@pytest.fixture(params=["prompt_lookup", "lookahead"])
def proposer(request: pytest.FixtureRequest) -> Proposer:
    if request.param == "lookahead":
        return Lookahead(LookaheadOptions())
    return PromptLookup(PromptLookupOptions())


def say(proposer: Proposer, output: np.ndarray, info: RequestInfo = A, prompt: int = 3, *, steps: int = 40) -> None:
    """A request with a prompt of its own says ``output``, a few tokens a step, and ends."""
    text = np.concatenate((np.arange(prompt, dtype=np.int32), output))
    request = proposer.start(f"says {len(text)}", text[:prompt], info)
    for end in np.linspace(prompt + 1, len(text), steps).astype(int):
        request.propose(text[:end], 8)
    request.finish()


def guesses(proposer: Proposer, seen: np.ndarray, info: RequestInfo = A, budget: int = 48) -> DraftTree:
    """What is guessed after ``seen`` in a request that never saw more."""
    context = np.concatenate((np.array([77], np.int32), seen))
    request = proposer.start("asks", context[:1], info)
    request.without_branch = True
    tree = request.propose(context, budget)
    tree.validate(unique_siblings=True)
    return tree


def test_what_one_request_said_is_guessed_for_another(proposer: Proposer) -> None:
    say(proposer, OUTPUT)
    tree = guesses(proposer, OUTPUT[100:110])
    path = tree.first_path()
    assert len(path) > 20, "across the borders of blocks"
    assert tree.token_ids[path].tolist() == OUTPUT[110 : 110 + len(path)].tolist()
    assert tree.sources is not None
    assert {proposer.sources[source] for source in tree.sources.tolist()} == {"requests"}


def test_also_while_that_one_still_runs(proposer: Proposer) -> None:
    text = np.concatenate((np.arange(3, dtype=np.int32), OUTPUT))
    running = proposer.start("running", text[:3], A)
    running.propose(text[:200], 8)
    assert guesses(proposer, OUTPUT[50:60]).token_ids[0] == OUTPUT[60]


def test_nothing_is_shared_with_another_namespace(proposer: Proposer) -> None:
    say(proposer, OUTPUT)
    assert len(guesses(proposer, OUTPUT[100:110], B)) == 0
    assert len(guesses(proposer, OUTPUT[100:110], RequestInfo(namespace=""))) == 0


def test_nothing_is_shared_where_nobody_vouches_for_the_namespace(proposer: Proposer) -> None:
    unknown = RequestInfo(namespace=None)
    say(proposer, OUTPUT)
    assert len(guesses(proposer, OUTPUT[100:110], unknown)) == 0
    other = OUTPUT + np.int32(50_000)
    say(proposer, other, unknown)
    for info in (A, B, unknown):
        assert len(guesses(proposer, other[100:110], info)) == 0


def test_prompts_are_shared_only_if_asked_for() -> None:
    for share in (False, True):
        proposer = PromptLookup(PromptLookupOptions(share_prompts=share))
        request = proposer.start("r", OUTPUT, A)
        request.propose(np.append(OUTPUT, np.int32(5)), 8)
        assert (len(guesses(proposer, OUTPUT[100:110])) > 0) == share


def test_switched_off_nothing_is_remembered() -> None:
    proposer = PromptLookup(PromptLookupOptions(shared_tokens=0))
    say(proposer, OUTPUT)
    assert len(guesses(proposer, OUTPUT[100:110])) == 0


def test_the_oldest_is_forgotten_first() -> None:
    proposer = PromptLookup(PromptLookupOptions(shared_tokens=16 * BLOCK))
    rng = np.random.default_rng(1)
    outputs = [rng.integers(1000, 30_000, 4 * BLOCK).astype(np.int32) for _ in range(8)]
    for output in outputs:
        say(proposer, output)
    # asking is saying, too: ask a copy
    remembered = [len(guesses(copy.deepcopy(proposer), output[100:110])) > 0 for output in outputs]
    assert remembered == [False] * 4 + [True] * 4


def test_a_request_whose_lines_were_written_over_goes_on() -> None:
    proposer = PromptLookup(PromptLookupOptions(shared_tokens=4 * BLOCK))
    slow = proposer.start("slow", OUTPUT[:1], A)
    slow.propose(OUTPUT[:10], 8)
    for seed in range(5):
        say(proposer, np.random.default_rng(seed).integers(1000, 30_000, 3 * BLOCK).astype(np.int32))
    slow.propose(OUTPUT[:100], 8)
    assert guesses(proposer, OUTPUT[50:60]).token_ids[0] == OUTPUT[60]


def test_a_namespace_comes_back_under_its_number_until_all_it_said_is_forgotten() -> None:
    shared = SharedText(4 * BLOCK, 4)
    first = shared.owner("a")
    assert shared.owner("b") != first
    assert shared.owner("a") == first
    shared.state[8] += 100  # NOW: so many blocks later
    shared.owner("b")
    assert len(shared._owners) == 1
    assert shared.owner("a") > first


def test_ten_thousand_requests_leave_memory_flat() -> None:
    proposer = PromptLookup(PromptLookupOptions(shared_tokens=1 << 14))
    rng = np.random.default_rng(2)

    def serve(requests: int) -> None:
        for i in range(requests):
            output = rng.integers(0, 30_000, 24).astype(np.int32)
            say(proposer, output, RequestInfo(namespace=f"tenant {i % 700}"), steps=3)

    tracemalloc.start()
    serve(2000)
    before = tracemalloc.get_traced_memory()[0]
    serve(10_000)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after - before < 100_000


def test_memory_per_remembered_token_is_what_the_documents_say() -> None:
    options = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    said = re.search(
        r"about (\d+) bytes of the worker's memory for each \((\d+) MiB by default\)", " ".join(options.split())
    )
    assert said is not None
    default = PromptLookupOptions().shared_tokens
    nbytes = SharedText(default, 4).state.nbytes
    assert round(nbytes / default) == int(said[1])
    assert round(nbytes / 2**20) == int(said[2])
