"""`/v1/models` and `/v1/completions` as OpenAI's clients speak them; with a `suffix` the text between is inserted."""

import logging
import time
import uuid

from fastapi import APIRouter, Request

from .asked import Asked, data, stream
from .engine import Engine
from .errors import ApiError, refused
from .job import Cuts, Event, Insertion, Job, Row, Settings
from .schema import Completion, check_most, read
from .texts import Around


logger = logging.getLogger("uvicorn.error")
REASONS = {"stop": "stop", "word": "stop", "length": "length"}


def samplers(temperature: float, top_p: float = 1.0, top_k: int = 0) -> tuple[tuple[str, float], ...] | None:
    """Return what narrows the choice of a token, without what changes nothing; None, greedy, at temperature 0."""
    if temperature == 0:
        return None
    steps = [("temperature", float(temperature))] if temperature != 1 else []
    steps += [("top_k", top_k)] if top_k else []
    steps += [("top_p", float(top_p))] if top_p < 1 else []
    return tuple(steps)


def check_model(engine: Engine, name: str | None) -> None:
    """Refuse the name of another model.

    Raises:
        ApiError: If it is one.
    """
    if name is not None and name.strip() and name != engine.name:
        raise ApiError(
            404, f"the model {name!r} does not exist here, {engine.name!r} does", "model", "model_not_found"
        )


def make_router(engine: Engine) -> APIRouter:
    """Return the routes."""
    router = APIRouter()
    card = {"id": engine.name, "object": "model", "created": int(time.time()), "owned_by": "insnext"}

    @router.get("/v1/models")
    async def models():
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str):
        check_model(engine, name)
        return card

    @router.post("/v1/chat/completions")
    async def chat():
        raise ApiError(404, "there is no chat: use /v1/completions, with a suffix for text in between")

    @router.post("/v1/completions")
    async def completions(request: Request):
        asked = await read(request, Completion, engine.limits.body)
        fields = job_fields(engine, asked)
        if asked.user is not None:
            logger.info("completion for user %r", asked.user)
        answer = Answer(engine, asked, fields["sources"])
        job = Asked(request, engine, **fields)
        if asked.stream:
            return await stream(job, answer.frames)
        return answer.whole(await job.finished())

    return router


def job_fields(engine: Engine, asked: Completion) -> dict:
    """Return the fields of the job that a request asks for.

    Raises:
        ApiError: If something in it cannot be honoured.
    """
    check_model(engine, asked.model)
    check_most("max_tokens", asked.max_tokens or 16, engine.limits.max_tokens)
    check_least(asked.min_tokens, "max_tokens", asked.max_tokens or 16)
    choices = asked.n or 1
    if asked.best_of not in (None, choices):
        raise refused(f"best_of must be n: every text that is written is returned, got {asked.best_of}", "best_of")
    if asked.echo and asked.logprobs is not None:
        raise refused("echo with logprobs would need those of the prompt, which are not made here", "echo")
    if asked.stream_options is not None and not asked.stream:
        raise refused("stream_options needs stream=true", "stream_options")
    if asked.suffix and not engine.inserts:
        raise refused(f"{engine.name} reads and writes from left to right: a suffix needs an InsNeXt", "suffix")
    check_order(asked.order, asked.suffix, "suffix")
    temperature = 1.0 if asked.temperature is None else asked.temperature
    top_p = 1.0 if asked.top_p is None else asked.top_p
    settings = Settings(
        insert=bool(asked.suffix),
        reading_order=in_reading_order(asked.order, asked.suffix, asked.stream),
        max_tokens=asked.max_tokens or 16,
        samplers=samplers(temperature, top_p),
        slot_temperature=temperature or 1.0,
        slot_top_p=top_p,
        min_tokens=asked.min_tokens,
        logit_bias=bias_of(engine, asked.logit_bias),
    )
    prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
    return {
        "settings": settings,
        "sources": [Around(prompt, asked.suffix or "") for prompt in prompts for _ in range(choices)],
        "choices": choices,
        "seed": asked.seed,
        "cuts": Cuts((asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())),
        "pieces": "text" if asked.stream else None,
        "tops": asked.logprobs,
    }


def check_least(least: int, name: str, most: int) -> None:
    """Refuse a least number of tokens above the largest, whose field has that name.

    Raises:
        ApiError: If it is.
    """
    if least > most:
        raise refused(f"min_tokens must not exceed {name}, got {least} and {most}", "min_tokens", "invalid_value")


def check_order(order: str | None, suffix: str | None, name: str) -> None:
    """Refuse an order of writing where there is only one.

    Raises:
        ApiError: If `order` is given and the suffix, of that name, is not.
    """
    if order is not None and not suffix:
        raise refused(f"order needs a {name}: without one the text is written from left to right", "order")


def in_reading_order(order: str | None, suffix: str | None, stream: bool | None) -> bool:
    """Return whether text is inserted from left to right: as asked for, else where its reader waits for it."""
    return bool(suffix) and (order == "reading" or (order is None and bool(stream)))


def bias_of(engine: Engine, bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    """Return the biases by token.

    Raises:
        ApiError: If a key is no token of the model.
    """
    for key in bias or {}:
        if not (key.isascii() and key.isdigit() and int(key) < len(engine.pieces)):
            raise refused(
                f"logit_bias must have tokens in [0, {len(engine.pieces)}) as keys, got {key!r}", "logit_bias"
            )
    return tuple(sorted((int(key), value) for key, value in (bias or {}).items()))


class Answer:
    """The answer to one request, whole or in chunks."""

    def __init__(self, engine: Engine, asked: Completion, sources: list[Around]):
        self.engine, self.asked, self.sources = engine, asked, sources
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": engine.name,
        }
        self.lengths = [len(source.left) for source in sources]

    def whole(self, job: Job) -> dict:
        """Return the answer of a finished job."""
        choices = [
            {
                "index": row.index,
                "text": (self.sources[row.index].left if self.asked.echo else "") + row.text,
                "logprobs": self.logprobs(row, row.reading_order()),
                "finish_reason": REASONS[row.finish],
            }
            for row in job.rows
        ]
        return {**self.head, "choices": choices, "usage": usage(job)}

    def frames(self, event: Event) -> list[str]:
        """Return the chunks of an event."""
        if event.kind == "started" and self.asked.echo:
            return [self.chunk(index, source.left) for index, source in enumerate(self.sources)]
        if event.kind == "piece":
            written = [event.insertion] if event.insertion is not None else []
            if not event.row.job.settings.grows_right:
                written = event.row.reading_order()
            logprobs = self.logprobs(event.row, written)
            return [self.chunk(event.row.index, event.text, logprobs)] if event.text or logprobs else []
        if event.kind == "row":
            return [self.chunk(event.row.index, "", None, REASONS[event.row.finish])]
        if event.kind == "finished":
            with_usage = self.asked.stream_options is not None and self.asked.stream_options.include_usage
            last = [data({**self.head, "choices": [], "usage": usage(event.row.job)})] if with_usage else []
            return [*last, "data: [DONE]\n\n"]
        return []

    def chunk(self, index: int, text: str, logprobs: dict | None = None, reason: str | None = None) -> str:
        """Return one chunk of one choice."""
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return data({**self.head, "choices": [choice]})

    def logprobs(self, row: Row, written: list[Insertion]) -> dict | None:
        """Return OpenAI's table of the given tokens of a row: log p(token | place), when it was written."""
        if self.asked.logprobs is None:
            return None
        pieces, end = self.engine.pieces, len(self.sources[row.index].left) + len(row.text)
        table = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for insertion in written:
            if row.finish == "word" and self.lengths[row.index] >= end:
                break
            table["tokens"].append(pieces[insertion.token])
            table["token_logprobs"].append(insertion.log_p)
            table["top_logprobs"].append({pieces[token]: log_p for token, log_p in insertion.top})
            table["text_offset"].append(self.lengths[row.index])
            self.lengths[row.index] += len(pieces[insertion.token])
        return table


def usage(job: Job) -> dict:
    """Return what was given and what was written, in tokens."""
    given, written = job.prompt_tokens, job.completion_tokens
    return {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}
