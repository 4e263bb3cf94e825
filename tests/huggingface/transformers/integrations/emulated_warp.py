"""Runs inline assembly in Triton's interpreter: a warp's 32 lanes in numpy, fragments as the PTX manual lays them out.

Only the instructions that `quantized_row_mma.py` uses, and only on (pieces, 4) tensors whose lane is piece % 32, a lane's four
elements side by side; `test_quantized_row_mma.py` checks that the compiler lays them out so. The interpreter cuts bfloat16 off
instead of rounding it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

LANES = np.arange(32)
Registers = dict[str, np.ndarray]


def emulate(monkeypatch) -> list[str]:
    """Lets the interpreter run inline assembly while `monkeypatch` lasts; returns a list that gains every string that ran."""
    import triton.language as tl
    from triton.runtime import interpreter

    ran: list[str] = []
    patch = interpreter._patch_lang

    def elementwise(asm, constraints, args, dtype, is_pure, pack, _semantic=None):
        ran.append(asm.value)
        outputs = constraints.value.count("=")
        result = _run_warps(asm.value, outputs, [arg.handle.data for arg in args])
        assert pack == outputs == 4
        kind = tl.block_type(dtype, list(result.shape))
        return tl.tensor(interpreter.TensorHandle(result, dtype.scalar), kind)

    def patch_with_assembly(function):
        scope = patch(function)
        scope.set_attr(tl, "inline_asm_elementwise", elementwise)
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_with_assembly)
    return ran


def _run_warps(asm: str, outputs: int, given: list[np.ndarray]) -> np.ndarray:
    """Returns the (pieces, 4) float32 of assembly over (pieces, 4) arrays of 32-bit elements."""
    result = np.zeros(given[0].shape, np.float32)
    for start in range(0, len(result), 32):
        words = [array[start : start + 32].view(np.uint32)[:, i] for array in given for i in range(4)]
        registers = {f"${outputs + i}": word.copy() for i, word in enumerate(words)}
        for line in asm.strip(" {}").split(";"):
            if line.strip() and not line.strip().startswith(".reg"):
                _step(line.strip(), registers)
        for i in range(outputs):
            result[start : start + 32, i] = _float(registers[f"${i}"])
    return result


def _step(line: str, registers: Registers) -> None:
    name, rest = line.split(" ", 1)
    groups = re.findall(r"\{([^}]*)\}", rest)
    words = [word.strip() for word in re.sub(r"[{}]", "", rest).split(",")]
    if name.startswith("mma."):
        assert name.startswith("mma.sync.aligned.m16n8k16.row.col.f32.")
        _mma(*([one.strip() for one in group.split(",")] for group in groups), _kind(name), registers)
    elif name == "mov.b32" and groups:
        packed = _value(words[2], registers)
        registers[words[0]], registers[words[1]] = packed & 0xFFFF, packed >> 16
    else:
        target, *sources = words
        registers[target] = OPERATIONS[name](*(_value(source, registers) for source in sources))


def _value(word: str, registers: Registers) -> np.ndarray:
    if word == "%laneid":
        return LANES.astype(np.uint32)
    if re.fullmatch(r"0[xf][0-9A-Fa-f]{8}|0x[0-9A-Fa-f]+|-?\d+", word):
        base = 16 if word[:2] in ("0x", "0f") else 10
        return np.full(32, int(word[2:] if base == 16 else word, base) & 0xFFFFFFFF, np.uint32)
    return registers[word]


def _float(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def _bits(numbers: np.ndarray) -> np.ndarray:
    return np.asarray(numbers, np.float32).view(np.uint32)


def _kind(name: str) -> str:
    return "bf16" if "bf16" in name else "f16"


def _halves(words: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    low, high = (words & 0xFFFF).astype(np.uint16), (words >> 16).astype(np.uint16)
    if kind == "bf16":
        return _float(low.astype(np.uint32) << 16), _float(high.astype(np.uint32) << 16)
    return low.view(np.float16).astype(np.float32), high.view(np.float16).astype(np.float32)


def _joined(low: np.ndarray, high: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        low, high = _bits(low), _bits(high)
        assert not ((low | high) & 0xFFFF).any()  # what the kernel makes is exact
        return low >> 16 | high
    low, high = (half.astype(np.float16).view(np.uint16).astype(np.uint32) for half in (low, high))
    return low | high << 16


def _mma(result, left, right, start, kind: str, registers: Registers) -> None:
    """Multiplies the (16, 16) left operand with the (16, 8) right one; PTX manual, matrix fragments of mma.m16n8k16."""
    row, place = LANES // 4, 2 * (LANES % 4)
    rows, columns = np.zeros((16, 16)), np.zeros((16, 8))
    for name, (down, along) in zip(left, ((0, 0), (8, 0), (0, 8), (8, 8)), strict=True):
        rows[row + down, place + along], rows[row + down, place + along + 1] = _halves(registers[name], kind)
    for name, along in zip(right, (0, 8), strict=True):
        columns[place + along, row], columns[place + along + 1, row] = _halves(registers[name], kind)
    product = rows @ columns
    places = ((0, 0), (0, 1), (8, 0), (8, 1))
    for name, before, (down, along) in zip(result, start, places, strict=True):
        registers[name] = _bits(product[row + down, place + along] + _float(registers[before]))


def _lop3(a, b, c, table) -> np.ndarray:
    return {0xEA: a & b | c, 0x6A: a & b ^ c}[int(table[0])]


def _multiply_add(a, b, c) -> np.ndarray:
    halves = zip(*(_halves(word, "bf16") for word in (a, b, c)), strict=True)
    return _joined(*(x * y + z for x, y, z in halves), "bf16")


def _subtract(a, b) -> np.ndarray:
    return _joined(*(x - y for x, y in zip(_halves(a, "f16"), _halves(b, "f16"), strict=True)), "f16")


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda a: a, "mov.u32": lambda a: a, "mov.f32": lambda a: a,
    "shl.b32": lambda a, b: a << b, "shr.u32": lambda a, b: a >> b, "and.b32": lambda a, b: a & b, "lop3.b32": _lop3,
    "add.u32": lambda a, b: a + b, "setp.ne.u32": lambda a, b: a != b, "setp.eq.u32": lambda a, b: a == b,
    "selp.f32": lambda a, b, chosen: np.where(chosen, a, b), "add.f32": lambda a, b: _bits(_float(a) + _float(b)),
    "fma.rn.f32": lambda a, b, c: _bits(_float(a) * _float(b) + _float(c)),
    "fma.rn.bf16x2": _multiply_add, "sub.f16x2": _subtract, "cvt.f32.f16": lambda a: _bits(_halves(a, "f16")[0]),
    "shfl.sync.idx.b32": lambda a, source, *_: a[source.astype(int)], "shfl.sync.bfly.b32": lambda a, by, *_: a[LANES ^ by],
}  # fmt: skip
