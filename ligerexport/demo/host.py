"""The actions of a page: let both models answer a question, chat with the first, measure both, and stop all that."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ligerexport.artifact.artifact import is_artifact, open_artifact
from ligerexport.demo import page
from ligerexport.demo.compare import FRAME, Pair, Stream, same_text
from ligerexport.demo.kept import kept_of
from ligerexport.demo.prompts import FIRST, ask, filler_ids
from ligerexport.demo.sweep import Curve, Sweep, sweep
from ligerexport.demo.talk import Talks
from ligerexport.errors import LigerError, SourceError, UsageError
from ligerexport.measure.bench.genai import in_genai
from ligerexport.measure.bench.report import RESULT
from ligerexport.text.tokenizer import TextModel
from ligerexport.threads import default_threads


class Demo:
    """Two models and the page that compares them.

    Args:
        model: An artifact, a converted checkpoint, or a Transformer.
        against: Another model.
        results: Result of `bench`, a directory or its file; None shows none.
        threads: Number of threads of each model; None takes the physical cores.
        device: Row of `ligerexport.measure.bench.settings.DEVICES`.

    Raises:
        LigerError: A model cannot be opened, or they have different tokenizers.
    """

    def __init__(
        self,
        model: str,
        against: str,
        *,
        results: Path | None = None,
        threads: int | None = None,
        device: str = "auto",
    ) -> None:
        self.manifest = open_artifact(Path(model).expanduser()).manifest if is_artifact(model) else None
        self.result = None if results is None else read_result(results)
        self.threads = threads or default_threads()
        self.text = TextModel(directory_of(model))
        same_text(self.text, TextModel(directory_of(against)))
        self.pair = Pair(model, against, threads=threads, device=device)
        self.talks = Talks(model, self.pair, threads)
        self._stops: set[tuple[str, threading.Event]] = set()  # one for each running answer or measurement

    def run(
        self, preset: str, prompt: str, context: int, depth: int, most: int, rows: list[list[str]], session: str
    ) -> Iterator[dict[str, Any]]:
        """Let both models answer; yield changes by part of the page."""
        stop = self._begin(session)
        said = page.status("Stopped.")
        try:
            yield {"busy": True, "status": page.status("The models take turns: each is timed while the other waits.")}
            question = ask(self.text, preset, prompt, int(context), depth / 100)
            read = self.text.decode(question.ids)
            yield {"asked": page.asked("All that both models read", read, len(question.ids), question.key)}
            race = self.pair.race(uuid.uuid4().hex, question.ids, self.text, int(most), stop)
            for streams in race:
                yield self._picture(streams, int(most), question.key)
            if not stop.is_set():
                rows = [*rows, page.run_row(streams, question.key)]
                said = page.status(verdict(streams))
                kept = kept_of(streams[0], self.text, self.manifest)
                yield {"runs": page.runs(self.pair.names, rows), "rows": rows, "kept": kept}
        except LigerError as error:
            said = page.status(error)
        finally:
            self._stops.discard((session, stop))
        yield {"busy": False, "status": said}

    def _picture(self, streams: tuple[Stream, Stream], most: int, key: str | None) -> dict[str, Any]:
        cards = (page.card(stream, style, key) for stream, style in zip(streams, page.STYLES, strict=True))
        return dict(zip(page.STYLES, cards, strict=True)) | {"plots": page.plots(streams, most)}

    def before(self, context: int) -> str:
        """Return the text that stands before the question."""
        ids = filler_ids(self.text, int(context))
        return page.asked("Text before the question", self.text.decode(ids), len(ids))

    def idle(self) -> dict[str, Any]:
        """Return the parts of the page before the first question."""
        first, second = (Stream(name, self.pair.facts(name), ()) for name in self.pair.names)
        return self._picture((first, second), FIRST.tokens, None)

    def _begin(self, session: str) -> threading.Event:
        stop = threading.Event()
        self._stops.add((session, stop))
        return stop

    def stop(self, session: str) -> None:
        """End the running answers and measurements of a page."""
        for owner, stop in list(self._stops):
            if owner == session:
                stop.set()

    def measure(self, longest: int, session: str) -> Iterator[tuple[str, str]]:
        """Measure both at lengths up to `longest` tokens; yield the charts and the status line."""
        stop = self._begin(session)
        found, said = Sweep(int(longest), [Curve(name) for name in self.pair.names]), page.status("")
        try:
            yield page.growth(found), page.measuring(found)
            shown = 0.0
            for found in sweep(self.pair, uuid.uuid4().hex, filler_ids(self.text, int(longest)), stop):
                if time.perf_counter() - shown > FRAME:
                    yield page.growth(found), page.measuring(found)
                    shown = time.perf_counter()
            said = page.grown(found)
        except LigerError as error:
            said = page.status(error)
        finally:
            self._stops.discard((session, stop))
        yield page.growth(found), said

    def chat(self, text: str, system: str, temperature: float, top_p: float, session: str) -> Iterator[dict[str, Any]]:
        """Let the first model answer in the conversation of a page; yield changes by part of the page.

        Args:
            text: What the user says.
            system: See `Talks.say`.
            temperature: See `Talks.say`.
            top_p: See `Talks.say`.
            session: Unique name of the page.
        """
        stop = self._begin(session)
        try:
            yield {"busy": True, "status": page.status("The model reads your message.")}
            shown, change = 0.0, dict[str, Any]()
            for answer, talk in self.talks.say(session, text, system, temperature, top_p, stop):
                change = {"answer": answer, "memory": page.memory(self.pair.names[0], talk.memory, self.manifest)}
                if time.perf_counter() - shown > FRAME:
                    yield change | {"status": page.status("The model writes.")}
                    shown = time.perf_counter()
            yield change
            said = page.status("Stopped. The chat can go on." if stop.is_set() else "")
        except LigerError as error:
            said = page.status(error)
        finally:
            self._stops.discard((session, stop))
        yield {"busy": False, "status": said}

    def close(self) -> None:
        """End everything that runs, and close both models."""
        for _, stop in list(self._stops):
            stop.set()
        self.pair.close()


def verdict(streams: tuple[Stream, Stream]) -> str | LigerError:
    """Return what an answer showed: a comparison of the times, or why a model failed."""
    if failed := next((stream.error for stream in streams if stream.error), None):
        return failed
    ours, theirs = streams
    if not ours.median or not theirs.median:
        return "Finished."
    faster, slower = (ours, theirs) if ours.median <= theirs.median else (theirs, ours)
    assert faster.median and slower.median
    ratio = slower.median / faster.median
    times = f"{ratio:.1f} times" if ratio >= 1.05 else "about"
    return (f"Finished. After {len(ours.prompt):,} tokens, {faster.name} took {faster.median:.1f} ms per token and "
            f"{slower.name} {slower.median:.1f} ms, {times} as long.")  # fmt: skip


def directory_of(model: str) -> Path:
    """Return the directory with a model's tokenizer.

    Raises:
        SourceError: There is no such model, or the directory has none.
    """
    if is_artifact(model) or in_genai(model):
        return Path(model).expanduser()
    from ligerexport.checkpoint.sources import resolve

    path = resolve(model).path
    if not (path / "config.json").is_file():
        raise SourceError(
            f"{model} holds no model: there is no config.json, manifest.json or genai_config.json",
            hint="give a directory that `ligerexport build` wrote, a checkpoint, or a name such as smollm2-135m",
        )
    return path


def read_result(path: Path) -> dict[str, Any]:
    """Read a result of `bench`.

    Raises:
        UsageError: The path has no such result.
    """
    file = path / RESULT if path.is_dir() else path
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        page.measured(result)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is not a result of bench", hint="ligerexport bench ... -o DIRECTORY") from error
    return result
