"""Keywords are found in texts as whole words and phrases, inflected or not, whatever their case and script."""

import pytest
from prepare_corpus import keyword_spans
from script_models import tiny_tokenizer


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


def test_the_tokens_of_keywords_are_given_and_what_is_missing_is_counted():
    import run_finetuning

    tokenizer = tiny_tokenizer()
    args = run_finetuning.FinetuningArguments(task="keywords", keywords_column="words")
    texts, words = [["The old man sees a cat", "a dog"]], [["Old Man", "cat"]]
    made = run_finetuning.insertion_examples(args, tokenizer)({"text": texts, "words": words})
    given = [
        tokenizer.decode([token for token, given in zip(*pair, strict=True) if given])
        for pair in zip(made["input_ids"], made["given"], strict=True)
    ]
    assert [text.split() for text in given] == [["old", "man", "cat"], []]
    assert made["found"] == [2, 0] and made["asked"] == [2, 2]
