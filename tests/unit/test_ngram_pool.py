"""The n-gram pool: at most G n-grams per first token, the least recently seen gives way."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from proposers.ngram_pool import NgramPool, add, gather_guesses

Gram = tuple[int, ...]


def remember(pool: NgramPool, *grams: Gram) -> None:
    for gram in grams:
        pool.reserve(1)
        add(pool.state, gram[0], np.array(gram[1:], np.int32))


def guesses(pool: NgramPool, key: int, most: int = 100) -> list[Gram]:
    tokens = np.zeros((most, 8), np.int32)
    found = gather_guesses(pool.state, key, tokens)
    return [tuple(row[: pool.state[4]].tolist()) for row in tokens[:found]]


def test_guesses_come_newest_first() -> None:
    pool = NgramPool(ngram_size=3, guess_set_size=5)
    remember(pool, (7, 1, 2), (7, 3, 4), (8, 5, 6))
    assert guesses(pool, 7) == [(3, 4), (1, 2)]
    assert guesses(pool, 7, most=1) == [(3, 4)]
    assert guesses(pool, 9) == []


def test_seeing_an_ngram_again_makes_it_the_newest() -> None:
    pool = NgramPool(3, 2)
    remember(pool, (7, 1, 1), (7, 2, 2), (7, 1, 1), (7, 3, 3))
    assert pool.contents() == {7: [(1, 1), (3, 3)]}


def test_a_guess_set_size_of_zero_keeps_nothing() -> None:
    pool = NgramPool(3, 0)
    remember(pool, (7, 1, 1))
    pool.extend(np.arange(20, dtype=np.int32))
    assert pool.contents() == {}
    assert guesses(pool, 7) == []


def test_the_ngrams_of_a_text_are_added_once() -> None:
    pool = NgramPool(3, 4)
    text = np.array([1, 2, 3, 1, 2, 4], np.int32)
    pool.extend(text[:4])
    pool.extend(text)
    pool.extend(text)
    assert pool.contents() == {1: [(2, 3), (2, 4)], 2: [(3, 1)], 3: [(1, 2)]}


@settings(deadline=None)
@given(
    st.integers(2, 4),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 2)), max_size=300),
)
def test_it_behaves_as_a_dict_of_lists(n: int, g: int, seen: list[tuple[int, int]]) -> None:
    """Also while the table grows: it begins with room for 64 first tokens."""
    pool = NgramPool(n, g)
    expected: dict[int, list[Gram]] = {}
    for key, variant in seen:
        gram = (key, *(variant + i for i in range(n - 1)))
        remember(pool, gram)
        kept = expected.setdefault(key, [])
        if gram[1:] in kept:
            kept.remove(gram[1:])
        kept.append(gram[1:])
        del kept[: max(0, len(kept) - g)]
    assert pool.contents() == expected
    assert all(guesses(pool, key) == kept[::-1] for key, kept in expected.items())
