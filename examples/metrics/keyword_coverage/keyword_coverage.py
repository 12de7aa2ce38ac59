"""Keyword coverage: which share of the given words stands in the texts, as whole words."""

import datasets
import evaluate

from .forms import composed, keyword_matches, keyword_pattern


DESCRIPTION = """
Share of the keywords that stand in their text:

    coverage = sum_i |{k in K_i : k stands in text i}| / sum_i |K_i|        (every keyword weighs the same)
    complete = |{i : every k in K_i stands in text i}| / number of texts

A keyword stands in a text where it begins and ends at the border of a word: `cat` stands in "The cat's tail." and
"cat-like", not in "concatenate"; Chinese, Japanese, Thai, Lao, Khmer and Burmese letters have no such borders. A
keyword of several words is a phrase: its words follow one another with white space between. Letters are compared
without case and in Unicode's composed form, an apostrophe is straight or curly.

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
        more = {
            composed(word).lower(): [composed(form) for form in forms] for word, forms in (irregular or {}).items()
        }
        missing = []
        for text, row in zip(predictions, references, strict=True):
            text = composed(text)
            missing.append(
                [word for word in row if not any(keyword_matches(keyword_pattern(word, inflected, more), text))]
            )
        return {
            "coverage": 1 - sum(map(len, missing)) / len(keywords),
            "complete": sum(not row for row in missing) / len(missing),
            "missing": missing,
        }
