"""Attention backends that verify draft trees: one file per backend that vLLM has."""
