"""`generate`, `pipeline` and the heads as anyone uses them."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
    set_seed,
)

from modeling_insnext import DrtForSequenceClassification
from tests.support.drt import drt_tokenizer, padded, random_ids, shipped_model, tiny_model, whole
from tests.support.equality import same_bits, within_rounding


IDS = random_ids(2, 23)
GREEDY = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}


def test_a_pipeline_continues_texts():
    tokenizer, model = drt_tokenizer(), shipped_model()
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {**GREEDY, "eos_token_id": None}
    texts = ["the old man and the sea", "the dog"]
    alone = [writer(text, **options)[0]["generated_text"] for text in texts]
    assert all(out.startswith(text) and len(out) > len(text) for out, text in zip(alone, texts, strict=True))
    together = [out[0]["generated_text"] for out in writer(texts, batch_size=2, **options)]
    assert together == alone
    assert len(writer("the", num_return_sequences=3, do_sample=True, max_new_tokens=5)) == 3


class Recorder:
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 6}, {"do_sample": True}])
def test_a_streamer_gets_every_token_in_order(options):
    model, streamer = tiny_model(), Recorder()
    torch.manual_seed(0)
    out = model.generate(IDS[:1], streamer=streamer, **{**GREEDY, **options})
    assert streamer.ids == out[0].tolist() and streamer.ended


def test_streamers_of_text_write_it(capsys):
    tokenizer, model = drt_tokenizer(), shipped_model()
    inputs = tokenizer("the old man", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, **GREEDY)[0])
    model.generate(**inputs, streamer=TextStreamer(tokenizer), **GREEDY)
    assert capsys.readouterr().out.strip() == text.strip()
    streamer = TextIteratorStreamer(tokenizer)
    model.generate(**inputs, streamer=streamer, **GREEDY)
    assert "".join(streamer).strip() == text.strip()


def test_batches_without_end_are_refused_before_any_work():
    with pytest.raises(ValueError, match="continuous batching .generate_batch. keeps keys in pages.* use generate"):
        tiny_model().generate_batch([[1, 5, 6], [1, 7]], max_new_tokens=3)


def test_sampling_is_seeded():
    model = tiny_model()

    def sample(seed, **options):
        set_seed(seed)
        return model.generate(IDS, **{**GREEDY, "do_sample": True, "top_p": 0.9, "temperature": 0.8, **options})

    assert same_bits(sample(0), sample(0))
    assert not same_bits(sample(0), sample(1))
    assert same_bits(sample(0, top_k=1), model.generate(IDS, **GREEDY))
    # what is sampled does not depend on the cache
    assert same_bits(sample(0), sample(0, use_cache=False))


@pytest.mark.parametrize(
    "changes",
    [{}, {"residual": "stream"}, {"landmark_source": "cls"}, {"retriever": "random"}, {"sliding_window": None}],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_across_chunk_borders_the_cache_changes_no_token_and_no_score(changes):
    model = tiny_model(**changes)
    options = {**GREEDY, "max_new_tokens": 18, "return_dict_in_generate": True, "output_logits": True}
    cached, plain = model.generate(IDS, **options), model.generate(IDS, **options, use_cache=False)
    assert same_bits(cached.sequences, plain.sequences)
    # in float32, to which `generate` rounds them
    assert within_rounding(cached.logits, plain.logits)
    # 18 tokens end three chunks of five or more
    assert cached.past_key_values.memory.counts == [40 // 5] * 2 and cached.past_key_values.seen == [40, 40]


def test_processors_and_criteria_are_those_of_transformers():
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            keep = torch.zeros_like(scores, dtype=torch.bool)
            keep[:, 7 + input_ids.shape[1] % 5] = True
            return scores.masked_fill(~keep, -torch.inf)

    class Until(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == 9

    model = tiny_model()
    out = model.generate(IDS, logits_processor=LogitsProcessorList([Only()]), **GREEDY)
    assert out[0, 23:].tolist() == [7 + n % 5 for n in range(23, 37)]
    criteria = StoppingCriteriaList([Until()])
    out = model.generate(
        IDS,
        logits_processor=LogitsProcessorList([Only()]),
        stopping_criteria=criteria,
        **{**GREEDY, "pad_token_id": 0},
    )
    assert out[0, 23:].tolist() == [10, 11, 7, 8, 9]
    out = model.generate(IDS, **GREEDY, repetition_penalty=5.0, no_repeat_ngram_size=2, bad_words_ids=[[5], [6]])
    assert not set(out[:, 23:].flatten().tolist()) & {5, 6}
    out = model.generate(IDS, **{**GREEDY, "eos_token_id": None, "min_new_tokens": 14})
    assert out.shape == (2, 37)


def test_a_row_ends_at_its_end_token_and_is_padded():
    model = tiny_model()
    free = model.generate(IDS, **GREEDY)
    end = int(free[0, 23 + 3])
    out = model.generate(IDS, **{**GREEDY, "eos_token_id": end, "pad_token_id": 0})
    stop = free[0, 23:].tolist().index(end)
    assert out[0, 23 : 24 + stop].tolist() == free[0, 23 : 24 + stop].tolist()
    assert not out[0, 24 + stop :].any()


def test_embeddings_stand_for_tokens():
    model = tiny_model()
    embeds = model.get_input_embeddings()(IDS)
    with torch.no_grad():
        assert within_rounding(model(inputs_embeds=embeds).logits, model(IDS).logits)
    out = model.generate(inputs_embeds=embeds, **GREEDY)
    assert same_bits(out, model.generate(IDS, **GREEDY)[:, 23:])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(IDS, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match='retriever="fixed" reads token ids'):
        tiny_model(retriever="fixed")(inputs_embeds=embeds)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunksize": 3}, ValueError, "chunksize"),
        ({"lower_only_prefil": True}, ValueError, "lower_only_prefil"),
        ({"cache_implementation": "static"}, ValueError, "cache_implementation must be one of .* got 'static'"),
    ],
)
def test_options_of_generate_that_do_not_exist_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        tiny_model().generate(IDS, **GREEDY, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attn_mask": None}, TypeError, "forward has no argument 'attn_mask'"),
        ({"lower_only": True}, TypeError, "forward has no argument 'lower_only'"),
        ({"output_attentions": True}, ValueError, "output_attentions must be False"),
        ({"attention_mask": torch.ones(2, 22)}, ValueError, r"attention_mask must be \[2, 23\], got \[2, 22\]"),
        ({"attention_mask": torch.zeros(2, 23)}, ValueError, "every row needs at least one token"),
        ({"labels": IDS[:, 1:]}, ValueError, r"labels must be \[2, 23\], one a token, got \[2, 22\]"),
        ({"labels": IDS + 40}, ValueError, r"labels must be in \[0, 50\) or -100, got"),
        ({"labels": IDS, "logits_to_keep": 1}, ValueError, "labels need the logits of all tokens"),
        ({"input_ids": IDS + 47}, ValueError, r"input_ids must be in \[0, 50\), got"),
        ({"input_ids": IDS - 4}, ValueError, r"input_ids must be in \[0, 50\), got -1"),
        ({"input_ids": IDS[:, :0]}, ValueError, r"at least one token, got input of shape \[2, 0\]"),
        ({"past_key_values": object()}, ValueError, "must be a ChunkMemoryCache, got object"),
    ],
)
def test_what_forward_cannot_read_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        tiny_model()(**{"input_ids": IDS, **options})


@pytest.mark.parametrize("training", [False, True])
def test_texts_packed_in_a_row_are_refused(training):
    """They would read one another."""
    model, position_ids = tiny_model().train(training), torch.arange(23).expand(2, -1)
    with pytest.raises(ValueError, match=r"one text, whose position_ids rise by one .* got \[11, 0\] after 12 tokens"):
        model(IDS, position_ids=position_ids % 12)
    packed = {"cu_seq_lens_q": torch.tensor([0, 12, 23]), "max_length_q": 12}
    with pytest.raises(ValueError, match=r"one text, got packed ones \(cu_seq_lens_q, max_length_q\); packing=False"):
        model(IDS, **packed)
    with pytest.raises(ValueError, match=r"position_ids must be \[2, 23\] or \[1, 23\], got \[2, 22\]"):
        model(IDS, position_ids=position_ids[:, 1:])


def test_position_ids_that_count_the_tokens_of_a_row_change_nothing():
    model, mask = tiny_model(), torch.ones(2, 23, dtype=torch.long)
    mask[1, :5] = 0
    expected = model(IDS, attention_mask=mask).logits
    plain = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    assert (model(IDS, attention_mask=mask, position_ids=plain).logits - expected).abs().max() == 0
    assert (model(IDS, position_ids=torch.arange(23)[None]).logits - model(IDS).logits).abs().max() == 0


def test_learned_positions_begin_at_the_beginning():
    position_ids = torch.arange(23)[None]
    model = tiny_model(position_encoding="learned", max_position_embeddings=64)
    model(IDS, position_ids=position_ids)
    with pytest.raises(ValueError, match="position_ids must begin at 0 where positions are learned, got 3"):
        model(IDS, position_ids=position_ids + 3)
    # elsewhere only distances count
    tiny_model()(IDS, position_ids=position_ids + 3)


def test_shifted_labels_are_labels():
    model = tiny_model()
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    expected = model(IDS, labels=IDS).loss
    assert abs(model(IDS, shift_labels=shifted).loss - expected) < 1e-6
    assert abs(model(IDS, labels=IDS, shift_labels=shifted).loss - expected) < 1e-6
    # control: they are not shifted once more
    assert abs(model(IDS, shift_labels=IDS).loss - expected) > 1e-3


def test_only_the_last_logits_or_chosen_ones_are_computed():
    model = tiny_model()
    expected = whole(model, IDS)
    with torch.no_grad():
        assert within_rounding(model(IDS, logits_to_keep=3).logits, expected[:, -3:])
        chosen = torch.tensor([0, 7, 20])
        assert within_rounding(model(IDS, logits_to_keep=chosen).logits, expected[:, chosen])


def test_hidden_states_are_those_of_every_layer():
    model = tiny_model()
    with torch.no_grad():
        output = model.model(IDS, output_hidden_states=True)
        assert len(output.hidden_states) == 1 + 4
        assert same_bits(output.hidden_states[0], model.get_input_embeddings()(IDS))
        assert same_bits(output.hidden_states[-1], output.last_hidden_state)
        assert all(states.shape == (2, 23, 32) for states in output.hidden_states)
        assert model.model(IDS).hidden_states is None
        first, second = model(IDS, return_dict=False)[:2], model(IDS)
        assert within_rounding(first[0], second.logits)


def by_hand(model, ids, labels):
    """Return the sum of -log p(label n + 1 | tokens up to n) over one text, and their number."""
    logp = whole(model, ids[None])[0].log_softmax(-1)
    pairs = [(n, int(label)) for n, label in enumerate(labels[1:]) if label != -100]
    return -sum(float(logp[n, label]) for n, label in pairs), len(pairs)


def test_the_loss_is_the_cross_entropy_over_a_rows_own_tokens():
    model, lengths = tiny_model(), [23, 11]
    labels = IDS.clone()
    labels[0, 4:9] = -100
    labels[1, 3] = 17
    sums = [by_hand(model, IDS[row, :n], labels[row, :n]) for row, n in enumerate(lengths)]
    total, count = sum(s for s, _ in sums), sum(n for _, n in sums)

    def loss(ids, mask, labels, **options):
        return model(ids, mask, labels=labels, use_cache=False, **options).loss.item()

    for side in ("left", "right"):
        ids, mask = padded(IDS, lengths, side)
        given = torch.full_like(ids, -100)
        given[mask.bool()] = torch.cat([labels[0, :23], labels[1, :11]])
        assert abs(loss(ids, mask, given) - total / count) < 1e-9
        assert abs(loss(ids, mask, given, num_items_in_batch=7) - total / 7) < 1e-9
        assert abs(loss(ids, mask, given, num_items_in_batch=torch.tensor(7)) - total / 7) < 1e-9
        # labels on padding are no targets either
        assert abs(loss(ids, mask, torch.where(mask.bool(), given, 5)) - total / count) < 1e-9
    # a hole: the token in front of it predicts the one behind
    ids, given, mask = (torch.full((1, 30), n) for n in (0, -100, 0))
    real = torch.tensor([0, 1, 5, 6, 7, *range(12, 18)])
    mask[0, real], ids[0, real], given[0, real] = 1, IDS[1, :11], labels[1, :11]
    assert abs(loss(ids, mask, given) - sums[1][0] / sums[1][1]) < 1e-9
    # behind a cache, too
    with torch.no_grad():
        past = model(ids[:, :6], mask[:, :6], use_cache=True).past_key_values
        output = model(ids[:, 6:], mask, past_key_values=past, labels=given[:, 6:])
    logp = whole(model, IDS[1:, :11])[0].log_softmax(-1)
    rest = [-float(logp[n, labels[1, n + 1]]) for n in range(3, 10)]
    assert abs(output.loss.item() - sum(rest) / len(rest)) < 1e-9
    # control: read off the columns, padding predicts
    ids, mask = padded(IDS, lengths, "left")
    plain = torch.nn.functional.cross_entropy(whole(model, ids, mask)[1, 11:-1], ids[1, 12:])
    assert abs(float(plain) - sums[1][0] / 10) > 1e-3


def test_a_classifier_reads_the_last_token_whatever_the_padding():
    torch.manual_seed(0)
    config = tiny_model().config
    config.num_labels = 3
    model = DrtForSequenceClassification(config).double().eval()
    lengths = [23, 11]
    with torch.no_grad():
        alone = torch.cat([model(IDS[row : row + 1, :n]).logits for row, n in enumerate(lengths)])
        for side in ("left", "right"):
            ids, mask = padded(IDS, lengths, side)
            assert (model(ids, mask).logits - alone).abs().max() < 1e-9
        # control: without the mask padding is text
        assert (model(ids).logits - alone).abs().max() > 1e-3
        past = model(IDS[:, :9], use_cache=True).past_key_values
        assert (model(IDS[:, 9:], past_key_values=past).logits[0] - alone[0]).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem", "loss"),
    [
        (torch.tensor([0, 2]), 3, "single_label_classification", torch.nn.functional.cross_entropy),
        (torch.tensor([[0.0, 1, 1], [1, 0, 0]]), 3, "multi_label_classification", None),
        (torch.tensor([0.3, -1.0]), 1, "regression", torch.nn.functional.mse_loss),
    ],
)
def test_a_classifier_has_the_loss_of_its_labels(labels, num_labels, problem, loss):
    loss = loss or torch.nn.functional.binary_cross_entropy_with_logits
    torch.manual_seed(0)
    config = tiny_model().config
    config.num_labels = num_labels
    model = DrtForSequenceClassification(config).eval()
    output = model(IDS, labels=labels)
    expected = loss(output.logits.squeeze(-1) if num_labels == 1 else output.logits, labels)
    assert abs(output.loss - expected) < 1e-6
    assert model.config.problem_type == problem
