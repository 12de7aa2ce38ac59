r"""Read a text file once and answer questions about it, with a DRT of any size and a file of any length.

    python examples/scripts/run_questions.py --model DRT --text book.txt --memory book.memory \
        --questions "Who keeps the lighthouse?" "What is the passkey?" --max_new_tokens 20
    python examples/scripts/run_questions.py --model DRT --text book.txt --memory book.memory --together \
        --questions ... --generate '{"num_beams": 3}'

The book is read in segments, upper layers on its end only, with a progress bar; `--memory` keeps what was read in a
file, which opens at once the next time and is refused if model, text or a bit of it has changed. Every question has a
cache of its own behind the same chunks, which are not copied; `--together` asks all of them as one batch. Where chunks
lie is decided by the memory that is free, or by `--location`. `--generate` takes the options of `generate`; with
`--assistant` a smaller model, or `{"prompt_lookup_num_tokens": 4}`, drafts and the answers stay the same.

A DRT asks its memory at the end of every chunk, for the next one. So a question is moved, by newlines in front of it,
to end on the first token of a chunk: then all of it but that token has asked, before the answer begins. `--no_align`
leaves it where it falls. An answer ends at the end of a line, or with the model's own end of text.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from modeling_insnext import ChunkMemoryCache
from modeling_insnext.runs import write_atomically


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or name of a DRT."})
    text: str = field(metadata={"help": "The text file, UTF-8."})
    questions: list[str] = field(metadata={"help": "One or more."})
    memory: str | None = field(default=None, metadata={"help": "File of what was read; made if it is not there."})
    template: str = field(
        default="\nQuestion: {question}\nAnswer:", metadata={"help": "What is written behind the text."}
    )
    align: bool = field(default=True, metadata={"help": "Let questions end on the first token of a chunk."})
    together: bool = field(default=False, metadata={"help": "Ask all questions in one batch."})
    location: str = field(default="auto", metadata={"help": "Where chunks lie: auto, device, host or disk."})
    segment_length: int = field(default=4096, metadata={"help": "Tokens read at a time."})
    max_new_tokens: int = field(default=40, metadata={"help": "Tokens of an answer, at most."})
    generate: str = field(default="{}", metadata={"help": "Further options of generate, JSON."})
    assistant: str | None = field(default=None, metadata={"help": "A model that drafts answers; not with --together."})
    dtype: str = field(default="auto", metadata={"help": "Type of the weights: auto, float32, bfloat16."})

    def __post_init__(self):
        if "{question}" not in self.template:
            raise ValueError(f"template must have {{question}} in it, got {self.template!r}")
        for name in ("segment_length", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        options = json.loads(self.generate)
        if not isinstance(options, dict):
            raise ValueError(f"generate must be a JSON object, got {self.generate}")
        if self.together and (self.assistant is not None or "prompt_lookup_num_tokens" in options):
            raise ValueError("together asks a batch, and drafts are for one text at a time: leave out one of them")


def stamp_of(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def read_book(model, ids: torch.Tensor, arguments: Arguments) -> ChunkMemoryCache:
    """Return the cache behind a text `[1, T]`, from the file if there is one of this text.

    Raises:
        ValueError: If the file holds another text, or is damaged or another model's.
    """
    file = None if arguments.memory is None else Path(arguments.memory)
    stamp = None if file is None else file.with_name(f"{file.name}.text")
    if file is not None and file.is_file():
        if not stamp.is_file() or stamp.read_text() != stamp_of(ids):
            raise ValueError(f"{file} must be the memory of {arguments.text}, got that of another text: delete it")
        return ChunkMemoryCache.load(file, model, arguments.location)
    past = model.prefill(
        ids.to(model.device),
        past_key_values=ChunkMemoryCache(model.config, arguments.location),
        segment_length=arguments.segment_length,
        lower_only=True,
        show_progress=True,
    )
    if file is not None:
        past.save(file, model)
        write_atomically(stamp, stamp_of(ids))
    return past


def prompt_of(tokenizer, question: str, seen: int, chunk_size: int, arguments: Arguments) -> list[int]:
    """Return the ids of a question behind `seen` tokens, whose last one is the first of a chunk if it is to be.

    Raises:
        ValueError: If the tokenizer has no token for a newline to fill up with.
    """
    ids = tokenizer.encode(arguments.template.format(question=question), add_special_tokens=False)
    if not arguments.align:
        return ids
    newline = tokenizer.encode("\n", add_special_tokens=False)
    if len(newline) != 1:
        raise ValueError(f"align needs a tokenizer with a token for a newline, got ids {newline}: use --no_align")
    return newline * ((1 - seen - len(ids)) % chunk_size) + ids


def answers(model, tokenizer, past: ChunkMemoryCache, arguments: Arguments):
    """Yield the answer to every question, each behind the same book."""
    (seen,) = past.seen
    prompts = [prompt_of(tokenizer, q, seen, model.config.chunk_size, arguments) for q in arguments.questions]
    assistant = None if arguments.assistant is None else AutoModelForCausalLM.from_pretrained(arguments.assistant)
    options = {"max_new_tokens": arguments.max_new_tokens, "pad_token_id": tokenizer.pad_token_id, "do_sample": False}
    options |= {"stop_strings": ["\n"], "tokenizer": tokenizer, **json.loads(arguments.generate)}
    if assistant is not None:
        options["assistant_model"] = assistant
    for batch in [prompts] if arguments.together else [[prompt] for prompt in prompts]:
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[1] * past.columns + [0] * (longest - len(p)) + [1] * len(p) for p in batch])
        rows = len(batch) * options.get("num_beams", 1)
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            past_key_values=past.fork(rows) if rows > 1 else past.fork(),
            **options,
        )
        per_question = out[:, longest:].view(len(batch), -1, out.shape[1] - longest)
        for written in per_question:
            yield " | ".join(tokenizer.decode(row, skip_special_tokens=True).strip() for row in written)


def main(arguments: Arguments) -> list[str]:
    """Run the script; returns the answers."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    if model.config.model_type != "drt":
        raise ValueError(f"model must be a DRT (conversion.from_llama --to drt), got {model.config.model_type}")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    text = Path(arguments.text).read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer.encode(text, split_special_tokens=True)])
    if not ids.shape[1]:
        raise ValueError(f"{arguments.text} must hold a text, got none")
    past = read_book(model, ids, arguments)
    print(f"{arguments.text}: {past.seen[0]:,} tokens, chunks on {past.memory.location}", file=sys.stderr)
    found = []
    for question, answer in zip(arguments.questions, answers(model, tokenizer, past, arguments), strict=True):
        print(f"{question}\n  {answer}")
        found.append(answer)
    return found


if __name__ == "__main__":
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--ARGUMENT VALUE ...]")
    try:
        main(*parser.parse_args_into_dataclasses())
    except (ValueError, OSError) as error:
        parser.error(str(error))
