import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_insnext.data import UnitText, cut_text, rarity_table, sentence_end_table, word_start_table


class Vocabulary:
    """The three things the tables ask of a tokenizer."""

    def __init__(self, pieces, special=("<s>",)):
        self.pieces = pieces
        self.all_special_ids = [i for i, piece in enumerate(pieces) if piece in special]

    def __len__(self):
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i] for i in ids]


BYTE_LEVEL = Vocabulary(["<s>", "Ġthe", "Ġplay", "ers", "Ċ", "âĢľ", ".", "'t", "Ã©t", "Ł", "Ġ.", "12", "à¤¿"])
SENTENCEPIECE = Vocabulary(["<s>", "▁the", "ing", "▁", ",", "<0x0A>", "<0xE2>", "é", "。", "ि"])
WORDPIECE = Vocabulary(["[CLS]", "the", "##ing", ".", "##.", '!"'], special=("[CLS]",))


@pytest.mark.parametrize(
    ("tokenizer", "continuing"),
    [
        (BYTE_LEVEL, ["ers", "Ã©t", "Ł", "12", "à¤¿"]),
        (SENTENCEPIECE, ["ing", "<0xE2>", "é", "ि"]),
        (WORDPIECE, ["##ing"]),
    ],
    ids=["byte_level", "sentencepiece", "wordpiece"],
)
def test_marks_punctuation_and_special_tokens_begin_words(tokenizer, continuing):
    starts = word_start_table(tokenizer)
    assert [piece for piece, start in zip(tokenizer.pieces, starts, strict=True) if not start] == continuing


@pytest.mark.parametrize(
    ("tokenizer", "ends"), [(BYTE_LEVEL, [".", "Ġ."]), (SENTENCEPIECE, ["。"]), (WORDPIECE, [".", "##.", '!"'])]
)
def test_sentences_end_with_final_punctuation_quotes_aside(tokenizer, ends):
    table = sentence_end_table(tokenizer)
    assert [piece for piece, end in zip(tokenizer.pieces, table, strict=True) if end] == ends


def test_a_vocabulary_without_marks_is_refused():
    with pytest.raises(ValueError, match="no entry of the vocabulary of Vocabulary begins with"):
        word_start_table(Vocabulary(["<s>", "a", "b"]))


def test_real_tokenizers_cut_between_words():
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(["the players left the field.", "players don't play"] * 3, 290, special_tokens=["<s>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>")
    tokens = np.array([0] + tokenizer.encode("the players don't reach the field.", add_special_tokens=False))
    text = cut_text(tokens, word_start_table(tokenizer))
    units = [tokenizer.decode(part).strip() for part in np.split(tokens, text.first_tokens[1:])]
    assert units == ["<s>", "the", "players", "don", "'t", "reach", "the", "field", "."]


def test_the_picture_of_the_docstring():
    text = cut_text(np.arange(6), np.array([True, True, True, False, True, True]), np.arange(6) == 5)
    assert text.unit_of.tolist() == [0, 1, 2, 2, 3, 4]
    assert text.unit_lengths.tolist() == [1, 1, 2, 1, 1]
    assert text.sentences.tolist() == [0] * 5
    assert text.tokens_of(np.array([2, 0, 4])).tolist() == [2, 3, 0, 5]
    assert text.tokens_of(np.array([], dtype=int)).tolist() == []


def test_sentences_keywords_and_rarity_are_per_unit():
    tokens = np.array([0, 1, 2, 3, 1, 2])
    starts, ends = np.array([True, True, False, True]), np.array([False, False, False, True])
    keywords = np.array([0, 0, 1, 0, 0, 0])
    text = cut_text(tokens, starts, ends, keywords=keywords, token_rarity=np.array([0.0, 1.0, 5.0, 2.0]))
    assert text.sentences.tolist() == [0, 0, 0, 1]
    assert text.keywords.tolist() == [False, True, False, False]
    assert text.rarity.tolist() == [0.0, 5.0, 2.0, 5.0]


def test_the_missing_rest_of_a_word_given_in_part_is_a_unit():
    starts = np.array([True, True, False, False, True])
    text = cut_text(np.arange(5), starts, given=np.array([0, 1, 1, 0, 0]))
    assert text.unit_starts.tolist() == [True, True, False, True, True]
    assert text.given_units.tolist() == [True, True, False, False]


def test_the_token_after_bos_begins_a_word():
    assert cut_text(np.array([1, 0, 0]), np.array([False, True])).unit_starts.tolist() == [True, True, False]


@given(st.integers(1, 20).flatmap(lambda n: st.lists(st.booleans(), min_size=n, max_size=n)))
@settings(deadline=None)
def test_units_partition_the_text(flags):
    flags[0] = True
    text = UnitText(np.arange(len(flags)), np.array(flags))
    assert text.tokens_of(np.arange(text.num_units)).tolist() == list(range(len(flags)))
    assert text.unit_lengths.sum() == len(flags)
    assert (text.first_tokens[text.unit_of] <= np.arange(len(flags))).all()


def test_rarity_counts_tokens():
    table = rarity_table([[0, 1, 1], [1]], 3)
    assert np.allclose(np.exp(-table), [2 / 7, 4 / 7, 1 / 7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": np.array([], dtype=int)}, "at least one token .BOS., got 0"),
        ({"tokens": np.arange(3), "given": np.ones(2)}, "given needs one flag per token, 3, got 2"),
        ({"tokens": np.arange(3), "keywords": np.ones(4)}, "keywords needs one flag per token, 3, got 4"),
        ({"tokens": np.arange(3), "word_starts": np.ones(2, bool)}, r"token ids must be in \[0, 2\), got 0 to 2"),
    ],
)
def test_bad_texts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cut_text(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": np.array([], dtype=int), "unit_starts": np.array([], dtype=bool)}, "at least one token"),
        ({"unit_starts": np.ones(3, bool)}, "unit_starts needs one flag per token, 2, got 3"),
        ({"unit_starts": np.array([False, True])}, r"unit_starts\[0\] must be True"),
        ({"given": np.array([False, True])}, r"given\[0\] must be True"),
        ({"sentences": np.zeros(3, int)}, "sentences needs one entry per unit, 2, got 3"),
        ({"rarity": np.zeros(1)}, "rarity needs one entry per unit, 2, got 1"),
        ({"unit_starts": np.array([True, False]), "given": np.array([True, False])}, "given must cover whole units"),
    ],
)
def test_bad_unit_texts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnitText(**{"tokens": np.arange(2), "unit_starts": np.ones(2, bool)} | arguments)
