"""Write what `test_upgrade.py` reads: a checkpoint, its artifact, a state and tokens, by the code of any version.

git worktree add /tmp/old f1cab0e
PYTHONPATH=/tmp/old:/tmp/old/tests python tests/data/make.py tests/data/2026-11-22.zip ort fp32
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from checkpoints import make_checkpoint

from ligerexport.exporters.build import build
from ligerexport.model.config import LigerConfig
from ligerexport.run.runtime import load

SIZES = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
MEMORY = LigerConfig(window=6, sinks=2, slots=(("recent_use", 3), ("novelty", 3)))
PROMPT = np.random.default_rng(0).integers(0, 48, 60)
STEPS = 24


def main() -> None:
    """Write the file."""
    output, lowering, weights = Path(sys.argv[1]), *sys.argv[2:]
    precision = {"weights": weights} if "weights" in inspect.signature(build).parameters else {}
    with tempfile.TemporaryDirectory() as place:
        model = make_checkpoint(Path(place, "liger"), MEMORY, **SIZES)
        session = load(build(model, Path(place, "engine"), max_chunk=16, lowering=lowering, **precision))
        logits = session.prefill(PROMPT)
        snapshot = session.snapshot()
        if hasattr(snapshot, "ids"):  # then it is a prompt cache too
            snapshot = replace(snapshot, ids=PROMPT)
        snapshot.save(Path(place, "state.safetensors"))
        tokens = []
        for _ in range(STEPS):
            tokens.append(int(logits.argmax()))
            logits = session.step(tokens[-1])
        recorded = {
            "prompt": PROMPT.tolist(),
            "tokens": tokens,
            "lowering": lowering,
            "weights": weights,
            "written": output.stem[:10],
        }
        Path(place, "recorded.json").write_text(json.dumps(recorded))
        shutil.make_archive(str(output.with_suffix("")), "zip", place)


if __name__ == "__main__":
    main()
