"""What the kernels with explicit layouts are written in: Triton's Gluon, or, in the interpreter, plain Triton that ignores layouts."""

from __future__ import annotations

from types import SimpleNamespace

from huggingface.transformers.integrations.triton_support import interpreting, jit, tl, triton

if interpreting():

    def _none(*_args, **_options):
        return None

    def _mma(a, b, acc):
        return tl.dot(a, b, acc)

    gl = SimpleNamespace(
        constexpr=tl.constexpr, static_range=lambda *ends: range(*map(int, ends)), int1=tl.int1, int8=tl.int8, int16=tl.int16, int32=tl.int32,
        int64=tl.int64, float16=tl.float16, bfloat16=tl.bfloat16, float32=tl.float32,
        NVMMADistributedLayout=_none, DotOperandLayout=_none, SliceLayout=_none, BlockedLayout=_none,
        arange=lambda start, end, layout=None: tl.arange(start, end),
        zeros=lambda shape, dtype, layout=None: tl.zeros(shape, dtype),
        full=lambda shape, value, dtype, layout=None: tl.full(shape, value, dtype),
        convert_layout=lambda value, layout, assert_trivial=False: value,
        load=lambda *a, **k: tl.load(*a, **k), store=lambda *a, **k: tl.store(*a, **k),
        program_id=lambda axis: tl.program_id(axis), num_programs=lambda axis: tl.num_programs(axis),
        join=lambda a, b: tl.join(a, b), permute=lambda a, order: tl.permute(a, order),
        reshape=lambda a, shape: tl.reshape(a, shape), sum=lambda a, axis: tl.sum(a, axis),
        expand_dims=lambda a, axis: tl.expand_dims(a, axis), split=lambda a: tl.split(a),
        exp=lambda a: tl.exp(a), minimum=lambda a, b: tl.minimum(a, b), cdiv=lambda a, b: tl.cdiv(a, b),
        atomic_add=lambda *a, **k: tl.atomic_add(*a, **k), thread_barrier=lambda: tl.debug_barrier(),
    )  # fmt: skip
    mma_v2 = _mma
    layout_jit = jit
    word_layout = _none
else:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl  # noqa: F401
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2  # noqa: F401

    layout_jit = gluon.jit

    @gluon.constexpr_function
    def word_layout(slices, columns, warps):
        """Returns the layout of (slices, columns, 32) words that is the left operand's: 8 consecutive ones a thread."""
        regs = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 8, 0]]
        across = []
        step = 16
        while step < 16 * warps:
            across.append([0, step, 0])
            step *= 2
        while step < columns:
            regs.append([0, step, 0])
            step *= 2
        part = 1
        while part < slices:
            across.append([part, 0, 0])
            part *= 2
        lanes = [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
        return gl.DistributedLinearLayout(regs, lanes, across, [], [slices, columns, 32])


__all__ = ["gl", "layout_jit", "mma_v2", "tl", "triton", "word_layout"]
