"""run_questions.py answers as `generate` does behind the whole text, and opens what it has read before."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.support import forked
from tests.support.drt import MEMORY, tiny_model
from tests.support.tokenizers import tiny_tokenizer


SCRIPT = Path(__file__).parents[2] / "examples" / "scripts" / "run_questions.py"
TEXT = "the old man and the sea. a quick brown fox jumps over the lazy dog. " * 4
QUESTIONS = ["who jumps?", "the old man and who?", "a dog?"]
NEW = 6


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_questions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look for the module of their fields' types
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drt")
    tokenizer = tiny_tokenizer(300, bos_in_front=False, all_bytes=True, add_prefix_space=False)
    tokenizer.save_pretrained(folder)
    tiny_model(vocab_size=len(tokenizer), dtype=torch.float64, **MEMORY).save_pretrained(folder)
    (folder / "book.txt").write_text(TEXT)
    return folder


def asked(script, folder, **options):
    options = {"text": str(folder / "book.txt"), "questions": QUESTIONS, "max_new_tokens": NEW, **options}
    # a stop string that never comes: every answer has all its tokens
    generate = '{"stop_strings": null, "eos_token_id": null}'
    return script.main(script.Arguments(model=str(folder), generate=options.pop("generate", generate), **options))


def answered_in_one_pass(script, folder):
    """Greedy answers, each by forward passes over book, newlines and question."""
    tokenizer = script.AutoTokenizer.from_pretrained(folder)
    model = script.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    book, found = tokenizer.encode(TEXT, add_special_tokens=False), []
    for question in QUESTIONS:
        ids = tokenizer.encode(f"\nQuestion: {question}\nAnswer:", add_special_tokens=False)
        fill = tokenizer.encode("\n", add_special_tokens=False)
        while (len(book) + len(ids)) % model.config.chunk_size != 1:
            ids = fill + ids
        text = torch.tensor([book + ids])
        for _ in range(NEW):
            with torch.no_grad():
                text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        found.append(tokenizer.decode(text[0, -NEW:], skip_special_tokens=True).strip())
    return found


def test_every_question_is_answered_as_behind_the_whole_text(script, folder, tmp_path):
    expected = answered_in_one_pass(script, folder)
    assert asked(script, folder, segment_length=19) == expected
    assert asked(script, folder, together=True) == expected
    assert asked(
        script, folder, generate='{"stop_strings": null, "eos_token_id": null, "prompt_lookup_num_tokens": 2}'
    ) == (expected)
    # control: where questions fall anywhere, they are answered otherwise
    assert asked(script, folder, align=False) != expected


def test_what_was_read_is_opened_again_moved_and_by_another_process(script, folder, tmp_path, monkeypatch):
    memory = tmp_path / "book.memory"
    first = asked(script, folder, memory=str(memory))
    moved = tmp_path / "elsewhere" / "book"
    moved.parent.mkdir()
    for suffix in ("", ".text"):
        os.replace(f"{memory}{suffix}", f"{moved}{suffix}")
    command = [sys.executable, str(SCRIPT), "--model", str(folder), "--text", str(folder / "book.txt")]
    command += ["--memory", str(moved), "--max_new_tokens", str(NEW), "--location", "disk", "--questions", *QUESTIONS]
    command += ["--generate", '{"stop_strings": null, "eos_token_id": null}']
    done = forked.run(command, SCRIPT.parents[2], dict(os.environ), forked.READING)
    assert done.returncode == 0, done.stderr[-2000:]
    # the book was not read again: no progress bar
    assert all(answer in done.stdout for answer in first) and "chunks on disk" in done.stderr
    assert "token/s" not in done.stderr

    data = bytearray(moved.read_bytes())
    data[len(data) // 2] ^= 4
    moved.write_bytes(data)
    done = forked.run(command, SCRIPT.parents[2], dict(os.environ), forked.READING)
    assert done.returncode == 2 and "is damaged" in done.stderr and not done.stdout
    (folder / "other.txt").write_text(TEXT + "!")
    with pytest.raises(ValueError, match="got that of another text: delete it"):
        asked(script, folder, memory=str(moved), text=str(folder / "other.txt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "no place"}, "template must have {question} in it"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"generate": "[]"}, r"generate must be a JSON object, got \[\]"),
        ({"together": True, "assistant": "x"}, "drafts are for one text at a time"),
    ],
)
def test_options_that_cannot_be_are_refused(script, options, message):
    with pytest.raises(ValueError, match=message):
        script.Arguments(model="m", text="t", questions=["q"], **options)
