"""A batch job on a real cluster: its driver is killed, it is resumed, an engine is killed; and its result is that of
``LLM.generate`` for every row, once.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cluster import Cluster, kill, wait_until
from jobs import ROWS, Job, committed, lines, write_lines

pytestmark = pytest.mark.ray

LONG = {"id": "long", "prompt": "one two three " * 400}
CORRECTED = {"id": "long", "prompt": ROWS[0]["prompt"]}
EMPTY = {"id": "empty", "prompt": ""}
ALL = ("--resources", '{"CPU": 2}')
REFUSED = {"id": "refused", "messages": [{"role": "user", "content": 3}]}


class Story(NamedTuple):
    """What happened.

    Attributes:
        target: the job's folder.
        first: rows of the parts at the time when the driver was killed.
        second: parts at the time when an engine was killed.
        status, printed: of the run that went to the end.
    """

    target: Path
    first: list[dict[str, Any]]
    second: list[Path]
    status: int
    printed: str


@pytest.fixture(scope="module")
def story(cluster: Cluster, demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("job")
    target = folder / "out"
    source = write_lines(folder / "in.jsonl", [LONG, EMPTY, *ROWS[:1], REFUSED, *ROWS[1:]])
    # two engines that take all that there is
    job = Job(cluster, source, target, demo_model, *ALL)
    try:
        wait_until(lambda: len(failed(target)) == 3 or job.process.poll() is not None, "the rows that fail")
        job.wait_for_parts(6)
    finally:
        job.kill()
    first = [row for part in committed(target) for row in lines(part)]

    write_lines(source, [CORRECTED, EMPTY, *ROWS[:1], REFUSED, *ROWS[1:]])
    job = Job(cluster, source, target, demo_model, *ALL)
    try:
        job.wait_for_parts(len(committed(target)) + 2)
        kill(cluster.engines()[0])
        second = committed(target)
        status, printed = job.wait()
    finally:
        job.kill()
    return Story(target, first, second, status, printed)


def failed(target: Path) -> list[dict[str, Any]]:
    return [row for part in committed(target) for row in lines(part) if "error" in row]


def test_it_was_disturbed(story: Story) -> None:
    assert len(story.first) < len(ROWS), "the driver was killed too late to prove anything"
    assert {row["id"] for row in story.first if "error" in row} == {"long", "empty", "refused"}
    assert len(story.second) < len(committed(story.target)), "an engine was killed too late to prove anything"


def test_it_went_on_where_it_was(story: Story) -> None:
    done = sum("error" not in row for row in story.first)
    # blocks that were in work may have been finished by Ray after the kill
    (told,) = re.findall(rf"(\d+) of {len(ROWS) + 3} rows are done already", story.printed)
    assert done <= int(told) < len(ROWS)


def test_results_are_those_of_stock_vllm(story: Story, expected: dict[str, dict[str, Any]]) -> None:
    wanted = [{**CORRECTED, **expected[ROWS[0]["id"]]}, *({**row, **expected[row["id"]]} for row in ROWS)]
    assert lines(story.target / "results.jsonl") == wanted


def test_no_row_was_done_twice(story: Story) -> None:
    written = Counter(row["id"] for part in committed(story.target) for row in lines(part) if "error" not in row)
    assert written == Counter([row["id"] for row in ROWS] + ["long"])


def test_rows_that_failed_are_told_and_were_tried_again(story: Story) -> None:
    errors = lines(story.target / "errors.jsonl")
    assert [row["id"] for row in errors] == ["empty", "refused"]
    assert errors[0] == {**EMPTY, "error": "the prompt is empty"}
    assert errors[1]["error"].startswith("TypeError")
    assert Counter(row["id"] for row in failed(story.target)) == {"long": 1, "empty": 2, "refused": 2}
    (long,) = (row for row in failed(story.target) if row["id"] == "long")
    assert "maximum context length is 512 tokens" in long["error"]
    assert story.status == 1
    assert f"{len(ROWS) + 1} done, 2 failed, 0 missing" in story.printed


def test_other_settings_are_refused(story: Story, cluster: Cluster, demo_model: str) -> None:
    job = Job(cluster, story.target / "state" / "input.jsonl", story.target, demo_model, "--max-tokens", "9")
    status, printed = job.wait()
    assert status == 2
    assert "holds the results of another job" in printed
    assert "sampling max_tokens was 64, is 9" in printed


def test_nothing_is_left_on_the_cluster(story: Story, cluster: Cluster) -> None:
    def left() -> list[int]:
        return [*cluster.engines(), *cluster.processes("VLLM::"), *cluster.processes("multiprocessing")]

    wait_until(lambda: not left(), "the engines to end", 60)


def test_settings_of_the_job_are_on_record(story: Story) -> None:
    record = json.loads((story.target / "state" / "job.json").read_text())
    assert record["sampling seed"] == 7
    assert record["speculative config method"] == "lookahead"
