import subprocess, sys, tempfile, re
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

def compile_fragment(cap, constants, warps, maxnreg=None, dtype="*bf16"):
    from experiments.rows_kernels import fragment_kernel as kernel
    sig = {"input_ptr": dtype, "weight_ptr": "*i16", "scale_ptr": "*fp16" if constants["GROUPED"] else "*fp32", "bias_ptr": dtype, "residual_ptr": dtype,
           "output_ptr": dtype, "partial_ptr": "*fp32", "arrival_ptr": "*i32", "rows": "i32", "columns": "i32", "runs": "i32", "splits": "i32", "steps": "i32"}
    types = {n: "constexpr" if n in constants else sig[n] for n in kernel.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, (n, t) in enumerate(types.items()) if t.startswith("*") or n in ("columns", "runs")}
    src = GluonASTSource(kernel, types, constants, attrs)
    opts = {"num_warps": warps}
    if maxnreg: opts["maxnreg"] = maxnreg
    return triton.compile(src, target=GPUTarget("cuda", cap, 32), options=opts)

def usage(c):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(c.asm["cubin"]); f.flush()
        rep = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True).stdout
        sass = subprocess.run([tool, "-sass", f.name], capture_output=True, text=True).stdout
    m = re.search(r"REG:(\d+) STACK:(\d+)", rep)
    ops = re.findall(r"^\s+/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", sass, re.M)
    return int(m[1]), int(m[2]), c.metadata.shared, ops, sass

def constants(N, B, M, S, WM, R, A=1, MORE=False, BITS=4, DIVIDED=False, GATED=False, GROUPED=None, cap=90, ACT=0):
    return dict(N=N, B=B, AHEAD=A, M=M, S=S, WM=WM, R=R, MORE=MORE, BITS=BITS, GROUPED=BITS == 4 if GROUPED is None else GROUPED, DIVIDED=DIVIDED,
                ACTIVATION=ACT, GATED=GATED, HAS_BIAS=False, HAS_RESIDUAL=False, PACKED=True, PDL=cap >= 90)

