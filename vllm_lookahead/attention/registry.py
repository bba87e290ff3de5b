"""Puts our attention backend in vLLM's place, for exactly as long as a model is being loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


@contextmanager
def backend_override(backend: AttentionBackendEnum, class_path: str) -> Iterator[None]:
    """Within the block vLLM selects ``class_path`` where it would select ``backend``.

    Layers remember their backend from then on. The registry is as before afterwards, so another engine in the same
    process (offline, without multiprocessing) gets vLLM's own.
    """
    before = backend.get_path() if backend.is_overridden() else None
    register_backend(backend, class_path)
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        backend.clear_override()
        if before is not None:
            register_backend(backend, before)
        selector._cached_get_attn_backend.cache_clear()
