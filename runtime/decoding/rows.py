"""A row: one prompt and what was generated for it so far."""

from dataclasses import dataclass, field

import numpy as np

from .generated import Token


@dataclass(eq=False)
class Row:
    """Prompt number `id`, in row `slot` of the caches. `position` is how many of its tokens the caches have, and where the next one
    goes; `levels` are those of the decode steps it took, `least_level` binds those to come."""

    id: int
    prompt: np.ndarray  # i64[P]
    max_new_tokens: int
    slot: int = -1
    position: int = 0
    tokens: list[int] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    least_level: int = 0
    finished: str = ""

    @property
    def unread(self) -> int:
        """How many tokens of the prompt the caches lack."""
        return max(0, len(self.prompt) - self.position)

    @property
    def left(self) -> int:
        """How many more tokens it may generate."""
        return self.max_new_tokens - len(self.tokens)

    def commit(self, token: int, eos: frozenset[int]) -> Token:
        """The next token is `token`."""
        self.tokens.append(token)
        if token in eos:
            self.finished = "eos"
        elif not self.left:
            self.finished = "length"
        return Token(self.id, len(self.tokens) - 1, token, self.finished)
