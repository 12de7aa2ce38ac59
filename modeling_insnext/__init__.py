"""Insertion and retrieval language models for Transformers. Importing it registers the Auto classes."""

from .drt import ChunkMemoryCache, DrtConfig, DrtForCausalLM, DrtForSequenceClassification, DrtModel
from .insnext import (
    InsertionCache,
    InsertionGenerationConfig,
    InsertionTrace,
    InsNextConfig,
    InsNextForInsertionLM,
    InsNextForMultipleChoice,
    InsNextForSequenceClassification,
    InsNextForTokenClassification,
    InsNextModel,
)


__version__ = "0.1.0"

__all__ = [
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
]
