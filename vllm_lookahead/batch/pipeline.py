"""The job on Ray: ray.data reads the rows, ray.data.llm generates, ray.data writes, and remembers what is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from vllm_lookahead.batch.blocks import KEY, LinesDatasink, Preparation, RowsDatasource, to_result
from vllm_lookahead.batch.folder import Folder
from vllm_lookahead.batch.rows import Input
from vllm_lookahead.batch.settings import Settings

MAX_NUM_SEQS = 256
"""vLLM's usual default."""


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
    # reading, preparing and writing need no place of their own, so that the engines may take all that there is
    aside: dict[str, Any] = {"num_cpus": 0, "concurrency": max(2, cluster.replicas)}
    processor = build_processor(
        processor_config(settings, cluster, len(blocks)),
        preprocess=Preparation(settings),
        preprocess_map_kwargs=dict(aside),
        postprocess_map_kwargs=dict(aside),
    )
    dataset = ray.data.read_datasource(RowsDatasource(str(rows.path), blocks), **aside)
    results = processor(dataset).map(to_result, **aside)
    results.write_datasink(
        LinesDatasink(str(folder.parts)), ray_remote_args={"num_cpus": 0}, concurrency=aside["concurrency"]
    )


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
