"""What kernels with explicit layouts share: Gluon, Triton's lower level, whose import may fail, and its stand-in to interpret.

Gluon code says which thread holds which number. Triton's interpreter knows no threads, so there layouts are nothing, and the few
functions that take one are Triton's own without it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from .triton_support import interpreting, jit, tl, triton

TRIED = ("3.6.", "3.7.")
"""Versions of Triton that the kernels in Gluon were compiled with. Gluon is experimental: names change from one to the next."""

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gluon_language
    from triton.experimental.gluon.language.nvidia.ampere import async_copy as gluon_copy
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2 as gluon_mma
except ImportError:  # no Triton, or one without Gluon
    gluon = gluon_language = gluon_copy = gluon_mma = None


def gluon_unavailable() -> str | None:
    """Returns why kernels in Gluon cannot run, or `None` if they can. Whether the GPU can is `triton_support.unavailable`'s."""
    if triton is None:
        return "Triton is not installed"
    if interpreting():
        return None
    if gluon is None:
        return f"Triton {triton.__version__} has no Gluon with products on the tensor cores"
    if not triton.__version__.startswith(TRIED):
        return f"Gluon of Triton {triton.__version__} was not tried, only that of {', '.join(v + 'x' for v in TRIED)}"
    return None


def source_of(function: Any, signature: Any, constants: Any, attributes: Any) -> Any:
    """Returns what `triton.compile` takes for a kernel, in Gluon or in Triton."""
    if gluon is not None and function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(function, signature, constants, attributes)
    return triton.compiler.ASTSource(function, signature, constants, attributes)


def _stand_in() -> SimpleNamespace:
    """Returns what of Gluon's language the kernels use, without layouts."""
    return SimpleNamespace(
        NVMMADistributedLayout=_nothing,
        DotOperandLayout=_nothing,
        SliceLayout=_nothing,
        BlockedLayout=_nothing,
        SwizzledSharedLayout=_nothing,
        allocate_shared_memory=lambda kind, shape, layout: _Shared(shape[0]),
        arange=lambda start, end, layout: tl.arange(start, end),
        zeros=lambda shape, dtype, layout: tl.zeros(shape, dtype),
        convert_layout=lambda value, layout, assert_trivial=False: value,
    )


def _nothing(*_args: object) -> None:
    """Stands in for a layout."""


class _Shared:
    """Stands in for shared memory of several places, each filled and read as a whole."""

    def __init__(self, places: Any) -> None:
        self._held: list[Any] = [None] * int(places)

    def index(self, place: Any) -> _Place:
        """Returns one place."""
        return _Place(self._held, int(place.handle.data[0] if hasattr(place, "handle") else place))


class _Place:
    """Stands in for a view of shared memory."""

    def __init__(self, held: list[Any], number: int, turned: bool = False) -> None:
        self._held, self._number, self._turned = held, number, turned

    def fill(self, value: Any) -> None:
        """Replaces what is there."""
        self._held[self._number] = value

    def permute(self, _order: object) -> _Place:
        """Returns the view with its two dimensions exchanged."""
        return _Place(self._held, self._number, not self._turned)

    def load(self, _layout: object) -> Any:
        """Returns what is there."""
        value = self._held[self._number]
        return tl.trans(value) if self._turned else value


class _Copies:
    """Stands in for copies to shared memory: each is done when somebody waits for its group, and not before."""

    def __init__(self) -> None:
        self._open: list[tuple[_Place, Any]] = []
        self._groups: list[list[tuple[_Place, Any]]] = []

    def async_copy_global_to_shared(self, place: _Place, pointers: Any) -> None:
        """Adds a copy to the open group."""
        self._open.append((place, pointers))

    def commit_group(self) -> None:
        """Closes the open group."""
        self._groups.append(self._open)
        self._open = []

    def wait_group(self, outstanding: Any) -> None:
        """Does the copies of all groups but the last `outstanding`."""
        done = max(0, len(self._groups) - int(outstanding))
        for place, pointers in (copy for group in self._groups[:done] for copy in group):
            place.fill(tl.load(pointers))
        self._groups = self._groups[done:]


def _layout_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that makes a layout as kernels may call it."""
    if interpreting() or gluon is None:
        return _nothing
    return gluon.constexpr_function(function)


if interpreting() or gluon is None:
    gl: Any = _stand_in()
    gluon_jit: Any = jit
    async_copy: Any = _Copies()

    def mma_v2(a: Any, b: Any, acc: Any) -> Any:
        """Returns acc + a @ b, as the instruction does."""
        return tl.dot(a, b, acc)
else:
    gl, gluon_jit, async_copy, mma_v2 = gluon_language, gluon.jit, gluon_copy, gluon_mma


@_layout_function
def word_layout(slices: int, columns: int) -> Any:
    """Returns the layout of (slices, columns, 32) int16 words, a slice to each warp, that needs no change before the product.

    A thread holds 8 consecutive words, 16 bytes; 4 threads the 32 words of a column; a warp 8 columns at a time.
    """
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 8, 0]]
    lanes = [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warps = []
    step = 16
    while step < columns:
        registers.append([0, step, 0])
        step *= 2
    step = 1
    while step < slices:
        warps.append([step, 0, 0])
        step *= 2
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [slices, columns, 32])
