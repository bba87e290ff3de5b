"""The drafter for workers that aren't ours (``--worker-cls``)."""

from __future__ import annotations

from vllm_lookahead.drafting.drafter import Drafter


class ChainDrafter(Drafter):
    """Drafts chains through vLLM's own interface, ``propose``, for its runner and rejection sampler to verify.

    A class of its own, because its name in vLLM's config tells that verification, and what that can't do, is vLLM's.
    """
