"""Insertion language models for Hugging Face Transformers. Importing it registers the Auto classes."""

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
