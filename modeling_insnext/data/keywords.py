"""Keywords in texts: where they stand, inflected or not, and the forms that English gives a word."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from .forms import composed, keyword_matches, keyword_pattern


IRREGULAR_VERBS = {
    "beat": "beaten", "begin": "began begun beginning", "bind": "bound", "bleed": "bled", "blow": "blew blown",
    "break": "broke broken", "breed": "bred", "bring": "brought", "build": "built", "buy": "bought",
    "catch": "caught", "choose": "chose chosen", "come": "came", "draw": "drew drawn", "drink": "drank drunk",
    "drive": "drove driven", "eat": "ate", "fall": "fell fallen", "feed": "fed", "feel": "felt", "fight": "fought",
    "find": "found", "fly": "flew flown", "forbid": "forbade forbidden forbidding",
    "forget": "forgot forgotten forgetting", "freeze": "froze frozen", "get": "got gotten", "give": "gave",
    "go": "went", "grow": "grew", "hang": "hung",
    "hear": "heard", "hide": "hid hidden", "hold": "held", "keep": "kept", "know": "knew known", "lay": "laid",
    "lead": "led", "leap": "leapt", "leave": "left", "lie": "lay lying", "lose": "lost", "make": "made",
    "mean": "meant", "meet": "met", "overgrow": "overgrew overgrown", "overlay": "overlaid", "pay": "paid",
    "picnic": "picnicked picnicking", "rebuild": "rebuilt", "refuel": "refuelled refuelling", "ride": "rode",
    "ring": "rang rung", "rise": "rose", "run": "ran", "say": "said", "see": "saw", "seek": "sought", "sell": "sold",
    "send": "sent", "sew": "sewn", "shake": "shook", "shoot": "shot", "sing": "sang sung", "sit": "sat",
    "sleep": "slept", "speak": "spoke", "speed": "sped", "spell": "spelt", "spend": "spent", "spin": "spun",
    "stand": "stood", "steal": "stole stolen", "stick": "stuck", "sting": "stung", "strike": "struck",
    "string": "strung", "swear": "swore sworn", "sweep": "swept", "swim": "swam", "swing": "swung", "take": "took",
    "teach": "taught", "tear": "tore torn", "tell": "told", "think": "thought", "throw": "threw",
    "undergo": "underwent undergone", "understand": "understood", "wake": "woke woken", "wear": "wore worn",
    "weave": "wove woven", "win": "won", "write": "wrote written",
}  # fmt: skip
IRREGULAR_PLURALS = {
    "axis": "axes", "basis": "bases", "bookshelf": "bookshelves", "child": "children", "datum": "data",
    "elf": "elves", "foot": "feet", "grandchild": "grandchildren", "half": "halves", "hoof": "hooves",
    "knife": "knives", "leaf": "leaves", "life": "lives", "medium": "media", "mouse": "mice", "shelf": "shelves",
    "thief": "thieves", "tooth": "teeth", "wife": "wives", "wolf": "wolves",
}  # fmt: skip


def irregular_forms(word: str) -> list[str]:
    """Return the forms of an English word in lower case that no rule makes, the word itself left out."""
    men = [f"{word[:-2]}en"] if word.endswith("man") and word not in ("human", "german", "roman") else []
    return [*IRREGULAR_VERBS.get(word, "").split(), *IRREGULAR_PLURALS.get(word, "").split(), *men]


def inflections(word: str) -> list[str]:
    """Return the forms of an English word, in lower case: itself, with -s, -ed and -ing, or what stands for them.

    What is a noun and what a verb is not known: `inflections("field")` has "fielded" too. Words of one syllable double
    their last consonant ("stopped"), longer ones do not ("visited", but "prefered" as well). `keyword_spans` finds
    these forms and more.

    Raises:
        ValueError: If it is not one word of letters.
    """
    if not word.isalpha():
        raise ValueError(f"word must be one word of letters, got {word!r}")
    word = word.lower()
    irregular, base = irregular_forms(word), word
    if irregular and word not in IRREGULAR_VERBS:
        return [word, *irregular]
    consonant_y = re.search(r"[^aeiou]y$", word)
    if re.search(r"(?:[sxz]|ch|sh|[^aeiou]o)$", word):
        third = word + "es"
    else:
        third = word[:-1] + "ies" if consonant_y else word + "s"
    if re.fullmatch(r"(?:[^aeiou]|(?<=q)u)*[aeiou][^aeiouwxy]", word):
        base = word + word[-1]
    past = word + "d" if word.endswith("e") else word[:-1] + "ied" if consonant_y else base + "ed"
    silent = re.search(r"[^eoy]e$", word)
    present = word[:-2] + "ying" if word.endswith("ie") else (word[:-1] if silent else base) + "ing"
    pasts = [form for form in irregular if not form.endswith("ing")] or [past]
    presents = [form for form in irregular if form.endswith("ing")] or [present]
    return list(dict.fromkeys([word, third, *pasts, *presents]))


@lru_cache(maxsize=100_000)
def inflected_pattern(keyword: str) -> re.Pattern:
    return keyword_pattern(keyword, True, {word: irregular_forms(word) for word in keyword.lower().split()})


def composed_places(text: str) -> tuple[str, Sequence[int]]:
    """Return the text in composed form and, for each of its characters and for its end, the place in `text`."""
    if unicodedata.is_normalized("NFC", text):
        return composed(text), range(len(text) + 1)
    starts = [place for place, letter in enumerate(text) if not place or not unicodedata.combining(letter)]
    pieces = [composed(text[left:right]) for left, right in pairwise([*starts, len(text)])]
    places = [start for start, piece in zip(starts, pieces, strict=True) for _ in piece]
    return "".join(pieces), [*places, len(text)]


def keyword_spans(text: str, keywords: list[str]) -> list[tuple[int, int]]:
    """Character span of each keyword that stands in the text as whole words, whatever its case.

    The keyword itself if it is there, else the first of its inflections. A phrase is one span.
    """
    written, places = composed_places(text)
    spans = []
    for keyword in keywords:
        words = composed(keyword).lower().split()
        found = []
        for match in keyword_matches(inflected_pattern(keyword), written):
            span = places[match.start()], places[match.end()]
            if span not in spans:
                found.append((match[0].lower().split() != words, span))
        if found:
            spans.append(min(found)[1])
    return spans
