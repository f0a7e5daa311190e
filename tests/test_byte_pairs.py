"""Byte pairs: any text has ids that give it back, merges are the commonest pairs in their order, and none crosses a word."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphwright.ir.errors import InputError
from graphwright.models import text
from graphwright.models.byte_pairs import END, NUM_BYTES, WORDS, BytePairs, learn

LEARNED = learn("the cat that the hat at the end, naïve café café 1234 1234\n   __init__\n   __init__", 300)


def learn_slowly(source, size):
    """The definition: every pair is counted again for every merge."""
    words, merges = [[*word.encode()] for word in WORDS.findall(source)], []
    while NUM_BYTES + len(merges) < size:
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts or max(counts.values()) < 2:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in words:
            index = 0
            while index < len(word) - 1:
                if (word[index], word[index + 1]) == pair:
                    word[index : index + 2] = [NUM_BYTES + len(merges)]
                index += 1
        merges.append(pair)
    return tuple(merges)


@pytest.mark.parametrize("vocabulary", [BytePairs(()), LEARNED, text.vocabulary()], ids=["bytes", "few", "of the zoo"])
@given(written=st.text() | st.text("the ca\f\n_1é,"))
def test_ids_give_back_any_text(vocabulary, written):
    ids = vocabulary.encode(written)
    assert vocabulary.decode(ids) == written
    assert all(0 <= token < len(vocabulary) for token in ids)


@given(written=st.text())
def test_without_merges_ids_are_the_bytes(written):
    assert BytePairs(()).encode(written) == [*written.encode()]


@given(ids=st.lists(st.integers(0, len(LEARNED) - 1)))
def test_any_ids_are_some_text(ids):
    assert isinstance(LEARNED.decode(ids), str)


def test_bytes_that_are_no_text_are_replaced():
    assert BytePairs(()).decode([97, 0xC3, 98]) == "a\ufffdb"


@given(source=st.text("ab \n1", max_size=60), size=st.integers(NUM_BYTES, NUM_BYTES + 12))
def test_merges_are_the_commonest_pairs_the_lowest_of_equals_first(source, size):
    assert learn(source, size).merges == learn_slowly(source, size)


def test_what_was_learned_from_is_short():
    assert len(LEARNED.encode(" the")) == 1
    assert len(LEARNED.encode("__init__")) < len("__init__") == len(BytePairs(()).encode("__init__"))


@given(source=st.text("ab _1\n" + END, min_size=1, max_size=40))
def test_no_token_crosses_a_word_and_the_end_is_a_token_of_its_own(source):
    vocabulary = learn(source * 5, NUM_BYTES + 20)
    tokens = [vocabulary.tokens[token].decode() for token in vocabulary.encode(source)]
    assert all(WORDS.fullmatch(token) for token in tokens)
    assert tokens.count(END) == source.count(END)


@given(written=st.text())
def test_words_are_the_whole_text(written):
    assert "".join(WORDS.findall(written)) == written


def test_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(InputError, match=r"'\\ud800' at 2, half of a surrogate pair"):
        LEARNED.encode("ab\ud800")


@pytest.mark.parametrize("token", [-1, len(LEARNED)])
def test_ids_beyond_the_vocabulary_are_refused(token):
    with pytest.raises(InputError, match=f"{token} is no id of this vocabulary: they are 0 .. {len(LEARNED) - 1}"):
        LEARNED.decode([1, token])
