"""The server on Ray Serve: replicas on any number of machines, which share their states.

    serve run ligerexport.serve.ray:app artifact=/models/engine state_dir=/shared/states replicas=2

Each replica is a whole server without a socket. The ingress reads requests and hands them to replicas; the next turn of
a chat goes to the replica that has its state. If a replica dies, another one reads the state from the shared place.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ligerexport.errors import MissingDependency, UsageError
from ligerexport.serve.app import Access, make_app
from ligerexport.serve.errors import ApiError
from ligerexport.serve.forward import Call, Head, answer, beginnings, read_body
from ligerexport.serve.gate import Keys, too_long
from ligerexport.serve.models import open_models
from ligerexport.serve.sse import event

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when it starts

try:
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig
    from ray.serve.exceptions import BackPressureError
    from ray.serve.handle import DeploymentHandle
    from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
except ImportError as error:
    raise MissingDependency(error.name or "ray", extra="ray") from error

TRIES = 5
"""Number of replicas that may die under one request."""
KNOWN = 1 << 16
"""Number of beginnings whose replica the ingress remembers."""
PATIENCE = 30.0
"""Seconds that a replica may take to finish its requests when it is stopped."""


class Arguments(BaseModel):
    """What the application is built from.

    Attributes:
        artifact: Directory that `build` wrote, at the same place on every machine.
        name: The model's name in requests; default: that of the directory.
        lora: Directories of adapters by their names; each is the model `NAME:ADAPTER`.
        state_dir: Where the replicas share states: a directory that every machine sees, or an address that fsspec
            knows, such as `s3://bucket/states`. Without it, what a dead replica knew is read again.
        memory: Bytes of states in the memory of each replica.
        disk: Bytes of the shared states.
        replicas: Number of replicas, or the smallest one.
        max_replicas: Largest number of replicas; beyond `replicas`, the length of the queue decides.
        max_batch: Largest number of answers that a replica writes at the same time.
        queue: Number of requests that wait for a replica; others get the status 429.
        max_new_tokens: Largest answer to a request that names no limit.
        deadline: Seconds after which an answer is cut off.
        device: `cpu` or `cuda`.
        threads: Number of threads of a replica, for which Ray reserves as many cores.
        api_key_file: File with one key in each line.
    """

    model_config = ConfigDict(extra="forbid")

    artifact: Path
    name: str = ""
    lora: dict[str, Path] = Field(default_factory=dict)
    state_dir: str | None = None
    memory: ByteSize = ByteSize(4_000_000_000)
    disk: ByteSize = ByteSize(64_000_000_000)
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    max_batch: int = Field(16, ge=1)
    queue: int = Field(256, ge=1)
    max_new_tokens: int = Field(4096, ge=1)
    deadline: float | None = Field(None, gt=0)
    device: str = "cpu"
    threads: int = Field(1, ge=1)
    api_key_file: Path | None = None


class PrefixRouter(RequestRouter):
    """Prefers the replica that answered the longest beginning of a prompt, unless that one has much more to do."""

    def initialize_state(self, slack: int = 8) -> None:
        """Ray calls this with `request_router_kwargs`.

        Args:
            slack: Number of requests by which that replica's queue may be longer than the shortest one.
        """
        self._slack = slack
        self._places: OrderedDict[bytes, ReplicaID] = OrderedDict()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replica with the prompt's state, if there is one, and then all others together."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        places = (self._places.get(digest) for digest in reversed(pending_request.args[0].beginnings))
        best = next((place for place in places if place in replicas), None)
        if best is None or self._length(best) > min(map(self._length, replicas)) + self._slack:
            return [candidate_replicas]
        return [[replicas[best]], candidate_replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember where the beginnings of a prompt are."""
        for digest in pending_request.args[0].beginnings:
            self._places[digest] = replica_id
            self._places.move_to_end(digest)
        while len(self._places) > KNOWN:
            self._places.popitem(last=False)

    def _length(self, replica: ReplicaID) -> int:
        return self.replica_queue_len_cache.get(replica) or 0


class Replica:
    """One server without a socket.

    Args:
        arguments: What the application is built from.
    """

    def __init__(self, arguments: Arguments) -> None:
        models = open_models(
            arguments.name or arguments.artifact.resolve().name, arguments.artifact, arguments.lora,
            max_batch=arguments.max_batch, memory=int(arguments.memory), disk=int(arguments.disk),
            shared=arguments.state_dir, queue=arguments.queue, device=arguments.device, threads=arguments.threads,
            longest=arguments.max_new_tokens, deadline=arguments.deadline,
        )  # fmt: skip
        self._engine = models[0].engine
        self._app = make_app(models, Access(Keys(arguments.api_key_file) if arguments.api_key_file else None))

    async def answer(self, call: Call) -> AsyncGenerator[Head | bytes]:
        """Answer a request; see `ligerexport.serve.forward.answer`."""
        async for piece in answer(self._app, call):
            yield piece

    def check_health(self) -> None:
        """Ray calls this, and starts the replica again if it raises.

        Raises:
            RuntimeError: The engine has failed.
        """
        if self._engine.failed:
            raise RuntimeError(self._engine.failed)

    async def __del__(self) -> None:
        """Ray calls this once no request is left: the states are written."""
        await self._engine.drain(PATIENCE)
        self._engine.close()


class Ingress:
    """Takes requests, and lets replicas answer them.

    Args:
        replicas: The deployment of the replicas.
    """

    LOCAL = ("/v1/states", "/metrics")
    """Paths that speak of a single server."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        """Return the answer of a replica, or of a second one if the first one dies before it has said anything."""
        if request.url.path.startswith(self.LOCAL):
            return ApiError(501, "This endpoint is about one server, and this one has replicas.").response()
        body, headers = await read_body(request.stream(), Access.most), tuple(request.headers.raw)
        if body is None:
            return too_long(Access.most).response()
        client = (request.client.host, request.client.port) if request.client else None
        key = request.headers.get("authorization", "").encode()
        known = await run_in_threadpool(beginnings, body, key)  # long prompts take long, and others stream meanwhile
        call = Call(request.method, request.url.path, request.url.query.encode(), headers, body, client, known)
        for _ in range(TRIES):
            try:
                pieces = self._replicas.answer.remote(call)
                head = await anext(pieces)
                first = await anext(pieces, b"")
            except BackPressureError:
                return ApiError(429, "The queue is full. Try again in 1 s.", code="rate_limit_exceeded",
                                kind="requests", headers={"Retry-After": "1"}).response()  # fmt: skip
            except RayActorError:
                continue
            response = StreamingResponse(_rest(first, pieces, head), head.status)
            response.raw_headers = list(head.headers)
            return response
        return _lost().response()


async def _rest(first: bytes, pieces: AsyncIterator[bytes], head: Head) -> AsyncGenerator[bytes]:
    """Yield the content of a response; a stream whose replica dies ends with an error."""
    yield first
    try:
        async for piece in pieces:
            yield piece
    except RayActorError:
        if dict(head.headers).get(b"content-type", b"").startswith(b"text/event-stream"):
            yield event(_lost().body(), named=False).encode()


def _lost() -> ApiError:
    return ApiError(503, "The replica that wrote this answer is gone. Send the request again.",
                    code="service_unavailable", kind="server_error", headers={"Retry-After": "1"})  # fmt: skip


def app(given: Arguments | Mapping[str, Any]) -> Any:
    """Return the Ray Serve application.

    Args:
        given: What it is built from; `serve run` and files in YAML give texts by name.

    Raises:
        UsageError: An argument is unknown or has another type, or the numbers of replicas contradict each other.
    """
    try:
        arguments = Arguments.model_validate(given)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = wrong["loc"][0] if wrong["loc"] else "arguments"
        hint = f"the arguments are {', '.join(Arguments.model_fields)}"
        raise UsageError(f"{name}: {wrong['msg']}", hint=hint) from None
    most = arguments.max_replicas or arguments.replicas
    if most < arguments.replicas:
        raise UsageError(f"max_replicas {most} is less than replicas {arguments.replicas}", hint="give a larger one")
    scaling: dict[str, Any] = {"num_replicas": arguments.replicas}
    if most > arguments.replicas:
        scaling = {"autoscaling_config": AutoscalingConfig(
            min_replicas=arguments.replicas, max_replicas=most, target_ongoing_requests=arguments.max_batch,
        )}  # fmt: skip
    gpus = {"num_gpus": 1} if arguments.device == "cuda" else {}
    replicas = serve.deployment(Replica).options(
        **scaling, max_ongoing_requests=2 * arguments.max_batch, max_queued_requests=arguments.queue,
        graceful_shutdown_timeout_s=2 * PATIENCE, ray_actor_options={"num_cpus": arguments.threads, **gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter, request_router_kwargs={"slack": arguments.max_batch // 2}
        ),
    )  # fmt: skip
    ingress = serve.deployment(Ingress).options(max_ongoing_requests=1 << 14, ray_actor_options={"num_cpus": 0})
    return ingress.bind(replicas.bind(arguments))
