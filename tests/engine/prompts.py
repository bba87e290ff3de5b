"""Prompts of the engine tests: code, chats and repetitive text, all written for this project."""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split("\n--------\n"))


FUNCTIONS = _split(
    '''def clamp(value: int, low: int, high: int) -> int:
    """Return value, moved into the range from low to high."""

--------
def count_vowels(text: str) -> int:
    """Count the vowels in a text.

    >>> count_vowels("banana")
    3
    """

--------
def running_mean(values: list[float], width: int) -> list[float]:
    """Return the mean of each window of the values."""
    if width < 1:
        raise ValueError("width must be positive")

--------
def flatten(items):
    """Flatten nested lists into one list.

    >>> flatten([1, [2, [3, 4]], 5])
    [1, 2, 3, 4, 5]
    """
    result = []
    for item in items:

--------
def read_lines(path: str, encoding: str = "utf-8") -> list[str]:
    """Read a file and return its lines without line ends."""
    with open(path, encoding=encoding) as file:

--------
def parse_pair(text: str) -> tuple[str, str]:
    """Split "key = value" at the first equals sign."""
    key, separator, value = text.partition("=")
    if not separator:

--------
import os
import sys


def main(argv=None):
    """Print the size of every file that is named on the command line."""
    if argv is None:
        argv = sys.argv[1:]
    for name in argv:

--------
def binary_search(items, target):
    """Return the index of target in the sorted items, or -1."""
    low = 0
    high = len(items) - 1
    while low <= high:
        middle = (low + high) // 2
        if items[middle] == target:
            return middle
        if items[middle] < target:
            low = middle + 1
        else:

--------
async def fetch_all(session, urls):
    """Fetch every url and return the bodies in the same order."""
    results = []
    for url in urls:
        async with session.get(url) as response:

--------
def word_counts(text):
    """Return a dictionary from each word to how often it occurs."""
    counts = {}
    for word in text.split():
        counts[word] = counts.get(word, 0) + 1
    return counts


def letter_counts(text):
    """Return a dictionary from each letter to how often it occurs."""
    counts = {}

--------
def transpose(matrix):
    rows = len(matrix)
    columns = len(matrix[0])
    result = []
    for column in range(columns):

--------
from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def retry(function, attempts: int = 3):
    for attempt in range(attempts):
        try:
            return function()
        except Exception:
            logger.'''
)

CLASSES = _split(
    '''class Queue:
    """First in, first out."""

    def __init__(self):
        self.items = []

    def put(self, item):
        self.items.append(item)

    def get(self):

--------
class Point:
    """A point in the plane."""

    def __init__(self, x: float, y: float) -> None:
        self.x = x
        self.y = y

    def __add__(self, other):
        return Point(self.x + other.x, self.y + other.y)

    def __sub__(self, other):

--------
class ConfigError(Exception):
    """Raised when the configuration is wrong."""


class NetworkError(Exception):
    """Raised when
--------
class TestStack(unittest.TestCase):
    def setUp(self):
        self.stack = Stack()

    def test_push(self):
        self.stack.push(1)
        self.assertEqual(self.stack.size(), 1)

    def test_pop(self):

--------
class Node:
    def __init__(self, value, left=None, right=None):
        self.value = value
        self.left = left
        self.right = right

    def insert(self, value):
        """Insert a value into the tree."""
        if value < self.value:
            if self.left is None:
                self.left = Node(value)
            else:
                self.left.insert(value)
        else:

--------
@dataclass
class Order:
    """One order of a customer."""

    number: int
    customer: str
    items: list[str]

--------
class Cache(dict):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def __setitem__(self, key, value):

--------
class Reader:
    """Reads records from a file object."""

    def __init__(self, file):
        self.file = file

    def __iter__(self):
        return self

    def __next__(self):
        line = self.file.readline()
        if not line:
            raise StopIteration
'''
)

CHATS = tuple(
    f"<|user|>\n{question}<|end|>\n<|assistant|>\n"
    for question in (
        "Write a function that returns the largest of three numbers.",
        "What does this function do?\n\ndef f(x):\n    return x * x\n",
        "Add a docstring:\n\ndef area(width, height):\n    return width * height\n",
        "How do I open a file in Python?",
        "Rename the variable a to total:\n\na = 0\nfor value in values:\n    a = a + value\nprint(a)\n",
        "Write a class Stack with the methods push, pop and size.",
        "Explain the error: KeyError: 'name'",
        "Complete the code:\n\nfor i in range(10):\n    for j in range(10):\n",
    )
)

REPETITIVE = (
    "x = 1\ny = 2\nz = 3\n" * 6 + "x = ",
    "name, age, city\n" + "".join(f"person{i}, {20 + i}, town{i}\n" for i in range(8)) + "person8,",
    '{"items": [' + ", ".join(f'{{"id": {i}, "name": "item {i}", "price": {i}.50}}' for i in range(6)) + ', {"id": 6,',
    "one two three four five " * 8 + "one two",
    "def test_add():\n    assert add(1, 2) == 3\n\n\ndef test_sub():\n    assert sub(3, 2) == 1\n\n\n" * 2
    + "def test_add",
    "- apples\n- pears\n- plums\n- cherries\n" * 4 + "- apples\n",
    "self.a = a\nself.b = b\nself.c = c\nself.d = d\nself.e = e\nself.f = f\nself.",
    "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, " * 5 + "0, 1,",
    '<div class="row">\n  <div class="cell">1</div>\n  <div class="cell">2</div>\n</div>\n' * 3 + '<div class="',
    "if a == 1:\n    return 1\nelif a == 2:\n    return 2\nelif a == 3:\n    return 3\nelif a == 4:\n",
    "assert result is not None\nassert result is not True\nassert result is not False\n" * 4 + "assert result is",
    'MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September",',
    "a b a c a b a d a b a c a b a e a b a c a b a d a b a c a b a",
    "raise ValueError('wrong size')\nraise TypeError('wrong type')\nraise ValueError('wrong value')\n" * 3 + "raise ",
    "from os import path\nfrom os import environ\nfrom sys import argv\nfrom sys import path\nfrom os import",
    "        self.assertEqual(f(1), 1)\n        self.assertEqual(f(2), 4)\n        self.assertTrue(g(1))\n" * 3,
)

TEXT = (
    "The quick brown fox jumps over the lazy dog. The quick",
    "Copyright (c) the authors. Permission is hereby granted, free of charge, to any person obtaining a copy",
    "Once upon a time there was a",
    '"""Tools for working with dates and times.\n\nThis module provides',
)

PROMPTS: tuple[str, ...] = FUNCTIONS + CLASSES + CHATS + REPETITIVE + TEXT
"""Every prompt; fewer than 200 tokens each with the demo model's tokenizer."""
