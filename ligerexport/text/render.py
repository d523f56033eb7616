"""Render chat templates in a separate process, because a template is a program by the makers of the model.

It runs in jinja's sandbox, and the process has limited memory and time, which a sandbox does not limit. This file is
also the program of that process, so it imports nothing from this package and nothing slow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

SECONDS = 2
"""Largest number of CPU seconds for a conversation. Templates take milliseconds."""
PATIENCE = 10 if sys.platform == "win32" else 300
"""Largest number of seconds to wait; on Windows, which has no limit of CPU time, only this ends an endless template."""
MEMORY = 512 << 20
"""Largest address space in bytes."""
MOST = 64 << 10
"""Largest output in bytes, beyond four times the input."""


class Renderer:
    """A chat template, whose process starts with the first conversation and ends with this object.

    Args:
        template: Source of the template.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def __call__(self, **values: Any) -> str:
        """Return the template's output for values.

        Raises:
            ValueError: The template is invalid, refuses the values, or exceeds a limit; the error has one line.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
                weakref.finalize(self, _end, self._process)
            answer = _ask(self._process, values)
        if "text" not in answer:
            raise ValueError(answer.get("error") or f"it takes more than {SECONDS} seconds or {MEMORY >> 20} MB")
        return answer["text"]

    def _start(self) -> subprocess.Popen[str]:
        # pass the import path: an isolated process does not search the user's directory
        command = [sys.executable, "-I", "-S", __file__, *(path for path in sys.path if os.path.isabs(path))]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8")
        _ask(process, self._template, answers=False)
        return process


def _ask(process: subprocess.Popen[str], question: Any, *, answers: bool = True) -> dict[str, str]:
    """Send a line and return the answer; empty if the process ended or was too slow."""
    assert process.stdin is not None and process.stdout is not None
    clock = threading.Timer(PATIENCE, process.kill)
    clock.daemon = True
    clock.start()
    try:
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        line = process.stdout.readline() if answers else ""
    except BrokenPipeError:
        line = ""
    finally:
        clock.cancel()
    return json.loads(line) if line.endswith("\n") else {}


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def _environment() -> Any:
    """Return jinja's sandbox with the extensions that transformers gives chat templates."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks answers for training; here it has no effect."""

        tags = {"generation"}  # noqa: RUF012  (as jinja declares it)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _limit() -> None:
    """Set the limits of memory and CPU time for one more conversation."""
    try:
        import resource
    except ImportError:  # Windows, see `PATIENCE`
        return
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + SECONDS, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Read a template and then values from stdin, one per line, and write each text or error to stdout."""
    sys.path[:] = sys.argv[1:]
    _limit()
    environment, source, template = _environment(), json.loads(sys.stdin.readline()), None
    for line in sys.stdin:
        _limit()
        try:
            template = template or environment.from_string(source)
            text = template.render(json.loads(line))
            if len(text.encode()) > 4 * len(line) + MOST:
                raise ValueError(f"it makes {len(text)} characters of {len(line)}")
            answer = {"text": text}
        except MemoryError:
            answer = {}
        except Exception as error:
            answer = {"error": f"{error}" or type(error).__name__}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
