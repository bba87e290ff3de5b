"""The model runner's part in tree verification: a mixin over vLLM's runners, the same for CPU and GPU.

What may live here: hooking vLLM's step (inputs, attention metadata, sampling, drafting) to the modules that do the
work. No algorithm, no kernel, no device code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from proposers import DraftTree, Verified
from vllm_lookahead.drafter import Drafter
from vllm_lookahead.hidden import hidden, muted
from vllm_lookahead.sampler import TreeSampler
from vllm_lookahead.step import StepTrees, Walks
from vllm_lookahead.tree_rows import TreeRows

if TYPE_CHECKING:
    Base = GPUModelRunner
else:
    Base = object

logger = init_logger(f"vllm.{__name__}")


class LookaheadRunnerMixin(Base):
    """Verifies draft trees in one forward pass and proposes the next ones.

    A subclass names vLLM's runner after this mixin and implements ``tree_support``, ``set_trees`` and
    ``commit_kv``.
    """

    drafter: Drafter

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        # Under speculative decoding vLLM leaves out min_p and logit_bias and refuses custom processors. The tree sampler
        # runs each of them as it would run without drafts, so all of them are in.
        with (
            hidden(vllm_config.model_config, "logits_processors") as custom,
            muted("vllm.v1.sample.logits_processor", "won't work with speculative decoding"),
        ):
            super().__init__(vllm_config, device)
        with hidden(vllm_config, "speculative_config"):
            self.input_batch.logitsprocs = build_logitsprocs(
                vllm_config, device, device.type != "cpu", self.is_pooling_model, tuple(custom or ())
            )
        self.input_batch.logitsprocs_need_output_token_ids = bool(custom)
        self.tree_sampler = TreeSampler(self.sampler)
        self.trees_verifiable = False
        self._proposed: dict[str, DraftTree] = {}
        self._step: StepTrees | None = None
        self._walks: Walks | None = None
        self._argmax: NDArray[np.int64] | None = None

    # ---- what a device's runner provides

    def tree_support(self) -> str | None:
        """Why this model on this device can't verify trees (then drafts are chains), or None."""
        raise NotImplementedError

    def set_trees(self, trees: TreeRows | None) -> None:
        """Hand the step's tree rows to the attention metadata builders."""
        raise NotImplementedError

    def commit_kv(self, step: StepTrees, walks: Walks) -> None:
        """Move the accepted nodes' KV to the contiguous slots after the root."""
        raise NotImplementedError

    # ---- vLLM's step

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; then decide once whether this model's attention can verify trees."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        reason = self.tree_support()
        self.trees_verifiable = reason is None
        if reason is None:
            logger.info("[%s] verifies draft trees of up to %d nodes.", self.drafter.config.method, self.num_spec_tokens)
        else:
            logger.warning("[%s] falls back to draft chains: %s.", self.drafter.config.method, reason)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        self.drafter.finish(scheduler_output.finished_req_ids)
        return super()._update_states(scheduler_output)

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray) -> Any:
        result = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        step = StepTrees.build(
            self.input_batch.req_ids, scheduler_output.scheduled_spec_decode_tokens, self._proposed
        )
        self._step = step
        self._proposed = {}
        if self.trees_verifiable:
            trees = TreeRows.of(step, self.query_start_loc.np, self.optimistic_seq_lens_cpu.numpy())
            if trees is not None:
                # RoPE positions follow the depth; KV slots keep the flat positions that they were computed from
                device = self.positions.device
                self.positions[torch.from_numpy(trees.tokens).to(device)] = torch.from_numpy(trees.positions).to(device)
            self.set_trees(trees)
        return result

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None) -> SamplerOutput:
        step = self._step
        if logits is None or step is None:
            return super()._sample(logits, spec_decode_metadata)
        rows = step.num_rows
        self._argmax = self.sampler.greedy_sample(logits).cpu().numpy() if self.drafter.proposer.needs_argmax else None
        output, walks = self.tree_sampler(
            logits,
            self.input_batch.sampling_metadata,
            step,
            self.discard_request_mask.np[:rows],
            self.input_batch.req_output_token_ids[:rows],
        )
        self._walks = walks
        if step.branched.any():
            self.commit_kv(step, walks)
        if output.sampled_token_ids.device != logits.device:
            output.sampled_token_ids = output.sampled_token_ids.to(logits.device)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        # vLLM rewinds the generators of rows whose sample is discarded; ours never drew (and CPU generators can't rewind)
        generators, self.input_batch.generators = self.input_batch.generators, {}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators = generators

    def _input_fits_in_drafter(self, common_attn_metadata: CommonAttentionMetadata | None) -> bool:
        # the scheduler truncates trees at max_model_len; every prefix of a tree is a tree
        return common_attn_metadata is not None

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: torch.Tensor | list[list[int]],
        *args: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        """Feed back what was verified, then guess the next trees; flattened, one list per batch row."""
        assert isinstance(sampled_token_ids, list)
        self._observe(sampled_token_ids)
        drafts: list[list[int]] = []
        num_rows = len(sampled_token_ids)
        budget = self._budget(num_rows)
        for row, sampled in enumerate(sampled_token_ids):
            tree = self._propose_row(row, budget) if sampled else None
            drafts.append([] if tree is None else tree.token_ids.tolist())
        return drafts

    # ---- drafting

    def _budget(self, num_rows: int) -> int:
        """Nodes per request: what was asked for, as long as every row fits the scheduler's token budget."""
        room = self.scheduler_config.max_num_batched_tokens // num_rows - 1
        return max(0, min(self.num_spec_tokens, room))

    def _propose_row(self, row: int, budget: int) -> DraftTree | None:
        batch = self.input_batch
        num_tokens = int(batch.num_tokens_no_spec[row])
        budget = min(budget, self.max_model_len - num_tokens - 1)
        if budget <= 0:
            return None
        req_id = batch.req_ids[row]
        sampling_params = self.requests[req_id].sampling_params
        if sampling_params is not None and getattr(sampling_params, "thinking_token_budget", None) is not None:
            return None  # vLLM's forcing state follows committed tokens only
        context = batch.token_ids_cpu[row, :num_tokens]
        tree = self.drafter.propose_tree(req_id, context, int(batch.num_prompt_tokens[row]), budget)
        if tree is None:
            return None
        if not self.trees_verifiable or (sampling_params is not None and sampling_params.structured_outputs):
            # a grammar advances along one path only
            tree = tree.as_chain()
        self._proposed[req_id] = tree
        return tree

    def _observe(self, sampled_token_ids: list[list[int]]) -> None:
        step, walks, argmax = self._step, self._walks, self._argmax
        self._step = self._walks = self._argmax = None
        if step is None or walks is None:
            return
        for row, sampled in enumerate(sampled_token_ids):
            tree = step.trees[row] if row < step.num_rows else None
            if tree is None or not sampled:
                continue
            n = step.num_nodes(row)
            first = int(step.starts[row]) + row
            verified = Verified(
                tokens=np.array(sampled, np.int32),
                path=walks.path(row),
                argmax=None if argmax is None else argmax[first : first + n + 1].astype(np.int32),
                num_nodes=n,
            )
            self.drafter.observe(self.input_batch.req_ids[row], tree, verified)

