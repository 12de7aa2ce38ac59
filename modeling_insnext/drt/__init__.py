"""DRT. The files are flat and import one another by one dot, so that checkpoints can carry them as remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .cache import ChunkMemoryCache
from .configuration_drt import DrtConfig
from .modeling_drt import DrtForCausalLM, DrtForSequenceClassification, DrtModel


AUTO_CLASSES = {
    AutoModel: DrtModel,
    AutoModelForCausalLM: DrtForCausalLM,
    AutoModelForSequenceClassification: DrtForSequenceClassification,
}

AutoConfig.register(DrtConfig.model_type, DrtConfig, exist_ok=True)
DrtConfig.register_for_auto_class()
for _auto_class, _model_class in AUTO_CLASSES.items():
    _auto_class.register(DrtConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto_class.__name__)

__all__ = [
    "AUTO_CLASSES",
    "ChunkMemoryCache",
    "DrtConfig",
    "DrtForCausalLM",
    "DrtForSequenceClassification",
    "DrtModel",
]
