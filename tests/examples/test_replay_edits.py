"""The study of edits: PIE is what it says, and the table is made."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from replay_edits import CausalFile, hunks, main
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.equality import within_rounding
from tests.support.insnext import tiny_model
from tests.support.tokenizers import tiny_tokenizer


OLD, NEW = [1, 5, 6, 7, 8, 9], [1, 5, 11, 12, 13, 8, 9]


def files(layers):
    model = tiny_model(position_encoding="rotary", num_hidden_layers=layers)
    return CausalFile(model, OLD), CausalFile(model, NEW)


@torch.no_grad()
def ends(layers, keep_up):
    """Return what is likely behind an edited text and behind the same text read anew."""
    edited, fresh = files(layers)
    getattr(edited, keep_up)(NEW)
    assert edited.ids == NEW
    for file in (edited, fresh):
        file.read_end()
    return edited.log_p([len(NEW) - 1]), fresh.log_p([len(NEW) - 1])


def test_in_one_layer_where_keys_know_of_nobody_pie_is_exact_and_in_two_it_is_not():
    assert within_rounding(*ends(1, "edit"))
    assert not within_rounding(*ends(2, "edit"))
    assert within_rounding(*ends(2, "reread"))


@torch.no_grad()
def test_pie_encodes_the_new_tokens_and_a_rereading_all_behind_the_change():
    for keep_up, tokens in (("edit", 3), ("reread", 5)):
        edited, _ = files(2)
        getattr(edited, keep_up)(NEW)
        assert edited.encoded == len(OLD) + tokens


def test_hunks_applied_one_after_the_other_make_the_new_text():
    before, after = "a\nb\nc\nd\n", "x\na\nc\ny\nd"
    text = before
    for start, end, new in hunks(before, after):
        text = text[:start] + new + text[end:]
    assert text == after


def test_a_letter_typed_into_two_hundred_tokens_of_a_shipped_model_is_one_pass_over_three_at_most():
    folder = Path(__file__).parents[2] / "examples" / "checkpoints" / "insnext-mini"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The old man went to the sea with his dog. " * 40, add_special_tokens=False)["input_ids"][:199]
    document = model.open(tokenizer, tokenizer.decode(ids))
    # the control: opening reads it all
    assert document.encoded_tokens == len(document.ids) >= 199
    for place in range(0, len(document.text), 37):
        tokens, passes = document.encoded_tokens, document.passes
        document.insert(place, "e")
        assert document.passes == passes + 1 and document.encoded_tokens - tokens <= 3
        document.undo()


@pytest.mark.parametrize("encoding", ["rotary", "alibi"])
def test_the_table_has_a_row_for_every_way(encoding, tmp_path):
    tokenizer = tiny_tokenizer(vocab_size=290, all_bytes=True, add_prefix_space=False)
    tiny_model(vocab_size=290, position_encoding=encoding, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with gzip.open(tmp_path / "edits.jsonl.gz", "wt") as file:
        file.write(json.dumps({"before": "a = 1\nb = 2\n", "after": "a = 1\nx = 3\n"}) + "\n")
    args = ["--edits", str(tmp_path / "edits.jsonl.gz"), "--checkpoint", str(tmp_path / "model")]
    args += ["--output", str(tmp_path / "table"), "--keystroke_tokens", "12", "--max_drift", "0"]
    if encoding == "alibi":
        with pytest.raises(ValueError, match="PIE turns rotary keys"):
            main(args)
        return
    rows = main(args)["results"]
    assert set(rows) == {"anew", "document", "max_drift 0.0", "PIE", "from the edit"}
    assert rows["max_drift 0.0"][0]["drift"] == pytest.approx(0, abs=1e-4) and rows["document"][0]["drift"] > 1e-3
    assert "A letter typed into 12 tokens" in (tmp_path / "table.md").read_text()
