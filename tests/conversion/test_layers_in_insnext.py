"""What InsNeXt takes over of other families: with positions taken out on both sides, hidden states are equal."""

import types

import pytest
import torch
from transformers.models.modernbert import modeling_modernbert

from conversion.convert import convert_tensors
from conversion.from_gpt2 import FAMILY as GPT2
from conversion.from_llama import FAMILY as LLAMA
from conversion.from_modernbert import FAMILY as MODERNBERT
from conversion.from_roberta import FAMILY as ROBERTA
from modeling_insnext import InsNextForInsertionLM
from modeling_insnext.insnext import modeling_insnext
from tests.support.equality import difference
from tests.support.sources import DECODERS, ENCODERS, encoder, exact, random_ids, source_model


CLOSE = 1e-9
FAMILIES = {"gpt2": GPT2, "roberta": ROBERTA, "modernbert": MODERNBERT, "modernbert_biased": MODERNBERT}


def as_insnext(source, name):
    family = FAMILIES.get(name, LLAMA)
    converted = convert_tensors(family, source.state_dict(), source.config, "insnext")
    model = InsNextForInsertionLM(converted.config).double().eval()
    model.load_state_dict(converted.tensors, strict=not converted.config.tie_word_embeddings)
    return model


@pytest.fixture
def without_positions(monkeypatch):
    """Take positions out: slopes of 0, rotary angles of 0, learned vectors of 0."""
    slopes = modeling_insnext.alibi_slopes

    def still(self, x, position_ids, *args):
        angle = torch.zeros(*position_ids.shape, x.shape[-1] if self is None else self.width, dtype=x.dtype)
        return angle.cos(), angle.sin()

    def take_out(source):
        monkeypatch.setattr(modeling_insnext, "alibi_slopes", lambda *args: 0 * slopes(*args))
        # rotating by nothing still rounds to float32 there
        monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", lambda q, k, *args, **kwargs: (q, k))
        for name, module in exact(source).named_modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                module.width = source.config.hidden_size // source.config.num_attention_heads
                module.width = getattr(source.config, "head_dim", None) or module.width
                module.forward = types.MethodType(still, module)
            elif name.endswith(("position_embeddings", "wpe")):
                module.weight.data.zero_()
        return source

    return take_out


@torch.no_grad()
def states_of_decoders(ours, source, ids):
    causal = ours.model(ids, horizon=torch.arange(ids.shape[1]).expand_as(ids))
    return causal.last_hidden_state, source.base_model(ids).last_hidden_state


@torch.no_grad()
def states_of_encoders(ours, source, ids):
    return ours.model(ids, is_causal=False).last_hidden_state, source.base_model(ids).last_hidden_state


@pytest.mark.parametrize("name", ["gpt2"])
def test_a_decoder_without_positions_is_the_same_left_to_right(name, without_positions):
    source, ids = source_model(name), random_ids(2, 9)
    # control: with positions on both sides it is another function
    assert difference(*states_of_decoders(as_insnext(source, name), source, ids)) > 1e-2
    source = without_positions(source)
    assert difference(*states_of_decoders(as_insnext(source, name), source, ids)) < CLOSE


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_without_positions_is_the_same(name, without_positions):
    source, ids = encoder(name), random_ids(2, 20)
    assert difference(*states_of_encoders(as_insnext(source, name), source, ids)) > 1e-2
    source = without_positions(source)
    assert difference(*states_of_encoders(as_insnext(source, name), source, ids)) < CLOSE


def test_beyond_half_the_window_of_modernbert_insnext_sees_more(without_positions):
    source = without_positions(encoder("modernbert"))
    ours = as_insnext(source, "modernbert")
    assert difference(*states_of_encoders(ours, source, random_ids(1, 21))) < CLOSE
    assert difference(*states_of_encoders(ours, source, random_ids(1, 22))) > 1e-6


def test_the_token_type_moves_all_logits_alike():
    source = encoder("roberta")
    ours, kind = as_insnext(source, "roberta"), source.roberta.embeddings.token_type_embeddings.weight[0]
    state = torch.randn(5, 32, dtype=torch.float64)
    words = source.roberta.embeddings.word_embeddings.weight
    assert kind.abs().max() > 0.1
    assert difference((ours.lm_head(state)).softmax(-1), (state @ words.T).softmax(-1)) < CLOSE


KIND = "roberta.embeddings.token_type_embeddings.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(KIND), "got embeddings.token_type_embeddings.weight missing"),
        (
            lambda tensors: tensors.update({KIND: torch.ones(2, 32)}),
            r"mis-shaped \(\[2, 32\]",
        ),
        (lambda tensors: tensors.update({KIND: torch.ones(1, 32)}), "of one dtype, .*token_type_embeddings.weight"),
        (lambda tensors: tensors[KIND].fill_(torch.inf), "finite, .*token_type_embeddings.weight"),
    ],
    ids=["missing", "shape", "dtype", "value"],
)
def test_a_wrong_token_type_is_refused_by_name(change, message):
    tensors = dict(encoder("roberta").state_dict())
    change(tensors)
    with pytest.raises(ValueError, match=message):
        convert_tensors(ROBERTA, tensors, ENCODERS["roberta"], "insnext")


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
@torch.no_grad()
def test_at_first_a_token_is_read_off_the_state_of_its_left_neighbour(name):
    source = source_model(name) if name in DECODERS else encoder(name)
    ours, ids = as_insnext(source, name), random_ids(2, 10)
    head, hidden = ours.slot_head, ours.model(ids, is_causal=True).last_hidden_state
    logits = ours.lm_head(head.norm(hidden))
    logits[..., ours.config.never_inserted] = -torch.inf

    def log_p():
        """Return log p(token, the text goes on) less log p(it goes on)."""
        joint = ours(ids).logits
        joint[..., ours.config.never_inserted] = -torch.inf
        return joint - joint.logsumexp(-1, keepdim=True)

    assert difference(log_p(), logits.log_softmax(-1)) < CLOSE
    # control: a head that was drawn reads off something else
    torch.nn.init.normal_(head.left_proj.weight, std=0.2)
    assert difference(log_p(), logits.log_softmax(-1)) > 1e-2


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_what_was_converted_writes_and_trains(name):
    source = source_model(name) if name in DECODERS else encoder(name)
    ours = as_insnext(source, name)
    ids = random_ids(2, 10)
    loss = ours(ids, positions=torch.arange(10).expand(2, 10), context_length=2, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())
    assert ours.generate(ids, max_new_tokens=3).shape[1] >= 10


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("roberta", {"type_vocab_size": 2}, "type_vocab_size must be 1, got 2"),
        ("roberta", {"is_decoder": True}, "is_decoder must be False, got True"),
        ("roberta", {"pad_token_id": None}, "pad_token_id must be an id, .* got None"),
        ("modernbert", {"tie_word_embeddings": False}, "tie_word_embeddings must be True, got False"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights must be True, got False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False, got True"),
    ],
)
def test_what_insnext_cannot_be_is_refused(name, changes, message):
    config = {**DECODERS, **ENCODERS}[name].to_dict()
    config = type({**DECODERS, **ENCODERS}[name])(**{**config, **changes})
    with pytest.raises(ValueError, match=message):
        convert_tensors(FAMILIES[name], {}, config, "insnext")
