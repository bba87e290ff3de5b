"""``vllm-lookahead batch`` without Ray: the check of the input, whose folder it is, and the account of what is done."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from vllm_lookahead.batch.blocks import ERROR, KEY, LINE, ROW, to_result
from vllm_lookahead.batch.folder import Folder, FolderError
from vllm_lookahead.batch.results import Results
from vllm_lookahead.batch.rows import RESULT_FIELDS, InputError, read_rows, row_key, take_input, to_line
from vllm_lookahead.batch.run import reason, root_cause, usual_block
from vllm_lookahead.batch.settings import SAMPLE, Settings, differences, digest
from vllm_lookahead.cli import app
from vllm_lookahead.config import ConfigError

ROWS: list[dict[str, Any]] = [{"id": f"row {i}", "prompt": f"prompt {i}", "kept": {"i": i}} for i in range(10)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


# ---- rows


def test_rows_come_with_everything_they_hold(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "prompt": "a\u2028b \r\n \x1e c", "more": [1.0000000000000002, None, {"ä": "ß"}]},
        {"id": "2", "messages": [{"role": "user", "content": "Hi"}]},
    ]
    assert list(read_rows(write(tmp_path / "in.jsonl", rows))) == rows
    taken = take_input(tmp_path / "in.jsonl", tmp_path / "copy.jsonl")
    copied = (tmp_path / "copy.jsonl").read_bytes()
    assert [json.loads(copied[start:end]) for start, end in taken.blocks(1)] == rows
    assert taken.keys == [row_key(row) for row in rows]
    assert take_input(taken.path, taken.path) == taken, "a copy can be taken of the copy"


def test_ids_are_made_from_line_numbers(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}, b"\n", {"prompt": "a"}])
    rows = list(read_rows(source))
    assert rows == [{"id": 1, "prompt": "a"}, {"id": 3, "prompt": "a"}]
    assert len({row_key(row) for row in rows}) == 2, "the same prompt twice gives two results"


@pytest.mark.parametrize("rows", [1, 3, 4, 10, 11])
def test_blocks(tmp_path: Path, rows: int) -> None:
    taken = take_input(write(tmp_path / "in.jsonl", ROWS), tmp_path / "copy.jsonl")
    data = taken.path.read_bytes()
    blocks = [data[start:end].splitlines() for start, end in taken.blocks(rows)]
    assert [json.loads(line) for block in blocks for line in block] == ROWS
    assert {len(block) for block in blocks[:-1]} <= {rows}
    assert 1 <= len(blocks[-1]) <= rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, b'{"prompt": \n'], "line 2: not JSON: Expecting value (column 13)"),
        ([b'{"prompt": "\xff"}\n'], "line 1: not UTF-8: invalid start byte"),
        ([b'{"prompt": "\\ud800"}\n'], "line 1: not UTF-8: surrogates not allowed"),
        ([b'{"prompt": "a", "n": ' + b"1" * 5000 + b"}\n"], "line 1: not JSON that can be read: "),
        ([b"[" * 100_000 + b"\n"], "line 1: not JSON that can be read: "),
        ([b"\n", [1]], "line 2: a row must be an object"),
        ([{"text": "a"}], 'line 1: a row needs "prompt" or "messages", and not both'),
        ([{"prompt": "a", "messages": []}], 'line 1: a row needs "prompt" or "messages", and not both'),
        ([{"prompt": 1}], 'line 1: "prompt" must be a text, not 1'),
        ([{"messages": []}], 'line 1: "messages" must be a list of objects'),
        ([{"messages": ["Hi"]}], 'line 1: "messages" must be a list of objects'),
        ([{"id": 1, "prompt": "a"}, {"prompt": "b"}], "line 2: all rows have an id, or none"),
        ([{"prompt": "a"}, {"id": 1, "prompt": "b"}], "line 2: has an id, but rows before it have none"),
        ([{"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}], "line 2: the id 'x' is that of line 1"),
        ([{"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}], "line 2: the id '1' is that of line 1"),
        ([{"id": None, "prompt": "a"}], 'line 1: "id" must be a text or an integer, not null'),
        ([{"id": True, "prompt": "a"}], 'line 1: "id" must be a text or an integer, not true'),
        ([], "holds no rows"),
        ([b"\n", b"  \n"], "holds no rows"),
    ],
)
def test_bad_input_is_told_with_its_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(InputError) as told:
        take_input(write(tmp_path / "in.jsonl", rows), tmp_path / "copy.jsonl")
    assert message in str(told.value)
    assert "in.jsonl" in str(told.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda name: name not in RESULT_FIELDS), json_values), json_values)
def test_a_result_has_the_key_of_its_row(row: dict[str, Any], result: Any) -> None:
    try:
        line = to_line({**row, **dict.fromkeys(RESULT_FIELDS, result)})
    except UnicodeEncodeError:
        return  # read_rows refuses such rows
    assert line.count(b"\n") == 1
    assert row_key(json.loads(line)) == row_key(row)
    assert row_key(dict(reversed(row.items()))) == row_key(row)
    assert row_key({**row, "prompt": "another"}) != row_key({**row, "prompt": "one"})


# ---- settings


def settings(model: str = "org/model", **changes: Any) -> Settings:
    given: dict[str, Any] = {"sampling": {"max_tokens": 8}, "engine": {}, "speculative_config": {"method": "lookahead"}}
    return Settings.read(model=model, **{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "org/other"}, 'model was "org/model", is "org/other"'),
        ({"sampling": {"max_tokens": 9}}, "sampling max_tokens was 8, is 9"),
        ({"sampling": {"max_tokens": 8, "seed": 1}}, "sampling seed was not set, is 1"),
        ({"engine": {"max_model_len": 512}}, "engine max_model_len was not set, is 512"),
        ({"engine": {"dtype": "float32"}}, 'engine dtype was not set, is "float32"'),
        (
            {"speculative_config": {"method": "lookahead", "window_size": 3}},
            "speculative config window_size was not set, is 3",
        ),
        ({"speculative_config": None}, 'speculative config method was "lookahead", is not set'),
        ({"engine": {"gpu_memory_utilization": 0.5, "max_num_seqs": 8}}, ""),
        ({"sampling": {"max_tokens": 8, "seed": None}}, ""),
    ],
)
def test_what_makes_another_job(changes: dict[str, Any], told: str) -> None:
    assert "; ".join(differences(settings().fingerprint(), settings(**changes).fingerprint())) == told


def test_a_model_in_a_folder_is_known_by_its_files(tmp_path: Path) -> None:
    def model(name: str, weights: bytes) -> str:
        folder = tmp_path / name
        (folder / "more").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "more" / "weights").write_bytes(weights)
        return str(folder)

    large = bytes(3 * SAMPLE)
    first = settings(model("first", large)).fingerprint()
    assert settings(model("moved", large)).fingerprint() == first
    for name, other in {"longer": large + b"x", "end": large[:-1] + b"x", "start": b"x" + large[1:]}.items():
        assert list(differences(first, settings(model(name, other)).fingerprint())), name
    between = b"x".join([large[: SAMPLE + 5], large[SAMPLE + 6 : SAMPLE + 20]])
    assert digest(Path(model("a", between))) != digest(Path(model("b", between.replace(b"x", b"y")))), "all is read"


def test_token_ids_are_integers() -> None:
    assert settings(sampling={"logit_bias": {"7": 1.0}}).sampling == {"logit_bias": {7: 1.0}}
    with pytest.raises(ConfigError, match="token ids"):
        settings(sampling={"logit_bias": {"seven": 1.0}})


# ---- folder


def test_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "new" / "out")
    with folder.opened({"sampling seed": 1}):
        pass
    with folder.opened({"sampling seed": 2}):  # nothing was done yet
        (folder.checkpoint / "block.parquet").touch()
    with folder.opened({"sampling seed": 2}):
        pass
    with pytest.raises(FolderError, match=r"another job \(sampling seed was 2, is 3\); name a new folder"):
        folder.opened({"sampling seed": 3}).__enter__()


def test_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(FolderError, match="not empty and holds no job"):
        Folder(tmp_path).opened({}).__enter__()
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.txt"]


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(FolderError, match=f"can't write to the folder {target}: "):
            Folder(target).opened({}).__enter__()


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from vllm_lookahead.batch.folder import Folder\n"
        "with Folder(pathlib.Path(sys.argv[1])).opened({}): pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with Folder(tmp_path).opened({}):
        other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "another process is running the job" in other.stderr
    assert subprocess.run(command, check=False).returncode == 0


# ---- results


def part(folder: Folder, name: str, lines: list[dict[str, Any]], *, finished: bool = True) -> None:
    """A block as the pipeline writes it."""
    (folder.parts / f"{name}.jsonl").write_bytes(b"".join(map(to_line, lines)))
    (folder.checkpoint / f"{name}{'' if finished else '.pending'}.parquet").touch()


def done(row: dict[str, Any], text: str = "text") -> dict[str, Any]:
    return {**row, "generated_text": text}


def failed(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "error": "too long"}


def account(folder: Folder, rows: list[dict[str, Any]]) -> Results:
    return Results(folder, [row_key(row) for row in rows])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path)
    with folder.opened({}):
        return folder


def test_results_are_in_the_order_of_the_input(folder: Folder) -> None:
    part(folder, "a", [done(ROWS[5]), failed(ROWS[4]), done(ROWS[2])])
    results = account(folder, ROWS)
    assert (results.done, results.failed, results.missing) == (2, 1, 7)
    part(folder, "b", [done(ROWS[i]) for i in (9, 0, 1)])
    results.refresh()
    assert (results.done, results.failed, results.missing) == (5, 1, 4)
    results.assemble()
    assert lines(folder.results) == [done(ROWS[i]) for i in (0, 1, 2, 5, 9)]
    assert lines(folder.errors) == [failed(ROWS[4])]


def test_a_part_counts_when_ray_has_committed_it(folder: Folder) -> None:
    part(folder, "a", [done(ROWS[0])], finished=False)
    (folder.parts / "a.jsonl").write_text('{"id": "ro')
    (folder.parts / "b.jsonl").write_text('{"id": "ro')
    assert account(folder, ROWS).missing == 10


def test_rows_of_a_part_that_is_gone_run_again(folder: Folder) -> None:
    part(folder, "a", [done(ROWS[0])])
    part(folder, "b", [done(ROWS[1])])
    (folder.parts / "a.jsonl").unlink()
    results = account(folder, ROWS[:2])
    assert (results.done, results.missing) == (1, 1)
    results.retry()
    assert [path.name for path in folder.checkpoint.iterdir()] == ["b.parquet"], "Ray would leave the row out"


def test_a_row_that_failed_may_be_done_later(folder: Folder) -> None:
    part(folder, "a", [failed(ROWS[0]), failed(ROWS[1])])
    results = account(folder, ROWS[:2])
    results.assemble()
    assert len(lines(folder.errors)) == 2
    results.retry()
    assert (results.done, results.failed, results.missing) == (0, 0, 2)
    part(folder, "b", [done(ROWS[1]), done(ROWS[0])])
    results.refresh()
    results.assemble()
    assert not folder.errors.exists()
    # whichever part is read first
    again = account(folder, ROWS[:2])
    assert (again.done, again.failed) == (2, 0)
    assert lines(folder.results) == [done(ROWS[0]), done(ROWS[1])]


def test_what_left_the_input_does_not_count(folder: Folder) -> None:
    part(folder, "a", [done(ROWS[0], "of the old prompt"), done(ROWS[1])])
    corrected = {**ROWS[0], "prompt": "corrected"}
    results = account(folder, [corrected, ROWS[2], ROWS[1]])
    assert (results.done, results.missing) == (1, 2)
    part(folder, "b", [done(corrected)])
    results.refresh()
    results.assemble()
    assert lines(folder.results) == [done(corrected), done(ROWS[1])]


def test_logprobs_are_json() -> None:
    likely = {"logprob": -0.5, "rank": 1, "decoded_token": "a"}
    impossible = {"logprob": -math.inf, "rank": 2, "decoded_token": None}
    result = {"generated_text": "a", "generated_tokens": [5], "num_input_tokens": 1, "num_generated_tokens": 1}
    row = {KEY: "key", ROW: json.dumps(ROWS[0]), ERROR: "", **result}
    written = to_result({**row, "logprobs": [{5: likely, 6: impossible}], "prompt_logprobs": [None]})
    told = {**impossible, "logprob": -9999.0}
    expected = {**ROWS[0], **result, "logprobs": [{"5": likely, "6": told}], "prompt_logprobs": [None]}
    assert json.loads(written[LINE], parse_constant=pytest.fail) == expected


# ---- the command


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", ROWS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lookahaed"], "unknown speculative method 'lookahaed' (did you mean 'lookahead'?)"),
        (["--method", "lookahead", "--options", '{"window_size": 0}'], "[lookahead]: window_size = 0: must be"),
        (["--options", "{"], "not JSON"),
        (["--engine", "[]"], "must be a JSON object"),
        (["--engine", '{"max_model_length": 1}'], "vLLM's engine has no argument max_model_length"),
        (["--sampling", '{"top_q": 1}'], "--sampling: Unexpected keyword argument 'top_q'"),
        (["--sampling", '{"top_p": 2}'], "--sampling: top_p must be in (0, 1]"),
        (["--sampling", '{"n": 2}'], "--sampling: a row has one result"),
        (["--sampling", '{"seed": 2}'], "seed has an option of its own"),
        (["--engine", '{"model": "other"}'], "--engine: model has an option of its own"),
        (["--resources", '{"CPU": 0}'], "--resources: CPU = 0: must be a number above 0"),
        (["--resources", '{"GPU": "1"}'], '--resources: GPU = "1": must be a number above 0'),
        (["--method", "none", "--options", '{"window_size": 3}'], "the method none has none"),
        (["--model", "./nowhere"], "--model ./nowhere: there is no such folder"),
        (["--replicas", "0"], "--replicas"),
    ],
)
def test_mistake(source: Path, tmp_path: Path, model: str, arguments: list[str], message: str) -> None:
    target = tmp_path / "out"
    result = CliRunner().invoke(app, ["batch", str(source), str(target), "--model", model, *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not target.exists()


def test_mistakes_in_files(source: Path, tmp_path: Path, model: str) -> None:
    bad = write(tmp_path / "bad.jsonl", [*ROWS, b"no json\n"])
    for read, target, message in [
        (tmp_path / "nowhere.jsonl", tmp_path / "out", "nowhere.jsonl does not exist"),
        (tmp_path, tmp_path / "out", f"{tmp_path} is not a file"),
        (Path("/dev/stdin"), tmp_path / "out", "/dev/stdin is not a file"),
        (bad, tmp_path / "out", f"bad.jsonl, line {len(ROWS) + 1}: not JSON"),
        (write(tmp_path / "empty.jsonl", []), tmp_path / "out", "empty.jsonl holds no rows"),
        (source, source, "can't write to the folder"),
    ]:
        result = CliRunner().invoke(app, ["batch", str(read), str(target), "--model", model])
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert not (tmp_path / "out").exists()


def test_without_ray(source: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["batch", str(source), str(tmp_path / "out"), "--model", model])
    assert result.exit_code == 2
    assert "pip install 'vllm-lookahead[ray]'" in result.output


def test_ray_is_imported_by_nothing_else() -> None:
    code = (
        "import sys, vllm_lookahead.cli, vllm_lookahead.plugin, vllm_lookahead.batch.run\n"
        "assert 'ray' not in sys.modules, 'ray was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- small things


@pytest.mark.parametrize(
    ("rows", "replicas", "block"), [(1, 1, 1), (8, 1, 2), (8, 4, 1), (320, 2, 32), (10**6, 4, 100), (10**6, 1, 100)]
)
def test_usual_block(rows: int, replicas: int, block: int) -> None:
    assert usual_block(rows, replicas) == block


def test_why_an_engine_did_not_start_is_found_in_the_log(tmp_path: Path) -> None:
    log, heard = tmp_path / "job.log", "RuntimeError: Engine core initialization failed. See root cause above."
    log.write_text(
        "(EngineCore pid=1) ERROR 11-27 13:49:35 [core.py:1510] ValueError: of an earlier run\n"
        "(EngineCore pid=7) ERROR 11-27 13:50:42 [core.py:1510] Traceback (most recent call last):\n"
        "(EngineCore pid=7) ERROR 11-27 13:50:42 [core.py:1510] ValueError: No available memory for the cache.\n"
        f"(MapWorker pid=2) {heard}\n"
    )
    assert root_cause(heard, log) == "ValueError: No available memory for the cache."
    assert root_cause("OSError: no such model", log) == "OSError: no such model"
    log.write_text("nothing\n")
    assert root_cause(heard, log) == heard


def test_reason_is_one_line() -> None:
    assert reason(ValueError("no")) == "ValueError: no"
    assert reason(RuntimeError()) == "RuntimeError: "
    assert reason(RuntimeError("task failed\nTraceback:\n  File ...\nOSError: no such model\n\n")) == (
        "OSError: no such model"
    )
