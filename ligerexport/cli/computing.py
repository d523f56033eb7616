"""What the verbs that compute have in common: threads, and libraries that keep their remarks to themselves."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, TypeVar

import typer

from ligerexport.threads import use_threads

Threads = Annotated[int | None, typer.Option("--threads", help="Default: physical cores.")]
Verb = TypeVar("Verb", bound=Callable[..., None])


def computes(verb: Verb) -> Verb:
    """Let a verb run with the threads of its option `--threads`, and without the warnings of libraries."""

    @wraps(verb)
    def run(*args: Any, threads: int | None, **options: Any) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own say as much
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tells of each attempt to reach the hub
        with use_threads(threads), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            verb(*args, threads=threads, **options)

    return run  # type: ignore[return-value]
