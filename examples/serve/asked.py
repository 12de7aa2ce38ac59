"""A job that a client waits for, as the event loop sees it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable

from fastapi import Request
from fastapi.responses import StreamingResponse

from .engine import Engine
from .errors import ApiError
from .job import Event, Job


# so often a silent stream says that it lives
PAUSE_SECONDS = 15.0


class Asked:
    """Puts a job into the queue and hands on what it tells; a client that hangs up stops the writing.

    Args:
        request: The request that the job answers; its body has been read.
        engine: Where the queue is.
        **fields: Fields of a `Job`.

    Raises:
        ApiError: If the queue is full.
    """

    def __init__(self, request: Request, engine: Engine, **fields):
        self._request, self._events = request, asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.job = Job(tell=tell, deadline=time.monotonic() + engine.limits.seconds, **fields)
        engine.submit(self.job)

    async def events(self) -> AsyncIterator[Event]:
        """Yield what the job tells up to `finished`; `pause` where nothing comes for long.

        Raises:
            ApiError: If it fails, or the client has gone.
        """
        gone = asyncio.ensure_future(self._hung_up())
        try:
            while True:
                try:
                    event = await asyncio.wait_for(self._events.get(), PAUSE_SECONDS)
                except asyncio.TimeoutError:
                    event = Event("pause")
                if event.kind == "failed":
                    raise event.error
                yield event
                if event.kind == "finished":
                    return
        finally:
            self.job.cancelled.set()
            gone.cancel()

    async def _hung_up(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.job.cancelled.set()
        self._events.put_nowait(Event("failed", error=ApiError(499, "the client has gone")))

    async def finished(self) -> Job:
        """Return the job when all of its rows have ended.

        Raises:
            ApiError: If it fails, or the client has gone.
        """
        async for _ in self.events():
            pass
        return self.job


async def stream(asked: Asked, frames: Callable[[Event], list[str]]) -> StreamingResponse:
    """Return a response of server-sent events, once the job has begun: until then errors have a status.

    Args:
        asked: The job.
        frames: Returns the frames of an event.

    Raises:
        ApiError: If the job fails before it begins.
    """
    events = asked.events()
    began = await anext(events)
    while began.kind != "started":
        began = await anext(events)

    async def sent() -> AsyncIterator[str]:
        try:
            for frame in frames(began):
                yield frame
            async for event in events:
                if event.kind == "pause":
                    yield ": still writing\n\n"
                for frame in frames(event):
                    yield frame
        except ApiError as error:
            yield data(error.body())
        finally:
            await events.aclose()

    return StreamingResponse(sent(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def data(value: dict, name: str | None = None) -> str:
    """Return one server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(value, ensure_ascii=False)}\n\n"
