"""The contract read from vLLM's sources: by syntax alone the same is found as by importing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_lookahead.contract import CONTRACT, Function, Part, running
from vllm_lookahead.contract.reading import Missing
from vllm_lookahead.contract.sources import Sources

SPEC = importlib.util.find_spec("vllm")
assert SPEC is not None
assert SPEC.origin is not None
INSTALLED = Path(SPEC.origin).parent
EVERY = sorted(set().union(*CONTRACT.values()), key=str)
ONLY_ON_CUDA = "vllm.v1.attention.backends.fa_utils:flash_attn_varlen_func"
"""An import that vLLM makes on the device that has it."""
TOOL = Path(__file__).parents[2] / "tools" / "check_vllm_sources.py"

TOY = {
    "vllm/__init__.py": "",
    "vllm/base.py": """
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple, TypeVar
from functools import lru_cache
if TYPE_CHECKING:
    from elsewhere import Only
T = TypeVar("T")
try:
    import fast
except ImportError:
    fast = None

class Root(Generic[T]):
    name: str
    LIMIT, OTHER = 1, 2

    def __init__(self, config, *, device=None):
        self.config = config
        with open(config) as self.file:
            self.left, (self.right, *_) = 1, (2, 3)
        self.config.deep = 1

    @classmethod
    def make(cls, size): ...

    @staticmethod
    def pure(size, /): ...

    if fast:
        def speed(self): ...
    else:
        def speed(self, slow): ...

@dataclass
class Point:
    x: int
    kinds: ClassVar[int] = 0
    seen: int = field(init=False, default=0)

@dataclass
class Named(Point):
    name: str = ""

class Pair(NamedTuple):
    one: int
    two: int = 2

@lru_cache
def cached(key): ...

async def wait(seconds, **rest): ...
""",
    "vllm/sub/__init__.py": "from .deep import Deep as Deeper\nfrom . import deep\nfrom ..base import cached\n",
    "vllm/sub/deep.py": """
import vllm.base as b
from vllm import base
class Deep(b.Root[int]):
    own = base.Point
""",
}


@pytest.fixture
def toy(tmp_path: Path) -> Sources:
    for name, text in TOY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return Sources(tmp_path)


@pytest.mark.parametrize(
    ("path", "names", "takes_any"),
    [
        ("vllm.base:Root", ["config", "device"], False),
        ("vllm.base:Root.make", ["size"], False),
        ("vllm.base:Root.pure", ["size"], False),
        ("vllm.base:Root.speed", [], False),
        ("vllm.base:Named", ["x", "name"], False),
        ("vllm.base:Named.__init__", ["x", "name"], False),
        ("vllm.base:Pair", ["one", "two"], False),
        ("vllm.base:wait", ["seconds", "rest"], True),
        ("vllm.sub:Deeper.__init__", ["config", "device"], False),
        ("vllm.sub.deep:Deep.make", ["size"], False),
        ("vllm.sub.deep:b.wait", ["seconds", "rest"], True),
        ("vllm.sub:deep.Deep.speed", [], False),
        ("vllm.sub:cached", ["key"], False),
    ],
)
def test_signatures(toy: Sources, path: str, names: list[str], takes_any: bool) -> None:
    assert toy.signature(path) == (names, takes_any)


def test_a_caches_method_is_there_but_tells_nothing(toy: Sources) -> None:
    assert toy.signature("vllm.sub:cached.cache_clear") is None


def test_attributes(toy: Sources) -> None:
    there = ("name", "LIMIT", "OTHER", "config", "file", "left", "right", "make", "own")
    assert toy.lacking("vllm.sub:Deeper", (*there, "deep", "device", "x")) == ["deep", "device", "x"]
    assert toy.lacking("vllm.base:Root", ("own",)) == ["own"]
    assert toy.lacking("vllm.base:Named", ("x", "kinds", "seen", "name", "y")) == ["y"]
    assert toy.lacking("vllm.sub", ("Deeper", "deep", "Deep", "base")) == ["Deep", "base"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("vllm.bass:Root", "vllm.bass can't be imported (no such file)"),
        ("vllm.base:Roof.make", "vllm.base has no Roof"),
        ("vllm.base:Only", "vllm.base has no Only"),
        ("vllm.base:fast", "vllm.base has no fast"),
        ("vllm.base:T", "vllm.base.T is no function by its syntax"),
        ("vllm.base:Root.LIMIT", "vllm.base.Root.LIMIT is no function by its syntax"),
        ("vllm.sub:Deeper.bake", "vllm.sub.Deeper has no bake"),
        ("vllm.base:wait.cache_clear", "vllm.base.wait has no cache_clear"),
    ],
)
def test_what_is_missing_is_named(toy: Sources, path: str, message: str) -> None:
    with pytest.raises(Missing) as caught:
        toy.signature(path)
    assert str(caught.value) == message


# ---- the installed vLLM


@pytest.fixture(scope="module")
def installed() -> Sources:
    return Sources(INSTALLED.parent)


@pytest.mark.parametrize("part", [p for p in EVERY if p.path != ONLY_ON_CUDA], ids=lambda part: part.path)
def test_sources_say_what_importing_says(part: Part, installed: Sources) -> None:
    assert part.problem(installed) is None
    assert part.problem() is None
    if isinstance(part, Function):
        assert installed.signature(part.path) == running.signature(part.path)
        return
    more = replace(part, names=(*part.names, "no_such_attribute"))
    assert more.problem(installed) == more.problem() is not None


@pytest.mark.parametrize("part", EVERY, ids=lambda part: part.path)
def test_a_part_that_is_gone_is_noticed(part: Part, installed: Sources) -> None:
    assert "_gone" in str(replace(part, path=f"{part.path}_gone").problem(installed))


def changed(root: Path, file: str, old: str, new: str) -> Path:
    """The installed vLLM with one word changed in one file; the other files are links."""
    here, there = INSTALLED, root / "vllm"
    there.mkdir(parents=True)
    for name in Path(file).parts:
        for entry in here.iterdir():
            if entry.name != name:
                (there / entry.name).symlink_to(entry)
        here, there = here / name, there / name
        if here.is_dir():
            there.mkdir()
    text = here.read_text()
    assert old in text
    there.write_text(text.replace(old, new))
    return root


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        (
            "v1/worker/gpu/model_runner.py",
            "def prepare_attn(",
            "def prepare_attention(",
            "vllm.v1.worker.gpu.model_runner.GPUModelRunner has no prepare_attn",
        ),
        (
            "v1/worker/gpu/async_utils.py",
            "self.copy_event",
            "self.copied",
            "vllm.v1.worker.gpu.async_utils.AsyncOutput has no copy_event",
        ),
        (
            "v1/worker/gpu/input_batch.py",
            "    query_start_loc_np: np.ndarray",
            "    starts_np: np.ndarray",
            "vllm.v1.worker.gpu.input_batch.InputBatch has no query_start_loc_np",
        ),
        (
            "v1/worker/gpu/metrics/logits.py",
            "def get_num_nans(logits:",
            "def get_num_nans(rows:",
            "vllm.v1.worker.gpu.metrics.logits.get_num_nans takes (rows), expected (logits)",
        ),
    ],
)
def test_a_change_in_a_real_file_is_found(file: str, old: str, new: str, problem: str, tmp_path: Path) -> None:
    sources = Sources(changed(tmp_path, file, old, new))
    found = {key: [p for p in (part.problem(sources) for part in parts) if p] for key, parts in CONTRACT.items()}
    assert found == {(runner, device): [problem] if runner == "v2" else [] for runner, device in CONTRACT}


# ---- vLLM's releases


def run_tool(*versions: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TOOL.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(TOOL), *versions]
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)


def test_the_tool_names_a_vanished_hook(tmp_path: Path) -> None:
    root = tmp_path / "vllm-lookahead" / "sources"
    for version in ("0.31.0", "0.32.0", "0.34.0"):
        changed(
            root / f"vllm-{version}", "v1/worker/gpu/model_runner.py", "def prepare_attn(", "def prepare_attention("
        )
    result = run_tool("0.31.0", "0.32.0", "0.34.0", XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 1, result.stderr
    problem = "vllm.v1.worker.gpu.model_runner.GPUModelRunner has no prepare_attn"
    lines = result.stdout.splitlines()
    for device in ("cpu", "cuda"):
        assert f"vLLM 0.32.0, V2, {device}: {problem}" in lines
        assert f"vLLM 0.34.0, V2, {device}: not supported yet: {problem}" in lines
    assert "vLLM 0.34.0, V1, cpu: not supported yet: all fits" in lines
    assert not any(line.startswith("vLLM 0.31.0") for line in lines), "V2 isn't supported there, V1 fits"


def test_the_tool_says_that_there_is_no_index() -> None:
    nowhere = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    result = run_tool(**nowhere, PIP_EXTRA_INDEX_URL="", PIP_FIND_LINKS="")
    assert result.returncode == 2, result.stdout
    assert result.stderr.startswith("no package index: ")


@pytest.mark.index
@pytest.mark.xdist_group("vllm releases")
def test_vllms_releases_fit() -> None:
    """The newest patch release of every minor version that we support, and whatever is newer."""
    result = run_tool()
    if result.returncode == 2:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "│ 0.33." in result.stdout
    for line in result.stdout.splitlines():
        if "not supported yet" in line:
            warnings.warn(line, stacklevel=1)
