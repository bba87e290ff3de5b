"""A corpus: what can be one, how it is kept, and that it is guessed from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from proposers import PromptLookup, PromptLookupOptions, RequestInfo
from proposers.calibration import CORPUS
from proposers.corpus import open_index, write_index
from vllm_lookahead.config import ConfigError
from vllm_lookahead.corpus import PIECE, files_of, ids_of, index_of, pieces_of, texts_of, tokens_of

LOG = logging.getLogger(__name__)


class Words:
    """A tokenizer with a token for each word it has seen."""

    name_or_path = "words"

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[self.ids.setdefault(word, len(self.ids)) for word in t.split()] for t in texts]}


# ---- what is read


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    lines: list[Any] = [
        "three",
        {"text": "four", "id": "x"},
        {"messages": [{"role": "user", "content": "five"}, {"role": "assistant", "content": "six"}]},
        {"output": "seven"},
    ]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    texts = [text for file in files_of(tmp_path) for text in texts_of(file)]
    assert texts == ["one\ntwo", "three", "four", "five", "six", "seven"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", None, "does not exist"),
        ("a.pdf", b"x", "must be a .txt or .jsonl file or a folder of them"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"   \n ", "is empty"),
        ("a.jsonl", b'"one"\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"id": 7}', "line 1 must be a text or an object with text, content"),
        ("a.jsonl", b"7", "line 1 must be"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as error:
        index_of(str(file), Words(), 4, tmp_path / "cache", LOG)
    assert str(error.value).startswith("corpus: ")
    assert "\n" not in str(error.value)


def test_a_folder_without_texts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has none"):
        files_of(tmp_path)


def test_an_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match="can't be written to"):
        index_of(str(tmp_path / "a.txt"), Words(), 4, tmp_path / "cache", LOG)


@given(st.text(st.sampled_from("ab\n"), max_size=200), st.integers(1, 3))
def test_pieces_are_the_text(text: str, times: int) -> None:
    long = text * times * (PIECE // 100)
    pieces = list(pieces_of(long))
    assert "".join(pieces) == long
    assert all(0 < len(piece) <= 2 * PIECE + 1 for piece in pieces)


# ---- how it is kept


def test_it_is_indexed_once(tmp_path: Path) -> None:
    file, cache = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text("one two three four")
    first = index_of(str(file), Words(), 4, cache, LOG)
    made = first.stat().st_mtime_ns
    assert index_of(str(file), Words(), 4, cache, LOG) == first
    assert first.stat().st_mtime_ns == made
    assert index_of(str(file), Words(), 3, cache, LOG) != first
    file.write_text("one two three five")
    assert index_of(str(file), Words(), 4, cache, LOG) != first
    assert len(list(cache.iterdir())) == 3, "nothing half written is left"


# ---- what it is for


def test_it_is_guessed_from(tmp_path: Path) -> None:
    corpus = np.random.default_rng(0).integers(0, 1000, 3000).astype(np.int32)
    write_index(corpus, tmp_path / "index", 4)
    proposer = PromptLookup(PromptLookupOptions())
    proposer.use_corpus(tmp_path / "index")
    request = proposer.start("r", corpus[500:510], RequestInfo(namespace=None))
    tree = request.propose(corpus[500:512], 48)
    assert tree.as_chain().token_ids[:8].tolist() == corpus[512:520].tolist()
    assert tree.sources is not None
    assert (tree.sources == CORPUS).all()
    before = (tmp_path / "index").read_bytes()
    request.propose(corpus[500:530], 48)
    assert (tmp_path / "index").read_bytes() == before


def test_its_end_is_its_end(tmp_path: Path) -> None:
    corpus = np.arange(100, dtype=np.int32)
    write_index(corpus, tmp_path / "index", 4)
    proposer = PromptLookup(PromptLookupOptions())
    proposer.use_corpus(tmp_path / "index")
    tree = proposer.start("r", corpus[:1], RequestInfo(namespace=None)).propose(corpus[80:95], 48)
    assert tree.token_ids.max() == 99


def test_many_batches_of_pieces() -> None:
    words = Words()
    assert len(tokens_of((f"{i} {i}" for i in range(3000)), words)) == 6000


def test_a_fast_tokenizer_says_the_same_as_when_it_is_called(demo_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    texts = ["def f(x):\n    return x", "", "Grüße, 世界"]
    assert list(ids_of(texts, tokenizer)) == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_the_file_is_mapped_not_read(tmp_path: Path) -> None:
    write_index(np.zeros(100_000, np.int32), tmp_path / "index", 4)
    state = open_index(tmp_path / "index")
    assert isinstance(state.base, np.memmap)
