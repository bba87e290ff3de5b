"""From a corpus as the user names it to an index on disk: read, tokenised by the model's tokenizer, kept for next time.

This runs in the front end, before the engine loads: what is wrong with a corpus is said in one line, at once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proposers.corpus import MAX_TOKENS, write_index
from vllm_lookahead.config import ConfigError

FORMAT = 1
"""Of the index; another one is made anew."""
SUFFIXES = (".txt", ".jsonl")
FIELDS = ("text", "content", "output", "completion")
PIECE = 1 << 15
"""Characters that are tokenised in one go, up to the end of a line; so all cores take part."""
BATCH = 512


def index_of(corpus: str, tokenizer: Any, order: int, cache: Path, log: Any) -> Path:
    """The index of a corpus; made if it is not in the cache.

    Args:
        corpus: a ``.txt`` file, a ``.jsonl`` file (each line a text, an object with one of ``FIELDS``, or with
            ``messages``), or a folder of such files.
        tokenizer: the model's.
        order: the largest n-gram that is looked up.
        cache: a folder that may have to be made.
        log: a logger, told what took how long.

    Raises:
        ConfigError: there is nothing to read, or no place to write to.
    """
    files = files_of(Path(corpus).expanduser())
    begun = time.monotonic()
    try:
        path = cache / f"corpus-{digest(files, tokenizer, order)}.index"
        if path.exists():
            return path
        pieces = (piece for file in files for text in texts_of(file) for piece in pieces_of(text))
        tokens = tokens_of(pieces, tokenizer)
    except OSError as error:
        raise ConfigError(f"corpus: {error.filename or corpus} can't be read: {error.strerror}") from error
    if len(tokens) < 2:
        raise ConfigError(f"corpus: {corpus} is empty")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_index(tokens, path, order)
    except OSError as error:
        # numpy says how many items it wrote, not why they aren't more
        why = error.strerror or f"no room left, or a limit on the size of files ({error})"
        raise ConfigError(f"corpus: its index can't be written to {cache}: {why}") from error
    log.info("Corpus %s: %d tokens indexed in %.1f s: %s", corpus, len(tokens), time.monotonic() - begun, path)
    return path


def files_of(corpus: Path) -> list[Path]:
    """The files of a corpus, in the order of their names.

    Raises:
        ConfigError: there are none.
    """
    allowed = "must be a .txt or .jsonl file or a folder of them"
    if corpus.is_dir():
        files = sorted(path for path in corpus.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        if not files:
            raise ConfigError(f"corpus: {allowed}; {corpus} has none")
        return files
    if not corpus.exists():
        raise ConfigError(f"corpus: {allowed}; {corpus} does not exist")
    if corpus.suffix not in SUFFIXES:
        raise ConfigError(f"corpus: {allowed}, not {corpus}")
    return [corpus]


def texts_of(file: Path) -> Iterator[str]:
    """The texts of one file.

    Raises:
        ConfigError: it is not text, or a line is not what it should be.
        OSError: it can't be read.
    """
    try:
        if file.suffix == ".txt":
            yield file.read_text(encoding="utf-8")
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from texts_in(line, f"{file}, line {number}")
    except UnicodeDecodeError as error:
        raise ConfigError(f"corpus: {file} is not UTF-8 text") from error


def texts_in(line: str, where: str) -> list[str]:
    """The texts in a line of JSON.

    Raises:
        ConfigError: there is none; says ``where``.
    """
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"corpus: {where} is not JSON: {error}") from error
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        messages = value.get("messages")
        parts = (
            [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else [value]
        )
        found = [part[name] for part in parts for name in FIELDS if isinstance(part.get(name), str)]
        if found:
            return found
    raise ConfigError(f"corpus: {where} must be a text or an object with {', '.join(FIELDS)} or messages")


def pieces_of(text: str) -> Iterator[str]:
    """Cut a text at ends of lines into pieces of about ``PIECE`` characters."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1
        # a text without lines is cut anywhere
        end = end if 0 < end <= start + 2 * PIECE else min(len(text), start + 2 * PIECE)
        yield text[start:end]
        start = end


def tokens_of(pieces: Iterable[str], tokenizer: Any) -> NDArray[np.int32]:
    """Tokenise pieces of text, one after the other: int32 [t].

    Raises:
        ConfigError: these are too many.
    """
    parts: list[NDArray[np.int32]] = []
    total = 0
    batch: list[str] = []

    def encode() -> None:
        nonlocal total
        for ids in ids_of(batch, tokenizer):
            parts.append(np.array(ids, np.int32))
            total += len(ids)
        batch.clear()
        if total > MAX_TOKENS:
            raise ConfigError(f"corpus: must have at most {MAX_TOKENS:,} tokens")

    for piece in pieces:
        batch.append(piece)
        if len(batch) == BATCH:
            encode()
    if batch:
        encode()
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def ids_of(texts: list[str], tokenizer: Any) -> Iterable[list[int]]:
    """The tokens of each text, without special ones."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield from tokenizer(texts, add_special_tokens=False)["input_ids"]
        return
    # The same without masks and offsets, which nobody asks for here and which take a quarter of the time.
    backend.no_truncation()
    backend.no_padding()
    for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
        yield encoding.ids


def digest(files: Iterable[Path], tokenizer: Any, order: int) -> str:
    """What an index depends on, as a name: the files' contents, the tokenizer and how it is indexed.

    Raises:
        OSError: a file can't be read.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    of_tokenizer = backend.to_str() if backend is not None else f"{tokenizer.name_or_path} {len(tokenizer)}"
    found = hashlib.sha256(f"{FORMAT} {order} {of_tokenizer}".encode())
    for file in files:
        with file.open("rb") as content:
            found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()[:32]
