from experiments.check_compiled import *
import sys
def show(args, cap_regs=None, **kw):
    try:
        c = compile_fragment(90, constants(*args, **kw), args[3]*args[4], cap_regs)
    except Exception as e:
        print(args, "FAILED", str(e)[-600:]); return
    r,s,sh,ops,sass = usage(c)
    order = []
    for o in ops:
        k = "L" if o.startswith("LDG.E.128") else "W" if o.startswith("LDG.E.EF") else "s" if o.startswith("LDG.E.U16") else "|" if o.startswith("ACQB") else "m" if o.startswith("HMMA") else "B" if o.startswith("BAR") else "y" if o.startswith("WARPSYNC") else "S" if o.startswith("STG") else None
        if k is None: continue
        if order and order[-1][0] == k: order[-1][1] += 1
        else: order.append([k, 1])
    print(args, kw, cap_regs, "regs", r, "stack", s, "shared", sh, "ops", len(ops), "".join(f"{k}{n if n > 1 else ''}" for k, n in order), flush=True)
    return c
if __name__ == "__main__":
  for args, cap_regs in [((8,1,16,4,1,4,2),None),((8,1,16,4,1,4,4),None),((8,1,16,4,1,4,4),128),((8,2,16,4,1,4,2),None),((8,2,16,4,1,4,4),None),((8,2,16,8,1,2,2),None),((8,2,16,8,1,2,4),None),((8,2,32,8,1,2,2),None),((8,2,32,4,1,4,2),None),((8,5,32,4,1,2,2),None),((8,5,32,4,1,4,2),None),((8,7,32,4,1,2,2),None)]:
    show(args, cap_regs)
