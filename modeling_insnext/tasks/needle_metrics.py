"""What an answer to a needle's question is worth. Needs torch only.

Two figures a question. *Whole answer*: every token of the answer is right. *Published*: one token, given those before
it in the answer, counts, as in DRT's tables: the first one of a passkey or value, the last one of two_hop's C.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import NamedTuple

import torch

from .needles import NeedleSample


# index in the answer of the token that the published score counts
PUBLISHED = {"passkey": 0, "multi_key": 0, "two_hop": -1}


class NeedleScore(NamedTuple):
    """Whether a question was answered.

    Attributes:
        exact: Every token of the answer is right.
        published: The token of the published score is right; None where a generated text cannot tell, and for needles
            in words, which have no such score.
    """

    exact: bool
    published: bool | None


def needle_scores(logits: torch.Tensor, sample: NeedleSample) -> list[NeedleScore]:
    """Score the most probable tokens of a forward over the whole text, the answers included.

    `exact` says the same as greedy generation from the prompt: as long as every token was right, both have read the
    same text, so either every token is right in both, or both fail, first at the same token. What follows a wrong
    token may differ, and with it the number of right tokens; `exact` does not.

    Args:
        logits: `[K, V]` or `[1, K, V]`, of the last K tokens of the text (`logits_to_keep`).

    Returns:
        A score for each question, in text order.

    Raises:
        ValueError: If the logits have another shape, or do not reach back to the last token of the first question.
    """
    logits_KV = logits[0] if logits.ndim == 3 and len(logits) == 1 else logits
    if logits_KV.ndim != 2:
        raise ValueError(f"logits must be [K, V] or [1, K, V], got {tuple(logits.shape)}")
    num_tokens = len(sample.input_ids)
    needed, first = num_tokens - sample.questions[0].end, num_tokens - len(logits_KV)
    if not needed <= len(logits_KV) <= num_tokens:
        raise ValueError(f"logits must be those of the last {needed} to {num_tokens} tokens, got {len(logits_KV)}")
    rows = [slice(question.end - first, question.stop - 1 - first) for question in sample.questions]
    return [answer_score(logits_KV[at], sample, number) for number, at in enumerate(rows)]


def answer_score(logits: torch.Tensor, sample: NeedleSample, question: int = -1) -> NeedleScore:
    """Score one question by the logits that its answer is read from; else as `needle_scores`.

    Args:
        logits: `[A, V]`, of the tokens `input_ids[question.end : question.stop - 1]`: those before each token of the
            answer.
        question: Which of the sample's questions.

    Raises:
        ValueError: If there are not as many logits as tokens of the answer.
    """
    answer = sample.input_ids[sample.questions[question].answer].tolist()
    if logits.ndim != 2 or len(logits) != len(answer):
        raise ValueError(f"logits must be [{len(answer)}, V], one a token of the answer, got {tuple(logits.shape)}")
    right = [a == b for a, b in zip(logits.argmax(-1).tolist(), answer, strict=True)]
    return NeedleScore(all(right), right[PUBLISHED[sample.kind]] if sample.kind in PUBLISHED else None)


def generated_score(new_ids: torch.Tensor | Sequence[int], sample: NeedleSample, question: int = -1) -> NeedleScore:
    """Score what was generated from the prompt `input_ids[: question.end + 1]`.

    Tokens after the answer do not count; an answer that is too short is wrong. The published score of two_hop is
    about the last token after a right beginning, so it is None where the beginning was wrong.

    Args:
        new_ids: The generated tokens without the prompt, `[N]`.
        question: Which of the sample's questions was asked.

    Raises:
        ValueError: If `new_ids` is not one list of tokens.
    """
    new_ids = torch.as_tensor(new_ids)
    if new_ids.ndim != 1:
        raise ValueError(f"new_ids must be the tokens of one text, [N], got {tuple(new_ids.shape)}")
    answer = sample.input_ids[sample.questions[question].answer].tolist()
    written = new_ids[: len(answer)].tolist()
    if sample.kind not in PUBLISHED:
        published = None
    elif PUBLISHED[sample.kind] == 0:
        published = written[:1] == answer[:1]
    else:
        published = written[-1:] == answer[-1:] if written[:-1] == answer[:-1] else None
    return NeedleScore(written == answer, published)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a rate: the p with `|successes / n - p| <= z * sqrt(p * (1 - p) / n)`.

    Raises:
        ValueError: If `n` is below 1, `successes` outside 0..n, or `confidence` not between 0 and 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be in 0..{n}, got {successes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    centre = successes + z2 / 2
    half = sqrt(z2 * (successes * (n - successes) / n + z2 / 4))
    # 1 exactly where rounding would miss it; 0 comes out exact, as the root of a square
    high = 1.0 if successes == n else (centre + half) / (n + z2)
    return (centre - half) / (n + z2), high


@dataclass
class NeedleTally:
    """Counts scores; as text, both rates with n and their Wilson intervals.

    `whole answer 97.0 % (n=100, 91.5-99.0), published score 99.0 % (n=100, 94.6-99.8)`

    Args:
        confidence: Of the intervals.
    """

    confidence: float = 0.95

    def __post_init__(self):
        wilson_interval(0, 1, self.confidence)
        self._counts = {"exact": [0, 0], "published": [0, 0]}

    def add(self, scores: NeedleScore | Iterable[NeedleScore]) -> None:
        """Count a score, or several. A published score of None is not counted."""
        for score in [scores] if isinstance(scores, NeedleScore) else scores:
            for name, counts in self._counts.items():
                right = getattr(score, name)
                if right is not None:
                    counts[0] += bool(right)
                    counts[1] += 1

    def summary(self) -> dict[str, dict[str, float]]:
        """Return `right`, `n`, and where n is above 0 `rate`, `low` and `high`, for `exact` and `published`."""
        figures = {}
        for name, (right, n) in self._counts.items():
            figures[name] = {"right": right, "n": n}
            if n:
                low, high = wilson_interval(right, n, self.confidence)
                figures[name] |= {"rate": right / n, "low": low, "high": high}
        return figures

    def __str__(self) -> str:
        texts = []
        for title, row in zip(("whole answer", "published score"), self.summary().values(), strict=True):
            if row["n"]:
                rate, low, high = (100 * row[name] for name in ("rate", "low", "high"))
                texts.append(f"{title} {rate:.1f} % (n={row['n']}, {low:.1f}-{high:.1f})")
            else:
                texts.append(f"{title} - (n=0)")
        return ", ".join(texts)
