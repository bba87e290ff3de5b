"""Model Runner V2 without a GPU: its kernels run in Triton's interpreter (``tests/interpreter``).

The interpreter is a matter of the process: environment variables that Triton and vLLM read when they are imported. So
these tests run in a pytest of their own (``make test`` starts it); elsewhere they are skipped.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    import flash_on_cpu
    from engine.cases import Encode
    from engine.engines import METHODS, runner_of, start_engine, stop_engine
    from vllm import LLM
    from vllm.v1.attention.backends import fa_utils, flash_attn

    from vllm_lookahead import plugin

    SMALL: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 6, "max_num_batched_tokens": 256}
    """Engines as in ``tests/engine``, but a step of the interpreter takes as long as the step is large."""
    NODES = 6

    @pytest.fixture(scope="session", autouse=True)
    def in_process() -> Iterator[None]:
        """Run engines in this process; see ``tests/engine/conftest.py``."""
        numbers = itertools.count()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            patch.setattr("vllm.v1.engine.input_processor.random_uuid", lambda: f"{next(numbers):08x}")
            patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
            yield

    @pytest.fixture(scope="session")
    def stock(demo_model: str, in_process: None) -> Iterator[LLM]:
        """Stock vLLM on V2, scheduling asynchronously: its default on CUDA."""
        llm = start_engine(demo_model, None, **SMALL)
        config = llm.llm_engine.vllm_config
        assert config.use_v2_model_runner
        assert config.scheduler_config.async_scheduling
        yield llm
        stop_engine(llm)

    @pytest.fixture(scope="session")
    def encode(stock: LLM) -> Encode:
        """The demo model's tokenizer."""
        return stock.get_tokenizer().encode

    @pytest.fixture(scope="session")
    def ours(demo_model: str, in_process: None) -> Iterator[LLM]:
        """Prompt lookup with draft trees and asynchronous scheduling."""
        config = {**METHODS["prompt_lookup"], "num_speculative_tokens": NODES, "budget": NODES}
        llm = start_engine(demo_model, config, **SMALL)
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        assert runner_of(llm).trees_verifiable
        yield llm
        stop_engine(llm)

    @pytest.fixture(scope="module")
    def cuda_runner(in_process: None) -> Iterator[None]:
        """CUDA's runner where the CPU's would run."""
        with pytest.MonkeyPatch.context() as patch:
            for module in (fa_utils, flash_attn):
                for name in flash_on_cpu.STAND_INS:
                    patch.setattr(module, name, None, raising=False)
            patch.setitem(plugin.WORKERS, ("cpu", "v2"), "")
            flash_on_cpu.use()
            yield
