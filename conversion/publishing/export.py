"""Makes a folder for the Hub out of a trained model or adapter, verifies it, and pushes it.

    python -m conversion.publishing.export runs/mini exported/mini --license apache-2.0 --datasets allenai/common_gen
    python -m conversion.publishing.export runs/lora exported/lora --license apache-2.0 --base_model OWNER/MINI \\
        --push OWNER/LORA

The folder holds code, weights, tokenizer, generation config and a card. It appears only once a clean process, which
cannot import this package, has loaded it and found the same logits, tokens and ids; what was pushed is verified
likewise.
"""

import argparse
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..checkpoint import check_folder, check_tensors, model_class, read_config, read_tensors
from ..folders import appearing, new_folder, read_fields, refusing, save_tokenizer, write_fields
from .card import TAGS, CardFacts, check_name, model_card, read_results
from .verification import VerificationError, verify


@dataclass
class Exported:
    """A model or adapter as it was read.

    Attributes:
        model: The model, under its adapter if there is one, on the CPU, in evaluation mode.
        tokenizer: Its tokenizer.
        auto_class: Name of the Auto class that loads it; of an adapter, that loads its base.
        is_adapter: Whether the folder is an adapter's.
        extra: Files beside it that go into the folder as they are.
    """

    model: torch.nn.Module
    tokenizer: object
    auto_class: str
    is_adapter: bool
    extra: list[Path] = field(default_factory=list)


def read_model(source: Path):
    """Return a model of either architecture and the name of its Auto class.

    Raises:
        ValueError: If the folder holds another architecture, or its tensors are not those of the model.
    """
    config = read_config(source)
    loader = model_class(config) if config.model_type in TAGS else None
    if loader is None or loader._auto_class is None:
        raise ValueError(
            f"{source} must hold a model of this package, got model_type={config.model_type!r} "
            f"(architectures={config.architectures})"
        )
    check_folder(source)
    return loader.from_pretrained(source, dtype="auto").eval(), loader._auto_class


def load_base(adapter: PeftConfig):
    """Return the language model that an adapter was trained on."""
    return AutoModelForCausalLM.from_pretrained(adapter.base_model_name_or_path, dtype="auto", trust_remote_code=True)


def read_adapter(source: Path):
    """Return a language model under an adapter and the name of the Auto class of its base.

    Raises:
        ValueError: If the adapter is for another task, or its tensors are not those of its configuration.
    """
    with refusing(f"{source}/adapter_config.json must be a configuration of PEFT"):
        config = PeftConfig.from_pretrained(source)
    if config.task_type != "CAUSAL_LM":
        raise ValueError(
            f'an adapter must have task_type="CAUSAL_LM", got {config.task_type!r}: merge it, then export the model'
        )
    fresh = get_peft_model_state_dict(get_peft_model(load_base(config), config))
    tensors = read_tensors(source / "adapter_model.safetensors")
    check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in fresh.items()})
    return PeftModel.from_pretrained(load_base(config), source).eval(), "AutoModelForCausalLM"


def read(source: str | Path, tokenizer: str | None = None, include: list[str] = ()) -> Exported:
    """Read a folder.

    Args:
        source: Folder of a model or adapter.
        tokenizer: Where its tokenizer is, if not beside it.
        include: Names of further files beside it.

    Raises:
        ValueError: If a file is missing or elsewhere, tensors are not those of the model, or ids of the tokenizer lie
            outside its vocabulary.
    """
    source = Path(source)
    if elsewhere := [name for name in include if Path(name).name != name]:
        raise ValueError(f"further files must stand beside the model and be named without folders, got {elsewhere}")
    missing = [name for name in include if not (source / name).is_file()]
    if missing or not source.is_dir():
        raise ValueError(f"{source} must be a folder that holds {', '.join(include) or 'a model'}, missing: {missing}")
    is_adapter = (source / "adapter_config.json").exists()
    model, auto_class = (read_adapter if is_adapter else read_model)(source)
    tokens = AutoTokenizer.from_pretrained(tokenizer or source, trust_remote_code=False)
    if len(tokens) > model.config.vocab_size:
        raise ValueError(f"the model has {model.config.vocab_size} ids, fewer than its tokenizer's {len(tokens)}")
    return Exported(model, tokens, auto_class, is_adapter, [source / name for name in include])


def write(exported: Exported, folder: Path, facts: CardFacts) -> None:
    """Write code, weights, tokenizer, generation config, card and further files into an empty folder.

    Raises:
        ValueError: If a further file has the name of one of the others.
    """
    model, adapter = exported.model, None
    weights = dict(model.named_parameters())
    if exported.is_adapter:
        adapter, weights = model.peft_config["default"].peft_type.lower(), get_peft_model_state_dict(model)
    parameters = sum(weight.numel() for weight in weights.values())
    card = model_card(facts, model.config.model_type, exported.auto_class, adapter, parameters)
    model.save_pretrained(folder)
    if exported.is_adapter:
        # the folder it was trained on is on this machine only
        path = folder / "adapter_config.json"
        write_fields(path, {**read_fields(path), "base_model_name_or_path": facts.base_model})
    save_tokenizer(exported.tokenizer, folder)
    card.save(folder / "README.md")
    if taken := [path.name for path in exported.extra if (folder / path.name).exists()]:
        raise ValueError(f"further files must have other names than what is written, got {', '.join(taken)}")
    for path in exported.extra:
        shutil.copy2(path, folder / path.name)


def verify_folder(exported: Exported, folder: Path) -> None:
    """Verify a folder; an adapter on a copy of its base that carries the code."""
    arguments = (exported.model, exported.tokenizer, exported.auto_class, folder)
    if not exported.is_adapter:
        return verify(*arguments)
    with tempfile.TemporaryDirectory() as base:
        load_base(exported.model.peft_config["default"]).save_pretrained(base)
        return verify(*arguments, base=base)


def export(exported: Exported, target: str | Path, facts: CardFacts) -> Path:
    """Write a folder that a clean process has verified.

    Args:
        exported: What `read` returned.
        target: Folder to make; it must not exist, or be empty.
        facts: For the card.

    Raises:
        ValueError: If the folder is not empty, or an adapter has not one base model on the Hub.
        VerificationError: If the clean process finds something else. Nothing is written then.
    """
    if exported.is_adapter and not isinstance(facts.base_model, str):
        raise ValueError(
            f"an adapter needs the name of its base model on the Hub, got {facts.base_model}: give --base_model"
        )
    with appearing(target) as made:
        write(exported, made, facts)
        verify_folder(exported, made)
    return Path(target)


def push(exported: Exported, folder: str | Path, facts: CardFacts, private: bool = False) -> str:
    """Push a folder in one commit, verify what arrived, and return the commit's address.

    Raises:
        VerificationError: If what arrived does not load, or says something else; the message names the commit.
    """
    api = HfApi()
    api.create_repo(facts.name, private=private, exist_ok=True)
    commit = api.upload_folder(repo_id=facts.name, folder_path=folder, commit_message="Export of modeling_insnext")
    base = facts.base_model if exported.is_adapter else None
    arguments = (exported.model, exported.tokenizer, exported.auto_class, facts.name)
    try:
        verify(*arguments, base=base, revision=commit.oid, offline=False)
    except VerificationError as error:
        raise VerificationError(f"commit {commit.oid} of {facts.name} was pushed and is faulty: {error}") from None
    return commit.commit_url


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m conversion.publishing.export", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="Folder of a model or of a PEFT adapter.")
    parser.add_argument("target", help="Folder to make.")
    parser.add_argument("--license", help="Identifier, as apache-2.0; needed unless the card names it.")
    parser.add_argument("--datasets", nargs="*", default=[], help="Training sets, by their names on the Hub.")
    parser.add_argument("--language", nargs="*", default=[], help="Codes, as en.")
    parser.add_argument("--base_model", help="Name on the Hub; needed for an adapter.")
    parser.add_argument("--training_command", help="What trained it, for the card.")
    parser.add_argument(
        "--results", help="JSON: a list of dictionaries with the fields of huggingface_hub.EvalResult."
    )
    parser.add_argument(
        "--card", help="Markdown in the place of the generated text; its metadata is kept and completed."
    )
    parser.add_argument("--tokenizer", help="Where the tokenizer is, if not in the source.")
    parser.add_argument("--include", nargs="*", default=[], help="Further files of the source.")
    parser.add_argument("--push", metavar="OWNER/NAME", help="Push there, then verify what arrived.")
    parser.add_argument("--private", action="store_true", help="Make the repository private if it is new.")
    return parser


def card_facts(args: argparse.Namespace) -> CardFacts:
    """Return what the command line says of a model.

    Raises:
        ValueError: See :class:`CardFacts`; or if there can be no repository of that name.
    """
    if args.push is not None:
        check_name("--push", args.push)
        if "/" not in args.push:
            raise ValueError(f"--push must be OWNER/NAME, got {args.push}")
    return CardFacts(
        name=args.push or f"OWNER/{new_folder(args.target).name}",
        license=args.license,
        datasets=args.datasets,
        language=args.language,
        base_model=args.base_model,
        training_command=args.training_command,
        results=read_results(args.results) if args.results else [],
        text=Path(args.card).read_text(encoding="utf-8") if args.card else None,
    )


def run(args: argparse.Namespace) -> None:
    """Export what the command line names, and say what was written."""
    new_folder(args.target)
    facts = card_facts(args)
    exported = read(args.source, args.tokenizer, args.include)
    folder = export(exported, args.target, facts)
    print(f"{folder}: loads by itself, same logits, tokens and ids")
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:>14,}  {path.name}")
    if args.push:
        print(f"pushed and verified: {push(exported, folder, facts, args.private)}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a refusal ends it with the message and status 2, and nothing is written."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        run(args)
    except (ValueError, OSError, VerificationError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
