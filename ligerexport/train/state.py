"""Save and load the state of a run, to continue it exactly: LoRA, its optimizer, the step, past measurements.

The order of the data, the learning rate and all random numbers are functions of seed and step, so they are not stored.
A state is written completely or not at all, as safetensors and JSON only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ligerexport.console import warn
from ligerexport.errors import CheckpointError
from ligerexport.reading import sha256
from ligerexport.staging import remove_directory, staged_directory

if TYPE_CHECKING:
    from torch import Tensor

MARKER = "state.json"
KEPT = 2
"""Number of states kept on the disk: the newest, and one in case it is damaged."""


@dataclass(frozen=True)
class Resumed:
    """A state read from the disk: tensors by name, optimizer tensors by `NAME.KIND`, rows of the loss curve."""

    step: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    history: list[dict[str, Any]]
    run: dict[str, Any]


def state_directory(output: Path) -> Path:
    """Return the directory that holds the saved states of the run that writes `output`."""
    output = Path(output)
    return output.with_name(f"{output.name}.state")


def save_state(
    directory: Path,
    step: int,
    tensors: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    history: list[dict[str, Any]],
    run: dict[str, Any],
) -> Path:
    """Write the state after `step` steps, and remove all but the newest ones."""
    from safetensors.torch import save_file

    target = directory / f"step-{step:08d}"
    with staged_directory(target, force=True, marker=MARKER) as stage:
        save_file(tensors, stage / "lora.safetensors")
        save_file(optimizer, stage / "optimizer.safetensors")
        hashes = {file.name: sha256(file) for file in sorted(stage.iterdir())}
        content = {"step": step, "run": run, "sha256": hashes, "history": history}
        (stage / MARKER).write_text(json.dumps(content) + "\n", encoding="utf-8")
    for old in _states(directory)[KEPT:]:
        remove_directory(old)
    return target


def load_state(directory: Path, run: dict[str, Any]) -> Resumed | None:
    """Return the newest complete state, or None if there is none.

    Raises:
        CheckpointError: The state belongs to another model, other data or other settings.
    """
    for path in _states(directory):
        try:
            content = json.loads((path / MARKER).read_text(encoding="utf-8"))
            if bad := [name for name, digest in content["sha256"].items() if sha256(path / name) != digest]:
                raise ValueError(f"{bad[0]} was changed")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warn(f"{path} is damaged ({error}); trying the previous one")
            continue
        _check_run(path, content["run"], run)
        from safetensors.torch import load_file

        return Resumed(content["step"], load_file(path / "lora.safetensors"), load_file(path / "optimizer.safetensors"),
                       content["history"], content["run"])  # fmt: skip
    return None


def _states(directory: Path) -> list[Path]:
    return sorted((path for path in directory.glob("step-*") if (path / MARKER).is_file()), reverse=True)


def _check_run(path: Path, found: dict[str, Any], run: dict[str, Any]) -> None:
    """Compare the identities of two runs. The rate may differ, so that a run can continue with a lower one."""
    hint = "use the same model, data and settings, choose another -o, or start again with --resume never"
    if found.get("model") != run["model"]:
        raise CheckpointError(f"{path} is the state of another model", hint=hint)
    for key in [key for key in run if found.get(key) != run[key] and key != "rate"]:
        what = "other data" if key == "data" else f"{key} {found.get(key)}, not {run[key]}"
        raise CheckpointError(f"{path} is the state of a run with {what}", hint=hint)
    if found.get("rate") != run["rate"]:
        warn(f"continuing with rate {run['rate']:g}; the run began with {found.get('rate'):g}")
