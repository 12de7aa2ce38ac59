"""Which tokens frame a text of an insertion model, and a tokenizer that says so.

An insertion model writes right of BOS, so every text begins with it; EOS names STOP in the left-to-right view; none of
BOS, EOS and padding is ever written. Sources have other habits, so this is the rule:

    EOS   the source's; of several, the first
    BOS   the source's, where its tokenizer puts it in front of a text; else `<|endoftext|>`, if the tokenizer has it:
          there it stood between the documents of pre-training, so that texts begin behind it (SmolLM2, Qwen); else
          the source's, else EOS
    PAD   the source's, unless it is BOS or EOS; else the tokenizer's last special token that is neither; else EOS

What the command line gives goes before all of it.
"""

from tokenizers import processors
from transformers import PreTrainedTokenizerBase


SEPARATOR = "<|endoftext|>"


def structure_ids(tokenizer: PreTrainedTokenizerBase, fields: dict, given: dict) -> dict[str, int | None]:
    """Return `bos_token_id`, `eos_token_id` and `pad_token_id` of an insertion model.

    Args:
        tokenizer: The source's.
        fields: The source's ids, under the same names.
        given: Ids that go before them.
    """
    eos = given.get("eos_token_id", fields["eos_token_id"])
    bos = fields["bos_token_id"]
    # whatever is in the vocabulary: a tokenizer may call the separator unknown or padding
    separator = tokenizer.get_vocab().get(SEPARATOR)
    if not (bos is not None and puts_in_front(tokenizer, bos)) and separator is not None:
        bos = separator
    bos = given.get("bos_token_id", eos if bos is None else bos)
    pad = fields["pad_token_id"]
    if pad in (None, bos, eos):
        special = (index for index in sorted(special_ids(tokenizer), reverse=True) if index not in (bos, eos))
        pad = next(special, eos)
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": given.get("pad_token_id", pad)}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of all special tokens, those without a role too."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [index for index, token in added.items() if token.special]


def puts_in_front(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Return whether texts begin with a token as they are tokenised."""
    return tokenizer("a")["input_ids"][:1] == [token]


def framed(tokenizer: PreTrainedTokenizerBase, ids: dict[str, int | None]) -> PreTrainedTokenizerBase:
    """Return the tokenizer with these tokens in their roles, BOS in front of every text and padding on the right."""
    for role, index in ids.items():
        if index is not None:
            setattr(tokenizer, role.removesuffix("_id"), tokenizer.convert_ids_to_tokens(index))
    tokenizer.padding_side = "right"
    bos = ids["bos_token_id"]
    if bos is not None and not puts_in_front(tokenizer, bos) and tokenizer.is_fast:
        token, backend = tokenizer.convert_ids_to_tokens(bos), tokenizer.backend_tokenizer
        # what stood there frames texts for another model, or trims offsets only
        backend.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, bos)]
        )
    return tokenizer
