"""One step's draft trees on the host: flattened over the batch, walked, and which KV entries that moves. No vLLM."""
