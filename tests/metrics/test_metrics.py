"""The metrics of examples/metrics, loaded by `evaluate` without a network: values by hand, properties, controls."""

import importlib.util
import math
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st


METRICS = Path(__file__).parents[2] / "examples" / "metrics"
NAMES = sorted(path.name for path in METRICS.iterdir() if path.is_dir())
WORDS = st.lists(st.sampled_from(["a", "dog", "old", "runs", "sea"]), min_size=1, max_size=8)
HAS_NLTK = importlib.util.find_spec("nltk") is not None
needs_nltk = pytest.mark.skipif(not HAS_NLTK, reason="NIST needs nltk: pip install nltk")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return `evaluate.load` by name, with caches of its own, and nothing to reach outside."""
    os.environ["HF_EVALUATE_OFFLINE"] = "1"
    import evaluate

    cache = str(tmp_path_factory.mktemp("metrics"))
    return lru_cache(lambda name: evaluate.load(str(METRICS / name), cache_dir=cache, keep_in_memory=True))


def coverage(load, text, keywords, **options):
    return load("keyword_coverage").compute(predictions=[text], references=[keywords], **options)["coverage"]


LOAD_ALL = """
import sys
import evaluate

for name in sys.argv[1:]:
    try:
        print("OK", name, evaluate.load(f"examples/metrics/{name}").inputs_description)
    except ImportError as error:
        print("ERROR", error)
"""


def test_modules_load_by_their_relative_folders_without_a_network(tmp_path):
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_EVALUATE_OFFLINE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-c", LOAD_ALL, *NAMES]
    done = subprocess.run(command, cwd=METRICS.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    usable = [name for name in NAMES if HAS_NLTK or name != "nist"]
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("OK")] == usable
    assert done.stdout.count("Returns:") == done.stdout.count("Raises:") == len(usable)
    # what is missing is named, with the command that installs it
    assert HAS_NLTK or "pip install nltk" in done.stdout


def test_coverage_by_hand(load):
    out = load("keyword_coverage").compute(
        predictions=["The old man and the sea.", "A dog.", "No keyword asked."],
        references=[["man", "sea", "fish"], ["dog"], []],
    )
    assert out == {"coverage": 3 / 4, "complete": 2 / 3, "missing": [["fish"], [], []]}


@pytest.mark.parametrize(
    ("text", "keyword", "found"),
    [
        ("The cat's tail.", "cat", True),
        ("a cat-like thing", "cat", True),
        ("CATS and a CAT", "cat", True),
        ("we concatenate", "cat", False),
        ("cats", "cat", False),
        ("cat_1", "cat", False),
        ("a hot  dog", "hot dog", True),
        ("a hot\ndog", "hot dog", True),
        ("hot, dog", "hot dog", False),
        ("hot doggy", "hot dog", False),
        ("photo dog", "to dog", False),
        ("the cafe\u0301", "café", True),
        ("the DOG’S tail", "dog's", True),
        ("the dog's tail", "dog’s", True),
        ("犬が走る", "犬", True),
        ("我的iPhone很好", "iphone", True),
        ("犬小屋x", "x", True),
        ("c.t", "c.t", True),
        ("cat", "c.t", False),
        ("it costs $5", "$5", True),
    ],
)
def test_a_keyword_counts_as_a_whole_word_only(load, text, keyword, found):
    assert coverage(load, text, [keyword]) == found


@pytest.mark.parametrize(
    ("keyword", "form", "found"),
    [
        ("dog", "dogs", True),
        ("box", "boxes", True),
        ("carry", "carries", True),
        ("carry", "carried", True),
        ("play", "played", True),
        ("play", "plaies", False),
        ("ride", "riding", True),
        ("stop", "stopped", True),
        ("stop", "stoping", True),
        ("show", "showwed", False),
        ("equip", "equipped", True),
        ("run", "running", True),
        ("run", "ran", False),
        ("cat", "concatenated", False),
        ("old man", "old mans", True),
    ],
)
def test_inflected_forms_count_when_asked_for(load, keyword, form, found):
    text = f"They say {form} here."
    assert coverage(load, text, [keyword], inflected=True) == found
    # control: not unless asked for
    assert coverage(load, text, [keyword]) == 0


def test_irregular_forms_are_given(load):
    assert coverage(load, "She ran.", ["Run"], irregular={"run": ["Ran"]}) == 1
    assert coverage(load, "She ran.", ["Run"], irregular={"swim": ["swam"]}) == 0


@pytest.mark.parametrize("keywords", [[], [" "]])
def test_nothing_to_cover_is_refused(load, keywords):
    with pytest.raises(ValueError, match="at least one keyword|must not be blank"):
        coverage(load, "text", keywords)


@settings(max_examples=25, deadline=None)
@given(words=WORDS, more=WORDS)
def test_words_of_a_text_are_covered_and_more_text_never_covers_less(load, words, more):
    text = " ".join(words)
    assert coverage(load, text, words) == 1
    assert coverage(load, text, [text]) == 1
    assert coverage(load, text + " " + " ".join(more), more) >= coverage(load, text, more)
    # control: glued together there are no words left
    assert coverage(load, "x" + "x".join(words) + "x", words) == 0


def test_distinct_by_hand(load):
    texts = ["the dog, the DOG", "a dog"]
    metric = load("distinct_n")
    # the dog , the dog | a dog: 4 of 7 tokens; the-dog dog-, ,-the the-dog a-dog: 4 of 5
    assert metric.compute(predictions=texts) == {"distinct_1": 4 / 7, "distinct_2": 4 / 5}
    assert metric.compute(predictions=texts, n=1, lowercase=False) == {"distinct_1": 5 / 7}
    assert metric.compute(predictions=texts, n=2, level="text") == {"distinct_2": pytest.approx((3 / 4 + 1) / 2)}
    assert metric.compute(predictions=texts, n=3) == {"distinct_3": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "at least 1, or several, got 0"),
        ({"n": 2.0}, "n must be an integer .*got 2.0"),
        ({"n": 3}, "at most 2"),
        ({"level": "row"}, "level must be one of"),
    ],
)
def test_distinct_refuses_what_has_no_value(load, options, message):
    with pytest.raises(ValueError, match=message):
        load("distinct_n").compute(predictions=["a dog"], **options)


@settings(max_examples=25, deadline=None)
@given(words=WORDS, times=st.integers(2, 4))
def test_repeating_a_set_divides_its_distinct_share(load, words, times):
    metric, text = load("distinct_n"), " ".join(words)
    once = metric.compute(predictions=[text], n=1)["distinct_1"]
    assert once == len(set(words)) / len(words)
    assert metric.compute(predictions=[text] * times, n=1)["distinct_1"] == pytest.approx(once / times)
    assert metric.compute(predictions=[text] * times, n=1, level="text")["distinct_1"] == pytest.approx(once)


def infill(load, text, truth, template, **options):
    return load("exact_infill").compute(predictions=[text], references=[truth], templates=[template], **options)


def test_infill_by_hand(load):
    out = load("exact_infill").compute(
        predictions=["The old man went  home .", "A cat in the sun .", "dogs run"],
        references=["The old man went to sea .", "A cat in the sun .", "dogs"],
        templates=["The ___ man went ___ .", "A ___ in the ___{1,3} .", "dogs ___"],
    )
    assert out == {"exact_gap": 3 / 5, "exact_text": 1 / 3, "kept": 1.0}


def test_infill_that_lost_the_given_text_has_no_gap_right(load):
    out = infill(load, "The old woman went to sea", "The old man went to sea", "The ___ man went ___")
    assert out == {"exact_gap": 0, "exact_text": 0, "kept": 0}
    # control: the same in a word where the template says so
    out = infill(load, "The old woman went to sea", "The old man went to sea", "The ___man went ___")
    assert out == {"exact_gap": 1 / 2, "exact_text": 0, "kept": 1}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("the ___ .", "the sea."),
        ("the ___ man .", "the man."),
        ("___ ___ end", "a b end"),
        ("un___able", "unthinkable"),
    ],
)
def test_infill_reads_what_is_glued_or_empty(load, template, text):
    assert infill(load, text, text, template) == {"exact_gap": 1, "exact_text": 1, "kept": 1}


def test_infill_compares_case_unless_told(load):
    args = ("a Cat runs", "a cat runs", "a ___ runs")
    assert infill(load, *args)["exact_gap"] == 0
    assert infill(load, *args, ignore_case=True) == {"exact_gap": 1, "exact_text": 1, "kept": 1}


def test_infill_compares_composed_letters(load):
    assert infill(load, "café is cafe\u0301", "cafe\u0301 is café", "café is ___")["exact_text"] == 1


@pytest.mark.parametrize(
    ("truth", "template", "message"),
    [("a cat", "a cat", "needs a mark"), ("a cat", "the ___", "must fit its template")],
)
def test_infill_refuses_rows_that_cannot_be_scored(load, truth, template, message):
    with pytest.raises(ValueError, match=message):
        infill(load, "a cat", truth, template)


@settings(max_examples=25, deadline=None)
@given(fills=st.tuples(WORDS, WORDS), other=WORDS)
def test_the_reference_itself_is_exact_and_another_text_is_not(load, fills, other):
    template = "BEGIN ___ MIDDLE ___ END"
    truth = f"BEGIN {' '.join(fills[0])} MIDDLE {' '.join(fills[1])} END"
    assert infill(load, truth, truth, template) == {"exact_gap": 1, "exact_text": 1, "kept": 1}
    text = f"BEGIN {' '.join(other)} MIDDLE {' '.join(fills[1])} END"
    assert infill(load, text, truth, template)["exact_gap"] == (1 if other == fills[0] else 0.5)


def test_bleu_is_sacrebleu_with_ragged_references(load):
    texts = ["the old man and the sea", "a dog runs in the park"]
    references = [["the old man and a sea", "an old man and the sea"], ["a dog ran in the park"]]
    out = load("bleu").compute(predictions=texts, references=references)
    columns = [["the old man and a sea", "a dog ran in the park"], ["an old man and the sea", None]]
    assert out["bleu"] == sacrebleu.corpus_bleu(texts, columns).score
    assert "mean" not in out and out["brevity_penalty"] == 1
    assert load("bleu").compute(predictions=texts, references=references, bootstrap=20)["interval"] > 0
    # control: a text that shares no word
    assert load("bleu").compute(predictions=["x y z u"], references=[["a b c d"]])["bleu"] == 0


def test_bleu_by_hand(load):
    # one text, one wrong word at the end: 4/5, 3/4, 2/3, 1/2
    out = load("bleu").compute(predictions=["a b c d x"], references=[["a b c d e"]])
    assert out["precisions"] == pytest.approx([80, 75, 200 / 3, 50])
    assert out["bleu"] == pytest.approx(100 * (0.8 * 0.75 * 2 / 3 * 0.5) ** 0.25)


@needs_nltk
def test_nist_by_hand(load):
    # every word of the reference stands there once: log2 4 bits each; a pair adds log2(1 / 1) = 0
    out = load("nist").compute(predictions=["a b c d"], references=[["a b c d"]], n=2)
    assert out["nist"] == pytest.approx(math.log2(4))
    # a rarer word weighs more: b c of a a b c are log2 4 each, a log2 2
    rare = load("nist").compute(predictions=["b c x x"], references=[["a a b c"]], n=1)["nist"]
    common = load("nist").compute(predictions=["a a x x"], references=[["a a b c"]], n=1)["nist"]
    assert (rare, common) == (pytest.approx(2 * 2 / 4), pytest.approx(2 * 1 / 4))
    assert load("nist").compute(predictions=["x y"], references=[["a b"]], n=1)["nist"] == 0


@needs_nltk
def test_nist_refuses_what_has_no_value(load):
    with pytest.raises(ValueError, match="at least n=5 tokens, got at most 2"):
        load("nist").compute(predictions=["a b"], references=[["a b"]])


@pytest.mark.parametrize("name", ["bleu", pytest.param("nist", marks=needs_nltk)])
def test_a_text_without_a_reference_is_refused(load, name):
    with pytest.raises(ValueError, match=r"every text needs a reference, got \[1, 0\]"):
        load(name).compute(predictions=["a b", "c d"], references=[["a b"], []])
