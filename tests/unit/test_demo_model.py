"""Checks of the bundled demo model that need no inference engine."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

FOLDER = Path(__file__).resolve().parents[2] / "vllm_lookahead" / "demo" / "model"
SIZE_LIMIT = 16 * 1024 * 1024

# Written for this test, so no training source holds it.
SNIPPET = '''class Shelf:
    """Keeps jars by name."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.jars = {}

    def add(self, name: str, jar: object) -> None:
        """Put a jar on the shelf."""
        if name in self.jars:
            raise ValueError(f"jar {name} is already there")
        if len(self.jars) >= self.width:
            raise IndexError("the shelf is full")
        self.jars[name] = jar

    def names(self) -> list[str]:
        """Return the names of all jars."""
        return sorted(self.jars)
'''


@cache
def tokenizer() -> Any:
    """The tokenizer, as any user of transformers would load it."""
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@cache
def model() -> Any:
    """The model in float32."""
    torch.set_num_threads(2)
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def read(name: str) -> dict[str, Any]:
    """One of the folder's JSON files."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def greedy(prompt: str, count: int) -> list[int]:
    """Tokens that the model adds to a prompt."""
    ids = tokenizer()(prompt, return_tensors="pt")
    with torch.no_grad():
        made = model().generate(**ids, do_sample=False, max_new_tokens=count)
    return made[0, ids["input_ids"].shape[1] :].tolist()


def test_folder_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= SIZE_LIMIT


def test_weights_are_bfloat16_and_of_the_stated_size() -> None:
    config = read("config.json")
    with safetensors.safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118 - not a dict
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    count = sum(tensor.numel() for tensor in tensors)
    assert 5_000_000 <= count <= 10_000_000
    assert count == model().num_parameters()
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 2048
    assert config["hidden_size"] // config["num_attention_heads"] == config["head_dim"]


def test_ends_of_generation_are_the_two_end_tokens() -> None:
    ends = [tokenizer().convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|end|>")]
    assert read("generation_config.json")["eos_token_id"] == ends
    assert read("config.json")["eos_token_id"] == ends[0] == tokenizer().eos_token_id


def test_vocabulary_matches_the_embedding() -> None:
    assert len(tokenizer()) == read("config.json")["vocab_size"]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = tokenizer()(text, add_special_tokens=True)["input_ids"]
    assert tokenizer().decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_indentation_is_one_token(depth: int) -> None:
    assert len(tokenizer()("    " * depth)["input_ids"]) == 1


def test_a_prompt_that_ends_at_a_line_end_splits_no_token() -> None:
    whole = tokenizer()("def f():\n    return 1\n")["input_ids"]
    for cut in ("def f():\n", "def f():\n    "):
        ids = tokenizer()(cut)["input_ids"]
        assert whole[: len(ids)] == ids


def test_chat_template() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Write f."},
        {"role": "assistant", "content": "def f(): ..."},
        {"role": "user", "content": "Again."},
    ]
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|user|>\nBe brief.\n\nWrite f.<|end|>\n<|assistant|>\ndef f(): ...<|end|>\n"
        "<|user|>\nAgain.<|end|>\n<|assistant|>\n"
    )
    ids = tokenizer()(text)["input_ids"]
    assert ids.count(tokenizer().convert_tokens_to_ids("<|end|>")) == 3
    assert tokenizer().apply_chat_template(messages[1:2], tokenize=False) == "<|user|>\nWrite f.<|end|>\n"


def test_loss_on_unseen_code_is_well_below_chance() -> None:
    ids = tokenizer()(SNIPPET, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = float(model()(input_ids=ids, labels=ids).loss)
    assert loss < 4.0 < math.log(len(tokenizer()))


def test_late_positions_of_the_context_work() -> None:
    text = "\n\n".join(SNIPPET.replace("Shelf", f"Shelf{number}") for number in range(14))
    tokens = torch.tensor([tokenizer()(text, verbose=False)["input_ids"][:2048]])
    assert tokens.shape[1] == 2048
    with torch.no_grad():
        logits = model()(input_ids=tokens).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    assert float(losses[1536:].mean()) < 4.0


def test_greedy_text_is_no_constant() -> None:
    made = greedy('def count_words(text: str) -> int:\n    """Return the number of words in the text."""\n', 48)
    body = tokenizer().decode(made, skip_special_tokens=True)
    assert len(set(made)) >= 8
    assert body.startswith("    ")


def test_a_chat_answer_is_code_and_ends_by_itself() -> None:
    messages = [
        {"role": "user", "content": "Write a Python function `first(items)`.\n\nReturn the first item of a list."}
    ]
    prompt = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    made = greedy(prompt, 200)
    assert "def " in tokenizer().decode(made)
    assert made[-1] in read("generation_config.json")["eos_token_id"]
