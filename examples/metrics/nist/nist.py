"""NIST, as nltk computes it, on the tokens of sacrebleu's BLEU."""

import datasets
import evaluate
import nltk.translate.nist_score
import sacrebleu.tokenizers.tokenizer_13a


DESCRIPTION = """
Corpus NIST by nltk (Doddington, 2002): n-gram precision in which a rare n-gram weighs more,

    NIST = penalty * sum_{n=1..N} sum_{matched w_1..w_n} info(w_1..w_n) / number of predicted n-grams
    info(w_1..w_n) = log2(count(w_1..w_{n-1}) / count(w_1..w_n))        (counts in the references)

In bits, without an upper bound; a set without a match has 0. For every order a text is compared with the reference
that fits best. Tokens are those of mteval-v13a.
"""

INPUTS = """
Args:
    predictions: Texts, `list[str]`.
    references: References of each text, `list[list[str]]`, at least one each.
    n: Highest order N. Default: 5.
    lowercase: Whether letters are compared without case. Default: False.

Returns:
    nist: The score.

Raises:
    ImportError: If nltk is not installed; the message says how.
    ValueError: If a text has no reference, `n` is below 1, or no prediction has `n` tokens.
"""


class Nist(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references, n=5, lowercase=False):
        if not references or not all(references):
            raise ValueError(f"every text needs a reference, got {[len(row) for row in references]}")
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        tokenizer = sacrebleu.tokenizers.tokenizer_13a.Tokenizer13a()

        def tokens(text: str) -> list[str]:
            return tokenizer(text.lower() if lowercase else text).split()

        written = [tokens(text) for text in predictions]
        if max(map(len, written)) < n:
            raise ValueError(f"a prediction must have at least n={n} tokens, got at most {max(map(len, written))}")
        score = nltk.translate.nist_score.corpus_nist([list(map(tokens, row)) for row in references], written, n=n)
        return {"nist": float(score)}
