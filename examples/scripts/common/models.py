"""Tokenizer, configuration, weights and adapter that the arguments name."""

import logging

import torch
from transformers import AutoConfig, AutoTokenizer

from modeling_insnext import DrtConfig, InsNextConfig

from .arguments import AdapterArguments, ModelArguments, json_object


CONFIGS = {"insnext": InsNextConfig, "drt": DrtConfig}

logger = logging.getLogger(__name__)


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
            # what is trained whole needs no adapter
            exclude_modules=None if head is None else rf".*\b({'|'.join(head)})\b.*",
        )
        model = get_peft_model(model, config)
    trained, total = model.get_nb_trainable_parameters()
    logger.info("%s of %s parameters are trained", f"{trained:,}", f"{total:,}")
    return model
