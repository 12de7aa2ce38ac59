"""What encode-once-then-reuse costs: how often EBR strikes, over which block, and how many tokens it encodes."""

from types import SimpleNamespace

import pytest
import torch

from modeling_insnext.insnext.generation_configuration import InsertionGenerationConfig
from tests.support.generation_twins import canvas_of, draft_of, writing_model
from tests.support.insnext import BOS


SMALL = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, max_position_embeddings=4096)


def rule_by_hand(prompt, inserted, ratio=1.0, window=None):
    """Return the tokens encoded in all, those encoded again, and the steps at which EBR struck."""
    together, total, again, struck = prompt, prompt, 0, []
    for step in range(1, inserted + 1):
        length = prompt + step
        if length - together > ratio * together:
            block = length if window is None else min(window, length)
            total, again, together = total + block, again + block, length
            struck.append(step)
        else:
            total += 1
    return total, again, struck


class Counter(torch.nn.Module):
    """In the place of the encoder: encodes nothing and notes the blocks it is given."""

    def __init__(self, width):
        super().__init__()
        self.width, self.blocks = width, []

    def forward(self, input_ids, past_key_values, interval, advance_cache):
        real = interval.start_BQ[0] == 0
        self.blocks.append((int(interval.entries_BQ[0, 0]), int(real.sum()), int(interval.horizon_BQ[0, 0])))
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, self.width))


def counted(prompt, inserted, ratio=1.0, window=None):
    """Let a draft grow without a network; return it and the blocks that would have been encoded."""
    model = writing_model(dtype=torch.float32, num_hidden_layers=1, **SMALL)
    counter = Counter(8)
    draft = draft_of(model, canvas_of([[(BOS, True)] * prompt]), inserted, encoder=counter)
    config = InsertionGenerationConfig(ebr=True, ebr_ratio=ratio, ebr_window=window)
    with torch.no_grad():
        for _ in range(inserted):
            draft.write(torch.zeros(1, dtype=torch.long), torch.full((1,), 5), torch.ones(1, dtype=torch.bool))
            draft.encode(config)
    return draft, counter.blocks


@pytest.mark.parametrize("prompt", [1, 8, 64])
def test_at_ratio_1_at_most_two_tokens_are_reencoded_per_inserted_token(prompt):
    inserted = 1024
    draft, blocks = counted(prompt, inserted)
    struck, again = set(draft.reencoded_at[0]), 0
    for step, (_, size, _) in enumerate(blocks[1:], 1):
        again += size if step in struck else 0
        assert again <= 2 * step
    assert again == rule_by_hand(prompt, inserted)[1] > 0


@pytest.mark.parametrize("prompt", [1, 8, 64])
@pytest.mark.parametrize(("ratio", "window"), [(1.0, None), (0.0, None), (0.5, None), (2.0, 16), (0.25, 5), (0.0, 1)])
def test_encoded_tokens_are_the_prompt_the_written_and_the_blocks(prompt, ratio, window):
    draft, blocks = counted(prompt, 100, ratio, window)
    total, _, struck = rule_by_hand(prompt, 100, ratio, window)
    assert int(draft.encoded_tokens) == total == sum(size for _, size, _ in blocks)
    assert draft.reencoded_at[0] == struck
    for step, (first, size, horizon) in enumerate(blocks[1:], 1):
        length = prompt + step
        block = 1 if step not in struck else length if window is None else min(window, length)
        assert (first, size, horizon) == (length - block, block, length - 1)


def test_control_a_ratio_below_1_breaks_the_bound_of_two():
    draft, blocks = counted(8, 512, 0.5)
    assert sum(blocks[step][1] for step in draft.reencoded_at[0]) > 2 * 512


@pytest.mark.parametrize("prompt", [1, 8, 40])
@pytest.mark.parametrize(
    "options",
    [{}, {"ebr": True}, {"ebr": True, "ebr_ratio": 0}, {"ebr": True, "ebr_ratio": 0.5, "ebr_window": 7}],
)
def test_generate_counts_by_the_rule(prompt, options):
    model = writing_model(dtype=torch.float32, num_hidden_layers=1, **SMALL)
    out = model.generate(
        torch.full((1, prompt), 5), max_new_tokens=50, min_new_tokens=50, return_dict_in_generate=True, **options
    )
    ratio = options.get("ebr_ratio", 1.0) if options.get("ebr") else float("inf")
    total, _, struck = rule_by_hand(prompt, 50, ratio, options.get("ebr_window"))
    assert int(out.encoded_tokens) == total
    assert out.reencoded_at == [struck]
    window = options.get("ebr_window") or 99
    assert out.reencoded_tokens == [[min(prompt + step, window) for step in struck]]
    assert (ratio != 0) or struck == list(range(1, 51))


def test_ebr_is_off_unless_asked_for_and_false_overrules_the_checkpoint():
    model = writing_model(dtype=torch.float32, num_hidden_layers=1, **SMALL)
    options = dict(inputs=torch.tensor([[BOS]]), max_new_tokens=6, min_new_tokens=6, return_dict_in_generate=True)
    assert model.generate(**options).reencoded_at == [[]]
    model.generation_config.ebr = True
    assert model.generate(**options).reencoded_at == [[2, 6]]
    assert model.generate(**options, ebr=False).reencoded_at == [[]]
    assert model.generate(**options, ebr_ratio=0).reencoded_at == [[1, 2, 3, 4, 5, 6]]
