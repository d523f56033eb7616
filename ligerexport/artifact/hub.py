"""The hub: fetch the files of a repository, and fetch or publish an artifact.

huggingface_hub does all transfers. `HF_ENDPOINT` names another server with the same interface, and `HF_TOKEN` or
`hf auth login` says who asks.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ligerexport.artifact.artifact import MANIFEST, Manifest, open_artifact
from ligerexport.artifact.card import model_card
from ligerexport.console import ProgressFactory, err, silent
from ligerexport.errors import ArtifactError, SourceError, UsageError, first_line, quoted
from ligerexport.reading import read_json
from ligerexport.staging import staged_directory
from ligerexport.versions import require

_CARD = "README.md"
_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form `owner/name` or `owner/name@revision`."""
    return _ID.fullmatch(name) is not None


def snapshot(
    name: str, patterns: Sequence[str], progress: ProgressFactory, *, here: str = "", hint: str = "check the network"
) -> Path:
    """Fetch files of a repository into the hub's cache, unless they are there, and return their directory.

    Args:
        name: `owner/name`, or `owner/name@revision`.
        patterns: Globs of the files' names.
        progress: With `silent`, and where nobody would see them, the hub's own progress bars are off.
        here: What was looked for on this disk before, to begin errors with.
        hint: What to do if the hub cannot be reached.

    Raises:
        SourceError: The repository or revision does not exist or may not be read, or the transfer failed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    repository, _, revision = name.partition("@")
    shown = progress is not silent and err.is_terminal and not err.quiet
    hide_bars = not shown and not are_progress_bars_disabled()
    with _explained(repository, revision, here, hint):
        try:
            if hide_bars:
                disable_progress_bars()
            return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
        finally:
            if hide_bars:
                enable_progress_bars()


@contextmanager
def _explained(repository: str, revision: str = "", here: str = "", hint: str = "check the network") -> Iterator[None]:
    """Turn errors of the hub's client into a `SourceError`."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise SourceError(
            f"{repository} asks for its terms to be accepted", hint="accept them on its page, then: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"{here}there is no repository {repository} on the hub",
            hint="check the spelling; a private model needs: hf auth login",
        ) from None
    except RevisionNotFoundError:
        raise SourceError(
            f"{repository} has no revision '{revision}'", hint="leave '@...' out for the newest"
        ) from None
    except HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        who = "log in as somebody who may do this: hf auth login" if code in (401, 403) else "try again later"
        raise SourceError(f"the hub refused {repository} ({first_line(error)})", hint=who) from None
    except Exception as error:  # offline, no route, cut off
        if not (isinstance(error, OSError | ValueError) or type(error).__module__.startswith("httpx")):
            raise
        if "onsistency" in str(error) or "ncomplete" in type(error).__name__:
            raise SourceError(
                f"a file of {repository} did not arrive whole ({first_line(error)})", hint="run the same command again"
            ) from None
        raise SourceError(f"{here}the hub could not be reached ({first_line(error)})", hint=hint) from None


def pull(
    name: str, output: str | Path | None = None, *, force: bool = False, progress: ProgressFactory | None = None
) -> Path:
    """Fetch an artifact from the hub. Only the files that its manifest names are fetched, and all are checked.

    Args:
        name: `owner/name`, or `owner/name@revision`.
        output: Directory to write; None takes the name of the repository.
        force: Whether an older artifact there may be replaced.
        progress: Reports the transfer; silent by default.

    Returns:
        The directory.

    Raises:
        UsageError: The name is no hub id, or `output` is in use.
        SourceError: The repository does not exist, may not be read, or could not be fetched.
        ArtifactError: It holds no artifact, or a file is damaged.
        MissingDependency: huggingface_hub is not installed.
    """
    repository = _repository(name)
    output = Path(output or repository.partition("/")[2])
    progress = progress or silent
    with staged_directory(output, force=force, marker=MANIFEST) as stage:
        place = snapshot(name, [MANIFEST], progress)
        if not (place / MANIFEST).is_file():
            raise ArtifactError(
                f"{repository} holds no artifact: there is no {MANIFEST}",
                hint=f"if it holds a model: ligerexport convert {quoted(name)} -o liger",
            )
        manifest = Manifest.from_dict(read_json(place / MANIFEST, ArtifactError, "ask for it to be built again"))
        # the commit that the manifest came from, in case a newer one was published in between
        names = [MANIFEST, *(glob.escape(file) for file in manifest.files)]
        place = snapshot(f"{repository}@{place.name}", names, progress)
        for file in (MANIFEST, *manifest.files):
            _copy(place / file, stage / file, stage)
        open_artifact(stage, runtime=False)
    return output


def _copy(source: Path, target: Path, stage: Path) -> None:
    """Copy a file of the hub's cache, as a hard link if the file system has them."""
    if not target.resolve().is_relative_to(stage.resolve()):
        raise ArtifactError(f"{MANIFEST} names '{target.name}' outside the artifact", hint="do not use this artifact")
    if not source.is_file():
        raise ArtifactError(f"{source.name} is missing from the repository", hint="ask for it to be published again")
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        os.link(source.resolve(), target)
        return
    shutil.copyfile(source, target)


def push(artifact: str | Path, name: str, *, private: bool = False, progress: ProgressFactory | None = None) -> str:
    """Publish an artifact with a model card made from its manifest, as one commit that replaces what was there.

    Args:
        artifact: Directory that `build` wrote.
        name: `owner/name`; the repository is made if there is none.
        private: Whether a new repository can be read by its owner only.
        progress: Reports the transfer; silent by default.

    Returns:
        Address of the commit.

    Raises:
        ArtifactError: The artifact is incomplete or damaged.
        UsageError: The name is no hub id, or has a revision.
        SourceError: The hub refused the files, or could not be reached.
        MissingDependency: huggingface_hub is not installed.
    """
    repository = _repository(name)
    if repository != name:
        raise UsageError(f"'{name}' has a revision", hint=f"publish to the newest: {repository}")
    opened = open_artifact(artifact, runtime=False)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files = {file: opened.directory / file for file in (MANIFEST, *opened.manifest.files)}
    total = sum(file.stat().st_size for file in files.values())
    api = HfApi(library_name="ligerexport")
    added = [CommitOperationAdd(file, str(place)) for file, place in files.items()]
    added.append(CommitOperationAdd(_CARD, model_card(opened.manifest, repository).encode()))
    with (progress or silent)(f"publishing {repository}", total) as advance, _explained(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        old = set(api.list_repo_files(repository)) - {*files, _CARD, ".gitattributes"}
        commit = api.create_commit(
            repository,
            [*added, *(CommitOperationDelete(file) for file in sorted(old))],
            commit_message=f"Publish what ligerexport {opened.manifest.ligerexport} built",
        )
        advance(total)
    return str(commit.commit_url)


def _repository(name: str) -> str:
    require("hub")
    if not is_hub_id(name):
        raise UsageError(f"'{name}' is not the name of a repository", hint="write owner/name")
    return name.partition("@")[0]
