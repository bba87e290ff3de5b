"""What a request brings for its proposer, as it travels from the front end to the workers: in ``extra_args``.

A worker sees a request's sampling parameters, but neither its cache salt nor a tokenizer. So the front end, which has
both, writes there who may share text with whom and which tokens the caller expects.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from proposers import RequestInfo
from vllm_lookahead.predictions import PREDICTION

NAMESPACE = "lookahead_namespace"
"""Stands for the request's cache salt and LoRA adapter; always written by the front end, whatever the caller sent."""


def request_info(params: Any) -> RequestInfo:
    """Read what the front end wrote.

    Args:
        params: vLLM's sampling parameters of the request, or None. Without a namespace nobody vouches for who may
            share with it: it stays alone.
    """
    extra = getattr(params, "extra_args", None) or {}
    prediction = extra.get(PREDICTION)
    return RequestInfo(
        namespace=extra.get(NAMESPACE),
        prediction=np.array(prediction, np.int32) if isinstance(prediction, list) and prediction else None,
    )
