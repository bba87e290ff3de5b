"""Lookahead decoding from the paper, in plain lists: the judge of ``test_lookahead_paper.py``.

The source is "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding" (Fu et al., arXiv 2402.02057):
section 3.1 (the lookahead branch: a window of W columns and N - 1 levels), 3.2 (the verification branch: at most G
n-grams that begin with the last token), 3.3 and its figure (both branches in one forward pass with one attention mask)
and the appendix's greedy verification (1 to N tokens are accepted). What the paper leaves open follows the facts of the
authors' code, hao-ai-lab/LookaheadDecoding, lade/decoding.py, ``jacobi_greedy_search_multilevel``: how the window is
filled level by level, that it begins with random tokens of the text, and the LRU order of the pool
(``update_token_map``, ``fill_pool_with_prompt``, ``append_new_generated_pool``).

Nothing here is shared with the code under test, and nothing is done in its way: the window is a matrix, a guess is a
row of tokens, every step is one forward pass of transformers over the whole text with an explicit mask and explicit
positions. There is no tree, no comb, no merging of guesses, no KV cache.

What this project does on purpose and the authors' code does not (the docstrings of ``proposers/lookahead.py`` and
``proposers/jacobi_window.py`` and section 3 of the design have it), this file does, too:

1. The window begins after the first output token, not with the prompt: vLLM's prefill is left alone.
2. The pool's guesses are verified in every step. The authors wait until the window is filled.
3. "A match is a match": if no guess begins with the right token, the text in the window may be accepted. In the paper
   only guesses are verified; but the window is in the same forward pass, and what follows its tokens is known.
4. The window moves on by all tokens that the step accepted. The authors' code has this and ALWAYS_FWD_ONE, to which its
   published state is pinned; here that is an option. While the window is filled, nothing is accepted there at all.
5. A guess that is right to its end yields one token more, N in all. That is the paper's algorithm; the loop in the
   authors' code ends one token earlier.
6. N-grams of the output are those of the real output. (The authors' loop appends the last accepted token once for each
   accepted one.)
7. Random tokens come from the whole text so far, new tokens included, by a counter-based generator that is seeded with
   the request id, so that they can be repeated: see ``Draws``.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import torch
from transformers import PreTrainedModel

Tokens = list[int]
Pool = dict[int, list[tuple[int, ...]]]


@dataclass(frozen=True)
class Settings:
    """The paper's parameters and the variants of its method.

    Attributes:
        w: W, columns of the window.
        n: N, length of the n-grams.
        g: G, most n-grams per first token.
        pool_from_text: n-grams of the prompt and the output go to the pool, too.
        forward_one: the window moves by one column per step.
        accept_window: see 3. above; False if the window has a forward pass of its own.
    """

    w: int
    n: int
    g: int
    pool_from_text: bool = False
    forward_one: bool = False
    accept_window: bool = True


@dataclass(frozen=True)
class Step:
    """What one step did.

    Attributes:
        emitted: the tokens that it added to the text.
        window: the levels afterwards, level 0 without the last token of the text.
        pool: the pool afterwards, oldest n-grams first.
        from_guess: how many of the emitted tokens a guess had right.
        from_window: how many of them the window had right.
        margin: how much the likeliest token was ahead of the second one, where this was closest.
    """

    emitted: Tokens
    window: list[Tokens]
    pool: Pool
    from_guess: int = 0
    from_window: int = 0
    margin: float = float("inf")


class Draws:
    """Random tokens of a text: the one thing that has to be as in the code under test (``jacobi_window._draw``).

    Draw number k = 1, 2, ... is token ``splitmix64(seed, k) mod t`` of the t tokens there are, where splitmix64 is the
    generator of Steele et al. 2014 in counter mode and the seed has the 4-byte BLAKE2b hash of the request id in its
    upper half.
    """

    def __init__(self, request_id: str) -> None:
        self.state = int.from_bytes(blake2b(request_id.encode(), digest_size=4).digest(), "little") << 32

    def token_of(self, text: Tokens) -> int:
        """The next random token."""
        self.state += 1
        x = self.state * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return text[(x ^ x >> 31) % len(text)]


@dataclass
class Layout:
    """The input of one forward pass: row i is a token at a position that sees the rows ``sees[i]``.

    Attributes:
        tokens: the text without its last token, the window level by level, the guesses one by one.
        positions: what RoPE is told.
        sees: the attention mask, row by row; every row sees itself.
        cells: the row of every cell of the window.
        guesses: the rows of every guess.
    """

    tokens: Tokens
    positions: list[int]
    sees: list[list[int]]
    cells: list[list[int]]
    guesses: list[list[int]]


class PaperLookahead:
    """Lookahead decoding of one request, greedy.

    Attributes:
        text: the prompt and the output so far.
        window: cell ``window[level][column]`` is a guess for position last + level + column, where last is the position
            of the text's last token, which is the cell [0][0] itself: the only one that is certain.
        pool: the n-gram pool: first token to its n-grams' other tokens, oldest first.
    """

    def __init__(self, model: PreTrainedModel, settings: Settings, request_id: str, prompt: Tokens) -> None:
        self.model = model
        self.settings = settings
        self.draws = Draws(request_id)
        self.text = list(prompt)
        self.window: list[Tokens] = []
        self.pool: Pool = {}

    def begin(self) -> Step:
        """The prompt, with nothing beside it: the first token, the first level, and the prompt's n-grams."""
        said, margins = self.forward(self.layout([self.text[-1:]], []))
        self.text.append(said[-1])
        self.window = [self.filled(self.text[-1:], self.settings.w + self.settings.n - 2)]
        if self.settings.pool_from_text:
            self.remember_text(0)
        return self.state(self.text[-1:], margin=margins[-1])

    def step(self) -> Step:
        """One decoding step (section 3.3): predict, verify, collect, move on."""
        guesses = self.guesses()
        layout = self.layout(self.window, guesses)
        said, margins = self.forward(layout)
        said_in_window = [[said[row] for row in rows] for rows in layout.cells]
        root = layout.cells[0][0]
        accepted, following = self.verify(guesses, [[said[row] for row in [root, *rows]] for rows in layout.guesses])
        from_guess = len(accepted)
        if not accepted:
            following = said[root]
            if self.settings.accept_window:
                accepted, following = self.through_window(said_in_window)
        emitted = [*accepted, following]

        tips = said_in_window[-1]  # what the top level's cells say is the next level
        if len(self.window) == self.settings.n - 1:
            self.collect(tips)
        known = len(self.text)
        self.text += emitted
        self.move(tips, 0 if self.settings.forward_one else len(accepted))
        if self.settings.pool_from_text:
            self.remember_text(known)
        return self.state(emitted, from_guess, len(accepted) - from_guess, min(margins[root:]))

    # ---- the two branches in one forward pass

    def layout(self, window: list[Tokens], guesses: list[Tokens]) -> Layout:
        """Section 3.3's figure: who sees whom.

        Everybody sees the text, whose last token is the window's first cell. Level 0 is causal. A cell of an upper
        level sees level 0 up to its own column, and the cells below it there. A guess sees the text and itself.
        """
        last = len(self.text) - 1
        before = list(range(last))
        out = Layout(self.text[:last], list(before), [list(range(i + 1)) for i in before], [], [])
        for level, tokens in enumerate(window):
            out.cells.append([])
            for column, token in enumerate(tokens):
                row = len(out.tokens)
                out.cells[level].append(row)
                first_level = out.cells[0][: column + 1]
                below = [out.cells[lower][column] for lower in range(1, level + 1)]
                out.tokens.append(token)
                out.positions.append(last + level + column)
                out.sees.append(before + first_level + below)
        for guess in guesses:
            start = len(out.tokens)
            out.guesses.append(list(range(start, start + len(guess))))
            for i, token in enumerate(guess):
                out.tokens.append(token)
                out.positions.append(last + 1 + i)
                out.sees.append([*before, last, *range(start, start + i + 1)])
        return out

    @torch.inference_mode()
    def forward(self, layout: Layout) -> tuple[Tokens, list[float]]:
        """What the model says after every row (the likeliest token), and by how much each is ahead of the second."""
        n = len(layout.tokens)
        mask = torch.full((1, 1, n, n), torch.finfo(torch.float32).min)
        for row, visible in enumerate(layout.sees):
            mask[0, 0, row, visible] = 0.0
        logits = self.model(
            input_ids=torch.tensor([layout.tokens]),
            attention_mask=mask,
            position_ids=torch.tensor([layout.positions]),
            use_cache=False,
        ).logits[0]
        best = logits.topk(2)
        return best.indices[:, 0].tolist(), (best.values[:, 0] - best.values[:, 1]).tolist()

    # ---- the verification branch

    def guesses(self) -> list[Tokens]:
        """Section 3.2: the pool's n-grams whose first token is the last one of the text, without that token."""
        return [list(rest) for rest in self.pool.get(self.text[-1], [])]

    def verify(self, guesses: list[Tokens], said: list[Tokens]) -> tuple[Tokens, int]:
        """The appendix's greedy verification: the longest run of right tokens, and what follows it.

        Args:
            guesses: the guesses.
            said: for each guess what the model says after the text, and after each of its tokens.
        """
        accepted: Tokens = []
        following = -1
        for guess, truth in zip(guesses, said, strict=True):
            right = 0
            while right < len(guess) and guess[right] == truth[right]:
                right += 1
            if right > len(accepted):
                accepted, following = guess[:right], truth[right]
        return accepted, following

    def through_window(self, said: list[Tokens]) -> tuple[Tokens, int]:
        """A match is a match: follow the window's own tokens as long as they are right, and what follows then.

        From a cell of level 0 the text can go on up its column or, in level 0, into the next column; the column is
        asked first, and there is no way back.
        """
        accepted: Tokens = []
        level = column = 0
        while True:
            token = said[level][column]
            if level + 1 < len(self.window) and self.window[level + 1][column] == token:
                level += 1
            elif level == 0 and column + 1 < len(self.window[0]) and self.window[0][column + 1] == token:
                column += 1
            else:
                return accepted, token
            accepted.append(token)

    # ---- the lookahead branch

    def move(self, tips: Tokens, accepted: int) -> None:
        """Put the window, whose top level has said ``tips``, onto the text's new last token.

        As long as levels are missing the tips become one more, and all columns that are past are dropped. Then every
        level takes the place of the one below: the cell above holds a guess for the next position, so that only the
        accepted tokens' columns are dropped.
        """
        above = [*self.window, tips]
        if len(self.window) < self.settings.n - 1:
            width = len(self.window[0]) - 1
            above = [level[1 + accepted :] for level in above]
        else:
            width = self.settings.w
            above = [level[accepted:] for level in above[1:]]
        last = self.text[-1:]
        self.window = [self.filled(last + row[1:] if level == 0 else row, width) for level, row in enumerate(above)]

    def filled(self, tokens: Tokens, width: int) -> Tokens:
        """The tokens, and random ones of the text for what is missing."""
        return tokens + [self.draws.token_of(self.text) for _ in range(width - len(tokens))]

    # ---- the pool

    def collect(self, tips: Tokens) -> None:
        """Section 3.1: every column of the full window and what its top cell has said are an n-gram."""
        for column, tip in enumerate(tips):
            self.remember([level[column] for level in self.window] + [tip])

    def remember(self, gram: Tokens) -> None:
        """Add an n-gram as the newest of its first token's; the oldest gives way where there are G."""
        if self.settings.g == 0:
            return
        grams = self.pool.setdefault(gram[0], [])
        rest = tuple(gram[1:])
        if rest in grams:
            grams.remove(rest)
        elif len(grams) == self.settings.g:
            grams.pop(0)
        grams.append(rest)

    def remember_text(self, known: int) -> None:
        """Add the n-grams of the text that end behind its first ``known`` tokens."""
        n = self.settings.n
        for start in range(len(self.text) - n + 1):
            if start + n > known:
                self.remember(self.text[start : start + n])

    def state(self, emitted: Tokens, from_guess: int = 0, from_window: int = 0, margin: float = float("inf")) -> Step:
        """The step's record, copied."""
        window = [self.window[0][1:], *(list(level) for level in self.window[1:])]
        pool = {first: list(grams) for first, grams in self.pool.items()}
        return Step(list(emitted), window, pool, from_guess, from_window, margin)
