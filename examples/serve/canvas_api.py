"""`/v1/canvas`: gaps with bounds, keywords with alternatives, and every insertion as it happens."""

from fastapi import APIRouter, Request

from .asked import Asked, data, stream
from .engine import Engine
from .errors import refused
from .job import Event, Insertion, Job, Row, Settings
from .model import CHECKPOINTS
from .openai_api import REASONS, check_model, samplers, usage
from .schema import CanvasRequest, check_most, read
from .texts import Marks


def make_router(engine: Engine) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.get("/v1/limits")
    async def limits():
        most, ours = engine.limits, CHECKPOINTS / engine.name
        return {
            "model": engine.name,
            "inserts": engine.inserts,
            "max_tokens": most.max_tokens,
            "gaps": most.gaps,
            # where who has this repository finds it
            "folder": f"examples/checkpoints/{engine.name}" if ours.is_dir() else engine.name,
            "adapter": (ours / "adapter_config.json").is_file(),
        }

    @router.post("/v1/canvas")
    async def canvas(request: Request):
        asked = await read(request, CanvasRequest, engine.limits.body)
        job = Asked(request, engine, **job_fields(engine, asked))
        if asked.stream:
            return await stream(job, lambda event: frames(engine, event))
        return answer(engine, await job.finished())

    return router


def job_fields(engine: Engine, asked: CanvasRequest) -> dict:
    """Return the fields of the job that a request asks for.

    Raises:
        ApiError: If something in it cannot be honoured.
    """
    check_model(engine, asked.model)
    if not engine.inserts:
        raise refused(f"{engine.name} reads and writes from left to right: a canvas needs an InsNeXt", "model")
    check_most("max_tokens", asked.max_tokens, engine.limits.max_tokens)
    if (asked.text is None) == (asked.keywords is None):
        raise refused("exactly one of text and keywords must be given", "text")
    sampling = {"top_k": 0, "top_p": 1.0, "slot_temperature": None, "slot_top_p": 1.0}
    asked_of = [name for name, neutral in sampling.items() if getattr(asked, name) != neutral]
    if asked.temperature == 0 and asked_of:
        raise refused(f"{asked_of[0]} acts on sampling: temperature must be above 0", asked_of[0])
    settings = Settings(
        insert=True,
        max_tokens=asked.max_tokens,
        samplers=samplers(asked.temperature, asked.top_p, asked.top_k),
        slot_temperature=asked.slot_temperature or asked.temperature or 1.0,
        slot_top_p=asked.slot_top_p,
        repetition_penalty=asked.repetition_penalty,
        ebr=asked.ebr,
    )
    return {
        "settings": settings,
        "sources": [source_of(engine, asked)],
        "seed": asked.seed,
        "pieces": "insertions" if asked.stream else None,
        "traced": True,
        "tops": asked.alternatives,
    }


def source_of(engine: Engine, asked: CanvasRequest) -> Marks:
    """Return the canvas that a request describes.

    Raises:
        ApiError: If it has too many gaps, keywords or alternatives.
    """
    check_most("text: the number of gaps", (asked.text or "").count(asked.gap), engine.limits.gaps)
    forms = [len(one) for one in asked.keywords or () if not isinstance(one, str)]
    check_most("keywords", len(asked.keywords or ()), engine.limits.gaps)
    check_most("keywords: alternatives of one", max(forms, default=0), engine.limits.gaps)
    keywords = asked.keywords and tuple(one if isinstance(one, str) else tuple(one) for one in asked.keywords)
    bounds = {name: getattr(asked, name) for name in ("min_gap_tokens", "max_gap_tokens")}
    frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in bounds.items()}
    options = {"gap": asked.gap, "ordered": asked.ordered, **frozen}
    return Marks(asked.text, keywords, tuple(options.items()))


def answer(engine: Engine, job: Job) -> dict:
    """Return the text of a finished job, and how it grew."""
    row = job.rows[0]
    return {
        "object": "canvas",
        "model": engine.name,
        "text": row.text,
        "tokens": shown_tokens(engine, row),
        "finish_reason": REASONS[row.finish],
        "reencoded_at": row.reencoded[0],
        "reencoded_tokens": row.reencoded[1],
        "encoded_tokens": row.encoded_tokens,
        "usage": usage(job),
    }


def shown_tokens(engine: Engine, row: Row) -> list[dict]:
    """Return the tokens of a text from left to right, BOS left out; `step` 0 is given."""
    tokens = []
    for token, piece, origin in list(zip(row.tokens, row.pieces, row.origin, strict=True))[row.prepared.bos :]:
        shown = {"id": token, "text": piece, "step": 0}
        if origin >= 0:
            shown |= {"step": row.written[origin].step, **likelihood(engine, row.written[origin])}
        tokens.append(shown)
    return tokens


def likelihood(engine: Engine, insertion: Insertion) -> dict:
    """Return log p of a token given its place, and what else could have stood there."""
    others = [{"id": token, "text": engine.pieces[token], "logprob": log_p} for token, log_p in insertion.top]
    return {"logprob": insertion.log_p, "alternatives": others}


def frames(engine: Engine, event: Event) -> list[str]:
    """Return the frames of an event: `start` with the given tokens, `insert` for a token, `done` with everything."""
    row = event.row
    if event.kind == "started":
        prepared = row.prepared
        given = [{"id": token, "text": engine.pieces[token], "step": 0} for token in prepared.ids[prepared.bos :]]
        return [data({"tokens": given}, "start")]
    if event.kind == "inserted":
        one = event.insertion
        place = {"step": one.step, "place": one.place - row.prepared.bos, "id": one.token}
        return [data({**place, "text": engine.pieces[one.token], **likelihood(engine, one)}, "insert")]
    if event.kind == "finished":
        return [data(answer(engine, row.job), "done")]
    return []
