"""What a step of writing asks the device: each question waits for all that was ordered before it."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_insnext.insnext import write_beam, write_sample
from modeling_insnext.insnext.pending import Pending
from tests.support.insnext import tiny_model


ASKS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)


class Questions(TorchDispatchMode):
    """Counts the operators whose results Python waits for, but for `tolist`, which asks nothing on a CPU."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.overloadpacket in ASKS
        return func(*args, **(kwargs or {}))


def questions_of(tokens: int, **options) -> int:
    model, ids = tiny_model(), torch.tensor([[1, 5, 6, 7]])
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    with Questions() as asked:
        model.generate(ids, **lengths, **options)
    return asked.number


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "seed": 3}], ids=["greedy", "sampled"])
def test_a_step_asks_three_times_at_most(options):
    assert questions_of(13, ebr=False, **options) - questions_of(3, ebr=False, **options) <= 10 * 3


@pytest.mark.parametrize(("module", "beams"), [(write_sample, 1), (write_beam, 3)])
def test_what_tokens_mean_in_a_slot_is_found_once_for_each_look_into_it(module, beams):
    model = tiny_model()
    sets = mock.patch.object(Pending, "token_sets", autospec=True, side_effect=Pending.token_sets)
    scores = mock.patch.object(module, "token_scores", side_effect=module.token_scores)
    with sets as found, scores as looked:
        model.generate(torch.tensor([[1]]), pending_ids=torch.tensor([[[[9, -1]], [[10, 11]]]]), max_new_tokens=5,
                       num_beams=beams, do_sample=False)  # fmt: skip
    assert looked.call_count > 1
    assert found.call_count == looked.call_count
