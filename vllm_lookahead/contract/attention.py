"""What we rely on in vLLM's attention backends."""

from __future__ import annotations

from vllm_lookahead.contract.parts import Attributes, Function, Part

CPU_ATTN = "vllm.v1.attention.backends.cpu_attn"
FLASH_ATTN = "vllm.v1.attention.backends.flash_attn"

FORWARD = (
    "layer",
    "query",
    "key",
    "value",
    "kv_cache",
    "attn_metadata",
    "output",
    "output_scale",
    "output_block_scale",
)

ATTENTION: tuple[Part, ...] = (
    Function("vllm.v1.attention.backends.registry:register_backend", ("backend", "class_path")),
    Attributes(
        "vllm.v1.attention.backends.registry:AttentionBackendEnum",
        ("CPU_ATTN", "FLASH_ATTN", "clear_override", "get_path", "is_overridden"),
    ),
    Function("vllm.v1.attention.selector:_cached_get_attn_backend.cache_clear"),
    Attributes(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        (
            "block_table_tensor",
            "is_prefilling",
            "max_query_len",
            "max_seq_len",
            "num_actual_tokens",
            "num_reqs",
            "positions",
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
            "slot_mapping",
        ),
    ),
)

ATTENTION_CPU: tuple[Part, ...] = (
    *ATTENTION,
    Attributes("vllm.v1.attention.backend:AttentionLayer"),
    Attributes("vllm.v1.kv_cache_interface:AttentionSpec"),
    Attributes(f"{CPU_ATTN}:CPUAttentionBackend", ("get_builder_cls", "get_impl_cls")),
    Attributes(f"{CPU_ATTN}:CPUAttentionMetadata"),
    Function(
        f"{CPU_ATTN}:CPUAttentionMetadataBuilder.__init__",
        ("kv_cache_spec", "layer_names", "vllm_config", "device"),
        exactly=True,
    ),
    Function(
        f"{CPU_ATTN}:CPUAttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
        exactly=True,
    ),
    Attributes(f"{CPU_ATTN}:CPUAttentionMetadataBuilder", ("block_size", "dtype", "isa")),
    Function(f"{CPU_ATTN}:CPUAttentionBackendImpl.forward", FORWARD, exactly=True),
    Attributes(
        f"{CPU_ATTN}:CPUAttentionBackendImpl",
        (
            "alibi_slopes",
            "head_size",
            "is_fp8_kv_cache",
            "logits_soft_cap",
            "num_heads",
            "scale",
            "sinks",
            "sliding_window",
        ),
    ),
)

ATTENTION_CUDA: tuple[Part, ...] = (
    *ATTENTION,
    Attributes(
        "vllm.v1.attention.backend:AttentionCGSupport", ("ALWAYS", "UNIFORM_SINGLE_TOKEN_DECODE", "UNIFORM_BATCH")
    ),
    Attributes("vllm.v1.attention.backend:AttentionType", ("DECODER",)),
    Attributes(f"{FLASH_ATTN}:FlashAttentionBackend", ("get_builder_cls", "get_impl_cls")),
    Attributes(f"{FLASH_ATTN}:FlashAttentionMetadata"),
    Function(
        f"{FLASH_ATTN}:FlashAttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
        exactly=True,
    ),
    Function(
        f"{FLASH_ATTN}:FlashAttentionMetadataBuilder.build_for_cudagraph_capture",
        ("common_attn_metadata",),
        exactly=True,
    ),
    Function(
        f"{FLASH_ATTN}:FlashAttentionMetadataBuilder._get_scheduler_metadata",
        (
            "aot_schedule",
            "batch_size",
            "cu_query_lens",
            "max_query_len",
            "seqlens",
            "max_seq_len",
            "causal",
            "max_num_splits",
        ),
        exactly=True,
    ),
    Function(
        f"{FLASH_ATTN}:FlashAttentionMetadataBuilder._store_scheduler_metadata", ("scheduler_metadata",), exactly=True
    ),
    Attributes(
        f"{FLASH_ATTN}:FlashAttentionMetadataBuilder",
        (
            "_cudagraph_support",
            "aot_schedule",
            "block_size",
            "get_cudagraph_support",
            "max_num_splits",
            "model_config",
            "rswa_window",
        ),
    ),
    Function(f"{FLASH_ATTN}:FlashAttentionImpl.forward", FORWARD, exactly=True),
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
    Function(
        "vllm.v1.attention.backends.fa_utils:flash_attn_varlen_func",
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
            "scheduler_metadata",
            "num_splits",
            "fa_version",
        ),
    ),
    Function("vllm.utils.torch_utils:canonicalize_singleton_dim_strides", ("t",)),
)
