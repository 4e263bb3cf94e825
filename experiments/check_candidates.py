import sys; sys.path.insert(0, "."); sys.path.insert(0, "tests")
import tests.conftest
import torch
from experiments.rows_variants import candidates, SHAPES
from experiments.fragment import launch_fragment
from huggingface.transformers.integrations.quantized_linear import QuantizedWeight, quantized_linear_reference
from huggingface.transformers.quantizers.packing import WeightFormat
seen = set()
worst = 0
for part, (o, i, gated) in SHAPES.items():
    for n in (7, 16, 33, 112):
        for t in candidates(part, n, i):
            key = (t.rows, t.blocks, t.columns, t.slices, t.across, t.run, t.splits, t.ahead, gated, i)
            if key in seen: continue
            seen.add(key)
            torch.manual_seed(len(seen))
            cols = 70
            w = QuantizedWeight.of(torch.randn(cols * (1 + gated), i) * i**-0.5, WeightFormat(4, 128) if len(seen) % 3 else WeightFormat(8))
            x = torch.randn(1, n, i, dtype=torch.float16); res = torch.randn(1, n, cols, dtype=torch.float16)
            bias = None if gated else torch.randn(cols, dtype=torch.float16)
            out = torch.full((1, n, cols), float("nan"), dtype=torch.float16)
            launch_fragment(t, x, w, bias, 1 + gated, gated, res, out)
            ref = quantized_linear_reference(x.float(), w, None if bias is None else bias.float(), "silu" if gated else "gelu_tanh", gated, res.float())
            off = float((out.float() - ref).abs().max()); worst = max(worst, off)
            if not off < 8e-3: print("OFF", part, n, t, off)
print(len(seen), "tiles, worst", worst)
