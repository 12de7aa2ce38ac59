"""`/generate`, and the same at `/`, as `huggingface_hub.InferenceClient.text_generation` speaks it."""

from fastapi import APIRouter, Request

from .asked import Asked, data, stream
from .engine import Engine
from .errors import ApiError
from .job import Cuts, Event, Insertion, Row, Settings
from .schema import Generate, GenerateParameters, check_most, read
from .texts import Around


PATHS = ("/", "/generate")
REASONS = {"stop": "eos_token", "word": "stop_sequence", "length": "length"}


def make_router(engine: Engine) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.post("/")
    @router.post("/generate")
    async def generate(request: Request):
        asked = await read(request, Generate, engine.limits.body)
        options = asked.parameters or GenerateParameters()
        check_most("max_new_tokens", options.max_new_tokens or 100, engine.limits.max_tokens)
        answer = Answer(engine, asked.inputs, options)
        job = Asked(
            request,
            engine,
            settings=settings_of(options),
            sources=[Around(asked.inputs)],
            seed=options.seed,
            cuts=Cuts(tuple(options.stop or ())),
            pieces="text" if asked.stream else None,
            tops=0,
        )
        if asked.stream:
            return await stream(job, answer.frames)
        return [answer.whole((await job.finished()).rows[0])]

    return router


def settings_of(options: GenerateParameters) -> Settings:
    """Return how is written; an option of sampling asks for sampling."""
    names = ("temperature", "top_k", "top_p", "typical_p")
    steps = tuple((name, getattr(options, name)) for name in names if getattr(options, name) is not None)
    return Settings(
        insert=False,
        max_tokens=options.max_new_tokens or 100,
        samplers=steps if steps or options.do_sample else None,
        repetition_penalty=options.repetition_penalty,
    )


def error_body(error: ApiError) -> dict:
    """Return an error as these clients read it."""
    kinds = {429: "overloaded", 503: "overloaded", 500: "generation"}
    return {"error": error.message, "error_type": kinds.get(error.status, "validation")}


class Answer:
    """The answer to one request, whole or in chunks."""

    def __init__(self, engine: Engine, inputs: str, options: GenerateParameters):
        self.engine, self.inputs, self.options, self.sent = engine, inputs, options, 0

    def frames(self, event: Event) -> list[str]:
        """Return the chunks of an event; the last one, without a token of its own, has the whole text."""
        if event.kind == "piece" and event.insertion is not None and event.row.finish != "word":
            return [self.chunk(self.token(event.insertion, event.text))]
        if event.kind == "piece" and event.text:
            return [self.chunk({"id": 0, "text": event.text, "logprob": 0.0, "special": False})]
        if event.kind == "row":
            details = {**self.details(event.row), "input_length": event.row.job.prompt_tokens}
            end = {"id": min(self.engine.ends, default=0), "text": "", "logprob": 0.0, "special": True}
            return [self.chunk(end, self.text(event.row), details)]
        return []

    def whole(self, row: Row) -> dict:
        """Return the answer of a finished row."""
        answer = {"generated_text": self.text(row)}
        if self.options.details:
            tokens = [self.token(one, self.engine.pieces[one.token]) for one in row.written]
            answer["details"] = {**self.details(row), "prefill": [], "tokens": tokens}
        return answer

    def text(self, row: Row) -> str:
        return (self.inputs if self.options.return_full_text else "") + row.text

    def details(self, row: Row) -> dict:
        return {"finish_reason": REASONS[row.finish], "generated_tokens": len(row.written), "seed": self.options.seed}

    def token(self, insertion: Insertion, text: str) -> dict:
        return {"id": insertion.token, "text": text, "logprob": insertion.log_p, "special": False}

    def chunk(self, token: dict, text: str | None = None, details: dict | None = None) -> str:
        self.sent += 1
        return data({"index": self.sent, "token": token, "generated_text": text, "details": details, "top_tokens": []})
