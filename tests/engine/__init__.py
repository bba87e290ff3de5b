"""Tests on the real vLLM engine: what comes out with draft trees is what comes out without them."""
