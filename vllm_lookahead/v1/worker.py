"""What our workers share: putting our model runner in place of vLLM's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vllm_lookahead.contract import check_contract
from vllm_lookahead.drafting.report import ReportsDrafting
from vllm_lookahead.temporary import replaced
from vllm_lookahead.v1.executor import DraftedOutput

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.worker.gpu_worker import Worker as Base

    from vllm_lookahead.v1.runner import LookaheadRunnerMixin
else:
    Base = object


class LookaheadWorkerMixin(ReportsDrafting, Base):
    """To be named before one of vLLM's workers. The plugin selects the worker when one of our methods is asked for."""

    runner_class: ClassVar[type[LookaheadRunnerMixin]]

    def init_device(self) -> None:
        """As vLLM's, then our runner in place of the stock one, which has loaded nothing yet."""
        check_contract("v1")
        # vLLM names its runner class inside init_device. Without a speculative config it builds one that is cheap and
        # doesn't complain about options that our runner supports.
        with (
            replaced(self.vllm_config, "speculative_config", None),
            replaced(self.model_config, "logits_processors", None),
        ):
            super().init_device()
        self.model_runner = self.runner_class(self.vllm_config, self.device)
        # with several batches on their way the engine core calls for the samples of each, here or not
        self._samples_at_once = not self.vllm_config.scheduler_config.async_scheduling

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """As vLLM's, and where no grammar has a say it samples right away.

        The engine core then leaves out its call to ``sample_tokens`` (``vllm/v1/engine/core.py``, ``step``).
        """
        output = super().execute_model(scheduler_output)
        if output is None and self._samples_at_once and not scheduler_output.has_structured_output_requests:
            return self.sample_tokens(None)
        return output

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """As vLLM's, and the drafts go with the tokens; see ``executor.LookaheadExecutor``."""
        output = super().sample_tokens(grammar_output)
        drafts = self.take_draft_token_ids()
        return output if drafts is None else DraftedOutput(**vars(output), draft_token_ids=drafts)

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's, then what drafting needs."""
        result = super().compile_or_warm_up_model()
        self.model_runner.prepare_drafting()
        return result
