"""Keyword coverage: which share of the given words stands in the texts, as whole words."""

import re
import unicodedata

import datasets
import evaluate


DESCRIPTION = """
Share of the keywords that stand in their text:

    coverage = sum_i |{k in K_i : k stands in text i}| / sum_i |K_i|        (every keyword weighs the same)
    complete = |{i : every k in K_i stands in text i}| / number of texts

A keyword stands in a text where it begins and ends at the border of a word: `cat` stands in "The cat's tail." and
"cat-like", not in "concatenate". A keyword of several words is a phrase: its words follow one another with white space
between. Letters are compared without case and in Unicode's composed form.

Keywords are looked for one by one: two of them may share words ("dog", "hot dog"), and a keyword listed twice needs to
stand there once.
"""

INPUTS = """
Args:
    predictions: Texts, `list[str]`.
    references: The keywords of each text, `list[list[str]]`. A text without keywords is complete and adds nothing to
        the coverage.
    inflected: Whether regular English forms of a keyword count, of every word of a phrase: -s, -es, -d, -ed, -ing,
        with -y to -i, a mute -e dropped and a final consonant doubled ("stop": stops, stopped, stopping). The rules do
        not know English: "bus" would also match "bused". Default: False.
    irregular: Further forms of single words, `dict[str, list[str]]`, as in `{"run": ["ran"]}`; they count whatever
        `inflected` says.

Returns:
    coverage: In [0, 1].
    complete: In [0, 1].
    missing: Keywords that do not stand in their text, a list for each text.

Raises:
    ValueError: If there is not one keyword, or one is blank.
"""

VOWELS = "aeiou"


def regular_forms(word: str) -> set[str]:
    """Return `word` and what regular English inflection makes of it."""
    forms = {word + ending for ending in ("", "s", "es", "ed", "ing")}
    if word.endswith("e"):
        forms |= {word + "d", word[:-1] + "ing"}
    consonant_y = len(word) > 1 and word.endswith("y") and word[-2] not in VOWELS
    if consonant_y:
        forms |= {word[:-1] + "ies", word[:-1] + "ied"}
    if re.search(rf"[^{VOWELS}][{VOWELS}][^{VOWELS}wxy]$", word):
        forms |= {word + word[-1] + "ed", word + word[-1] + "ing"}
    return forms


def composed(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower()


def keyword_pattern(keyword: str, inflected: bool, irregular: dict[str, list[str]]) -> re.Pattern:
    """Return the pattern of a word or phrase between borders of words."""
    words = []
    for word in composed(keyword).split():
        forms = {word, *irregular.get(word, ())} | (regular_forms(word) if inflected else set())
        # the longest first: alternation takes the first that fits
        words.append("|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True)))
    return re.compile(r"(?<!\w)" + r"\s+".join(f"(?:{forms})" for forms in words) + r"(?!\w)")


class KeywordCoverage(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references, inflected=False, irregular=None):
        keywords = [keyword for row in references for keyword in row]
        if not keywords:
            raise ValueError(f"there must be at least one keyword, got none for {len(predictions)} texts")
        if not all(keyword.strip() for keyword in keywords):
            raise ValueError(f"a keyword must not be blank, got {next(k for k in keywords if not k.strip())!r}")
        more = {composed(word): [composed(form) for form in forms] for word, forms in (irregular or {}).items()}
        missing = []
        for text, row in zip(predictions, references, strict=True):
            text = composed(text)
            missing.append([word for word in row if not keyword_pattern(word, inflected, more).search(text)])
        return {
            "coverage": 1 - sum(map(len, missing)) / len(keywords),
            "complete": sum(not row for row in missing) / len(missing),
            "missing": missing,
        }
