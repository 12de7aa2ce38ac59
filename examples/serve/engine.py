"""The queue, and the one thread that tokenizes, writes and decodes. Whoever comes first is served first; rows of later
requests with the same settings come along in its batch.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

import torch
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from modeling_insnext.insnext.canvas import Canvas

from .errors import ApiError
from .job import Event, Job, Row, Settings
from .texts import LEAST_CONTEXT, pieces_of
from .watch import Watch


logger = logging.getLogger("uvicorn.error")

WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": lambda value: TopKLogitsWarper(int(value)),
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}


@dataclass(frozen=True)
class Limits:
    """What a server allows.

    Attributes:
        queue: Requests that may wait; one more gets 429.
        rows: Most texts of a batch, and of one request.
        max_tokens: Most tokens to be written in a text.
        seconds: From a request's arrival to the end of its writing.
        body: Bytes of a request.
        gaps: Gaps, keywords, or alternatives of one.
    """

    queue: int = 64
    rows: int = 16
    max_tokens: int = 512
    seconds: float = 120.0
    body: int = 1 << 20
    gaps: int = 64


class Engine:
    """One model and its thread.

    Args:
        model: An InsNeXt or a DRT, ready to generate.
        tokenizer: Its tokenizer.
        name: What clients call the model.
        limits: What is allowed.
    """

    def __init__(self, model, tokenizer, name: str, limits: Limits | None = None):
        self.model, self.tokenizer, self.name, self.limits = model, tokenizer, name, limits or Limits()
        self.inserts = model.config.model_type == "insnext"
        self.longest = getattr(model.config, "max_position_embeddings", None)
        pad = tokenizer.pad_token_id
        self.pad = next(one for one in (pad, model.config.pad_token_id, tokenizer.bos_token_id, 0) if one is not None)
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
        # clients ask for the text of tokens while the tokenizer is at work for others
        self.pieces = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
        self.prompt_rate = self._measured_rate()
        self._waiting: deque[Job] = deque()
        self._wake, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._serve, name="writer", daemon=True)

    def start(self) -> None:
        """Begin to serve the queue."""
        self._thread.start()

    def close(self) -> None:
        """Stop what is being written, refuse what waits, end the thread."""
        with self._wake:
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
            self._wake.notify()
        for job in waiting:
            job.fail(ApiError(503, "the server shuts down", code="shutting_down", kind="server_error"))
        self._thread.join()

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            ApiError: If it is full, or the job has more rows than a batch.
        """
        if len(job.sources) > self.limits.rows:
            raise ApiError(
                400, f"a request must ask for at most {self.limits.rows} texts, prompts times n, got "
                f"{len(job.sources)}", "n"
            )  # fmt: skip
        with self._wake:
            if self._closed or len(self._waiting) >= self.limits.queue:
                raise ApiError(
                    429, f"{len(self._waiting)} requests wait already: try again later",
                    code="rate_limit_exceeded", kind="rate_limit_error",
                )  # fmt: skip
            self._waiting.append(job)
            self._wake.notify()

    @property
    def waiting(self) -> int:
        """Number of jobs in the queue."""
        return len(self._waiting)

    @torch.no_grad()
    def _measured_rate(self) -> float:
        """Return how many given tokens a second the model reads."""
        special = set(self.tokenizer.all_special_ids)
        word = next(index for index in range(len(self.tokenizer)) if index not in special)
        ids = torch.full((1, min(128, self.longest or 128)), word, device=self.model.device)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            self.model(input_ids=ids)
            seconds.append(time.perf_counter() - start)
        return ids.shape[1] / min(seconds)

    def context_within(self, milliseconds: float) -> int:
        """Return how many given tokens are read in a time, by a measurement at the start."""
        return max(int(self.prompt_rate * milliseconds / 1000), LEAST_CONTEXT)

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                batch = self._next_batch()
            try:
                self._run([job for job in batch if self._prepare(job)])
            except Exception as error:
                logger.exception("writing failed")
                self._fail(batch, error)

    def _next_batch(self) -> list[Job]:
        """Take the oldest job, and those of its settings that fit beside it, out of the queue."""
        first = self._waiting.popleft()
        batch, rows = [first], len(first.sources)
        if first.shares:
            for job in list(self._waiting):
                if job.shares and job.settings == first.settings and rows + len(job.sources) <= self.limits.rows:
                    self._waiting.remove(job)
                    batch.append(job)
                    rows += len(job.sources)
        return batch

    def _fail(self, batch: list[Job], error: Exception) -> None:
        # what generate refuses is the request's fault, anything else is ours
        for job in batch:
            if isinstance(error, ValueError):
                job.fail(ApiError(400, str(error)))
            else:
                job.fail(ApiError(500, f"writing failed: {type(error).__name__}", kind="server_error"))

    def _prepare(self, job: Job) -> bool:
        """Make the rows of a job; return whether it is to be written."""
        if job.cancelled.is_set():
            return False
        if time.monotonic() > job.deadline:
            job.fail(ApiError(503, f"nothing was written within {self.limits.seconds:g} s: too many requests wait",
                              code="timeout", kind="server_error"))  # fmt: skip
            return False
        known = {}
        try:
            for index, source in enumerate(job.sources):
                if source not in known:
                    known[source] = source.prepare(self.model, self.tokenizer, job.settings.max_tokens)
                job.rows.append(Row(job, index, known[source]))
        except ApiError as error:
            job.fail(error)
            return False
        job.tell(Event("started", job.rows[0]))
        return True

    def _run(self, jobs: list[Job]) -> None:
        rows = [row for job in jobs for row in job.rows]
        if not rows:
            return
        settings = jobs[0].settings
        if settings.max_tokens > 0:
            watch = Watch(rows, settings, self.tokenizer, self.ends)
            with torch.random.fork_rng(enabled=jobs[0].seed is not None):
                output = self._write(rows, settings, watch, jobs[0].seed)
            if settings.insert:
                for row, at, counts in zip(rows, output.reencoded_at, output.reencoded_tokens, strict=True):
                    row.reencoded = (at, counts)
                for row, count in zip(rows, output.encoded_tokens.tolist(), strict=True):
                    row.encoded_tokens = count
        for row in rows:
            row.pieces = pieces_of(self.tokenizer, row.tokens, self.pieces)
            if row.finish is None:
                row.finish = "length"
                row.job.end(row)
        for job in jobs:
            if job.traced:
                job.tell(Event("finished", job.rows[0]))

    def _write(self, rows: list[Row], settings: Settings, watch: Watch, seed: int | None):
        """Write one batch, and tell its jobs through the watch."""
        sampled = settings.samplers is not None
        warpers = [WARPERS[name](value) for name, value in settings.samplers or ()]
        options = {
            "max_new_tokens": settings.max_tokens,
            "do_sample": sampled,
            "num_beams": 1,
            "pad_token_id": self.pad,
            "return_dict_in_generate": True,
            "logits_processor": LogitsProcessorList([watch.before, *warpers]),
            "stopping_criteria": StoppingCriteriaList([watch.after]),
        }
        if sampled:
            # what the request does not ask for is not sampled by
            options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        if settings.min_tokens:
            options["min_new_tokens"] = settings.min_tokens
        if settings.repetition_penalty is not None:
            options["repetition_penalty"] = settings.repetition_penalty
        if settings.logit_bias:
            options["sequence_bias"] = {(token,): bias for token, bias in settings.logit_bias}
        if settings.insert:
            return self._write_inserting(rows, settings, seed, options)
        if seed is not None:
            torch.manual_seed(seed)
        width = max(len(row.tokens) for row in rows)
        ids = [[self.pad] * (width - len(row.tokens)) + row.tokens for row in rows]
        mask = [[0] * (width - len(row.tokens)) + [1] * len(row.tokens) for row in rows]
        device = self.model.device
        if self.inserts:
            options["left_to_right"] = True
        return self.model.generate(
            torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device), **options
        )

    def _write_inserting(self, rows: list[Row], settings: Settings, seed: int | None, options: dict):
        if settings.samplers is not None:
            options |= {"slot_temperature": settings.slot_temperature, "slot_top_p": settings.slot_top_p}
            options["seed"] = seed
        if settings.ebr is not None:
            options["ebr"] = settings.ebr
        if settings.reading_order:
            options["reading_order"] = True
        return self.model.generate(**Canvas.stack([row.prepared.canvas for row in rows]), **options)
