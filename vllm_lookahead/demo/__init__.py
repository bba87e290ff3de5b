"""The demo: a bundled model, prompts, and stock vLLM against ours in one table."""
