"""What we rely on in vLLM's Model Runner V1."""

from __future__ import annotations

from vllm_lookahead.contract.parts import Attributes, Function, Part

RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
SAMPLER = "vllm.v1.sample.sampler:Sampler"

V1: tuple[Part, ...] = (
    Function("vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", ("vllm_config",)),
    # model runner
    Function(f"{RUNNER}.__init__", ("vllm_config", "device"), exactly=True),
    Function(f"{RUNNER}.initialize_kv_cache", ("kv_cache_config",)),
    Function(f"{RUNNER}.execute_model", ("scheduler_output", "intermediate_tensors"), exactly=True),
    Function(f"{RUNNER}.sample_tokens", ("grammar_output",), exactly=True),
    Function(f"{RUNNER}._update_states", ("scheduler_output",), exactly=True),
    Function(f"{RUNNER}._prepare_inputs", ("scheduler_output", "num_scheduled_tokens"), exactly=True),
    Function(f"{RUNNER}._calc_spec_decode_metadata", ("num_draft_tokens", "cu_num_scheduled_tokens"), exactly=True),
    Function(f"{RUNNER}._build_attention_metadata", ("num_tokens", "num_reqs", "max_query_len")),
    Function(f"{RUNNER}._sample", ("logits", "spec_decode_metadata"), exactly=True),
    Function(f"{RUNNER}._bookkeeping_sync", ("scheduler_output", "sampler_output", "logits")),
    Function(f"{RUNNER}._input_fits_in_drafter", ("common_attn_metadata",), exactly=True),
    Function(
        f"{RUNNER}.propose_draft_token_ids",
        (
            "scheduler_output",
            "sampled_token_ids",
            "sampling_metadata",
            "hidden_states",
            "sample_hidden_states",
            "aux_hidden_states",
            "spec_decode_metadata",
            "common_attn_metadata",
            "slot_mappings",
        ),
        exactly=True,
    ),
    Function(f"{RUNNER}.take_draft_token_ids", (), exactly=True),
    Function(f"{RUNNER}._attn_group_iterator", (), exactly=True),
    Function(f"{RUNNER}._dummy_run", ("num_tokens",)),
    Function(f"{RUNNER}._model_forward", ("input_ids", "positions")),
    Attributes(
        RUNNER,
        (
            "_draft_token_ids",
            "compilation_config",
            "device",
            "discard_request_mask",
            "drafter",
            "dtype",
            "execute_model_state",
            "input_batch",
            "is_pooling_model",
            "kv_cache_config",
            "kv_caches",
            "max_model_len",
            "model",
            "model_config",
            "num_spec_tokens",
            "optimistic_seq_lens_cpu",
            "positions",
            "query_start_loc",
            "requests",
            "sampler",
            "scheduler_config",
            "speculative_config",
            "uses_mrope",
            "vllm_config",
        ),
    ),
    Attributes(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        (
            "block_table",
            "generators",
            "logitsprocs",
            "logitsprocs_need_output_token_ids",
            "num_prompt_tokens",
            "num_tokens_no_spec",
            "req_id_to_index",
            "req_ids",
            "req_output_token_ids",
            "sampling_metadata",
            "thinking_budget_state_holder",
            "token_ids_cpu",
        ),
    ),
    Attributes("vllm.v1.worker.gpu_input_batch:CachedRequestState", ("sampling_params",)),
    Attributes(
        "vllm.v1.worker.block_table:BlockTable", ("block_size", "block_table", "num_blocks_per_row", "slot_mapping")
    ),
    Function("vllm.v1.worker.block_table:MultiGroupBlockTable.__getitem__", ("idx",)),
    Attributes("vllm.v1.utils:CpuGpuBuffer", ("gpu", "np")),
    Function(
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata",
        (
            "draft_token_ids",
            "num_draft_tokens",
            "cu_num_draft_tokens",
            "cu_num_sampled_tokens",
            "target_logits_indices",
            "bonus_logits_indices",
            "logits_indices",
        ),
        exactly=True,
    ),
    Function(
        "vllm.forward_context:set_forward_context", ("attn_metadata", "vllm_config", "num_tokens", "slot_mapping")
    ),
    # sampling
    Function(f"{SAMPLER}.forward", ("logits", "sampling_metadata")),
    Function(f"{SAMPLER}.greedy_sample", ("logits",)),
    Attributes(
        "vllm.v1.sample.metadata:SamplingMetadata",
        (
            "all_greedy",
            "allowed_token_ids_mask",
            "bad_words_token_ids",
            "generators",
            "logitsprocs",
            "logprob_token_ids",
            "max_num_logprobs",
            "no_penalties",
            "output_token_ids",
            "spec_token_ids",
            "temperature",
            "thinking_budget_state_holder",
            "top_k",
            "top_p",
        ),
    ),
    Function("vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.has_tracked_requests", (), exactly=True),
    Attributes("vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder", ("in_spec_mode",)),
    Function(
        "vllm.v1.sample.logits_processor:build_logitsprocs",
        ("vllm_config", "device", "is_pin_memory", "is_pooling_model"),
    ),
    Attributes("vllm.v1.sample.logits_processor:LogitsProcessors", ("all",)),
    Function("vllm.v1.sample.logits_processor:LogitsProcessor.update_state", ("batch_update",), exactly=True),
    Attributes("vllm.v1.sample.logits_processor.builtin:LogitBiasLogitsProcessor", ("biases",)),
    Attributes("vllm.v1.sample.logits_processor.builtin:MinPLogitsProcessor", ("min_p_count",)),
    Attributes("vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor", ("min_toks",)),
    Attributes("vllm.v1.outputs:SamplerOutput", ("sampled_token_ids", "logprobs_tensors")),
    Attributes("vllm.v1.outputs:LogprobsTensors", ("logprob_token_ids", "logprobs", "selected_token_ranks")),
)

EXECUTOR = "vllm.v1.executor.multiproc_executor:MultiprocExecutor"

V1_CPU: tuple[Part, ...] = (
    Function(f"{EXECUTOR}.execute_model", ("scheduler_output", "non_block"), exactly=True),
    Function(f"{EXECUTOR}.sample_tokens", ("grammar_output", "non_block"), exactly=True),
    Function(f"{EXECUTOR}.take_draft_token_ids", (), exactly=True),
    Attributes("vllm.v1.outputs:ModelRunnerOutput"),
    Attributes("vllm.v1.core.sched.output:SchedulerOutput", ("has_structured_output_requests",)),
    Function("vllm.v1.worker.gpu_worker:Worker.execute_model", ("scheduler_output",), exactly=True),
    Function("vllm.v1.worker.gpu_worker:Worker.sample_tokens", ("grammar_output",), exactly=True),
    Function("vllm.v1.worker.gpu_worker:Worker.take_draft_token_ids", (), exactly=True),
    Function("vllm.v1.worker.cpu_worker:CPUWorker.init_device", (), exactly=True),
    Function("vllm.v1.worker.cpu_worker:CPUWorker.load_model"),
    Function("vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model", (), exactly=True),
    Attributes("vllm.v1.worker.cpu_model_runner:CPUModelRunner"),
)
