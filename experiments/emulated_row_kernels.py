"""Runs row_kernels' inline assembly in Triton's interpreter, a warp in numpy, fragments as the PTX manual gives them.

    python -m experiments.emulated_row_kernels

Assumes the layout that the compiler gives (pieces, 4) tensors here: lane = piece % 32, a lane's four elements side by side (seen in
the TTGIR: sizePerThread [1, 4], threadsPerWarp [32, 1]). The interpreter cuts bfloat16 off instead of rounding it.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
import re

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import TensorHandle

import experiments.row_kernels as rk
from huggingface.transformers.integrations.quantized_linear import (
    QuantizedWeight,
    WeightFormat,
    quantized_linear_reference,
)


def f32(u):
    return u.astype(np.uint32).view(np.float32)


def u32(f):
    return np.asarray(f, np.float32).view(np.uint32)


def halves(u, kind):
    lo, hi = (u & 0xFFFF).astype(np.uint16), (u >> 16).astype(np.uint16)
    if kind == "bf16":
        return (lo.astype(np.uint32) << 16).view(np.float32), (hi.astype(np.uint32) << 16).view(np.float32)
    return lo.view(np.float16).astype(np.float32), hi.view(np.float16).astype(np.float32)


L = np.arange(32)


def run(asm, ops):
    R = {}

    def get(n):
        if n.startswith("$"):
            return ops[int(n[1:])]
        if n == "%laneid":
            return L.astype(np.uint32)
        if n.startswith("0x"):
            return np.full(32, int(n, 16), np.uint32)
        if n.startswith("0f"):
            return np.full(32, int(n[2:], 16), np.uint32)
        if n.isdigit():
            return np.full(32, int(n), np.uint32)
        return R[n]

    def put(n, v):
        if n.startswith("$"):
            ops[int(n[1:])] = v
        else:
            R[n] = v

    for ins in asm.strip()[1:-1].split(";"):
        ins = ins.strip()
        if not ins or ins.startswith(".reg"):
            continue
        op, rest = ins.split(" ", 1)
        if op.startswith("mma"):
            d, a, b, c = [[x.strip() for x in g.split(",")] for g in re.findall(r"\{([^}]*)\}", rest)]
            kind = "bf16" if "bf16" in op else "f16"
            A = np.zeros((16, 16), np.float64)
            B = np.zeros((16, 8), np.float64)
            g, t = L // 4, L % 4
            for i, (row, k) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
                lo, hi = halves(get(a[i]), kind)
                A[g + row, 2 * t + k] = lo
                A[g + row, 2 * t + k + 1] = hi
            for i in range(2):
                lo, hi = halves(get(b[i]), kind)
                B[2 * t + 8 * i, g] = lo
                B[2 * t + 8 * i + 1, g] = hi
            C = A @ B
            for i, (row, col) in enumerate([(0, 0), (0, 1), (8, 0), (8, 1)]):
                put(d[i], u32((C[g + row, 2 * t + col] + f32(get(c[i]))).astype(np.float32)))
            continue
        p = [x.strip() for x in rest.split(",")]
        if op.startswith("shfl"):
            src = L ^ int(p[2]) if ".bfly." in op else get(p[2]).astype(int)
            put(p[0], get(p[1])[src].copy())
            continue
        if op == "mov.b32" and rest.strip().startswith("{"):
            lo, hi, w = [x.strip(" {}") for x in rest.split(",")]
            put(lo, get(w) & 0xFFFF)
            put(hi, get(w) >> 16)
            continue
        if op == "cvt.f32.f16":
            put(p[0], u32(get(p[1]).astype(np.uint16).view(np.float16).astype(np.float32)))
            continue
        s = [get(x) for x in p[1:] if x in R or x[0] in "$%0123456789"]
        o = op.split(".")[0]
        if o == "mov":
            v = s[0]
        elif o == "shr":
            v = s[0] >> s[1]
        elif o == "shl":
            v = (s[0] << s[1]).astype(np.uint32)
        elif o == "and":
            v = s[0] & s[1]
        elif o == "lop3":
            v = (s[0] & s[1]) | s[2] if p[4] == "0xEA" else (s[0] & s[1]) ^ s[2]
            assert p[4] in ("0xEA", "0x6A")
        elif o == "setp":
            v = (s[0] != s[1]) if ".ne" in op else s[0] == s[1]
        elif o == "selp":
            v = np.where(s[2], s[0], s[1])
        elif op == "add.u32":
            v = s[0] + s[1]
        elif o == "add":
            v = u32(f32(s[0]) + f32(s[1]))
        elif op == "fma.rn.bf16x2" or op == "sub.f16x2":
            kind = "bf16" if "bf16" in op else "f16"
            h = [halves(q, kind) for q in s]
            r = [h[0][i] * h[1][i] + h[2][i] if kind == "bf16" else h[0][i] - h[1][i] for i in (0, 1)]
            if kind == "bf16":
                b = [u32(q.astype(np.float32)) >> 16 for q in r]
                assert all((u32(q.astype(np.float32)) & 0xFFFF == 0).all() for q in r)
            else:
                b = [q.astype(np.float16).view(np.uint16).astype(np.uint32) for q in r]
            v = b[0] | (b[1] << 16)
        elif o == "fma":
            v = u32(f32(s[0]) * f32(s[1]) + f32(s[2]))
        else:
            raise ValueError(op)
        put(p[0], v)


def fake(asm, constraints, args, dtype, is_pure, pack, _semantic=None):
    asm = asm.value if hasattr(asm, "value") else asm
    arrs = [a.handle.data for a in args]
    shape = arrs[0].shape
    P = shape[0]
    out = np.zeros((P, 4), np.float32)
    assert pack == 4 and all(a.shape == shape for a in arrs), [a.shape for a in arrs]
    for w in range(P // 32):
        ops = {}
        n = 4
        for a in arrs:
            a = a[w * 32 : w * 32 + 32]
            u = a.view(np.uint32) if a.dtype != np.uint32 else a
            for j in range(4):
                ops[n] = np.ascontiguousarray(u[:, j]).copy()
                n += 1
        run(asm, ops)
        for j in range(4):
            out[w * 32 : w * 32 + 32, j] = f32(ops[j])
    return tl.core.tensor(TensorHandle(out, tl.float32.scalar), tl.core.block_type(tl.float32, [P, 4]))


patched = interpreter._patch_lang


def patch(fn):
    result = patched(fn)
    tl.inline_asm_elementwise = fake
    return result


interpreter._patch_lang = patch
torch.manual_seed(0)
for dt in (torch.bfloat16, torch.float16):
    for outs, inner, gated, block, quads, depth in [
        (8, 1024, False, 32, 1, 1),
        (16, 1920, False, 32, 2, 2),
        (8, 3072, False, 64, 1, 2),
        (8, 14336, False, 64, 2, 2),
        (8, 3072, False, 128, 1, 1),
        (8, 1024, True, 32, 1, 1),
        (8, 4096, True, 64, 1, 2),
    ]:
        for bits in (4, 8):
            w = QuantizedWeight.of(
                torch.randn(outs * (1 + gated), inner) * 0.02,
                WeightFormat(4, 128) if bits == 4 else WeightFormat(8),
            )
            x = torch.randn(1, 1, inner).to(dt)
            res = torch.randn(1, 1, outs).to(dt)
            bias = None if gated else torch.randn(outs).to(dt)
            out = torch.full_like(res, float("nan"))
            rk.diagonal_row_kernel[(outs // (4 * quads),)](
                x.view(torch.int32),
                w.weight.view(torch.int32),
                w.scale,
                w.scale,
                x if bias is None else bias,
                res,
                out,
                outs,
                BITS=bits,
                PIECES=inner * bits // 128,
                BLOCK=block,
                QUADS=quads,
                DEPTH=depth,
                PREFETCH=True,
                ACTIVATION=2 if gated else 0,
                GATED=gated,
                HAS_BIAS=bias is not None,
                HAS_RESIDUAL=True,
                PDL=False,
                PACKED=True,
                num_warps=1,
            )
            ref = quantized_linear_reference(
                x.float(),
                w,
                None if bias is None else bias.float(),
                "silu" if gated else None,
                gated,
                res.float(),
            )
            print(
                bits,
                dt,
                outs,
                inner,
                gated,
                block,
                quads,
                depth,
                float((out.float() - ref).abs().max()),
                float(ref.abs().max()),
            )
