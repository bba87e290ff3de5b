"""Model Runner V2's part in tree verification: a mixin over vLLM's runner, the same for CPU and CUDA.

What may live here: hooking vLLM's step (``v1/worker/gpu/model_runner.py``) to the modules that do the work. No
algorithm, no kernel, no device code.

The order of things is that of asynchronous scheduling, and without it the same with nothing in between: vLLM plans step
n + 1 and calls ``execute_model`` while the device still runs step n; we wait for step n's tokens there, as late as can
be, guess the next trees, drop the places that they don't need, and only then let vLLM prepare the step.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.async_utils import AsyncOutput, async_copy_to_np
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState, use_penalty

from proposers import DraftTree
from vllm_lookahead.drafting.drafter import Drafter
from vllm_lookahead.drafting.likeliest import likeliest
from vllm_lookahead.drafting.likeliest import warm_up as warm_up_likeliest
from vllm_lookahead.drafting.planner import Planner, room_for
from vllm_lookahead.drafting.policy import FixedBudget
from vllm_lookahead.drafting.request_info import request_info
from vllm_lookahead.drafting.timing import StepTimer, policy_for
from vllm_lookahead.trees.step import StepTrees, retrace
from vllm_lookahead.trees.step import warm_up as warm_up_walks
from vllm_lookahead.v2.requests import RequestText
from vllm_lookahead.v2.slots import most_nodes, trimmed, used_places
from vllm_lookahead.v2.speculator import HostSpeculator
from vllm_lookahead.v2.verifier import RootSampler, TreeVerifier, WalkedTokens

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import GrammarOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Base
else:
    Base = object

logger = init_logger(f"vllm.{__name__}")

READS_NO_PATH = (LogitBiasState, PenaltiesState, BadWordsState)
"""Logits processors of which we know for which requests they read the tokens before a row; unknown ones always may."""


class _Pending(NamedTuple):
    """A step whose tokens may still be on their way to the host."""

    req_ids: list[str]
    output: AsyncOutput
    step: StepTrees | None
    most_likely: NDArray[np.int64] | None
    top: NDArray[np.int32] | None


class LookaheadV2RunnerMixin(Base):
    """Verifies draft trees in one forward pass and proposes the next ones. To be named before V2's runner.

    A subclass implements what a device provides.

    Attributes:
        step: the trees of the step that runs; None if it has no drafts.
    """

    sampler: Any  # vLLM's, or ours over it

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.drafter = Drafter(vllm_config)
        self.planner = Planner(self.drafter, FixedBudget(self.num_speculative_steps))
        self.speculator = HostSpeculator(self.max_num_reqs, self.num_speculative_steps, device)
        self.trees_verifiable = False
        self.why_chains: str | None = None
        self.step: StepTrees | None = None
        self._timer = StepTimer(self._agree)
        self._texts: dict[str, RequestText] = {}
        self._pending: _Pending | None = None
        self._sampled_rows: list[str] = []  # requests that got tokens in the last step and may be asked for a tree
        self._batch: list[str] = []  # all requests of that step
        self._most_likely: NDArray[np.int64] | None = None
        self._top: NDArray[np.int32] | None = None
        self._chains: DraftTokenIds | None = None  # the last drafts, for the scheduler's grammars
        self._served = False  # trees to attention, in the step that was prepared last
        self._branched = False  # was one of its rows
        self._slots: torch.Tensor | None = None

    # ---- what a device provides

    def tree_support(self) -> str | None:
        """Why this model on this device can't verify trees (then drafts are chains), or None."""
        raise NotImplementedError

    def place_drafts(self, step: StepTrees, batch: InputBatch) -> None:
        """Write the nodes' tokens to the step's input."""
        raise NotImplementedError

    def serve_trees(self, step: StepTrees | None, batch: InputBatch | None) -> None:
        """Hand the tree rows to the attention metadata builders, and write their positions; None: there are none.

        KV slots have been computed from the positions of a chain, and stay.
        """
        raise NotImplementedError

    def walk(self, sampled: torch.Tensor, forbidden: torch.Tensor | None) -> WalkedTokens:
        """Walk every tree of the step.

        Args:
            sampled: int64 [nodes + rows], the token at every logits row.
            forbidden: bool [nodes + rows], nodes that must not be accepted.
        """
        raise NotImplementedError

    def commit_kv(self, slots: torch.Tensor) -> None:
        """Move the accepted nodes' KV to the contiguous slots after the root, by the step's last ``walk``.

        Args:
            slots: int64 [tokens], the KV slot of each token of the batch.
        """
        raise NotImplementedError

    def warm_up_trees(self) -> None:
        """Compile the device's kernels."""
        raise NotImplementedError

    # ---- start-up

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, with our verification instead of rejection sampling."""
        super().load_model(*args, **kwargs)
        if self.drafter.proposer.num_top:
            self.sampler = RootSampler.over(self.sampler, self)
        self.rejection_sampler = TreeVerifier(self)
        self._reads_paths = not all(isinstance(p, READS_NO_PATH) for p in self.sampler.logits_processors)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; then decide once whether this model's attention can verify trees."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        reason = self.why_chains = self.tree_support()
        self.trees_verifiable = reason is None
        method = self.drafter.config.method
        if reason is None:
            logger.info_once("[%s] verifies draft trees of up to %d nodes.", method, self.node_limit(1))
        else:
            logger.warning_once("[%s] falls back to draft chains: %s.", method, reason)

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
        self._dummy_run(num_tokens, skip_eplb=True)
        torch.accelerator.synchronize()
        return time.perf_counter() - start

    def _agree(self, value: Any) -> Any:
        """The first rank's value: clocks differ, decisions must not."""
        group = get_tp_group()
        return value if group.world_size == 1 else group.broadcast_object(value, src=0)

    # ---- requests

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """As vLLM's; a request that comes back after a preemption keeps its proposer if its text goes on."""
        super().add_requests(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            text = RequestText(new.prefill_token_ids, new.prompt_len, params, in_order=self._is_in_order(params))
            before = self._texts.get(new.req_id)
            if before is not None and not text.goes_on_from(before):
                self.drafter.finish([new.req_id])
            self._texts[new.req_id] = text

    def _is_in_order(self, params: SamplingParams | None) -> bool:
        if params is None:
            return False
        reads = use_penalty(params) or params.bad_words or params.thinking_token_budget is not None
        return self._reads_paths or bool(reads)

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        """As vLLM's, and what we know of them goes, too."""
        super().finish_requests(scheduler_output)
        for req_id in scheduler_output.preempted_req_ids or ():
            self.planner.proposed.pop(req_id, None)
        if scheduler_output.finished_req_ids:
            self.planner.finish(scheduler_output.finished_req_ids)
            for req_id in scheduler_output.finished_req_ids:
                self._texts.pop(req_id, None)

    # ---- one step

    def execute_model(
        self,
        scheduler_output: SchedulerOutput,
        intermediate_tensors: Any = None,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As vLLM's, on trees guessed from the last step's tokens, which are waited for here."""
        self.step = self._top = None
        if dummy_run:
            self._serve(None, None)
        else:
            self._settle()
            scheduler_output = self._with_drafts(scheduler_output)
            self._timer.start(scheduler_output, self.planner.policy)
        return super().execute_model(scheduler_output, intermediate_tensors, dummy_run, **kwargs)

    def _with_drafts(self, output: SchedulerOutput) -> SchedulerOutput:
        """The plan for a step, with the draft tokens that it really verifies."""
        places = output.scheduled_spec_decode_tokens
        if self.scheduler_config.async_scheduling:
            drafts = self._plan({req_id: len(tokens) for req_id, tokens in places.items()})
        else:
            drafts = {req_id: tokens[: used_places(tokens)] for req_id, tokens in places.items()}
        new = {data.req_id: data.sampling_params for data in output.scheduled_new_reqs}

        def has_grammar(req_id: str) -> bool:
            params = new[req_id] if req_id in new else self._texts[req_id].params
            return params is not None and params.structured_outputs is not None

        return trimmed(output, drafts, has_grammar)

    def prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> InputBatch:
        """As vLLM's, and the step's trees."""
        batch = super().prepare_inputs(scheduler_output, *args, **kwargs)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        if drafts:
            self.step = StepTrees.build(batch.req_ids, drafts, self.planner.proposed)
            self.place_drafts(self.step, batch)
        self.planner.forget_scheduled(scheduler_output.num_scheduled_tokens)
        return batch

    def prepare_attn(self, input_batch: InputBatch) -> Any:
        """As vLLM's, which computes the KV slots; then the tree rows' masks and positions."""
        block_tables, slots = super().prepare_attn(input_batch)
        self._slots = slots[0]
        step = self.step
        self._branched = step is not None and self.trees_verifiable and bool(step.branched.any())
        self._serve(step if self._branched or self.in_tree_graph() else None, input_batch)
        return block_tables, slots

    def in_tree_graph(self) -> bool:
        """Whether the step replays a graph in which every row is a tree row, branched or not."""
        return False

    def _serve(self, step: StepTrees | None, batch: InputBatch | None) -> None:
        if self.trees_verifiable and (step is not None or self._served):
            self.serve_trees(step, batch)
        self._served = step is not None

    def seq_lens(self, step: StepTrees, batch: InputBatch) -> NDArray[np.int32]:
        """int32 [rows]: tokens of each row after this step if every node were accepted.

        From our own texts: under asynchronous scheduling vLLM's host-side counts are only upper bounds.
        """
        lengths = [self._texts[req_id].length for req_id in batch.req_ids]
        return np.array(lengths, np.int32) + np.diff(step.starts)

    def _set_active_loras(self, prompt_lora_mapping: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        """As vLLM's, with an adapter for every row of logits: V2 names one per request, also where it has drafts."""
        if self.step is not None:
            prompt_lora_mapping = tuple(np.repeat(prompt_lora_mapping, np.diff(self.step.starts) + 1).tolist())
        super()._set_active_loras(prompt_lora_mapping, *args, **kwargs)

    def rows_in_order(self, batch: InputBatch) -> NDArray[np.bool_]:
        """bool [rows]: rows whose nodes have to be sampled path by path."""
        return np.array([self._texts[req_id].in_order for req_id in batch.req_ids])

    def keep_most_likely(self, logits: torch.Tensor, sampled: torch.Tensor, batch: InputBatch) -> None:
        """Send the argmax of every logits row to the host, together with the sampled tokens, if a proposer needs it.

        Args:
            logits: [nodes + rows, vocabulary], as the model gave them.
            sampled: int64 [nodes + rows].
            batch: the step's.
        """
        if not self.drafter.proposer.needs_argmax:
            return
        states, rows = self.sampler.sampling_states, batch.idx_mapping_np
        greedy = not states.temperature.np[rows].any() and not self.sampler.needs_logits_processing[rows].any()
        self._most_likely = async_copy_to_np(sampled if greedy else logits.argmax(dim=-1))

    def keep_top(self, logits: torch.Tensor) -> None:
        """Send every logits row's likeliest tokens to the host with the sampled ones, if a proposer needs them.

        Args:
            logits: [nodes + rows, vocabulary], as the model gave them.
        """
        if num_top := self.drafter.proposer.num_top:
            self._top = async_copy_to_np(likeliest(logits, num_top))

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """As vLLM's; the tokens are looked at when they have arrived."""
        state = self.execute_model_state
        output = super().sample_tokens(grammar_output)
        if state is not None and isinstance(output, AsyncOutput):
            self._pending = _Pending(state.input_batch.req_ids, output, self.step, self._most_likely, self._top)
        self._most_likely = self._top = None
        return output

    def postprocess_sampled(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; the KV commit comes here, when the copy of the tokens to the host has been started."""
        if self._branched:
            self.commit_kv(self._slots)
        super().postprocess_sampled(*args, **kwargs)

    # ---- drafting

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """What was drafted last. Without asynchronous scheduling this is where drafting happens."""
        if not self.scheduler_config.async_scheduling:
            self._settle()
            self._plan(None)
        chains, self._chains = self._chains, None
        return chains

    def _settle(self) -> None:
        """Wait for the last step's tokens, note them, and feed back how its trees fared. The same on every rank."""
        if self._pending is None:
            return
        (req_ids, output, step, most_likely, top), self._pending = self._pending, None
        output.copy_event.synchronize()
        counts = output.num_sampled_tokens_np
        sampled = [tokens[:count] for tokens, count in zip(output.sampled_token_ids, counts, strict=True)]
        walks = None if step is None else retrace(step, output.sampled_token_ids, counts)
        self._batch, self._sampled_rows = req_ids, []
        for req_id, tokens in zip(req_ids, sampled, strict=True):
            text = self._texts.get(req_id)
            if text is not None and len(tokens):
                text.extend(tokens)
                self._sampled_rows.append(req_id)
        self.planner.observe(req_ids, sampled, step, walks, most_likely, top)

    def _plan(self, places: dict[str, int] | None) -> dict[str, list[int]]:
        """Guess the next trees of the requests that got tokens in the last step.

        Args:
            places: how many draft tokens the scheduler left room for, by request; None: as many as we like.

        Returns:
            The trees' tokens by request.
        """
        asked, self._sampled_rows = self._sampled_rows, []
        if places is not None:
            asked = [req_id for req_id in asked if places.get(req_id)]
        self._chains = None
        if not asked:
            return {}
        rows = {req_id: row for row, req_id in enumerate(self._batch)}

        def propose(row: int, limit: int) -> DraftTree | None:
            req_id = self._batch[row]
            return self._propose(req_id, limit if places is None else min(limit, places[req_id]))

        limit = self.node_limit(len(self._batch))
        trees = self.planner.plan(self._batch, [rows[req_id] for req_id in asked], propose, limit)
        drafts = {
            req_id: tree.token_ids.tolist()
            for req_id, tree in zip(self._batch, trees, strict=False)
            if tree is not None
        }
        self._chains = DraftTokenIds(list(drafts), [list(tokens) for tokens in drafts.values()]) if drafts else None
        return drafts

    def node_limit(self, num_rows: int) -> int:
        """Most nodes per request, the window's included."""
        budget = self.drafter.config.budget
        most = self.num_speculative_steps if budget == "auto" else budget
        return most_nodes(most, num_rows, self.scheduler_config.max_num_batched_tokens)

    def _propose(self, req_id: str, limit: int) -> DraftTree | None:
        text = self._texts[req_id]
        limit, depth = room_for(text.params, text.length, text.num_prompt_tokens, self.max_model_len, limit)
        if limit <= 0 or depth <= 0:
            return None
        return self.drafter.propose_tree(
            req_id,
            text.tokens,
            text.num_prompt_tokens,
            limit,
            depth,
            chain=text.has_grammar or not self.trees_verifiable,
            branch=self.planner.policy.may_branch(req_id),
            info=lambda: request_info(text.params),
        )
