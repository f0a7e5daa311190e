"""The text of the trained decoder: held-out text is fixed and not trained on, and its perplexity is that of every token but the first."""

import hashlib
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.ir.errors import InputError, TargetError
from graphwright.models import text
from graphwright.models.byte_pairs import END, NUM_BYTES, learn

VOCABULARY = len(text.vocabulary())


def long_paragraphs(written):
    paragraphs = [" ".join(part.split()) for document in written.split(END) for part in document.split("\n\n")]
    return [paragraph for paragraph in paragraphs if len(paragraph) >= text.LEAST_REPEATED]


# --- documents -------------------------------------------------------------------------------------------------------------


def test_the_held_out_text_is_the_same_everywhere():
    digest = hashlib.sha256(text.held_out().encode()).hexdigest()
    assert digest == "ed2ea3abcc3d73c44f01e0faf0d68563d1d30bd910fdeede04eb41634a0a171f"
    assert len(text.held_out().split(END)) == len(text.HELD_OUT)


def test_the_held_out_text_is_of_the_documents_that_are_left_out_of_training():
    """0.96 of its paragraphs are in those of Python 3.13, all in those of 3.11.7."""
    documents = END.join(written for name, written in text.documents().items() if name in text.HELD_OUT)
    found, wanted = {*long_paragraphs(documents)}, {*long_paragraphs(text.held_out())}
    assert len(wanted - found) <= 0.1 * len(wanted)


def test_no_long_paragraph_is_held_out_and_trained_on_or_trained_on_twice():
    trained_on = long_paragraphs(text.training())
    assert len(trained_on) == len({*trained_on})
    assert not {*trained_on} & {*long_paragraphs(text.held_out())}
    assert len(text.training()) > 1_500_000


def test_topics_then_modules_stand_in_alphabetical_order():
    names = [*text.documents()]
    topics = names.index("__future__.py")
    assert names[:topics] == sorted(names[:topics])
    assert {"assert", "with", "heapq.py", "json/decoder.py"} <= {*names}
    assert not any("/test/" in name or "site-packages" in name for name in names)


def test_a_python_without_its_documentation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(TargetError, match="came without pydoc_data"):
        text.documents.__wrapped__()


# --- tokens ----------------------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_learned_from_the_training_text():
    """Versions of Python differ in a few of the first merges, so that another's text gives nearly the same."""
    first = text.vocabulary().merges[:256]
    learned = learn(text.training(), NUM_BYTES + 256)
    spelt = {learned.tokens[NUM_BYTES + index] for index in range(256)}
    assert sum(text.vocabulary().tokens[NUM_BYTES + index] in spelt for index in range(len(first))) >= 0.9 * 256


def test_text_survives_its_ids():
    ids = text.encode(text.held_out())
    assert text.decode(ids) == text.decode(torch.tensor(ids)) == text.held_out()
    assert len(ids) < len(text.held_out().encode()) / 2.5


# --- perplexity ------------------------------------------------------------------------------------------------------------


def knowing(share):
    """A model that gives `share` to the successor of each token, id + 1, and the rest to all others alike."""

    def call(ids):
        logits = torch.full((*ids.shape, VOCABULARY), math.log((1 - share) / (VOCABULARY - 1)))
        return logits.scatter(2, (ids + 1).unsqueeze(2), math.log(share))

    return call


def test_knowing_nothing_is_as_perplexing_as_the_vocabulary_is_large():
    ids = torch.tensor(text.encode(text.held_out()))[:513]
    measured = text.perplexity(knowing(1 / VOCABULARY), ids)
    assert measured.per_token == pytest.approx(VOCABULARY, rel=1e-5)
    assert measured.bits_per_byte == pytest.approx(
        512 * math.log2(VOCABULARY) / len(b"".join(text.vocabulary().tokens[i] for i in ids[1:]))
    )


@given(length=st.integers(1, 40), windows=st.integers(1, 5), rest=st.integers(0, 39), batch=st.integers(1, 4), share=st.floats(0.01, 0.99))
def test_every_token_but_the_first_is_predicted_once_in_windows_of_one_length(length, windows, rest, batch, share):
    ids = torch.arange(windows * length + 1 + rest % length)
    seen = []

    def call(part):
        seen.append(part)
        return knowing(share)(part)

    measured = text.perplexity(call, ids, length, batch)
    assert torch.equal(torch.cat(seen), ids[: windows * length].view(windows, length))
    assert all(len(part) <= batch for part in seen)
    assert measured.per_token == pytest.approx(1 / share, rel=1e-5)  # of logits in float32


def test_a_list_of_ids_serves_as_well():
    ids = text.encode(text.held_out())[:300]
    assert text.perplexity(knowing(0.5), ids) == text.perplexity(knowing(0.5), torch.tensor(ids))


@pytest.mark.parametrize("ids", [[], [1] * 256, torch.ones(2, 300, dtype=torch.int64)])
def test_ids_that_fill_no_window_are_refused(ids):
    with pytest.raises(InputError, match="windows of 256 tokens want more than 256 ids in one dim"):
        text.perplexity(knowing(0.5), ids)
