"""The trace: the right words at the right step, as terminal text and as a page."""

import re
from functools import cache
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_insnext.insnext.trace import InsertionTrace
from tests.support.tokenizers import tiny_tokenizer


TEXT = "The old man drank a café <b>&amp;</b> watched 日本 boats"


@cache
def byte_tokenizer():
    return tiny_tokenizer(
        300, bos_in_front=False, texts=["The old man watched the boats"] * 9, all_bytes=True, add_prefix_space=False
    )


def word_piece_tokenizer():
    vocab = {token: i for i, token in enumerate(["[UNK]", "<s>", "boat", "##s", "man", "##y", "."])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="[UNK]")


def metaspace_tokenizer():
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("▁boat", -1.0), ("s", -2.0), ("▁man", -1.0), ("y", -2.0), (".", -2.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def output_of(ids, steps, pad=0, **fields):
    """One padded row, as `generate` returns it."""
    return SimpleNamespace(
        sequences=torch.tensor([[*ids, pad, pad]]), insertion_steps=torch.tensor([[*steps, -2, -2]]), **fields
    )


def trace_of(text, steps_of=None, **fields):
    ids = [1, *byte_tokenizer()(text, add_special_tokens=False)["input_ids"]]
    steps = [-1, *(steps_of(len(ids) - 1) if steps_of else range(1, len(ids)))]
    return InsertionTrace.from_output(output_of(ids, steps, **fields), byte_tokenizer())


def small_trace(**fields):
    """given "The", " boats"; written " old", then " man", then "!"."""
    tokenizer = byte_tokenizer()
    ids, steps = [1], [-1]
    for piece, step in (("The", -1), (" old", 1), (" man", 2), (" boats", -1), ("!", 3)):
        new = tokenizer(piece, add_special_tokens=False)["input_ids"]
        assert len(new) == 1, piece
        ids, steps = ids + new, steps + [step]
    return InsertionTrace.from_output(output_of(ids, steps, **fields), tokenizer)


def test_the_text_at_each_step():
    trace = small_trace()
    assert [trace.text_at(step) for step in range(4)] == [
        "The boats", "The old boats", "The old man boats", "The old man boats!",
    ]  # fmt: skip
    assert trace.steps == 3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.text(alphabet="ab é日🦊<&>\n\"'", min_size=1, max_size=12).filter(lambda text: text == text.strip(" ")),
    st.randoms(),
)
def test_characters_made_of_several_tokens_never_show_garbage(text, random):
    def shuffled(n):
        return random.sample(range(1, n + 1), n)

    trace = trace_of(text, shuffled)
    assert trace.text_at(trace.steps) == text
    for step in range(trace.steps + 1):
        assert "\ufffd" not in trace.text_at(step)
    # control: the tokens of such a character are garbage one by one
    tokenizer = byte_tokenizer()
    parts = [tokenizer.decode([index]) for index in tokenizer("🦊")["input_ids"]]
    assert any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("maker", [word_piece_tokenizer, metaspace_tokenizer])
def test_pieces_of_other_tokenizers_join_to_words(maker):
    tokenizer = maker()
    ids = tokenizer("many boats", add_special_tokens=False)["input_ids"]
    trace = InsertionTrace.from_output(output_of([1, *ids], [-1, -1, -1, 1, 2], pad=1), tokenizer)
    assert [trace.text_at(step) for step in range(3)] == ["many", "many boat", "many boats"]


def test_the_terminal_marks_given_and_new_words():
    lines = small_trace(reencoded_at=[[2]], encoded_tokens=torch.tensor([11])).text().split("\n")
    assert lines == [
        "given  ‹The› ‹boats›",
        "step 1 ‹The› [old] ‹boats›",
        "step 2 ‹The› old [man] ‹boats›",
        "     ⟳ encoded anew after step 2",
        "step 3 ‹The› old man ‹boats›[!]",
        "11 tokens encoded",
    ]
    assert "5 tokens encoded anew after step 2" in small_trace(reencoded_at=[[2]], reencoded_tokens=[[5]]).text()
    assert "⟳" not in small_trace(reencoded_at=[[]]).text()


def test_unknown_text_is_shown_and_bos_is_not_even_where_it_stands_for_what_is_unknown():
    tokenizer = word_piece_tokenizer()
    ids = [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("man"), tokenizer.unk_token_id]
    shown = InsertionTrace.from_output(output_of(ids, [-1, -1, -1]), tokenizer).text_at(0)
    assert shown == f"man {tokenizer.unk_token}"
    tokenizer.unk_token = tokenizer.bos_token
    assert InsertionTrace.from_output(output_of(ids[:2], [-1, -1]), tokenizer).text_at(0) == "man"


def test_fewer_frames_show_all_that_is_new_since_the_last_one():
    text = small_trace(reencoded_at=[[1, 2]]).text(frames=2)
    assert text.split("\n") == [
        "given  ‹The› ‹boats›",
        "step 3 ‹The› [old] [man] ‹boats›[!]",
        "     ⟳ encoded anew after step 1",
        "     ⟳ encoded anew after step 2",
        "2 of 4 texts shown",
    ]


def test_color_adds_codes_and_changes_no_letter():
    plain, color = small_trace().text(), small_trace().text(color=True)
    assert "\033[" in color and "\033[" not in plain
    assert re.sub(r"\033\[\d+m", "", color) == plain.replace("‹", "").replace("›", "")


def test_a_picture_that_leaves_texts_out_says_so():
    trace = trace_of(TEXT)
    every = trace.steps + 1
    assert trace.text(frames=4).split("\n")[-1] == f"4 of {every} texts shown"
    assert "shown" not in trace.text(frames=every) and trace.text(frames=every).count("step") == every - 1


def test_saving_makes_the_folder(tmp_path):
    small_trace().save(tmp_path / "runs" / "today" / "growth.html")
    assert [path.name for path in (tmp_path / "runs" / "today").iterdir()] == ["growth.html"]
    with pytest.raises(ValueError, match="saved as .html or .txt"):
        small_trace().save(tmp_path / "other" / "growth.png")
    assert not (tmp_path / "other").exists()


def test_lines_keep_within_the_width():
    text = trace_of(TEXT * 3).text(width=40, frames=3)
    assert max(len(line) for line in text.split("\n")) <= 40
    assert max(len(line) for line in trace_of(TEXT * 3).text(width=80, frames=3).split("\n")) > 40


class Page(HTMLParser):
    """The text of the element with id "text", the elements by step, and every address the page names."""

    def __init__(self, page):
        super().__init__()
        self.depth, self.content, self.steps, self.addresses, self.tags = 0, "", [], [], set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes.items() if name in ("src", "href")]
        if attributes.get("id") == "text" or self.depth:
            self.depth += tag not in ("meta", "input")
        if self.depth and "data-s" in attributes:
            self.steps.append(int(attributes["data-s"]))

    def handle_endtag(self, tag):
        self.depth -= bool(self.depth)

    def handle_data(self, data):
        self.content += data if self.depth else ""


def test_the_page_holds_the_text_escaped_and_each_step():
    trace = trace_of(TEXT)
    page = Page(trace.html())
    assert page.content == TEXT
    assert page.steps == [unit.step for unit in trace.units]
    assert "<b>&amp;" not in trace.html() and "&lt;" in trace.html()


def test_the_page_needs_nothing_else_and_is_small():
    page = trace_of("The old man watched the boats. " * 16).html()
    assert page.count("data-s=") > 100
    assert len(page.encode()) < 60_000
    assert Page(page).addresses == []
    assert not re.search(r"https?:|@import|url\(", page)


def test_the_page_boxes_given_words_and_marks_where_ebr_struck():
    page = small_trace(reencoded_at=[[1, 3]], reencoded_tokens=[[4, 6]]).html()
    assert page.count('<b class="given"') == 2
    assert 'data-at="1"' in page and 'title="6 tokens encoded anew after step 3"' in page
    assert "encoded anew after steps 1, 3" in page
    assert "data-at=" not in small_trace().html()


def test_a_text_that_looks_like_a_placeholder_stays_text():
    assert Page(trace_of("@facts@ @text@ {0} \\1").html()).content == "@facts@ @text@ {0} \\1"


def test_rows_are_told_apart():
    tokenizer = byte_tokenizer()
    a, b = (tokenizer(word)["input_ids"] for word in ("old", "man"))
    output = SimpleNamespace(
        sequences=torch.tensor([[1, a[0]], [1, b[0]]]),
        insertion_steps=torch.tensor([[-1, -1], [-1, 1]]),
        reencoded_at=[[], [1]],
        encoded_tokens=torch.tensor([2, 5]),
    )
    first, second = (InsertionTrace.from_output(output, tokenizer, row) for row in (0, 1))
    assert (first.steps, first.reencoded_at, first.encoded_tokens) == (0, (), 2)
    assert (second.steps, second.reencoded_at, second.encoded_tokens) == (1, (1,), 5)
    with pytest.raises(ValueError, match=r"row must be in \[0, 2\), got 2"):
        InsertionTrace.from_output(output, tokenizer, 2)


def test_a_text_that_nothing_was_written_into_has_a_trace():
    trace = trace_of("The boats", lambda n: [-1] * n)
    assert trace.text() == "given  ‹The boats›"
    assert "nothing written" in trace.html()
    empty = InsertionTrace.from_output(output_of([1], [-1]), byte_tokenizer())
    assert empty.text() == "given  (nothing)" and empty.units == ()


def test_bad_arguments_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="needs sequences and insertion_steps, .* got Tensor"):
        InsertionTrace.from_output(torch.zeros(1, 2), byte_tokenizer())
    with pytest.raises(ValueError, match=r"one shape, got \[1, 2\] and \[1, 3\]"):
        wrong = SimpleNamespace(sequences=torch.zeros(1, 2), insertion_steps=torch.zeros(1, 3))
        InsertionTrace.from_output(wrong, byte_tokenizer())
    with pytest.raises(ValueError, match="width must be at least 30, got 5"):
        small_trace().text(width=5)
    with pytest.raises(ValueError, match="frames must be at least 2, got 1"):
        small_trace().text(frames=1)
    with pytest.raises(ValueError, match="saved as .html or .txt, got '.*growth.png'"):
        small_trace().save(tmp_path / "growth.png")
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_the_file_at_once(tmp_path, monkeypatch):
    trace, path = small_trace(), tmp_path / "growth.html"
    trace.save(path)
    assert path.read_text(encoding="utf-8") == trace.html()
    trace.save(tmp_path / "growth.txt")
    assert (tmp_path / "growth.txt").read_text(encoding="utf-8") == trace.text()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        trace_of("old").save(path)
    assert path.read_text(encoding="utf-8") == trace.html()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["growth.html", "growth.txt"]
