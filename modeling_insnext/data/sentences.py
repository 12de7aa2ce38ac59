"""Sentences of English prose."""

import re


SENTENCE_END = re.compile(r"""[.!?]+["')]*|--["']""")
ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Capt|Col|Gen|Rev|Prof|Esq|Jr|Sr|No|Mt|Messrs|M\.D)|\b[A-Z])\.$")
SAYING = re.compile(
    r"(?:\w+\.? ){1,3}(?:said|asked|cried|exclaimed|whispered|shouted|called|answered|replied|inquired|demanded|"
    r"screamed|sighed|began|murmured|repeated|continued|remarked|thought|sobbed|laughed|returned)\b"
)


def split_sentences(paragraph: str) -> list[str]:
    """Split at sentence ends outside double quotes, so that every piece has its quotes in pairs."""
    sentences, begin = [], 0
    for match in SENTENCE_END.finditer(paragraph):
        sentence, rest = paragraph[begin : match.end()], paragraph[match.end() :]
        if not re.match(r""" ["'(]?[A-Z0-9]""", rest) or sentence.count('"') % 2 or ABBREVIATION.search(sentence):
            continue
        if sentence[-1] in "\"'" and SAYING.match(rest[1:]):
            continue
        sentences.append(sentence.strip())
        begin = match.end()
    return sentences + [paragraph[begin:].strip()]
