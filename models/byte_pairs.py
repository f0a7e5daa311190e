"""Byte pairs: tokens that are bytes or two earlier tokens merged, so that any text has ids and ids give the text back.

Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", on the bytes of UTF-8 instead of letters.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from ..ir.errors import InputError

NUM_BYTES = 256  # ids below are single bytes; id 256 + i is merge i
END = "\f"  # between documents, a page break: always a token of its own

# No merge crosses a word: letters, digits or signs, each with the space before it, or the white space that is left.
WORDS = re.compile(r"\f| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|[^\S\f]+(?!\S)|[^\S\f]+")

Pair = tuple[int, int]


@dataclass(frozen=True)
class BytePairs:
    """A vocabulary of 256 bytes and `merges`, each of two ids before its own."""

    merges: tuple[Pair, ...]

    def __len__(self) -> int:
        return NUM_BYTES + len(self.merges)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, each in 0 .. len(self) - 1. Raises: InputError for half of a surrogate pair, which UTF-8 cannot hold."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text has {text[error.start]!r} at {error.start}, half of a surrogate pair: leave it out") from error
        return [token for word in WORDS.findall(text) for token in self._word(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8, as a model may write them, become U+FFFD. Raises: InputError for other ids."""
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < len(self):
                raise InputError(f"{token} is no id of this vocabulary: they are 0 .. {len(self) - 1}")
        return b"".join(self.tokens[token] for token in ids).decode(errors="replace")

    @functools.cached_property
    def tokens(self) -> tuple[bytes, ...]:
        """The bytes of every id."""
        tokens = [bytes([value]) for value in range(NUM_BYTES)]
        for left, right in self.merges:
            tokens.append(tokens[left] + tokens[right])
        return tuple(tokens)

    @functools.cached_property
    def _ids(self) -> dict[Pair, int]:
        return {pair: NUM_BYTES + index for index, pair in enumerate(self.merges)}

    @functools.cached_property
    def _words(self) -> dict[str, tuple[int, ...]]:
        return {}

    def _word(self, word: str) -> tuple[int, ...]:
        """Merges as `learn` did: of all pairs of the word the earliest learned, until none is left."""
        if word in self._words:
            return self._words[word]
        ids = tuple(word.encode())
        while known := [pair for pair in pairwise(ids) if pair in self._ids]:
            pair = min(known, key=self._ids.__getitem__)
            ids = _merged(ids, pair, self._ids[pair])
        self._words[word] = ids
        return ids


def learn(text: str, size: int) -> BytePairs:
    """Merges the commonest pair of neighbours in `text`, the lowest of equals, until there are `size` ids or no pair comes twice."""
    counts = Counter(WORDS.findall(text))
    words, times = [tuple(word.encode()) for word in counts], [*counts.values()]
    pairs, holders = Counter[Pair](), defaultdict[Pair, set[int]](set)

    def count(index: int, sign: int) -> None:
        for pair in pairwise(words[index]):
            pairs[pair] += sign * times[index]
            holders[pair].add(index)

    for index in range(len(words)):
        count(index, 1)
    merges: list[Pair] = []
    while NUM_BYTES + len(merges) < size:
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if pair is None or pairs[pair] < 2:
            break
        for index in holders.pop(pair):
            count(index, -1)
            words[index] = _merged(words[index], pair, NUM_BYTES + len(merges))
            count(index, 1)
        del pairs[pair]
        merges.append(pair)
    return BytePairs(tuple(merges))


def _merged(ids: tuple[int, ...], pair: Pair, merged: int) -> tuple[int, ...]:
    return tuple(_merge(ids, pair, merged))


def _merge(ids: tuple[int, ...], pair: Pair, merged: int) -> Iterator[int]:
    """`ids` with `merged` for each `pair`, from the left."""
    index = 0
    while index < len(ids):
        if ids[index : index + 2] == pair:
            yield merged
            index += 2
        else:
            yield ids[index]
            index += 1
