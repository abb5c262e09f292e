"""Bit for bit the layer of another checkout: y, dx, dprobs, dw1 and dw2 of every recipe.

    python -m tools.same PATH                           the kernels on a GPU, the twins on a CPU
    TRITON_INTERPRET=1 python -m tools.same PATH one    one shape, by the kernels in the interpreter

Exit code 1 where something differs. It serves a rebuild of the layer, and goes when that is done.
"""
import sys
import types
from pathlib import Path

import torch

for package, path in (("old", sys.argv[1]), ("new", str(Path(__file__).parents[1]))):
    module = types.ModuleType(package)
    module.__path__ = [path]
    sys.modules[package] = module

import new.fp8flow as new           # noqa: E402
import old.fp8flow as old           # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REQUANTIZE = "requantize" if hasattr(new, "LADDER") else "fused"        # what `new` calls it
SPECS = ["bf16", "naive", "flow", "naive,scales=pow2", f"naive,transpose={REQUANTIZE}",
         f"naive,transpose={REQUANTIZE},scales=pow2", "naive,transpose=direct,scales=pow2",
         "naive,swiglu=fused", "naive,permute=fused", f"flow,transpose={REQUANTIZE}",
         "flow,transpose=unfused", "flow,swiglu=unfused", "flow,permute=unfused"]
CASES = {                           # tokens, D, F, experts, k
    "plain": (150, 128, 256, 3, 2),
    "one token": (1, 128, 128, 4, 2),
    "k = 1": (130, 256, 128, 5, 1),
    "k = E": (70, 128, 128, 3, 3),
    "idle experts": (140, 128, 128, 8, 2),
    "all to one": (300, 128, 128, 4, 1),
    "one token, 256 experts": (1, 128, 128, 256, 1),
    "int32": (90, 128, 128, 4, 2),
}
if sys.argv[2:] == ["one"]:
    CASES = {"plain": CASES["plain"]}
elif DEVICE == "cuda":
    CASES |= {"wide": (2000, 1024, 1408, 8, 2), "many": (4096, 512, 768, 64, 6)}
CHANGES = {                         # of the index
    "idle experts": lambda index: index % 2 + 5,
    "all to one": lambda index: index * 0 + 3,
    "int32": lambda index: index.int(),
}


def results(module, spec, x, index, weights, w1, w2, dy):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weights, w1, w2)]
    y = module.experts(leaves[0], index, *leaves[1:], spec)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def main() -> int:
    rng = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=rng)

    differ = 0
    for name, (T, D, F, E, k) in CASES.items():
        weights, index = torch.rand(T, E, generator=rng).topk(k)
        index = CHANGES.get(name, lambda index: index)(index)
        w1 = randn(E, 2 * F, D) * D ** -0.5
        w2 = randn(E, D, F) * F ** -0.5
        inputs = [randn(T, D), index, weights, w1, w2, randn(T, D)]
        inputs = [tensor.to(DEVICE) for tensor in inputs]
        for dtype in (torch.float32, torch.bfloat16):           # of the masters
            inputs[3:5] = [w.to(dtype) for w in inputs[3:5]]
            for spec in SPECS:
                before = results(old, spec.replace("requantize", "fused"), *inputs)
                after = results(new, spec, *inputs)
                if not all(torch.equal(a, b) for a, b in zip(before, after)):
                    differ += 1
                    print("differs:", name, spec, dtype)
    print(f"{2 * len(CASES) * len(SPECS)} cases on {DEVICE}, {differ} differ")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
