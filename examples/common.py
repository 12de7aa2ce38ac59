"""What the run_*.py scripts of this folder share: data, tokenizer, model, adapter, and a training that resumes."""

import inspect
import json
import logging
import math
import sys
from pathlib import Path

import datasets
import torch
import transformers
from arguments import AdapterArguments, DataArguments, InsertionArguments, ModelArguments, data_format, json_object
from datasets import Dataset, DatasetDict
from report import write_atomically
from resume import checkpoint_to_resume, train_on
from transformers import AutoConfig, AutoTokenizer, set_seed

from modeling_insnext import DrtConfig, InsNextConfig
from modeling_insnext.data import ContextMixture, InsertionCollator, rarity_table, sentence_end_table, word_start_table


CONFIGS = {"insnext": InsNextConfig, "drt": DrtConfig}

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
    training.resume_from_checkpoint = checkpoint_to_resume(training)


# data


def load_splits(data: DataArguments, model: ModelArguments) -> DatasetDict:
    """Return the splits train, validation and test, as far as they were given."""
    if data.dataset_name is not None:
        splits = datasets.load_dataset(data.dataset_name, data.dataset_config_name, cache_dir=model.cache_dir)
    else:
        # each for itself, as their columns may differ
        splits = DatasetDict()
        for name, path in data.files.items():
            kind = data_format(f"{name}_file", path)
            splits[name] = datasets.load_dataset(kind, data_files=path, split="train", cache_dir=model.cache_dir)
    limits = {"train": data.max_train_samples}
    for name, rows in splits.items():
        limit = limits.get(name, data.max_eval_samples)
        splits[name] = rows if limit is None else rows.select(range(min(limit, len(rows))))
    return splits


def split_of(splits: DatasetDict, name: str, columns: list[str]) -> Dataset:
    """Return a split that has these columns.

    Raises:
        ValueError: If the split, a column or a value is missing, or the split has no rows.
    """
    if name not in splits:
        raise ValueError(f"the data must have a split {name!r}, got {sorted(splits)}")
    missing = [column for column in columns if column not in splits[name].column_names]
    if missing:
        raise ValueError(f"{name} data must have the columns {columns}, got {splits[name].column_names}")
    if not len(splits[name]):
        raise ValueError(f"{name} data must have at least one row, got 0")
    for column in columns:
        values = splits[name].data.column(column)
        if values.null_count:
            row = values.is_null().index(True).as_py()
            raise ValueError(f"{name} data must have a value in every row, got None for {column!r} in row {row}")
    return splits[name]


def check_texts(splits: DatasetDict, columns: list[str]) -> None:
    """Raise a `ValueError` if one of these columns holds something else than texts."""
    for split, rows in splits.items():
        for column in set(columns) & set(rows.column_names):
            kind = getattr(rows.features[column], "dtype", rows.features[column])
            # a column without any value is `split_of`'s to refuse
            if kind not in ("string", "large_string", "null"):
                raise ValueError(f"{split} data must have texts in {column!r}, got {kind}")


def mapped(rows: Dataset, function, data: DataArguments, training) -> Dataset:
    """Return what `function` makes of batches of rows and, if it takes them, of the rows' numbers.

    The main process does it first, the others read its cache.
    """
    with training.main_process_first(desc="preparing the data"):
        made = rows.map(
            function,
            batched=True,
            with_indices=len(inspect.signature(function).parameters) == 2,
            remove_columns=rows.column_names,
            num_proc=data.preprocessing_num_workers,
            load_from_cache_file=not data.overwrite_cache,
            desc="Preparing",
        )
    if not len(made):
        raise ValueError(f"the data must make at least one example, got none from {len(rows)} rows")
    return made


def without_eos(tokenizer, ids: list[int]) -> list[int]:
    """Return a tokenised text that does not end yet."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def body(tokenizer, ids: list[int]) -> list[int]:
    """Return a tokenised text without BOS in front and EOS behind."""
    ids = ids[1:] if ids and ids[0] == tokenizer.bos_token_id else ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


# tokenizer, model, adapter


def hub_options(args: ModelArguments) -> dict:
    return {
        "cache_dir": args.cache_dir,
        "revision": args.model_revision,
        "trust_remote_code": args.trust_remote_code,
    }


def load_tokenizer(args: ModelArguments):
    """Return the tokenizer; one without padding pads with EOS.

    Raises:
        ValueError: If it has neither a padding nor an EOS token.
    """
    if args.tokenizer_name is not None:
        tokenizer = AutoTokenizer.from_pretrained(
            args.tokenizer_name, cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code
        )
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path or args.config_name, **hub_options(args))
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer must have a padding or an EOS token, got neither in {tokenizer.name_or_path}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def check_fields(overrides: dict, config) -> None:
    """Raise a `ValueError` if an override names no field of the configuration."""
    unknown = sorted(set(overrides) - set(config.to_dict()))
    if unknown:
        raise ValueError(f"config_overrides must name fields of {type(config).__name__}, got {unknown}")


def load_config(args: ModelArguments, tokenizer):
    """Return the configuration of the checkpoint, or of a new model over the tokenizer's vocabulary.

    Raises:
        ValueError: If an override names no field, or the vocabulary is smaller than the tokenizer's.
    """
    overrides = {} if args.config_overrides is None else json_object("config_overrides", args.config_overrides)
    if args.model_type is None:
        config = AutoConfig.from_pretrained(args.model_name_or_path or args.config_name, **hub_options(args))
        check_fields(overrides, config)
        config = type(config)(**{**config.to_dict(), **overrides}) if overrides else config
    else:
        made = CONFIGS[args.model_type]
        check_fields(overrides, made())
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        overrides = {**special, "vocab_size": len(tokenizer), **overrides}
        config = made(**overrides) if args.preset is None else made.preset(args.preset, **overrides)
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"vocab_size must be at least the tokenizer's {len(tokenizer)}, got {config.vocab_size}")
    return config


def load_model(auto_class, args: ModelArguments, config, **checkpoint_options):
    """Return the checkpoint's weights under the head of `auto_class`, or a new model."""
    options = {"attn_implementation": args.attn_implementation, "trust_remote_code": args.trust_remote_code}
    if args.model_name_or_path is None:
        model = auto_class.from_config(config, dtype=getattr(torch, args.dtype), **options)
    else:
        options |= {"cache_dir": args.cache_dir, "revision": args.model_revision, **checkpoint_options}
        model = auto_class.from_pretrained(args.model_name_or_path, config=config, dtype=args.dtype, **options)
    logger.info("%s with %s parameters", type(model).__name__, f"{model.num_parameters():,}")
    return model


def add_adapter(model, args: AdapterArguments, task_type: str | None, head: list[str] | None = None):
    """Return the model under a new adapter, under a saved one, or as it is.

    Args:
        model: The model.
        args: What was asked for.
        task_type: PEFT's name of the task, if it has one; it knows the heads of its tasks.
        head: Layers to train whole and to save with the adapter.
    """
    if args.adapter == "none" and args.adapter_name_or_path is None:
        return model
    from peft import LoraConfig, PeftModel, get_peft_model

    if args.adapter_name_or_path is not None:
        model = PeftModel.from_pretrained(model, args.adapter_name_or_path, is_trainable=True)
    else:
        targets = args.lora_target_modules
        config = LoraConfig(
            task_type=task_type,
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            use_dora=args.adapter == "dora",
            modules_to_save=head,
        )
        model = get_peft_model(model, config)
    trained, total = model.get_nb_trainable_parameters()
    logger.info("%s of %s parameters are trained", f"{trained:,}", f"{total:,}")
    return model


def insertion_collator(args: InsertionArguments, tokenizer, texts, contexts: dict, training, **options):
    """Return the collator of insertion sequences over whole words.

    Args:
        args: What was given.
        tokenizer: Tokenizer of the model.
        texts: Tokenised texts, for the rarity of tokens, which keywords are chosen by.
        contexts: Shares of `ContextMixture`, if none were given.
        training: Training arguments; the seed of all draws is theirs for data.
        **options: More fields of `InsertionCollator`.
    """
    order = args.order_spec
    shares = contexts if args.contexts is None else json_object("contexts", args.contexts)
    rare = bool(shares.get("keywords")) or "keyword_first" in order
    return InsertionCollator(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        order=order,
        contexts=ContextMixture(**shares),
        word_starts=word_start_table(tokenizer),
        sentence_ends=sentence_end_table(tokenizer),
        token_rarity=rarity_table((text["input_ids"] for text in texts), len(tokenizer)) if rare else None,
        context_step_weight=3.0 if args.context_step_weight is None else args.context_step_weight,
        seed=training.seed if training.data_seed is None else training.data_seed,
        **options,
    )


# training


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
        metrics = finite(metrics)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training.push_to_hub:
        trainer.push_to_hub()
    return metrics


def wanted_examples(splits: DatasetDict, columns: list[str], make, data: DataArguments, training) -> dict:
    """Return what `make` makes of the splits that training and evaluation need, as arguments of a `Trainer`."""
    needed = {"train_dataset": ("train", training.do_train), "eval_dataset": ("validation", training.do_eval)}
    return {
        name: mapped(split_of(splits, split, columns), make, data, training)
        for name, (split, wanted) in needed.items()
        if wanted
    }


def perplexity_of(nats_per_token: float) -> float:
    """Return the exponential, infinity where it is beyond all floats."""
    return math.exp(nats_per_token) if nats_per_token < 709 else math.inf


def finite(value):
    """Return a value in which None stands for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines; what JSON does not have, as dates, as text."""
    lines = [json.dumps(finite(row), ensure_ascii=False, default=str) + "\n" for row in rows]
    write_atomically(path, "".join(lines))
