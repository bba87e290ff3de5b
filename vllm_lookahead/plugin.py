"""The entry point that vLLM loads in every process: it makes our method names known to vLLM, and nothing else.

vLLM (``vllm/plugins/__init__.py``) calls ``register`` in the API process, the engine core and each worker. Without a
request for one of our methods every wrapper passes its call on unchanged.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from vllm_lookahead import wrappers
from vllm_lookahead.config import KEY, ConfigError, LookaheadConfig, method_names, requested_method
from vllm_lookahead.contract import UnsupportedVLLMError, check_contract
from vllm_lookahead.numba_guard import guard

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_lookahead.support import Setup

DRAFTER = "vllm_lookahead.drafting.drafter.Drafter"
"""The class that vLLM's ``custom_class`` hook builds. As ``speculative_config.model`` it marks a config as ours."""
CHAIN_DRAFTER = "vllm_lookahead.drafting.chain_drafter.ChainDrafter"
"""The same, where somebody else's worker has vLLM verify its drafts."""

WORKERS = {
    ("cpu", "v1"): "vllm_lookahead.v1.cpu_worker.CPULookaheadWorker",
    ("cpu", "v2"): "vllm_lookahead.v2.cpu_worker.CPULookaheadV2Worker",
    ("cuda", "v2"): "vllm_lookahead.v2.cuda_worker.CUDALookaheadWorker",
}
"""Our worker class for each kind of device and generation of vLLM's model runner."""
EXECUTOR = "vllm_lookahead.v1.executor.LookaheadExecutor"
"""Ours where vLLM would take its executor of worker processes, for V1's workers."""

FLAGS = (
    ("--spec-method", "spec_method", "method"),
    ("--spec-model", "spec_model", "model"),
    ("--spec-tokens", "spec_tokens", "num_speculative_tokens"),
)
"""Command line flag, field of ``EngineArgs``, and the key of the speculative config that it stands for."""

_command_line = False
"""Whether this process parses a vLLM command line: then a mistake ends in a message and status 2, not a traceback."""


def register() -> None:
    """Teach vLLM our method names. Safe to call any number of times.

    Wrapped are ``EngineArgs.add_cli_args`` and ``EngineArgs.create_speculative_config``
    (``vllm/engine/arg_utils.py``) and ``SamplingParams._validate_spec_decode`` (``vllm/sampling_params.py``). Where
    one of our methods is asked for, ``front_end`` wraps one more.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams

    wrappers.wrap(EngineArgs, "add_cli_args", _with_flags)
    wrappers.wrap(EngineArgs, "create_speculative_config", _with_methods)
    wrappers.wrap(SamplingParams, "_validate_spec_decode", _with_every_sampling_parameter)


def is_ours(speculative_config: Any) -> bool:
    """Whether a ``vllm.config.SpeculativeConfig`` is one that this plugin made."""
    return getattr(speculative_config, "model", None) in (DRAFTER, CHAIN_DRAFTER)


def runs_on_our_worker(speculative_config: Any) -> bool:
    """Whether a ``vllm.config.SpeculativeConfig`` is one of ours that needs one of ``WORKERS``."""
    return getattr(speculative_config, "model", None) == DRAFTER


def _with_flags(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--speculative-model`` and ``--num-speculative-tokens``, the names that older vLLM had, and our methods."""

    @functools.wraps(add_cli_args)
    def wrapper(parser: Any) -> Any:
        global _command_line
        parser = add_cli_args(parser)
        _command_line = True
        # argparse has no public way to ask for what was added before
        actions = {option: action for action in parser._actions for option in action.option_strings}
        groups = {action: group for group in parser._action_groups for action in group._group_actions}
        method = actions.get("--spec-method")
        if method is not None and method.choices:
            method.choices = [*method.choices, *sorted(method_names() - set(method.choices))]
        for flag, other in (("--speculative-model", "--spec-model"), ("--num-speculative-tokens", "--spec-tokens")):
            if flag not in actions and other in actions:
                like = actions[other]
                groups.get(like, parser).add_argument(
                    flag, dest=like.dest, type=like.type, default=like.default, help=f"The same as {other}."
                )
        return parser

    return wrapper


def _with_methods(create_speculative_config: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a request for one of our methods into a config that vLLM accepts, and our worker class."""
    signature = inspect.signature(create_speculative_config)

    @functools.wraps(create_speculative_config)
    def wrapper(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        try:
            config = _requested_config(self)
            if config is not None:
                arguments = signature.bind(self, *args, **kwargs).arguments
                model, parallel = arguments["target_model_config"], arguments["target_parallel_config"]
                carrier = _prepare(config, self, model, parallel)
        except (ConfigError, UnsupportedVLLMError) as error:
            _refuse(error)
        finally:
            guard()
        if config is None:
            return create_speculative_config(self, *args, **kwargs)
        # A copy, because vLLM writes into its EngineArgs here, and may come back with the same one.
        stock = copy.copy(self)
        stock.spec_method = stock.spec_model = stock.spec_tokens = None
        stock.speculative_config = carrier
        return create_speculative_config(stock, *args, **kwargs)

    return wrapper


def _with_every_sampling_parameter(validate: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM refuses min_p and logit_bias next to speculative decoding, which its verification ignores; ours doesn't."""

    @functools.wraps(validate)
    def wrapper(self: Any, speculative_config: Any) -> None:
        if not runs_on_our_worker(speculative_config):
            validate(self, speculative_config)

    return wrapper


def _requested_config(engine_args: EngineArgs) -> LookaheadConfig | None:
    """Our part of the engine's arguments, or None if they don't ask for one of our methods.

    Raises:
        ConfigError: the request is wrong.
    """
    given = engine_args.speculative_config
    settings = {key.replace("-", "_"): value for key, value in given.items()} if isinstance(given, Mapping) else {}
    twice = []
    for flag, field, key in FLAGS:
        value = getattr(engine_args, field, None)
        if value is not None:
            if key in settings:
                twice.append(f"{flag} and --speculative-config['{key}'] are mutually exclusive")
            settings[key] = value
    if not settings:
        return None
    requested = requested_method(settings, method_names(), stock_methods())
    if requested is None:
        return None
    if twice:
        raise ConfigError("; ".join(twice))
    method, asked = requested
    config = LookaheadConfig.parse(method, asked)
    if (asked.get("num_speculative_tokens") or 0) > config.num_speculative_tokens:
        from vllm.logger import init_logger

        init_logger("vllm.vllm_lookahead").warning(
            "[%s] num_speculative_tokens = %d: with its other options a tree has at most %d nodes.",
            method,
            asked["num_speculative_tokens"],
            config.num_speculative_tokens,
        )
    return config


def _prepare(
    config: LookaheadConfig, engine_args: EngineArgs, model_config: Any, parallel_config: Any
) -> dict[str, Any]:
    """Check that this engine can serve ``config``, and leave in vLLM's config what our worker needs.

    Returns:
        The speculative config that vLLM is given instead.

    Raises:
        ConfigError: it can't.
        UnsupportedVLLMError: this vLLM differs from what the worker was written for.
    """
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    from proposers.numba_cache import PROBLEM
    from vllm_lookahead.front_end import wrap_front_end
    from vllm_lookahead.metrics import publish, served_name
    from vllm_lookahead.support import Setup, check_support, fit_lora

    logger = init_logger("vllm.vllm_lookahead")
    own_worker = parallel_config.worker_cls in ("auto", *WORKERS.values())
    setup = Setup(engine_args, model_config, parallel_config, current_platform, config.options, own_worker)
    check_support(config.method, setup)
    check_contract(setup.runner)
    config = _with_corpus(fit_lora(config, setup), model_config)

    engine_args.additional_config = _with_ours(engine_args.additional_config, config)
    wrap_front_end(is_ours, check_worker)
    if not engine_args.disable_log_stats:
        publish(config.sources, served_name(model_config), parallel_config.data_parallel_size)
    if PROBLEM is not None:
        logger.warning("[%s] compiles its kernels at each start, since they can't be kept: %s", config.method, PROBLEM)
    if own_worker:
        parallel_config.worker_cls = WORKERS[setup.device, setup.runner]
        if setup.runner == "v1" and _has_worker_processes(parallel_config):
            parallel_config.distributed_executor_backend = EXECUTOR
    else:
        logger.warning(
            "[%s] keeps --worker-cls %s as asked: drafts are chains there, verified by vLLM's rejection sampler. "
            "Leave the option out to verify draft trees.",
            config.method,
            parallel_config.worker_cls,
        )
    return _carrier(config, setup)


def _has_worker_processes(parallel_config: Any) -> bool:
    """Whether vLLM would take its ``MultiprocExecutor``.

    On a CPU it does so for one worker, too. It decides that later (``vllm/platforms/cpu.py``) and by the environment,
    not by ``vllm.envs``, which may remember what was there before.
    """
    backend = parallel_config.distributed_executor_backend
    return backend == "mp" or (backend == "uni" and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "1")


def _with_ours(additional: Any, config: LookaheadConfig) -> dict[str, Any]:
    """vLLM's ``additional_config`` with our part in it.

    Raises:
        ConfigError: the user needs its place for something else.
    """
    if not isinstance(additional, dict):
        raise ConfigError(f"[{config.method}] needs additional_config to be a mapping")
    # the same arguments may come again with what we left there
    if KEY in additional and not LookaheadConfig.is_one(additional[KEY]):
        raise ConfigError(
            f"additional_config[{KEY!r}] is where vllm-lookahead keeps its own; [{config.method}] takes options from "
            "--speculative-config alone. Use another key"
        )
    return {**additional, **config.to_additional_config()}


def check_worker(vllm_config: Any) -> None:
    """See that our worker is still the one that will run: a platform or another plugin may have put in its own since.

    Raises:
        ConfigError: it isn't.
    """
    worker = vllm_config.parallel_config.worker_cls
    if not runs_on_our_worker(vllm_config.speculative_config) or worker in WORKERS.values():
        return
    method = LookaheadConfig.from_vllm_config(vllm_config).method
    _refuse(
        ConfigError(
            f"[{method}] can't run: another plugin has replaced its worker class by {worker}; leave that plugin out "
            f"(VLLM_PLUGINS), or ask for {worker} by --worker-cls, which gets draft chains"
        )
    )


def _refuse(error: ConfigError | UnsupportedVLLMError) -> NoReturn:
    """Raise an error; on a command line end with its message and status 2 instead."""
    if not _command_line:
        raise error
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None


def _with_corpus(config: LookaheadConfig, model_config: Any) -> LookaheadConfig:
    """Index the corpus, if there is one.

    Raises:
        ConfigError: it can't be used.
    """
    corpus = config.options.get("corpus")
    if corpus is None:
        return config
    from vllm import envs
    from vllm.logger import init_logger
    from vllm.tokenizers import cached_tokenizer_from_config

    from vllm_lookahead.corpus import index_of

    if model_config.skip_tokenizer_init:
        raise ConfigError("corpus: needs a tokenizer, not skip_tokenizer_init")
    tokenizer = cached_tokenizer_from_config(model_config)
    cache, log = Path(envs.VLLM_CACHE_ROOT) / "lookahead", init_logger("vllm.vllm_lookahead")
    index = index_of(corpus, tokenizer, config.options["max_ngram"], cache, log)
    return config.model_copy(update={"corpus_index": str(index)})


def _carrier(config: LookaheadConfig, setup: Setup) -> dict[str, Any]:
    """A speculative config of vLLM's own that ends where our worker takes over; ``model`` says whose it really is."""
    drafter = DRAFTER if setup.own_worker else CHAIN_DRAFTER
    carrier = {"model": drafter, "num_speculative_tokens": config.num_speculative_tokens}
    if setup.runner == "v1":
        return {"method": "custom_class", **carrier}
    from vllm_lookahead.support import batch_limits
    from vllm_lookahead.v2.slots import schedule

    # the one method without a model with which vLLM keeps Model Runner V2 and asynchronous scheduling
    ranges = schedule(config.num_speculative_tokens, *batch_limits(setup))
    lengths = {"prompt_lookup_min": 1, "prompt_lookup_max": 1}
    return {"method": "ngram_gpu", **carrier, **lengths, "num_speculative_tokens_per_batch_size": ranges}


def stock_methods() -> tuple[str, ...]:
    """The names of vLLM's own methods, from its type annotation (empty if it has none that we can read)."""
    from vllm.config import speculative

    return get_args(getattr(speculative, "SpeculativeMethod", None))
