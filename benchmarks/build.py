"""Time and peak resident memory of `ligerexport build`, verification included.

python benchmarks/build.py CONVERTED -o benchmarks/results/build.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


def build(checkpoint: Path, lowering: str) -> dict[str, object]:
    """Build in a process of its own and return its figures."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "engine"
        command = [
            sys.executable,
            "-m",
            "ligerexport",
            "build",
            str(checkpoint),
            "--lowering",
            lowering,
            "-o",
            str(output),
        ]
        begin = time.perf_counter()
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        assert status == 0, command
        manifest = json.loads((output / "manifest.json").read_text())
    weights, peak = manifest["bytes"]["weights"], usage.ru_maxrss * 1024
    row = {"lowering": lowering, "seconds": seconds, "peak": peak, "weights": weights, "ratio": peak / weights}
    return row | {"verification": manifest["verification"]}


def main() -> None:
    """Measure each lowering."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--lowerings", nargs="*", default=["ort", "portable"])
    args = parser.parse_args()
    versions = {name: version(name) for name in ("torch", "transformers", "onnxruntime", "onnx_ir")}
    result = {
        "command": "python " + " ".join(sys.argv),
        "cores": os.cpu_count(),
        "versions": versions,
        "rows": [build(args.checkpoint, lowering) for lowering in args.lowerings],
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
