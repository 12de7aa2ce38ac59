"""Adapting a source: which tokens read what it reads, how far their states are from its own, and rates by part."""

import copy

import peft
import pytest
import torch

from modeling_insnext import InsNextForInsertionLM
from modeling_insnext.alignment import AlignedTrainer, cosine_distance, read_left_to_right
from modeling_insnext.data import ContextMixture, InsertionCollator
from modeling_insnext.insertion_trainer import InsertionTrainer
from tests.support.equality import same_bits
from tests.support.insnext import SHIPPED_VOCAB, shipped_model
from tests.support.quiet_training import arguments, losses


def texts(count=24):
    generator = torch.Generator().manual_seed(0)
    lengths = [2 + 3 * (i % 4) for i in range(count)]
    return [{"input_ids": [1, *torch.randint(3, SHIPPED_VOCAB, (n,), generator=generator).tolist()]} for n in lengths]


def collator(**options):
    options = {"contexts": ContextMixture(words=0.4, reencode=0.4, windowed=0.1), **options}
    return InsertionCollator(pad_token_id=0, bos_token_id=1, eos_token_id=2, **options)


def adapted():
    """A model in float64 under an adapter that does something."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["slot_head"])
    model = peft.get_peft_model(shipped_model(InsNextForInsertionLM).double(), config).double()
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def read_one_by_one(batch):
    """The definition: everything that a token or one before it saw stands left of it, and was written before it."""
    mask = torch.zeros_like(batch["positions"], dtype=torch.bool)
    for row in range(len(mask)):
        positions, start, horizon = (batch[name][row].tolist() for name in ("positions", "start", "horizon"))
        for i in range(len(positions)):
            text = [j for j in range(len(positions)) if start[j] == start[i]]
            seen = [(j, k) for j in text if j <= i for k in range(start[j], horizon[j] + 1)]
            plain = all(k <= j and (positions[k] < positions[j] or k == j) for j, k in seen)
            mask[row, i] = plain and len(text) > 1
    return mask


@pytest.mark.parametrize(
    "options", [{}, {"pack_to": 40}, {"order": "gap_left_to_right"}], ids=["rows", "packed", "gaps"]
)
def test_tokens_that_read_left_to_right_are_those_of_the_definition(options):
    made = [collator(seed=seed, left_to_right_share=(0.3, 0.3), **options)(texts()) for seed in range(4)]
    masks = [read_left_to_right(batch) for batch in made]
    assert all(same_bits(mask, read_one_by_one(batch)) for mask, batch in zip(masks, made, strict=True))
    share = torch.cat([mask.flatten() for mask in masks]).double().mean()
    assert 0.1 < share < 0.9


@pytest.mark.parametrize("encoding", ["alibi", "rotary"])
def test_these_tokens_have_the_states_of_the_causal_model_and_the_others_do_not(encoding):
    model = shipped_model(InsNextForInsertionLM, position_encoding=encoding).double().eval()
    batch = collator(left_to_right_share=(0.5, 0.5))(texts())
    with torch.no_grad():
        fields = {name: batch[name] for name in ("input_ids", "positions", "start", "horizon")}
        states = model(**fields, output_hidden_states=True).hidden_states[-1]
        causal = torch.zeros_like(states)
        for row, length in enumerate((batch["start"] == 0).sum(1).tolist()):
            # in the order of writing: what comes later may stand in between
            text = model(input_ids=batch["input_ids"][row : row + 1, :length], output_hidden_states=True)
            causal[row, :length] = text.hidden_states[-1][0]
    read = read_left_to_right(batch)
    difference = (states - causal).abs().amax(-1)
    assert difference[read].max() < 1e-9
    others = (batch["start"] == 0) & ~read & (batch["positions"] > 0)
    assert (difference[others] > 1e-6).double().mean() > 0.9


def test_the_distance_is_one_less_the_cosine():
    torch.manual_seed(0)
    states, source = ([torch.randn(5, 8, dtype=torch.float64) for _ in range(3)] for _ in range(2))
    by_hand = (
        sum(1 - (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1) for a, b in zip(states, source, strict=True)) / 3
    )
    assert (cosine_distance(states, source) - by_hand).abs().max() < 1e-12
    assert cosine_distance(states, [3 * layer for layer in states]).abs().max() < 1e-12
    assert cosine_distance([-layer for layer in states], states).min() > 2 - 1e-12
    narrow = [[layer.bfloat16() for layer in layers] for layers in (states, source)]
    assert cosine_distance(*narrow).dtype == torch.float32


def gradient(trainer, batches, num_items):
    """Return the loss of a step in parts, and the gradient of all weights."""
    trainer.model.train().zero_grad()
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
        loss.backward()
        total += float(loss)
    return total, torch.cat([w.grad.flatten() for w in trainer.model.parameters() if w.grad is not None])


def trainer_of(folder, model, weight):
    args = arguments(folder, per_device_train_batch_size=4)
    return AlignedTrainer(model, args, train_dataset=texts(), data_collator=collator(), alignment_weight=weight)


def test_the_loss_gains_the_distance_per_inserted_token_however_a_step_is_cut(tmp_path):
    model, rows = adapted(), texts()
    collate = collator(left_to_right_share=(0.5, 0.5))
    # texts of one length: the parts have no other padding than the whole
    rows = [row for row in rows if len(row["input_ids"]) == 9]
    whole, parts = collate(rows), [collate(rows[:2]), collate(rows[2:])]
    tokens = (whole["labels"] != -100).sum()
    read = read_left_to_right(whole)
    model.eval()
    with torch.no_grad():
        fields = {name: whole[name] for name in ("input_ids", "positions", "start", "horizon")}
        states = model(**fields, output_hidden_states=True).hidden_states[1:]
        with model.disable_adapter():
            source = model(**fields, output_hidden_states=True).hidden_states[1:]
        plain = model(**whole, num_items_in_batch=tokens).loss
    distance = cosine_distance([layer[read] for layer in states], [layer[read] for layer in source]).sum()
    assert distance > 1e-3

    loss, of_whole = gradient(trainer_of(tmp_path, model, 2.0), [whole], tokens)
    assert abs(loss - float(plain + 2 * distance / tokens)) < 1e-9
    cut, of_parts = gradient(trainer_of(tmp_path, model, 2.0), parts, tokens)
    assert abs(cut - loss) < 1e-9 and (of_parts - of_whole).abs().max() < 1e-9
    # controls: without the weight it is the plain loss, and another gradient
    loss, of_plain = gradient(trainer_of(tmp_path, model, 0.0), [whole], tokens)
    assert abs(loss - float(plain)) < 1e-9 and (of_plain - of_whole).abs().max() > 1e-6


def test_training_with_the_distance_stays_beside_the_source(tmp_path):
    def trained(weight):
        model = adapted()
        args = arguments(tmp_path, max_steps=30, learning_rate=1e-2, per_device_train_batch_size=12)
        trainer = AlignedTrainer(
            model,
            args,
            train_dataset=texts(),
            data_collator=collator(left_to_right_share=(0.5, 0.5)),
            alignment_weight=weight,
        )
        trainer.train()
        return losses(trainer, "alignment_loss")

    aligned, free = trained(20.0), trained(0.0)
    assert aligned[0] == free[0] > 1e-3 and len(aligned) == 30
    assert aligned[-1] < aligned[0] / 2 and aligned[-1] < free[-1] / 2


@pytest.mark.parametrize(
    ("model", "weight", "message"),
    [
        (lambda: shipped_model(InsNextForInsertionLM), 1.0, "alignment needs a model with a PEFT adapter"),
        (adapted, -1.0, "alignment_weight must be finite and at least 0, got -1.0"),
    ],
)
def test_bad_alignments_are_refused(tmp_path, model, weight, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, model(), weight)


def test_parts_learn_at_rates_of_their_own(tmp_path):
    def moved(rates):
        """Return how far the first step of Adam moves each weight: its rate."""
        model = adapted()
        before = copy.deepcopy(dict(model.named_parameters()))
        args = arguments(tmp_path, learning_rate=1e-3, adam_epsilon=1e-16, warmup_steps=0)
        InsertionTrainer(model, args, train_dataset=texts(), data_collator=collator(), learning_rates=rates).train()
        return {name: float((w - before[name]).abs().max()) for name, w in model.named_parameters() if w.requires_grad}

    for name, step in moved({"slot_head": 1e-2}).items():
        assert abs(step - (1e-2 if "slot_head" in name else 1e-3)) < 1e-6, name
    # control
    assert all(abs(step - 1e-3) < 1e-6 for step in moved({}).values())


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"slot_head": 0.0}, "learning_rates must be finite and above 0, got 0.0 for 'slot_head'"),
        ({"embed_tokens": 1.0}, "learning_rates must name trained weights, got 'embed_tokens'"),
    ],
)
def test_bad_rates_are_refused(tmp_path, rates, message):
    with pytest.raises(ValueError, match=message):
        InsertionTrainer(
            adapted(), arguments(tmp_path), train_dataset=texts(), data_collator=collator(), learning_rates=rates
        )
