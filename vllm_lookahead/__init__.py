"""vllm-lookahead: lossless speculative decoding for vLLM with draft token trees, without a draft model.

Importing this package imports nothing else: vLLM loads ``vllm_lookahead.plugin`` in every process, used or not.
"""

__version__ = "0.1.0"
