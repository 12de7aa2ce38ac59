"""BLEU, as sacrebleu computes it, over any number of references a text."""

from itertools import zip_longest

import datasets
import evaluate
import sacrebleu


DESCRIPTION = """
Corpus BLEU by sacrebleu (Papineni et al., 2002; Post, arXiv:1804.08771):

    BLEU = 100 BP exp(1/4 sum_{n=1..4} log p_n),        BP = min(1, exp(1 - r / c))

p_n: clipped n-gram precision over all texts; c: length of the predictions; r: of the references nearest in length. In
points, 0 to 100. Texts may have different numbers of references. An order without a match is smoothed as in sacrebleu
("exp"); a set without any match, or of empty predictions, has 0.
"""

INPUTS = """
Args:
    predictions: Texts, `list[str]`.
    references: References of each text, `list[list[str]]`, at least one each.
    lowercase: Whether letters are compared without case. Default: False.
    tokenize: sacrebleu's tokenizer. Default: "13a".
    bootstrap: Resamplings of the 95 % interval; 0 for none. Default: 0.

Returns:
    bleu: The score of these texts.
    precisions: p_1..p_4, in percent.
    brevity_penalty: BP.
    interval: Half of the width of the 95 % interval, in points, and `mean`, its centre; with `bootstrap` only.
    signature: sacrebleu's account of the settings.

Raises:
    ValueError: If a text has no reference, or there is no text.
"""


class Bleu(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references, lowercase=False, tokenize="13a", bootstrap=0):
        if not references or not all(references):
            raise ValueError(f"every text needs a reference, got {[len(row) for row in references]}")
        # sacrebleu reads references by column, None where a text has fewer
        columns = list(zip_longest(*references))
        metric = sacrebleu.metrics.BLEU(lowercase=lowercase, tokenize=tokenize)
        score = metric.corpus_score(predictions, columns, n_bootstrap=bootstrap or 1)
        result = {
            "bleu": score.score,
            "precisions": score.precisions,
            "brevity_penalty": score.bp,
            "signature": str(metric.get_signature()),
        }
        return {**result, "mean": score._mean, "interval": score._ci} if bootstrap else result
