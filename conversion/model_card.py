"""Model cards: metadata that the Hub reads, usage, training, results."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData


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

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
"""
LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {auto_class}.from_pretrained("{base}", trust_remote_code=True)
model = PeftModel.from_pretrained(model, "{name}")
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
        text: Markdown in the place of the one made here.
    """

    name: str
    license: str | None = None
    datasets: list[str] = field(default_factory=list)
    language: list[str] = field(default_factory=list)
    base_model: str | None = None
    training_command: str | None = None
    results: list[dict] = field(default_factory=list)
    text: str | None = None


def read_results(path: str | Path) -> list[dict]:
    """Return the results in a JSON file, a list of dictionaries.

    Raises:
        ValueError: If one has no field that `EvalResult` needs, or one that it does not know.
    """
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    for row in rows:
        try:
            EvalResult(**row)
        except TypeError as error:
            raise ValueError(
                f"a result must have the fields of huggingface_hub.EvalResult, got {row}: {error}"
            ) from None
    return rows


def model_card(facts: CardFacts, model_type: str, auto_class: str, adapter: bool, parameters: int) -> ModelCard:
    """Return the card.

    Raises:
        ValueError: If there is no licence, or an adapter has no base model.
    """
    written = ModelCard(facts.text).data.to_dict() if facts.text and facts.text.startswith("---") else {}
    license_name = facts.license or written.get("license")
    base_model = facts.base_model or written.get("base_model")
    if not license_name:
        raise ValueError("a card needs a license, got none: give --license, or a card that names it")
    if adapter and not base_model:
        raise ValueError("an adapter needs the name of its base model on the Hub, got none: give --base_model")
    tags = [model_type, *TAGS[model_type], "lora" if adapter else "custom_code"]
    fields = {
        **written,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": PIPELINE_TAGS[auto_class],
        "license": license_name,
        "base_model": base_model,
        "datasets": facts.datasets or written.get("datasets"),
        "language": facts.language or written.get("language"),
        "tags": list(dict.fromkeys([*tags, *written.get("tags", ())])),
    }
    if facts.results:
        fields.pop("model-index", None)
        fields |= {"model_name": facts.name, "eval_results": [EvalResult(**row) for row in facts.results]}
    data = ModelCardData(**fields)
    if facts.text:
        body = ModelCard(facts.text, ignore_metadata_errors=True).text.strip()
    else:
        body = _body(facts, model_type, auto_class, adapter, parameters)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _body(facts: CardFacts, model_type: str, auto_class: str, adapter: bool, parameters: int) -> str:
    loading = (LOAD_ADAPTER if adapter else LOAD_MODEL).format(
        auto_class=auto_class, name=facts.name, base=facts.base_model
    )
    use = USE[model_type] if auto_class == "AutoModelForCausalLM" else ""
    kind = {"insnext": "An insertion language model (InsNeXt)", "drt": "A retrieval language model (DRT)"}[model_type]
    what = f"An adapter of {facts.base_model}" if adapter else kind
    parts = [
        f"# {facts.name.split('/')[-1]}",
        f"{what}, {parameters:,} parameters.",
        f"```python\n{loading}{use}```",
    ]
    if facts.training_command:
        parts += ["## Training", f"```\n{facts.training_command}\n```"]
    if facts.results:
        rows = [
            f"| {row['dataset_name']} | {row.get('dataset_split') or ''} | "
            f"{row.get('metric_name') or row['metric_type']} | {row['metric_value']} |"
            for row in facts.results
        ]
        parts += ["## Results", "\n".join(["| data | split | metric | value |", "|---|---|---|---|", *rows])]
    return "\n\n".join(parts)
