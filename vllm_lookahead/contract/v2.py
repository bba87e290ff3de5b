"""What we rely on in vLLM's Model Runner V2 (``vllm/v1/worker/gpu``)."""

from __future__ import annotations

from vllm_lookahead.contract.parts import Attributes, Function, Part

GPU = "vllm.v1.worker.gpu"
RUNNER = f"{GPU}.model_runner:GPUModelRunner"
SAMPLER = f"{GPU}.sample.sampler:Sampler"
REJECTION = f"{GPU}.spec_decode.rejection_sampler"
GRAPHS = f"{GPU}.cudagraph_utils"
SPECULATOR = f"{GPU}.spec_decode.speculator:BaseSpeculator"

V2: tuple[Part, ...] = (
    # the config that carries ours
    Attributes("vllm.config:VllmConfig", ("use_v2_model_runner",)),
    Attributes(
        "vllm.config:SpeculativeConfig",
        ("num_speculative_tokens_per_batch_size", "prompt_lookup_max", "prompt_lookup_min", "use_ngram"),
    ),
    Function(f"{GPU}.spec_decode.ngram.speculator:NgramGPUSpeculator", ("vllm_config", "device", "req_states")),
    # model runner
    Function(f"{RUNNER}.__init__", ("vllm_config", "device"), exactly=True),
    Function(f"{RUNNER}.load_model"),
    Function(f"{RUNNER}.initialize_kv_cache", ("kv_cache_config",)),
    Function(f"{RUNNER}.add_requests", ("scheduler_output",), exactly=True),
    Function(f"{RUNNER}.finish_requests", ("scheduler_output",), exactly=True),
    Function(f"{RUNNER}.execute_model", ("scheduler_output", "intermediate_tensors", "dummy_run")),
    Function(f"{RUNNER}.prepare_inputs", ("scheduler_output", "batch_req_state", "batch_desc")),
    Function(f"{RUNNER}.prepare_attn", ("input_batch",), exactly=True),
    Function(f"{RUNNER}._set_active_loras", ("prompt_lora_mapping", "token_lora_mapping", "lora_requests")),
    Function(f"{RUNNER}.sample_tokens", ("grammar_output",), exactly=True),
    Function(f"{RUNNER}.postprocess_sampled", ("idx_mapping", "sampled_tokens", "num_sampled", "num_rejected")),
    Function(f"{RUNNER}.take_draft_token_ids", (), exactly=True),
    Function(f"{RUNNER}._dummy_run", ("num_tokens", "skip_eplb")),
    Attributes(
        RUNNER,
        (
            "attn_groups",
            "compilation_config",
            "decode_query_len",
            "device",
            "dtype",
            "execute_model_state",
            "kv_cache_config",
            "kv_caches",
            "max_model_len",
            "max_num_reqs",
            "max_num_tokens",
            "model_config",
            "num_speculative_steps",
            "rejection_sampler",
            "req_states",
            "sampler",
            "scheduler_config",
            "speculative_config",
            "speculator",
            "vllm_config",
        ),
    ),
    Attributes(f"{GPU}.model_runner:ExecuteModelState", ("input_batch",)),
    Attributes(f"{GPU}.states:RequestState", ("prefill_len",)),
    Attributes(f"{GPU}.buffer_utils:UvaBackedTensor", ("gpu", "np")),
    Attributes(
        f"{GPU}.input_batch:InputBatch",
        (
            "cu_num_logits",
            "cu_num_logits_np",
            "expanded_idx_mapping",
            "expanded_local_pos",
            "idx_mapping",
            "idx_mapping_np",
            "input_ids",
            "logits_indices",
            "num_reqs",
            "positions",
            "query_start_loc",
            "query_start_loc_np",
            "req_ids",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
        ),
    ),
    Attributes(f"{GPU}.async_utils:AsyncOutput", ("copy_event", "num_sampled_tokens_np", "sampled_token_ids")),
    Function(f"{GPU}.async_utils:async_copy_to_np", ("x",), exactly=True),
    Attributes("vllm.v1.core.sched.output:SchedulerOutput", ("preempted_req_ids", "scheduled_new_reqs")),
    Attributes(
        "vllm.v1.core.sched.output:NewRequestData", ("prefill_token_ids", "prompt_len", "req_id", "sampling_params")
    ),
    # a speculator that guesses nothing
    Function(f"{SPECULATOR}.init_cudagraph_manager", ("cudagraph_mode",), exactly=True),
    Function(f"{SPECULATOR}.capture", (), exactly=True),
    Function(f"{SPECULATOR}.propose", ("input_batch",)),
    Attributes(SPECULATOR, ("num_extra_query_per_req", "num_query_per_req")),
    # sampling
    Function("vllm.utils.torch_utils:async_tensor_h2d", ("data", "device")),
    Function(f"{REJECTION}:RejectionSampler.__init__", ("sampler", "spec_config", "device")),
    Function(
        f"{REJECTION}:RejectionSampler.__call__",
        ("logits", "input_batch", "draft_logits", "invalid_drafts"),
        exactly=True,
    ),
    Attributes(f"{REJECTION}:RejectionSampler", ("sampler",)),
    Function(f"{REJECTION}:get_max_chunk_logits", ("vocab_size",), exactly=True),
    Function(f"{SAMPLER}.__call__", ("logits", "input_batch"), exactly=True),
    Function(
        f"{SAMPLER}.sample",
        (
            "logits",
            "expanded_idx_mapping",
            "idx_mapping",
            "idx_mapping_np",
            "pos",
            "input_ids",
            "expanded_local_pos",
            "seq_lens_upper_bound_np",
            "return_logprobs",
        ),
        exactly=True,
    ),
    Function(f"{SAMPLER}.get_logprobs_dims", ("idx_mapping_np",)),
    Attributes(
        SAMPLER,
        (
            "compute_nans",
            "logits_processors",
            "logprob_token_ids_state",
            "logprobs_mode",
            "needs_logits_processing",
            "req_states",
            "sampling_states",
        ),
    ),
    Attributes(f"{GPU}.sample.states:SamplingStates", ("temperature",)),
    Attributes(f"{GPU}.sample.bad_words:BadWordsState"),
    Attributes(f"{GPU}.sample.logit_bias:LogitBiasState"),
    Attributes(f"{GPU}.sample.penalties:PenaltiesState"),
    Function(f"{GPU}.sample.penalties:use_penalty", ("sampling_params",), exactly=True),
    Attributes("vllm.sampling_params:SamplingParams", ("bad_words", "thinking_token_budget")),
    Function(
        f"{GPU}.sample.logprob:compute_topk_scores",
        (
            "logits",
            "num_logprobs",
            "sampled_token_ids",
            "cu_num_logits",
            "logprob_token_ids_state",
            "expanded_idx_mapping",
            "max_per_req_token_ids",
            "logits_mode",
        ),
    ),
    Attributes("vllm.config.model", ("PROCESSED_LOGPROBS_MODES",)),
    Function(
        f"{GPU}.sample.output:SamplerOutput",
        ("sampled_token_ids", "logprobs_tensors", "num_nans", "num_sampled", "num_rejected"),
    ),
    Attributes("vllm.v1.outputs:LogprobsTensors"),
    Function(f"{GPU}.metrics.logits:get_num_nans", ("logits",), exactly=True),
    Function(
        f"{GPU}.input_batch:get_num_sampled_and_rejected",
        ("num_sampled", "seq_lens", "cu_num_logits", "idx_mapping", "prefill_len"),
        exactly=True,
    ),
)

V2_CPU: tuple[Part, ...] = (
    Function("vllm.v1.worker.cpu_worker:CPUWorker.init_device", (), exactly=True),
    Function("vllm.v1.worker.cpu_worker:CPUWorker.load_model"),
    Function("vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model", (), exactly=True),
    Attributes("vllm.v1.worker.cpu_worker:CPUWorker", ("use_v2_model_runner",)),
    Attributes("vllm.v1.worker.cpu.model_runner:CPUModelRunner"),
)

V2_CUDA: tuple[Part, ...] = (
    Function("vllm.v1.worker.gpu_worker:Worker._make_model_runner", (), exactly=True),
    Function("vllm.v1.worker.gpu_worker:Worker._maybe_activate_jit_monitor", (), exactly=True),
    Function("vllm.v1.worker.gpu_worker:Worker.load_model"),
    Attributes("vllm.v1.worker.gpu_worker:Worker", ("use_v2_model_runner",)),
    Function(f"{RUNNER}._dummy_sampler_run", ("hidden_states",), exactly=True),
    Attributes(RUNNER, ("cudagraph_manager", "input_buffers", "lora_capture_cases", "model", "parallel_config")),
    Attributes(f"{GPU}.input_batch:InputBuffers", ("input_ids", "positions")),
    Attributes("vllm.config:ModelConfig", ("get_num_attention_heads", "get_num_kv_heads")),
    # full CUDA graphs of steps with trees
    Attributes("vllm.config:CompilationConfig", ("cudagraph_capture_sizes",)),
    Attributes("vllm.config.compilation:CUDAGraphMode", ("FULL", "has_full_cudagraphs", "separate_routine")),
    Attributes(
        f"{GRAPHS}:BatchExecutionDescriptor",
        ("cg_mode", "max_query_len", "num_active_loras", "num_reqs", "num_tokens", "uniform_token_count"),
    ),
    Function(
        f"{GRAPHS}:ModelCudaGraphManager.__init__",
        ("vllm_config", "device", "cudagraph_mode", "decode_query_len", "lora_capture_cases"),
    ),
    Function(f"{GRAPHS}:ModelCudaGraphManager._init_candidates", (), exactly=True),
    Function(
        f"{GRAPHS}:ModelCudaGraphManager.dispatch",
        ("num_reqs", "num_tokens", "uniform_token_count", "num_active_loras", "max_query_len", "num_ubatches"),
        exactly=True,
    ),
    Attributes(
        f"{GRAPHS}:ModelCudaGraphManager",
        (
            "_candidates",
            "_capture_descs",
            "compilation_config",
            "cudagraph_mode",
            "lora_capture_cases",
            "max_num_reqs",
        ),
    ),
    Attributes("vllm.distributed.parallel_state:GroupCoordinator", ("cpu_group",)),
)
