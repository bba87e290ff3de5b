"""The tree sampler next to vLLM's sampler, one position of one request at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler

from proposers import DraftTree
from vllm_lookahead.trees.step import StepTrees, Walks
from vllm_lookahead.v1.sampler import TreeSampler, is_plain

ROOT = -1
VOCABULARY = 24


@dataclass
class Row:
    """One request of a step.

    Attributes:
        tree: its drafts, or None.
        temperature: 0 for greedy.
        seed: of its generator, None if it has none.
        output: tokens that it has put out before.
        discard: its sample is thrown away: it is in the middle of its prompt.
    """

    tree: DraftTree | None = None
    temperature: float = 0.0
    top_k: int = VOCABULARY
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    bad_words: list[list[int]] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    discard: bool = False


def metadata_of(
    rows: list[Row], generators: dict[int, torch.Generator], output: list[list[int]], **changes: Any
) -> SamplingMetadata:
    """As vLLM makes it of its batch."""

    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(row, name) for row in rows])

    settings: dict[str, Any] = {
        "temperature": None if all(row.temperature == 0 for row in rows) else column("temperature"),
        "all_greedy": all(row.temperature == 0 for row in rows),
        "all_random": all(row.temperature > 0 for row in rows),
        "top_p": None if all(row.top_p == 1 for row in rows) else column("top_p"),
        "top_k": None if all(row.top_k == VOCABULARY for row in rows) else column("top_k").int(),
        "generators": generators,
        "max_num_logprobs": None,
        "no_penalties": all(row.repetition_penalty == 1 and row.frequency_penalty == 0 for row in rows),
        "prompt_token_ids": torch.full((len(rows), 1), VOCABULARY),
        "frequency_penalties": column("frequency_penalty"),
        "presence_penalties": torch.zeros(len(rows)),
        "repetition_penalties": column("repetition_penalty"),
        "output_token_ids": output,
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {i: row.bad_words for i, row in enumerate(rows) if row.bad_words},
        "logitsprocs": LogitsProcessors(),
    }
    return SamplingMetadata(**{**settings, **changes})


def generators_of(rows: list[Row]) -> dict[int, torch.Generator]:
    """As vLLM makes them: none for a greedy request, seed or not."""
    seeds = {i: row.seed for i, row in enumerate(rows) if row.temperature > 0}
    return {i: torch.Generator().manual_seed(seed) for i, seed in seeds.items() if seed is not None}


def step_of(rows: list[Row]) -> StepTrees:
    trees = {str(i): row.tree for i, row in enumerate(rows) if row.tree is not None}
    return StepTrees.build(
        [str(i) for i in range(len(rows))], {i: tree.token_ids.tolist() for i, tree in trees.items()}, trees
    )


def run_tree_sampler(
    rows: list[Row], logits: torch.Tensor, generators: dict[int, torch.Generator], **changes: Any
) -> tuple[SamplerOutput, Walks]:
    output = [list(row.output) for row in rows]
    untouched = logits.clone()
    result = TreeSampler(Sampler())(
        logits,
        metadata_of(rows, generators, output, **changes),
        step_of(rows),
        np.array([row.discard for row in rows]),
        output,
    )
    assert output == [row.output for row in rows], "the requests' outputs must be as before"
    assert torch.equal(logits, untouched), "the logits are not ours to change"
    return result


def one_by_one(row: Row, logits: torch.Tensor, generator: torch.Generator | None) -> list[int]:
    """The row's tokens as vLLM would sample them without drafts, if its logits were those of the tree's nodes."""
    output = list(row.output)
    emitted: list[int] = []
    node = ROOT
    while True:
        metadata = metadata_of([row], {} if generator is None else {0: generator}, [output])
        token = int(Sampler()(logits[node + 1][None].clone(), metadata).sampled_token_ids[0, 0])
        emitted.append(token)
        output.append(token)
        tree = row.tree
        children = [] if tree is None or row.discard else np.flatnonzero(tree.parents == node).tolist()
        node = next((child for child in children if tree is not None and tree.token_ids[child] == token), -2)
        if node < 0:
            return emitted


def random_tree(rng: np.random.Generator, logits: torch.Tensor) -> DraftTree:
    """A tree whose nodes are likely tokens, so that walks go deep: ``logits`` are the root's and the nodes'."""
    parents = [int(rng.integers(max(ROOT, node - 4), node)) for node in range(len(logits) - 1)]
    likely = logits.topk(3).indices.numpy()
    return DraftTree.from_parents([int(rng.choice(likely[parent + 1])) for parent in parents], parents)


def random_rows(case: int, /, **each: Any) -> tuple[list[Row], torch.Tensor]:
    rng = np.random.default_rng(case)
    rows, logits = [], []
    for i in range(9):
        own = torch.from_numpy(rng.normal(0, 2.5, (1 + (i % 3) * 8, VOCABULARY)).astype(np.float32))
        options = {name: make(i) for name, make in each.items()}
        output = rng.integers(0, VOCABULARY, 5).tolist()
        rows.append(Row(tree=random_tree(rng, own) if i % 3 else None, output=output, **options))
        logits.append(own)
    return rows, torch.cat(logits)


def assert_rows_are_sampled_one_by_one(rows: list[Row], logits: torch.Tensor) -> Walks:
    """Tokens and generator states are those of a loop over positions with vLLM's sampler."""
    generators, expected_generators = generators_of(rows), generators_of(rows)
    output, walks = run_tree_sampler(rows, logits, generators)
    tokens, _ = RejectionSampler.parse_output(output.sampled_token_ids, VOCABULARY)
    first = step_of(rows).root_logits_rows()
    for i, row in enumerate(rows):
        own = logits[first[i] : first[i] + 1 + (len(row.tree) if row.tree is not None else 0)]
        if row.seed is not None or row.temperature == 0:
            assert tokens[i] == one_by_one(row, own, expected_generators.get(i)), f"row {i}"
        if i in generators and not row.discard:
            assert torch.equal(generators[i].get_state(), expected_generators[i].get_state()), "one draw per token"
    return walks


@pytest.mark.parametrize("seed", range(5))
def test_greedy(seed: int) -> None:
    walks = assert_rows_are_sampled_one_by_one(*random_rows(seed))
    assert walks.lengths.max() >= 2


@pytest.mark.parametrize("seed", range(5))
def test_seeded_beside_greedy_and_unseeded(seed: int) -> None:
    rows, logits = random_rows(
        seed,
        temperature=lambda i: (0.0, 0.8, 1.3)[i // 2 % 3],
        top_k=lambda i: (VOCABULARY, 5)[i % 2],
        top_p=lambda i: (1.0, 0.9, 0.6)[i % 3],
        seed=lambda i: i if i % 4 else None,
    )
    assert_rows_are_sampled_one_by_one(rows, logits)


@pytest.mark.parametrize("seed", range(5))
def test_all_seeded(seed: int) -> None:
    rows, logits = random_rows(seed, temperature=lambda i: 0.5 + 0.1 * i, seed=lambda i: 100 + i)
    walks = assert_rows_are_sampled_one_by_one(rows, logits)
    assert walks.lengths.max() >= 2


@pytest.mark.parametrize("seed", range(5))
def test_penalties_and_bad_words_see_the_path(seed: int) -> None:
    rows, logits = random_rows(
        seed,
        temperature=lambda i: (0.0, 0.7)[i % 2],
        seed=lambda i: i,
        repetition_penalty=lambda i: (1.0, 2.5)[i // 2 % 2],
        frequency_penalty=lambda i: (0.0, 1.5)[i // 4 % 2],
        bad_words=lambda i: [[t, (t * 7 + 1) % VOCABULARY] for t in range(VOCABULARY)] + [[i]] if i % 3 == 2 else [],
    )
    assert_rows_are_sampled_one_by_one(rows, logits)


def test_a_penalty_changes_what_is_accepted() -> None:
    """The argmax is token 3 everywhere; with the penalty it is 3 only as long as it has not come yet."""
    logits = torch.zeros(4, VOCABULARY)
    logits[:, 3], logits[:, 5] = 2.0, 1.0
    chain = DraftTree.chain([3, 3, 3])
    _, walks = run_tree_sampler([Row(chain)], logits, {})
    assert walks.tokens.tolist() == [[3, 3, 3, 3]]
    _, walks = run_tree_sampler([Row(chain, frequency_penalty=1.5)], logits, {})
    assert walks.tokens.tolist() == [[3, 5]]


def test_discarded_rows_draw_nothing_and_accept_nothing() -> None:
    rows, logits = random_rows(
        1, temperature=lambda i: 0.9, seed=lambda i: i, discard=lambda i: i % 2 == 1, top_k=lambda i: 3
    )
    generators, fresh = generators_of(rows), generators_of(rows)
    _, walks = run_tree_sampler(rows, logits, generators)
    for i, row in enumerate(rows):
        drawn = not torch.equal(generators[i].get_state(), fresh[i].get_state())
        assert drawn == (not row.discard)
        if row.discard:
            assert walks.lengths[i] == 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_come_from_each_nodes_own_row(temperature: float) -> None:
    rows, logits = random_rows(2, temperature=lambda i: temperature, seed=lambda i: i)
    output, walks = run_tree_sampler(rows, logits, generators_of(rows), max_num_logprobs=2)
    tokens, lists = RejectionSampler.parse_output(
        output.sampled_token_ids, VOCABULARY, logprobs_tensors=output.logprobs_tensors
    )
    assert lists is not None
    first = step_of(rows).root_logits_rows()
    for row in range(len(rows)):
        mine = lists.slice_request(row, len(tokens[row]))
        nodes = [ROOT, *walks.path(row).tolist()]
        for position, (node, token) in enumerate(zip(nodes, tokens[row], strict=True)):
            expected = logits[first[row] + 1 + node].log_softmax(-1)
            assert mine.logprob_token_ids[position].tolist() == [token, *expected.topk(2).indices.tolist()]
            np.testing.assert_allclose(
                mine.logprobs[position], [expected[token], *expected.topk(2).values], rtol=0, atol=1e-6
            )
            assert mine.sampled_token_ranks[position] == 1 + int((expected > expected[token]).sum())


def test_unseeded_rows_follow_the_distribution_at_every_node() -> None:
    """20,000 walks down one tree in one call: how often each leaf is reached is the product of its probabilities."""
    samples, size = 20_000, 5
    tree = DraftTree.from_parents([0, 1, 0, 1, 2], [ROOT, ROOT, 0, 0, 1])
    logits = torch.randn(len(tree) + 1, size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    _, walks = run_tree_sampler([Row(tree, temperature=0.7)] * samples, logits.repeat(samples, 1), {})
    counts = Counter(tuple(t for t in row if t >= 0) for row in walks.tokens.tolist())
    probabilities = (logits / 0.7).softmax(-1).double().numpy()
    expected: dict[tuple[int, ...], float] = {}

    def expand(path: tuple[int, ...], node: int, probability: float) -> None:
        for token in range(size):
            here = probability * probabilities[node + 1, token]
            child = [c for c in range(len(tree)) if tree.parents[c] == node and tree.token_ids[c] == token]
            if child:
                expand((*path, token), child[0], here)
            else:
                expected[(*path, token)] = here

    expand((), ROOT, 1.0)
    assert set(counts) <= set(expected)
    bins = {path: p * samples for path, p in expected.items() if p * samples >= 5}
    statistic = sum((counts[path] - mean) ** 2 / mean for path, mean in bins.items())
    half = torch.tensor([(len(bins) - 1) / 2, statistic / 2], dtype=torch.float64)
    assert float(torch.special.gammaincc(half[0], half[1])) > 1e-4


class Exploding(LogitsProcessor):
    """Fails when it sees a longer output than it started with."""

    def __init__(self, output: list[list[int]]) -> None:
        self.output, self.before = output, [len(row) for row in output]

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: object) -> None:
        if [len(row) for row in self.output] != self.before:
            raise RuntimeError("a bug in a processor")

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def test_outputs_are_restored_when_a_processor_fails() -> None:
    logits = torch.zeros(3, VOCABULARY)
    logits[:, 3] = 1.0
    rows, output = [Row(DraftTree.chain([3, 3]))], [[1, 2]]
    metadata = metadata_of(rows, {}, output, logitsprocs=LogitsProcessors([Exploding(output)]))
    with pytest.raises(RuntimeError, match="a bug in a processor"):
        TreeSampler(Sampler())(logits, metadata, step_of(rows), np.array([False]), output)
    assert output == [[1, 2]]


def test_what_counts_as_plain() -> None:
    rows = [Row(temperature=0.5, top_k=3, seed=1)]
    assert is_plain(metadata_of(rows, generators_of(rows), [[]]))
    assert not is_plain(metadata_of([Row(repetition_penalty=1.1)], {}, [[]]))
    assert not is_plain(metadata_of([Row(bad_words=[[1]])], {}, [[]]))
    assert not is_plain(metadata_of([Row()], {}, [[]], allowed_token_ids_mask=torch.zeros(1, VOCABULARY).bool()))
    assert not is_plain(metadata_of([Row()], {}, [[]], logprob_token_ids={0: [1]}))
    assert not is_plain(metadata_of([Row()], {}, [[]], logitsprocs=LogitsProcessors([Exploding([])])))
