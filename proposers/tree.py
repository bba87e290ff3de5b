"""The draft token tree: the one thing that proposers make and the engine verifies (arrays only, no policy)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from proposers.numba_cache import CACHE

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
ByteArray = NDArray[np.uint8]

ROOT = -1
"""The ``parents`` entry of a node that hangs from the root (the last accepted token, which is not a node)."""
NO_CHANCES = np.empty(0, np.float32)
NO_SOURCES = np.empty(0, np.uint8)


@dataclass(slots=True)  # not frozen: that takes three times as long, once per request and step
class DraftTree:
    """Guessed tokens hanging from the root; parents come before children, so every prefix is a valid tree.

    Siblings carry different tokens among the *verification* nodes, where a proposer merges its guesses into a trie;
    a comb may repeat a token that a sibling has. A walk takes the first child that matches.

    Attributes:
        token_ids: int32 [n], the guessed token of each node.
        parents: int32 [n], index of each node's parent, ``ROOT`` (-1) for a child of the root; ``parents[i] < i``.
        depths: int32 [n], distance to the root, so at least 1; the RoPE position is root position + depth.
        num_branch: how many of the last nodes belong to the lookahead branch, not to the guesses.
        chances: float32 [n - num_branch] or None, the proposer's estimate of each guess to be accepted; falling.
        sources: uint8 [n - num_branch] or None, where each guess comes from: an index into the proposer's ``sources``.
    """

    token_ids: IntArray
    parents: IntArray
    depths: IntArray
    num_branch: int = 0
    chances: FloatArray | None = None
    sources: ByteArray | None = None

    @classmethod
    def empty(cls) -> DraftTree:
        """The tree without a node: nothing is guessed, the step is plain decoding."""
        return cls(*np.empty((3, 0), np.int32))

    @classmethod
    def chain(cls, tokens: Sequence[int] | IntArray) -> DraftTree:
        """A tree without branches: each token is the only child of the one before."""
        n = len(tokens)
        steps = np.arange(n, dtype=np.int32)
        return cls(np.array(tokens, np.int32), steps - np.int32(1), steps + np.int32(1))

    @classmethod
    def from_parents(cls, token_ids: Sequence[int] | IntArray, parents: Sequence[int] | IntArray) -> DraftTree:
        """A tree from tokens and parents; the depths follow. Parents must come before children (see ``validate``)."""
        parents = np.array(parents, np.int32)
        return cls(np.array(token_ids, np.int32), parents, _depths(parents))

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_guesses(self) -> int:
        """How many of the first nodes are guesses."""
        return len(self) - self.num_branch

    def prefix(self, n: int) -> DraftTree:
        """The tree of the first ``n`` nodes (all of them if there are fewer), as views of this tree's arrays."""
        branch = max(0, min(n, len(self)) - self.num_guesses)
        chances = None if self.chances is None else self.chances[:n]
        sources = None if self.sources is None else self.sources[:n]
        return DraftTree(self.token_ids[:n], self.parents[:n], self.depths[:n], branch, chances, sources)

    def trimmed(self, num_guesses: int, *, keep_branch: bool) -> DraftTree:
        """The tree of the first ``num_guesses`` guesses and, if asked for, the whole lookahead branch after them."""
        if not keep_branch or self.num_branch == 0:
            return self.prefix(min(num_guesses, self.num_guesses))
        cut = self.num_guesses - num_guesses
        if cut <= 0:
            return self
        branch = self.parents[self.num_guesses :]
        return DraftTree(
            np.concatenate((self.token_ids[:num_guesses], self.token_ids[self.num_guesses :])),
            # the branch hangs from the root and never from a guess
            np.concatenate((self.parents[:num_guesses], np.where(branch == ROOT, branch, branch - np.int32(cut)))),
            np.concatenate((self.depths[:num_guesses], self.depths[self.num_guesses :])),
            self.num_branch,
            None if self.chances is None else self.chances[:num_guesses],
            None if self.sources is None else self.sources[:num_guesses],
        )

    def up_to(self, depth: int) -> DraftTree:
        """The tree without the guesses deeper than ``depth``; the lookahead branch stays as it is."""
        if len(self) <= depth:
            return self
        kept, parents = _up_to(self.parents, self.depths, self.num_guesses, depth)
        if len(kept) == len(self):
            return self
        guesses = kept[: len(kept) - self.num_branch]
        chances = None if self.chances is None else self.chances[guesses]
        sources = None if self.sources is None else self.sources[guesses]
        return DraftTree(self.token_ids[kept], parents, self.depths[kept], self.num_branch, chances, sources)

    def ancestor_mask(self) -> BoolArray:
        """Which nodes attend to which, bool [n, n]: node i to node j if j is i or an ancestor of i."""
        mask = np.zeros((len(self), len(self)), np.bool_)
        _fill_ancestor_mask(self.parents, mask)
        return mask

    def first_path(self) -> IntArray:
        """int32 [d], the nodes of the path that takes the first child everywhere: the proposer's best single guess."""
        return _first_path(self.parents)

    def as_chain(self) -> DraftTree:
        """The guesses' first path alone, as a chain: for requests and models that can't verify a tree. No comb."""
        path = _first_path(self.parents[: self.num_guesses])
        return replace(
            DraftTree.chain(self.token_ids[path]),
            chances=None if self.chances is None else self.chances[path],
            sources=None if self.sources is None else self.sources[path],
        )

    def walk(self, sampled: Sequence[int] | IntArray) -> IntArray:
        """The accepted path: at each visited node, go on to the first child that carries the sampled token.

        The plain reference for the engine's vectorised walk.

        Args:
            sampled: int [m + 1], the token sampled after the root (entry 0) and after node i (entry i + 1), for the
                first m nodes; m may be less than n, then only those nodes were verified.

        Returns:
            int32 [a], the accepted nodes from the root down.
        """
        verified = len(sampled) - 1
        path: list[int] = []
        here = ROOT
        for node in range(verified):
            # Children come after their parent, so one pass over the nodes meets every step of the walk in order.
            if self.parents[node] == here and self.token_ids[node] == sampled[here + 1]:
                path.append(node)
                here = node
        return np.array(path, np.int32)

    def check(self, vocab_size: int, num_sources: int = 256) -> None:
        """Check all that an engine relies on, in a few microseconds: no tree may harm it, whoever made it.

        Args:
            vocab_size: of the target model.
            num_sources: how many sources the proposer has.

        Raises:
            ValueError: says what is wrong.
        """
        arrays = (self.token_ids, self.parents, self.depths)
        chances = NO_CHANCES if self.chances is None else self.chances
        sources = NO_SOURCES if self.sources is None else self.sources
        # types first: numba would take a second to compile for others
        if (
            all(isinstance(array, np.ndarray) and array.ndim == 1 for array in (*arrays, chances, sources))
            and all(array.dtype == np.int32 for array in arrays)
            and chances.dtype == np.float32
            and sources.dtype == np.uint8
            and len(self.token_ids) == len(self.parents) == len(self.depths)
            and 0 <= self.num_branch <= len(self)
            and (self.chances is None or len(chances) == self.num_guesses)
            and (self.sources is None or len(sources) == self.num_guesses)
            and _is_sound(*arrays, chances, sources, vocab_size, num_sources)
        ):
            return
        self.validate()
        if (self.token_ids >= vocab_size).any():
            raise ValueError(f"token {int(self.token_ids.max())} is not of the vocabulary, which has {vocab_size}")
        raise ValueError(f"source {int(sources.max(initial=0))}: there are {num_sources}")

    def validate(self, *, unique_siblings: bool = False) -> None:
        """Check what the class promises, one after the other.

        Args:
            unique_siblings: also ask that no two children of a node carry the same token, as in a trie of guesses.

        Raises:
            ValueError: says which promise which node breaks.
        """
        for name in ("token_ids", "parents", "depths"):
            _expect(name, getattr(self, name), np.int32, len(self))
        if not 0 <= self.num_branch <= len(self):
            raise ValueError(f"num_branch is {self.num_branch}, expected 0 to {len(self)}")
        if self.chances is not None:
            _expect("chances", self.chances, np.float32, self.num_guesses)
            if not ((self.chances >= 0.0) & (self.chances <= 1.0)).all():
                raise ValueError("a chance is not between 0 and 1")
            if (np.diff(self.chances) > 0).any():
                raise ValueError("chances rise")
        if self.sources is not None:
            _expect("sources", self.sources, np.uint8, self.num_guesses)
        children: set[tuple[int, int]] = set()
        nodes = zip(self.token_ids.tolist(), self.parents.tolist(), self.depths.tolist(), strict=True)
        for node, (token, parent, depth) in enumerate(nodes):
            if token < 0:
                raise ValueError(f"node {node} has token {token}, expected at least 0")
            if not ROOT <= parent < node:
                raise ValueError(f"node {node} has parent {parent}, expected {ROOT} or an earlier node")
            expected = 1 if parent == ROOT else int(self.depths[parent]) + 1
            if depth != expected:
                raise ValueError(f"node {node} has depth {depth}, expected {expected}")
            if unique_siblings and (parent, token) in children:
                raise ValueError(f"node {node} repeats token {token} among the children of {parent}")
            children.add((parent, token))


class TrieBuilder:
    """Merges guesses into one tree: a prefix that several guesses share becomes one path, verified once.

    Guesses added first come first among siblings, and get their nodes first when the budget runs out.

    Args:
        budget: most nodes that the tree may have.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def add(self, guess: Iterable[int]) -> int:
        """Add one guess, tokens from the root down; cut off where the budget ends. Returns the number of new nodes."""
        before = len(self._tokens)
        node = ROOT
        for token in map(int, guess):
            child = self._children.get((node, token))
            if child is None:
                if len(self._tokens) >= self.budget:
                    break
                child = len(self._tokens)
                self._children[node, token] = child
                self._tokens.append(token)
                self._parents.append(node)
            node = child
        return len(self._tokens) - before

    def build(self) -> DraftTree:
        """The tree of what was added so far."""
        return DraftTree.from_parents(self._tokens, self._parents)


def merge(guesses: Iterable[Iterable[int]], budget: int) -> DraftTree:
    """Merge guesses, best first, into one tree of at most ``budget`` nodes (see ``TrieBuilder``)."""
    builder = TrieBuilder(budget)
    for guess in guesses:
        builder.add(guess)
    return builder.build()


def _expect(name: str, array: object, dtype: type, length: int) -> None:
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is a {type(array).__name__}, expected an array")
    if array.dtype != dtype or array.shape != (length,):
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} ({length},)")


@njit(cache=CACHE)
def _is_sound(
    token_ids: IntArray,
    parents: IntArray,
    depths: IntArray,
    chances: FloatArray,
    sources: ByteArray,
    vocab_size: int,
    num_sources: int,
) -> bool:
    for node in range(len(parents)):
        parent = parents[node]
        if not 0 <= token_ids[node] < vocab_size or not -1 <= parent < node:
            return False
        if depths[node] != (1 if parent < 0 else depths[parent] + 1):
            return False
    last = np.float32(1.0)
    for chance in chances:
        if not 0.0 <= chance <= last:  # also where it is no number
            return False
        last = chance
    return len(sources) == 0 or sources.max() < num_sources


@njit(cache=CACHE)
def _depths(parents: IntArray) -> IntArray:
    depths = np.empty(len(parents), np.int32)
    for node in range(len(parents)):
        parent = parents[node]
        # An invalid parent is left for validate() to name; reading past the array would be undefined here.
        depths[node] = depths[parent] + 1 if 0 <= parent < node else 1
    return depths


@njit(cache=CACHE)
def _up_to(parents: IntArray, depths: IntArray, guesses: int, depth: int) -> tuple[IntArray, IntArray]:
    """The nodes that ``DraftTree.up_to`` keeps, and what their parents' indices become."""
    kept = np.empty(len(parents), np.int32)
    moved = np.empty(len(parents), np.int32)
    new_parents = np.empty(len(parents), np.int32)
    count = 0
    for node in range(len(parents)):
        if node >= guesses or depths[node] <= depth:
            # a kept node's parent is kept: it is less deep
            new_parents[count] = parents[node] if parents[node] < 0 else moved[parents[node]]
            moved[node] = count
            kept[count] = node
            count += 1
    return kept[:count], new_parents[:count]


@njit(cache=CACHE)
def _fill_ancestor_mask(parents: IntArray, mask: BoolArray) -> None:
    for node in range(len(parents)):
        parent = parents[node]
        if parent >= 0:
            mask[node, : parent + 1] = mask[parent, : parent + 1]
        mask[node, node] = True


@njit(cache=CACHE)
def _first_path(parents: IntArray) -> IntArray:
    path = np.empty(len(parents), np.int32)
    length = 0
    here = -1  # ROOT
    for node in range(len(parents)):
        if parents[node] == here:
            path[length] = node
            length += 1
            here = node
    return path[:length]


def warm_up() -> None:
    """Compile this module's kernels (or load them from numba's cache)."""
    tree = DraftTree.from_parents([1, 2], [ROOT, 0])
    tree.check(3)
    tree.ancestor_mask()
    tree.as_chain()
    tree.up_to(1)
