"""Memory of one process that runs an artifact, and whether it also runs where less is all that there is.

    cmake --preset here -S examples/cpp -DORT_HOME=DIRECTORY && cmake --build examples/cpp/build/here
    python benchmarks/device_memory.py ARTIFACT --program examples/cpp/build/here/liger-run -o OUTPUT

`peak` is the largest resident memory, as the system counts it. `private` is what no file backs: heap, stack and state.
The rest are pages of files, the weights above all, which the system may drop at any time and read again. `libraries`
is the peak of a Python process that only imports ONNX Runtime and the tokenizer, and `stages` has what each stage of
`ligerexport run` adds to the resident memory of such a process. A limit is that of a cgroup made for
one process. It counts the pages of the weights too, whose file is dropped from the system's cache before, but not pages
of libraries that another process had read. Needs Linux with the memory controller of cgroups (version 1), and root.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROMPT = "Once upon a time"
LIBRARIES = "import time, onnxruntime, tokenizers; time.sleep(1)"
STAGES = {
    "libraries": "import onnxruntime, tokenizers",
    "modules": "import ligerexport as lx, ligerexport.cli.app, ligerexport.cli.run; lx.generate",
    "session": "session = lx.load(sys.argv[1], hashes=False)",
    "tokenizer": "from ligerexport.run.generate import text_model; text_model(pathlib.Path(sys.argv[1]))",
    "first token": "list(lx.generate(session, sys.argv[2], max_new_tokens=1))",
}
GROUP = Path("/sys/fs/cgroup/memory/ligerexport")
LIMITS = "256,192,160,128,96"
MB = 1 << 20


def resident(pid: int) -> tuple[int, int]:
    """Return resident and private bytes of a process; zeros once it has ended."""
    try:
        rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    except (OSError, ValueError):
        return 0, 0
    return tuple(int(rows[name].split()[0]) << 10 for name in ("Rss", "Anonymous"))  # type: ignore[return-value]


def run(command: list[str], limit: int | None = None) -> dict[str, Any]:
    """Run a command to its end, in a group of its own if there is a limit in MB."""
    if limit is not None:
        GROUP.mkdir()
        (GROUP / "memory.limit_in_bytes").write_text(str(limit * MB))
        command = ["sh", "-c", f'echo $$ > {GROUP}/cgroup.procs && exec "$@"', "sh", *command]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        samples = [(0, 0)]
        while process.poll() is None:
            samples.append(resident(process.pid))
        output.seek(0)
        found: dict[str, Any] = {"text": output.read().decode(errors="replace"), "exit": process.returncode}
    if limit is not None:
        GROUP.rmdir()
        return found
    peak, private = max(samples)  # private bytes at the moment of the peak
    return found | {"peak": peak, "private": private}


def stages(artifact: str) -> dict[str, int]:
    """Return the bytes of resident memory that each of `STAGES` adds."""
    say = "\nprint(pathlib.Path('/proc/self/smaps_rollup').read_text().split('Rss:')[1].split()[0])\n"
    code = "import pathlib, sys\n" + say + say.join(STAGES.values()) + say
    command = [sys.executable, "-c", code, artifact, PROMPT]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    sizes = [int(line) << 10 for line in done.stdout.splitlines()]
    return {name: after - before for name, before, after in zip(STAGES, sizes, sizes[1:], strict=False)}


def main() -> None:
    """Measure both programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--program", help="examples/cpp's program with the operator in it")
    parser.add_argument("--limits", default=LIMITS, help="in MB, the largest first")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    manifest = json.loads((args.artifact / "manifest.json").read_text())
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/device_memory.py", *sys.argv[1:]]),
        "artifact": {name: manifest[name] for name in ("lowering", "precision")},
        "onnxruntime": version("onnxruntime"),
        "weights": manifest["bytes"]["weights"],
        "state": manifest["bytes"]["state_per_sequence"],
        "libraries": run([sys.executable, "-c", LIBRARIES])["peak"],
        "stages": stages(str(args.artifact)),
        "programs": {},
    }
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "artifact")  # whose pages no other process uses
        shutil.copytree(args.artifact, copy)
        data = os.open(copy / "model.onnx.data", os.O_RDONLY)
        os.fsync(data)
        words = {"python": [sys.executable, "-m", "ligerexport", "run", str(copy), PROMPT, "-q", "--no-hash", "-n"]}
        if args.program:
            words["cpp"] = [args.program, str(copy), PROMPT, "--threads", "1", "--tokens"]
        for name, command in words.items():
            command = [*command, str(args.tokens)]
            free = run(command)
            row = {part: free[part] for part in ("peak", "private")} | {"limits": {}}
            for limit in map(int, args.limits.split(",")):
                os.posix_fadvise(data, 0, 0, os.POSIX_FADV_DONTNEED)
                done = run(command, limit)
                row["limits"][f"{limit} MB"] = "the same text" if done["text"] == free["text"] else "killed"
                if done["exit"]:
                    break
            result["programs"][name] = row
            print(name, row, flush=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
