import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, "tests")
import tests.conftest as c  # patches the interpreter's loops
import torch
from experiments.fragment import Fragment, launch_fragment
from huggingface.transformers.integrations.quantized_linear import QuantizedWeight, quantized_linear_reference
from huggingface.transformers.quantizers.packing import WeightFormat

for kind in (WeightFormat(4, 128), WeightFormat(8), WeightFormat(4)):
    for tile in (Fragment(8, 1, 16, 2, 1, 2), Fragment(8, 2, 32, 2, 2, 1, 2), Fragment(8, 3, 32, 4, 1, 1, ahead=2), Fragment(16, 1, 16,1,1,4,2, ahead=3)):
        for gated in (False, True):
            torch.manual_seed(0)
            n, cols, inner = 11, 40, 1024
            w = QuantizedWeight.of(torch.randn(cols * (2 if gated else 1), inner) * inner**-0.5, kind)
            x = torch.randn(1, n, inner, dtype=torch.float16)
            bias = None if gated else torch.randn(cols, dtype=torch.float16)
            res = torch.randn(1, n, cols, dtype=torch.float16)
            out = torch.full((1, n, cols), float("nan"), dtype=torch.float16)
            launch_fragment(tile, x, w, bias, 2, gated, res, out)
            ref = quantized_linear_reference(x.float(), w, None if bias is None else bias.float(), "silu", gated, res.float())
            print(kind, tile, gated, float((out.float() - ref).abs().max()))
            assert float((out.float() - ref).abs().max()) < 6e-3
