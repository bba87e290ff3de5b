"""What the front end tells the workers about a request: whom it may share text with, and what its caller expects.

A worker sees a request's sampling parameters, but neither its cache salt nor a tokenizer. Whose text may serve as a
guess for whom has to be decided as vLLM's prefix cache decides it (``vllm/v1/core/kv_cache_utils.py``,
``generate_block_hash_extra_keys``): by cache salt and LoRA adapter. So both travel in ``extra_args``, as a hash: a salt
is a secret. A prediction travels there as token ids.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

from vllm_lookahead import wrappers
from vllm_lookahead.drafting.request_info import NAMESPACE
from vllm_lookahead.predictions import PREDICTION, PredictionError, tokenised


def namespace_of(cache_salt: str | None, lora_request: Any) -> str:
    """A name that is equal for two requests if vLLM lets them share cached prefixes; empty without salt and adapter."""
    adapter = None if lora_request is None else (lora_request.lora_name, lora_request.lora_path)
    if not cache_salt and adapter is None:
        return ""
    return hashlib.sha256(json.dumps([cache_salt or "", adapter]).encode()).hexdigest()


def wrap_front_end(is_ours: Callable[[Any], bool], check: Callable[[Any], None]) -> None:
    """Let vLLM's front end write every request's namespace and prediction into its sampling parameters.

    Wraps ``InputProcessor.process_inputs`` (``vllm/v1/engine/input_processor.py``); vLLM has no hook that sees the
    cache salt, the tokenizer and what is sent to the workers, short of a scheduler of our own. And wraps its
    ``__init__``, the first to see the engine's config when nobody changes it any more, and before an engine starts.

    Args:
        is_ours: whether a speculative config is this plugin's; other engines' requests stay as they are.
        check: is called with each engine's config, and raises if the engine can't be started.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    def with_info(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(process_inputs)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = process_inputs(self, *args, **kwargs)
            params = request.sampling_params  # vLLM has just made this copy of the caller's
            if params is not None and is_ours(self.vllm_config.speculative_config):
                extra = {**(params.extra_args or {})}
                extra[NAMESPACE] = namespace_of(request.cache_salt, request.lora_request)
                if extra.get(PREDICTION) is not None:
                    try:
                        extra[PREDICTION] = tokenised(extra[PREDICTION], self)
                    except PredictionError as error:  # vLLM answers its own kind with status 400
                        raise VLLMValidationError(str(error), parameter=PREDICTION) from error
                params.extra_args = extra
            return request

        return wrapper

    def with_check(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def wrapper(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            check(vllm_config)
            init(self, vllm_config, *args, **kwargs)

        return wrapper

    wrappers.wrap(InputProcessor, "process_inputs", with_info)
    wrappers.wrap(InputProcessor, "__init__", with_check)
