"""What is asked of the engines: prompts and sampling parameters, every option that can change a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams

from .engines import Request
from .prompts import CHATS, PROMPTS, REPETITIVE

LENGTH = 32
"""Output tokens of most requests."""

Encode = Callable[[str], list[int]]

GRID = list(product((0.5, 0.8, 1.2), (1.0, 0.9, 0.7), (0, 50, 8), (0.0, 0.05, 0.2)))
"""Temperature, top_p, top_k, min_p."""


@dataclass(frozen=True)
class Case:
    """Requests that share a purpose.

    Attributes:
        name: what is tested.
        params: sampling parameters of the i-th request, given the tokenizer.
        prompts: one request for each.
        ends_inside_paths: requests are expected to end in the middle of an accepted path.
    """

    name: str
    params: Callable[[int, Encode], SamplingParams]
    prompts: tuple[str, ...] = PROMPTS[:40]
    ends_inside_paths: bool = False

    def requests(self, encode: Encode) -> list[Request]:
        """The case's requests."""
        return [Request(tuple(encode(p)), self.params(i, encode)) for i, p in enumerate(self.prompts)]


def greedy(**options: Any) -> SamplingParams:
    """Greedy decoding with further options."""
    return SamplingParams(**{"temperature": 0.0, "max_tokens": LENGTH, **options})


def seeded(i: int, **options: Any) -> SamplingParams:
    """Seeded sampling; different i, different point of the grid."""
    temperature, top_p, top_k, min_p = GRID[i * 31 % len(GRID)]
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": 1000 + i}
    return SamplingParams(**{**sampling, "max_tokens": LENGTH, **options})


def either(i: int, **options: Any) -> SamplingParams:
    """Greedy for every third i, else seeded."""
    return seeded(i, **options) if i % 3 else greedy(**options)


def ids(encode: Encode, *texts: str) -> list[int]:
    """The first token of each text."""
    return [encode(text)[0] for text in texts]


def penalties(i: int, _: Encode) -> SamplingParams:
    return either(
        i,
        presence_penalty=(0.0, 0.6, -0.4, 1.5)[i % 4],
        frequency_penalty=(0.3, 0.0, 0.8, -0.3)[i // 2 % 4],
        repetition_penalty=(1.0, 1.1, 1.3, 0.9, 1.0)[i % 5],
    )


def logit_bias(i: int, encode: Encode) -> SamplingParams:
    banned = dict.fromkeys(ids(encode, "\n", " ", "self", "return", " =", ","), -100.0)
    wanted = dict.fromkeys(ids(encode, "x", "if", " a", ".", "1", ")"), 1.5 + i % 4)
    return either(i, logit_bias=(banned, wanted, banned | wanted)[i % 3])


def bad_words(i: int, _: Encode) -> SamplingParams:
    words = (
        ["self", "return"],
        ["the", ",", "1"],
        [" = ", "a b", "self.", "()", "is not"],
        ["name", ":\n", " in range"],
    )
    return either(i, bad_words=words[i % 4])


def min_tokens(i: int, encode: Encode) -> SamplingParams:
    stops = ids(encode, "\n", " ", ".", "(", ",", ":")
    return either(i, min_tokens=(3, 8, 14, 25)[i % 4], stop_token_ids=stops, logit_bias={0: 3.0})


def allowed_token_ids(i: int, _: Encode) -> SamplingParams:
    allowed = (range(0, 4096, 2), range(1, 4096, 2), range(4, 400), range(4, 2000))[i % 4]
    return either(i, allowed_token_ids=list(allowed))


def stop_strings(i: int, _: Encode) -> SamplingParams:
    # Several strings, the one that comes first in the text not first in the list; and strings that span tokens.
    stops = (["):\n", ")", "\n"], ["return", "el", "name"], ["4", "3", "2", "1"], [" two", "tem", "is ", "."], ["\n\n"])
    return either(
        i, stop=stops[i % 5], include_stop_str_in_output=i % 2 == 0, min_tokens=(0, 4)[i // 3 % 2], logprobs=1
    )


def stop_token_ids(i: int, encode: Encode) -> SamplingParams:
    stops = (["\n", ")"], [".", ",", "3"], ["2", "four", " b"], ["self", "name"])[i % 4]
    return either(i, stop_token_ids=[*ids(encode, *stops), 100 + i])


LINES = ("a b c d", "x = 1\n", "def f():\n    pass\n")
QUESTIONS = ("ok?", "Is it right?", "Are you sure?", "Print 1.", "1 + 1?", "Hello", "x")
WITH_EOS = (
    *(f"{line}<|endoftext|>" * 5 + line[:-1] for line in LINES),
    *(
        f"<|user|>\n{text}<|end|>\n<|assistant|>\nYes.<|end|>\n" * 3 + f"<|user|>\n{text}<|end|>\n<|assistant|>\n"
        for text in QUESTIONS
    ),
)
"""Prompts whose drafts contain end-of-text and end-of-turn tokens."""


def eos(i: int, _: Encode) -> SamplingParams:
    return either(i, logit_bias={0: (0.0, 4.0, 8.0)[i // 10 % 3], 3: (0.0, 2.0)[i // 10 % 2]})


def ignore_eos(i: int, _: Encode) -> SamplingParams:
    return either(i, ignore_eos=True, logit_bias={0: (0.0, 4.0, 8.0)[i // 10 % 3]})


def logprobs(i: int, _: Encode) -> SamplingParams:
    return either(
        i, logprobs=(0, 1, 5, 20)[i % 4], prompt_logprobs=(None, 0, 3)[i % 3], flat_logprobs=i % 7 == 0, max_tokens=24
    )


def other_options(i: int, encode: Encode) -> SamplingParams:
    """What is left: none of these should notice drafts either."""
    options: tuple[dict[str, Any], ...] = (
        {"repetition_detection": RepetitionDetectionParams(max_pattern_size=8, min_count=3)},
        {"skip_special_tokens": False, "ignore_eos": True, "logit_bias": {3: 5.0}},
        {"detokenize": False},
        {"stop": ["\n"], "stop_token_ids": ids(encode, ")"), "min_tokens": 2},
        {"skip_reading_prefix_cache": True},
        {"n": 2},
        {"spaces_between_special_tokens": False, "skip_special_tokens": False, "logit_bias": {3: 5.0}},
        {"stream_interval": 3, "routed_experts_prompt_start": 1, "watermarking": False},
    )
    chosen = options[i % len(options)]
    return seeded(i, **chosen) if i // len(options) % 2 or "n" in chosen else greedy(**chosen)


def everything(i: int, encode: Encode) -> SamplingParams:
    """A random half of all options at once."""
    rng = np.random.default_rng(i)
    options: dict[str, Any] = {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
        "logit_bias": {token: float(rng.normal(0, 2)) for token in range(4, 600, 7)},
        "bad_words": ["self", "return x"],
        "min_tokens": int(rng.integers(1, 20)),
        "stop": ["):", "two"],
        "stop_token_ids": ids(encode, ":", "3"),
        "logprobs": int(rng.integers(0, 4)),
        "max_tokens": int(rng.integers(8, 48)),
        "ignore_eos": True,
    }
    chosen = {name: value for name, value in options.items() if rng.random() < 0.5}
    if rng.random() < 0.3:
        chosen["allowed_token_ids"] = list(range(0, 4096, 3)) + ids(encode, ":", "3")
    return either(i, **chosen)


CASES = (
    Case("greedy", lambda i, _: greedy(max_tokens=48), PROMPTS),
    Case("seeded sampling", lambda i, _: seeded(i, max_tokens=48), PROMPTS),
    Case("penalties", penalties),
    Case("logit_bias", logit_bias),
    Case("bad_words", bad_words),
    Case("min_tokens", min_tokens),
    Case("allowed_token_ids", allowed_token_ids),
    Case("stop strings", stop_strings, PROMPTS[4:20] + REPETITIVE + CHATS, ends_inside_paths=True),
    Case("stop_token_ids", stop_token_ids, PROMPTS[4:20] + REPETITIVE + CHATS, ends_inside_paths=True),
    Case("end of sequence", eos, WITH_EOS * 4, ends_inside_paths=True),
    Case("ignore_eos", ignore_eos, WITH_EOS * 4),
    Case("max_tokens", lambda i, _: either(i, max_tokens=1 + i % 20), (REPETITIVE * 3)[:40]),
    Case("n=4", lambda i, _: seeded(i, n=4, max_tokens=12)),
    Case("logprobs", logprobs),
    Case("other options", other_options),
    Case("everything at once", everything),
)
