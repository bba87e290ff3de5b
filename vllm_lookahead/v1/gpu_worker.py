"""vLLM's GPU worker with our model runner."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from vllm_lookahead.attention.registry import backend_override
from vllm_lookahead.contract import Attributes, Function, check_contract
from vllm_lookahead.v1.gpu_runner import LookaheadGPURunner, trees_are_off
from vllm_lookahead.v1.worker import LookaheadWorkerMixin

BACKEND = "vllm_lookahead.attention.flash.TreeFlashAttentionBackend"
FLASH_ATTN = "vllm.v1.attention.backends.flash_attn"

CONTRACT: tuple[Function | Attributes, ...] = (
    Function("vllm.v1.worker.gpu_worker:Worker.load_model", ()),
    Attributes(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        (
            "cudagraph_dispatcher",
            "device",
            "dtype",
            "max_num_reqs",
            "max_num_tokens",
            "uniform_decode_query_len",
            "uses_mrope",
        ),
    ),
    Function("vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_sampler_run", ("hidden_states",), exactly=True),
    Attributes("vllm.v1.cudagraph_dispatcher:CudagraphDispatcher", ("uniform_decode_query_len",)),
    Attributes("vllm.v1.worker.block_table:BlockTable", ("slot_mapping",)),
    Attributes(
        "vllm.v1.attention.backend:AttentionCGSupport", ("ALWAYS", "UNIFORM_SINGLE_TOKEN_DECODE", "UNIFORM_BATCH")
    ),
    Attributes(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        ("query_start_loc_cpu", "seq_lens", "num_reqs", "block_table_tensor"),
    ),
    Function(
        f"{FLASH_ATTN}:FlashAttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
        exactly=True,
    ),
    Attributes(
        f"{FLASH_ATTN}:FlashAttentionMetadataBuilder",
        ("_cudagraph_support", "block_size", "get_cudagraph_support", "model_config", "rswa_window"),
    ),
    Function(
        f"{FLASH_ATTN}:FlashAttentionImpl.forward",
        (
            "layer",
            "query",
            "key",
            "value",
            "kv_cache",
            "attn_metadata",
            "output",
            "output_scale",
            "output_block_scale",
        ),
        exactly=True,
    ),
    Attributes(
        f"{FLASH_ATTN}:FlashAttentionImpl",
        (
            "alibi_slopes",
            "attn_type",
            "do_kv_cache_update",
            "head_size",
            "kv_cache_dtype",
            "kv_sharing_target_layer_name",
            "logits_soft_cap",
            "num_heads",
            "num_kv_heads",
            "scale",
            "sinks",
            "sliding_window",
            "total_cp_world_size",
            "vllm_flash_attn_version",
        ),
    ),
    Attributes(f"{FLASH_ATTN}:FlashAttentionBackend", ("get_impl_cls", "get_builder_cls")),
    Function(
        "vllm.vllm_flash_attn.flash_attn_interface:flash_attn_varlen_func",
        (
            "q",
            "k",
            "v",
            "cu_seqlens_q",
            "max_seqlen_q",
            "seqused_k",
            "max_seqlen_k",
            "softmax_scale",
            "causal",
            "block_table",
            "return_softmax_lse",
            "fa_version",
        ),
    ),
    Function("vllm.utils.torch_utils:canonicalize_singleton_dim_strides", ("t",)),
)
"""What trees on CUDA rely on, beside ``contract.CONTRACT``."""


class GPULookaheadWorker(LookaheadWorkerMixin, Worker):
    """vLLM's GPU worker, whose runner drafts with our proposers and, if asked to, verifies draft trees."""

    runner_class = LookaheadGPURunner

    def init_device(self) -> None:
        """As ``LookaheadWorkerMixin.init_device``."""
        if trees_are_off() is None:
            check_contract(contract=CONTRACT)
        super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, with tree attention where vLLM would take ``FLASH_ATTN``."""
        if trees_are_off() is not None:
            super().load_model(*args, **kwargs)
            return
        with backend_override(AttentionBackendEnum.FLASH_ATTN, BACKEND):
            super().load_model(*args, **kwargs)
