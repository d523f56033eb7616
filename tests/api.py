"""Print the public interface: `python tests/api.py > docs/reference/api.md`. A test compares the two."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator

import typer.main

import ligerexport as lx
from ligerexport.cli.app import app


def summary(thing: object) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def of_python() -> Iterator[str]:
    """Yield a section for each public name."""
    for name in sorted(lx.__all__):
        thing = getattr(lx, name)
        if not callable(thing):
            yield f"### `{name}`\n"
            continue
        yield f"### {'' if inspect.isfunction(thing) else 'class '}`{name}`\n"
        if inspect.isfunction(thing):
            yield f"```python\n{name}{signature(thing)}\n```\n"
        yield f"{summary(thing)}\n"
        if inspect.isclass(thing):
            members = {k: v for base in reversed(thing.__mro__[:-1]) for k, v in vars(base).items()}
            names = [k for k in (*members, *getattr(thing, "__annotations__", {})) if not k.startswith("_")]
            for member in sorted(dict.fromkeys(names)):
                value = inspect.getattr_static(thing, member, None)
                if isinstance(value, (classmethod, staticmethod)):
                    value = value.__func__
                if inspect.isfunction(value):
                    yield f"- `{member}{signature(value)}`: {summary(value)}"
                else:
                    said = summary(value) if isinstance(value, property) else ""
                    yield f"- `{member}`: {said}" if said else f"- `{member}`"
            yield ""


def signature(function: object) -> str:
    """Return names, defaults and types of parameters as in the source."""
    text = re.sub(r"<function (\w+) at 0x\w+>", r"\1", str(inspect.signature(function)))  # type: ignore[arg-type]
    return re.sub(r"(: |-> )['\"]([^=]*?)['\"](?=[,) ]|$)", r"\1\2", text)


def of_command() -> Iterator[str]:
    """Yield a section for each verb."""
    for name, verb in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        yield f"### `ligerexport {name}`\n"
        yield f"{(verb.help or '').strip().partition(chr(10))[0]}\n"
        for x in verb.params:
            name = ", ".join([*x.opts, *x.secondary_opts]) if x.opts[0].startswith("-") else x.name.upper()
            if not x.hidden:
                yield f"- `{name}`" + (f": {' '.join(x.help.split())}" if x.help else "")
        yield ""


def text() -> str:
    """Return the document."""
    head = "# Frozen interface\n\nWritten by `python tests/api.py > docs/reference/api.md`; a change here is a "
    head += "change of the interface, and belongs\ninto the changelog.\n\n## Python\n"
    return "\n".join([head, *of_python(), "## Command line\n", *of_command()]).rstrip("\n") + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
