"""What every conversion does: read, rename, make what is new, check, write; and the command line around it."""

import argparse
import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from modeling_insnext import DrtConfig, InsNextConfig

from .checkpoint import expected_shapes, named, read_config, read_tensors, skeleton, write_checkpoint
from .tables import Table, apply_back, apply_table, sources_of


CONFIGS = {"insnext": InsNextConfig, "drt": DrtConfig}

# tensors that no source has, as patterns: drawn as in a new model, but that cross-attention adds nothing at first
NEW = {
    "insnext": ("slot_head.*",),
    "drt": ("model.layers.*.cross_attn.*", "model.encoder.*", "model.query_norms.*"),
}
SILENT = "model.layers.*.cross_attn.o_proj.weight"

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
        new: Maps configuration and target to patterns of the tensors that are new.
        prepare: Maps tensors and configuration to the tensors under the names of the table.
        read: Reads the configuration from the folder.
        weights: Maps the folder to what :func:`checkpoint.read_tensors` reads.
        backward: Maps our configuration and a model type to the source's configuration; `None`: no way back.
    """

    name: str
    model_types: tuple[str, ...]
    targets: tuple[str, ...]
    table: Table
    fields: Callable[[PreTrainedConfig, str], dict]
    without: dict[str, tuple[str, ...]] = {}
    new: Callable[[PreTrainedConfig, str], tuple[str, ...]] = lambda config, target: NEW[target]
    prepare: Callable[[dict, PreTrainedConfig], dict] = lambda tensors, config: tensors
    read: Callable[[str], PreTrainedConfig] = read_config
    weights: Callable[[str], str] = str
    backward: Callable[[DrtConfig, str], PreTrainedConfig] | None = None

    def table_for(self, target: str) -> Table:
        left_out = self.without.get(target, ())
        return {name: None if name in left_out else entry for name, entry in self.table.items()}


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
    return {name: torch.zeros_like(x) if fnmatchcase(name, SILENT) else x for name, x in made.items()}


def convert_tensors(
    family: Family, source: dict[str, torch.Tensor], source_config, target: str, seed: int = 0, **options
) -> Converted:
    """Return a model of ours with a source's weights.

    Args:
        family: The source's family.
        source: All tensors of the source.
        source_config: Its configuration.
        target: `"insnext"` or `"drt"`.
        seed: Of the tensors that are new.
        **options: Fields of our configuration in the place of what the source's says.

    Raises:
        ValueError: If the target is none of the family's, the configuration cannot be expressed, or a tensor has no
            rule, is missing, mis-shaped or not finite.
    """
    if target not in family.targets:
        raise ValueError(f"{family.name} becomes one of {family.targets}, got {target!r}")
    config = CONFIGS[target](**{**family.fields(source_config, target), **options})
    config.architectures = ["DrtForCausalLM" if target == "drt" else "InsNextForInsertionLM"]
    table, prepared = family.table_for(target), family.prepare(source, source_config)
    made = apply_table(table, prepared)
    head = made.pop(HEAD, None) if config.tie_word_embeddings else None
    shapes = expected_shapes(config)
    patterns = family.new(source_config, target)
    new = [name for name in shapes if any(fnmatchcase(name, pattern) for pattern in patterns)]
    _check_sources(table, made, {name: shape for name, shape in shapes.items() if name not in new})
    if head is not None and not torch.equal(head, made[EMBEDDING]):
        raise ValueError("a tied head must be the embedding (tie_word_embeddings=True), got another one")
    config.dtype = made[EMBEDDING].dtype
    return Converted(config, {**made, **new_tensors(config, new, seed, config.dtype)}, new)


def _check_sources(table: Table, made: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Check what was made against what must be, in the source's names."""
    origin = sources_of(table, [*made, *shapes])
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


def convert_back(family: Family, tensors: dict[str, torch.Tensor], config: DrtConfig, model_type: str) -> Converted:
    """Return the source's model with the weights of a DRT; its `new` lists what is left out, all of it retrieval.

    Raises:
        ValueError: If the family has no model of this shape, or a tensor has no way back.
    """
    if family.backward is None or config.model_type != "drt":
        raise ValueError(f"only DRT goes back to {family.name}, got model_type={config.model_type!r}")
    source_config = family.backward(config, model_type)
    twin = DrtConfig(**{**family.fields(source_config, "drt"), "chunk_size": 1})
    for name in FORM:
        ours, theirs = getattr(config, name), getattr(twin, name)
        if ours != theirs:
            raise ValueError(f"a {model_type} of this shape has {name}={theirs!r}, got a DRT with {ours!r}")
    if config.sliding_window is not None and config.sliding_window < twin.sliding_window:
        raise ValueError(
            f"a {model_type} of this shape sees {twin.sliding_window} tokens, got a DRT with "
            f"sliding_window={config.sliding_window}"
        )
    dropped = [name for name in tensors if any(fnmatchcase(name, pattern) for pattern in NEW["drt"])]
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    source = apply_back(family.table, kept)
    source_config.dtype = kept[EMBEDDING].dtype
    return Converted(source_config, source, dropped)


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
    if target in family.model_types:
        config = read_config(source)
        converted = convert_back(family, read_tensors(source), config, target)
        shapes = expected_shapes(converted.config)
        prefix = skeleton(converted.config).base_model_prefix + "."
        converted = converted._replace(tensors=with_prefix(converted.tensors, shapes, prefix))
    else:
        config = family.read(source)
        check_family(family, config, source)
        converted = convert_tensors(family, read_tensors(family.weights(source)), config, target, **options)
    write_checkpoint(destination, converted.config, converted.tensors, copy_from=source)
    return converted


def _groups(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


# fields of DrtConfig that a source says nothing about
DRT_OPTIONS = {
    "retrieval_groups": (_groups, "numbers of upper layers that share a retrieval, as 3,3 (default: the upper half)"),
    "chunk_size": (int, "tokens a chunk"),
    "num_retrieved_chunks": (int, "chunks a retrieval returns"),
    "sliding_window": (int, "tokens that self-attention sees (default: what the source sees)"),
    "landmark_source": (str, "what stands for a chunk: mean or cls"),
    "num_encoder_layers": (int, "layers of the chunk encoder"),
}


# ids that a source may not name
TOKEN_OPTIONS = ("pad_token_id", "bos_token_id", "eos_token_id")


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
    return parser


def main(family: Family, module: str, description: str, argv: list[str] | None = None) -> None:
    """Run the command line of a family; a refusal ends it with the message and status 2, and nothing is written."""
    parser = parser_of(family, module, description)
    options = vars(parser.parse_args(argv))
    source, destination, target = (options.pop(name) for name in ("source", "destination", "to"))
    if target != "drt" and (misplaced := set(options) & set(DRT_OPTIONS)):
        parser.error(f"{named(misplaced)} need --to drt, got --to {target}")
    if target in family.model_types:
        options = {}
    try:
        converted = convert_folder(family, source, destination, target, **options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    going_back = target in family.model_types
    verb = "left out" if going_back else "new"
    kept = len(converted.tensors) - (0 if going_back else len(converted.new))
    print(f"{os.fspath(destination)}: {target}, {kept} tensors converted, {len(converted.new)} {verb}")
    for name in converted.new:
        print(f"  {verb}: {name}")
