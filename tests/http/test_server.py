"""``vllm serve --speculative-model '[prompt_lookup]'`` through the ``openai`` client, against stock vLLM."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.request
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from serving import PROMPTS, Server, chat, complete, texts

from vllm_lookahead.bench import serve
from vllm_lookahead.bench.prompts import Prompt

CHATS = ["Write a function that adds two numbers.", "What does print(len(items)) do?"]


def wait_for(server: Server, name: str, value: float, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while (now := server.metrics().get(name)) != value:
        assert time.monotonic() < deadline, f"{name} is {now}, expected {value}"
        time.sleep(0.2)


# ---- equal to stock


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_completion(stock: OpenAI, ours: OpenAI, prompt: str) -> None:
    expected, answer = complete(stock, prompt), complete(ours, prompt)
    assert texts(answer) == texts(expected)
    assert answer.usage.model_dump() == expected.usage.model_dump()


def test_several_prompts_in_one_request(stock: OpenAI, ours: OpenAI) -> None:
    assert texts(complete(ours, PROMPTS)) == texts(complete(stock, PROMPTS))


@pytest.mark.parametrize("text", CHATS)
def test_chat(stock: OpenAI, ours: OpenAI, text: str) -> None:
    assert chat(ours, text).choices[0].message.content == chat(stock, text).choices[0].message.content


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "seed": 1},
        {"temperature": 0.8, "seed": 1, "top_p": 0.9, "n": 2},
        {"temperature": 1.0, "seed": 2, "extra_body": {"min_p": 0.05}},
        {"temperature": 0.8, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": {"300": 2.0, "301": -100}},
        {"stop": ["\n\n"]},
        {"max_tokens": 1},
        {"extra_body": {"min_tokens": 20, "top_k": 5, "seed": 4, "temperature": 0.7}},
    ],
    ids=lambda options: json.dumps(options).replace(" ", ""),
)
def test_options(stock: OpenAI, ours: OpenAI, options: dict[str, Any]) -> None:
    for prompt in PROMPTS[:2]:
        assert texts(complete(ours, prompt, **options)) == texts(complete(stock, prompt, **options))


def test_logprobs(stock: OpenAI, ours: OpenAI) -> None:
    expected = complete(stock, PROMPTS[0], logprobs=2).choices[0].logprobs
    answer = complete(ours, PROMPTS[0], logprobs=2).choices[0].logprobs
    assert answer.tokens == expected.tokens
    assert answer.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-3)


def test_structured_output(stock: OpenAI, ours: OpenAI) -> None:
    options = {"extra_body": {"structured_outputs": {"regex": r"[a-z]{3,8} = [0-9]{1,4}"}}, "max_tokens": 32}
    assert texts(complete(ours, PROMPTS[0], **options)) == texts(complete(stock, PROMPTS[0], **options))


# ---- streams


@pytest.mark.parametrize("prompt", PROMPTS[:2], ids=range(2))
def test_streamed_completion_is_the_same(ours: OpenAI, prompt: str) -> None:
    chunks = list(complete(ours, prompt, stream=True, stream_options={"include_usage": True}))
    whole = complete(ours, prompt)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    # several tokens come in one chunk: that is what the drafts are for
    assert len(chunks) < whole.usage.completion_tokens


def test_streamed_chat_is_the_same(ours: OpenAI) -> None:
    chunks = list(chat(ours, CHATS[0], stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == chat(ours, CHATS[0]).choices[0].message.content


def test_aborted_stream(server: Server, ours: OpenAI) -> None:
    expected = texts(complete(ours, PROMPTS[1]))
    stream = complete(ours, PROMPTS[0], max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    for _ in range(3):
        next(iter(stream))
    stream.close()
    wait_for(server, "vllm:num_requests_running", 0)
    assert texts(complete(ours, PROMPTS[1])) == expected


# ---- predicted outputs


def predicted(text: str | list[dict[str, str]]) -> dict[str, Any]:
    return {"prediction": {"type": "content", "content": text}}


def sampling(seed: int) -> dict[str, Any]:
    """So hot that the text does not repeat itself; every test has a seed of its own: our server remembers answers."""
    return {"temperature": 1.2, "seed": seed, "max_tokens": 200}


def answer_to_predict(stock: OpenAI, seed: int) -> tuple[str, int]:
    """What the model says without a prediction, and in how many tokens."""
    answer = chat(stock, CHATS[0], **sampling(seed))
    return answer.choices[0].message.content, answer.usage.completion_tokens


@pytest.mark.parametrize("parts", [False, True], ids=["text", "parts"])
def test_predicted_output(stock: OpenAI, ours: OpenAI, parts: bool) -> None:
    text, length = answer_to_predict(stock, 30 + parts)
    content = [{"type": "text", "text": text[:20]}, {"type": "text", "text": text[20:]}] if parts else text
    answer = chat(ours, CHATS[0], **sampling(30 + parts), **predicted(content))
    assert answer.choices[0].message.content == text
    details = answer.usage.completion_tokens_details
    # text that was sampled need not be tokenised as it was sampled
    assert details.accepted_prediction_tokens > 0.7 * length
    assert details.rejected_prediction_tokens < 0.3 * length
    assert answer.usage.completion_tokens == length
    plain = chat(ours, CHATS[0], **sampling(30 + parts))
    assert set(answer.model_dump()) == set(plain.model_dump())
    assert answer.choices[0].model_dump() == plain.choices[0].model_dump(), "no token ids that nobody asked for"


def test_streamed_predicted_output(stock: OpenAI, ours: OpenAI) -> None:
    text, length = answer_to_predict(stock, 40)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(chat(ours, CHATS[0], **sampling(40), **options, **predicted(text)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert len(chunks) < length / 4
    unpredicted = list(chat(ours, CHATS[0], **sampling(41), **options))
    assert len(unpredicted) > unpredicted[-1].usage.completion_tokens / 2
    details = chunks[-1].usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 0.7 * length
    for chunk in chunks:
        assert "prompt_token_ids" not in chunk.model_dump(exclude_unset=True)
        assert not any("token_ids" in choice.model_dump(exclude_unset=True) for choice in chunk.choices)
    quiet = list(chat(ours, CHATS[0], **sampling(40), stream=True, **predicted(text)))
    assert all(chunk.usage is None for chunk in quiet)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in quiet if chunk.choices) == text


def test_wrong_prediction(stock: OpenAI, ours: OpenAI) -> None:
    options = {"temperature": 0.8, "seed": 60, "n": 2}
    answer = chat(ours, CHATS[1], **predicted("zzz qqq " * 30), **options)
    expected = chat(stock, CHATS[1], **options)
    assert [c.message.content for c in answer.choices] == [c.message.content for c in expected.choices]
    details = answer.usage.completion_tokens_details
    assert details.accepted_prediction_tokens <= 4
    assert details.rejected_prediction_tokens >= 2 * 40


def test_token_ids_beside_a_prediction(ours: OpenAI) -> None:
    answer = chat(ours, CHATS[1], **predicted("x"), extra_body={"return_token_ids": True})
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens


def test_prediction_of_a_completion(stock: OpenAI, ours: OpenAI) -> None:
    expected = texts(complete(stock, PROMPTS[0]))
    assert texts(complete(ours, PROMPTS[0], extra_body={"vllm_xargs": {"prediction": expected[0][0]}})) == expected


@pytest.mark.parametrize(
    "prediction",
    [
        "text",
        {"content": "text"},
        {"type": "image", "content": "text"},
        {"type": "content", "content": 7},
        {"type": "content", "content": [{"type": "text"}]},
        {"type": "content", "content": [{"type": "image_url", "image_url": "x"}]},
        {"type": "content", "content": "text", "more": 1},
        {"type": "content", "content": "many words " * 2000},
        {"type": "content", "content": "a" * 1_000_000},
    ],
    ids=lambda prediction: str(prediction)[:40],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bad_prediction(ours: OpenAI, prediction: Any, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="prediction"):
        chat(ours, CHATS[0], extra_body={"prediction": prediction}, stream=stream)


def test_bad_prediction_of_a_completion(ours: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"prediction: token ids must be from 0 to \d+, not -1"):
        complete(ours, PROMPTS[0], extra_body={"vllm_xargs": {"prediction": [1, -1]}})


# ---- many at once


def test_sixteen_concurrent_requests(stock: OpenAI, server: Server) -> None:
    prompts = [f"{PROMPTS[i % len(PROMPTS)]}# {i}\n" for i in range(16)]
    expected = [complete(stock, prompt).choices[0].text for prompt in prompts]

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(model="demo", prompt=prompt, max_tokens=64, temperature=0)
                    for prompt in prompts
                )
            )
        return [answer.choices[0].text for answer in answers]

    assert asyncio.run(ask_all()) == expected


# ---- metrics


def test_spec_decode_metrics_move(server: Server, ours: OpenAI) -> None:
    names = ["drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos"]
    keys = {name: f"vllm:spec_decode_num_{name}_total" for name in names}
    before = server.metrics()
    usage = complete(ours, PROMPTS[0] * 3, extra_body={"ignore_eos": True}).usage
    after = server.metrics()
    moved = {name: after[key] - before[key] for name, key in keys.items()}
    assert moved["drafts"] > 0
    assert moved["draft_tokens"] >= moved["accepted_tokens"] > 0
    assert moved["accepted_tokens_per_pos"] == moved["accepted_tokens"]
    assert moved["accepted_tokens"] < usage.completion_tokens
    by_source = {
        name: after[key] - before[key]
        for name in ("draft_tokens", "accepted_tokens")
        for key in [f"vllm:spec_decode_num_{name}_by_source_total"]
    }
    assert by_source == {name: moved[name] for name in by_source}
    # the formula of docs/operations.md: alone, a request has as many steps as the engine
    generated, steps = (
        after[f"vllm:{key}"] - before[f"vllm:{key}"]
        for key in ("generation_tokens_total", "iteration_tokens_total_count")
    )
    assert generated - moved["accepted_tokens"] == steps


def test_predictions_are_counted_as_a_source(stock: OpenAI, ours: OpenAI, server: Server) -> None:
    def accepted() -> dict[str, float]:
        text = urllib.request.urlopen(f"{server.url}/metrics", timeout=30).read().decode()
        name = r"vllm:spec_decode_num_accepted_tokens_by_source_total"
        found = re.findall(name + r'{engine="0",model_name="demo",source="(\w+)"} (\S+)', text)
        return {source: float(value) for source, value in found}

    before = accepted()
    text, length = answer_to_predict(stock, 50)
    chat(ours, CHATS[0], **sampling(50), **predicted(text))
    moved = {source: value - before[source] for source, value in accepted().items()}
    assert moved["prediction"] > length / 2
    assert moved["corpus"] == 0


# ---- our benchmark


def test_bench_serve(servers: tuple[Server, Server]) -> None:
    """``vllm bench serve`` drives both; the table says that the texts are the same."""
    prompts = [Prompt(text) for text in PROMPTS]
    options = ["--num-prompts", "4", "--sharegpt-output-len", "16", "--temperature", "0", "--ignore-eos"]
    urls = dict(zip(("stock", "ours"), (server.url for server in servers), strict=True))
    found = serve.drive(urls, prompts, options, 1, lambda text: None)
    assert [(r["completed"], r["total_output_tokens"]) for r in found] == [(4, 64)] * 2
    stock, ours = serve.table(found).rows
    assert (stock[-1], ours[-1]) == ("-", "4 of 4")
    assert float(ours[-3]) > 1.0, "the server's counters say that drafts were accepted"
    with pytest.raises(serve.ServerError, match="nothing"):
        serve.drive({"nothing": "http://127.0.0.1:9"}, prompts, [*options, "--ready-check-timeout-sec", "0"], 1, print)


# ---- requests that are wrong


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": -1}, {"temperature": -1}, {"prompt": PROMPTS[0] * 200}, {"extra_body": {"min_p": 2}}, {"n": 0}],
    ids=["max_tokens", "temperature", "too_long", "min_p", "n"],
)
def test_bad_request(ours: OpenAI, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        complete(ours, **{"prompt": PROMPTS[0], **options})
    assert complete(ours, PROMPTS[0], max_tokens=1).usage.completion_tokens == 1


def test_unknown_model(ours: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        ours.completions.create(model="nobody", prompt="x")


def test_log_is_quiet(server: Server) -> None:
    """No error and no traceback after everything above."""
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "ERROR" not in log
