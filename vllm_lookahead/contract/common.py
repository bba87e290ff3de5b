"""What we rely on whichever model runner drafts: the front door, requests, the scheduler's output, configuration."""

from __future__ import annotations

from vllm_lookahead.contract.parts import Attributes, Function, Part

PLUGIN: tuple[Part, ...] = (
    Function(
        "vllm.engine.arg_utils:EngineArgs.create_speculative_config", ("target_model_config", "target_parallel_config")
    ),
    Function("vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args", ("parser",)),
    Function(
        "vllm.engine.arg_utils:EngineArgs._set_default_max_num_seqs_and_batched_tokens_args",
        ("usage_context", "model_config", "parallel_config"),
        exactly=True,
    ),
    Attributes("vllm.usage.usage_lib:UsageContext", ("LLM_CLASS", "OPENAI_API_SERVER")),
    Attributes(
        "vllm.engine.arg_utils:EngineArgs",
        (
            "additional_config",
            "disable_log_stats",
            "enable_lora",
            "max_num_batched_tokens",
            "max_num_seqs",
            "spec_method",
            "spec_model",
            "spec_tokens",
            "speculative_config",
            "worker_cls",
        ),
    ),
    Attributes("vllm.platforms.interface:Platform", ("device_type", "is_cpu", "is_cuda")),
    Attributes("vllm.triton_utils", ("HAS_TRITON",)),
    Function("vllm.sampling_params:SamplingParams._validate_spec_decode", ("speculative_config",), exactly=True),
    Attributes(
        "vllm.v1.engine.input_processor:InputProcessor", ("model_config", "process_inputs", "tokenizer", "vllm_config")
    ),
    Function("vllm.v1.engine.input_processor:InputProcessor.__init__", ("vllm_config",)),
    Attributes("vllm.v1.engine.async_llm:AsyncLLM", ("model_config", "tokenizer")),
    Attributes("vllm.v1.engine:EngineCoreRequest", ("cache_salt", "lora_request", "sampling_params")),
    Attributes("vllm.exceptions:VLLMValidationError"),
    Function("vllm.tokenizers:cached_tokenizer_from_config", ("model_config",)),
    Attributes("vllm.lora.request:LoRARequest", ("lora_name", "lora_path")),
)

CONFIG: tuple[Part, ...] = (
    Attributes("vllm.config:CompilationConfig", ("static_forward_context",)),
    Attributes(
        "vllm.config:ModelConfig",
        (
            "get_vocab_size",
            "has_inner_state",
            "is_encoder_decoder",
            "is_hybrid",
            "is_moe",
            "logits_processors",
            "max_model_len",
            "runner_type",
            "served_model_name",
            "skip_tokenizer_init",
            "use_mla",
            "uses_mrope",
        ),
    ),
    Attributes(
        "vllm.config:ParallelConfig",
        (
            "data_parallel_index",
            "data_parallel_size",
            "decode_context_parallel_size",
            "pipeline_parallel_size",
            "prefill_context_parallel_size",
            "rank",
            "worker_cls",
        ),
    ),
    Attributes("vllm.config:SchedulerConfig", ("async_scheduling", "max_num_batched_tokens", "max_num_seqs")),
    Attributes("vllm.config:SpeculativeConfig", ("method", "model", "num_speculative_tokens")),
    Attributes(
        "vllm.config:VllmConfig", ("additional_config", "model_config", "parallel_config", "speculative_config")
    ),
)

STEP: tuple[Part, ...] = (
    Attributes("vllm.v1.worker.worker_base:WorkerBase", ("device", "model_config", "model_runner", "vllm_config")),
    Attributes("vllm.sampling_params:SamplingParams", ("extra_args", "max_tokens", "structured_outputs")),
    Attributes("vllm.sampling_params:StructuredOutputsParams"),
    Attributes(
        "vllm.v1.core.sched.output:SchedulerOutput",
        (
            "finished_req_ids",
            "num_scheduled_tokens",
            "scheduled_spec_decode_tokens",
            "total_num_scheduled_tokens",
        ),
    ),
    Function("vllm.v1.outputs:DraftTokenIds", ("req_ids", "draft_token_ids")),
    Attributes("vllm.v1.kv_cache_interface:KVCacheConfig", ("kv_cache_groups",)),
    Function("vllm.v1.worker.utils:AttentionGroup.get_metadata_builder", ("ubatch_id",)),
    Attributes("vllm.v1.worker.utils:AttentionGroup", ("layer_names",)),
    Function("vllm.distributed.parallel_state:get_tp_group", (), exactly=True),
    Function("vllm.distributed.parallel_state:GroupCoordinator.broadcast_object", ("obj", "src")),
    Attributes("vllm.distributed.parallel_state:GroupCoordinator", ("world_size",)),
)

COMMON = PLUGIN + CONFIG + STEP
