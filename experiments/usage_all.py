import sys
from concurrent.futures import ProcessPoolExecutor
import experiments.rows_variants as rv
from experiments.check_compiled import *
def job(key):
    t, more, gated = key
    c = compile_fragment(90, constants(t.rows, t.blocks, t.columns, t.slices, t.across, t.run, min(t.ahead, t.run*t.blocks), MORE=more, DIVIDED=t.splits>1, GATED=gated, ACT=2 if gated else 0), t.warps, t.registers or None)
    r,s,sh,ops,sass = usage(c)
    lead = 0
    seen = False
    for o in ops:
        if o.startswith("ACQB"): seen = True
        elif seen and o.startswith("LDG.E.128"): lead += 1
        elif seen and o.startswith("HMMA"): break
    return f"{t} more{int(more)} {'gated' if gated else ''} regs {r} stack {s} shared {sh} ops {len(ops)} leading {lead} LDL {sum(o.startswith('LDL') for o in ops)} per SM {min(65536//(-(-r//8)*8*32*t.warps), 64//t.warps, 227*1024//(sh+1024))}"
if __name__ == "__main__":
    keys = {}
    for part,(o,i,g) in rv.SHAPES.items():
        for n in [7,16,33,49,112]:
            for t in rv.candidates(part, n, i):
                steps = i // (128*t.slices*t.run*t.splits)
                keys.setdefault((t, steps>1, g), []).append((part, n))
    with ProcessPoolExecutor(2) as ex:
        for k, line in zip(keys, ex.map(job, keys)): print(line, "|", " ".join(f"{p}:{n}" for p,n in keys[k]), flush=True)
