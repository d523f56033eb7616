"""The application: verbs are functions, and an error becomes one line with a hint and an exit code.

A command imports only its own verb, and a verb imports torch and the runtimes only if it needs them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from functools import cache
from pkgutil import resolve_name
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ligerexport import __version__
from ligerexport.cli import options
from ligerexport.console import data, print_error, say
from ligerexport.errors import LigerError, UsageError, close_matches


class _Verbs(TyperGroup):
    """The verbs in the order of work, with close matches for typos."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            raise UsageError(f"unknown command '{args[0]}'", hint=close_matches(args[0], self.commands))
        return super().resolve_command(ctx, args)


_VERBS = {
    "convert": "convert", "allocate": "allocate", "recover": "recover", "eval": "eval:eval_", "build": "build",
    "run": "run", "chat": "chat", "serve": "serve", "bench": "bench", "demo": "demo", "pull": "hub", "push": "hub",
    "inspect": "inspect", "native": "native", "triton": "triton", "doctor": "doctor", "list": "list:list_",
}  # fmt: skip
"""Module of each verb, and its function if it has another name, in the order of work."""


@cache
def _app(*verbs: str) -> typer.Typer:
    """Return the application with some verbs."""
    made = typer.Typer(
        cls=_Verbs,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(_root)
    for verb in verbs:
        module, _, function = _VERBS[verb].partition(":")
        made.command(verb)(resolve_name(f"ligerexport.cli.{module}:{function or verb}"))
    return made


def __getattr__(name: str) -> typer.Typer:
    if name == "app":  # with all verbs
        return _app(*_VERBS)
    raise AttributeError(name)


def _version(wanted: bool) -> None:
    if wanted:
        data(f"ligerexport {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn a pretrained Transformer into a gated linear recurrent model with constant memory, and run it.

    Start with: ligerexport convert smollm2-135m -o liger
    """


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit: 0 done, 1 failed, 2 usage, 3 verification failed, 4 dependency missing, 130 Ctrl-C.

    Args:
        argv: Arguments without the program's name; None takes the process's.
    """
    options.settings.debug = False
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_standard_files()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit normally, so that half-written files are removed
    try:
        wanted = arguments[:1] if arguments and arguments[0] in _VERBS else _VERBS
        result = _app(*wanted)(arguments or ["--help"], prog_name="ligerexport", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        _flush()
    except (KeyboardInterrupt, typer.Abort):  # typer returns 130 or raises, depending on its version
        code = 130
    except BrokenPipeError:  # the reader of stdout closed it
        code = 1
    except Exception as error:
        if options.settings.debug:
            raise
        explained = _explain(error)
        print_error(explained)
        code = explained.exit_code
    try:
        _flush()
    except OSError:  # the rest of the output cannot be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code == 130:
        say("\nstopped")
    sys.exit(code)


def _open_standard_files() -> None:
    """Replace closed standard files by the null device, so that no other file gets their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  (until the end)


def _flush() -> None:
    if sys.stdout is not None:  # it is None if stdout is closed
        sys.stdout.flush()


_NO_MEMORY = ("bad_alloc", "bad allocation", "ailed to allocate memory", "t allocate memory", "Cannot allocate memory",
              "t start new thread", "failed to map segment", "codec configuration error",
              "Failed to serialize proto")  # fmt: skip
"""Parts of the errors of ONNX Runtime, torch, the system, Python's threads, the library loader, Pillow and protobuf if
memory runs out."""


def _is_memory(error: BaseException | None) -> bool:
    """Return whether an exception or one of its causes means that memory ran out."""
    if error is None:
        return False
    said = isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)
    return said or _is_memory(error.__cause__)


def _explain(error: Exception) -> LigerError:
    """Return the error to show for an exception."""
    if isinstance(error, LigerError):
        return error
    describe = getattr(error, "format_message", None)
    if describe is not None:  # an error of the argument parser
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "ligerexport"
        hint = f"{command} --help"
        if option := getattr(error, "option_name", None) if hasattr(error, "possibilities") else None:
            near = error.possibilities  # type: ignore[attr-defined]
            if near:
                hint = f"did you mean {' or '.join(near)}?"
                hint += " A prompt that begins with a dash goes after --" if command.endswith(" run") else ""
            elif command.endswith(" run"):
                hint = f"{command} ARTIFACT [OPTIONS] -- PROMPT, where the prompt begins with a dash; otherwise {hint}"
            return UsageError(f"unknown option '{option}'", hint=hint)
        return UsageError(describe().rstrip("."), hint=hint)
    if _is_memory(error):
        return LigerError("memory ran out", hint="end other programs, raise the limit, or use smaller settings")
    if isinstance(error, OSError) and (said := error.strerror or str(error)):
        return LigerError(f"{error.filename or 'reading or writing failed'}: {said}")
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # raised by pathlib for a path with ~
        return UsageError(f"a path begins with ~: {error}", hint="write the whole path")
    return LigerError(
        f"unexpected {type(error).__name__}: {str(error).partition(chr(10))[0]}",
        hint="this is a bug; the same command with --debug shows where",
    )
