"""A run from its start to its figures: seed and log, training that resumes, evaluation, what is written down."""

import json
import logging
import math
import re
import sys
from pathlib import Path

import datasets
import transformers
from transformers import set_seed

from modeling_insnext.data import Passes, Shuffled
from modeling_insnext.runs import checkpoint_to_resume, finite, train_on, write_atomically

from .arguments import InsertionArguments


STAMP = "script_arguments.json"
# neither training data nor weights depend on these
FREE = (
    "cache_dir",
    "preprocessing_num_workers",
    "overwrite_cache",
    "validation_file",
    "test_file",
    "max_eval_samples",
    "trust_remote_code",
    "attn_implementation",
)

logger = logging.getLogger(__name__)


def start(training) -> None:
    """Set up logging and the seed as the training arguments say, and find the checkpoint to go on from."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[logging.StreamHandler(sys.stdout)],
        level=logging.INFO if training.should_log else logging.WARNING,
    )
    level = training.get_process_log_level()
    transformers.utils.logging.set_verbosity(level)
    datasets.utils.logging.set_verbosity(level)
    set_seed(training.seed)
    if training.bf16 and training.device.type == "cpu" and not cpu_has_bf16():
        logger.warning("this CPU has no bfloat16 instructions: --bf16 is slower than without")
    training.resume_from_checkpoint = checkpoint_to_resume(training)


def cpu_has_bf16() -> bool:
    """Return whether the processor multiplies bfloat16 itself; where that is not known, True."""
    facts = Path("/proc/cpuinfo")
    text = facts.read_text(encoding="utf-8") if facts.is_file() else ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return flags is None or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags[1].split()))


def scheduled(insertion: InsertionArguments, rows: dict, training) -> dict:
    """Return the data of a trainer; where the share of texts left to right changes, texts say when they are read.

    The training data is then one stream, in another order in every pass, and `max_steps` becomes what the epochs are.
    """
    first, last = insertion.shares
    if first == last or "train_dataset" not in rows:
        return rows
    train = rows["train_dataset"]
    texts = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    if training.max_steps <= 0:
        training.max_steps = math.ceil(len(train) * training.num_train_epochs / texts)
    seed = training.seed if training.data_seed is None else training.data_seed
    return {**rows, "train_dataset": Passes(Shuffled(train, seed), num_texts=training.max_steps * texts)}


def note_arguments(training, *arguments) -> None:
    """Write down what data and weights depend on; warn if the checkpoint to go on from was made with other values."""
    now = {name: value for one in arguments for name, value in vars(one).items() if name not in FREE}
    now |= {"seed": training.seed, "data_seed": training.data_seed}
    path = Path(training.output_dir) / STAMP
    if training.resume_from_checkpoint is not None and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name} {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]]
        if changed:
            checkpoint = training.resume_from_checkpoint
            logger.warning("%s was trained with other arguments: %s", checkpoint, "; ".join(changed))
    if training.do_train and training.should_save:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(now))


def train_and_evaluate(trainer, perplexity: bool = False) -> dict[str, float]:
    """Train from the last checkpoint on, save, evaluate and push, as the training arguments say.

    Args:
        trainer: Any `Trainer`.
        perplexity: Whether the evaluation loss is a mean over tokens, whose exponential is of use.

    Returns:
        The metrics of the evaluation, if there was one; what is no finite number is None.
    """
    training, metrics = trainer.args, {}
    if training.do_train:
        train_on(trainer)
    if training.do_eval:
        metrics = trainer.evaluate()
        if perplexity:
            metrics["eval_perplexity"] = perplexity_of(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        metrics = finite(metrics)
        trainer.save_metrics("eval", metrics)
    if training.push_to_hub:
        trainer.push_to_hub()
    return metrics


def perplexity_of(nats_per_token: float) -> float:
    """Return the exponential, infinity where it is beyond all floats."""
    return math.exp(nats_per_token) if nats_per_token < 709 else math.inf


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines; what JSON does not have, as dates, as text."""
    lines = [json.dumps(finite(row), ensure_ascii=False, default=str) + "\n" for row in rows]
    write_atomically(path, "".join(lines))
