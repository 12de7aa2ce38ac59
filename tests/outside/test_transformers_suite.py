"""Transformers' own model tests, over every class of both architectures.

`EXCLUDED` of each class names the tests that cannot hold, with the reason; one that passes fails the run.
"""

import unittest
from functools import partial
from unittest import mock

import pytest
import torch

from modeling_insnext import (
    DrtForCausalLM,
    DrtForSequenceClassification,
    DrtModel,
    InsNextForInsertionLM,
    InsNextForMultipleChoice,
    InsNextForSequenceClassification,
    InsNextForTokenClassification,
    InsNextModel,
)
from tests.support import drt, insnext
from tests.support.upstream import suite


pytestmark = pytest.mark.outside

# both files are no part of the archive
ABSENT = {".exporters.test_export": "ExportTesterMixin", ".generation.test_utils": "GenerationTesterMixin"}
common = suite("transformers", "test_modeling_common", ABSENT)
NO_GENERATION_TESTS = "generation/test_utils.py is no part of the archive"


class Tester:
    """What the suite asks of a model: a config and inputs."""

    batch_size, num_choices, is_training = 3, 2, True

    def __init__(self, tiny_config, seq_length):
        self.get_config, self.seq_length = tiny_config, seq_length
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, getattr(tiny_config(), name))

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class OwnClasses(common.ModelTesterMixin):
    """The suite over classes that `tasks` enters into the tables by which it knows what a class takes."""

    tasks = {}
    # the suite reads the year of a model off its copyright line, and leaves out those without one
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        for task, model_class in self.tasks.items():
            table = getattr(common, f"MODEL_{task}MAPPING_NAMES")
            entered = mock.patch.dict(table, {f"own {model_class.__name__}": model_class.__name__})
            entered.start()
            self.addCleanup(entered.stop)

    def test_every_exclusion_names_a_test(self):
        assert set(self.EXCLUDED) <= set(dir(self))


NOT_ROTARY = "rope_parameters are taken for a dictionary where the positions are not rotary"
TOO_LONG = "a text longer than max_position_embeddings is refused"


class InsNext(OwnClasses):
    def setUp(self):
        super().setUp()
        self.model_tester = Tester(insnext.tiny_config, seq_length=7)


class TestInsNext(InsNext, unittest.TestCase):
    tasks = {
        "": InsNextModel,
        "FOR_SEQUENCE_CLASSIFICATION_": InsNextForSequenceClassification,
        "FOR_TOKEN_CLASSIFICATION_": InsNextForTokenClassification,
        "FOR_MULTIPLE_CHOICE_": InsNextForMultipleChoice,
    }
    all_model_classes = tuple(tasks.values())
    EXCLUDED = {
        "test_model_rope_scaling_from_config_0_linear": TOO_LONG,
        "test_model_rope_scaling_from_config_1_dynamic": TOO_LONG,
        "test_model_rope_scaling_from_config_2_yarn": TOO_LONG,
        "test_model_rope_with_partial_rotation": NOT_ROTARY,
    }


class TestInsNextForInsertionLM(InsNext, unittest.TestCase):
    tasks = {"FOR_CAUSAL_LM_": InsNextForInsertionLM}
    all_model_classes = tuple(tasks.values())
    EXCLUDED = {
        "test_batching_equivalence": "structure (PAD, BOS) is no token that may follow: its logits are -inf",
        "test_generation_tester_mixin_inheritance": NO_GENERATION_TESTS,
    }

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Return labels that are tokens; the suite's own are zeros, which are padding here."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return {**inputs, "labels": inputs["input_ids"].clone()} if return_labels else inputs

    def _logits_scored_by_loss(self, model, logits):
        """Return logits whose largest and smallest are those of tokens; no label may be structure."""
        return logits.where(logits.isfinite(), logits.median(-1, keepdim=True).values)


class TestDrt(OwnClasses, unittest.TestCase):
    tasks = {
        "": DrtModel,
        "FOR_CAUSAL_LM_": DrtForCausalLM,
        "FOR_SEQUENCE_CLASSIFICATION_": DrtForSequenceClassification,
    }
    all_model_classes = tuple(tasks.values())
    # it is computed in blocks and never held
    has_attentions = False
    EXCLUDED = {
        "test_generation_tester_mixin_inheritance": NO_GENERATION_TESTS,
        "test_model_rope_with_partial_rotation": NOT_ROTARY,
    }

    def setUp(self):
        super().setUp()
        changes = {"num_lower_layers": 1, "retrieval_groups": [1], "initializer_range": 0.02}
        if "eager_matches_sdpa" in self._testMethodName:
            # the suite asks for attention maps only where `forward` names them, and sets a window of two positions,
            # which holds only chunks of one token without a landmark
            self.has_attentions = True
            changes.update(chunk_size=1, landmark_source="mean")
        self.model_tester = Tester(partial(drt.tiny_config, **changes), seq_length=19)
