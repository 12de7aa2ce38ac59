"""What requests may say. A field is honoured or refused: unknown ones, and values that nothing here acts on, are
errors that name the field.
"""

import json
from typing import Annotated, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ApiError, refused


Probability = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Zero = Annotated[float, Field(ge=0, le=0)]
Word = Annotated[str, Field(max_length=200)]
# in which order text is inserted before a suffix: "reading" is from left to right, "free" as the model likes
Order = Literal["free", "reading"]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False


class Completion(Body):
    """`POST /v1/completions` of OpenAI."""

    model: str
    prompt: str | Annotated[list[str], Field(min_length=1)]
    suffix: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    temperature: Temperature | None = 1.0
    top_p: Probability | None = 1.0
    n: Annotated[int, Field(ge=1)] | None = 1
    best_of: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = False
    seed: Seed | None = None
    presence_penalty: Zero | None = 0.0
    frequency_penalty: Zero | None = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    # of ours
    order: Order | None = None
    min_tokens: Count = 0


class Extra(Body):
    text: str
    filename: str = ""
    time: object = None


class Infill(Body):
    """`POST /infill` of llama.cpp, with the options of its `/completion`."""

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[Extra] = []
    prompt: str = ""
    model: str = ""
    n_predict: Annotated[int, Field(ge=-1)] = -1
    n_indent: Count = 0
    stop: Annotated[list[Stop], Field(max_length=16)] = []
    stream: bool = False
    seed: Annotated[int, Field(ge=-1, lt=2**63)] = -1
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.8
    top_k: int = 40
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.95
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.05
    typical_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    samplers: list[Literal["dry", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature", "infill"]] = [
        "dry", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature",
    ]  # fmt: skip
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    repeat_last_n: Literal[-1] = -1
    presence_penalty: Zero = 0.0
    frequency_penalty: Zero = 0.0
    dry_multiplier: Zero = 0.0
    xtc_probability: Zero = 0.0
    dynatemp_range: Zero = 0.0
    mirostat: Literal[0] = 0
    grammar: Literal[""] = ""
    ignore_eos: Literal[False] = False
    min_keep: Literal[0] = 0
    n_keep: Literal[0] = 0
    n_probs: Annotated[int, Field(ge=0, le=20)] = 0
    post_sampling_probs: Literal[False] = False
    id_slot: Literal[-1] = -1
    cache_prompt: bool = True
    return_tokens: bool = False
    return_progress: Literal[False] = False
    timings_per_token: Literal[False] = False
    lora: Annotated[list[object], Field(max_length=0)] = []
    logit_bias: list[tuple[Count, float | Literal[False]]] = []
    t_max_prompt_ms: Count = 0
    t_max_predict_ms: Count = 0
    response_fields: Annotated[list[str], Field(max_length=64)] = []
    # of ours
    order: Order | None = None
    min_tokens: Count = 0


class GenerateParameters(Body):
    max_new_tokens: Annotated[int, Field(ge=1)] | None = 100
    do_sample: bool | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Probability | None = None
    typical_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: Seed | None = None
    stop: Annotated[list[Stop], Field(max_length=16)] | None = None
    return_full_text: bool | None = False
    details: bool | None = False
    decoder_input_details: Literal[False] | None = False
    watermark: Literal[False] | None = False
    best_of: Literal[1] | None = None
    frequency_penalty: Zero | None = None


class Generate(Body):
    """`POST /generate` as `huggingface_hub.InferenceClient.text_generation` sends it."""

    inputs: str
    parameters: GenerateParameters | None = None
    stream: bool | None = False


class CanvasRequest(Body):
    """`POST /v1/canvas`: what `model.canvas` and `generate` take."""

    model: str | None = None
    text: str | None = None
    keywords: Annotated[list[Word | list[Word]], Field(min_length=1)] | None = None
    ordered: bool = True
    gap: Annotated[str, Field(min_length=1, max_length=20)] = "___"
    min_gap_tokens: Count | list[Count | None] | None = None
    max_gap_tokens: Count | list[Count | None] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Temperature = 0.0
    top_k: Count = 0
    top_p: Probability = 1.0
    slot_temperature: Annotated[float, Field(gt=0, le=2)] | None = None
    slot_top_p: Probability = 1.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    ebr: bool | None = None
    seed: Seed | None = None
    alternatives: Annotated[int, Field(ge=0, le=20)] = 0
    stream: bool = False


async def read(request: Request, body_class: type[Body], most: int) -> Body:
    """Return the body of a request.

    Args:
        request: The request.
        body_class: What it should be.
        most: Bytes it may have.

    Raises:
        ApiError: If it is no JSON in UTF-8, too long, or breaks a rule of `body_class`.
    """
    # a web page elsewhere may send anything but this kind without asking first
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be sent with content-type application/json")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise ApiError(413, f"the body must have at most {most} bytes")
    try:
        value = json.loads(data.decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise refused(f"the body must be UTF-8 and hold whole characters: {error.reason}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise refused(f"the body must be JSON: {error}") from error
    try:
        return body_class.model_validate(value)
    except ValidationError as error:
        raise _first_error(error) from error


def _first_error(error: ValidationError) -> ApiError:
    """Return the first broken rule, with the field and the value."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    name = path[0] if path else None
    got = repr(first["input"])
    if first["type"] == "extra_forbidden":
        return refused(f"unknown field {'.'.join(path)!r}", name, "unknown_field")
    if first["type"] == "missing":
        return refused(f"{name} must be given", name, "missing_field")
    return refused(f"{'.'.join(path) or 'the body'}: {first['msg']}, got {got[:80]}", name, "invalid_value")


def check_most(name: str, value: int, most: int) -> None:
    """Refuse a number above what this server allows.

    Raises:
        ApiError: If it is.
    """
    if value > most:
        raise refused(f"{name} must be at most {most} on this server, got {value}", name, "invalid_value")
