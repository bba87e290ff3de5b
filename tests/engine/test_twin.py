"""The memory-bound twin that ``benchmarks/make_twin.py`` makes of the bundled model."""

from __future__ import annotations

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from .cases import Encode
from .engines import Request, engine, run, token_ids
from .prompts import PROMPTS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_its_output_is_the_bundled_models(demo_model: str, stock: LLM, encode: Encode, tmp_path: Path) -> None:
    """Greedy and seeded, alone and in a batch. (With AVX2 the log-probabilities are, too, to the last bit.)"""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from make_twin import make_twin
    finally:
        sys.path.remove(str(BENCHMARKS))
    size = make_twin(Path(demo_model), tmp_path, 0.2)
    assert 0.19e9 < size < 0.21e9
    requests = [
        Request(
            tuple(encode(text)),
            SamplingParams(temperature=temperature, seed=i if temperature else None, max_tokens=24),
        )
        for i, text in enumerate(PROMPTS[:4])
        for temperature in (0.0, 0.8)
    ]
    with engine(str(tmp_path), None) as twin:
        for in_flight in (1, len(requests)):
            expected, got = run(stock, requests, in_flight=in_flight), run(twin, requests, in_flight=in_flight)
            assert token_ids(got) == token_ids(expected)
