"""Prompts of the engine tests: code, chats and repetitive text, all written for this project."""

from __future__ import annotations

FUNCTIONS = (
    'def clamp(value: int, low: int, high: int) -> int:\n    """Return value, moved into the range from low to high."""\n',
    'def count_vowels(text: str) -> int:\n    """Count the vowels in a text.\n\n    >>> count_vowels("banana")\n    3\n    """\n',
    'def running_mean(values: list[float], width: int) -> list[float]:\n    """Return the mean of each window of the values."""\n    if width < 1:\n        raise ValueError("width must be positive")\n',
    'def flatten(items):\n    """Flatten nested lists into one list.\n\n    >>> flatten([1, [2, [3, 4]], 5])\n    [1, 2, 3, 4, 5]\n    """\n    result = []\n    for item in items:\n',
    'def read_lines(path: str, encoding: str = "utf-8") -> list[str]:\n    """Read a file and return its lines without line ends."""\n    with open(path, encoding=encoding) as file:\n',
    'def parse_pair(text: str) -> tuple[str, str]:\n    """Split "key = value" at the first equals sign."""\n    key, separator, value = text.partition("=")\n    if not separator:\n',
    'import os\nimport sys\n\n\ndef main(argv=None):\n    """Print the size of every file that is named on the command line."""\n    if argv is None:\n        argv = sys.argv[1:]\n    for name in argv:\n',
    'def binary_search(items, target):\n    """Return the index of target in the sorted items, or -1."""\n    low = 0\n    high = len(items) - 1\n    while low <= high:\n        middle = (low + high) // 2\n        if items[middle] == target:\n            return middle\n        if items[middle] < target:\n            low = middle + 1\n        else:\n',
    'async def fetch_all(session, urls):\n    """Fetch every url and return the bodies in the same order."""\n    results = []\n    for url in urls:\n        async with session.get(url) as response:\n',
    'def word_counts(text):\n    """Return a dictionary from each word to how often it occurs."""\n    counts = {}\n    for word in text.split():\n        counts[word] = counts.get(word, 0) + 1\n    return counts\n\n\ndef letter_counts(text):\n    """Return a dictionary from each letter to how often it occurs."""\n    counts = {}\n',
    "def transpose(matrix):\n    rows = len(matrix)\n    columns = len(matrix[0])\n    result = []\n    for column in range(columns):\n",
    "from __future__ import annotations\n\nimport logging\n\nlogger = logging.getLogger(__name__)\n\n\ndef retry(function, attempts: int = 3):\n    for attempt in range(attempts):\n        try:\n            return function()\n        except Exception:\n            logger.",
)

CLASSES = (
    'class Queue:\n    """First in, first out."""\n\n    def __init__(self):\n        self.items = []\n\n    def put(self, item):\n        self.items.append(item)\n\n    def get(self):\n',
    'class Point:\n    """A point in the plane."""\n\n    def __init__(self, x: float, y: float) -> None:\n        self.x = x\n        self.y = y\n\n    def __add__(self, other):\n        return Point(self.x + other.x, self.y + other.y)\n\n    def __sub__(self, other):\n',
    'class ConfigError(Exception):\n    """Raised when the configuration is wrong."""\n\n\nclass NetworkError(Exception):\n    """Raised when',
    "class TestStack(unittest.TestCase):\n    def setUp(self):\n        self.stack = Stack()\n\n    def test_push(self):\n        self.stack.push(1)\n        self.assertEqual(self.stack.size(), 1)\n\n    def test_pop(self):\n",
    'class Node:\n    def __init__(self, value, left=None, right=None):\n        self.value = value\n        self.left = left\n        self.right = right\n\n    def insert(self, value):\n        """Insert a value into the tree."""\n        if value < self.value:\n            if self.left is None:\n                self.left = Node(value)\n            else:\n                self.left.insert(value)\n        else:\n',
    '@dataclass\nclass Order:\n    """One order of a customer."""\n\n    number: int\n    customer: str\n    items: list[str]\n',
    "class Cache(dict):\n    def __init__(self, size):\n        super().__init__()\n        self.size = size\n\n    def __setitem__(self, key, value):\n",
    'class Reader:\n    """Reads records from a file object."""\n\n    def __init__(self, file):\n        self.file = file\n\n    def __iter__(self):\n        return self\n\n    def __next__(self):\n        line = self.file.readline()\n        if not line:\n            raise StopIteration\n',
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
    "def test_add():\n    assert add(1, 2) == 3\n\n\ndef test_sub():\n    assert sub(3, 2) == 1\n\n\n" * 2 + "def test_add",
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
