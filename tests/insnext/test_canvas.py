"""The canvas: which tokens are given, where the gaps are, and what may not be written beside a word."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modeling_insnext.insnext.canvas import Canvas
from modeling_insnext.insnext.canvas_pieces import continuation_mask_of
from modeling_insnext.insnext.canvas_text import build_canvas
from tests.support.equality import same_bits
from tests.support.tokenizers import tiny_tokenizer


CORPUS = [
    "The quick brown fox jumps over the lazy dog. An able man is unable to sail.",
    "An old man and the sea: fish, dogs (and cats) don't go to a café; 3.14 is well-known!",
] * 5
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
WORDS = sorted({word for line in CORPUS for word in line.replace("(", "").replace(")", "").split()})


def byte_level(add_prefix_space):
    return tiny_tokenizer(360, bos_in_front=False, texts=CORPUS, all_bytes=True, add_prefix_space=add_prefix_space)


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", *SPECIAL.values()], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **SPECIAL)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=100, special_tokens=["<unk>", *SPECIAL.values()], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **SPECIAL)


MAKERS = {
    "byte_level": lambda: byte_level(False),
    "byte_level_prefix": lambda: byte_level(True),
    "word_piece": word_piece,
    "unigram": unigram,
}


@cache
def tokenizer_of(kind):
    return MAKERS[kind]()


def pieces(canvas, tokenizer, row=0):
    length = int(canvas["attention_mask"][row].sum())
    return tokenizer.convert_ids_to_tokens(canvas["input_ids"][row, :length])


def decoded(canvas, tokenizer, row=0):
    return tokenizer.decode(canvas["input_ids"][row], skip_special_tokens=True, clean_up_tokenization_spaces=False)


every_kind = pytest.mark.parametrize("kind", MAKERS)


@every_kind
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_given_text_comes_back_when_the_gaps_are_removed(kind, data):
    tokenizer = tokenizer_of(kind)
    runs = data.draw(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3), min_size=2, max_size=4))
    canvas = build_canvas(tokenizer, " ___ ".join(" ".join(run) for run in runs))
    whole = tokenizer(" ".join(word for run in runs for word in run), add_special_tokens=False)["input_ids"]
    assert decoded(canvas, tokenizer) == tokenizer.decode(whole, clean_up_tokenization_spaces=False)
    assert canvas["slot_mask"].sum() == len(runs) - 1
    assert canvas["word_end_mask"].sum() == len(runs) - 1
    canvas.validate(vocab_size=len(tokenizer))


def test_segments_encoded_each_for_itself_do_not_give_the_text_back():
    # control of the property above: the plain way glues the words
    tokenizer = tokenizer_of("byte_level")
    naive = [index for part in ("fox", "dog") for index in tokenizer(part, add_special_tokens=False)["input_ids"]]
    assert tokenizer.decode(naive) == "foxdog"
    assert decoded(build_canvas(tokenizer, "fox ___ dog"), tokenizer) == "fox dog"


@every_kind
def test_a_mark_inside_a_word_leaves_a_piece_and_no_protection(kind):
    tokenizer = tokenizer_of(kind)
    glued, apart = build_canvas(tokenizer, "man un___able"), build_canvas(tokenizer, "man un ___ able")
    assert decoded(glued, tokenizer).strip() == "man unable"
    assert decoded(apart, tokenizer).strip() == "man un able"
    assert not glued["word_end_mask"].any()
    assert same_bits(apart["word_end_mask"], apart["slot_mask"])
    able = int(glued["slot_mask"][0].nonzero()) + 1
    assert glued["continuation_mask"][glued["input_ids"][0, able]]
    assert not apart["continuation_mask"][apart["input_ids"][0, int(apart["slot_mask"][0].nonzero()) + 1]]


@every_kind
@pytest.mark.parametrize("text", ["fox ___ .", "fox ___.", "fox ___ , dog", "The ( ___ ) fox", "The (___) fox"])
def test_a_space_between_a_mark_and_punctuation_is_dropped(kind, text):
    tokenizer = tokenizer_of(kind)
    canvas = build_canvas(tokenizer, text)
    assert tokenizer.decode(canvas["input_ids"][0, int(canvas["slot_mask"][0].nonzero()) + 1]) in ".,)"
    # a word may stand right after an opening bracket, but not glue to "fox"
    assert bool(canvas["word_end_mask"].any()) == text.startswith("fox")
    natural = {"fox ___ .": "fox.", "fox ___.": "fox.", "fox ___ , dog": "fox, dog"}.get(text, "The () fox")
    if kind == "byte_level":
        assert decoded(canvas, tokenizer) == natural


def test_punctuation_that_opens_a_number_keeps_its_space():
    tokenizer = tokenizer_of("byte_level")
    assert decoded(build_canvas(tokenizer, "is ___ .14"), tokenizer) == "is .14"
    assert decoded(build_canvas(tokenizer, "is ___ ."), tokenizer) == "is."


def test_newlines_beside_a_mark_are_given_text():
    tokenizer = tokenizer_of("byte_level")
    canvas = build_canvas(tokenizer, "fox\n___ \n\ndog")
    assert decoded(canvas, tokenizer) == "fox\n\n\ndog"
    assert not canvas["word_end_mask"].any()


@every_kind
def test_keywords_stay_whole_between_open_gaps(kind):
    tokenizer = tokenizer_of(kind)
    canvas = build_canvas(tokenizer, keywords=["old man", "sea", "fish"])
    ids, gaps = canvas["input_ids"][0], canvas["gap_ids"][0].tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert [gap for gap in gaps if gap >= 0] == [0, 1, 2, 3]
    assert gaps[0] == 0 and gaps[-1] == 3
    assert canvas["min_gap_tokens"].tolist() == [[0] * 4]
    assert canvas["max_gap_tokens"].tolist() == [[-1] * 4]
    # every open slot but the one after BOS ends a given word
    assert same_bits(canvas["word_end_mask"][0, 1:], canvas["slot_mask"][0, 1:])
    assert not canvas["word_end_mask"][0, 0]
    phrase = ids[1 : gaps.index(1) + 1]
    assert tokenizer.decode(phrase).strip() == "old man"


def test_keywords_begin_with_a_space_in_byte_level_bpe():
    for kind in ("byte_level", "byte_level_prefix"):
        tokenizer = tokenizer_of(kind)
        assert pieces(build_canvas(tokenizer, keywords=["fox"]), tokenizer)[1].startswith("Ġ")
    tokenizer = tokenizer_of("byte_level")
    assert not pieces(build_canvas(tokenizer, "The ___"), tokenizer)[1].startswith("Ġ")


def test_keywords_follow_what_is_chosen():
    tokenizer = tokenizer_of("byte_level")
    seen = []

    def last(keywords):
        seen.append([[tokenizer.decode(ids) for ids in forms] for forms in keywords])
        return [len(forms) - 1 for forms in keywords]

    canvas = build_canvas(tokenizer, keywords=["old man", ["sea", "seas"], "fish"], choose=last)
    assert decoded(canvas, tokenizer) == " old man seas fish" and canvas.pending_ids is None
    assert seen == [[[" old man"], [" sea", " seas"], [" fish"]]]
    # where nothing is to be chosen nobody is asked
    assert decoded(build_canvas(tokenizer, keywords=["sea", "fish"], choose=last), tokenizer) == " sea fish"
    assert len(seen) == 1


@every_kind
def test_keywords_without_an_order_are_pending_in_all_their_forms(kind):
    tokenizer = tokenizer_of(kind)
    rows = [["old man", ["sea", "fish"]], ["dog"]]
    canvas = build_canvas(tokenizer, keywords=rows, ordered=False, max_gap_tokens=9)
    assert canvas.input_ids.tolist() == [[tokenizer.bos_token_id]] * 2 and bool(canvas.slot_mask.all())
    assert canvas.max_gap_tokens.tolist() == [[9], [9]]
    for row, keywords in enumerate(rows):
        for keyword, forms in enumerate([word] if isinstance(word, str) else word for word in keywords):
            for form, ids in zip(forms, canvas.pending_ids[row, keyword], strict=False):
                # as they are where the order is given
                [standing] = build_canvas(tokenizer, keywords=[form]).input_ids[:, 1:].tolist()
                assert ids[ids >= 0].tolist() == standing
    assert (canvas.pending_ids[1, 1] == -1).all() and (canvas.pending_ids[0, 0, 1] == -1).all()


@every_kind
def test_keywords_beside_a_text_are_pending_in_its_gaps(kind):
    tokenizer = tokenizer_of(kind)
    texts, words = ["The ___{,9} fox ___ dog", "The ___"], [["sea", ["fish", "old man"]], ["dog"]]
    both = build_canvas(tokenizer, texts, words, ordered=False)
    marks, pending = build_canvas(tokenizer, texts), build_canvas(tokenizer, keywords=words, ordered=False)
    assert set(both) == {*marks, "pending_ids"} and same_bits(both.pending_ids, pending.pending_ids)
    assert all(same_bits(both[name], marks[name]) for name in marks)
    # beside one text lists are alternatives, not rows
    alone = build_canvas(tokenizer, texts[1], [["sea", "fish"], ["dog"]], ordered=False).pending_ids
    assert same_bits(alone, build_canvas(tokenizer, keywords=[[["sea", "fish"], ["dog"]]], ordered=False).pending_ids)


def test_a_list_among_strings_is_a_keyword_and_lists_alone_are_a_batch():
    tokenizer = tokenizer_of("byte_level")

    def last(keywords):
        return [len(forms) - 1 for forms in keywords]

    one = build_canvas(tokenizer, keywords=[["sea", "seas"], "fish"], choose=last)
    two = build_canvas(tokenizer, keywords=[["sea", "seas"], ["fish"]], choose=last)
    nested = build_canvas(tokenizer, keywords=[[["sea", "seas"], ["fish", "dogs"]], ["fox"]], choose=last)
    assert [decoded(one, tokenizer)] == [" seas fish"]
    assert [decoded(two, tokenizer, row) for row in (0, 1)] == [" sea seas", " fish"]
    assert [decoded(nested, tokenizer, row) for row in (0, 1)] == [" seas dogs", " fox"]


def test_bounds_of_a_mark_overrule_the_arguments():
    tokenizer = tokenizer_of("byte_level")
    text = "The ___{2,5} fox ___{3} over ___{2,} dog ___{,4} sea ___"
    canvas = build_canvas(tokenizer, text, min_gap_tokens=1, max_gap_tokens=9)
    assert canvas["min_gap_tokens"].tolist() == [[2, 3, 2, 0, 1]]
    assert canvas["max_gap_tokens"].tolist() == [[5, 3, -1, 4, 9]]
    assert decoded(canvas, tokenizer) == "The fox over dog sea"
    listed = build_canvas(tokenizer, ["The ___ fox ___", "The ___"], min_gap_tokens=[[1, 2], [3]])
    assert listed["min_gap_tokens"].tolist() == [[1, 2], [3, 0]]
    assert listed["max_gap_tokens"].tolist() == [[-1, -1], [-1, -1]]
    nones = build_canvas(tokenizer, "The ___ fox ___", max_gap_tokens=[None, 2])
    assert nones["max_gap_tokens"].tolist() == [[-1, 2]]


def test_a_batch_is_padded_on_the_right_and_each_row_is_its_own_canvas():
    tokenizer = tokenizer_of("byte_level")
    texts = ["The ___ fox ___ .", "___", "An old man ___ the sea and ___ dogs ___"]
    batch = build_canvas(tokenizer, texts)
    for row, text in enumerate(texts):
        alone = build_canvas(tokenizer, text)
        length, gaps = alone["input_ids"].shape[1], alone["min_gap_tokens"].shape[1]
        for name in ("input_ids", "attention_mask", "slot_mask", "gap_ids", "word_end_mask"):
            assert same_bits(batch[name][row, :length], alone[name][0])
        assert same_bits(batch["max_gap_tokens"][row, :gaps], alone["max_gap_tokens"][0])
        assert not batch["attention_mask"][row, length:].any()
        assert not batch["slot_mask"][row, length:].any()
        assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()


def test_marks_of_one_character_may_be_longer_and_other_marks_are_possible():
    tokenizer = tokenizer_of("byte_level")
    short, long = build_canvas(tokenizer, "The ___ fox"), build_canvas(tokenizer, "The _______ fox")
    star = build_canvas(tokenizer, "The <gap> fox", gap="<gap>")
    assert same_bits(short["input_ids"], long["input_ids"])
    assert same_bits(short["input_ids"], star["input_ids"])
    assert "_" in decoded(build_canvas(tokenizer, "The __ fox ___"), tokenizer)


TEXT_ERRORS = {
    "ordered=False is for keywords, .* ordered=True": dict(text="a ___", keywords=["fox"]),
    "one row a text, got 2 for 1 texts": dict(text=["a ___"], keywords=[["fox"], ["sea"]], ordered=False),
    "one row a text, got 1 for 2 texts": dict(text=["a ___", "b ___"], keywords=["fox"], ordered=False),
    "phrases, got 'fox'": dict(text="a ___", keywords="fox", ordered=False),
    "keywords or both, got neither": dict(),
    "at least one mark": dict(text="The fox"),
    "at least one mark '___' to open a gap, got ''": dict(text=""),
    "empty canvas: text": dict(text=[]),
    "must be a string or a list": dict(text=["a ___", 3]),
    "empty canvas: keywords is": dict(keywords=[]),
    "empty canvas: keywords of row 1": dict(keywords=[["fox"], []]),
    "not blank, got ' '": dict(keywords=["fox", " "]),
    "list of phrases, got 'fox'": dict(keywords="fox"),
    "given whole": dict(keywords=["the ___ fox"]),
    "gaps 0 and 1 touch": dict(text="The ___ ___ fox"),
    "gap 0 in row 0 contradict: minimum 5, maximum 2": dict(text="The ___{5,2} fox"),
    "gap 1 in row 0 contradict: minimum 4, maximum 3": dict(
        text="The ___ fox ___", min_gap_tokens=[0, 4], max_gap_tokens=3
    ),
    "bounds of gap 0 must be": dict(text="The ___{-1} fox"),
    "bounds of gap 0 must be .*got {}": dict(text="The ___{} fox"),
    "min_gap_tokens of gap 1 in row 0 .* got -2": dict(text="The ___ fox ___", min_gap_tokens=[0, -2]),
    "max_gap_tokens has 1 entries .* 2 gaps": dict(text="The ___ fox ___", max_gap_tokens=[3]),
    "max_gap_tokens has 2 lists for 1 rows": dict(text="The ___ fox", max_gap_tokens=[[3], [3]]),
    "ordered=False is for keywords": dict(text="The ___", ordered=False),
    "alternatives in a given order need choose": dict(keywords=["fox", ["dog", "dogs"]]),
    "a form of each of 2 keywords with \\[1, 2\\] forms, got \\[0, 2\\]": dict(
        keywords=["fox", ["dog", "dogs"]], choose=lambda keywords: [0, 2]
    ),
    "a form of each of 2 keywords .* got \\[0\\]": dict(
        keywords=["fox", ["dog", "dogs"]], choose=lambda keywords: [0]
    ),
    "a list of its forms, got \\[\\] in row 0": dict(keywords=["fox", []]),
    "not blank, got 7 in row 0": dict(keywords=["fox", ["dog", 7]]),
    "mark that is not blank": dict(text="The fox", gap=" "),
    "must be a string or a list of strings, got 5": dict(text=5),
    "words that must occur go to keywords=": dict(text=["dog", "park"]),
    "one mark with bounds, as ___\\{2,}, asks for": dict(text="The ___ ___ fox"),
    "choose another mark, as gap='<gap>'": dict(keywords=["snake___case"]),
    "a string or a list of its forms, got 5 in row 0": dict(keywords=[5]),
    "min_gap_tokens must be an integer of at least 0, a list or None, got 1.5": dict(text="a ___", min_gap_tokens=1.5),
    "max_gap_tokens of gap 0 in row 0 must be an integer of at least 0, got 1.5": dict(
        text="a ___", max_gap_tokens=[1.5]
    ),
    "min_gap_tokens of gap 0 in row 0 .* got True": dict(text="a ___", min_gap_tokens=True),
    r"must be Unicode, got the lone surrogate '\\ud83d' in 'hi \\ud83d'": dict(text="hi \ud83d___"),
    r"lone surrogate '\\udc00' in ' \\udc00'": dict(keywords=["fox", "\udc00"]),
    "vocabulary mismatch: the tokenizer": dict(text="The ___", vocab_size=10),
}


@pytest.mark.parametrize("message", TEXT_ERRORS)
def test_bad_text_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        build_canvas(tokenizer_of("byte_level"), **TEXT_ERRORS[message])


@pytest.mark.parametrize("spelled", ["</s>", "<pad>", "<s>", "<tool>"])
def test_a_special_token_in_given_text_means_its_letters(spelled, caplog):
    tokenizer = byte_level(False)
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    for canvas in (
        build_canvas(tokenizer, f"The {spelled} ___"),
        build_canvas(tokenizer, f"___{spelled}"),
        build_canvas(tokenizer, keywords=["fox", f"a {spelled}"]),
    ):
        assert not set(canvas["input_ids"][0, 1:].tolist()) & set(tokenizer.all_special_ids)
        assert spelled in decoded(canvas, tokenizer)
    assert not caplog.records
    # control: read the plain way, it is a token that decoding hides
    plain = tokenizer(f"The {spelled}", add_special_tokens=False)["input_ids"]
    assert spelled not in tokenizer.decode(plain, skip_special_tokens=True)


def test_a_special_token_that_cannot_be_read_as_letters_is_refused():
    vocab = {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>", "fox"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    with pytest.raises(ValueError, match="reads a special token in 'fox </s>': '</s>'"):
        build_canvas(tokenizer, "fox </s> ___")


GIVEN = {
    "def f():\n    ___\n    return x": "def f():\n   \n    return x",
    "name\t___\tage": "name\t\tage",
    "a  ___  b": "a   b",
    "a ___ b": "a b",
    "a\t ___ \tb": "a\t \tb",
    "\n ___\n\n": "\n\n\n",
    "a ___ \nb": "a\nb",
    "a ___ \r\nb": "a\r\nb",
    "   a ___   ": "   a   ",
    "fox ___  .": "fox  .",
    "x = [ ___ ]": "x = []",
    "x = [  ___ ]": "x = [ ]",
    "a\u00a0___\u00a0b": "a\u00a0\u00a0b",
}


@pytest.mark.parametrize("text", GIVEN)
def test_one_space_beside_a_mark_is_the_border_of_a_word_and_all_else_is_given(text, caplog):
    for kind in ("byte_level", "byte_level_prefix"):
        tokenizer = tokenizer_of(kind)
        assert decoded(build_canvas(tokenizer, text), tokenizer).removeprefix(" ") == GIVEN[text].removeprefix(" ")
    assert not caplog.records


@settings(max_examples=150, deadline=None, derandomize=True)
@given(parts=st.lists(st.text(" \tab.\n(“é", max_size=4), min_size=2, max_size=4))
def test_white_space_is_given_or_a_border_whatever_stands_beside_the_mark(parts):
    tokenizer = tokenizer_of("byte_level")
    try:
        canvas = build_canvas(tokenizer, "_____".join(parts), gap="_____")
    except ValueError as error:
        assert "touch" in str(error)
        return
    # no character but a space is lost, and no more than one space on each side of a mark
    back, typed = decoded(canvas, tokenizer), "".join(parts)
    assert back.replace(" ", "") == typed.replace(" ", "")
    assert 0 <= typed.count(" ") - back.count(" ") <= 2 * (len(parts) - 1)


def test_the_border_after_indentation_bars_pieces_without_a_space():
    canvas = build_canvas(tokenizer_of("byte_level"), "def f():\n    ___\n    return x")
    assert same_bits(canvas["word_end_mask"], canvas["slot_mask"])
    # control: behind a tab, or at the start of a line, a word may stand right away
    assert not build_canvas(tokenizer_of("byte_level"), ["a\t___", "a\n___"])["word_end_mask"].any()


def normalising():
    tokenizer = byte_level(False)
    replace = [normalizers.Replace(old, new) for old, new in ("’'", '“"', '”"')]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *replace])
    return tokenizer


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(text=["a ___", "O’Neil ___"]), "row 1: 'O’Neil' becomes \"O'Neil\""),
        (dict(text="The ___ “hi”"), "row 0: 'The “hi”' becomes 'The \"hi\"'"),
        (dict(text="cafe\u0301 ___"), "row 0: 'cafe\u0301' becomes 'café'"),
        (dict(keywords=["fox", "O’Neil"]), "row 0: 'fox O’Neil' becomes \"fox O'Neil\""),
    ],
)
def test_given_text_that_the_tokenizer_changes_is_named_in_a_warning(fields, named, caplog):
    build_canvas(normalising(), **fields)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().endswith(named)
    caplog.clear()
    # control: the tokenizer that changes nothing says nothing
    build_canvas(byte_level(False), **fields)
    assert not caplog.records


def test_words_that_the_tokenizer_cannot_write_are_refused():
    with pytest.raises(ValueError, match="no token for a part of ' ?猫'|no token for a part of '猫'"):
        build_canvas(tokenizer_of("word_piece"), keywords=["猫"])
    assert decoded(build_canvas(tokenizer_of("byte_level"), keywords=["猫"]), tokenizer_of("byte_level")) == " 猫"


def test_a_tokenizer_without_bos_is_refused():
    tokenizer = byte_level(False)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="no bos_token"):
        build_canvas(tokenizer, "The ___")


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_prefix", "unigram"])
def test_continuation_pieces_are_those_that_glue(kind):
    tokenizer = tokenizer_of(kind)
    mask = continuation_mask_of(tokenizer)
    vocab = tokenizer.get_vocab()
    assert mask[vocab["s"]] and mask[vocab["-"]] and mask[vocab["'"]]
    assert not mask[vocab["."]] and not mask[vocab["("]]
    assert not mask[tokenizer.all_special_ids].any()
    for piece, index in vocab.items():
        if piece[0] in "Ġ▁":
            assert not mask[index], piece
    if kind != "unigram":
        # the second byte of "é" and the first one of a four-byte character
        assert mask[vocab["©"]] and mask[vocab["ð"]]
        assert not mask[vocab["Ċ"]]


def test_word_piece_continuations_carry_the_mark():
    tokenizer = tokenizer_of("word_piece")
    mask = continuation_mask_of(tokenizer)
    for piece, index in tokenizer.get_vocab().items():
        assert bool(mask[index]) == piece.startswith("##"), piece


def test_the_continuation_mask_follows_the_vocabulary():
    tokenizer = byte_level(False)
    size = len(continuation_mask_of(tokenizer))
    tokenizer.add_tokens(["glue", "<thing>"])
    mask = continuation_mask_of(tokenizer, vocab_size=size + 10)
    assert len(mask) == size + 10
    assert mask[size:].tolist() == [True] + [False] * 9


def ragged():
    ids = torch.tensor([[9, 9, 5, 6], [9, 7, 8, 6], [1, 2, 9, 9]])
    return ids, torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]])


def test_a_prompt_opens_only_the_slot_at_its_end_whatever_its_padding():
    ids, attention_mask = ragged()
    canvas = Canvas.from_ids(ids, attention_mask)
    assert canvas["input_ids"].tolist() == [[5, 6, 9, 9], [7, 8, 6, 9], [1, 2, 9, 9]]
    assert canvas["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert canvas["gap_ids"].tolist() == [[-1, 0, -1, -1], [-1, -1, 0, -1], [-1, 0, -1, -1]]
    assert same_bits(canvas["slot_mask"], canvas["gap_ids"] >= 0)
    assert canvas["min_gap_tokens"].tolist() == [[0]] * 3 and canvas["max_gap_tokens"].tolist() == [[-1]] * 3
    canvas.validate(vocab_size=10)
    assert Canvas.from_ids(ids)["slot_mask"].tolist() == [[False, False, False, True]] * 3


def test_slots_move_with_their_tokens():
    ids, attention_mask = ragged()
    slots = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0]]).bool()
    canvas = Canvas.from_ids(ids, attention_mask, slots, max_gap_tokens=4)
    assert canvas["gap_ids"].tolist() == [[0, 1, -1, -1], [0, -1, 1, -1], [0, -1, -1, -1]]
    assert canvas["max_gap_tokens"].tolist() == [[4, 4]] * 3
    canvas.validate()


def test_a_built_canvas_passes_through_unchanged():
    canvas = build_canvas(tokenizer_of("byte_level"), ["The ___{1,3} fox ___ .", "An old ___"])
    again = Canvas.from_ids(**canvas)
    assert again.keys() == canvas.keys()
    for name in canvas:
        assert same_bits(again[name], canvas[name]), name


def test_a_row_without_an_open_slot_is_allowed():
    canvas = Canvas.from_ids(torch.tensor([[1, 2]]), slot_mask=torch.zeros(1, 2, dtype=torch.bool))
    canvas.validate()
    assert not canvas["slot_mask"].any()


IDS_ERRORS = {
    "must be contiguous, attention_mask of row 1": dict(attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1]])),
    "empty canvas: row 0": dict(attention_mask=torch.tensor([[0, 0, 0], [1, 1, 1]])),
    "attention_mask must have shape": dict(attention_mask=torch.ones(2, 2)),
    "slot_mask must have shape": dict(slot_mask=torch.ones(2, 4)),
    "min_gap_tokens must have shape": dict(min_gap_tokens=torch.ones(1, 1, dtype=torch.long)),
    "min_gap_tokens must be integers, got 1.5": dict(min_gap_tokens=1.5),
    "max_gap_tokens must be integers, got True": dict(max_gap_tokens=True),
    "max_gap_tokens must be integers, got tensor": dict(max_gap_tokens=torch.ones(2, 1)),
    "input_ids must be a tensor": dict(input_ids=[[1, 2]]),
    "empty canvas": dict(input_ids=torch.zeros(2, 0, dtype=torch.long)),
}


@pytest.mark.parametrize("message", IDS_ERRORS)
def test_bad_ids_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        Canvas.from_ids(**{"input_ids": torch.ones(2, 3, dtype=torch.long), **IDS_ERRORS[message]})


CANVAS_ERRORS = {
    "input_ids must be integers": dict(input_ids=torch.ones(1, 3)),
    "slot_mask must be bool": dict(slot_mask=torch.zeros(1, 3)),
    "gap_ids must have shape": dict(gap_ids=torch.zeros(1, 2)),
    "padded on the right, row 0": dict(attention_mask=torch.tensor([[0, 1, 1]])),
    "right of a pad, .*\\[0, 2\\]": dict(attention_mask=torch.tensor([[1, 1, 0]])),
    "gap_ids must be at least 0 exactly where": dict(gap_ids=torch.tensor([[-1, 0, -1]])),
    "each gap of a canvas has one slot": dict(
        gap_ids=torch.tensor([[0, -1, 0]]), slot_mask=torch.tensor([[True, False, True]])
    ),
    "gap 3 has no bounds": dict(gap_ids=torch.tensor([[-1, -1, 3]])),
    "vocabulary mismatch: token id 7": dict(input_ids=torch.tensor([[1, 7, 1]])),
    "vocabulary mismatch: continuation_mask has 4": dict(continuation_mask=torch.zeros(4, dtype=torch.bool)),
    "continuation_mask must be bool": dict(continuation_mask=torch.zeros(5)),
    "needs continuation_mask": dict(word_end_mask=torch.tensor([[False, True, False]])),
    "must have one shape": dict(max_gap_tokens=torch.zeros(1, 2)),
    "bounds of gap 0 in row 0 contradict: minimum 2, maximum 1": dict(
        min_gap_tokens=torch.tensor([[2]]), max_gap_tokens=torch.tensor([[1]])
    ),
    "contradict: minimum -1": dict(min_gap_tokens=torch.tensor([[-1]])),
    "add up to 6, max_new_tokens is 5": dict(min_gap_tokens=torch.tensor([[6]])),
    "3 given tokens and minima of 5 more, the model's longest text is 7": dict(min_gap_tokens=torch.tensor([[5]])),
}


@pytest.mark.parametrize("message", CANVAS_ERRORS)
def test_a_bad_canvas_is_refused_by_name(message):
    good = Canvas.from_ids(torch.tensor([[1, 2, 3]]))
    limits = dict(vocab_size=5, max_new_tokens=5, max_position_embeddings=7)
    good.validate(**limits)
    with pytest.raises(ValueError, match=message):
        Canvas(**{**good, **CANVAS_ERRORS[message]}).validate(**limits)


def test_canvases_one_below_the_other_are_those_of_their_texts_together():
    tokenizer = byte_level(False)
    texts = ["The ___{1,3} fox ___ dog", "man ___{2}", "An ___ able ___ sea ___"]
    together = build_canvas(tokenizer, texts)
    stacked = Canvas.stack([build_canvas(tokenizer, texts[:2]), build_canvas(tokenizer, texts[2])])
    assert stacked.keys() == together.keys()
    assert all(torch.equal(stacked[name], together[name]) for name in together)
    sets = [[["fox", "foxes"], "old man"], ["dog"]]
    together = build_canvas(tokenizer, keywords=sets, ordered=False)
    alone = [build_canvas(tokenizer, keywords=[one], ordered=False) for one in sets]
    assert torch.equal(Canvas.stack(alone).pending_ids, together.pending_ids)
    mixed = Canvas.stack([alone[1], build_canvas(tokenizer, texts[1])])
    assert mixed.pending_ids[0].tolist() == alone[1].pending_ids[0].tolist() and bool((mixed.pending_ids[1] < 0).all())
