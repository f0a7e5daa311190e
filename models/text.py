"""Text that every Python ships, for the zoo's trained decoder: the topics of `pydoc` and the docstrings of the standard library.

What is trained on is read from the Python at hand, so another version gives other weights: half of the topics of 3.11.7 read
otherwise in 3.13. What is held out, and the vocabulary, are files of this folder, taken from Python 3.11.7: figures mean the same
everywhere. The held-out text is the Python Software Foundation's, under the license beside it.
"""

import ast
import functools
import math
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ir.errors import InputError, TargetError
from .byte_pairs import END, BytePairs

CONTEXT = 256  # tokens that the decoder is trained to look back on

# Topics by name and modules by path: about one in fifty of all documents' characters.
HELD_OUT = ("calls", "exceptions", "objects", "sequence-types", "statistics.py", "textwrap.py")
NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}  # folders of the library
LEAST_REPEATED = 40  # characters of a paragraph that is left out where it was seen before; shorter ones say too little

FOLDER = Path(__file__).parent


# --- documents -------------------------------------------------------------------------------------------------------------


@functools.cache
def training() -> str:
    """All documents of the Python at hand but the held-out ones, END between them; each long paragraph stands at its first place only.

    Topics repeat each other's sections, so this is what keeps paragraphs of the held-out documents out.

    Raises: TargetError where Python was installed without pydoc's topics.
    """
    seen = {_words(paragraph) for paragraph in _paragraphs(held_out())}
    kept = (_unseen(text, seen) for name, text in documents().items() if name not in HELD_OUT)
    return END.join(filter(None, kept))


@functools.cache
def held_out() -> str:
    """Documents that are not trained on, END between them: the same text under every Python."""
    return (FOLDER / "text_held_out.txt").read_text(encoding="utf-8")


def _unseen(text: str, seen: set[str]) -> str:
    """`text` without its long paragraphs that `seen` has, to which the others are added."""
    kept = []
    for paragraph in _paragraphs(text):
        words = _words(paragraph)
        if len(words) < LEAST_REPEATED or words not in seen:
            kept.append(paragraph)
        seen.add(words)
    return "\n\n".join(kept)


def _paragraphs(text: str) -> list[str]:
    return [paragraph for document in text.split(END) for paragraph in document.split("\n\n")]


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


@functools.cache
def documents() -> dict[str, str]:
    """Of the Python at hand, the text of every topic by its name, then the docstrings of every module by its path, each in order.

    Raises: TargetError where Python was installed without pydoc's topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TargetError(f"the Python at {sys.prefix} came without pydoc_data, the text of its help: train with a full install") from error
    folder = Path(sysconfig.get_path("stdlib"))
    modules = {path.relative_to(folder): path for path in sorted(folder.rglob("*.py"))}
    read = {name.as_posix(): "\n\n".join(_docstrings(path)) for name, path in modules.items() if not NOT_READ.intersection(name.parts)}
    return dict(sorted(topics.items())) | read


def _docstrings(path: Path) -> Iterator[str]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
            yield docstring


# --- tokens ----------------------------------------------------------------------------------------------------------------


@functools.cache
def vocabulary() -> BytePairs:
    """The byte pairs of the trained decoder: `byte_pairs.learn(training(), 2048)` under Python 3.11.7, one merge a line."""
    lines = (FOLDER / "text_merges.txt").read_text().splitlines()
    pairs = (line.split() for line in lines)
    return BytePairs(tuple((int(left), int(right)) for left, right in pairs))


def encode(text: str) -> list[int]:
    """The trained decoder's ids of any text. Raises: InputError for half of a surrogate pair, which UTF-8 cannot hold."""
    return vocabulary().encode(text)


def decode(ids: Iterable[int] | Tensor) -> str:
    """The text of [L] ids: `decode(encode(text)) == text`. Raises: InputError for ids that are not in the vocabulary."""
    return vocabulary().decode(ids)


# --- measures --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text: exp of the mean of -log p of a token, and the mean of -log2 p of a byte."""

    per_token: float
    bits_per_byte: float


@torch.no_grad()
def perplexity(call: Callable[[Tensor], Tensor], ids: Sequence[int] | Tensor, length: int = CONTEXT, batch: int = 1) -> Perplexity:
    """How well `call` predicts each next token of a text that is cut into windows.

    A window of `length` tokens is read to predict `length`, from its second on; the next begins with the last of these. So every
    token but the first is predicted once, from those before it in its window; the rest that fills no window is left out.

    Args:
        call: [B, length] ids, int64 -> [B, length, vocabulary] logits: a module, or what a schedule makes of it.
        ids: [N], as `encode` gives them.
        batch: windows a call; the last call may have fewer.

    Raises: InputError where no window is filled.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64)
    if ids.dim() != 1 or len(ids) <= length:
        raise InputError(f"windows of {length} tokens want more than {length} ids in one dim, not {[*ids.shape]}")
    windows = ids.unfold(0, length + 1, length)  # [W, length + 1]
    nats = sum(_nats(call(part[:, :-1].contiguous()), part[:, 1:]) for part in windows.split(batch))
    predicted = windows[:, 1:].flatten().tolist()
    num_bytes = sum(len(vocabulary().tokens[token]) for token in predicted)
    return Perplexity(math.exp(nats / len(predicted)), nats / math.log(2) / num_bytes)


def _nats(logits: Tensor, targets: Tensor) -> float:
    return F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="sum").item()
