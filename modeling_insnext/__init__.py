"""Insertion and retrieval language models for Transformers. Importing it registers the Auto classes."""

from .drt import ChunkMemoryCache, DrtConfig, DrtForCausalLM, DrtForSequenceClassification, DrtModel
from .insnext import (
    Canvas,
    InsertionCache,
    InsertionGenerationConfig,
    InsertionTrace,
    InsNextConfig,
    InsNextForInsertionLM,
    InsNextForMultipleChoice,
    InsNextForSequenceClassification,
    InsNextForTokenClassification,
    InsNextModel,
    build_canvas,
)


__version__ = "0.1.0"

__all__ = [
    "Canvas",
    "ChunkMemoryCache",
    "DrtConfig",
    "DrtForCausalLM",
    "DrtForSequenceClassification",
    "DrtModel",
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
