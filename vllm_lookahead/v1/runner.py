"""The model runner's part in tree verification: a mixin over vLLM's runners, the same for CPU and GPU.

What may live here: hooking vLLM's step (inputs, attention metadata, sampling, drafting) to the modules that do the
work. No algorithm, no kernel, no device code.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds, SamplerOutput
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from proposers import DraftTree, RequestInfo
from vllm_lookahead.drafting.drafter import Drafter
from vllm_lookahead.drafting.likeliest import likeliest_np
from vllm_lookahead.drafting.likeliest import warm_up as warm_up_likeliest
from vllm_lookahead.drafting.planner import Planner, room_for
from vllm_lookahead.drafting.policy import FixedBudget
from vllm_lookahead.drafting.request_info import request_info
from vllm_lookahead.drafting.timing import StepTimer, policy_for
from vllm_lookahead.temporary import muted, replaced
from vllm_lookahead.trees.rows import TreeRows
from vllm_lookahead.trees.step import StepTrees, Walks, logits_indices
from vllm_lookahead.trees.step import warm_up as warm_up_walks
from vllm_lookahead.v1.branch import BranchRow
from vllm_lookahead.v1.sampler import TreeSampler

if TYPE_CHECKING:
    from vllm.sequence import IntermediateTensors
    from vllm.v1.core.sched.output import GrammarOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Base
else:
    Base = object

logger = init_logger(f"vllm.{__name__}")

IntArray = NDArray[np.int32]


class LookaheadRunnerMixin(Base):
    """Verifies draft trees in one forward pass and proposes the next ones.

    A subclass names vLLM's runner after this mixin and implements what a device's runner provides.
    """

    drafter: Drafter

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        # Under speculative decoding vLLM leaves out min_p and logit_bias and refuses custom processors. The tree
        # sampler runs each of them as it would run without drafts, so all of them are in.
        with (
            replaced(vllm_config.model_config, "logits_processors", None) as custom,
            muted("vllm.v1.sample.logits_processor", "won't work with speculative decoding"),
        ):
            super().__init__(vllm_config, device)
        with replaced(vllm_config, "speculative_config", None):
            self.input_batch.logitsprocs = build_logitsprocs(
                vllm_config, device, device.type != "cpu", self.is_pooling_model, tuple(custom or ())
            )
        self.input_batch.logitsprocs_need_output_token_ids = bool(custom)
        self.tree_sampler = TreeSampler(self.sampler)
        self.trees_verifiable = False
        self.why_chains: str | None = None
        self.planner = Planner(self.drafter, FixedBudget(self.num_spec_tokens))
        self._timer = StepTimer(self._agree)
        # Without drafts, too: a separate branch needs the metadata that vLLM makes for drafters, and recurrent layers
        # find their state where the last step's drafts left it.
        self._needs_speculative_mode = self.drafter.proposer.separate_branch or self.model_config.is_hybrid
        self._is_plain = False  # the step that runs has no drafts and hides ``speculative_config`` from vLLM
        self._nothing = torch.empty(0, dtype=torch.int32, device=device)
        self._has_trees = False  # in the step that was prepared last
        self._step: StepTrees | None = None
        self._walks: Walks | None = None
        self._argmax: NDArray[np.int64] | None = None
        self._top: IntArray | None = None

    # ---- what a device's runner provides

    def tree_support(self) -> str | None:
        """Why this model on this device can't verify trees (then drafts are chains), or None."""
        raise NotImplementedError

    def set_trees(self, trees: TreeRows | None) -> None:
        """Hand the step's tree rows to the attention metadata builders."""
        raise NotImplementedError

    def place_tokens(self, trees: TreeRows) -> None:
        """Write the tree rows' RoPE positions over those of a chain; after ``set_trees``."""
        raise NotImplementedError

    def commit_kv(self, step: StepTrees, walks: Walks) -> None:
        """Move the accepted nodes' KV to the contiguous slots after the root."""
        raise NotImplementedError

    def run_branches(self, rows: list[BranchRow], common: CommonAttentionMetadata) -> list[IntArray]:
        """Run lookahead branches; see ``branch.run_branches``."""
        raise NotImplementedError

    def warm_up_trees(self) -> None:
        """Compile the device's kernels."""
        raise NotImplementedError

    # ---- start-up

    def prepare_drafting(self) -> None:
        """Compile what the first request would wait for, and measure what a step costs. Every rank calls it."""
        self.drafter.warm_up()
        if self.drafter.proposer.num_top:
            warm_up_likeliest(self.device)
        warm_up_walks()
        if self.trees_verifiable:
            self.warm_up_trees()
        self.planner.policy = policy_for(self.drafter.config, self.scheduler_config, self._time_forward, self._agree)

    def _time_forward(self, num_tokens: int) -> float:
        start = time.perf_counter()
        self._dummy_run(num_tokens)
        if self.device.type == "cuda":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    def _agree(self, value: Any) -> Any:
        """The first rank's value: clocks differ, decisions must not."""
        group = get_tp_group()
        return value if group.world_size == 1 else group.broadcast_object(value, src=0)

    # ---- vLLM's step

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; then decide once whether this model's attention can verify trees."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        budgets = self.input_batch.thinking_budget_state_holder
        if budgets is not None:
            # its requests have no drafts; in speculative mode it would look for its rows among the other rows' drafts
            budgets.in_spec_mode = False
        reason = self.why_chains = self.tree_support()
        self.trees_verifiable = reason is None
        if reason is None:
            method = self.drafter.config.method
            logger.info("[%s] verifies draft trees of up to %d nodes.", method, self.node_limit(1))
        else:
            logger.warning("[%s] falls back to draft chains: %s.", self.drafter.config.method, reason)

    def execute_model(
        self, scheduler_output: SchedulerOutput, intermediate_tensors: IntermediateTensors | None = None
    ) -> Any:
        """As vLLM's; a step without drafts runs as if there were no speculation, which costs less."""
        self._is_plain = not (scheduler_output.scheduled_spec_decode_tokens or self._needs_speculative_mode)
        if not self._is_plain:
            return super().execute_model(scheduler_output, intermediate_tensors)
        with replaced(self, "speculative_config", None):
            return super().execute_model(scheduler_output, intermediate_tensors)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """As vLLM's; after a step without drafts the next are drafted here, since vLLM knows of no drafter then."""
        if not self._is_plain or self.execute_model_state is None:
            return super().sample_tokens(grammar_output)
        with replaced(self, "speculative_config", None):
            output = super().sample_tokens(grammar_output)
        self._draft_token_ids = self._draft(output.sampled_token_ids)
        return output

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        self._timer.start(scheduler_output, self.planner.policy)
        if scheduler_output.finished_req_ids:
            self.planner.finish(scheduler_output.finished_req_ids)
        return super()._update_states(scheduler_output)

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray) -> Any:
        result = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        step = self._step = StepTrees.build(self.input_batch.req_ids, drafts, self.planner.proposed) if drafts else None
        self.planner.forget_scheduled(scheduler_output.num_scheduled_tokens)
        trees = None
        if step is not None and self.trees_verifiable:
            trees = TreeRows.of(step, self.query_start_loc.np, self.optimistic_seq_lens_cpu.numpy())
        self._serve_trees(trees)
        return result

    def _serve_trees(self, trees: TreeRows | None) -> None:
        if trees is not None or self._has_trees:
            self.set_trees(trees)
        self._has_trees = trees is not None
        if trees is not None:
            # RoPE positions follow the depth; KV slots keep the flat positions that they were computed from
            self.place_tokens(trees)

    def _calc_spec_decode_metadata(
        self, num_draft_tokens: NDArray[np.int32], cu_num_scheduled_tokens: NDArray[np.int32]
    ) -> SpecDecodeMetadata:
        """Which positions get logits: each row's root and nodes. Only vLLM's rejection sampler needs more."""
        indices = logits_indices(num_draft_tokens, cu_num_scheduled_tokens)
        nothing = self._nothing
        return SpecDecodeMetadata(
            draft_token_ids=nothing,
            num_draft_tokens=num_draft_tokens.tolist(),
            cu_num_draft_tokens=nothing,
            cu_num_sampled_tokens=nothing,
            target_logits_indices=nothing,
            bonus_logits_indices=nothing,
            logits_indices=torch.from_numpy(indices).to(self.device, non_blocking=True),
        )

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """What was drafted last; None if nothing was, which saves the scheduler a round over its requests."""
        if not self.planner.proposed or not self._draft_token_ids:
            return None
        return DraftTokenIds(self.input_batch.req_ids, self._draft_token_ids)

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None) -> SamplerOutput:
        step = self._step
        if logits is None:
            return super()._sample(logits, spec_decode_metadata)
        if num_top := self.drafter.proposer.num_top:
            # before the sampler writes penalties into the logits
            self._top = likeliest_np(logits, num_top)
        if step is None:
            batch = self.input_batch
            discard = self.discard_request_mask.np[: batch.num_reqs]
            return self.tree_sampler.sample_roots(logits, batch.sampling_metadata, discard)
        rows = step.num_rows
        self._argmax = self.tree_sampler.argmax(logits) if self.drafter.proposer.needs_argmax else None
        output, walks = self.tree_sampler(
            logits,
            self.input_batch.sampling_metadata,
            step,
            self.discard_request_mask.np[:rows],
            self.input_batch.req_output_token_ids[:rows],
            self._argmax,
        )
        self._walks = walks
        if self._has_trees:
            self.commit_kv(step, walks)
        if self.model_config.is_hybrid:
            # only there vLLM reads them on the device; copying them back would be one more wait for it
            output.sampled_token_ids = output.sampled_token_ids.to(logits.device)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        # vLLM rewinds the generators of rows whose sample is discarded. Ours never drew, and CPU generators can't.
        if not self.input_batch.generators:
            return super()._bookkeeping_sync(*args, **kwargs)
        with replaced(self.input_batch, "generators", {}):
            return super()._bookkeeping_sync(*args, **kwargs)

    def _input_fits_in_drafter(self, common_attn_metadata: CommonAttentionMetadata | None) -> bool:
        # the scheduler truncates trees at max_model_len; every prefix of a tree is a tree
        return common_attn_metadata is not None

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: torch.Tensor | list[list[int]],
        sampling_metadata: Any,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        spec_decode_metadata: SpecDecodeMetadata | None,
        common_attn_metadata: CommonAttentionMetadata,
        slot_mappings: Any,
    ) -> list[list[int]]:
        """vLLM's hook for ``_draft``, after steps that are not plain."""
        assert isinstance(sampled_token_ids, list)
        return self._draft(sampled_token_ids, common_attn_metadata)

    # ---- drafting

    def _draft(
        self, sampled_token_ids: list[list[int]], common: CommonAttentionMetadata | None = None
    ) -> list[list[int]]:
        """Feed back what was verified, then guess the next trees; flattened, one list per batch row, or no list at all.

        Args:
            sampled_token_ids: what the step emitted, per batch row.
            common: the step's attention metadata; only a separate lookahead branch needs it.
        """
        rows = len(sampled_token_ids)
        req_ids = self.input_batch.req_ids[:rows]
        self.planner.observe(req_ids, sampled_token_ids, self._step, self._walks, self._argmax, self._top)
        self._step = self._walks = self._argmax = self._top = None
        limit = self.node_limit(rows)
        if common is not None and self.drafter.proposer.separate_branch and self.trees_verifiable and limit > 0:
            self._run_branches(sampled_token_ids, common)
        asked = (row for row, sampled in enumerate(sampled_token_ids) if sampled)
        trees = self.planner.plan(req_ids, asked, self._propose_row, limit)
        return [[] if tree is None else tree.token_ids.tolist() for tree in trees]

    def node_limit(self, num_rows: int) -> int:
        """Most nodes per request, the window's included: what was asked for, as long as every row fits the scheduler's
        token budget.
        """
        budget = self.drafter.config.budget
        most = self.num_spec_tokens if budget == "auto" else budget
        room = self.scheduler_config.max_num_batched_tokens // num_rows - 1
        return max(0, min(most, room))

    def _run_branches(self, sampled_token_ids: list[list[int]], common: CommonAttentionMetadata) -> None:
        """The lookahead branches in forwards of their own, on the roots that this step found."""
        batch = self.input_batch
        due: list[BranchRow] = []
        for row, sampled in enumerate(sampled_token_ids):
            num_tokens = int(batch.num_tokens_no_spec[row])
            # no position of the comb may reach the end of the context; the node budget is the verification's
            limit = self.max_model_len - num_tokens - 1
            req_id = batch.req_ids[row]
            if not sampled or limit <= 0 or self._only_chains(req_id):
                continue
            context = batch.token_ids_cpu[row, :num_tokens]
            prompt, info = int(batch.num_prompt_tokens[row]), self._info_of(req_id)
            comb = self.drafter.propose_branch(req_id, context, prompt, limit, info)
            if comb is not None and self.planner.policy.keeps_branch(req_id, comb, self.drafter.branch_gain(req_id)):
                due.append(BranchRow(row, num_tokens, int(context[-1]), comb))
        if due:
            for branch, argmax in zip(due, self.run_branches(due, common), strict=True):
                self.drafter.observe_branch(batch.req_ids[branch.row], branch.comb, argmax)

    def _only_chains(self, req_id: str) -> bool:
        """Whether this request can't verify trees: a grammar advances along one path only."""
        params = self.requests[req_id].sampling_params
        return not self.trees_verifiable or (params is not None and params.structured_outputs is not None)

    def _propose_row(self, row: int, limit: int) -> DraftTree | None:
        batch = self.input_batch
        req_id = batch.req_ids[row]
        num_tokens = int(batch.num_tokens_no_spec[row])
        params = self.requests[req_id].sampling_params
        if params is not None and getattr(params, "thinking_token_budget", None) is not None:
            return None  # V1's forcing state follows committed tokens only
        num_prompt_tokens = int(batch.num_prompt_tokens[row])
        limit, depth = room_for(params, num_tokens, num_prompt_tokens, self.max_model_len, limit)
        if limit <= 0 or depth <= 0:
            return None
        return self.drafter.propose_tree(
            req_id,
            batch.token_ids_cpu[row, :num_tokens],
            num_prompt_tokens,
            limit,
            depth,
            chain=self._only_chains(req_id),
            branch=self.planner.policy.may_branch(req_id),
            info=self._info_of(req_id),
        )

    def _info_of(self, req_id: str) -> Callable[[], RequestInfo]:
        return lambda: request_info(self.requests[req_id].sampling_params)
