"""Proposers alone, without an engine: how long a proposal takes, and how good prompt lookup's trees are
beside vLLM's own methods.

    python benchmarks/proposer_bench.py speed [--data FOLDER]
    python benchmarks/proposer_bench.py corpus FOLDER
    python benchmarks/proposer_bench.py replay FOLDER
    python benchmarks/proposer_bench.py predictions FOLDER

(Not called proposers.py: beside a script of that name, ``import proposers`` would find the script.)
"""

from __future__ import annotations

import functools
import gzip
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
import typer
from numba import njit
from rich.console import Console
from rich.table import Table

from proposers import (
    NO_INFO,
    DraftTree,
    Lookahead,
    LookaheadOptions,
    PromptLookup,
    PromptLookupOptions,
    Proposer,
    RequestInfo,
    TokenRecycling,
    TokenRecyclingOptions,
    Verified,
)
from proposers.corpus import write_index
from proposers.tree import IntArray

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

MODEL = Path(__file__).parents[1] / "vllm_lookahead" / "demo" / "model"
OTHERS = 100_000  # tokens that other requests said
BUDGET = 64  # nodes per request, for every proposer that drafts trees
Step = Callable[[IntArray], int]  # propose on a context, and observe; returns the number of nodes
Start = Callable[[IntArray, int], Step]  # begin a request: its text to the end, and how much of that is the prompt


def synthetic_text(length: int, seed: int = 0) -> IntArray:
    """int32 [length]: runs copied from earlier places, and new tokens of a Zipf distribution between them."""
    rng = np.random.default_rng(seed)
    text = list(rng.zipf(1.3, 32) % 32_000)
    while len(text) < length:
        start, run = int(rng.integers(max(0, len(text) - 20_000), len(text) - 8)), int(rng.geometric(0.15))
        text += text[start : start + run]
        text += list(rng.zipf(1.3, int(rng.integers(1, 4))) % 32_000)
    return np.array(text[:length], np.int32)


class Texts(NamedTuple):
    """What the sources of a measurement know.

    Attributes:
        own: int32 [t], requests' own texts are its ends.
        others: int32 [s] each, what other requests said.
        corpus: int32 [c].
    """

    own: IntArray
    others: list[IntArray]
    corpus: IntArray


def synthetic_texts(length: int, corpus: int) -> Texts:
    others = synthetic_text(OTHERS, seed=1)
    return Texts(synthetic_text(length), np.array_split(others, OTHERS // 500), synthetic_text(corpus, seed=2))


def real_texts(folder: Path, length: int, corpus: int) -> Texts:
    """Of the texts in a folder one half is the corpus, of the other half a part what other requests said."""
    encode, begin, end = mistral_tokenizer()
    texts = [np.array([begin, *encode(text), end], np.int32) for text in texts_in(folder)]
    rng = np.random.default_rng(0)
    rng.shuffle(texts)  # type: ignore[arg-type]
    mine = texts[::2]
    ends = np.cumsum([len(text) for text in mine])
    split = int(np.searchsorted(ends, OTHERS))
    own = np.concatenate(mine[split:])
    known = np.concatenate(texts[1::2])
    # more text than there is: again and again, each time somewhat different
    known = np.tile(known, -(-corpus // len(known)))[:corpus]
    changed = rng.random(corpus) < 0.05
    known[changed] = rng.permutation(known[changed])
    return Texts(np.tile(own, -(-length // len(own)))[-length:], mine[:split], known)


def texts_in(folder: Path) -> Iterator[str]:
    """All longer strings in a folder's files of JSON lines."""
    files = sorted(path for path in folder.rglob("*") if path.name.endswith((".jsonl", ".jsonl.gz")))
    for file in files:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt") as lines:
            for line in lines:
                yield from strings_in(json.loads(line))


def strings_in(value: Any) -> Iterator[str]:
    """All strings in a value of JSON that are longer than a name."""
    if isinstance(value, str) and len(value) > 40:
        yield value
    elif isinstance(value, list | dict):
        for item in value if isinstance(value, list) else value.values():
            yield from strings_in(item)


def every_source(texts: Texts, index: Path) -> PromptLookup:
    """Prompt lookup with all that it can know but a prediction, which is a request's own."""
    proposer = PromptLookup(PromptLookupOptions(max_draft_tokens=BUDGET))
    for text in texts.others:
        proposer.start("another", text[:1]).propose(text, 0)
    write_index(texts.corpus, index, proposer.options.max_ngram)
    proposer.use_corpus(index)
    return proposer


def expected(text: IntArray) -> IntArray:
    """A prediction that turns out as ``text``, but for one token in 40."""
    prediction = text.copy()
    prediction[np.random.default_rng(0).integers(0, len(prediction), len(prediction) // 40)] += 1
    return prediction


def of_proposer(proposer: Proposer, budget: int, *, predicted: bool = False) -> Start:
    """One step of a request: propose, then observe a verification that accepted nothing."""

    def start(text: IntArray, length: int) -> Step:
        info = RequestInfo(prediction=expected(text[length:]) if predicted else None)
        request = proposer.start("request", text[:length], info)
        said = np.arange(1 + budget, dtype=np.int32)
        nothing = np.empty(0, np.int32)
        likely = np.random.default_rng(0).zipf(1.3, (1 + budget, proposer.num_top)).astype(np.int32) % 32_000

        def step(context: IntArray) -> int:
            tree = request.propose(context, budget)
            argmax = said[: len(tree) + 1] if proposer.needs_argmax else None
            top = likely[: len(tree) + 1] if proposer.num_top else None
            request.observe(tree, Verified(context[-1:], nothing, argmax, len(tree), top))
            return len(tree)

        return step

    return start


def of_stock_ngram() -> Start | None:
    """vLLM's own ``ngram`` kernel (it drafts a chain), or None where vLLM is not installed."""
    try:
        from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens as find
    except ImportError:
        return None

    def start(text: IntArray, length: int) -> Step:
        return lambda context: len(find(context, 1, 5, 1 << 20, BUDGET))

    return start


def time_steps(start: Start, texts: list[IntArray], length: int, steps: int) -> dict[str, Any]:
    """Time the first proposals (they index the prompts) and then ``steps`` more, each 1 to 3 tokens further on.

    The clock is the thread's, which stands while others have its core.

    Args:
        start: begins a request.
        texts: of each request of the batch.
        length: how much of each is the prompt.
        steps: how many.

    Returns:
        ``first_ms`` and ``step_us``, mean over the steps, for one request of the batch; ``batch_ms``, for all of them;
        ``nodes``, mean.
    """
    requests = [start(text, length) for text in texts]
    begin = time.thread_time()
    for step, text in zip(requests, texts, strict=True):
        step(text[:length])
    first = (time.thread_time() - begin) / len(texts)
    nodes, spent, end = 0, 0.0, length
    for i in range(steps):
        end += 1 + i % 3
        contexts = [text[:end] for text in texts]
        begin = time.thread_time()
        for step, context in zip(requests, contexts, strict=True):
            nodes += step(context)
        spent += time.thread_time() - begin
    return {
        "first_ms": 1e3 * first,
        "step_us": 1e6 * spent / steps / len(texts),
        "batch_ms": 1e3 * spent / steps,
        "nodes": nodes / steps / len(texts),
    }


@app.command()
def speed(
    contexts: Annotated[str, typer.Option(help="Context lengths, in tokens.")] = "1024,8192,32768,131072",
    batch: Annotated[int, typer.Option(min=1, help="Requests in the batch.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps per round.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the proposers take turns in each.")] = 5,
    data: Annotated[Path | None, typer.Option(help="A folder of .jsonl(.gz) files; else texts are synthetic.")] = None,
    corpus: Annotated[int, typer.Option(min=2, help="Tokens of the corpus.")] = 4_000_000,
    only: Annotated[str, typer.Option(help="Proposers whose names contain this.")] = "",
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Time propose + observe for one request and for a batch, in one thread. Every request has a text of its own."""
    lengths = [int(length) for length in contexts.split(",")]
    stretch = 2 * steps + 16
    room = max(lengths) + stretch * (1 + batch)
    with TemporaryDirectory() as folder:
        texts = real_texts(data, room, corpus) if data else synthetic_texts(room, corpus)
        starts = starts_of(texts, Path(folder) / "index", only)
        for start in starts.values():
            time_steps(start, [texts.own[:128]], 64, 8)  # compile
        results = [
            result for length in lengths for result in time_proposers(starts, texts.own, length, steps, rounds, batch)
        ]
    table = Table(title=f"propose + observe, one thread, {rounds} rounds of {steps} steps")
    for heading in ("proposer", "context", "nodes", "index prompt, ms", "one request, us", "min - max"):
        table.add_column(heading, justify="right")
    table.add_column(f"batch of {batch}, ms", justify="right")
    table.add_column("min - max", justify="right")
    for r in results:
        table.add_row(
            r["proposer"],
            f"{r['context']:,}",
            f"{r['nodes']:.1f}",
            f"{r['first_ms']:.2f}",
            f"{r['step_us']['median']:.1f}",
            f"{r['step_us']['min']:.1f} - {r['step_us']['max']:.1f}",
            f"{r['batch_ms']['median']:.2f}",
            f"{r['batch_ms']['min']:.2f} - {r['batch_ms']['max']:.2f}",
        )
    report(table, {"machine": machine(), "steps": steps, "rounds": rounds, "results": results}, json_out)


def starts_of(texts: Texts, index: Path, only: str) -> dict[str, Start]:
    """What is timed: every proposer whose name contains ``only``."""

    def lookup(**options: Any) -> Start:
        return of_proposer(PromptLookup(PromptLookupOptions(max_draft_tokens=BUDGET, **options)), BUDGET)

    # The comb of W=15 N=5 comes on top of the 64 guessed nodes.
    window = LookaheadOptions(window_size=15, ngram_size=5, guess_set_size=15)
    candidates: dict[str, Callable[[], Start | None]] = {
        "prompt_lookup": lookup,
        "prompt_lookup, its own text": lambda: lookup(shared_tokens=0, recycled_tokens=0),
        "prompt_lookup, no recycling": lambda: lookup(recycled_tokens=0),
        "prompt_lookup, every source": lambda: of_proposer(every_source(texts, index), BUDGET, predicted=True),
        "token_recycling": lambda: of_proposer(TokenRecycling(TokenRecyclingOptions(max_draft_tokens=BUDGET)), BUDGET),
        "lookahead": lambda: of_proposer(Lookahead(window), BUDGET + 59),
        "stock ngram": of_stock_ngram,
    }
    found = {name: make() for name, make in candidates.items() if only in name}
    return {name: start for name, start in found.items() if start is not None}


def time_proposers(
    starts: dict[str, Start], text: IntArray, length: int, steps: int, rounds: int, batch: int
) -> Iterator[dict[str, Any]]:
    """Time all proposers at one length of context, in turns."""
    stretch = 2 * steps + 16
    ends = range(len(text), length + stretch, -stretch)
    runs: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {name: [] for name in starts}
    for turn in range(rounds):
        # The same statistics for every length: a request's text is one of the last stretches and what is before it.
        chosen = [ends[(turn + i) % len(ends)] for i in range(batch + 1)]
        windows = [np.ascontiguousarray(text[end - length - stretch : end]) for end in chosen]
        for name, start in starts.items():
            one = time_steps(start, windows[:1], length, steps)
            runs[name].append((one, time_steps(start, windows[1:], length, max(1, steps // 8))))
    for name, measured in runs.items():
        yield {
            "proposer": name,
            "context": length,
            "nodes": measured[0][0]["nodes"],
            "first_ms": median(one["first_ms"] for one, _ in measured),
            "step_us": spread([one["step_us"] for one, _ in measured]),
            "batch": batch,
            "batch_ms": spread([many["batch_ms"] for _, many in measured]),
        }


@app.command()
def corpus(
    data: Annotated[Path, typer.Argument(help="A folder of .jsonl(.gz) files, whose lines are repeated in any order.")],
    characters: Annotated[int, typer.Option(min=1000, help="How much text.")] = 28_000_000,
    tokenizer: Annotated[Path, typer.Option(help="A model's folder.")] = MODEL,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Time what a new corpus takes before it can be guessed from: to read and tokenise it, and to index its tokens."""
    from transformers import AutoTokenizer

    from vllm_lookahead.corpus import pieces_of, texts_of, tokens_of

    encoder = AutoTokenizer.from_pretrained(tokenizer)
    lines = [line for text in texts_in(data) for line in text.splitlines(keepends=True)]
    rng = np.random.default_rng(0)
    results = []
    with TemporaryDirectory() as folder:
        file, index = Path(folder) / "corpus.txt", Path(folder) / "index"
        with file.open("w") as text:
            while text.tell() < characters:
                text.writelines(lines[i] for i in rng.permutation(len(lines)))
        write_index(np.zeros(1000, np.int32), index, 4)  # compile
        for _ in range(rounds):
            begin, begin_cpu = time.perf_counter(), time.process_time()
            tokens = tokens_of((piece for text in texts_of(file) for piece in pieces_of(text)), encoder)
            middle, middle_cpu = time.perf_counter(), time.process_time()
            write_index(tokens, index, 4)
            end, end_cpu = time.perf_counter(), time.process_time()
            results.append(
                {
                    "tokens": len(tokens),
                    "tokenise_s": middle - begin,
                    "tokenise_cpu_s": middle_cpu - begin_cpu,
                    "index_s": end - middle,
                    "index_cpu_s": end_cpu - middle_cpu,
                }
            )
    table = Table(title=f"a new corpus of {results[0]['tokens']:,} tokens, {rounds} rounds")
    for heading in ("", "seconds", "min - max", "processor's seconds"):
        table.add_column(heading, justify="left" if not heading else "right")
    for part in ("tokenise", "index"):
        seconds, cpu = (spread([r[f"{part}{kind}"] for r in results]) for kind in ("_s", "_cpu_s"))
        table.add_row(
            part, f"{seconds['median']:.1f}", f"{seconds['min']:.1f} - {seconds['max']:.1f}", f"{cpu['median']:.1f}"
        )
    report(table, {"machine": machine(), "results": results}, json_out)


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def read_traces(path: Path) -> Iterator[tuple[str, list[tuple[IntArray, IntArray]]]]:
    """Name and requests, (prompt, output) in order, of every trace in a folder or file.

    ``.jsonl.gz`` files hold ``{"messages": [...]}`` (a session; each assistant's message is an output) or ``{"prompt":
    ..., "output": ...}`` as text, tokenised by mistral_common's sentencepiece model; a ``.jsonl`` file holds
    ``{"prompt_ids": [...], "output_ids": [...]}``.
    """
    for file in sorted(path.glob("*.jsonl.gz")) if path.is_dir() else [path]:
        lines = (gzip.open if file.suffix == ".gz" else open)(file, "rt")
        requests = [request for line in lines for request in requests_of(json.loads(line))]
        yield file.name.split(".")[0], [(np.array(p, np.int32), np.array(o, np.int32)) for p, o in requests if o]


def requests_of(record: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    if "prompt_ids" in record:
        yield record["prompt_ids"], record["output_ids"]
        return
    encode, begin, end = mistral_tokenizer()
    messages = record.get("messages") or [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["output"]},
    ]
    prompt = [begin]
    for message in messages:
        if message["role"] == "assistant":
            output = [*encode(message["content"]), end]
            if message["content"].strip():
                yield list(prompt), output
            prompt += output
        else:
            prompt += encode(f"[INST] {message['content']} [/INST]")


@functools.cache
def mistral_tokenizer() -> tuple[Callable[[str], list[int]], int, int]:
    import mistral_common
    from sentencepiece import SentencePieceProcessor

    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    tokenizer = SentencePieceProcessor(str(model))
    return tokenizer.encode, tokenizer.bos_id(), tokenizer.eos_id()


class Guesser(Protocol):
    """One method in a replay: told how each request begins, goes on and ends."""

    def start(self, number: int, prompt: IntArray) -> None: ...
    def guess(self, context: IntArray) -> DraftTree: ...
    def finish(self) -> None: ...


class Ours:
    """One of our proposers."""

    def __init__(self, proposer: Proposer, budget: int) -> None:
        self.proposer, self.budget = proposer, budget
        self.infos: list[RequestInfo] = []
        proposer.warm_up()

    def start(self, number: int, prompt: IntArray) -> None:
        info = self.infos[number] if self.infos else NO_INFO
        self.request = self.proposer.start(f"request {number}", prompt, info)

    def guess(self, context: IntArray) -> DraftTree:
        return self.request.propose(context, self.budget)

    def finish(self) -> None:
        self.request.finish()


class Suffix:
    """vLLM's ``suffix`` with its defaults (package arctic-inference): remembers other requests, drafts chains."""

    DEPTH, REQUESTS, FACTOR, PROBABILITY = 24, 10_000, 1.0, 0.1  # vllm/config/speculative.py

    def __init__(self) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.cache = SuffixDecodingCache(self.DEPTH, self.REQUESTS)

    def start(self, number: int, prompt: IntArray) -> None:
        self.number, self.known = number, len(prompt)
        self.cache.start_request(number, prompt)

    def guess(self, context: IntArray) -> DraftTree:
        self.cache.add_active_response(self.number, context[self.known :])
        self.known = len(context)
        draft = self.cache.speculate(
            self.number,
            context[-self.DEPTH :],
            max_spec_tokens=self.DEPTH,
            max_spec_factor=self.FACTOR,
            min_token_prob=self.PROBABILITY,
        )
        return DraftTree.chain(draft.token_ids)

    def finish(self) -> None:
        self.cache.stop_request(self.number)


class StockNgram:
    """Prompt lookup decoding as published: the longest of 3 to 1 tokens, 10 tokens on (vLLM's ``ngram`` kernel)."""

    def __init__(self) -> None:
        from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens as find

        self.find = find

    def start(self, number: int, prompt: IntArray) -> None: ...

    def guess(self, context: IntArray) -> DraftTree:
        return DraftTree.chain(self.find(context, 1, 3, 1 << 20, 10))

    def finish(self) -> None: ...


class Replayed(NamedTuple):
    """What a replay comes to; a request's first token, which no method guesses, counts as a step."""

    tokens_per_step: float
    nodes_per_step: float


def replay_with(guesser: Guesser, requests: list[tuple[IntArray, IntArray]]) -> Replayed:
    """Decode the outputs again, one request after the other."""
    tokens = steps = nodes = 0
    for number, (prompt, output) in enumerate(requests):
        text = np.concatenate((prompt, output))
        guesser.start(number, prompt)
        at = len(prompt) + 1
        steps += 1
        while at < len(text):
            tree = guesser.guess(text[:at])
            nodes += len(tree)
            at += 1 + accepted(tree, text[at:])
            steps += 1
        guesser.finish()
        tokens += len(output)
    return Replayed(tokens / steps, nodes / steps)


def accepted(tree: DraftTree, text: IntArray) -> int:
    """How many tokens of the text that follows are in the tree; the last token is always the model's."""
    return _accepted(tree.token_ids, tree.parents, text)


@njit
def _accepted(token_ids: IntArray, parents: IntArray, text: IntArray) -> int:
    here, depth = -1, 0
    for node in range(len(parents)):
        if depth < len(text) - 1 and parents[node] == here and token_ids[node] == text[depth]:
            here = node
            depth += 1
    return depth


def prompt_lookup(**options: Any) -> Ours:
    return Ours(PromptLookup(PromptLookupOptions(**{"max_draft_tokens": BUDGET, **options})), BUDGET)


def with_as_few_nodes(requests: list[tuple[IntArray, IntArray]], most: float) -> tuple[float, Replayed]:
    """The smallest ``min_probability``, to 3%, at which prompt lookup takes no more nodes a step, and what it gives."""
    low, high = 1e-3, 1.0
    best = high, Replayed(1.0, 0.0)
    while high > 1.03 * low:
        middle = (low * high) ** 0.5
        result = replay_with(prompt_lookup(min_probability=middle), requests)
        if result.nodes_per_step <= most:
            high, best = middle, (middle, result)
        else:
            low = middle
    return best


@app.command()
def replay(
    path: Annotated[Path, typer.Argument(help="Folder of traces, or one file (see read_traces).")],
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Tokens per step when given outputs are decoded again in order: PLD, vLLM's suffix, and our prompt lookup.

    Suffix needs ``pip install --no-deps arctic-inference==0.1.1`` (in an environment of its own: it is a vLLM plugin).
    """
    table = Table(title=f"{path}, at most {BUDGET} nodes")
    for heading in ("trace", "method", "tokens per step", "nodes per step", "of suffix"):
        table.add_column(heading, justify="left" if heading in ("trace", "method") else "right")
    results = []
    for name, requests in read_traces(path):
        runs = {"PLD": replay_with(StockNgram(), requests), "suffix": replay_with(Suffix(), requests)}
        runs["prompt_lookup, itself alone"] = replay_with(prompt_lookup(shared_tokens=0), requests)
        runs["prompt_lookup"] = replay_with(prompt_lookup(), requests)
        threshold, few = with_as_few_nodes(requests, runs["suffix"].nodes_per_step)
        runs[f"prompt_lookup, min_probability {threshold:.3f}"] = few
        for method, run in runs.items():
            ratio = run.tokens_per_step / runs["suffix"].tokens_per_step
            results.append({"trace": name, "method": method, **run._asdict(), "of_suffix": ratio})
            table.add_row(name, method, f"{run.tokens_per_step:.3f}", f"{run.nodes_per_step:.2f}", f"{ratio:.3f}")
    report(table, {"machine": machine(), "path": str(path), "results": results}, json_out)


PREDICTIONS = ("none", "the output", "one token in 40 changed", "a piece left out", "another answer")


def predicted(kind: str, requests: list[tuple[IntArray, IntArray]], number: int, rng: np.random.Generator) -> Any:
    """A prediction of one request's output; see ``PREDICTIONS``."""
    output = requests[number][1]
    if kind == "none":
        return None
    if kind == "another answer":
        return requests[number - 1][1]
    if kind == "a piece left out":
        third = len(output) // 3
        return np.concatenate((output[:third], output[third + 10 :]))
    changed = output.copy()
    if kind != "the output":
        changed[rng.integers(0, len(output), max(1, len(output) // 40))] += 1
    return changed


@app.command()
def predictions(
    path: Annotated[Path, typer.Argument(help="Folder of traces, or one file (see read_traces).")],
    most: Annotated[int, typer.Option(min=2, help="Requests of each trace.")] = 60,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Tokens per step with predicted outputs, from perfect to useless; nothing is known from other requests."""
    table = Table(title=f"{path}, at most {BUDGET} nodes")
    for heading in ("trace", "prediction", "tokens per step", "nodes per step"):
        table.add_column(heading, justify="left" if heading in ("trace", "prediction") else "right")
    results = []
    for name, requests in read_traces(path):
        chosen = [request for request in requests if len(request[1]) > 20][:most]
        for kind in PREDICTIONS:
            rng = np.random.default_rng(0)
            guesser = prompt_lookup(shared_tokens=0)
            guesser.infos = [RequestInfo(None, predicted(kind, chosen, i, rng)) for i in range(len(chosen))]
            run = replay_with(guesser, chosen)
            results.append({"trace": name, "prediction": kind, **run._asdict()})
            table.add_row(name, kind, f"{run.tokens_per_step:.3f}", f"{run.nodes_per_step:.1f}")
    report(table, {"machine": machine(), "path": str(path), "results": results}, json_out)


def machine() -> str:
    return f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"


def report(table: Table, figures: dict[str, Any], json_out: Path | None) -> None:
    Console().print(table)
    if json_out is not None:
        json_out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    app()
