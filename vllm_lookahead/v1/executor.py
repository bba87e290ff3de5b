"""vLLM's executor of worker processes, which gets a step's drafts with the step's tokens."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput


@dataclass
class DraftedOutput(ModelRunnerOutput):
    """What a step made, and what was drafted after it.

    Attributes:
        draft_token_ids: the next step's drafts; None if there are none.
    """

    draft_token_ids: DraftTokenIds | None = None


class LookaheadExecutor(MultiprocExecutor):
    """Answers the engine core's question for drafts without asking the worker.

    ``EngineCore.post_step`` (``vllm/v1/engine/core.py``) asks in every step, drafts or not. A call to the worker there
    lets the thread that sends the tokens to the front end have the interpreter before the next step is scheduled; the
    worker waits meanwhile, about a millisecond per step. Stock vLLM without speculation makes no call at this place.
    """

    _last: Future[Any] | ModelRunnerOutput | None = None

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """As vLLM's."""
        self._last = super().execute_model(scheduler_output, non_block)
        return self._last

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        """As vLLM's."""
        self._last = super().sample_tokens(grammar_output, non_block)
        return self._last

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """The drafts that came with the last step's tokens."""
        last = self._last.result() if isinstance(self._last, Future) else self._last
        return last.draft_token_ids if isinstance(last, DraftedOutput) else None
