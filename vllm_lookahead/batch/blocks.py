"""What happens to blocks of rows before and after the engines: read, prepared, written.

Helpers of the cluster import this file, many at once: it imports Ray, but neither vLLM nor torch.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pyarrow
from ray.data import Datasource, ReadTask
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import BlockBasedFileDatasink

from vllm_lookahead.batch.rows import row_key, to_line
from vllm_lookahead.batch.settings import Settings

KEY, ROW, LINE, ERROR = "key", "row", "line", "__inference_error__"
"""Columns: a row's key, the row and its result as JSON, and what ray.data.llm calls a failed row's error."""

FAILED = "failed:"
"""Before the key of a row that failed: Ray remembers it as done, and no row of the input has that key."""


class RowsDatasource(Datasource):  # type: ignore[misc]
    """The rows of an input, in the blocks that are asked for, because a checkpoint covers one block."""

    def __init__(self, path: str, blocks: list[tuple[int, int]]) -> None:
        super().__init__()
        self._path, self._blocks = path, blocks

    def estimate_inmemory_data_size(self) -> int:
        """See ``ray.data.Datasource``."""
        return self._blocks[-1][1]

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """One task per block, whatever parallelism Ray finds best."""
        return [
            ReadTask(
                functools.partial(read_block, self._path, start, end),
                BlockMetadata(num_rows=None, size_bytes=end - start, input_files=None, exec_stats=None),
            )
            for start, end in self._blocks
        ]


def read_block(path: str, start: int, end: int) -> list[pyarrow.Table]:
    """The rows between two offsets: keys, and the rows as JSON (a column each would force one schema on all)."""
    with open(path, "rb") as file:
        file.seek(start)
        lines = file.read(end - start).splitlines()
    return [pyarrow.table({KEY: [row_key(json.loads(line)) for line in lines], ROW: [line.decode() for line in lines]})]


class LinesDatasink(BlockBasedFileDatasink):  # type: ignore[misc]
    """Writes the column ``LINE`` as it is."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, file_format="jsonl")

    def write_block_to_file(self, block: BlockAccessor, file: pyarrow.NativeFile) -> None:
        """See ``ray.data.datasource.BlockBasedFileDatasink``."""
        for row in block.iter_rows(public_row_format=True):
            file.write(row[LINE].encode())


class Preparation:
    """Turns rows into what ray.data.llm's engine takes. Texts are tokenised by vLLM, chats here."""

    def __init__(self, settings: Settings) -> None:
        self._sampling = settings.sampling
        self._tokenizer = settings.engine.get("tokenizer") or settings.model
        self._trust = bool(settings.engine.get("trust_remote_code"))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Add the prompt to a row, or the reason why there is none."""
        given = json.loads(row[ROW])
        prepared = {"prompt": given.get("prompt"), "sampling_params": self._sampling, ERROR: ""}
        if given.get("prompt") == "":
            prepared[ERROR] = "the prompt is empty"
        elif "messages" in given:
            try:
                prepared["tokenized_prompt"] = self._chat(given["messages"])
            except Exception as error:  # templates raise what they like, and it is this row's fault only
                prepared[ERROR] = f"{type(error).__name__}: {error}"
        return prepared

    def _chat(self, messages: list[dict[str, Any]]) -> list[int]:
        tokenizer = load_tokenizer(self._tokenizer, self._trust)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # the template has the special tokens already
        return list(tokenizer.encode(text, add_special_tokens=False))


@functools.cache
def load_tokenizer(name: str, trust_remote_code: bool) -> Any:
    """A tokenizer, once per process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def to_result(row: dict[str, Any]) -> dict[str, str]:
    """What is written of a row: all that was given, and the result or the error."""
    given = json.loads(row[ROW])
    if row[ERROR]:
        return {KEY: FAILED + row[KEY], LINE: to_line({**given, "error": row[ERROR]}).decode()}
    result: dict[str, Any] = {
        "generated_text": row["generated_text"],
        "generated_tokens": [int(token) for token in row["generated_tokens"]],
        "num_input_tokens": int(row["num_input_tokens"]),
        "num_generated_tokens": int(row["num_generated_tokens"]),
    }
    for name in ("logprobs", "prompt_logprobs"):
        if row.get(name) is not None:
            # per token: None or the likeliest tokens' ids, each with its logprob, rank and text
            result[name] = [
                position and {str(token): dict(entry) for token, entry in position.items()} for position in row[name]
            ]
    return {KEY: row[KEY], LINE: to_line({**given, **result}).decode()}
