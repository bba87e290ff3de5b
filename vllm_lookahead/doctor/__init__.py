"""``vllm-lookahead doctor``: what this machine, this vLLM and this model make of drafting, and what to change."""
