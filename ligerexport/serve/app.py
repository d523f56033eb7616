"""The endpoints of `ligerexport serve`, as a FastAPI application."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from ligerexport import __version__
from ligerexport.serve import responses
from ligerexport.serve.answers import Answer, Collected, Served, merged, start, watched
from ligerexport.serve.chat import Chat, encode
from ligerexport.serve.completions import Completion
from ligerexport.serve.errors import ApiError, install
from ligerexport.serve.gate import Gate, Keys
from ligerexport.serve.metrics import Metrics
from ligerexport.serve.schemas import ChatRequest, CompletionRequest, ResponseRequest, StateChange, TokenizeRequest
from ligerexport.serve.shape import Shape
from ligerexport.serve.sse import stream

PAGE = Path(__file__).parent / "page" / "index.html"


@dataclass(frozen=True)
class Access:
    """Who may use a server, and how.

    Attributes:
        keys: The valid keys; None lets everybody in.
        hosts: Names by which the server may be addressed; None allows all.
        origins: Origins whose pages may use it; by default only its own page.
        most: Largest number of bytes in a request's body.
    """

    keys: Keys | None = None
    hosts: Sequence[str] | None = None
    origins: Sequence[str] = ()
    most: int = 16 << 20


class Failure(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Refusal(BaseModel):
    """The answer to a request that is refused."""

    error: Failure


class Models:
    """The models of a server by their names.

    Args:
        models: The models; the first one is the default where an endpoint needs no name.
    """

    def __init__(self, models: Sequence[Served]) -> None:
        self.all = {model.name: model for model in models}

    def find(self, name: str | None) -> Served:
        """Return a model.

        Raises:
            ApiError: There is none with this name.
        """
        if name is None:
            return next(iter(self.all.values()))
        if name not in self.all:
            raise ApiError(404, f"The model '{name[:100]}' does not exist. Models: {', '.join(self.all)}.",
                           param="model", code="model_not_found")  # fmt: skip
        return self.all[name]

    def describe(self, model: Served) -> dict[str, Any]:
        """Return what `/v1/models` says about a model."""
        return {"id": model.name, "object": "model", "created": model.created, "owned_by": "ligerexport", **model.facts}


def make_app(models: Sequence[Served], access: Access = Access(), *, patience: float = 30.0) -> FastAPI:
    """Return the application.

    Args:
        models: What it serves. The engines are closed when it shuts down.
        access: Who may use it.
        patience: Seconds that accepted requests may take to finish when it shuts down.
    """
    served = Models(models)
    engines = {model.name: model.engine for model in models if model.adapter is None}
    metrics = Metrics(engines)
    ready = [True]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        ready[0] = False
        await asyncio.gather(*(engine.drain(patience) for engine in engines.values()))
        for engine in engines.values():
            engine.close()

    gate = Middleware(Gate, keys=access.keys, hosts=access.hosts, most=access.most,
                      count=lambda path, status: metrics.requests.labels(path, str(status)).inc())  # fmt: skip
    cors = Middleware(CORSMiddleware, allow_origins=list(access.origins), allow_methods=["GET", "POST", "DELETE"],
                      allow_headers=["Authorization", "Content-Type"])  # fmt: skip
    failures: dict[int | str, dict[str, Any]] = {"4XX": {"model": Refusal}, "5XX": {"model": Refusal}}
    app = FastAPI(
        title="ligerexport", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        middleware=[*([cors] if access.origins else []), gate], responses=failures,
    )  # fmt: skip
    install(app)
    _add_texts(app, served, metrics)
    _add_models(app, served)
    _add_states(app, served)
    _add_facts(app, served, metrics, lambda: ready[0])
    return app


def _add_texts(app: FastAPI, served: Models, metrics: Metrics) -> None:
    """Add the endpoints that write text."""

    async def respond(request: Request, make: Callable[[Served, Any], Shape], body: Any) -> Response:
        owner = request.state.owner

        def begin() -> tuple[Shape, list[Answer]]:
            shape = make(served.find(body.model), body)
            return shape, start(shape.asked, owner, owner or (request.client.host if request.client else ""))

        shape, answers = await run_in_threadpool(begin)  # long prompts take long, and others stream meanwhile
        if body.stream:
            return stream(request, shape, answers, metrics)
        whole = [Collected(answer.index) for answer in answers]
        pieces = merged(answers, metrics, body.model)
        async with watched(request, answers):
            try:
                async for found in pieces:
                    if found is not None:
                        whole[found[0]].add(found[1])
            finally:
                await pieces.aclose()
        return JSONResponse(await run_in_threadpool(shape.whole, whole))

    streams: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}}
    }

    @app.post("/v1/chat/completions", responses=streams)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await respond(request, Chat, body)

    @app.post("/v1/completions", responses=streams)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts or token ids."""
        return await respond(request, Completion, body)

    @app.post("/v1/responses", responses=streams)
    async def create_response(body: ResponseRequest, request: Request) -> Response:
        """Answer a text or a conversation."""
        return await respond(request, responses.Response, body)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Return the ids of a text, or of a conversation."""
        text = served.find(body.model).text
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Expected either 'prompt' or 'messages'.", param="prompt", code="invalid_value")
        if body.messages is not None:
            ids, _ = await run_in_threadpool(encode, text, body.messages)
        else:
            ids = await run_in_threadpool(text.encode, str(body.prompt), special=body.add_special_tokens)
        return {"count": len(ids), "tokens": ids}


def _add_models(app: FastAPI, served: Models) -> None:
    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the models."""
        return {"object": "list", "data": [served.describe(model) for model in served.all.values()]}

    @app.get("/v1/models/{model}")
    async def retrieve_model(model: str) -> dict[str, Any]:
        """Describe one model."""
        return served.describe(served.find(model))


def _add_states(app: FastAPI, served: Models) -> None:
    """Add the endpoints for the states that are kept between requests. They run in threads, since disks are slow."""

    @app.get("/v1/states")
    def list_states(request: Request, model: str | None = Query(None)) -> dict[str, Any]:
        """List the client's states of one model, or of all."""
        models = served.all.values() if model is None else [served.find(model)]
        rows = [{"object": "state", "model": one.name, **asdict(info)}
                for one in models for info in one.engine.states(request.state.owner, one.adapter)]  # fmt: skip
        return {"object": "list", "data": rows}

    def one(state: str, model: str | None, owner: str) -> tuple[Served, dict[str, Any]]:
        """Return a state and its model."""
        for candidate in served.all.values() if model is None else [served.find(model)]:
            for info in candidate.engine.states(owner, candidate.adapter):
                if state in (info.id, info.name):
                    return candidate, {"object": "state", "model": candidate.name, **asdict(info)}
        raise ApiError(404, f"There is no state '{state[:100]}'.", param="id", code="state_not_found")

    @app.post("/v1/states/{state}")
    def change_state(state: str, body: StateChange, request: Request) -> dict[str, Any]:
        """Pin a state, so that it is never evicted, or give it a name."""
        owner = request.state.owner
        found, facts = one(state, body.model, owner)
        if body.pinned is not None:
            found.engine.pin(owner, facts["id"], body.pinned, found.adapter)
        if body.name is not None:
            found.engine.name(owner, facts["id"], body.name, found.adapter)
        return one(facts["id"], found.name, owner)[1]

    @app.delete("/v1/states/{state}")
    def delete_state(state: str, request: Request, model: str | None = Query(None)) -> dict[str, Any]:
        """Forget a state."""
        found, facts = one(state, model, request.state.owner)
        found.engine.delete(request.state.owner, facts["id"], found.adapter)
        return {"id": facts["id"], "object": "state", "deleted": True}


def _add_facts(app: FastAPI, served: Models, metrics: Metrics, ready: Callable[[], bool]) -> None:
    """Add the page, and the endpoints for those who watch over a server."""
    page = PAGE.read_text(encoding="utf-8")
    hashes = {
        tag: base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        for tag, code in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the models run; if not, the server must be started again."""
        if any(model.engine.failed for model in served.all.values()):
            raise ApiError(503, "A model has failed.", code="service_unavailable", kind="server_error")
        return {"status": "ok"}

    @app.get("/ready")
    async def is_ready() -> dict[str, str]:
        """Say whether requests are accepted."""
        if not ready():
            raise ApiError(503, "The server is shutting down.", code="service_unavailable", kind="server_error")
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    def show_metrics() -> PlainTextResponse:
        """Return counts and times in the format of Prometheus."""
        return PlainTextResponse(metrics.text())
