"""What every conversion does: read, rename, make what is new, check, write; and the command line around it."""

import argparse
import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedConfig

from modeling_insnext import DrtConfig, InsNextConfig

from .checkpoint import (
    check_values,
    expected_shapes,
    named,
    read_config,
    read_generation_config,
    read_tensors,
    read_tokenizer,
    skeleton,
    write_checkpoint,
)
from .folders import new_folder, refusing
from .memory import BEGINNINGS, copied
from .structure import framed, structure_ids
from .tables import Table, apply_back, apply_table, origins, sources_of, unique


CONFIGS = {"insnext": InsNextConfig, "drt": DrtConfig}

# tensors that no source has, as patterns: drawn as in a new model
NEW = {
    "insnext": ("slot_head.*",),
    "drt": ("model.layers.*.cross_attn.*", "model.encoder.*", "model.query_norms.*"),
}


def going_on(weight: torch.Tensor) -> torch.Tensor:
    """Return a I with a^2 = 6 / sqrt(D).

    As both projections it gives the slot right of a token cos(state, token) times a logit of 6, so the highest to the
    one right of what was written last, and STOP has 0: at first a text goes on where it is.
    """
    return torch.eye(len(weight), dtype=weight.dtype) * (6 / len(weight) ** 0.5) ** 0.5


# a slot is its left neighbour at first
SIDES = {
    "slot_head.left_proj.weight": lambda weight: torch.eye(len(weight), dtype=weight.dtype),
    "slot_head.right_proj.weight": torch.zeros_like,
    "slot_head.state_proj.weight": torch.zeros_like,
}
# how new tensors begin that are not drawn; cross-attention adds nothing at first
BEGINS = {
    **SIDES,
    "slot_head.query_proj.weight": going_on,
    "slot_head.key_proj.weight": going_on,
    "model.layers.*.cross_attn.o_proj.weight": torch.zeros_like,
}

# what makes a decoder one family's or another's
FORM = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "position_encoding",
    "rope_parameters",
    "norm",
    "rms_norm_eps",
    "qk_norm",
    "attention_bias",
    "attention_output_bias",
    "gated_mlp",
    "hidden_act",
    "mlp_bias",
    "self_attention",
    "tie_word_embeddings",
)

# ids that a source may not name
TOKEN_OPTIONS = ("pad_token_id", "bos_token_id", "eos_token_id")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Family(NamedTuple):
    """Where weights come from.

    Attributes:
        name: As in messages.
        model_types: What its configurations call themselves.
        targets: What it can become.
        table: Names of tensors; what has no place in a target is listed in `without`.
        fields: Maps a source's configuration and the target to the fields of ours; refuses what ours cannot express.
        without: By target, source patterns with a rule that are left out there, and why is said beside it.
        moved: By target, source patterns whose tensors have another place there than `table` says.
        memory: Maps the source's configuration and one of `memory.BEGINNINGS` to the fields of a DRT with a memory.
        new: Maps configuration and target to patterns of the tensors that are new.
        rename: Maps a source's name of a tensor and its configuration to the name in the table.
        prepare: Maps tensors under the names of the table and the configuration to those that the rules are for.
        read: Reads the configuration from the folder.
        weights: Maps the folder to what :func:`checkpoint.read_tensors` reads.
        backward: Maps our configuration and a model type to the source's configuration; `None`: no way back.
        returns: Targets that are the same function, and so have a way back.
    """

    name: str
    model_types: tuple[str, ...]
    targets: tuple[str, ...]
    table: Table
    fields: Callable[[PreTrainedConfig, str], dict]
    without: dict[str, tuple[str, ...]] = {}
    moved: dict[str, dict[str, str]] = {}
    memory: Callable[[PreTrainedConfig, str], dict] | None = None
    new: Callable[[PreTrainedConfig, str], tuple[str, ...]] = lambda config, target: NEW[target]
    rename: Callable[[str, PreTrainedConfig], str] = lambda name, config: name
    prepare: Callable[[dict, PreTrainedConfig], dict] = lambda tensors, config: tensors
    read: Callable[[str], PreTrainedConfig] = read_config
    weights: Callable[[str], str] = str
    backward: Callable[[PreTrainedConfig, str], PreTrainedConfig] | None = None
    returns: tuple[str, ...] = ("drt",)

    def table_for(self, target: str) -> Table:
        left_out = dict.fromkeys(self.without.get(target, ()))
        return {**self.table, **left_out, **self.moved.get(target, {})}


class Converted(NamedTuple):
    """A model of ours: its configuration, all its tensors, and which of them are new."""

    config: PreTrainedConfig
    tensors: dict[str, torch.Tensor]
    new: list[str]


def check_family(family: Family, config, folder) -> None:
    """Raise a `ValueError` unless a configuration is one that the family's table is for."""
    if config.model_type not in family.model_types:
        raise ValueError(
            f"{folder} must be of the family {family.name} {family.model_types}, got model_type={config.model_type!r} "
            f"(architectures={config.architectures})"
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{folder} must hold plain weights, got a quantization_config")


def new_tensors(config: PreTrainedConfig, names: list[str], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return these tensors as a new model of the configuration has them, whatever the rest weighs."""
    model, made = skeleton(config), {}
    owners = {name.rpartition(".")[0] for name in names}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for owner, module in model.named_modules():
            if owner in owners:
                module.to_empty(device="cpu", recurse=False)
                model._init_weights(module)
                made |= {
                    f"{owner}.{name}".lstrip("."): tensor for name, tensor in module.named_parameters(recurse=False)
                }
    made = {name: made[name].detach().to(dtype) for name in names}
    for name, pattern in product(names, BEGINS):
        if fnmatchcase(name, pattern):
            made[name] = BEGINS[pattern](made[name])
    return made


def check_ids(holder, vocab_size: int, place: str = "the configuration") -> None:
    """Raise a `ValueError` unless the special tokens that an object names are in the vocabulary."""
    for name in TOKEN_OPTIONS:
        ids = getattr(holder, name, None)
        for token in ids if isinstance(ids, (list, tuple)) else [ids]:
            if token is not None and not 0 <= token < vocab_size:
                raise ValueError(f"{name} must be in [0, {vocab_size}), got {token} in {place}: --{name} replaces it")


def _memory_fields(family: Family, source_config, target: str, begin: str | None) -> dict:
    if begin is None:
        return {}
    if target != "drt" or family.memory is None:
        raise ValueError(f"memory is for DRTs made of a Llama and its like, got {begin!r} for {family.name}, {target}")
    return family.memory(source_config, begin)


def our_config(
    family: Family, source_config, target: str, options: dict, memory: str | None = None
) -> PreTrainedConfig:
    """Return the configuration of ours that a source's becomes.

    Raises:
        ValueError: If the target is none of the family's, or the configuration cannot be expressed.
    """
    if target not in family.targets:
        raise ValueError(f"{family.name} becomes one of {family.targets}, got {target!r}")
    with refusing(f"the configuration must be one of {family.name}"):
        fields = {**family.fields(source_config, target), **_memory_fields(family, source_config, target, memory)}
        fields |= options
        check_ids(SimpleNamespace(**fields), fields["vocab_size"])
        if "retrieval_groups" in options and "num_lower_layers" not in options:
            layers = source_config.num_hidden_layers
            fields["num_lower_layers"] = layers - sum(fields["retrieval_groups"])
            if fields["num_lower_layers"] < 0:
                raise ValueError(
                    f"retrieval_groups must add up to at most the source's {layers} layers, "
                    f"got {fields['retrieval_groups']}"
                )
        if family.backward and options.get("landmark_source") == "token":
            raise ValueError("landmark_source must be mean or cls, got token: the source reads no landmarks in texts")
        config = CONFIGS[target](**fields)
    config.architectures = ["DrtForCausalLM" if target == "drt" else "InsNextForInsertionLM"]
    return config


def convert_tensors(
    family: Family,
    source: dict[str, torch.Tensor],
    source_config,
    target: str,
    seed: int = 0,
    memory: str | None = None,
    **options,
) -> Converted:
    """Return a model of ours with a source's weights.

    Args:
        family: The source's family.
        source: All tensors of the source.
        source_config: Its configuration.
        target: `"insnext"` or `"drt"`.
        seed: Of the tensors that are new.
        memory: How a DRT's memory begins, `"copy"` or `"fresh"` (see memory); `None`: a DRT that sees what its source
            sees.
        **options: Fields of our configuration in the place of what the source's says; `retrieval_groups` without
            `num_lower_layers` leaves the other layers to the lower ones.

    Raises:
        ValueError: If the target is none of the family's, the configuration cannot be expressed, or a tensor has no
            rule, is missing, mis-shaped, not finite or of another dtype than the rest, or two have one name.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    config = our_config(family, source_config, target, options, memory)
    table = family.table_for(target)
    names = unique((family.rename(name, source_config), name) for name in source)
    origin = origins(table, names)
    check_values({name: source[name] for name in dict.fromkeys(origin.values())})
    made = apply_table(table, family.prepare({name: source[old] for name, old in names.items()}, source_config))
    head = made.pop(HEAD, None) if config.tie_word_embeddings else None
    shapes = expected_shapes(config)
    patterns = family.new(source_config, target)
    new = [name for name in shapes if any(fnmatchcase(name, pattern) for pattern in patterns)]
    origin = {**sources_of(table, [*made, *shapes]), **origin}
    _check_sources(origin, made, {name: shape for name, shape in shapes.items() if name not in new})
    if head is not None and not torch.equal(head, made[EMBEDDING]):
        raise ValueError("a tied head must be the embedding (tie_word_embeddings=True), got another one")
    config.dtype = made[EMBEDDING].dtype
    begun = new_tensors(config, new, seed, config.dtype)
    if memory == "copy":
        begun |= copied(config, made)
    return Converted(config, {**made, **begun}, new)


def _check_sources(origin: dict[str, str], made: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Check what was made against what must be, in the source's names; what is missing has its name in the table."""
    missing = {origin.get(name, name) for name in shapes if name not in made}
    extra = {origin[name] for name in made if name not in shapes}
    wrong = {
        f"{origin[name]} ({name} would be {list(made[name].shape)}, must be {list(shape)})"
        for name, shape in shapes.items()
        if name in made and tuple(made[name].shape) != shape
    }
    for kind, names in (("missing", missing), ("extra", extra), ("mis-shaped", wrong)):
        if names:
            raise ValueError(
                f"the source's tensors must be those of its configuration, got {len(names)} {kind}: {named(names)}"
            )


def convert_back(
    family: Family, tensors: dict[str, torch.Tensor], config: PreTrainedConfig, model_type: str
) -> Converted:
    """Return the source's model with the weights of one of ours; its `new` lists what is left out.

    That is retrieval, or where an insertion model writes and stops.

    Raises:
        ValueError: If the family has no model of this shape, a tensor has no way back, or slots of an insertion model
            are no longer their left neighbours.
    """
    ours = config.model_type
    if family.backward is None or ours not in family.returns:
        raise ValueError(f"only {' or '.join(family.returns)} goes back to {family.name}, got model_type={ours!r}")
    with refusing(f"the configuration must be one of {family.name}"):
        source_config = family.backward(config, model_type)
        plain = {"num_lower_layers": config.num_hidden_layers, "retrieval_groups": []} if ours == "drt" else {}
        twin = CONFIGS[ours](**{**family.fields(source_config, ours), **plain})
    for name in FORM:
        is_, must = getattr(config, name, None), getattr(twin, name, None)
        if is_ != must:
            raise ValueError(f"a {model_type} of this shape has {name}={must!r}, got a {ours} with {is_!r}")
    if ours == "drt" and config.sliding_window is not None and config.sliding_window < twin.sliding_window:
        raise ValueError(
            f"a {model_type} of this shape sees {twin.sliding_window} tokens, got a drt with "
            f"sliding_window={config.sliding_window}"
        )
    if ours == "drt" and config.num_sink_tokens and not twin.num_sink_tokens:
        raise ValueError(f"a {model_type} of this shape has no sinks, got num_sink_tokens={config.num_sink_tokens}")
    patterns = family.new(source_config, ours)
    dropped = [name for name in tensors if any(fnmatchcase(name, pattern) for pattern in patterns)]
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    check_values(kept)
    if ours == "insnext":
        _check_slots(tensors)
    source = apply_back(family.table_for(ours), kept)
    source_config.dtype = kept[EMBEDDING].dtype
    return Converted(source_config, source, dropped)


def _check_slots(tensors: dict[str, torch.Tensor]) -> None:
    """Raise a `ValueError` unless the token in a slot is read off its left neighbour alone, as in the source."""
    for pattern, begin in {**SIDES, "model.norm.weight": torch.ones_like}.items():
        weight = tensors.get(pattern)
        if weight is not None and not torch.equal(weight, begin(weight)):
            raise ValueError(
                f"only an insertion model whose slots are their left neighbours goes back, got {pattern} that was "
                "trained: it has no place in the source"
            )


def with_prefix(source: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], prefix: str) -> dict:
    """Return tensors of a table without `prefix` under the names that a model has."""
    return {name if name in shapes else prefix + name: tensor for name, tensor in source.items()}


def convert_folder(family: Family, source: str, destination: str, target: str, **options) -> Converted:
    """Convert a checkpoint and write it.

    Args:
        family: The source's family.
        source: Its folder.
        destination: New folder.
        target: `"insnext"`, `"drt"`, or a model type of the family, to go back.
        **options: See :func:`convert_tensors`.

    Raises:
        ValueError: See :func:`convert_tensors`; nothing is written then.
    """
    new_folder(destination)
    going_back = target in family.model_types
    config = (read_config if going_back else family.read)(source)
    if going_back:
        converted = convert_back(family, read_tensors(source), config, target)
        shapes = expected_shapes(converted.config)
        prefix = skeleton(converted.config).base_model_prefix + "."
        converted = converted._replace(tensors=with_prefix(converted.tensors, shapes, prefix))
    else:
        check_family(family, config, source)
        converted = convert_tensors(family, read_tensors(family.weights(source)), config, target, **options)
    tokenizer = read_tokenizer(source)
    if target == "insnext":
        # writing by insertion has other options
        generation = None
        if tokenizer is not None:
            converted, tokenizer = with_structure(converted, tokenizer, options)
    else:
        generation = carried_generation(source, converted.config, options)
    write_checkpoint(destination, converted.config, converted.tensors, tokenizer, generation)
    return converted


def with_structure(converted: Converted, tokenizer, given: dict):
    """Return an insertion model and its tokenizer with the tokens that frame its texts; see structure."""
    config = converted.config
    own = {name: getattr(config, name) for name in TOKEN_OPTIONS}
    ids = structure_ids(tokenizer, own, given)
    for name, index in ids.items():
        setattr(config, name, index)
    check_ids(config, config.vocab_size)
    return converted, framed(tokenizer, ids)


def carried_generation(source: str, config: PreTrainedConfig, options: dict) -> GenerationConfig | None:
    """Return a source's options of generation, if it has any, with the special tokens that were given.

    Raises:
        ValueError: If a special token is not in the vocabulary.
    """
    generation = read_generation_config(source)
    for name in TOKEN_OPTIONS:
        if generation is not None and name in options:
            setattr(generation, name, options[name])
    with refusing("generation_config.json must name special tokens by their numbers"):
        check_ids(generation, config.vocab_size, "generation_config.json")
    return generation


def _groups(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",") if number]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers between commas, got {text!r}") from None


# fields of DrtConfig that a source says nothing about
DRT_OPTIONS = {
    "retrieval_groups": (
        _groups,
        "upper layers that share a retrieval, as 3,3, or none: '' (default: the upper half)",
    ),
    "chunk_size": (int, "tokens a chunk"),
    "num_retrieved_chunks": (int, "chunks a retrieval returns"),
    "sliding_window": (int, "tokens that self-attention sees (default: what the source sees)"),
    "num_sink_tokens": (int, "first tokens that stay visible (default: 1, or 0 where the source's own window rolls)"),
    "landmark_source": (str, "what stands for a chunk: mean or cls"),
    "num_encoder_layers": (int, "layers of the chunk encoder"),
    "cross_attention_layers": (
        int,
        "first layers of each group that attend to chunks (default: all; with --memory 1)",
    ),
    "residual": (str, "where what was read goes: bypass (the feed-forward) or stream (default of --memory copy)"),
}


MEMORY_HELP = "a short window and a memory, whose reading begins drawn or as a copy of self-attention; see memory.py"


def parser_of(family: Family, module: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    back = family.model_types if family.backward else ()
    parser.add_argument("source", metavar="SRC", help="folder of the checkpoint to read")
    parser.add_argument("destination", metavar="DST", help="new folder")
    parser.add_argument(
        "--to", required=True, choices=[*family.targets, *back], help="what to make; a model type of the family: back"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the tensors that are new (default: 0)")
    for name in TOKEN_OPTIONS:
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS, help="in the place of the source's")
    if "drt" in family.targets and family.backward:
        group = parser.add_argument_group("options of DRT")
        for name, (kind, text) in DRT_OPTIONS.items():
            group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)
        if family.memory is not None:
            group.add_argument("--memory", choices=BEGINNINGS, default=argparse.SUPPRESS, help=MEMORY_HELP)
    return parser


def main(family: Family, module: str, description: str, argv: list[str] | None = None) -> None:
    """Run the command line of a family; a refusal ends it with the message and status 2, and nothing is written."""
    parser = parser_of(family, module, description)
    options = vars(parser.parse_args(argv))
    source, destination, target = (options.pop(name) for name in ("source", "destination", "to"))
    if target != "drt" and (misplaced := set(options) & {*DRT_OPTIONS, "memory"}):
        parser.error(f"{named(misplaced)} need --to drt, got --to {target}")
    if target in family.model_types and (misplaced := set(options) & set(TOKEN_OPTIONS)):
        parser.error(f"{named(misplaced)} need --to {' or '.join(family.targets)}, got --to {target}")
    try:
        converted = convert_folder(family, source, destination, target, **options)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    going_back = target in family.model_types
    verb = "left out" if going_back else "new"
    kept = len(converted.tensors) - (0 if going_back else len(converted.new))
    print(f"{os.fspath(destination)}: {target}, {kept} tensors converted, {len(converted.new)} {verb}")
    for name in converted.new:
        print(f"  {verb}: {name}")
