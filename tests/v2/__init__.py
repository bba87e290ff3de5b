"""Engines on Model Runner V2; one process with Triton's interpreter (``make test``)."""
