"""Serve the application with uvicorn until a signal; then finish what was accepted."""

from __future__ import annotations

import os
import signal
import socket

import uvicorn
from fastapi import FastAPI

from ligerexport.errors import UsageError


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that waits for clients.

    Args:
        host: Address of this machine.
        port: Port; 0 takes a free one.

    Raises:
        UsageError: The port is in use, or the address is not this machine's.
    """
    listener = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sends small packets at once only if the socket names its protocol
        listener = socket.socket(family, kind, socket.IPPROTO_TCP)
        if os.name == "posix":  # elsewhere it would allow two servers on one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise UsageError(f"cannot serve on {host}, port {port}: {error}", hint="choose another: --port 0") from error
    return listener


def run(app: FastAPI, listener: socket.socket, patience: float) -> None:
    """Serve until SIGTERM or Ctrl-C, then refuse new requests and finish the others; a second Ctrl-C ends at once.

    Args:
        app: The application.
        listener: Result of `listen`.
        patience: Seconds that accepted requests may take to finish.
    """
    config = uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, server_header=False,
                            lifespan="on", timeout_graceful_shutdown=round(patience))  # fmt: skip
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:  # uvicorn has its own handlers, and afterwards raises the signals again for those that it found
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
