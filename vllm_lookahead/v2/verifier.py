"""Verification of draft trees in V2: the target's token at every node, and the walk down from the root.

V2 samples with noise that depends on nothing but the request's seed and the position
(``v1/worker/gpu/sample/gumbel.py``), and a node's position is that of its depth. So one call of vLLM's own sampler over
all nodes gives at each of them the very token that it would give there without speculation, seeded or greedy, whatever
else the step holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler, get_max_chunk_logits

from vllm_lookahead.v2.chains import paths_as_chains

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_lookahead.v2.runner import LookaheadV2RunnerMixin


class WalkedTokens(NamedTuple):
    """Where a step's walks ended, on the model's device.

    Attributes:
        tokens: int64 [rows, width], what each row emits, padded with -1; width is the largest tree's nodes and one.
        lengths: int32 [rows], how many that is: accepted nodes and one.
        order: int64 [nodes + rows], the logits rows, each request's root and accepted nodes before its other nodes.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    order: torch.Tensor


class _Rows(NamedTuple):
    """What is sampled: ``Sampler.sample``'s arguments, and which part of them each request has."""

    logits: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    input_ids: torch.Tensor
    depths: torch.Tensor
    ends: np.ndarray
    back: torch.Tensor | None


class RootSampler(Sampler):
    """vLLM's sampler for steps without drafts, in which the roots' logits are of use, too."""

    _runner: LookaheadV2RunnerMixin

    @classmethod
    def over(cls, sampler: Sampler, runner: LookaheadV2RunnerMixin) -> RootSampler:
        """One that goes on with the state of vLLM's.

        Args:
            sampler: vLLM's.
            runner: whose steps are sampled.
        """
        made = cls.__new__(cls)
        for name, value in vars(sampler).items():
            setattr(made, name, value)
        made._runner = runner
        return made

    def __call__(self, logits: torch.Tensor, input_batch: InputBatch) -> SamplerOutput:
        """As vLLM's."""
        self._runner.keep_top(logits)
        return super().__call__(logits, input_batch)


class TreeVerifier(RejectionSampler):
    """Stands where vLLM's rejection sampler stands; nothing is rejected by chance here.

    Args:
        runner: whose steps are verified.
    """

    def __init__(self, runner: LookaheadV2RunnerMixin) -> None:
        super().__init__(runner.sampler, runner.speculative_config, runner.device)
        self._runner = runner

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> SamplerOutput:
        """Sample at every node and walk.

        Args:
            logits: [nodes + rows, vocabulary], rows ordered as in ``StepTrees``.
            input_batch: vLLM's, with the tree rows' positions.
            draft_logits: never given: drafts are tokens here.
            invalid_drafts: bool [nodes + rows], nodes that a grammar forbids.
        """
        sampler = self.sampler
        num_nans = get_num_nans(logits) if sampler.compute_nans else None
        dims = sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        keeps_processed = dims is not None and sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
        self._runner.keep_top(logits)
        sampled, processed = self._sample(logits, input_batch, dims is not None, keeps_processed)
        self._runner.keep_most_likely(logits, sampled, input_batch)
        walked = self._runner.walk(sampled, invalid_drafts)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            walked.lengths,
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            sampler.req_states.prefill_len.gpu,
        )
        logprobs = None
        if dims is not None:
            source = logits if processed is None else processed
            logprobs = self._logprobs(source, sampled, walked.order, input_batch, *dims)
        return SamplerOutput(
            sampled_token_ids=walked.tokens,
            logprobs_tensors=logprobs,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _sample(
        self, logits: torch.Tensor, batch: InputBatch, wants_logprobs: bool, keeps_processed: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """int64 [nodes + rows], the token at every logits row; and the logits that it was drawn from, if asked for."""
        rows = self._rows(logits, batch)
        sampled, processed = [], []
        for first, last in self._chunks(rows.ends, logits.shape[1]):
            part = slice(rows.ends[first - 1] if first else 0, rows.ends[last - 1])
            tokens, used = self.sampler.sample(
                rows.logits[part],
                rows.slots[part],
                batch.idx_mapping[first:last],
                batch.idx_mapping_np[first:last],
                rows.positions[part],
                rows.input_ids[part],
                rows.depths[part],
                batch.seq_lens_cpu_upper_bound.numpy()[first:last],
                return_logprobs=wants_logprobs,
            )
            sampled.append(tokens)
            if keeps_processed:
                processed.append(used)
        all_sampled, all_processed = _joined(sampled), _joined(processed) if keeps_processed else None
        if rows.back is not None:
            all_sampled = all_sampled[rows.back]
            all_processed = None if all_processed is None else all_processed[rows.back]
        return all_sampled, all_processed

    def _rows(self, logits: torch.Tensor, batch: InputBatch) -> _Rows:
        """The logits rows; where a request needs it, its tree's paths as chains (``v2.chains``)."""
        step, at = self._runner.step, batch.logits_indices
        slots, positions, tokens = batch.expanded_idx_mapping, batch.positions[at], batch.input_ids[at]
        assert step is not None
        in_order = self._runner.rows_in_order(batch)
        if not (in_order & step.branched).any():
            return _Rows(logits, slots, positions, tokens, batch.expanded_local_pos, batch.cu_num_logits_np[1:], None)
        chains = paths_as_chains(step, in_order)
        rows, depths, back = (async_tensor_h2d(array, device=logits.device) for array in chains[:3])
        return _Rows(logits[rows], slots[rows], positions[rows], tokens[rows], depths, chains.ends, back)

    def _chunks(self, ends: np.ndarray, vocab_size: int) -> Iterator[tuple[int, int]]:
        """Ranges of requests whose logits, copied to float32 by the sampler, take no more memory than vLLM's own do."""
        most = get_max_chunk_logits(vocab_size)
        first, begin = 0, 0
        while first < len(ends):
            last = max(first + 1, int(np.searchsorted(ends, begin + most, side="right")))
            yield first, last
            first, begin = last, int(ends[last - 1])

    def _logprobs(
        self,
        logits: torch.Tensor,
        sampled: torch.Tensor,
        order: torch.Tensor,
        batch: InputBatch,
        num_logprobs: int,
        most_token_ids: int,
    ) -> LogprobsTensors:
        """As vLLM's sampler, in the order in which vLLM looks for a request's emitted tokens."""
        return compute_topk_scores(
            logits[order],
            num_logprobs,
            sampled[order],
            batch.cu_num_logits_np.tolist(),
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=batch.expanded_idx_mapping,
            max_per_req_token_ids=most_token_ids,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
