"""Which nodes to draft: candidate continuations in, the most probable tree of a given size out.

Every source of guesses (matches in the context, n-grams of the pool) is brought into one form: a *candidate* is what
followed some earlier place which agrees with the end of the context in its last ``match`` tokens. Candidates that share
a prefix share nodes. A node's probability is its parent's times the share of the parent's candidates which go there,
weighted by how long they match and how recent they are, times the chance that any candidate of the parent is right at
all, which also grows with the length of the match and is learnt (``calibration``). Nodes are emitted by falling
probability, so that a prefix of the tree is the best tree of its size, and the first child of a node is its likeliest.

All arithmetic is plain IEEE in a fixed order: every tensor-parallel rank gets the same tree.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from proposers.tree import FloatArray, IntArray

MAX_MATCH = 16
"""Longer matches count as this long."""

# Weight of one candidate beside others, by the length of its match, and how fast it falls with its place in the order.
# Chosen on replayed Python source, where the neighbourhood is flat.
WEIGHT = 1.7 ** np.arange(MAX_MATCH + 1)
DECAY = 0.5


@njit(cache=True)
def grow_tree(
    tokens: IntArray,
    lengths: IntArray,
    matches: IntArray,
    count: int,
    budget: int,
    threshold: float,
    hit: NDArray[np.float64],
    out: IntArray,
    chances: FloatArray,
) -> int:
    """Merge candidates into a tree, most probable nodes first.

    Args:
        tokens: int32 [>= count, d], a candidate's tokens, from the root's child down.
        lengths: int32 [>= count], how many of its row's tokens a candidate has.
        matches: int32 [>= count], how many tokens before its first one agree with the context, 1 to ``MAX_MATCH``.
        count: number of candidates, most trusted first.
        budget: most nodes.
        threshold: leave out nodes that are less probable than this.
        hit: float64 [``MAX_MATCH`` + 1], the chance that one of the candidates is right when the longest of them
            matches that many tokens.
        out: int32 [4, >= budget], receives the nodes' tokens, parents and depths, and which entry of ``hit`` each node
            and its siblings relied on.
        chances: float32 [>= budget], receives their probabilities.

    Returns:
        The number of nodes.
    """
    if count == 0 or budget <= 0:
        return 0
    depth_limit = tokens.shape[1]
    order = np.empty(count, np.int32)  # candidates, those of one node side by side
    for i in range(count):
        order[i] = i
    moved = np.empty(count, np.int32)
    child_of = np.empty(count, np.int32)
    room = count * depth_limit + 1
    entry = np.empty((6, room), np.int32)  # open nodes: token, parent, depth, first and last + 1 in order, match
    score = np.empty(room, np.float64)
    heap = np.empty(room, np.int32)
    child_weight = np.empty(count, np.float64)
    child_token = np.empty(count, np.int32)
    child_start = np.empty(count + 1, np.int32)
    entries = 0
    heaped = 0
    nodes = 0
    node = -1
    depth = 0
    low = 0
    high = count
    probability = 1.0
    while True:
        # Open the children of the node just emitted (the root at first): split its candidates by their next token.
        children = 0
        total = 0.0
        longest = 0
        if depth < depth_limit:
            for k in range(low, high):
                i = order[k]
                child_of[k] = -1
                if lengths[i] <= depth:
                    continue
                token = tokens[i, depth]
                c = 0
                while c < children and child_token[c] != token:
                    c += 1
                if c == children:
                    child_token[c] = token
                    child_weight[c] = 0.0
                    child_start[c] = 0
                    children += 1
                child_of[k] = c
                w = WEIGHT[matches[i]] / (1.0 + DECAY * i)
                child_weight[c] += w
                child_start[c] += 1
                total += w
                if matches[i] > longest:
                    longest = matches[i]
        if children > 0:
            start = low
            for c in range(children):
                size = child_start[c]
                child_start[c] = start
                start += size
            child_start[children] = start
            for k in range(low, high):
                c = child_of[k]
                if c >= 0:
                    moved[child_start[c]] = order[k]
                    child_start[c] += 1
            for k in range(low, start):
                order[k] = moved[k]
            match = min(longest + depth, MAX_MATCH)
            chance = probability * hit[match]
            first = low
            for c in range(children):
                last = child_start[c]
                p = chance * child_weight[c] / total
                if p >= threshold:
                    entry[0, entries] = child_token[c]
                    entry[1, entries] = node
                    entry[2, entries] = depth + 1
                    entry[3, entries] = first
                    entry[4, entries] = last
                    entry[5, entries] = match
                    score[entries] = p
                    # Sift up; among equals the older entry stays above.
                    at = heaped
                    heaped += 1
                    while at > 0:
                        up = (at - 1) >> 1
                        if score[heap[up]] >= p:
                            break
                        heap[at] = heap[up]
                        at = up
                    heap[at] = entries
                    entries += 1
                first = last
        if heaped == 0 or nodes == budget:
            return nodes
        top = heap[0]
        heaped -= 1
        if heaped > 0:
            last_entry = heap[heaped]
            at = 0
            while True:
                down = 2 * at + 1
                if down >= heaped:
                    break
                right = down + 1
                if right < heaped and (
                    score[heap[right]] > score[heap[down]]
                    or (score[heap[right]] == score[heap[down]] and heap[right] < heap[down])
                ):
                    down = right
                if score[last_entry] > score[heap[down]] or (
                    score[last_entry] == score[heap[down]] and last_entry < heap[down]
                ):
                    break
                heap[at] = heap[down]
                at = down
            heap[at] = last_entry
        node = nodes
        depth = entry[2, top]
        low = entry[3, top]
        high = entry[4, top]
        probability = score[top]
        out[0, nodes] = entry[0, top]
        out[1, nodes] = entry[1, top]
        out[2, nodes] = depth
        out[3, nodes] = entry[5, top]
        chances[nodes] = probability
        nodes += 1
