"""One token of a layer in the fused kernel against a peer's kernels: a section of `fused.py`, with shared helpers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from ligerexport.kernels.fused.mixer_step import mixer_step
from ligerexport.kernels.ops import BLOCK, liger_mixer, rotary_table
from ligerexport.model.config import PRESETS, LigerConfig
from ligerexport.model.state import MixerSpec, MixerState

LIMIT = 5e-3
DEVICE, DTYPE = "cuda", torch.bfloat16
MEMORY_MIX = replace(PRESETS["memory"].config, attention_weight=0.9, recurrence_weight=0.1)


def bench(call: Callable[[], Any], grad: list[Tensor] | None = None) -> dict[str, float]:
    """Return milliseconds: median, 20th and 80th percentile; the L2 cache is cleared between runs."""
    median, low, high = triton.testing.do_bench(call, warmup=50, rep=200, quantiles=[0.5, 0.2, 0.8], grad_to_none=grad)
    return {"ms": median, "low": low, "high": high}


def peak(call: Callable[[], Any]) -> int:
    """Return the most bytes allocated during a call beyond those allocated before it."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative root mean square error."""
    return ((found.double() - expected).norm() / expected.norm()).item() if found.isfinite().all() else math.inf


def gate(name: str, pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the errors, or stop: wrong results are not timed."""
    errors = {key: error(*pair) for key, pair in pairs.items()}
    if not all(value < LIMIT for value in errors.values()):
        raise SystemExit(f"{name} is wrong: {errors}")
    return errors


def inputs(batch: int, length: int, heads: int, kv: int, d: int, raw: bool) -> list[Tensor]:
    """Return query, key, value and, unless raw, decay."""
    torch.manual_seed(0)
    made = [torch.randn(batch, length, h, d, device=DEVICE, dtype=DTYPE) for h in (heads, kv, kv)]
    return made if raw else [*made, logsigmoid(torch.randn(batch, length, kv, d, device=DEVICE)).clamp_min(-5)]


def layer(config: LigerConfig, q_heads: int = 32, kv_heads: int = 8, d: int = 128) -> MixerSpec:
    """Return a layer of the shape of Llama-3-8B."""
    return MixerSpec(config, q_heads, kv_heads, d, d, d**-0.5, 8192)


def rotary(spec: MixerSpec) -> Tensor:
    """Return the rotary table of Llama 3."""
    pairs = torch.arange(spec.d_k // 2, device=DEVICE) / (spec.d_k // 2)
    return rotary_table(5e5**-pairs, spec.max_distance, BLOCK, turns=True)


def filled(spec: MixerSpec, batch: int, seen: int) -> MixerState:
    """Return the state of sequences that have seen `seen` tokens, with random contents."""
    state, positions = spec.initial_state(batch, DTYPE, DEVICE), []
    for config in (head.config for head in spec.heads):
        kept = sum(count for _, count in config.slots)
        scored = torch.randperm(seen - config.window - config.sinks)[:kept] + config.sinks
        positions += [torch.arange(config.sinks), scored, torch.arange(seen - config.window, seen)]
    state["slot_position"][:] = torch.cat(positions).view(state["slot_position"].shape[1:]).to(DEVICE)
    for name, x in state.items():
        if name in ("slot_score", "judge_state"):
            x.uniform_()
        elif name.endswith("_scale"):
            x.uniform_(0.01, 0.03)
        elif x.dtype == torch.int8:
            x.random_(-127, 128)
        elif name != "slot_position":
            x.normal_()
    return state


def composition(spec: MixerSpec, batch: int, seen: int) -> Callable[..., Tensor]:
    """Return a step of the preset `liger` made of a peer's kernels: recurrence, ring, rotary, SDPA, mix."""
    from fla.ops.gla import fused_recurrent_gla

    group = spec.q_heads // spec.kv_heads
    angle = 5e5 ** -(torch.arange(spec.d_k // 2, device=DEVICE) / (spec.d_k // 2)) * seen
    cos, sin = (torch.cat([x, x]).to(DTYPE) for x in (angle.cos(), angle.sin()))

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def step(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, recurrent: Tensor) -> Tensor:
        rk, rv = (x.repeat_interleave(group, 1)[:, None] for x in (k, v))
        g = logsigmoid(rk.float()) / 16
        out, new = fused_recurrent_gla(
            q[:, None].softmax(-1),
            rk.softmax(-1),
            rv,
            gk=g,
            scale=1.0,
            initial_state=recurrent,
            output_final_state=True,
        )
        recurrent.copy_(new)
        slot = seen % spec.config.window
        ring_k[:, :, slot] = turn(k)
        ring_v[:, :, slot] = v
        local = scaled_dot_product_attention(turn(q)[:, :, None], ring_k, ring_v, enable_gqa=True)
        return 0.5 * local[:, :, 0] + 0.5 * out[:, 0]

    return step


def replayed(call: Callable[[int], Any], launches: int) -> dict[str, float]:
    """Return microseconds per call of a CUDA graph with `launches` calls: median and spread of 20 replays."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(i)
    times = []
    for _ in range(23):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / launches)
    times = sorted(times[3:])
    return {"us": times[10], "low": times[2], "high": times[17]}


def check_step(config: LigerConfig) -> dict[str, float]:
    """Compare one step from a random full state with plain torch in fp64."""
    spec, batch = layer(config), 2
    table, state = rotary(spec), filled(layer(config), 2, 5000)
    # plain torch takes slots in the order of their positions
    order = state["slot_position"].argsort(-1)
    for name in ("slot_key", "slot_value"):
        state[name] = state[name].gather(2, order[..., None].expand_as(state[name]))
    if "slot_score" in state:
        state["slot_score"] = state["slot_score"].gather(3, order[:, :, None].expand_as(state["slot_score"]))
    state["slot_position"] = state["slot_position"].gather(2, order)
    q, k, v = (x[:, 0] for x in inputs(batch, 1, 32, 8, 128, raw=True))
    position = torch.full((batch,), 5000, device=DEVICE)
    exact = {name: (x.double() if x.is_floating_point() else x).cpu() for name, x in state.items()}
    wanted, after = liger_mixer(
        *(x[:, None].double().cpu() for x in (q, k, v)), position.cpu(), exact, spec, table.double().cpu()
    )
    found = mixer_step((q, k, v), position, state, spec, table)
    pairs = {"output": (found, wanted[:, 0].to(DEVICE))}
    for name in ("recurrent_state", "judge_state"):
        if name in state:
            pairs[name] = state[name], after[name].to(DEVICE)
    assert torch.equal(state["slot_position"].sort(-1).values, after["slot_position"].to(DEVICE))
    return gate("mixer_step", pairs)


def step() -> list[dict[str, Any]]:
    """Time one token of one layer under a CUDA graph; pools alternate so that the cache does not hold them."""
    rows = []
    configs = {
        "liger": PRESETS["liger"].config, "sinks": PRESETS["sinks"].config, "memory": PRESETS["memory"].config,
        "memory and recurrence": MEMORY_MIX,
    }  # fmt: skip
    for name, config in configs.items():
        spec, errors = layer(config), check_step(config)
        one = sum(t.nbytes(2) for t in spec.state())
        written = sum(t.nbytes(2) for t in spec.state() if t.name in ("recurrent_state", "judge_state", "slot_score"))
        for batch in (1, 16, 64, 256):
            pools = [filled(spec, batch, 5000) for _ in range(max(1, min(64, round(160e6 / (batch * one)))))]
            q, k, v = (x[:, 0] for x in inputs(batch, 1, 32, 8, 128, raw=True))
            table, position = rotary(spec), torch.full((batch,), 5000, device=DEVICE)
            out = torch.empty_like(q)
            launches = max(len(pools), 8)

            def call(i: int, pools: Any = pools, rest: Any = (q, k, v, position, spec, table, out)) -> None:
                q, k, v, position, spec, table, out = rest
                mixer_step((q, k, v), position, pools[i % len(pools)], spec, table, out=out)

            row: dict[str, Any] = {"preset": name, "batch": batch, "slots": config.num_slots, "errors": errors}
            row |= {"bytes": batch * (one + written), "ours": replayed(call, launches)}
            if name == "liger":
                made = composition(spec, batch, 5000)
                count = max(1, min(16, round(160e6 / (batch * one * 4))))
                states = [
                    [torch.randn(batch, 8, 64, 128, device=DEVICE, dtype=DTYPE) for _ in range(2)]
                    + [torch.randn(batch, 32, 128, 128, device=DEVICE)]
                    for _ in range(count)
                ]

                def combined(i: int, made: Any = made, states: Any = states, rest: Any = (q, k, v)) -> None:
                    made(*rest, *states[i % len(states)])

                row["composition"] = replayed(combined, max(count, 4))
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows
