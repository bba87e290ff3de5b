"""Sampling at the nodes of the draft trees: which tokens the target model itself would have produced.

Drafts are deterministic, so the lossless rule is simple: at each visited node sample the next token exactly as vLLM
would without speculation; if a child carries it, go there, else stop. vLLM's own ``Sampler`` does the sampling, one
depth at a time for the whole batch. That is what makes every option exact for free: at depth d each row's penalties,
bad words, minimum length and logits processors see the output so far plus the row's path, and a seeded request's
generator is drawn from once per emitted position, in position order, as without drafts. Only visited nodes are
sampled, a few per row, so the softmax and sorting work does not grow with the tree.

Greedy batches without any such option take one argmax over all nodes and one walk instead.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_lookahead.trees.step import Descent, StepTrees, Walks, walk_all


def is_idle(processor: LogitsProcessor) -> bool:
    """Whether a logits processor has nothing to do for any request of the batch; unknown ones always may."""
    match processor:
        case MinTokensLogitsProcessor():
            return not processor.min_toks
        case LogitBiasLogitsProcessor():
            return not processor.biases
        case MinPLogitsProcessor():
            return not processor.min_p_count
        case _:
            return False


def is_plain(metadata: SamplingMetadata) -> bool:
    """Whether sampling a row depends on nothing but its logits, temperature, top-k, top-p and generator."""
    holder = metadata.thinking_budget_state_holder
    return (
        metadata.no_penalties
        and not metadata.bad_words_token_ids
        and metadata.allowed_token_ids_mask is None
        and not metadata.logprob_token_ids
        and (holder is None or not holder.has_tracked_requests())
        and all(is_idle(processor) for processor in metadata.logitsprocs.all)
    )


class TreeSampler:
    """Samples at tree nodes with vLLM's sampler and walks the trees.

    Args:
        sampler: vLLM's sampler.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __call__(
        self,
        logits: torch.Tensor,
        metadata: SamplingMetadata,
        step: StepTrees,
        discard: NDArray[np.bool_],
        output_token_ids: list[list[int]],
        argmax: NDArray[np.int64] | None = None,
    ) -> tuple[SamplerOutput, Walks]:
        """Sample and walk one step.

        Args:
            logits: float [nodes + rows, vocabulary], rows ordered as in ``StepTrees``. May be overwritten.
            metadata: vLLM's sampling metadata of the batch, one row per request.
            step: the trees.
            discard: bool [rows], rows whose sample vLLM throws away (prompts not yet fully prefilled): nothing is
                drawn from their generators.
            output_token_ids: each row's output so far: the very lists that vLLM's processors hold. They are extended
                during the walk and restored before returning.
            argmax: what ``argmax`` says of the logits, if it is known already.
        """
        plain = is_plain(metadata)
        if metadata.all_greedy and plain and metadata.max_num_logprobs is None:
            walks = walk_all(step, self.argmax(logits) if argmax is None else argmax)
            return _output(walks, None), walks
        return self._walk_by_depth(logits, metadata, step, discard, output_token_ids, plain)

    def sample_roots(
        self, logits: torch.Tensor, metadata: SamplingMetadata, discard: NDArray[np.bool_]
    ) -> SamplerOutput:
        """A step without drafts: vLLM's own sampling (which may write to ``logits``).

        Args:
            logits: float [rows, vocabulary].
            metadata: as for ``__call__``.
            discard: bool [rows], as for ``__call__``.
        """
        if metadata.generators and any(discard.tolist()):
            drawing = {row: generator for row, generator in metadata.generators.items() if not discard[row]}
            metadata = replace(metadata, generators=drawing)
        return self.sampler(logits, metadata)

    def argmax(self, logits: torch.Tensor) -> NDArray[np.int64]:
        """int64 [rows]: the most likely token of each logits row, chosen as vLLM's greedy sampling does."""
        return self.sampler.greedy_sample(logits.to(torch.float32)).cpu().numpy()

    def _walk_by_depth(
        self,
        logits: torch.Tensor,
        metadata: SamplingMetadata,
        step: StepTrees,
        discard: NDArray[np.bool_],
        output_token_ids: list[list[int]],
        plain: bool,
    ) -> tuple[SamplerOutput, Walks]:
        rows = step.num_rows
        everyone = None if plain else np.arange(rows)
        all_draw = not (metadata.generators and any(discard.tolist()))
        descent = Descent(step, discard)
        appended: list[int] = []  # rows whose output got a token, once per token
        logprobs: list[LogprobsTensors] = []
        try:
            while len(active := descent.active):
                # Row-indexed state (penalties, processors) needs every row present; otherwise only the active ones.
                visited = active if everyone is None else everyone
                unchanged = plain and all_draw and len(active) == rows
                at_depth = metadata if unchanged else _metadata_of(metadata, rows, visited, active[~discard[active]])
                out = self.sampler(_copied(logits, descent.logits_rows[visited]), at_depth)
                if out.logprobs_tensors is not None:
                    logprobs.append(_scatter(out.logprobs_tensors, visited, rows))
                sampled = out.sampled_token_ids[:, 0].cpu().numpy()
                if plain:
                    descent.follow(sampled)
                    continue
                descent.follow(sampled[active])
                for row in descent.active.tolist():
                    output_token_ids[row].append(int(sampled[row]))
                    appended.append(row)
                if len(descent.active):
                    # Output lists grew: MinTokens and custom processors look at them again, as in a step of their own.
                    for processor in metadata.logitsprocs.all:
                        processor.update_state(None)
        finally:
            for row in appended:
                output_token_ids[row].pop()
        walks = descent.walks()
        return _output(walks, logprobs or None), walks


def _copied(logits: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
    """Some rows of the logits, to be overwritten."""
    if len(rows) == 1:  # several times cheaper than indexing
        return logits[rows[0] : rows[0] + 1].clone()
    return logits[torch.from_numpy(rows).to(logits.device)]


def _metadata_of(
    metadata: SamplingMetadata, rows: int, visited: NDArray[np.int64], drawing: NDArray[np.int64]
) -> SamplingMetadata:
    """What the sampler is told at one depth.

    Args:
        metadata: the batch's.
        rows: how many rows the batch has.
        visited: int64 [visited], the rows that are sampled.
        drawing: int64 [drawing], those of them that may draw from their generators.
    """
    generators = metadata.generators
    if len(visited) == rows:
        generators = {row: generators[row] for row in drawing.tolist() if row in generators}
        return replace(metadata, generators=generators, spec_token_ids=None)
    position = {int(row): i for i, row in enumerate(visited)}
    index = torch.from_numpy(visited)

    def pick(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[index.to(values.device)]

    return replace(
        metadata,
        temperature=pick(metadata.temperature),
        top_p=pick(metadata.top_p),
        top_k=pick(metadata.top_k),
        generators={position[row]: generators[row] for row in drawing.tolist() if row in generators},
        spec_token_ids=None,
    )


def _scatter(logprobs: LogprobsTensors, visited: NDArray[np.int64], rows: int) -> LogprobsTensors:
    """Spread the visited rows' logprobs over all batch rows (the others are filtered out by vLLM's parsing)."""
    if len(visited) == rows:
        return logprobs
    index = torch.from_numpy(visited).to(logprobs.logprobs.device)

    def spread(values: torch.Tensor) -> torch.Tensor:
        out = values.new_zeros((rows, *values.shape[1:]))
        out[index] = values
        return out

    return LogprobsTensors(
        spread(logprobs.logprob_token_ids), spread(logprobs.logprobs), spread(logprobs.selected_token_ranks)
    )


def _output(walks: Walks, logprobs: list[LogprobsTensors] | None) -> SamplerOutput:
    """vLLM's sampler output, as ``RejectionSampler.parse_output`` expects it: rows padded with placeholders."""
    tensors = None
    if logprobs is not None:
        ids, values, ranks = (
            torch.stack([depth[field] for depth in logprobs], dim=1).flatten(0, 1) for field in range(3)
        )
        tensors = LogprobsTensors(ids, values, ranks)
    return SamplerOutput(sampled_token_ids=torch.from_numpy(walks.tokens), logprobs_tensors=tensors)
