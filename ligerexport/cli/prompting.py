"""Common parts of `run` and `chat`: options, opening an artifact, and reading stdin."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ligerexport.checkpoint.sources import no_model
from ligerexport.cli.options import Threads, computing
from ligerexport.console import data, progress
from ligerexport.errors import UsageError, quoted
from ligerexport.exporters.targets import TARGETS

if TYPE_CHECKING:
    from ligerexport.run.generate import Chunk
    from ligerexport.run.prompt_cache import PromptCache
    from ligerexport.run.runtime import Session

Artifact = Annotated[Path, typer.Argument(help="Directory that build wrote, or convert, which runs in torch.")]
Runnable = typer.Argument(
    help="Directory that build wrote, or convert, which runs in torch; or a model, which is converted and built first: "
    "a directory, a GGUF file, a hub id, or a built-in model such as smollm2-135m."
)
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Largest number of tokens to write.")]


@dataclass(frozen=True)
class Asking:
    """The options that `run` and `chat` share."""

    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="0 takes the most likely token each time.")
    ] = None
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Sample from this many most likely tokens; 0 takes all.")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Sample from the most likely tokens whose probabilities add up to this."),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", help="Sample from tokens with at least this share of the highest probability."),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option("--repetition-penalty", help="Above 1, tokens that were read or written become less likely."),
    ] = None
    presence_penalty: Annotated[
        float | None,
        typer.Option("--presence-penalty", help="Value subtracted from the logits of tokens in the answer so far."),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        typer.Option("--frequency-penalty", help="Value subtracted for each time that the token is in the answer."),
    ] = None
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed writes the same text.")] = None
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="Text or special token that ends the answer; may be repeated."),
    ] = None
    special_content: Annotated[
        bool,
        typer.Option("--special-content", help="Read special tokens in the prompt as such; by default they are text."),
    ] = False
    prompt_cache: Annotated[
        Path | None, typer.Option("--prompt-cache", help="File that keeps the state after the beginning of the prompt.")
    ] = None
    speculate: Annotated[
        str,
        typer.Option(
            "--speculate",
            metavar="WAY",
            help="ngram guesses tokens from earlier places of the text; the directory of an artifact lets it guess; "
            "off does not guess; auto is ngram where a sampled answer has no seed.",
        ),
    ] = "auto"
    lora: Annotated[
        Path | None, typer.Option("--lora", metavar="ADAPTER", help="Use this LoRA; the artifact needs build --lora.")
    ] = None
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu"
    threads: Threads = None
    no_hash: Annotated[bool, typer.Option("--no-hash", help="Do not check the files' sha256 first.")] = False

    def sampling(self, artifact: Path, chat: bool) -> tuple[dict[str, Any], str | None]:
        """Return settings for `Sampler` and, for a chat, a line with the settings and their origin."""
        from ligerexport.run.sampling import chat_settings, describe

        given = {name: value for name, value in vars(self).items() if name in _SAMPLING and value is not None}
        if not chat:
            return given, None
        recommended, origin = chat_settings(artifact)
        origin = f"{origin}, and your options" if given else origin
        return recommended | given, describe(recommended | given, origin)

    def open(self, artifact: Path, *, many: bool, meter: bool = False) -> tuple[Session, PromptCache | None]:
        """Open the artifact and the prompt cache.

        Args:
            many: Whether many tokens will be read or written. Only then does copying the weights into their fastest
                layout save time.
            meter: Whether a converted checkpoint computes `Session.forgotten`.
        """
        from ligerexport.run.prompt_cache import PromptCache
        from ligerexport.run.runtime import load

        adapters = {str(self.lora): self.lora} if self.lora else {}
        session = load(
            artifact, threads=self.threads, prepack=many, hashes=not self.no_hash, device=self.device, meter=meter,
            adapters=adapters,
        )  # fmt: skip
        session.use(next(iter(adapters), None))
        return session, PromptCache(self.prompt_cache) if self.prompt_cache else None

    def guesser(self) -> str | Session:
        """Return what guesses tokens: a way, or a session of the artifact that the user named."""
        from ligerexport.run.runtime import load
        from ligerexport.run.speculation import WAYS, check_way

        if self.speculate in WAYS or not Path(self.speculate).is_dir():
            check_way(self.speculate)
            return self.speculate
        return load(self.speculate, threads=self.threads, hashes=not self.no_hash, device=self.device)


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def prepared(model: Path) -> Path:
    """Return the directory to open: that of the user, or an artifact of the model that the user named.

    Raises:
        SourceError: There is no such directory or model.
    """
    from ligerexport.exporters.prepare import is_model, prepare

    if not is_model(model):
        if not model.is_dir():
            raise no_model(str(model))
        return model
    with computing():
        return prepare(model, progress)


def first_command(artifact: Path, target: str) -> str | None:
    """Return the command that tries an artifact: with a question, if the model has a template for chats."""
    from ligerexport.run.generate import text_model

    row = TARGETS.get(target)
    if row is None or not row.onnxruntime:
        return row.run % quoted(artifact) if row and row.run else None
    asked = (artifact / "tokenizer.json").is_file() and text_model(artifact).chat_template
    return row.run % quoted(artifact) + (' "What is gravity?" --chat' if asked else ' "Once upon a time"')


def build_command(checkpoint: Path) -> str:
    """Return the command that builds a converted checkpoint for this machine."""
    return f"ligerexport build {quoted(checkpoint)} --weights int4 --lowering native -o engine"


def open_stdin() -> TextIO:
    """Return stdin as UTF-8 with the line ends of any system; a terminal keeps its own encoding.

    A byte that is not UTF-8 becomes an unpaired surrogate, for which the prompt is refused later.

    Raises:
        UsageError: Stdin is closed.
    """
    if sys.stdin is None:
        raise UsageError("stdin is closed, so there is nothing to read", hint="leave out <&-, or take --file")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding=None if sys.stdin.isatty() else "utf-8", errors="surrogateescape", newline=None)
    return sys.stdin


def cached(cache: PromptCache) -> str:
    """Return a message about the use of a prompt cache."""
    tokens = cache.restored or cache.keep
    return cache.note + (f", {tokens:,} tokens in {cache.path}" if tokens else "")


def show(chunk: Chunk, json: bool) -> Chunk:
    """Print a chunk's text, unless JSON is printed at the end."""
    if not json:
        data(chunk.text, end="")
    return chunk
