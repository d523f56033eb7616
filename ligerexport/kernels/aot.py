"""The fused kernels as cubins, compiled without a GPU, with a manifest that describes how to launch them.

The launches come from the eager host code (`ligerexport.kernels.plans`), so that no argument is repeated here. The
command is `python -m ligerexport.kernels.aot memory:9:3:64 -o DIR`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from packaging.version import Version

from ligerexport.console import data, print_error, say
from ligerexport.errors import LigerError, MissingDependency, UsageError, look_up
from ligerexport.kernels.launch_manifest import ALIGNMENT, MANIFEST, Cubin, Kernel, Manifest, Plan
from ligerexport.kernels.linear import LinearSpec
from ligerexport.kernels.plans import make_plans
from ligerexport.kernels.tuning import FORWARD, SHARED_MEMORY
from ligerexport.model.config import get_preset
from ligerexport.model.state import MixerSpec
from ligerexport.staging import check_destination, staged_directory
from ligerexport.versions import warn_if_untried

DEFAULT_OPERATORS = ("step", "linear_attention")


@dataclass(frozen=True)
class _Job:
    """The data that a process needs to compile one kernel for one compute capability."""

    kernel: Kernel
    constants: dict[str, Any]
    sm: int


@dataclass(frozen=True)
class _Compiled:
    """The result of a job: the file and its description, or the reason why there is none."""

    content: bytes = b""
    cubin: Cubin | None = None
    failure: str = ""
    ptx: bytes = b""


def compile_kernels(
    specs: Sequence[MixerSpec],
    dtype: str,
    sms: Sequence[int],
    directory: Path | str,
    *,
    operators: Sequence[str] = DEFAULT_OPERATORS,
    products: Sequence[tuple[LinearSpec, str]] = (),
    max_batch: int = 64,
    ptx: bool = False,
    jobs: int | None = None,
    force: bool = False,
) -> Manifest:
    """Compile the kernels that layers launch, and write cubins and `kernels.json`. Equal arguments give equal bytes.

    Args:
        specs: The layers; equal kernels are compiled once.
        dtype: Type of activations: `bf16`, `fp16` or `fp32`.
        sms: Compute capabilities, 90 for 9.0, from `SHARED_MEMORY`.
        directory: Destination, written whole or not at all.
        operators: Rows of `OPERATORS`; linear attention is left out for layers without a gated recurrence.
        products: Products with weights, each with the dtype of its weight.
        max_batch: Largest batch of a step.
        ptx: Whether to write PTX too, for `FORWARD` if it is among `sms`.
        jobs: Number of processes; None takes one per core.
        force: Whether an older output may be replaced.

    Raises:
        MissingDependency: Triton is not installed.
        UsageError: A compute capability, operator or dtype is unknown, or the directory must not be replaced.
        LigerError: A kernel does not compile or needs more shared memory than the GPU has.
    """
    for sm in sms:
        look_up("compute capability", str(sm), {str(known): known for known in SHARED_MEMORY})
    check_destination(directory, force=force, marker=MANIFEST)
    if not find_spec("triton"):
        raise MissingDependency("Triton", extra="gpu")
    import triton

    if triton.knobs.runtime.interpret:
        raise UsageError("Triton's interpreter compiles nothing", hint="unset TRITON_INTERPRET")
    warn_if_untried("triton")
    plans, kernels, work = _plan(specs, dtype, sms, operators, max_batch, products)
    processes = min(jobs or os.cpu_count() or 1, len(work))
    if processes > 1:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(_compile, work.values()))
    else:
        results = [_compile(job) for job in work.values()]
    failures = [result.failure for result in results if result.failure]
    if failures:
        raise LigerError("; ".join(failures), hint="rows of KERNELS by compute capability are in kernels/tuning.py")

    for (key, sm), result in zip(work, results, strict=True):
        assert result.cubin is not None
        text = f"{key}.sm_{sm}.ptx" if ptx and sm == FORWARD else ""
        kernels[key].cubins[str(sm)] = replace(result.cubin, file=f"{key}.sm_{sm}.cubin", ptx=text)
    manifest = Manifest(triton.__version__, dict(sorted(kernels.items())), tuple(plans))
    with staged_directory(directory, force=force, marker=MANIFEST) as staging:
        for (key, sm), result in zip(work, results, strict=True):
            cubin = kernels[key].cubins[str(sm)]
            (staging / cubin.file).write_bytes(result.content)
            if cubin.ptx:
                (staging / cubin.ptx).write_bytes(result.ptx)
        (staging / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _plan(
    specs: Sequence[MixerSpec],
    dtype: str,
    sms: Sequence[int],
    operators: Sequence[str],
    max_batch: int,
    products: Sequence[tuple[LinearSpec, str]] = (),
) -> tuple[list[Plan], dict[str, Kernel], dict[tuple[str, int], _Job]]:
    """Return plans, kernels, and the jobs by kernel and compute capability."""
    wanted: list[tuple[str, MixerSpec | LinearSpec, str]] = [("linear", spec, kind) for spec, kind in products]
    for spec in specs:
        config = spec.config
        if not (config.fuses or spec.splits):
            raise UsageError(
                "no kernel is compiled ahead of time for cells, memories, or ragged slots with a recurrence or other "
                "scores than a learned one",
                hint="convert with --recurrence-weight 0",
            )
        absent = "linear_attention" if config.evicts or config.keyed or not config.recurrent else ""
        wanted += [(name, spec, dtype) for name in operators if name != absent]
    plans: dict[str, Plan] = {}
    kernels: dict[str, Kernel] = {}
    work: dict[tuple[str, int], _Job] = {}
    for name, layer, kind in wanted:
        for sm in sorted(set(sms)):
            for plan, found in make_plans(name, layer, kind, sm, max_batch):
                known = plans.setdefault(repr(replace(plan, sms=())), plan)
                known_sms = {*known.sms, sm}
                plans[repr(replace(plan, sms=()))] = replace(plan, sms=tuple(sorted(known_sms)))
                for key, (kernel, recorded) in found.items():
                    kernels.setdefault(key, kernel)
                    work.setdefault((key, sm), _Job(kernel, recorded.constants, sm))
    return list(plans.values()), kernels, work


def _make(job: _Job) -> Any:
    """Return one kernel as Triton compiles it; print nothing and leave Triton's cache as it was."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, function = job.kernel, getattr(import_module(job.kernel.module), job.kernel.name)
    arguments = {argument.name: argument for argument in kernel.arguments}
    signature = {name: arguments[name].type if name in arguments else "constexpr" for name in function.arg_names}
    places = {name: (i,) for i, name in enumerate(function.arg_names)}
    promised = [x.name for x in kernel.arguments if x.divisible == ALIGNMENT]
    source = ASTSource(
        function, signature,
        constexprs={places[name]: value for name, value in job.constants.items()},
        attrs={places[name]: [["tt.divisibility", ALIGNMENT]] for name in promised},
    )  # fmt: skip
    knobs = triton.knobs
    with (
        tempfile.TemporaryDirectory() as cache,
        knobs.cache.scope(),
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
    ):
        if Version(knobs.nvidia.ptxas_blackwell.version) >= Version("13"):  # a CUDA 12 driver cannot load its cubins
            knobs.nvidia.ptxas_blackwell = knobs.nvidia.ptxas.path
        knobs.cache.dir = cache
        knobs.compilation.disable_line_info = True  # otherwise the file would contain paths of this machine
        with redirect_stdout(io.StringIO()):
            return triton.compile(
                source, target=GPUTarget("cuda", job.sm, 32), options=dict(kernel.options) | {"enable_fp_fusion": True}
            )


def _compile(job: _Job) -> _Compiled:
    """Compile one kernel and check the result."""
    what = f"kernel '{job.kernel.name}' for sm_{job.sm}"
    try:
        made = _make(job)
    except Exception as e:  # several compilers raise many kinds of errors
        return _Compiled(failure=f"{what} does not compile: {(str(e).strip() or repr(e)).splitlines()[-1]}")
    content, metadata = made.asm["cubin"], made.metadata
    if metadata.shared > SHARED_MEMORY[job.sm]:
        return _Compiled(
            failure=f"{what} takes {metadata.shared} bytes of shared memory, {SHARED_MEMORY[job.sm]} are there"
        )
    if metadata.num_ctas > 1 or metadata.launch_cooperative_grid or metadata.tensordesc_meta:
        return _Compiled(failure=f"{what} needs a launch that the manifest cannot describe")
    registers, local = _resources(content)
    cubin = Cubin(
        file="",
        symbol=metadata.name,
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        threads=32 * metadata.num_warps,
        shared=metadata.shared,
        global_scratch=metadata.global_scratch_size,
        global_scratch_align=metadata.global_scratch_align,
        profile_scratch=metadata.profile_scratch_size,
        registers=registers,
        local=local,
    )
    return _Compiled(content, cubin, ptx=made.asm["ptx"].encode())


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Return registers and bytes of stack per thread; None without cuobjdump."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, RuntimeError, subprocess.SubprocessError):
            return None, None
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (None, None)


def parse_spec(text: str) -> MixerSpec:
    """Read a layer from the command line, `PRESET:H_q:H_kv:d[:max_distance]`.

    Raises:
        UsageError: The text does not have this form.
    """
    preset, *numbers = text.split(":")
    if len(numbers) not in (3, 4) or not all(number.isdecimal() for number in numbers):
        raise UsageError(f"'{text}' is no layer", hint="write PRESET:H_q:H_kv:d or PRESET:H_q:H_kv:d:max_distance")
    q_heads, kv_heads, width, max_distance = [int(number) for number in (*numbers, "8192")[:4]]
    return MixerSpec(get_preset(preset), q_heads, kv_heads, width, width, width**-0.5, max_distance)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ligerexport.kernels.aot", description=__doc__)
    parser.add_argument("specs", nargs="+", metavar="SPEC", help="a layer, PRESET:H_q:H_kv:d[:max_distance]")
    parser.add_argument("-o", "--output", required=True, type=Path, help="directory to write")
    parser.add_argument("--sm", default="90", help="compute capabilities, such as 80,90")
    parser.add_argument("--dtype", default="bf16", help="type of activations")
    parser.add_argument("--operators", default=",".join(DEFAULT_OPERATORS))
    parser.add_argument("--max-batch", default=64, type=int)
    parser.add_argument("--jobs", type=int, help="number of processes, one per core by default")
    parser.add_argument("--force", action="store_true", help="replace an older output")
    given = parser.parse_args(arguments)
    try:
        if not re.fullmatch(r"\d+(,\d+)*", given.sm):
            raise UsageError(f"'{given.sm}' are no compute capabilities", hint="write --sm 80,90")
        made = compile_kernels(
            [parse_spec(text) for text in given.specs],
            given.dtype,
            [int(sm) for sm in given.sm.split(",")],
            given.output,
            operators=given.operators.split(","),
            max_batch=given.max_batch,
            jobs=given.jobs,
            force=given.force,
        )
    except LigerError as e:
        print_error(e)
        return e.exit_code
    for kernel in made.kernels.values():
        for sm, cubin in kernel.cubins.items():
            say(f"{kernel.name} sm_{sm}: {cubin.registers} registers, {cubin.local} local, {cubin.shared} shared")
    data(str(given.output / MANIFEST))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
