"""Model cards: metadata that the Hub reads, usage, training, results."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..folders import read_json, refusing


PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
TAGS = {
    "insnext": ["insertion-language-model", "infilling", "constrained-generation"],
    "drt": ["retrieval", "long-context"],
}

LOAD_MODEL = """\
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = {auto_class}.from_pretrained({name}, trust_remote_code=True)
"""
LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = {auto_class}.from_pretrained({base}, trust_remote_code=True)
model = PeftModel.from_pretrained(model, {name})
"""
USE = {
    "insnext": """\
canvas = model.canvas(tokenizer, keywords=["dog", "ball", "park"])
print(tokenizer.decode(model.generate(**canvas, max_new_tokens=30)[0], skip_special_tokens=True))
""",
    "drt": """\
text = tokenizer("The old man", return_tensors="pt")
print(tokenizer.decode(model.generate(**text, max_new_tokens=30)[0], skip_special_tokens=True))
""",
}


# fields of EvalResult that are words, and those that tell one entry of the model-index from another
WORDS = ("task_type", "dataset_type", "dataset_name", "metric_type")
ENTRY = ("task_name", "dataset_name", "dataset_args", "source_name", "source_url")


def check_name(option: str, name: str | None) -> None:
    """Raise a `ValueError` that names the option unless there can be a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{option} must be a name on the Hub, got {name!r}: {error}") from None


@dataclass
class CardFacts:
    """What a card says and cannot be read off the model.

    Attributes:
        name: What readers load, `OWNER/NAME`.
        license: Identifier of the licence, as the Hub spells it.
        datasets: Names of the training sets on the Hub.
        language: Codes of the languages.
        base_model: The model that this one was made from; for an adapter the one it belongs to.
        training_command: The command that trained it.
        results: Fields of `huggingface_hub.EvalResult`, a dictionary each.
        text: Markdown in the place of the one made here; its metadata says what the other fields do not.
        metadata: Metadata of that text.

    Raises:
        ValueError: If there is no licence, the metadata cannot be read, or the base model is none of the Hub's.
    """

    name: str
    license: str | None = None
    datasets: list[str] = field(default_factory=list)
    language: list[str] = field(default_factory=list)
    base_model: str | None = None
    training_command: str | None = None
    results: list[dict] = field(default_factory=list)
    text: str | None = None
    metadata: dict = field(default_factory=dict, init=False)

    def __post_init__(self):
        if self.text:
            with refusing("a card must begin with metadata in YAML, or none"):
                card = ModelCard(self.text.strip("\ufeff \t\r\n"))
            self.text, self.metadata = card.text.strip(), card.data.to_dict()
        for name in ("license", "datasets", "language", "base_model"):
            setattr(self, name, getattr(self, name) or self.metadata.get(name))
        if not self.license:
            raise ValueError("a card needs a license, got none: give --license, or a card that names it")
        for base in self.base_model if isinstance(self.base_model, list) else [self.base_model]:
            check_name("base_model", base)
            if base is not None and Path(base).exists():
                raise ValueError(f"base_model must be a name on the Hub, got a place on this machine: {base}")

    @property
    def title(self) -> str:
        return " ".join(self.name.split("/")[-1].split())


def read_results(path: str | Path) -> list[dict]:
    """Return the results in a JSON file, a list of dictionaries.

    Raises:
        ValueError: If one has no field that `EvalResult` needs, one that it does not know or that is no word or
            number, or two of one task, data set, configuration, split and revision are not of one name and source.
    """
    rows, entries = read_json(path), {}
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of results, an object each, got {str(rows)[:80]}")
    for row in rows:
        with refusing(f"a result must have the fields of huggingface_hub.EvalResult: {row}"):
            result = EvalResult(**row)
        if wrong := [name for name in WORDS if not isinstance(row[name], str)]:
            raise ValueError(f"a result must have words in {', '.join(wrong)}, got {row}")
        value = result.metric_value
        if not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"metric_value must be a finite number or a text, got {row}")
        said = [getattr(result, name) for name in ENTRY]
        if entries.setdefault(result.unique_identifier, said) != said:
            raise ValueError(
                f"results of one task, data set, configuration, split and revision must agree in {', '.join(ENTRY)}, "
                f"got {row}: give each a dataset_config"
            )
    return rows


def model_card(facts: CardFacts, model_type: str, auto_class: str, adapter: str | None, parameters: int) -> ModelCard:
    """Return the card.

    Args:
        facts: What it says beside the rest.
        model_type: Of the model, or of the base of the adapter.
        auto_class: Name of the Auto class that loads it.
        adapter: PEFT's name for the kind of adapter; `None` for a model.
        parameters: How many it has.
    """
    tags = [model_type, *TAGS[model_type], adapter or "custom_code"]
    fields = {
        **facts.metadata,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": PIPELINE_TAGS[auto_class],
        "license": facts.license,
        "base_model": facts.base_model,
        "datasets": facts.datasets,
        "language": facts.language,
        "tags": list(dict.fromkeys([*tags, *facts.metadata.get("tags", ())])),
    }
    if facts.results:
        fields.pop("model-index", None)
        fields |= {"model_name": facts.title, "eval_results": [EvalResult(**row) for row in facts.results]}
    body = facts.text or _body(facts, model_type, auto_class, adapter, parameters)
    return ModelCard(f"---\n{ModelCardData(**fields).to_yaml()}\n---\n\n{body}\n")


def _body(facts: CardFacts, model_type: str, auto_class: str, adapter: str | None, parameters: int) -> str:
    name, base = (json.dumps(text, ensure_ascii=False) for text in (facts.name, facts.base_model))
    loading = (LOAD_ADAPTER if adapter else LOAD_MODEL).format(auto_class=auto_class, name=name, base=base)
    use = USE[model_type] if auto_class == "AutoModelForCausalLM" else ""
    kind = {"insnext": "An insertion language model (InsNeXt)", "drt": "A retrieval language model (DRT)"}[model_type]
    what = f"An adapter ({adapter}) of {facts.base_model}" if adapter else kind
    parts = [f"# {facts.title}", f"{what}, {parameters:,} parameters.", f"```python\n{loading}{use}```"]
    if facts.training_command:
        # longer than any fence in the command
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", facts.training_command)), default=0))
        parts += ["## Training", f"{fence}\n{facts.training_command}\n{fence}"]
    if facts.results:
        keys = ("dataset_name", "dataset_split", "metric_name", "metric_value")
        rows = [[{"metric_name": row["metric_type"], **row}.get(key) for key in keys] for row in facts.results]
        lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
        parts += ["## Results", "\n".join(["| data | split | metric | value |", "|---|---|---|---|", *lines])]
    return "\n\n".join(parts)


def _cell(value) -> str:
    """Return a value as it stands in a table of Markdown: on one line, its bars escaped."""
    return " ".join(str("" if value is None else value).split()).replace("|", "\\|")
