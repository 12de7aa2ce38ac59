"""Which model is served."""

import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_insnext import DrtConfig, InsNextConfig


logger = logging.getLogger("uvicorn.error")
CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
# without --model: an adapter whose base may be out of reach, then what is always there
DEFAULT, LAST_RESORT = CHECKPOINTS / "insnext-smol", CHECKPOINTS / "insnext-mini"


def load(folder: str | None, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Return a model that is ready to write, its tokenizer and its name, which is that of the folder.

    Args:
        folder: Folder of an InsNeXt, of a DRT, or of an adapter of our SmolLM2; None: `insnext-smol`, or where that
            cannot be had `insnext-mini`, and a line that says why.
        dtype: Of the weights.

    Raises:
        ValueError: If the folder is missing or holds another kind of model.
    """
    if folder is not None:
        return _load(Path(folder), dtype)
    if DEFAULT.is_dir():
        try:
            return _load(DEFAULT, dtype)
        except (ImportError, OSError) as error:
            logger.warning("%s is served: %s cannot be had (%s)", LAST_RESORT.name, DEFAULT.name, error)
    return _load(LAST_RESORT, dtype)


def _load(path: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    if not path.is_dir():
        raise ValueError(f"model must be a folder, got {str(path)!r}")
    source = path
    if (path / "adapter_config.json").is_file():
        from conversion.smollm2 import adapted

        source = adapted(path)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
    if not isinstance(model.config, (InsNextConfig, DrtConfig)):
        raise ValueError(f"the model must be an InsNeXt or a DRT, got {model.config.model_type!r} in {str(path)!r}")
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model, tokenizer, path.resolve().name
