"""The KV cache after verified trees, entry by entry, next to stock vLLM's."""

from __future__ import annotations

import torch
from vllm import LLM, TokensPrompt

from .cases import Encode, either
from .engines import TreeSpy, runner_of
from .prompts import PROMPTS

TOKENS = 64
"""Output tokens after which the caches are read, with the requests still running."""

Caches = dict[str, tuple[list[int], torch.Tensor]]


def caches_while_running(llm: LLM, prompts: list[list[int]]) -> Caches:
    """Run requests and, as soon as one has ``TOKENS`` output tokens, read its KV while it is still running.

    Returns:
        Request id to output tokens and keys and values, float32 [layers, positions, kv heads, 2 * head size], of the
        prompt and of all output but the last token.
    """
    engine, runner = llm.llm_engine, runner_of(llm)
    for i, prompt in enumerate(prompts):
        params = either(i, max_tokens=4 * TOKENS, ignore_eos=True, detokenize=False)
        engine.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), params)
    found: Caches = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
            if len(tokens) < TOKENS or output.request_id in found:
                continue
            assert not output.finished
            batch = runner.input_batch
            row = next(row for row, name in enumerate(batch.req_ids) if name.startswith(f"{output.request_id}-"))
            blocks = torch.from_numpy(batch.block_table[0].get_numpy_array()[row])
            positions = torch.arange(len(prompts[int(output.request_id)]) + len(tokens) - 1)
            found[output.request_id] = tokens, torch.stack([_read(c, blocks, positions) for c in runner.kv_caches])
            engine.abort_request([output.request_id])
    return found


def _read(cache: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Keys and values of one layer at some positions, float32 [positions, kv heads, 2 * head size].

    A block holds K as [head size, block size], then V as [block size, head size], for every kv head.
    """
    _, kv_heads, block_size, twice = cache.shape
    blocks = cache[table[positions // block_size].long()].float()
    keys, values = blocks.flatten(2).chunk(2, dim=2)
    keys = keys.view(-1, kv_heads, twice // 2, block_size)
    values = values.view(-1, kv_heads, block_size, twice // 2)
    at, offset = torch.arange(len(positions)), positions % block_size
    return torch.cat((keys[at, :, :, offset], values[at, :, offset]), dim=-1)


def test_kv_of_every_committed_position_is_stock_vllms(ours: LLM, stock: LLM, encode: Encode) -> None:
    prompts = [encode(prompt) for prompt in PROMPTS[20:44]]
    expected = caches_while_running(stock, prompts)
    with TreeSpy.on(ours) as spy:
        got = caches_while_running(ours, prompts)
    spy.assert_trees_were_used(20)
    assert got.keys() == expected.keys() == {str(i) for i in range(len(prompts))}
    for name, (tokens, kv) in got.items():
        stock_tokens, stock_kv = expected[name]
        both = min(len(tokens), len(stock_tokens))
        assert both >= TOKENS
        assert tokens[:both] == stock_tokens[:both]
        positions = len(prompts[int(name)]) + both - 1
        assert kv[:, :positions].abs().mean() > 0.01
        difference = (kv[:, :positions] - stock_kv[:, :positions]).abs().amax((0, 2, 3))
        # float32 rounding grows with the values; a slot that was not moved is off by as much as they are
        bound = 1e-5 * max(1.0, float(stock_kv[:, :positions].abs().max()))
        assert difference.max() <= bound, f"request {name}: {difference.max()} at position {int(difference.argmax())}"
