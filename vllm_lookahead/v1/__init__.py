"""vLLM's Model Runner V1: for machines without Triton."""
