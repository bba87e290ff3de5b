"""The lookahead branch as a forward pass of its own (``branch: separate``), on the CPU.

After a step is committed, root and comb of each request run through the model once more. The comb's keys and values
are needed in this pass only. They go to the slots behind the committed ones, which the next step overwrites anyway, and
where those end before the comb does, to vLLM's null block, which no request owns. Only one request at a time may use
that block, so the requests that need it get passes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from proposers import DraftTree
from vllm_lookahead.trees.rows import TreeRows
from vllm_lookahead.trees.step import StepTrees

if TYPE_CHECKING:
    from vllm_lookahead.v1.runner import LookaheadRunnerMixin

NULL_BLOCK = 0


@dataclass(slots=True, frozen=True)
class BranchRow:
    """One request's lookahead branch.

    Attributes:
        row: index in the batch.
        context_length: tokens so far; the root is the last of them.
        root: the root's token.
        comb: the branch.
    """

    row: int
    context_length: int
    root: int
    comb: DraftTree


def run_branches(
    runner: LookaheadRunnerMixin, rows: Sequence[BranchRow], common: CommonAttentionMetadata
) -> list[NDArray[np.int32]]:
    """Run every row's root and comb through the model.

    Args:
        runner: the model runner, after the step's KV commit.
        rows: what to run.
        common: the step's attention metadata, of which only what does not depend on the batch is used.

    Returns:
        Per row, int32 [m + 1]: the argmax after the root and after the first m nodes of its comb; m is smaller than the
        comb where the cache has no room for all of it.
    """
    table = runner.input_batch.block_table[0]
    block_size = table.block_size
    own = [int(table.num_blocks_per_row[row.row]) * block_size for row in rows]
    room = [slots - row.context_length + 1 for slots, row in zip(own, rows, strict=True)]  # the root counts too
    combs = [row.comb.prefix(min(len(row.comb), r + block_size - 1)) for row, r in zip(rows, room, strict=True)]
    fits = [len(comb) + 1 <= r for comb, r in zip(combs, room, strict=True)]
    passes = [[i] for i in range(len(rows)) if not fits[i]]
    if any(fits):
        passes.append([i for i in range(len(rows)) if fits[i]])
    result: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * len(rows)
    for group in passes:
        argmax = _forward(runner, [rows[i] for i in group], [combs[i] for i in group], common)
        for i, values in zip(group, argmax, strict=True):
            result[i] = values
    return result


def _forward(
    runner: LookaheadRunnerMixin, rows: Sequence[BranchRow], combs: Sequence[DraftTree], common: CommonAttentionMetadata
) -> list[NDArray[np.int32]]:
    table = runner.input_batch.block_table[0]
    lengths = np.array([len(comb) + 1 for comb in combs], np.int32)
    query_start = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    seq_lens = np.array([row.context_length - 1 for row in rows], np.int32) + lengths
    step = StepTrees(
        np.concatenate(([0], np.cumsum(lengths - 1))).astype(np.int32),
        np.concatenate([comb.token_ids for comb in combs]),
        np.concatenate([comb.parents for comb in combs]),
        list(combs),
        np.ones(len(rows), np.bool_),
    )
    trees = TreeRows.of(step, query_start, seq_lens)
    assert trees is not None

    width = -(-int(seq_lens.max()) // table.block_size)
    blocks = np.full((len(rows), width), NULL_BLOCK, np.int32)
    flat = []
    for i, row in enumerate(rows):
        known = min(width, int(table.num_blocks_per_row[row.row]))
        blocks[i, :known] = table.block_table.np[row.row, :known]
        positions = np.arange(row.context_length - 1, seq_lens[i])
        flat.append(blocks[i, positions // table.block_size].astype(np.int64) * table.block_size)
        flat[-1] += positions % table.block_size
    slots = torch.from_numpy(np.concatenate(flat))
    tokens = np.concatenate(
        [np.concatenate(([row.root], comb.token_ids)) for row, comb in zip(rows, combs, strict=True)]
    )
    input_ids = torch.from_numpy(tokens.astype(np.int32))
    starts, lens = torch.from_numpy(query_start), torch.from_numpy(seq_lens)
    positions_tensor = torch.from_numpy(trees.positions)
    metadata = replace(
        common,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lens,
        seq_lens_cpu_upper_bound=lens,
        num_reqs=len(rows),
        num_actual_tokens=len(input_ids),
        max_query_len=int(lengths.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=torch.from_numpy(blocks),
        slot_mapping=slots,
        positions=positions_tensor,
        is_prefilling=torch.zeros(len(rows), dtype=torch.bool),
    )
    runner.set_trees(trees)
    try:
        per_layer, slot_mapping = {}, {}
        for group in runner._attn_group_iterator():
            built = group.get_metadata_builder(0).build(0, metadata)
            per_layer.update(dict.fromkeys(group.layer_names, built))
            slot_mapping.update(dict.fromkeys(group.layer_names, slots))
        with set_forward_context(per_layer, runner.vllm_config, num_tokens=len(input_ids), slot_mapping=slot_mapping):
            hidden = runner._model_forward(input_ids=input_ids, positions=positions_tensor)
    finally:
        runner.set_trees(None)
    logits = runner.model.compute_logits(hidden)
    argmax = runner.tree_sampler.argmax(logits).astype(np.int32)
    return [argmax[start:end] for start, end in pairwise(query_start)]
