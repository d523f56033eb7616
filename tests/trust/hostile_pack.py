"""Hostile kernel packs: their mutation, and the plugin's reader in C++, built with sanitizers, that opens them.

The reader runs every plan that it accepts on a stub CUDA driver; it is the program of the plugin's tests.
"""

from __future__ import annotations

import random
import resource
import struct
import subprocess
import zlib
from pathlib import Path

from hostile_mutate import NUMBERS, damage
from hostile_worker import SECONDS, Outcome
from trt_harness import ENVIRONMENT, PACK, READER


def mutate_pack(data: bytes, rng: random.Random) -> bytes:
    """Change numbers or bytes of kernels and plans, or any bytes; usually with a matching checksum."""
    body = data[:-4]
    if rng.random() < 0.1:
        return damage(data, rng)
    code = body.index(b"\x7fELF")  # after kernels and plans
    head = bytearray(body[:code])
    if rng.random() < 0.2:
        head = bytearray(damage(bytes(head), rng))
    else:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            width = rng.choice((1, 1, 4, 8))
            at = rng.randrange(8, len(head) - width)
            number = int.from_bytes(head[at : at + width], "little")
            number = rng.choice((number + 1, number - 1, number << 1, number ^ 1, rng.choice(NUMBERS)))
            head[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
    body = bytes(head) + body[code:]
    if rng.random() < 0.05:
        body = body[: rng.randrange(len(body))]
    return body + struct.pack("<I", zlib.crc32(body))


def read_pack(place: Path) -> Outcome:
    """Let the reader open a pack; growth is its total memory, sanitizers included."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    command = [place / "pack" / READER, "check", place / "pack" / PACK]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, env=ENVIRONMENT, preexec_fn=limit)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said, told = done.stdout.decode("latin-1").removesuffix("\n"), done.stderr.decode("latin-1").splitlines()
    if done.returncode:
        why = next((line for line in told if line.startswith("SUMMARY") or ": runtime error" in line), said)
        return Outcome("finding", f"exit code {done.returncode}: {why}", seconds, 0)
    peak = next(int(line.split()[1]) << 10 for line in told if line.startswith("VmHWM"))
    if said == "ok":
        return Outcome("valid", "", seconds, peak)
    one_line = said.startswith("error ") and said.isascii() and said.isprintable() and len(said) < 2000
    what = ("refused", said) if one_line else ("finding", f"not one line: {said[:300]!r}")
    return Outcome(*what, seconds, peak)
