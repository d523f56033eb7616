"""Serve the page and an artifact from one origin on this machine: python serve.py ARTIFACT [--port N]."""

from __future__ import annotations

import argparse
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).resolve().parent


class Handler(SimpleHTTPRequestHandler):
    """Serves the page's directory, and the artifact's under /artifact/."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def __init__(self, *args: object, artifact: Path, **options: object) -> None:
        self.artifact = artifact
        super().__init__(*args, directory=str(PAGE), **options)

    def translate_path(self, path: str) -> str:
        if path.startswith("/artifact/"):
            self.directory, path = str(self.artifact), path.removeprefix("/artifact")
        return super().translate_path(path)

    def end_headers(self) -> None:
        # With these two headers a browser allows shared memory, which ONNX Runtime's threads need.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


def server(artifact: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server on the loopback address; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, artifact=artifact))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    with server(options.artifact, options.port) as running:
        print(f"http://127.0.0.1:{running.server_port}")
        running.serve_forever()
