"""PEFT's common tests, with the adapters that people put on these models.

`EXCLUDED` of each class names the tests that cannot hold, with the reason; one that passes fails the run.
"""

from functools import partial

import peft
import pytest
import torch

from modeling_insnext import DrtForCausalLM, InsNextForInsertionLM
from tests.support import drt, insnext
from tests.support.upstream import suite


pytestmark = pytest.mark.outside

common = suite("peft", "testing_common", {"diffusers": "StableDiffusionPipeline"})
set_init_weights_false = suite("peft", "testing_utils", {}).set_init_weights_false

METHODS = {
    "lora": (peft.LoraConfig, {"r": 8, "lora_alpha": 32}),
    "dora": (peft.LoraConfig, {"r": 8, "lora_alpha": 32, "use_dora": True}),
    "ia3": (peft.IA3Config, {}),
    "prompt_tuning": (peft.PromptTuningConfig, {"num_virtual_tokens": 4}),
}
TESTS = [name.removeprefix("_test_") for name in dir(common.PeftCommonTester) if name.startswith("_test_")]
# the values of what a test asks for beside a model and an adapter
OPTIONS = {
    "add_adapter_no_autocast_adapter_dtype": {"dtype": torch.bfloat16},
    "generate_pos_args": {"raises_err": False},
    "passing_input_embeds_works": {"test_name": ""},
}
# of one method, called by the test of all
PARTS = {"weighted_combination_of_adapters_ia3", "weighted_combination_of_adapters_lora"}
# an adapter that is still the identity would show nothing
TRAINED = {
    "disable_adapter",
    "generate_with_mixed_adapter_batches_and_beam_search",
    "lora_conversion",
    "merge_layers",
    "merge_layers_is_idempotent",
    "merge_layers_multi",
    "merge_layers_nan",
    "mixed_adapter_batches",
    "safe_merge",
    "save_pretrained",
    "save_pretrained_adapter_name_substring",
    "save_pretrained_selected_adapters",
    "unload_adapter",
    "weighted_combination_of_adapters",
}


class Suite(common.PeftCommonTester):
    """The common tests over a folder that `make_model` saves."""

    def prepare_inputs_for_testing(self):
        ids = torch.tensor(self.rows)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    @pytest.fixture(scope="class")
    def folder(self, request, tmp_path_factory):
        folder = tmp_path_factory.mktemp("model")
        request.cls.make_model().save_pretrained(folder)
        return str(folder)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("test", sorted(set(TESTS) - PARTS))
    def test_peft(self, test, method, folder):
        adapter, options = METHODS[method]
        options = {"task_type": "CAUSAL_LM", **options}
        if test in TRAINED:
            options = set_init_weights_false(adapter, options)
        arguments = {"model_id": folder, "config_cls": adapter, "config_kwargs": options, **OPTIONS.get(test, {})}
        getattr(self, f"_test_{test}")(**arguments)

    def test_every_exclusion_names_a_test(self):
        names = {f"test_peft[{test}-{method}]" for test in TESTS for method in METHODS}
        assert set(self.EXCLUDED) <= names


# rounding of float32 is larger than some of the suite's tolerances
make_insnext = partial(insnext.shipped_model, dtype=torch.float64)
# as wide as the suite's rank of 20
make_drt = partial(drt.shipped_model, dtype=torch.float64, num_key_value_heads=4)


def cells(tests: str, methods: str, reason: str) -> dict[str, str]:
    return {f"test_peft[{test}-{method}]": reason for test in tests.split() for method in methods.split()}


UPSTREAM = {
    **cells("load_model_low_cpu_mem_usage", "prompt_tuning", "PEFT asks the prompt's class for a field of adapters"),
    **cells(
        "mixed_adapter_batches generate_with_mixed_adapter_batches_and_beam_search",
        "dora",
        "PEFT refuses DoRA in batches of several adapters",
    ),
    **cells("safe_merge", "lora dora ia3", "the suite saves a raw state dict, where tied weights share memory"),
}
NO_SCORES = "output_scores means nothing where text is inserted"
HOLES = "the suite masks a token between two others"


class TestInsNextForInsertionLM(Suite):
    transformers_class = InsNextForInsertionLM
    make_model = staticmethod(make_insnext)
    rows = [[5, 6, 7, 8, 9], [4, 7, 12, 0, 0]]
    EXCLUDED = {
        **UPSTREAM,
        **cells("disable_adapter", "lora dora ia3 prompt_tuning", NO_SCORES),
        **cells("mixed_adapter_batches", "lora", NO_SCORES),
        **cells("generate_half_prec", "lora dora ia3", HOLES),
        **cells(
            "generate generate_half_prec generate_pos_args",
            "prompt_tuning",
            "virtual tokens stand in front of a prompt: they need left_to_right=True",
        ),
        **cells(
            "generate_with_mixed_adapter_batches_and_beam_search",
            "lora",
            "PEFT names an adapter for each beam, and the prompt is read once for all beams of a row",
        ),
    }


class TestInsNextLeftToRight(Suite):
    transformers_class = InsNextForInsertionLM
    rows = [[5, 6, 7, 8, 9], [4, 7, 12, 9, 3]]
    EXCLUDED = {**UPSTREAM, **cells("generate_half_prec", "lora dora ia3 prompt_tuning", HOLES)}

    @staticmethod
    def make_model():
        model = make_insnext()
        model.generation_config.left_to_right = True
        return model


class TestDrtForCausalLM(Suite):
    transformers_class = DrtForCausalLM
    make_model = staticmethod(make_drt)
    rows = [[5, 6, 7, 8, 9], [0, 0, 4, 7, 12]]
    EXCLUDED = UPSTREAM
