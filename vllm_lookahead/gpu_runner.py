"""vLLM's GPU model runner with our drafter. Tree attention for CUDA is not written yet: drafts are chains there."""

from __future__ import annotations

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_lookahead.runner import LookaheadRunnerMixin
from vllm_lookahead.step import StepTrees, Walks
from vllm_lookahead.tree_rows import TreeRows


class LookaheadGPURunner(LookaheadRunnerMixin, GPUModelRunner):
    """Chains through vLLM's own attention, sampled and walked by the tree sampler, so just as exact."""

    def tree_support(self) -> str | None:
        """See ``LookaheadRunnerMixin.tree_support``."""
        return "tree attention for CUDA is not available in this version"

    def set_trees(self, trees: TreeRows | None) -> None:
        """Never called: without tree support no step has tree rows."""
        raise NotImplementedError

    def commit_kv(self, step: StepTrees, walks: Walks) -> None:
        """Never called: a chain's accepted nodes are where they belong."""
        raise NotImplementedError

    def warm_up_trees(self) -> None:
        """Never called."""
        raise NotImplementedError
