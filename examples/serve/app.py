"""The server: routes of all interfaces, and the guard in front of them."""

from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from . import canvas_api, generate_api, llama_api, openai_api
from .engine import Engine
from .errors import ApiError


PAGE = Path(__file__).parent / "page"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
HEADERS = {
    b"content-security-policy": (
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


def make_app(engine: Engine, hosts: frozenset[str] | None = LOOPBACK) -> FastAPI:
    """Return the application; the engine runs as long as it does.

    Args:
        engine: What writes.
        hosts: Names under which the server may be asked for; None: any.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        engine.start()
        yield
        engine.close()

    # the pages of the framework load scripts from elsewhere
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for api in (openai_api, llama_api, generate_api, canvas_api):
        app.include_router(api.make_router(engine))

    @app.get("/")
    async def page():
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
    app.add_middleware(Guard, hosts=hosts)

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError):
        body = generate_api.error_body(error) if request.url.path in generate_api.PATHS else error.body()
        retry = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(body, error.status, retry)

    @app.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception):
        body = ApiError(500, f"the server failed: {type(error).__name__}", kind="server_error").body()
        return JSONResponse(body, 500)

    return app


class Guard:
    """Refuses to be asked under another name, which is how a web page elsewhere would reach loopback; sets headers.

    Args:
        app: What is guarded.
        hosts: Names that are ours; None: any.
    """

    def __init__(self, app, hosts: frozenset[str] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS.items()]
            await send(message)

        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.hosts is not None and name.strip("[]").lower() not in self.hosts:
            error = ApiError(421, f"this server is not known as {name!r}; start it with --host to serve others")
            await JSONResponse(error.body(), error.status)(scope, receive, send_guarded)
            return
        await self.app(scope, receive, send_guarded)
