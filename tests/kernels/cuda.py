"""What CUDA would run, found out on a machine that has none: lowering, Triton IR, machine code, resources.

Three steps, each of use by itself:

* `lower` gives the text of a program lowered for CUDA; a CPU-only jaxlib can do that.
* `kernels` takes the Triton IR of each `pallas_call` out of that program.
* `compile` turns it into machine code with the triton package and reads registers, spills and shared
  memory off the compiler's log.

`compiled_kernels` does all three.  XLA compiles the same IR with its own copy of Triton, a few months
apart, so a register more or less is no surprise; `deviceless.py` asks XLA itself.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton_dialect

from jaxablate_gpus import GPUS

# Where XLA's own lowering of Pallas for Triton leaves a kernel's IR.
_CUSTOM_CALL = "__gpu$xla.gpu.triton"


# The GPUs that are compiled for, by compute capability: 90 for 9.0.
DEVICES = {
    10 * GPUS[name].capability[0] + GPUS[name].capability[1]: GPUS[name] for name in ("a100", "h200", "b200")
}


@dataclasses.dataclass(frozen=True)
class Ttir:
    """One `pallas_call` of a program, as Triton IR.

    Attributes:
        name: of the kernel, as profilers will show it.
        text: the MLIR module.
        num_warps, num_stages, grid: how it is to be compiled and launched.
    """

    name: str
    text: str
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a compiled kernel needs.

    Attributes:
        name, num_warps, num_stages, grid: as in `Ttir`.
        capability: what it was compiled for.
        registers: per thread; 255 is the most there can be.
        spills: bytes per thread that ptxas writes to memory, since they do not fit into registers.
        stack_bytes: memory of a thread for these and for what else has to have an address.
        shared_bytes: shared memory of one block.
        tensor_columns: columns of tensor memory of one block (of 512; from capability 100).
        code_bytes: size of the binary.
    """

    name: str
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]
    capability: int
    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    tensor_columns: int
    code_bytes: int


class CompilationFailed(Exception):
    """Triton or ptxas refused a kernel; the message names the kernel and the target."""


def lower(fn: Callable[..., Any], *args: Any, capability: int = 90) -> str:
    """The text of `fn` lowered for CUDA.

    Args:
        fn: a function of arrays, jitted or not.
        args: its arguments, as arrays or `jax.ShapeDtypeStruct`.
        capability: of the device that the program is told it has.
    """
    return _lowered(fn, args, capability).as_text()


def kernels(fn: Callable[..., Any], *args: Any, capability: int = 90) -> list[Ttir]:
    """The Triton IR of each `pallas_call` in `fn`, in the order of the lowered text."""
    found: list[Ttir] = []

    def visit(op: Any) -> ir.WalkResult:
        is_call = op.name == "stablehlo.custom_call"
        if is_call and ir.StringAttr(op.attributes["call_target_name"]).value == _CUSTOM_CALL:
            found.append(_ttir(ir.DictAttr(op.attributes["mhlo.backend_config"])))
        return ir.WalkResult.ADVANCE

    _lowered(fn, args, capability).compiler_ir("stablehlo").operation.walk(visit)
    return found


def compile(kernel: Ttir, capability: int) -> Kernel:
    """Compile a kernel to machine code; a kernel that was compiled before comes out of a cache.

    Raises:
        ImportError: the triton package is not installed.
        CompilationFailed: there is no machine code.
    """
    import triton

    what = repr((kernel, capability, triton.__version__))
    cached = _cache() / f"{hashlib.sha256(what.encode()).hexdigest()}.json"
    if cached.exists():
        usage = json.loads(cached.read_text())
    else:
        usage = _usage(kernel, capability)
        partial = cached.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(usage))
        partial.replace(cached)
    return Kernel(kernel.name, kernel.num_warps, kernel.num_stages, kernel.grid, capability, **usage)


def compiled_kernels(fn: Callable[..., Any], *args: Any, capability: int = 90) -> list[Kernel]:
    """All kernels of `fn`, compiled; arguments as for `lower`, errors as for `compile`."""
    return [compile(kernel, capability) for kernel in kernels(fn, *args, capability=capability)]


def over_budget(kernel: Kernel, *, registers: int = 255, spills: int = 0) -> list[str]:
    """What of a kernel exceeds its budget or the device, each in one line; empty if all is well."""
    limits = {
        "registers": registers,
        "spills": spills,
        "shared_bytes": DEVICES[kernel.capability].shared_bytes,
        "tensor_columns": 512,
    }
    return [
        f"{kernel.name} for sm_{kernel.capability}: {what} {getattr(kernel, what)}, at most {limit}"
        for what, limit in limits.items()
        if getattr(kernel, what) > limit
    ]


def _lowered(fn: Callable[..., Any], args: tuple[Any, ...], capability: int) -> Any:
    device = DEVICES[capability]
    # From jax 0.11 the lowering asks the mesh for the device; 0.10 takes any machine without a GPU for 9.0.
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(device.kind, device.cores, "gpu"))
    with warnings.catch_warnings(), jax.sharding.use_abstract_mesh(mesh):
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))


def _ttir(config: ir.DictAttr) -> Ttir:
    def number(key: str) -> int:
        return ir.IntegerAttr(config[key]).value

    with ir.Context() as context, ir.Location.unknown():
        triton_dialect.register_dialect(context)
        context.load_all_available_dialects()
        module = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes)
        text = module.operation.get_asm(enable_debug_info=False)
    return Ttir(
        name=ir.StringAttr(config["name"]).value,
        text=text,
        num_warps=number("num_warps"),
        num_stages=number("num_stages"),
        grid=(number("grid_x"), number("grid_y"), number("grid_z")),
    )


def _usage(kernel: Ttir, capability: int) -> dict[str, int]:
    """Compile for real."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    # XLA lets LLVM fuse multiplication and addition, so this does too.
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": True}
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True  # to standard output
        source = Path(folder) / "kernel.ttir"
        source.write_text(kernel.text)
        try:
            with contextlib.redirect_stdout(log):
                _simplify(source, target, options)
                binary = triton.compile(str(source), target=target, options=options)
        except (RuntimeError, ValueError) as error:
            raise CompilationFailed(f"{kernel.name} for sm_{capability}: {error}") from error

    def logged(pattern: str) -> int:
        (value,) = re.findall(pattern, log.getvalue())
        return int(value)

    return {
        "registers": logged(r"Used (\d+) registers"),
        "spills": logged(r"(\d+) bytes spill stores"),
        "stack_bytes": logged(r"(\d+) bytes stack frame"),
        "shared_bytes": binary.metadata.shared,
        "tensor_columns": binary.metadata.tmem_size or 0,
        "code_bytes": len(binary.asm["cubin"]),
    }


def _simplify(source: Path, target: Any, options: dict[str, Any]) -> None:
    """Triton's passes on its own IR, in place: inlining and the like, which it leaves out for an IR file."""
    from triton._C.libtriton import ir as triton_ir
    from triton.compiler.compiler import make_backend

    backend: Any = make_backend(target)
    context = triton_ir.context()
    triton_ir.load_dialects(context)
    backend.load_dialects(context)
    module = triton_ir.parse_mlir_module(str(source), context)
    module.context = context
    backend.make_ttir(module, {}, backend.parse_options(dict(options)), target.arch)
    source.write_text(str(module))


@functools.cache
def _cache() -> Path:
    """A folder that the processes of one user share."""
    folder = Path(tempfile.gettempdir()) / f"jaxablate-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
