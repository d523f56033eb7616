"""Check the files that a command leaves when it is killed, or when disk, memory or permission fails, at any point.

    python tests/trust/faults.py -o benchmarks/results/faults.json [--commands build] [--faults "a full TMPDIR"]

Every try is judged twice. After the fault, the output must be the old one to the byte, the new one complete, or absent.
Then the same command, run again without cleaning up, must give the result of a run without faults and leave no other
files beside it. Tries that the file already has are skipped, so it can be made in pieces. `--short` makes fewer.

It runs itself again with `faults.c` preloaded, which needs a C compiler. `skipped` lists faults that need root.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from faulty import BAD, Bench, Command, Fault

from ligerexport.staging import staged_file

HERE = Path(__file__).parent
COMMANDS = {command.name: command for command in (
    Command("convert", "convert {inputs}/source -o {out} --preset memory --window 8 --slots recent_use=4,novelty=4",
            "--window 6"),
    Command("recover", "recover {inputs}/liger --data {inputs}/chats.jsonl -o {out} --length 32 --batch-tokens 128 "
            "--dtype fp32 --lr 3e-3 --steps 2 --save-every 1", "--seed 1"),
    Command("build", "build {inputs}/liger -o {out} --max-chunk 16", "--max-chunk 8"),
    Command("run", "run {inputs}/onnx " + "abcdefg" * 7 + " -n 2 --prompt-cache {out}", "--chat", force=""),
    Command("eval", "eval {inputs}/liger --text {inputs}/prose.txt --length 48 --windows 2 --parts nll -o {out}",
            "--windows 1"),
    Command("allocate", "allocate {inputs}/liger --data {inputs}/chats.jsonl --text {inputs}/prose.txt -o {out} "
            "--length 48 --windows 1 --trials 1 --distance 40", "--trials 2"),
    Command("bench", "bench {inputs}/onnx --against {inputs}/source --context 24 --blocks 1 --tokens 2 -o {out}",
            "--blocks 2", timed=True, most=1),
)}  # fmt: skip


def make_inputs(place: Path) -> None:
    """Write the commands' inputs: a tiny Transformer, its conversion, an artifact, and texts."""
    sys.path.append(str(HERE.parent))
    import torch
    import toy
    from transformers import LlamaConfig, LlamaForCausalLM

    import ligerexport as lx

    torch.manual_seed(0)
    rng, words = random.Random(0), ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "off"]
    config = LlamaConfig(
        vocab_size=toy.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "source")
    toy.tokenizer().save(str(place / "source" / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": toy.TEMPLATE}
    (place / "source" / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = [{"prompt": rng.choice(words), "response": " ".join(rng.choices(words, k=8))} for _ in range(12)]
    (place / "chats.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (place / "prose.txt").write_text(" ".join(rng.choices(words, k=400)))
    slots = (("recent_use", 4), ("novelty", 4))
    lx.convert(place / "source", place / "liger", preset="memory", window=8, sinks=2, slots=slots)
    lx.build(place / "liger", place / "onnx", max_chunk=16)
    for file in place.rglob("*.safetensors"):  # only the owner may read them
        file.chmod(0o644)


Tries = Iterator[Fault]
Row = dict[str, Any]
_NOBODY = 65534


def killed_at_random(bench: Bench, command: Command, replace: bool, rng: random.Random, count: int) -> Tries:
    """Kill at random moments, half of them in the last quarter of the run, which writes most."""
    seconds = bench.seconds(command, replace)
    for index in range(count):
        yield Fault(after=seconds * rng.uniform(0.75 * (index % 2), 1.05))


def killed_anew(bench: Bench, command: Command, replace: bool, rng: random.Random, count: int) -> Tries:
    """Kill fresh processes, which first import their modules."""
    whole = bench.run(command.arguments(bench.inputs, bench.out, command.force), Fault(fresh=True)).seconds
    for _ in range(count):
        yield Fault(after=whole * rng.uniform(0.5, 1.0), fresh=True)


def at_each_change(code: int, everything: bool = False) -> Callable[..., Tries]:
    """Return the fault that begins at each change of a file in turn; 0 kills."""

    def tries(bench: Bench, command: Command, replace: bool, rng: random.Random, count: int) -> Tries:
        total = bench.count_changes(command, replace)
        chosen = range(1, total + 1) if total <= count else sorted(rng.sample(range(1, total + 1), count))
        for at in chosen:
            yield Fault(inside=lambda at=at: bench.arm(at, code, everything))  # type: ignore[misc]

    return tries


def disk_full(bench: Bench, command: Command, replace: bool, rng: random.Random, count: int) -> Tries:
    """Use disks with more and more room for the output."""
    size = sum(file.stat().st_size for file in bench.work.glob(f"older-{command.name}/**/*")) or 2**18
    for room in _spread(4096, 4 * size, count):
        yield Fault(around=lambda place, room=room: _disk(place, room))  # type: ignore[misc]


def read_only(bench: Bench, command: Command, replace: bool, rng: random.Random, count: int) -> Tries:
    """Mount the file system read-only."""
    yield Fault(around=lambda place: _disk(place, None))


def no_permission(bench: Bench, command: Command, replace: bool, rng: random.Random, count: int) -> Tries:
    """Run as an ordinary user, in a directory that belongs to somebody else, to everybody, or is like /tmp."""
    for mode in (0o755, 0o777, 0o1777):
        yield Fault(inside=_like_any_other, around=lambda place, mode=mode: _mode(place, mode))  # type: ignore[misc]


def tmp_full(bench: Bench, command: Command, replace: bool, rng: random.Random, count: int) -> Tries:
    """Put the temporary directory on a full disk."""
    yield Fault(around=lambda place: _full(Path(tempfile.gettempdir())))


def stdout_full(bench: Bench, command: Command, replace: bool, rng: random.Random, count: int) -> Tries:
    """Send the printed output to a full disk."""
    yield Fault(inside=lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1) and None)


def files_limited(bench: Bench, command: Command, replace: bool, rng: random.Random, count: int) -> Tries:
    """Limit the size of a file."""
    for size in _spread(1, 2**18, count):
        yield Fault(inside=lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))  # type: ignore[misc]


def memory_limited(which: int, column: int) -> Callable[..., Tries]:
    """Return limits above the memory that the process already has, which `column` of /proc/self/statm gives."""

    def limit(more: int) -> None:
        has = int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()
        resource.setrlimit(which, (has + more, has + more))

    def tries(bench: Bench, command: Command, replace: bool, rng: random.Random, count: int) -> Tries:
        for more in _spread(2**21, 2**29, count):
            yield Fault(inside=lambda more=more: limit(more))  # type: ignore[misc]

    return tries


def _spread(low: int, high: int, count: int) -> list[int]:
    return [round(low * (high / low) ** (i / max(1, count - 1))) for i in range(count)]


@contextmanager
def _disk(place: Path, room: int | None) -> Iterator[None]:
    """Put a directory on a small disk with this much room, or read-only; the disk works again at the end."""

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)

    held = [(file.relative_to(place), file.read_bytes()) for file in place.rglob("*") if file.is_file()]
    mount("size=1g")
    for name, content in held:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    used = sum(file.stat().st_blocks * 512 for file in place.rglob("*"))
    mount("remount,ro" if room is None else f"remount,size={used + room}")
    yield
    mount("remount,rw,size=1g")


@contextmanager
def _mode(place: Path, mode: int) -> Iterator[None]:
    """Give a directory and its content to another user during a block."""
    for path in (place, *place.rglob("*")):
        os.chown(path, _NOBODY, _NOBODY)
    place.chmod(mode)
    yield
    for path in (place, *place.rglob("*")):
        os.chown(path, 0, 0)
    place.chmod(0o755)


def _like_any_other() -> None:
    """Drop root's privileges for files of others; it stays root, which can read this Python wherever it is."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP, for programs that it starts
    header, none = (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


@contextmanager
def _full(place: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", place], check=True)
    (place / "all").write_bytes(bytes(4096))
    yield
    subprocess.run(["umount", place], check=True)


@dataclass(frozen=True)
class Kind:
    """A fault: its tries, their number per command in the long and the short form, and whether it needs root."""

    tries: Callable[..., Tries]
    long: int
    short: int
    root: bool = False


KINDS = {
    "killed at a random moment": Kind(killed_at_random, 25, 1),
    "killed at a random moment of a fresh process": Kind(killed_anew, 2, 0),
    "killed at each change of a file": Kind(at_each_change(0), 10**6, 4),
    "disk full from each change of a file on": Kind(at_each_change(errno.ENOSPC), 25, 2),
    "disk failing from each change of a file on": Kind(at_each_change(errno.EIO, True), 25, 2),
    "a small disk fills up": Kind(disk_full, 8, 1, root=True),
    "a read-only disk": Kind(read_only, 1, 1, root=True),
    "no permission": Kind(no_permission, 1, 1, root=True),
    "a full TMPDIR": Kind(tmp_full, 1, 0, root=True),
    "standard output on a full disk": Kind(stdout_full, 1, 1),
    "a limit on the size of files": Kind(files_limited, 8, 1),
    "a limit on address space": Kind(memory_limited(resource.RLIMIT_AS, 0), 8, 0),
    "a limit on data": Kind(memory_limited(resource.RLIMIT_DATA, 5), 8, 1),
}


def inject(
    work: Path, commands: Sequence[str], kinds: Sequence[str], short: bool, known: Sequence[Row]
) -> Iterator[Row]:
    """Try the faults; yield the row of a command, a fault, and the previous output, after each try.

    Args:
        work: An empty directory.
        commands: Names of `COMMANDS`.
        kinds: Names of `KINDS`.
        short: Whether a sample is enough.
        known: Rows from an earlier run.
    """
    (work / "tmp").mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(work / "tmp")
    work.chmod(0o755)
    (work / "inputs").mkdir()
    form = "short" if short else "long"
    bench, rows = Bench(work, work / "inputs"), {_key(row): row for row in known}
    bench.call(lambda: make_inputs(bench.inputs))
    try:
        for name, label, over in product(commands, kinds, ("nothing", "an older output")):
            row = {"command": name, "fault": label, "over": over, "form": form}
            row = rows.get(_key(row), row | {"tries": None, "injected": 0})
            command, kind = COMMANDS[name], KINDS[label]
            count = min(command.most, kind.short if short else kind.long)
            if not count or row["injected"] == row["tries"]:
                continue
            bench.prepare(command)
            tries = list(kind.tries(bench, command, over != "nothing", random.Random(str(_key(row)[:3])), count))
            for fault in tries[row["injected"] :]:
                found = bench.attempt(command, fault, over != "nothing")
                row |= {"tries": len(tries)} | {key: row.get(key, 0) + value for key, value in found.items()}
                yield row
    finally:
        bench.clear()  # it may be a separate disk


def _key(row: Row) -> tuple[str, str, str, str]:
    return row["command"], row["fault"], row["over"], row["form"]


def add(output: Path, new: Row, root: bool) -> dict[str, Any]:
    """Write a file with one more row; return its content."""
    rows = [*(row for row in read(output) if _key(row) != _key(new)), new]
    rows.sort(key=lambda row: (list(COMMANDS).index(row["command"]), list(KINDS).index(row["fault"]), row["over"]))
    total = Counter[str]()
    for row in rows:
        total += Counter({key: value for key, value in row.items() if isinstance(value, int)})
    result = {
        "command": "python tests/trust/faults.py -o benchmarks/results/faults.json",  # may be run in pieces
        "machine": {"cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime", "safetensors")},
        "skipped": {} if root else {name: "mounting needs root" for name, kind in KINDS.items() if kind.root},
        "wrong": {key: total[key] for key in BAD},
        "total": total,
        "rows": rows,
    }
    total.pop("tries", None)
    with staged_file(output) as file:
        file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def read(output: Path) -> list[Row]:
    """Return the rows of a file, if it exists."""
    return json.loads(output.read_text())["rows"] if output.exists() else []


def main() -> None:
    """Try faults, and add the results to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--commands", type=lambda text: text.split(","), default=list(COMMANDS))
    parser.add_argument("--faults", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    result: dict[str, Any] = {"total": {}, "wrong": {}}
    with tempfile.TemporaryDirectory() as place:
        if "LD_PRELOAD" not in os.environ:
            shim = Path(place, "faults.so")
            subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", shim, HERE / "faults.c"], check=True)
            environment = os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                                        "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
        root = _can_mount(Path(place))
        kinds = [name for name in args.faults if root or not KINDS[name].root]
        for row in inject(Path(place), args.commands, kinds, args.short, read(args.output)):
            result = add(args.output, row, root)
    print(json.dumps(result["total"]))
    sys.exit(any(result["wrong"].values()))


def _can_mount(place: Path) -> bool:
    (point := place / "mount").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", point], capture_output=True).returncode:
        return False
    subprocess.run(["umount", point], check=True)
    return True


if __name__ == "__main__":
    main()
