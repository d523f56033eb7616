"""Run every fused kernel once on small inputs, for NVIDIA's compute-sanitizer.

compute-sanitizer --tool memcheck python tests/trust/sanitize.py
compute-sanitizer --tool racecheck python tests/trust/sanitize.py calls

Arguments can name parts: most of the time goes into compiling, which one process does alone.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product

import torch

from ligerexport.kernels.fused.linear import linear
from ligerexport.kernels.fused.prefill import prefill
from ligerexport.kernels.library.linear_attention import linear_attention
from ligerexport.kernels.library.mixer_step import mixer_step
from ligerexport.kernels.linear import LinearSpec
from ligerexport.kernels.ops import BLOCK, liger_mixer, rotary_table
from ligerexport.model.config import PRESETS
from ligerexport.model.state import MixerSpec

DEVICE = "cuda"


def recurrence(dtype: torch.dtype) -> None:
    """Run given and computed decay, groups, packed sequences, strong channels, forward and backward."""
    for gate, strong, bounds in ((None, True, None), ("gla", False, (0, 1, 1, 130, 200)), ("hgrn2", True, None)):
        q, k, v = (torch.randn(1, 200, heads, d, device=DEVICE) for heads, d in ((4, 64), (2, 64), (2, 48)))
        k[..., 3] -= 100.0 * strong
        g = None if gate else (torch.nn.functional.logsigmoid(torch.randn_like(k)) - 20.0 * (k < -50)).requires_grad_()
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        cut = None if bounds is None else torch.tensor(bounds, device=DEVICE)
        state = torch.randn(1 if cut is None else 4, 2, 64, 48, device=DEVICE, requires_grad=True)
        output, final = linear_attention(*leaves, g, gate=gate, initial_state=state, cu_seqlens=cut)
        (output.float().square().sum() + final.square().sum()).backward()


def mixer(dtype: torch.dtype) -> None:
    """Run a prompt with padding, its gradient, and steps, for every preset."""
    configs = [preset.config for preset in PRESETS.values()]
    for config in [*configs, replace(PRESETS["memory"].config, recurrence_weight=0.1)]:
        spec = MixerSpec(config, 8, 2, 64, 64, 0.125, 300)
        rotary = rotary_table(10.0 ** (-torch.arange(32, device=DEVICE) / 32), 300, BLOCK)
        shapes = ((8, 64), (2, 64), (2, 64))
        q, k, v = (torch.randn(2, 400, *s, device=DEVICE, dtype=dtype).requires_grad_() for s in shapes)
        position = torch.tensor([0, -7], device=DEVICE)
        score = torch.randn(2, 400, 2, device=DEVICE) if config.foresees else None
        output, state = liger_mixer(q, k, v, position, spec.initial_state(2, dtype, DEVICE), spec, rotary, score)
        output.float().square().sum().backward()
        if config.evicts:  # its step is the call above for one token
            continue
        with torch.no_grad():
            for t in range(3):
                now = None if score is None else score[:, t]
                mixer_step(q[:, t], k[:, t], v[:, t], position + 400 + t, state, spec, rotary, score=now)


def calls(dtype: torch.dtype) -> None:
    """Run the launches of an engine's prompt: the mixer of every preset, twice, and products of 1 to 300 rows."""
    for preset in PRESETS.values():
        spec = MixerSpec(preset.config, 8, 2, 64, 64, 0.125, 300)
        rotary = rotary_table(10.0 ** (-torch.arange(32, device=DEVICE) / 32), 300, BLOCK)
        state = {k: x.int() if x.dtype == torch.int64 else x for k, x in spec.initial_state(2, dtype, DEVICE).items()}
        position = torch.tensor([0, -7], device=DEVICE, dtype=torch.int32)
        for start in (0, 150):
            q, k, v = (torch.randn(2, 150, heads, 64, device=DEVICE, dtype=dtype) for heads in (8, 2, 2))
            score = torch.randn(2, 150, 2, device=DEVICE) if spec.config.foresees else None
            _, state = prefill(q, k, v, score, position + start, state, spec, rotary)
    for rows, activation in product((1, 16, 300), (None, "silu")):
        linear_spec = LinearSpec(200, 192, 1e-5, activation, bias=True, residual=True, side=3)
        height = 200 if activation is None else 400
        shapes = ((rows, 192), (height, 192), (192,), (height,), (rows, 200), (3, 192), (3,), (rows, 3))
        x, weight, norm, bias, residual, *side = (torch.randn(*shape, device=DEVICE) for shape in shapes)
        out = torch.empty(rows, 200, device=DEVICE, dtype=dtype)
        linear(x, weight.to(dtype), norm, bias, residual, linear_spec, out=out, side=(side[0], side[1], side[2]))
        codes, scale = torch.randint(256, weight.shape, dtype=torch.uint8, device=DEVICE), weight[:, 0].contiguous()
        linear(x, codes, norm, bias, residual, replace(linear_spec, coded=True), out=out.half(), scale=scale,
               side=(side[0], side[1], side[2]))  # fmt: skip
    ids = torch.tensor([[3], [199], [-1]], dtype=torch.int32, device=DEVICE)
    looked_up = LinearSpec(192, 200, wide=True, coded=True, indexed=True)
    linear(ids, codes[:200], None, None, None, looked_up, out=torch.empty(3, 192, device=DEVICE), scale=scale[:200])


def main() -> None:
    """Run the named parts, or all, in both widths of activations."""
    parts = {part.__name__: part for part in (recurrence, mixer, calls)}
    for name in sys.argv[1:] or parts:
        for dtype in (torch.float32, torch.bfloat16):
            parts[name](dtype)
    torch.cuda.synchronize()
    print("ran")


if __name__ == "__main__":
    main()
