"""The job on Ray: ray.data reads blocks of rows, ray.data.llm generates, ray.data writes and remembers what is written.

This file alone imports Ray. The classes and functions here also run on the cluster's other machines.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from typing import Any

import pyarrow
import ray
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import BlockBasedFileDatasink
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from vllm_lookahead.batch.folder import Folder
from vllm_lookahead.batch.rows import Input, row_key, to_line
from vllm_lookahead.batch.settings import Settings

KEY, ROW, LINE, ERROR = "key", "row", "line", "__inference_error__"
"""Columns: a row's key, the row and its result as JSON, and what ray.data.llm calls a failed row's error."""

FAILED = "failed:"
"""Before the key of a row that failed: Ray remembers it as done, and no row of the input has that key."""

MAX_NUM_SEQS = 256
"""vLLM's usual default."""

HELPER = {"num_cpus": 0}
"""What reads, prepares and writes needs no place of its own: the engines may take all that there are."""


@dataclass(frozen=True)
class Cluster:
    """How the job is spread.

    Attributes:
        replicas: engines.
        resources: of each engine's worker, as Ray counts them.
        block_rows: rows that are written, and remembered as done, together.
    """

    replicas: int
    resources: dict[str, float]
    block_rows: int

    @property
    def cpu(self) -> bool:
        """Whether the engines run on CPUs."""
        return set(self.resources) <= {"CPU", "memory"}


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


def connect(address: str | None) -> None:
    """Connect to a cluster: the one at ``address``, the one that Ray finds (``RAY_ADDRESS``, this machine's), or, if
    there is none, one on this machine that ends with this process.
    """
    ray.init(address=address)


def disconnect() -> None:
    """Leave the cluster. Ray ends what still runs of the job."""
    ray.shutdown()


def usual_resources() -> dict[str, float]:
    """What an engine's worker gets where nothing else is asked for."""
    return {"GPU" if ray.cluster_resources().get("GPU") else "CPU": 1.0}


def room(resources: dict[str, float]) -> int:
    """How many engines with these resources the cluster has room for, as it is now."""
    there = ray.cluster_resources()
    return int(min(there.get(name, 0.0) // amount for name, amount in resources.items() if amount))


def run(settings: Settings, rows: Input, folder: Folder, cluster: Cluster) -> None:
    """Generate for every row that isn't done, and write the results into the folder's parts.

    Raises:
        ray.exceptions.RayError: the job failed. What was written until then stays.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # an engine that dies while it starts is replaced; if no engine ever starts, the job ends
    context.max_consecutive_actor_init_deaths = cluster.replicas
    context.checkpoint_config = CheckpointConfig(
        id_column=KEY, checkpoint_path=str(folder.checkpoint), delete_checkpoint_on_success=False
    )
    blocks = rows.blocks(cluster.block_rows)
    processor = build_processor(
        processor_config(settings, cluster, len(blocks)),
        preprocess=Preparation(settings),
        preprocess_map_kwargs=dict(HELPER),
        postprocess_map_kwargs=dict(HELPER),
    )
    dataset = ray.data.read_datasource(RowsDatasource(str(rows.path), blocks), **HELPER)
    results = processor(dataset).map(to_result, **HELPER)
    results.write_datasink(LinesDatasink(str(folder.parts)), ray_remote_args=dict(HELPER))


def processor_config(settings: Settings, cluster: Cluster, blocks: int) -> vLLMEngineProcessorConfig:
    """The engines of a job, as ray.data.llm wants them described."""
    # blocks that an engine works on at once: enough to be busy, but none of those that are another engine's share
    busy = math.ceil((settings.engine.get("max_num_seqs") or MAX_NUM_SEQS) / cluster.block_rows) + 1
    at_once = max(1, min(busy, math.ceil(blocks / cluster.replicas)))
    return vLLMEngineProcessorConfig(
        model_source=settings.model,
        engine_kwargs=settings.engine_kwargs,
        concurrency=(cluster.replicas, cluster.replicas),
        batch_size=cluster.block_rows,
        max_concurrent_batches=at_once,
        max_tasks_in_flight_per_actor=at_once,
        # one row that the model can't take must not end the job
        should_continue_on_error=True,
        placement_group_config={"bundle_per_worker": cluster.resources},
        runtime_env={"env_vars": environment(cluster)},
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )


def environment(cluster: Cluster) -> dict[str, str]:
    """What engines need in theirs."""
    # an engine of several workers starts them from a process that has to find the cluster by itself
    variables = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    if cluster.cpu:
        # else all engines of a machine bind themselves to the same cores
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return variables
