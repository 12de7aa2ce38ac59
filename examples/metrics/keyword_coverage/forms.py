"""How a keyword is found in a text: as a whole word or phrase, inflected or not."""

import re
import unicodedata
from collections.abc import Iterator


VOWELS = "aeiou"
APOSTROPHES = str.maketrans("\u2019\u02bc", "''")
# Thai to Lao, Myanmar, Khmer, Japanese and Chinese: no space parts their words
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
BEGIN = re.compile(rf"(?<![^\W{UNSPACED}])|(?=[{UNSPACED}])")
END = re.compile(rf"(?![^\W{UNSPACED}])|(?<=[{UNSPACED}])")


def regular_forms(word: str) -> set[str]:
    """Return `word` and what regular English inflection makes of it."""
    forms = {word + ending for ending in ("", "s", "es", "ed", "ing")}
    if word.endswith("e"):
        forms |= {word + "d", word[:-1] + "ing"}
    if word.endswith("ie"):
        forms.add(word[:-2] + "ying")
    consonant_y = len(word) > 1 and word.endswith("y") and word[-2] not in VOWELS
    if consonant_y:
        forms |= {word[:-1] + "ies", word[:-1] + "ied"}
    if re.search(rf"(?:qu|[^{VOWELS}])[{VOWELS}][^{VOWELS}wxy]$", word):
        forms |= {word + word[-1] + "ed", word + word[-1] + "ing"}
    return forms


def composed(text: str) -> str:
    """Return the text in Unicode's composed form, with straight apostrophes."""
    return unicodedata.normalize("NFC", text).translate(APOSTROPHES)


def keyword_pattern(keyword: str, inflected: bool, irregular: dict[str, list[str]]) -> re.Pattern:
    """Return the pattern of a word or phrase in composed text, whatever its case.

    Args:
        keyword: The word or phrase.
        inflected: Whether regular English forms count, of every word of a phrase.
        irregular: Further forms of single words, by the word in lower case.
    """
    words = []
    for word in composed(keyword).split():
        forms = {word, *irregular.get(word.lower(), ())} | (regular_forms(word.lower()) if inflected else set())
        # the longest first: alternation takes the first that fits
        words.append("|".join(re.escape(form) for form in sorted(forms, key=lambda form: (-len(form), form))))
    return re.compile(r"\s+".join(f"(?:{forms})" for forms in words), re.IGNORECASE)


def keyword_matches(pattern: re.Pattern, text: str) -> Iterator[re.Match]:
    """Yield the places of composed text in which the pattern stands between borders of words."""
    place = 0
    # not in the pattern: their letters would take milliseconds to compile for every keyword
    while (match := pattern.search(text, place)) is not None:
        whole = BEGIN.match(text, match.start()) and END.match(text, match.end())
        if whole:
            yield match
        place = match.end() if whole else match.start() + 1
