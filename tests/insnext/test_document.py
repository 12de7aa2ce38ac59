"""Documents: random edits against the whole history read at once, undo by bits, what was encoded; and bad input."""

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_insnext.insnext.cache import InsertionCache
from modeling_insnext.insnext.canvas_pieces import token_ids
from modeling_insnext.insnext.live_draft import LiveDraft
from tests.support.edit_history import EditHistory, agree, everything, held, is_its_history
from tests.support.equality import same_bits
from tests.support.insnext import tiny_model
from tests.support.tokenizers import tiny_tokenizer


ENCODINGS = {
    "alibi": {},
    "rotary": {"position_encoding": "rotary"},
    "causal": {"position_encoding": "rotary", "block_attention": "causal"},
}
PIECES = ("a", "old ", " man", "the", "\n", "é", "  ", "x", "")
SCRIPTS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "insert", "delete", "replace", "write", "refresh", "undo"]),
        st.floats(0, 1),
        st.floats(0, 1),
        st.sampled_from(PIECES),
    ),
    min_size=1,
    max_size=7,
)
QUICK = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
ALL = settings(QUICK, max_examples=2000)


@cache
def tools(encoding):
    tokenizer = tiny_tokenizer(vocab_size=290, all_bytes=True, add_prefix_space=False)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    return tiny_model(vocab_size=290, initializer_range=0.6, **ENCODINGS[encoding], **small), tokenizer


def opened(encoding, text="the old man and the sea", **options):
    model, tokenizer = tools(encoding)
    return model.open(tokenizer, text, **options), EditHistory(model, tokenizer, text)


def token_place(document, piece):
    (token,) = token_ids(document.tokenizer, piece)
    return document.ids.index(token)


class Writes:
    """Notes where a draft writes which token, in the place of `LiveDraft.write`."""

    def __init__(self, monkeypatch):
        self.calls, write = [], LiveDraft.write

        def noted(draft, slots, tokens, acts):
            self.calls.append((int(draft.ranks[0, slots[0]]) + 1, int(tokens[0])))
            write(draft, slots, tokens, acts)

        monkeypatch.setattr(LiveDraft, "write", noted)


def run_write(document, history, writes, at):
    model, tokenizer = document.model, document.tokenizer
    canvas = model.canvas(tokenizer, document.text[:at] + "\ue000" + document.text[at:], gap="\ue000")
    writes.calls.clear()
    before = document.text
    written = document.write(at, max_new_tokens=2, min_new_tokens=1, do_sample=True, seed=at)
    if document.text != before:
        history.note()
        history.become(canvas.input_ids[0].tolist())
        for rank, token in writes.calls:
            history.block(rank, rank, [token])
        history.become(history.ids_of(document.text))
    else:
        history.encoded = document.encoded_tokens
    assert written in document.text


def run_script(encoding, script, monkeypatch):
    """Run edits on a document and on its history; return both and what the document held before every edit."""
    document, history = opened(encoding, "the old")
    writes, snapshots = Writes(monkeypatch), []
    for name, x, y, piece in script:
        start, end = sorted((round(x * len(document.text)), round(y * len(document.text))))
        before, snapshot = document.text, everything(document)
        if name == "undo":
            if snapshots:
                document.undo()
                history.undo()
                assert same_bits(everything(document), snapshots.pop())
            continue
        if name == "refresh":
            document.refresh()
            history.refresh()
            continue
        if name == "write":
            run_write(document, history, writes, start)
        else:
            end, piece = (start if name == "insert" else end), ("" if name == "delete" else piece)
            document.replace(start, end, piece)
            assert document.text == before[:start] + piece + before[end:]
            if document.text != before:
                history.note()
                history.become(history.ids_of(document.text))
        if document.text != before:
            snapshots.append(snapshot)
    return document, history, snapshots


def check_script(encoding, script, monkeypatch):
    with monkeypatch.context() as patch:
        document, history, snapshots = run_script(encoding, script, patch)
    assert document.ids == history.ids_of(document.text)
    assert document.encoded_tokens == history.encoded
    assert is_its_history(document, history)
    while snapshots:
        document.undo()
        assert same_bits(everything(document), snapshots.pop())
    with pytest.raises(ValueError, match="no edit to undo"):
        document.undo()


@pytest.mark.parametrize("encoding", ENCODINGS)
@QUICK
@given(script=SCRIPTS)
def test_any_edits_give_the_text_the_history_and_the_count_and_undo_restores_bits(encoding, script, monkeypatch):
    check_script(encoding, script, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
@ALL
@given(script=SCRIPTS)
def test_two_thousand_edit_scripts_hold(encoding, script, monkeypatch):
    check_script(encoding, script, monkeypatch)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_control_a_cache_that_does_not_close_ranks_is_another_history(encoding):
    document, history = opened(encoding)
    wrong = EditHistory(document.model, document.tokenizer, document.text, forgets=False)
    document.delete(3, 7)
    for twin in (history, wrong):
        twin.become(twin.ids_of(document.text))
    document.insert(7, " sat")
    for twin in (history, wrong):
        twin.become(twin.ids_of(document.text))
    assert is_its_history(document, history)
    assert wrong.ids() == document.ids and not is_its_history(document, wrong)


def test_control_an_undo_that_forgets_keys_and_values_restores_no_bits(monkeypatch):
    document, _ = opened("alibi")
    before = everything(document)
    put_back = InsertionCache.put_back

    def forgetful(cache, kept, removed, columns):
        put_back(cache, kept, removed, [(keys * 0, values * 0) for keys, values in columns])

    document.delete(3, 7)
    monkeypatch.setattr(InsertionCache, "put_back", forgetful)
    document.undo()
    after = everything(document)
    assert same_bits({**after, "columns": before["columns"]}, before) and not same_bits(after, before)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_insertions_alone_are_a_forward_pass_over_them_in_their_order(encoding):
    document, _ = opened(encoding, "the man")
    sizes = [document.draft.size]
    for at, piece in ((3, " old"), (11, " sat")):
        document.insert(at, piece)
        sizes.append(document.draft.size)
    draft, size = document.draft, document.draft.size
    horizon = torch.tensor([[next(end for end in sizes if entry < end) - 1 for entry in range(size)]])
    with torch.no_grad():
        hidden = document.model.model(
            draft.ids[:, :size], positions=draft.ranks[:, :size], horizon=horizon
        ).last_hidden_state
    assert agree(draft.hidden[:, :size], hidden)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_after_a_refresh_a_document_is_the_text_opened_anew_and_before_it_is_not(encoding):
    document, _ = opened(encoding)
    document.replace(4, 7, "young")
    anew, _ = opened(encoding, document.text)
    assert not agree(document.draft.state, anew.draft.state)
    assert max(document.staleness) == document.draft.changes > 0
    document.refresh()
    assert agree(held(document), held(anew))
    assert set(document.staleness) == {0}
    document.undo()
    assert document.text == "the old man and the sea" and is_its_history(document, opened(encoding)[1])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_deleting_what_was_inserted_leaves_the_document_as_it_was_but_for_staleness(encoding):
    document, _ = opened(encoding)
    before = everything(document)
    document.insert(8, "young ")
    document.delete(8, 14)
    assert agree(held(document), {name: before[name] for name in held(document)})
    assert document.staleness != before["changed_at"][0].tolist()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_writing_into_a_fresh_document_is_generate_with_a_gap_there(encoding):
    model, tokenizer = tools(encoding)
    for at, options in ((3, {}), (23, {"do_sample": True, "seed": 5}), (7, {"ebr": True, "ebr_ratio": 0.1})):
        document, _ = opened(encoding)
        text = document.text
        canvas = model.canvas(tokenizer, text[:at] + "###" + text[at:], gap="###")
        expected = model.generate(**canvas, max_new_tokens=4, min_new_tokens=4, **options)
        written = document.write(at, max_new_tokens=4, min_new_tokens=4, **options)
        assert document.text == tokenizer.decode(expected[0, 1:]) and written
        document.undo()
        assert document.text == text


def test_untouched_text_is_not_encoded_again_and_a_keystroke_is_one_pass():
    document, _ = opened("rotary")
    tokens, passes = document.encoded_tokens, document.passes
    assert (tokens, passes) == (len(document.ids), 1)
    document.insert(7, "!")
    assert (document.encoded_tokens, document.passes) == (tokens + 1, passes + 1)
    document.delete(7, 8)
    assert (document.encoded_tokens, document.passes) == (tokens + 1, passes + 1)


def test_a_letter_inside_a_word_cuts_that_word_anew_and_nothing_else():
    document, history = opened("alibi")
    before = list(document.ids)
    document.insert(6, "x")
    ids = history.ids_of("the olxd man and the sea")
    assert document.ids == ids
    changed = [token for token, age in zip(ids, document.staleness, strict=True) if age == 0]
    assert document.tokenizer.decode(changed).strip() in " olxd"
    assert [age > 0 for age in document.staleness].count(True) >= len(before) - 2


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_documents_of_one_model_do_not_know_of_one_another(encoding):
    one, history = opened(encoding)
    other, _ = opened(encoding, "the sea")
    one.insert(3, " very")
    other.delete(0, 3)
    other.write(0, max_new_tokens=2)
    history.become(history.ids_of(one.text))
    assert is_its_history(one, history)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_at_a_drift_of_0_a_document_is_always_fresh_and_without_one_never_again(encoding):
    watched, _ = opened(encoding, max_drift=0.0)
    patient, _ = opened(encoding, max_drift=1e9)
    for document in (watched, patient):
        document.insert(7, " old")
        document.delete(0, 3)
    assert agree(held(watched), held(opened(encoding, watched.text)[0])) and watched.drift == 0
    assert patient.drift > 0 and max(patient.staleness) > 0
    patient.undo()
    patient.undo()
    assert patient.drift == 0 and is_its_history(patient, opened(encoding)[1])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_the_model_writes_drifts_and_refreshes_as_what_is_typed(encoding):
    texts = []
    for limit in (None, 1e9, 0.0):
        document, _ = opened(encoding, max_drift=limit)
        assert document.write(7, max_new_tokens=3, min_new_tokens=3)
        texts.append(document.text)
        assert (document.drift > 0) == (limit == 1e9)
    assert len(set(texts)) == 1
    assert agree(held(document), held(opened(encoding, document.text)[0]))


def test_drift_is_the_relative_change_of_the_token_right_of_the_edit_or_left_at_the_end():
    for at, ends_text in ((7, False), (23, True)):
        document, history = opened("rotary", max_drift=1e9)
        beside = len(document.ids) - 1 if ends_text else token_place(document, " man")
        before = document.draft.hidden[0, document.draft.order()[beside]].clone()
        document.insert(at, "!")
        # the one beside is encoded with what was inserted
        mark, same = history.ids_of("!")[1], history.ids()[beside]
        history.block(beside, beside + 1, [same, mark] if ends_text else [mark, same])
        assert is_its_history(document, history)
        after = document.draft.hidden[0, document.draft.order()[beside + (not ends_text)]]
        assert document.drift == pytest.approx(float((after - before).norm() / before.norm()))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_span_scores_as_the_model_scores_it_and_the_document_stays(encoding):
    document, history = opened(encoding)
    before, tokens = everything(document), document.encoded_tokens
    ids = torch.tensor([document.ids])
    context = torch.ones_like(ids, dtype=torch.bool)
    lengths = [len(document.tokenizer.decode(document.ids[1:end])) for end in range(1, len(document.ids) + 1)]
    span = [place for place in range(1, len(lengths)) if lengths[place - 1] < 11 and lengths[place] > 4]
    context[0, span] = False
    for stop in (True, False):
        expected = document.model.score(ids, context_mask=context, orders=torch.arange(len(span))[None], stop=stop)
        assert document.score(4, 11, stop=stop) == pytest.approx(float(expected))
    assert document.tokenizer.decode(ids[0, span]) == " old man"
    assert same_bits(everything(document), before)
    assert document.encoded_tokens == tokens + 2 * len(document.ids)


BAD = {
    "insert_negative": (lambda d: d.insert(-1, "a"), "from 0 to 23"),
    "insert_beyond": (lambda d: d.insert(24, "a"), "from 0 to 23"),
    "insert_bool": (lambda d: d.insert(True, "a"), "from 0 to 23"),
    "insert_bytes": (lambda d: d.insert(0, b"a"), "text must be a string"),
    "surrogate": (lambda d: d.insert(0, "\ud800"), "lone surrogate"),
    "too_long": (lambda d: d.insert(0, "xyxy" * 64), "max_position_embeddings=64"),
    "delete_backwards": (lambda d: d.delete(4, 2), "from left to right"),
    "score_nothing": (lambda d: d.score(4, 4), "no token holds"),
    "write_beyond": (lambda d: d.write(99), "from 0 to 23"),
    "write_beams": (lambda d: d.write(0, num_beams=2), "num_beams"),
    "write_several": (lambda d: d.write(0, do_sample=True, num_return_sequences=2), "num_return_sequences"),
    "write_static": (lambda d: d.write(0, cache_implementation="static"), "cache_implementation"),
    "write_left_to_right": (lambda d: d.write(0, left_to_right=True), "left_to_right"),
    "write_stop_strings": (lambda d: d.write(0, stop_strings="a"), "stop_strings"),
    "write_dict": (lambda d: d.write(0, return_dict_in_generate=True), "return_dict_in_generate"),
    "write_canvas": (lambda d: d.write(0, slot_mask=torch.ones(1, 8, dtype=torch.bool)), "slot_mask"),
    "write_misspelt": (lambda d: d.write(0, max_new_token=3), "max_new_token"),
    "write_special": (lambda d: d.write(0, pad_token_id=10**6), "pad_token_id"),
    "nothing_to_undo": (lambda d: d.undo(), "no edit to undo"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_work_and_changes_nothing(name):
    call, message = BAD[name]
    document, _ = opened("rotary")
    before, tokens = everything(document), document.encoded_tokens
    with pytest.raises(ValueError, match=message):
        call(document)
    assert same_bits(everything(document), before) and document.encoded_tokens == tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drift": -0.1}, "max_drift"),
        ({"max_drift": True}, "max_drift"),
        ({"undo_limit": -1}, "undo_limit"),
        ({"undo_limit": 1.5}, "undo_limit"),
        ({"text": "x" * 99}, "max_position_embeddings"),
        ({"text": None}, "text must be a string"),
    ],
)
def test_bad_options_of_open_are_refused(options, message):
    model, tokenizer = tools("alibi")
    with pytest.raises(ValueError, match=message):
        model.open(tokenizer, **options)


def test_what_fails_in_the_middle_leaves_the_document_as_it_was(monkeypatch):
    document, _ = opened("alibi")
    before = everything(document)

    def give_up(*given):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        document.write(3, max_new_tokens=3, min_new_tokens=2, stopping_criteria=[give_up])
    assert same_bits(everything(document), before)
    monkeypatch.setattr(document.draft, "_settle", give_up)
    with pytest.raises(KeyboardInterrupt):
        document.replace(3, 7, "x")
    monkeypatch.undo()
    assert same_bits(everything(document), before)


def test_only_the_last_edits_are_kept():
    document, _ = opened("alibi", undo_limit=1)
    document.insert(0, "a ")
    document.insert(0, "x")
    document.undo()
    with pytest.raises(ValueError, match="no edit"):
        document.undo()
    assert document.text == "a the old man and the sea"
