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


def test_candidates_longer_than_the_crop_margin_are_an_error_not_a_wrong_text():
    model, ids = tiny_model(), random_ids(1, 30).repeat(1, 3)
    options = {**PLAIN, "prompt_lookup_num_tokens": 25}
    with pytest.raises(ValueError, match="larger crop_margin"):
        model.generate(ids, **options)
    past = ChunkMemoryCache(model.config, crop_margin=25)
    assert same_bits(model.generate(ids, past_key_values=past, **options), greedy(model, ids))


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
    ],
)
def test_options_that_would_do_nothing_are_refused(options, rule):
    with pytest.raises(ValueError, match=rule):
        tiny_model().generate(random_ids(1, 20), **PLAIN, **options)
