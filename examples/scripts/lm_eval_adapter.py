r"""InsNeXt and DRT in the LM Evaluation Harness (`pip install lm-eval`): its command line with two more models.

    python examples/scripts/lm_eval_adapter.py --model insnext \
        --model_args pretrained=examples/checkpoints/insnext-mini \
        --include_path examples/scripts/lm_eval_tasks --tasks local_choice,local_perplexity,local_completion

Importing this file registers the models `insnext` and `drt`, for programs that call the harness. The tasks of
`examples/scripts/lm_eval_tasks` read JSON lines below `data/lm_eval`, without a network.

Both models are scored from left to right behind BOS; STOP of InsNeXt is EOS. A text longer than InsNeXt's
`max_position_embeddings` is cut on its left, and in rolling likelihood into windows that each stand behind BOS. DRT
reads texts of any length, in segments.
"""

import logging
from itertools import groupby

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from modeling_insnext import ChunkMemoryCache


logger = logging.getLogger(__name__)


def usable_device(name: str | None) -> torch.device:
    """Return the device of that name; the harness asks for `cuda:0` where nobody chose, which may not be there."""
    if name is None or (name.startswith("cuda") and not torch.cuda.is_available()):
        logger.warning("device %s is not there: the model runs on the CPU", name)
        return torch.device("cpu")
    return torch.device(name)


class Ended(StoppingCriteria):
    """Stops a row once its continuation holds one of the strings that end it."""

    def __init__(self, tokenizer, ends: list[str], width: int):
        self.tokenizer, self.ends, self.width = tokenizer, ends, width

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        done = [any(end in text for end in self.ends) for text in texts]
        return torch.tensor(done, device=input_ids.device)


class LeftToRightLM(TemplateLM):
    """A language model of this package that reads from left to right.

    Args:
        pretrained: Folder or repository of the checkpoint.
        tokenizer: Where its tokenizer is, if elsewhere.
        device: Where it runs; the CPU where it asks for a GPU that is not there, with a warning.
        dtype: Its numbers, as `from_pretrained` takes them.
        batch_size: Texts a forward pass.
        max_batch_size: For the harness; must be `None`, as the batch size is not searched for.
        peft: Folder or repository of an adapter.
        max_gen_toks: Tokens to write where a task does not say.

    Raises:
        ValueError: If the batch size is no number, or the tokenizer has no BOS.
    """

    max_length: int | None = None
    generation_options: dict = {}

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        peft: str | None = None,
        max_gen_toks: int = 64,
    ):
        super().__init__()
        if not str(batch_size).isdigit() or max_batch_size is not None:
            raise ValueError(
                f"batch_size must be a number and max_batch_size None, got {batch_size}, {max_batch_size}"
            )
        self.model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype, trust_remote_code=True)
        if peft is not None:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, peft)
        self._device = usable_device(device)
        self.model.to(self._device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or pretrained)
        if self.tokenizer.bos_token_id is None:
            raise ValueError(f"scoring needs a BOS to stand behind, the tokenizer of {pretrained} has none")
        self.batch_size, self.max_gen_toks = int(batch_size), max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Return ids, behind BOS unless `add_special_tokens` is false."""
        ids = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def _fit(self, context: list[int], room: int) -> list[int]:
        """Return the end of a context behind its BOS, so that `room` tokens more can be read."""
        if self.max_length is None or len(context) + room <= self.max_length:
            return context
        kept = self.max_length - room - 1
        if kept < 0:
            raise ValueError(f"BOS and {room} tokens must fit into max_position_embeddings={self.max_length}")
        return [context[0], *context[len(context) - kept :]]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """Return log p(continuation | context) in nats, and whether greedy decoding would write it."""
        rows = [(self._fit(context, len(written) - 1), written) for _, context, written in requests]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
        found = [(0.0, True)] * len(rows)
        for first in tqdm(range(0, len(order), self.batch_size), desc="likelihood", disable=disable_tqdm):
            chosen = order[first : first + self.batch_size]
            for i, scored in zip(chosen, self._score([rows[i] for i in chosen]), strict=True):
                found[i] = scored
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], scored)
        return found

    @torch.no_grad()
    def _score(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        texts = [torch.tensor(context + written[:-1]) for context, written in rows]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(text) for text in texts])[:, None]
        logits = self._logits(ids.to(self._device), mask.long().to(self._device))
        scores = []
        for (context, written), row in zip(rows, logits, strict=True):
            target = torch.tensor(written, device=row.device)
            log_p = row[len(context) - 1 : len(context) - 1 + len(written)].float().log_softmax(-1)
            greedy = bool((log_p.argmax(-1) == target).all())
            scores.append((float(log_p.gather(1, target[:, None]).double().sum()), greedy))
        return scores

    def _logits(self, ids, mask):
        return self.model(ids, attention_mask=mask).logits

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Return log p(text) in nats; what ends it is no part of the event."""
        totals = []
        for request in tqdm(requests, desc="rolling likelihood", disable=disable_tqdm):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            step = self.max_length or max(len(ids), 1)
            windows = [(None, [self.prefix_token_id], ids[i : i + step]) for i in range(0, len(ids), step)]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(windows, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Return continuations, cut before the first of the strings that end them."""
        texts = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
        for _, same in groupby(order, key=lambda i: repr(requests[i].args[1])):
            same = list(same)
            for first in tqdm(range(0, len(same), self.batch_size), desc="writing", disable=disable_tqdm):
                chosen = same[first : first + self.batch_size]
                options = normalize_gen_kwargs(requests[chosen[0]].args[1], self.max_gen_toks)
                written = self._write([requests[i].args[0] for i in chosen], options)
                for i, text in zip(chosen, written, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def _write(self, prompts: list[str], options: dict) -> list[str]:
        until, length = options.pop("until"), options.pop("max_gen_toks")
        if not options["do_sample"]:
            options.pop("temperature", None)
        rows = [self._fit(self.tok_encode(prompt), length) for prompt in prompts]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eot_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self._device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self._device)
        if until:
            options["stopping_criteria"] = StoppingCriteriaList([Ended(self.tokenizer, until, width)])
        options |= {"max_new_tokens": length, "pad_token_id": pad, **self.generation_options}
        out = self.model.generate(input_ids=ids, attention_mask=mask, **options)[:, width:]
        texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return [text[: min((text.find(end) for end in until if end in text), default=len(text))] for text in texts]


@register_model("insnext")
class InsNextLM(LeftToRightLM):
    generation_options = {"left_to_right": True}

    def __init__(self, **options):
        super().__init__(**options)
        self.max_length = self.model.config.max_position_embeddings


@register_model("drt")
class DrtLM(LeftToRightLM):
    """Reads one long text a segment at a time, at constant memory but for its logits.

    Args:
        segment_length: Tokens of a segment.
        **options: Those of :class:`LeftToRightLM`.
    """

    def __init__(self, segment_length: int = 4096, **options):
        super().__init__(**options)
        self.segment_length = int(segment_length)

    def _logits(self, ids, mask):
        if len(ids) > 1 or ids.shape[1] <= self.segment_length:
            return super()._logits(ids, mask)
        past = ChunkMemoryCache(self.model.config)
        segments = ids.split(self.segment_length, dim=1)
        return torch.cat([self.model(segment, past_key_values=past).logits for segment in segments], 1)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
