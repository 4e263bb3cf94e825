"""Compiles kernels for GPUs that need not be there and reports what they use.

The interpreter says whether a kernel computes the right thing; only the compiler says whether it fits. Compilation happens in a
process of its own, because in one where kernels are interpreted there is nothing to compile.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

TRIED_TRITON = "3.6."
"""As in the tests' conftest, which must not be imported before it has set the environment."""
SHARED_LIMITS = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory a program may use, by compute capability (CUDA programming guide, technical specifications)."""


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses.

    Attributes:
        capability: Compute capability it was compiled for, 86 for 8.6.
        registers: Registers of a thread.
        spills: Bytes of stack, which registers spill to.
        shared: Bytes of shared memory of a program.
        layouts: Different layouts of what its inline assembly returns, as the compiler writes them.
    """

    capability: int
    registers: int
    spills: int
    shared: int
    layouts: list[str]

    @property
    def fits(self) -> bool:
        """Whether nothing spills and the shared memory suffices."""
        return self.spills == 0 and self.shared <= SHARED_LIMITS[self.capability]


def compile_kernel(
    module: str,
    kernel: str,
    signature: dict[str, str],
    constexprs: dict,
    num_warps: int,
    num_stages: int = 3,
    capabilities: tuple[int, ...] = (80, 86, 90),
    aligned: tuple[str, ...] = (),
) -> list[Usage]:
    """Returns what a kernel uses on each capability.

    Args:
        module: Name of the module that defines it.
        kernel: Its name there.
        signature: Types of the arguments that are not constants, as Triton spells them: `*fp16`, `i32`. Pointers count as
            aligned to 16 bytes.
        constexprs: Values of the constants; `PDL` and `PACKED`, if the kernel has them, are added.
        num_warps: Warps of a program.
        num_stages: Stages of its pipeline.
        capabilities: What to compile for.
        aligned: Integer arguments known to be multiples of 16, as strides usually are.
    """
    return compile_kernels(
        [(module, kernel, signature, constexprs, num_warps, num_stages, aligned)], capabilities
    )[0]


def compile_kernels(kernels: list[tuple], capabilities: tuple[int, ...] = (80, 86, 90)) -> list[list[Usage]]:
    """Returns `compile_kernel` of several kernels from one process, which starts but once; skips beside another Triton."""
    if not version("triton").startswith(TRIED_TRITON):
        pytest.skip(f"registers and shared memory were checked with Triton {TRIED_TRITON}x alone")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([kernels, capabilities]),
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == 0, done.stderr
    return [[Usage(**usage) for usage in usages] for usages in json.loads(done.stdout.splitlines()[-1])]


def _compile(
    capability: int, module, name, signature, constexprs, num_warps, num_stages, aligned, registers=None
) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget

    from huggingface.transformers.integrations.gluon_support import source_of

    kernel = getattr(importlib.import_module(module), name)
    set_by_device = {"PDL": capability >= 90, "PACKED": True}
    constexprs = constexprs | {
        name: value for name, value in set_by_device.items() if name in kernel.arg_names
    }
    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    multiples = [
        index for index, (name, kind) in enumerate(types.items()) if kind.startswith("*") or name in aligned
    ]
    aligned_ones: dict = {(index,): [["tt.divisibility", 16]] for index in multiples}
    source = source_of(kernel, types, constexprs, aligned_ones)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = _resources(compiled.asm["cubin"])
    return Usage(
        capability, registers, spills, compiled.metadata.shared, _assembly_layouts(compiled.asm["ttgir"])
    )


def _assembly_layouts(code: str) -> list[str]:
    names = dict(re.findall(r"^(#\w+) = (#ttg.*)$", code, re.MULTILINE))
    results = re.findall(r"tt\.elementwise_inline_asm .*-> tensor<[^#>]*(#\w+)>", code)
    return sorted({names[result] for result in results})


def _resources(binary: bytes) -> tuple[int, int]:
    """Returns registers and stack bytes, as the tool that comes with Triton reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    kernels, capabilities = json.load(sys.stdin)
    usages = [[asdict(_compile(capability, *kernel)) for capability in capabilities] for kernel in kernels]
    sys.stdout.write(json.dumps(usages) + "\n")
