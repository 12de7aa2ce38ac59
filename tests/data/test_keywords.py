"""Keywords are found in texts as whole words and phrases, inflected or not, whatever their case and script."""

import pytest

from modeling_insnext.data import inflections, keyword_spans, load_texts, save_texts, split_sentences


@pytest.mark.parametrize(
    ("text", "keywords", "found"),
    [
        ("The Dog ran in New  York.", ["dog", "New York"], ["Dog", "New  York"]),
        ("The dog ran.", ["Dog"], ["dog"]),
        ("Le cafe\u0301 dans la forêt.", ["café", "forêt"], ["cafe\u0301", "forêt"]),
        ("A T-shirt and the dog’s tail in 2019.", ["t-shirt", "dog's", "2019"], ["T-shirt", "dog’s", "2019"]),
        ("Собака бежит. 犬が走る。我的iPhone", ["собака", "犬", "iphone"], ["Собака", "犬", "iPhone"]),
        ("The hot soup, a hot dog.", ["hot dog"], ["hot dog"]),
        ("A carpet and a candle.", ["car", "can"], []),
        ("She stops, tried and stood with Firemen.", ["stop", "try", "stand", "fireman"], None),
        ("It quits, quitting and quit.", ["quit"], ["quit"]),
        ("A dog and dogs.", ["dog", "dog", "dog"], ["dog", "dogs"]),
        ("xa a a", ["a a"], ["a a"]),
    ],
)
def test_keywords_are_found_as_whole_words(text, keywords, found):
    spans = keyword_spans(text, keywords)
    expected = ["stops", "tried", "stood", "Firemen"] if found is None else found
    assert [text[left:right] for left, right in spans] == expected


FORMS = """
look looks looked looking
stop stops stopped stopping
visit visits visited visiting
try tries tried trying
play plays played playing
go goes went going
watch watches watched watching
fix fixes fixed fixing
dance dances danced dancing
agree agrees agreed agreeing
tie ties tied tying
lie lies lay lying
dye dyes dyed dyeing
sing sings sang sung singing
begin begins began begun beginning
picnic picnics picnicked picnicking
child children
wolf wolves
fireman firemen
"""


@pytest.mark.parametrize("forms", [line.split() for line in FORMS.strip().split("\n")], ids=lambda forms: forms[0])
def test_a_word_has_its_forms_and_all_of_them_are_found(forms):
    assert inflections(forms[0]) == forms
    assert all(keyword_spans(f"They {form}.", [forms[0]]) == [(5, 5 + len(form))] for form in forms)
    assert keyword_spans(f"They {forms[0]}x.", [forms[0]]) == []


@pytest.mark.parametrize("word", ["", "old man", "x1"])
def test_only_a_word_has_forms(word):
    with pytest.raises(ValueError, match=f"word must be one word of letters, got '{word}'"):
        inflections(word)


def test_sentences_end_where_prose_ends_them():
    text = 'Mr. Fox ran. "Stop! Now," said Ann. He went on... and on. Why?'
    assert split_sentences(text) == ["Mr. Fox ran.", '"Stop! Now," said Ann.', "He went on... and on.", "Why?"]
    assert split_sentences("") == [""]


def test_texts_come_back_from_their_file(tmp_path):
    texts = [
        {"input_ids": [1, 5, 300], "keywords": [False, True, False], "complete": True, "source": "books"},
        {"input_ids": [1, 65_535], "keywords": [False, False], "complete": False, "source": "captions"},
    ]
    save_texts(tmp_path / "texts.npz", texts)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.npz"]
    read = load_texts(tmp_path / "texts.npz")
    assert [
        {**text, "input_ids": list(text["input_ids"]), "keywords": list(text["keywords"])} for text in read
    ] == texts
    with pytest.raises(OverflowError):
        save_texts(tmp_path / "wide.npz", [{**texts[0], "input_ids": [65_536]}])
