"""`/infill`, `/health` and `/props` as llama.cpp's editors speak them."""

import time

from fastapi import APIRouter, Request

from modeling_insnext import __version__

from .asked import Asked, data, stream
from .engine import Engine
from .errors import refused
from .job import Cuts, Event, Job, Row, Settings
from .openai_api import check_least, check_model, check_order, in_reading_order
from .schema import Infill, check_most, read
from .texts import Around


# llama.cpp's names for what narrows the choice, and the field with the value
SAMPLERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typ_p": "typical_p",
}
STOP_TYPES = {"stop": "eos", "word": "word", "length": "limit"}
RANDOM_SEEDS = (-1, 2**32 - 1)


def make_router(engine: Engine) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.get("/health")
    @router.get("/v1/health")
    async def health():
        return {"status": "ok"}

    @router.get("/props")
    async def props():
        return {
            "default_generation_settings": {"n_ctx": engine.longest or 0, "params": Infill().model_dump()},
            "total_slots": engine.limits.rows,
            "model_alias": engine.name,
            "model_path": engine.name,
            "chat_template": "",
            "modalities": {"vision": False, "audio": False},
            "build_info": f"modeling-insnext {__version__}",
        }

    @router.post("/infill")
    async def infill(request: Request):
        asked = await read(request, Infill, engine.limits.body)
        fields = job_fields(engine, asked)
        answer = Answer(engine, asked)
        job = Asked(request, engine, **fields)
        if asked.stream:
            return await stream(job, answer.frames)
        return chosen_fields(answer.whole((await job.finished()).rows[0]), asked.response_fields)

    return router


def job_fields(engine: Engine, asked: Infill) -> dict:
    """Return the fields of the job that a request asks for.

    Raises:
        ApiError: If something in it cannot be honoured.
    """
    check_model(engine, asked.model)
    check_most("n_predict", asked.n_predict, engine.limits.max_tokens)
    most = engine.limits.max_tokens if asked.n_predict < 0 else asked.n_predict
    check_least(asked.min_tokens, "n_predict", most)
    if asked.input_suffix and not engine.inserts:
        raise refused(f"{engine.name} writes from left to right: input_suffix needs an InsNeXt", "input_suffix")
    check_order(asked.order, asked.input_suffix, "input_suffix")
    outside = [token for token, _ in asked.logit_bias if token >= len(engine.pieces)]
    if outside:
        raise refused(f"logit_bias must have tokens in [0, {len(engine.pieces)}), got {outside[0]}", "logit_bias")
    steps = sampling_steps(asked)
    settings = Settings(
        insert=bool(asked.input_suffix),
        reading_order=in_reading_order(asked.order, asked.input_suffix, asked.stream),
        max_tokens=most,
        samplers=steps,
        slot_temperature=dict(steps or ()).get("temperature", 1.0),
        min_tokens=asked.min_tokens,
        repetition_penalty=asked.repeat_penalty,
        logit_bias=tuple((token, -100.0 if bias is False else bias) for token, bias in asked.logit_bias),
    )
    extra = "".join(f"{one.text}\n" for one in asked.input_extra)
    context = engine.context_within(asked.t_max_prompt_ms) if asked.t_max_prompt_ms else 10**9
    source = Around(asked.input_prefix + asked.prompt, asked.input_suffix, extra, context)
    return {
        "settings": settings,
        "sources": [source],
        "seed": None if asked.seed in RANDOM_SEEDS else asked.seed,
        "cuts": Cuts(tuple(asked.stop), asked.n_indent, asked.t_max_predict_ms / 1000 or None),
        "pieces": "text" if asked.stream else None,
        "tops": asked.n_probs or None,
    }


def sampling_steps(asked: Infill) -> tuple[tuple[str, float], ...] | None:
    """Return what narrows the choice, in the order of `samplers`; None, greedy, at temperature 0.

    "infill" decides for other models whether to end: here the model's STOP does. "dry" and "xtc" act with options
    that are refused.
    """
    if "temperature" in asked.samplers and asked.temperature == 0:
        return None
    neutral = {"temperature": lambda v: v == 1, "top_k": lambda v: v <= 0, "top_p": lambda v: v >= 1,
               "min_p": lambda v: v <= 0, "typ_p": lambda v: v >= 1}  # fmt: skip
    steps = []
    for name in asked.samplers:
        if name in SAMPLERS:
            value = getattr(asked, SAMPLERS[name])
            if not neutral[name](value):
                # a nucleus of nothing is the likeliest token
                steps.append((SAMPLERS[name], value if name == "top_k" else max(float(value), 1e-6)))
    return tuple(steps)


def chosen_fields(answer: dict, names: list[str]) -> dict:
    """Return the fields that were asked for; "timings/prompt_n" is one inside another. Without names, all."""
    if not names:
        return answer
    found = {}
    for name in names:
        value = answer
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            found[name] = value
    return found


class Answer:
    """The answer to one request, whole or in chunks."""

    def __init__(self, engine: Engine, asked: Infill):
        self.engine, self.asked, self.arrived = engine, asked, time.monotonic()
        # tokens whose text has not been sent yet, as those of half a character
        self.unsent: list[int] = []

    def frames(self, event: Event) -> list[str]:
        """Return the chunks of an event."""
        if event.kind == "piece":
            # a row that is still written into is not to be looked at from here
            one = [event.insertion] if event.insertion is not None else []
            written = one if event.row.job.settings.grows_right else event.row.reading_order()
            self.unsent += [insertion.token for insertion in written]
            if event.text:
                tokens, self.unsent = self.unsent, []
                return [data({"index": 0, "content": event.text, "tokens": tokens, "stop": False})]
        if event.kind == "row":
            # the text has been sent
            last = {**self.whole(event.row), "content": "", "tokens": []}
            return [data(chosen_fields(last, self.asked.response_fields))]
        return []

    def whole(self, row: Row) -> dict:
        """Return the answer of a finished row."""
        written = row.reading_order()
        answer = {
            "index": 0,
            "content": row.text,
            "tokens": [one.token for one in written] if self.asked.return_tokens else [],
            "id_slot": -1,
            "stop": True,
            "model": self.engine.name,
            "tokens_predicted": len(written),
            "tokens_evaluated": row.job.prompt_tokens,
            "tokens_cached": 0,
            "truncated": row.prepared.truncated,
            "generation_settings": self.asked.model_dump(exclude={"input_prefix", "input_suffix", "input_extra",
                                                                  "prompt"}),
            "prompt": self.asked.prompt,
            "has_new_line": "\n" in row.text,
            "stop_type": STOP_TYPES[row.finish],
            "stopping_word": row.stop_word,
            "timings": self.timings(row.job, row),
        }  # fmt: skip
        if self.asked.n_probs:
            answer["completion_probabilities"] = [
                {
                    **self.probability(one.token, one.log_p),
                    "top_logprobs": [self.probability(*pair) for pair in one.top],
                }
                for one in written
            ]
        return answer

    def probability(self, token: int, log_p: float) -> dict:
        piece = self.engine.pieces[token]
        return {"id": token, "token": piece, "bytes": list(piece.encode()), "logprob": log_p}

    def timings(self, job: Job, row: Row) -> dict:
        """Return how long reading, the queue included, and writing took."""
        prompt_ms = max((row.started - self.arrived) * 1000, 1e-3)
        predicted_ms = max((time.monotonic() - row.started) * 1000, 1e-3)
        read_tokens, written = job.prompt_tokens, len(row.written)
        return {
            "prompt_n": read_tokens,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": prompt_ms / max(read_tokens, 1),
            "prompt_per_second": read_tokens * 1000 / prompt_ms,
            "predicted_n": written,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": predicted_ms / max(written, 1),
            "predicted_per_second": written * 1000 / predicted_ms,
        }
