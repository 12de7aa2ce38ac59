"""InsNeXt. The files are flat and import one another by one dot, so that checkpoints can carry them as remote code."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache import InsertionCache
from .canvas import Canvas
from .canvas_text import build_canvas
from .configuration_insnext import InsNextConfig
from .generation_configuration import InsertionGenerationConfig
from .modeling_insnext import (
    InsNextForInsertionLM,
    InsNextForMultipleChoice,
    InsNextForSequenceClassification,
    InsNextForTokenClassification,
    InsNextModel,
)
from .trace import InsertionTrace


AUTO_CLASSES = {
    AutoModel: InsNextModel,
    AutoModelForCausalLM: InsNextForInsertionLM,
    AutoModelForMultipleChoice: InsNextForMultipleChoice,
    AutoModelForSequenceClassification: InsNextForSequenceClassification,
    AutoModelForTokenClassification: InsNextForTokenClassification,
}

AutoConfig.register(InsNextConfig.model_type, InsNextConfig, exist_ok=True)
InsNextConfig.register_for_auto_class()
for _auto_class, _model_class in AUTO_CLASSES.items():
    _auto_class.register(InsNextConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto_class.__name__)

__all__ = [
    "AUTO_CLASSES",
    "Canvas",
    "InsNextConfig",
    "InsNextForInsertionLM",
    "InsNextForMultipleChoice",
    "InsNextForSequenceClassification",
    "InsNextForTokenClassification",
    "InsNextModel",
    "InsertionCache",
    "InsertionGenerationConfig",
    "InsertionTrace",
    "build_canvas",
]
