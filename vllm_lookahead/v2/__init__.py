"""vLLM's Model Runner V2: wherever vLLM itself would take it."""
