"""`generate` on top of the cache: whatever moves, cuts or offloads it, tokens are those of plain greedy decoding."""

import pytest
import torch

from modeling_insnext import ChunkMemoryCache
from tests.support.drt import padded, random_ids, read, tiny_model, whole
from tests.support.equality import same_bits


NEW = 8
PLAIN = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


@torch.no_grad()
def greedy(model, ids):
    """Return `ids` and the next tokens, from parallel forward passes alone."""
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def beams_by_hand(model, ids, width, length):
    """Return the best continuation of one row among `width` beams, and its log-likelihood, without a cache."""
    beams = [(0.0, ids)]
    for _ in range(length):
        grown = []
        for score, text in beams:
            logp_V = whole(model, text)[0, -1].log_softmax(-1)
            grown += [(score + float(logp_V[v]), torch.cat([text, torch.tensor([[v]])], 1)) for v in range(50)]
        beams = sorted(grown, key=lambda beam: -beam[0])[:width]
    return beams[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "offloaded"},
        {"prefill_chunk_size": 4},
        {"lower_only_prefill": True},
        {"prefill_chunk_size": 7, "lower_only_prefill": True, "show_progress": True},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ],
)
def test_every_way_of_reading_gives_the_greedy_tokens(options):
    model, ids = tiny_model(), random_ids(1, 44)
    # a prompt that repeats itself, for prompt lookup to find candidates
    ids = torch.cat([ids, ids[:, :20], ids[:, :9]], 1)
    assert same_bits(model.generate(ids, **PLAIN, **options), greedy(model, ids))


def test_prompt_lookup_really_takes_tokens_back(monkeypatch):
    model, ids, cropped = tiny_model(), random_ids(1, 20), []
    crop = ChunkMemoryCache.crop
    monkeypatch.setattr(ChunkMemoryCache, "crop", lambda self, n: cropped.append(n) or crop(self, n))
    # greedy text of a random model soon repeats itself, and then does not
    ids = torch.cat([greedy(model, ids), ids], 1)
    # its text has the id of padding in it
    options = {**PLAIN, "prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    options["attention_mask"] = torch.ones_like(ids)
    out = model.generate(ids, **options)
    assert same_bits(out, greedy(model, ids)) and min(cropped) < 0
    # control: a cache that is not cut
    monkeypatch.setattr(ChunkMemoryCache, "crop", lambda self, n: None)
    try:
        assert not same_bits(model.generate(ids, **options), out)
    except (ValueError, RuntimeError, IndexError):
        pass


@pytest.mark.parametrize("given", ["nothing", "a cache", "a book"])
def test_drafts_longer_than_a_chunk_can_be_taken_back(given, monkeypatch):
    model, ids = tiny_model(), random_ids(1, 30).repeat(1, 3)
    expected = greedy(model, ids)
    options = {**PLAIN, "prompt_lookup_num_tokens": 25}
    pasts = {"nothing": lambda: None, "a cache": lambda: ChunkMemoryCache(model.config)}
    pasts["a book"] = lambda: model.prefill(ids[:, :40], segment_length=7)
    assert same_bits(model.generate(ids, past_key_values=pasts[given](), **options), expected)
    # control: a cache that keeps to its own margin
    monkeypatch.setattr(ChunkMemoryCache, "allow_crop", lambda self, tokens: None)
    with pytest.raises(ValueError, match="larger crop_margin"):
        model.generate(ids, past_key_values=pasts[given](), **{**options, "max_new_tokens": 12})


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("drafted_by", ["lookup", "assistant"])
def test_a_draft_reads_what_a_book_does_not_hold_and_nothing_twice(drafted_by, padding):
    model, ids = tiny_model(), random_ids(1, 90)
    options = {**PLAIN, "attention_mask": (torch.arange(90) >= padding).long()[None]}
    plain = model.prefill(ids[:, :40], options["attention_mask"][:, :40])
    expected = model.generate(ids, past_key_values=plain, **options)
    draft = {"assistant_model": tiny_model(seed=1)} if drafted_by == "assistant" else {"prompt_lookup_num_tokens": 3}
    past = model.prefill(ids[:, :40], options["attention_mask"][:, :40])
    assert same_bits(model.generate(ids, past_key_values=past, **draft, **options), expected)
    # the last token is written, not read
    assert past.columns == plain.columns == expected.shape[1] - 1


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_an_assistant_may_draft_more_than_a_chunk(schedule):
    model, ids = tiny_model(), random_ids(1, 33)
    options = {**PLAIN, "max_new_tokens": 40}
    expected = model.generate(ids, **options)
    for assistant in (tiny_model(), tiny_model(seed=1, retrieval_groups=[1])):
        assistant.generation_config.num_assistant_tokens = 9
        assistant.generation_config.num_assistant_tokens_schedule = schedule
        assert same_bits(model.generate(ids, assistant_model=assistant, **options), expected)


def test_a_draft_by_the_lower_layers_alone_is_refused():
    with pytest.raises(ValueError, match="assistant_early_exit must be None: .* got 2; use assistant_model"):
        tiny_model().generate(random_ids(1, 20), assistant_early_exit=2, **PLAIN)


def test_beams_behind_one_book_name_what_to_call():
    model, book = tiny_model(), random_ids(1, 60)
    past, options = model.prefill(book[:, :50]), {**PLAIN, "num_beams": 3}
    with pytest.raises(ValueError, match=r"holds 1 rows, got input of 3 rows: call batch_repeat_interleave\(3\)"):
        model.generate(book, past_key_values=past, **options)
    past = model.prefill(book[:, :50])
    past.batch_repeat_interleave(3)
    assert same_bits(model.generate(book, past_key_values=past, **options), model.generate(book, **options))


@pytest.mark.parametrize(
    ("changes", "dtype", "rule"),
    [
        ({"chunk_size": 4}, torch.float64, "another configuration: chunk_size is 5 in it, 4 in the model"),
        ({"retrieval_groups": [2]}, torch.float64, r"retrieval_groups is \[1, 1\] in it, \[2\] in the model"),
        ({"num_lower_layers": 3}, torch.float64, "num_lower_layers is 2 in it, 3 in the model"),
        ({"keys_per_layer": True}, torch.float64, "keys_per_layer is False in it, True in the model"),
        ({"landmark_source": "mean"}, torch.float64, "landmark_source is 'token' in it, 'mean' in the model"),
        ({}, torch.float32, "filled in torch.float64, got a model in torch.float32"),
    ],
)
def test_a_cache_of_another_model_is_refused_by_name(changes, dtype, rule):
    past, ids = tiny_model().prefill(random_ids(1, 30)), random_ids(1, 34)
    with pytest.raises(ValueError, match=rule):
        tiny_model(**changes).to(dtype).generate(ids, past_key_values=past, **PLAIN)
    # nothing was done to it
    assert same_bits(tiny_model().generate(ids, past_key_values=past, **PLAIN), greedy(tiny_model(), ids))


def test_an_assistant_model_drafts_and_the_tokens_are_those_of_greedy():
    model, assistant, ids = tiny_model(), tiny_model(seed=1, retrieval_groups=[1]), random_ids(1, 33)
    assistant.generation_config.num_assistant_tokens = 3
    out = model.generate(ids, assistant_model=assistant, **PLAIN)
    assert same_bits(out, greedy(model, ids))


@pytest.mark.parametrize("location", ["device", "host", "disk"])
def test_beams_are_those_found_without_a_cache(location):
    model, ids = tiny_model(), random_ids(1, 33)
    past = ChunkMemoryCache(model.config, location)
    out = model.generate(
        ids,
        num_beams=3,
        length_penalty=0.0,
        past_key_values=past,
        return_dict_in_generate=True,
        output_scores=True,
        **{**PLAIN, "max_new_tokens": 8},
    )
    score, text = beams_by_hand(model, ids, 3, 8)
    assert same_bits(out.sequences, text)
    assert abs(float(out.sequences_scores) - score) < 1e-5


def test_beams_that_keep_the_wrong_rows_are_noticed(monkeypatch):
    model, ids = tiny_model(), random_ids(2, 33)
    options = {**PLAIN, "num_beams": 4, "num_return_sequences": 3}
    right = model.generate(ids, use_cache=False, **options)
    assert same_bits(model.generate(ids, **options), right)
    monkeypatch.setattr(ChunkMemoryCache, "reorder_cache", lambda self, rows: None)
    assert not same_bits(model.generate(ids, **options), right)


def test_returned_sequences_share_their_prompt_and_are_sampled_as_repeated_prompts():
    model, ids = tiny_model(), random_ids(2, 33)
    options = {**PLAIN, "do_sample": True, "top_k": 0}
    torch.manual_seed(0)
    several = model.generate(ids, num_return_sequences=3, **options)
    torch.manual_seed(0)
    assert same_bits(several, model.generate(ids.repeat_interleave(3, 0), **options))
    assert len({tuple(row) for row in several.tolist()}) == 6


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 6}, {"lower_only_prefill": True, "prefill_chunk_size": 30}, {"num_beams": 2}],
)
def test_padded_prompts_are_continued_as_alone(options):
    model, ids = tiny_model(), random_ids(3, 70)
    lengths = [70, 23, 4]
    text, mask = padded(ids, lengths, "left")
    out = model.generate(text, attention_mask=mask, **PLAIN, **options)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, :length], **PLAIN, **options)
        assert same_bits(out[row, 70:], alone[0, length:])
    # control: padding that is read as text
    unmasked = model.generate(text, attention_mask=torch.ones_like(mask), **PLAIN, **options)
    assert not same_bits(unmasked[1:], out[1:])


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 5}, {"lower_only_prefill": True}])
def test_a_prefilled_cache_is_continued_by_the_whole_text_or_by_what_is_new(options):
    model, ids = tiny_model(), random_ids(2, 60)
    expected = model.generate(ids, **PLAIN)[:, 60:]
    for read_before in (20, 59):
        past = model.prefill(ids[:, :read_before], segment_length=9)
        out = model.generate(ids, past_key_values=past, **PLAIN, **options)
        assert same_bits(out[:, 60:], expected)
        past = model.prefill(ids[:, :read_before], segment_length=9)
        new, mask = ids[:, read_before:], torch.ones_like(ids)
        out = model.generate(new, attention_mask=mask, past_key_values=past, **PLAIN, **options)
        assert same_bits(out[:, new.shape[1] :], expected)


def test_a_book_from_a_file_is_asked_several_questions(tmp_path):
    model, book, questions = tiny_model(), random_ids(1, 80), random_ids(2, 7, seed=1)
    model.prefill(book, segment_length=25, lower_only=True).save(tmp_path / "book", model)
    for question in questions:
        text = torch.cat([book, question[None]], 1)
        past = ChunkMemoryCache.load(tmp_path / "book", model)
        assert same_bits(model.generate(text, past_key_values=past, **PLAIN), greedy(model, text))
    # one cache for both
    past = ChunkMemoryCache.load(tmp_path / "book", model)
    past.batch_repeat_interleave(2)
    text = torch.cat([book.expand(2, -1), questions], 1)
    assert same_bits(model.generate(text, past_key_values=past, **PLAIN), greedy(model, text))


def test_a_conversation_goes_on_with_the_cache_that_generate_returned():
    model, ids, more = tiny_model(), random_ids(1, 30), random_ids(1, 8, seed=1)
    out = model.generate(ids, return_dict_in_generate=True, **PLAIN)
    text = torch.cat([out.sequences, more], 1)
    past = out.past_key_values
    # the last token was never read
    assert past.get_seq_length() == 30 + NEW - 1
    assert same_bits(model.generate(text, past_key_values=past, **PLAIN), greedy(model, text))


@pytest.mark.parametrize("length", [40, 75])
def test_lower_only_prefill_leaves_what_crop_and_the_next_tokens_need(length):
    model, ids, more = tiny_model(), random_ids(2, length), random_ids(2, 17, seed=1)
    for n in range(6):
        past = model.prefill(ids, segment_length=16, lower_only=True)
        past.crop(-n)
        text = torch.cat([ids[:, : length - n], more], 1)
        expected = whole(model, text)[:, length - n :]
        torch.testing.assert_close(read(model, more, past, 6), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "options, rule",
    [
        ({"cache_implementation": "static"}, "cache_implementation must be one of"),
        ({"prefill_chunk_size": 4, "use_cache": False}, "need input_ids and a cache"),
        ({"lower_only_prefill": True, "prompt_lookup_num_tokens": 3}, "cannot be had with assisted generation"),
        ({"lower_only_prefil": True}, "lower_only_prefil"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be an integer of at least 1 or None, got 0"),
        ({"prefill_chunk_size": 2.5}, "prefill_chunk_size must be an integer of at least 1 or None, got 2.5"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, rule):
    with pytest.raises(ValueError, match=rule):
        tiny_model().generate(random_ids(1, 20), **PLAIN, **options)


def test_prompts_that_end_in_padding_are_refused_and_the_message_says_what_to_do():
    model = tiny_model()
    ids, mask = padded(random_ids(3, 20), [20, 13, 9], "right")
    with pytest.raises(ValueError, match=r'padding_side = "left"\), got padding at the end of rows \[1, 2\]'):
        model.generate(ids, attention_mask=mask, **PLAIN)
    # control: on the left it is fine
    ids, mask = padded(random_ids(3, 20), [20, 13, 9], "left")
    assert model.generate(ids, attention_mask=mask, **PLAIN).shape == (3, 20 + NEW)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"segment_length": 0}, "segment_length must be an integer of at least 1 or None, got 0"),
        ({"segment_length": 2.5}, "segment_length must be an integer of at least 1 or None, got 2.5"),
        ({"segment_length": True}, "segment_length must be an integer of at least 1 or None, got True"),
        ({"past_key_values": {}}, "past_key_values must be a ChunkMemoryCache, got dict"),
        ({"attention_mask": torch.ones(1, 25)}, r"attention_mask must be \[1, 20\], got \[1, 25\]"),
        ({"segment": 4}, "segment"),
    ],
)
def test_prefill_refuses_what_it_cannot_serve(options, rule):
    with pytest.raises((ValueError, TypeError), match=rule):
        tiny_model().prefill(random_ids(1, 20), **options)
