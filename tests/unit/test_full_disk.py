"""A disk without room, or a file system that nobody may write to: one line says so, and what can go on goes on.

A limit on the size of files (``RLIMIT_FSIZE``) stands for the full disk, a file in place of a folder for one that can't
be written to: neither needs a right that a test hasn't.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = Path(__file__).parents[2]
NOWHERE = "/dev/null/nowhere"


def run(
    code: str, *, file_size: int | None = None, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder, that may only write files up to a size."""
    limit = f"from resource import *; setrlimit(RLIMIT_FSIZE, ({file_size},) * 2)\n"
    program = code if file_size is None else limit + code
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_room_for_the_counters() -> None:
    code = (
        "import os\n"
        "from prometheus_client import REGISTRY\n"
        "from vllm_lookahead import metrics\n"
        "metrics.publish(('context',), 'm', 1)\n"
        "assert metrics.FILE not in os.environ\n"
        "assert not [s for family in REGISTRY.collect() if 'by_source' in family.name for s in family.samples]\n"
        "metrics.SourceCounts(('context',), 0, 'm', first=True)\n"
    )
    done = run(code, file_size=0)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "No counters by source on /metrics: there is no room for their file: " in line


def test_no_room_for_a_corpus(demo_model: str, tmp_path: Path) -> None:
    corpus, cache = tmp_path / "corpus.txt", tmp_path / "cache"
    corpus.write_text("one two three four\n" * 50)
    code = (
        "import logging, sys\n"
        "from pathlib import Path\n"
        "from transformers import AutoTokenizer\n"
        "from vllm_lookahead.config import ConfigError\n"
        "from vllm_lookahead.corpus import index_of\n"
        f"tokenizer = AutoTokenizer.from_pretrained({demo_model!r})\n"
        "try:\n"
        f"    index_of({str(corpus)!r}, tokenizer, 3, Path({str(cache)!r}), logging.getLogger())\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    done = run(code, file_size=4096)
    assert f"corpus: its index can't be written to {cache}: " in done.stdout, done.stderr
    assert "None" not in done.stdout
    assert list(cache.iterdir()) == []


def test_kernels_that_can_not_be_kept(model: str, tmp_path: Path) -> None:
    """They are compiled at each start: there is no folder to write to, or no room in it."""
    for name in ("proposers", "vllm_lookahead"):
        shutil.copytree(PACKAGES / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "model"))
        for folder in [tmp_path / name, *(path for path in (tmp_path / name).rglob("*") if path.is_dir())]:
            (folder / "__pycache__").touch()
    code = (
        "import json\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "ours = {'method': 'prompt_lookup'}\n"
        f"arguments = EngineArgs(model={model!r}, skip_tokenizer_init=True, speculative_config=ours)\n"
        "arguments.create_engine_config()\n"
        "import proposers, vllm_lookahead.v1.cpu_worker\n"
        "from proposers import numba_cache, shared_text\n"
        "shared_text.SharedText(64, 3).owner('')\n"
        "print(json.dumps([proposers.__file__, numba_cache.PROBLEM]))\n"
    )
    nowhere = {"HOME": NOWHERE, "XDG_CACHE_HOME": NOWHERE, "NUMBA_CACHE_DIR": NOWHERE}
    apart = {"PYTHONPATH": str(tmp_path), "VLLM_CACHE_ROOT": str(tmp_path), "VLLM_CONFIG_ROOT": str(tmp_path)}
    done = run(code, folder=tmp_path, **apart, **nowhere)
    assert done.returncode == 0, done.stderr
    where, problem = json.loads(done.stdout.splitlines()[-1])
    assert Path(where).is_relative_to(tmp_path)
    assert problem == "no folder can be written to"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "they can't be kept" in line]
    assert len(lines) == 1
    code = "from proposers import numba_cache; print(numba_cache.PROBLEM, numba_cache.CACHE)"
    done = run(code, file_size=1 << 20, NUMBA_CACHE_DIR=str(tmp_path / "kernels"))
    assert "can't be written to: File too large False" in done.stdout, done.stderr
