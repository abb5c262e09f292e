"""FP8-Flow-MoE: the expert layer of a Mixture-of-Experts model, trained in FP8 without casts (arXiv 2511.02302).

An expert layer is two grouped linears around SwiGLU. In one forward and backward, four activation-side tensors enter
GEMMs, each of them twice: row-wise (the reduction runs along a row: fprop, dgrad) and column-wise (along the tokens:
wgrad), because an FP8 scale can only be pulled out of a sum that it is constant over.

    tensor           made by                                   row-wise      column-wise
    X   [M, D]       layer input, sent to the experts          fc1 fprop     fc1 wgrad
    A   [M, F]       SwiGLU, times the router's probability    fc2 fprop     fc2 wgrad
    dY  [M, D]       output gradient, sent to the experts      fc2 dgrad     fc2 wgrad
    dH  [M, 2F]      SwiGLU backward                           fc1 dgrad     fc1 wgrad

The naive dataflow casts each of the four three times: quantize row-wise (Q), dequantize (DQ), quantize column-wise
(Q'). That is 12 explicit casts, and the second rounding is an error of its own. One dataflow, four switches:

    switch      naive      flow      what flow removes
    transpose   requant    direct    DQ and Q' of all four tensors: -8 casts (the transpose only shifts exponents)
    swiglu      unfused    fused     Q(A) and Q(dH): -2 casts (SwiGLU and its backward emit FP8)
    permute     unfused    fused     launches and traffic (permute and pad are one gather)
    scales      fp32       pow2      the double quantization error

Q(X) at the entry of forward and Q(dY) at the entry of backward are left: 2 casts. An explicit cast is a launch whose
job is to change the precision of an activation-side tensor; `count_casts` counts them as they run.

A step beyond the paper, `flow-row`: granularity "row" (one scale for a whole row along the reduction) lets the tensor
core sum `promote` elements, not 128, before a partial sum is promoted to the fp32 accumulator.

Reading order: Recipe, Plan, FP8Experts. `python fp8flow.py` prints the ledger of every recipe and of every switch
flipped, the double-quantization table and, on a GPU, the time of the layer.

Shapes: T tokens, K experts per token, E experts, M padded token slots, D model width, F expert width.
"""
import argparse
import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels import BLOCK, QTensor

CHOICES = {"transpose": ("direct", "requant"), "swiglu": ("fused", "unfused"), "permute": ("fused", "unfused"),
           "scales": ("pow2", "fp32"), "granularity": ("block", "row")}


@dataclass(frozen=True)
class Recipe:
    """How the expert layer computes. The defaults are `flow`.

    precision   "fp8" | "bf16": bf16 has the same routing plan and fused kernels, torch's grouped GEMM, and no switches.
    transpose   "direct": shift exponents | "requant": dequantize, transpose, quantize again.
    swiglu      "fused" with quantization | "unfused".
    permute     "fused" with padding | "unfused": permute, then pad.
    scales      "pow2" | "fp32" (amax/448).
    granularity "block": 1x128 and 128x128 | "row": one scale along the whole reduction.
    promote     elements between promotions to the fp32 accumulator, a multiple of 128; None: never.
    recompute   save only X and the routing, run fc1 again in backward (swiglu=unfused keeps A too: a cast would make it).
    Raises ValueError for a combination that has no meaning.
    """
    precision: str = "fp8"
    transpose: str = "direct"
    swiglu: str = "fused"
    permute: str = "fused"
    scales: str = "pow2"
    granularity: str = "block"
    promote: int | None = BLOCK
    recompute: bool = False

    def __post_init__(self):
        for name, choices in {"precision": ("fp8", "bf16"), **CHOICES}.items():
            kernels.check_choice(name, getattr(self, name), choices)
        if self.transpose == "direct" and self.scales == "fp32":
            raise ValueError("transpose=direct needs scales=pow2: it shifts exponents, and the ratio of two fp32 scales "
                             "is no power of two; use scales=pow2 or transpose=requant")
        kernels.check_interval(self.granularity, self.promote)


RECIPES = {
    "bf16": Recipe(precision="bf16"),
    "naive": Recipe(transpose="requant", swiglu="unfused", permute="unfused", scales="fp32"),
    "flow": Recipe(),
    "flow-row": Recipe(granularity="row", promote=512),
}


def switch(recipe: Recipe, **changes) -> Recipe:
    """`recipe` with some switches changed. Unless it is given, `promote` follows the granularity: 128 or 512."""
    if changes.get("granularity", recipe.granularity) != recipe.granularity:
        changes.setdefault("promote", 512 if changes["granularity"] == "row" else BLOCK)
    return replace(recipe, **changes)


# ---------------------------------------------------------------------------------------------------------------------
# the cast ledger

class Cast(NamedTuple):
    tensor: str       # X, A, dY, dH; W1, W2
    kind: str         # Q (row-wise), DQ, Q' (column-wise)
    direction: str    # forward, backward; step (weights, once per optimizer step)


class Ledger(list):
    """The explicit casts of activation-side tensors, in the order in which they ran; `weights` are counted apart."""

    def __init__(self):
        super().__init__()
        self.weights: list[Cast] = []


_ledgers: list[Ledger] = []


@contextlib.contextmanager
def count_casts():
    """`with count_casts() as ledger:` collects a Cast from every quantize and dequantize the layer launches."""
    ledger = Ledger()
    _ledgers.append(ledger)
    try:
        yield ledger
    finally:
        _ledgers[:] = [other for other in _ledgers if other is not ledger]


def quantize(x: Tensor, recipe: Recipe, tensor: str, direction: str) -> QTensor:
    """An explicit cast: bf16 -> FP8, row-wise."""
    for ledger in _ledgers:
        ledger.append(Cast(tensor, "Q", direction))
    return kernels.quantize(x, recipe.scales, recipe.granularity)


def requantizing_transpose(q: QTensor, plan: "Plan", recipe: Recipe, tensor: str) -> QTensor:
    """Two explicit casts: FP8 -> bf16, transpose, bf16 -> FP8 along the other axis, with other scales."""
    for ledger in _ledgers:
        ledger += [Cast(tensor, "DQ", "backward"), Cast(tensor, "Q'", "backward")]
    x = kernels.dequantize(q, torch.bfloat16)
    scale = kernels.column_scale(x, plan.ends, recipe.scales) if recipe.granularity == "row" else None
    return kernels.quantize(kernels.transpose(x), recipe.scales, scale=scale)


def cast_weight(w: Tensor, recipe: Recipe, tensor: str):
    """w [E, N, K] fp32 -> what the GEMMs read: (W, W^T) in FP8, or bf16. Once per optimizer step."""
    for ledger in _ledgers:
        ledger.weights.append(Cast(tensor, "Q" if recipe.precision == "fp8" else "bf16", "step"))
    if recipe.precision == "bf16":
        return w.detach().bfloat16()
    return kernels.quantize_weight(w.detach(), recipe.scales, recipe.granularity)


# ---------------------------------------------------------------------------------------------------------------------
# the routing plan

class Plan(NamedTuple):
    """Where each (token, choice) pair goes. Every shape is static: nothing here waits for the GPU.

    Pairs sorted by expert are `compact` rows [T*K]; each expert's rows padded to a multiple of 128 are slots [M], with
    M = round_up(T*K + E*127, 128) the most that can ever be needed.
    """
    slot: Tensor             # [T, K] int64  the slot of each pair
    token: Tensor            # [M] int64     the token in each slot, -1: padding
    pair: Tensor             # [M] int64     the pair t*K + k in each slot, -1: padding
    tile_expert: Tensor      # [M/128] int32 the expert of each tile, -1: unused
    ends: Tensor             # [E] int32     where each expert's slots end (a multiple of 128)
    counts: Tensor           # [E] int64     pairs of each expert
    compact_token: Tensor    # [T*K] int64   the token of each compact row
    compact_slot: Tensor     # [T*K] int64   the slot of each compact row
    slot_compact: Tensor     # [M] int64     the compact row of each slot, -1: padding
    compact: Tensor          # [T, K] int64  the compact row of each pair


def make_plan(experts: Tensor, n_experts: int) -> Plan:
    """experts [T, K] int64, the chosen experts of each token, each in 0..E-1 -> Plan. No sync, no atomics."""
    T, K = experts.shape
    M = -(-(T * K + n_experts * (BLOCK - 1)) // BLOCK) * BLOCK
    sorted_experts, order = experts.flatten().sort(stable=True)                 # compact row -> pair
    bounds = torch.searchsorted(sorted_experts, torch.arange(n_experts + 1, device=experts.device))
    counts = bounds.diff()
    ends = ((counts + BLOCK - 1) // BLOCK * BLOCK).cumsum(0)
    begins = F.pad(ends[:-1], (1, 0))
    compact = torch.arange(T * K, device=experts.device)
    compact_slot = compact + (begins - bounds[:-1])[sorted_experts]
    scattered = torch.full((2, M), -1, device=experts.device)
    scattered[:, compact_slot] = torch.stack([order, compact])                  # each slot is written once
    pair, slot_compact = scattered
    slot, compact = torch.empty(2, T * K, dtype=torch.int64, device=experts.device).index_copy_(
        1, order, torch.stack([compact_slot, compact])).view(2, T, K)
    tile_expert = torch.searchsorted(ends, torch.arange(0, M, BLOCK, device=experts.device), right=True)
    return Plan(slot, pair.div(K, rounding_mode="floor"), pair, torch.where(tile_expert < n_experts, tile_expert, -1).int(),
                ends.int(), counts, order // K, compact_slot, slot_compact, compact)


def permute(x, plan: Plan, recipe: Recipe):
    """Tokens [T, D] (bf16 or FP8) -> slots [M, D], zeros in the padding."""
    if recipe.permute == "fused":
        return kernels.gather_rows(x, plan.token, plan.tile_expert)
    return kernels.gather_rows(kernels.gather_rows(x, plan.compact_token), plan.slot_compact, plan.tile_expert)


def unpermute(y: Tensor, plan: Plan, recipe: Recipe) -> Tensor:
    """Slots [M, D] bf16 -> tokens [T, D] bf16: the sum of each token's K rows."""
    if recipe.permute == "fused":
        return kernels.sum_rows(y, plan.slot)
    return kernels.sum_rows(kernels.gather_rows(y, plan.compact_slot), plan.compact)


def spread(probs: Tensor, plan: Plan) -> Tensor:
    """probs [T, K] fp32 -> one for each slot [M], 0 in the padding (index -1 meets the appended zero)."""
    return F.pad(probs.flatten(), (0, 1))[plan.pair]


# ---------------------------------------------------------------------------------------------------------------------
# the layer

def transpose(q: QTensor, plan: Plan, recipe: Recipe, tensor: str, rows: Tensor | None = None) -> QTensor:
    """Row-wise FP8 [M, C] -> column-wise FP8 [C, M]. rows: permute q [T, C] by them on the way."""
    if recipe.transpose == "requant":
        return requantizing_transpose(q if rows is None else permute(q, plan, recipe), plan, recipe, tensor)
    if rows is not None and recipe.permute == "unfused":
        q, rows = permute(q, plan, recipe), None
    target = kernels.expert_scale(q.scale, rows, plan.ends) if recipe.granularity == "row" else None
    return kernels.scaling_aware_transpose(q, rows, target, plan.tile_expert)


class FP8Experts(torch.autograd.Function):
    """The expert layer in FP8, the paper's dataflow with its alternatives. Margin: explicit casts so far, flow / naive.

    x [T, D] bf16, probs [T, K] fp32, w1 [E, 2F, D] and w2 [E, D, F] the master weights (their gradients come in their
    dtype), q1 and q2 their (W, W^T) in FP8 -> [T, D] bf16.
    """

    @staticmethod
    def forward(ctx, x, probs, w1, w2, q1, q2, plan, recipe):
        prob = spread(probs, plan)
        xq = quantize(x, recipe, "X", "forward")                                              # 1 / 1   Q(X): T rows, not M
        h = fc1(xq, q1[0], plan, recipe)                                                      #         permute, fprop
        if recipe.swiglu == "fused":
            aq = kernels.swiglu_quantize(h, prob, recipe.scales, recipe.granularity, plan.tile_expert)
        else:
            aq = quantize(kernels.swiglu(h, prob, plan.tile_expert), recipe, "A", "forward")  # 1 / 2   Q(A)
        y = gemm(aq, q2[0], plan, recipe)                                                     #         fprop
        ctx.plan, ctx.recipe, ctx.q1, ctx.q2 = plan, recipe, q1, q2
        ctx.dtypes = w1.dtype, w2.dtype
        ctx.xq, ctx.prob = xq, prob
        ctx.h = None if recipe.recompute else h
        ctx.aq = None if recipe.swiglu == "fused" else aq      # fused backward makes A again from H; unfused, a cast would
        return unpermute(y, plan, recipe)

    @staticmethod
    def backward(ctx, dout):
        plan, recipe, q1, q2, xq, prob = ctx.plan, ctx.recipe, ctx.q1, ctx.q2, ctx.xq, ctx.prob
        h = fc1(xq, q1[0], plan, recipe) if recipe.recompute else ctx.h
        dyq = permute(quantize(dout, recipe, "dY", "backward"), plan, recipe)                 # 2 / 3   Q(dY)
        da = gemm(dyq, q2[1], plan, recipe)                                                   #         dgrad
        if recipe.swiglu == "fused":
            dhq, dprob, aq = kernels.swiglu_backward_quantize(da, h, prob, recipe.scales, recipe.granularity,
                                                              plan.tile_expert)
        else:
            aq = ctx.aq
            dh, dprob = kernels.swiglu_backward(da, h, prob, plan.tile_expert)
            dhq = quantize(dh, recipe, "dH", "backward")                                      # 2 / 4   Q(dH)
        dx = unpermute(gemm(dhq, q1[1], plan, recipe), plan, recipe)                          #         dgrad
        dw2 = wgrad(transpose(dyq, plan, recipe, "dY"),                                       # 2 / 6   DQ, Q'(dY)
                    transpose(aq, plan, recipe, "A"), plan, recipe, ctx.dtypes[1])            # 2 / 8   DQ, Q'(A)
        dw1 = wgrad(transpose(dhq, plan, recipe, "dH"),                                       # 2 / 10  DQ, Q'(dH)
                    transpose(xq, plan, recipe, "X", plan.token), plan, recipe, ctx.dtypes[0])  # 2 / 12  DQ, Q'(X)
        return dx, dprob[plan.slot], dw1, dw2, None, None, None, None


def gemm(a: QTensor, w: QTensor, plan: Plan, recipe: Recipe) -> Tensor:
    return kernels.grouped_gemm(a, w, plan.tile_expert, plan.ends, recipe.granularity, recipe.promote)


def wgrad(a: QTensor, b: QTensor, plan: Plan, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    return kernels.grouped_wgrad(a, b, plan.ends, recipe.granularity, recipe.promote, dtype)


def fc1(xq: QTensor, w: QTensor, plan: Plan, recipe: Recipe) -> Tensor:
    return gemm(permute(xq, plan, recipe), w, plan, recipe)


class BF16Experts(torch.autograd.Function):
    """The baseline: the same plan, the same permute and SwiGLU kernels, torch's grouped GEMM. q1 and q2 are bf16.

    It keeps what makes it fast: X permuted, H and A, as autograd would.
    """

    @staticmethod
    def forward(ctx, x, probs, w1, w2, q1, q2, plan, recipe):
        prob = spread(probs, plan)
        xp = permute(x, plan, recipe)
        h = F.grouped_mm(xp, q1.mT, offs=plan.ends)
        a = kernels.swiglu(h, prob, plan.tile_expert)
        y = F.grouped_mm(a, q2.mT, offs=plan.ends)
        ctx.plan, ctx.recipe, ctx.q1, ctx.q2, ctx.prob = plan, recipe, q1, q2, prob
        ctx.saved = (x,) if recipe.recompute else (xp, h, a)
        return unpermute(y, plan, recipe)

    @staticmethod
    def backward(ctx, dout):
        plan, recipe, q1, q2, prob = ctx.plan, ctx.recipe, ctx.q1, ctx.q2, ctx.prob
        if recipe.recompute:
            xp = permute(ctx.saved[0], plan, recipe)
            h = F.grouped_mm(xp, q1.mT, offs=plan.ends)
            a = kernels.swiglu(h, prob, plan.tile_expert)
        else:
            xp, h, a = ctx.saved
        dy = permute(dout.contiguous(), plan, recipe)
        dh, dprob = kernels.swiglu_backward(F.grouped_mm(dy, q2, offs=plan.ends), h, prob, plan.tile_expert)
        dx = unpermute(F.grouped_mm(dh, q1, offs=plan.ends), plan, recipe)
        dw2 = F.grouped_mm(dy.t(), a, offs=plan.ends)
        dw1 = F.grouped_mm(dh.t(), xp, offs=plan.ends)
        return dx, dprob[plan.slot], dw1, dw2, None, None, None, None


FUNCTION = {"fp8": FP8Experts, "bf16": BF16Experts}          # by a recipe's precision


class Experts(nn.Module):
    """E SwiGLU experts with fp32 master weights: w1 [E, 2F, D] (gate, then up), w2 [E, D, F].

    `cast_weights()` must follow every change of the weights: once per optimizer step, for all its micro-batches.
    Raises ValueError unless d_model and d_expert are multiples of 128.
    """

    def __init__(self, n_experts: int, d_model: int, d_expert: int, recipe: Recipe):
        super().__init__()
        for name, width in (("d_model", d_model), ("d_expert", d_expert)):
            if width % BLOCK or width <= 0:
                raise ValueError(f"{name}={width} must be a positive multiple of {BLOCK}: FP8 scales cover {BLOCK} elements")
        self.recipe = recipe
        self.w1 = nn.Parameter(torch.randn(n_experts, 2 * d_expert, d_model) * d_model ** -0.5)
        self.w2 = nn.Parameter(torch.randn(n_experts, d_model, d_expert) * d_expert ** -0.5)
        self.operands = None

    def cast_weights(self) -> None:
        self.operands = cast_weight(self.w1, self.recipe, "W1"), cast_weight(self.w2, self.recipe, "W2")

    def forward(self, x: Tensor, probs: Tensor, plan: Plan) -> Tensor:
        """x [T, D] bf16, probs [T, K] fp32, the plan of the chosen experts -> [T, D] bf16."""
        if self.operands is None:
            raise RuntimeError("the expert weights were never cast: call cast_weights() after each change of the weights")
        return FUNCTION[self.recipe.precision].apply(x, probs, self.w1, self.w2, *self.operands, plan, self.recipe)


# ---------------------------------------------------------------------------------------------------------------------
# python fp8flow.py: the ledger and the double-quantization table anywhere, the time of the layer on a GPU

def random_layer(T: int, D: int, width: int, E: int, K: int, device, dtype=torch.float32):
    """(x, probs, plan, w1, w2, dout) of a layer with random routing; x, probs and the weights want gradients."""
    torch.manual_seed(0)
    scores, chosen = torch.rand(T, E, device=device).softmax(-1).topk(K, dim=-1)
    probs = (scores / scores.sum(-1, keepdim=True)).requires_grad_()
    x = torch.randn(T, D, device=device, dtype=torch.bfloat16).requires_grad_()
    w1 = (torch.randn(E, 2 * width, D, device=device, dtype=dtype) * D ** -0.5).requires_grad_()
    w2 = (torch.randn(E, D, width, device=device, dtype=dtype) * width ** -0.5).requires_grad_()
    return x, probs, make_plan(chosen, E), w1, w2, torch.randn_like(x)


class Layer:
    """One recipe on given inputs: cast weights once, then call forward() or step() as often as you like."""

    def __init__(self, recipe: Recipe, x, probs, plan, w1, w2, dout):
        self.inputs, self.plan, self.dout, self.recipe = (x, probs, w1, w2), plan, dout, recipe
        self.operands = cast_weight(w1, recipe, "W1"), cast_weight(w2, recipe, "W2")

    def forward(self) -> Tensor:
        return FUNCTION[self.recipe.precision].apply(*self.inputs, *self.operands, self.plan, self.recipe)

    def step(self) -> tuple[Tensor, ...]:
        """(out, dx, dprobs, dw1, dw2)."""
        out = self.forward()
        return out.detach(), *torch.autograd.grad(out, self.inputs, self.dout)


def print_ledger(device) -> None:
    print("\nExplicit casts in one forward and backward of the layer (weights apart, once per optimizer step)")
    cases = [(name, {}) for name in RECIPES]
    for name in ("naive", "flow"):
        for key, choices in CHOICES.items():
            cases += [(name, {key: value}) for value in choices if value != getattr(RECIPES[name], key)]
    for name, changes in cases:
        label = name + "".join(f", {key}={value}" for key, value in changes.items())
        try:
            recipe = switch(RECIPES[name], **changes)
        except ValueError as error:
            print(f"  {label:32}  -  refused: {str(error).split(';')[0].split(':')[0]}")
            continue
        inputs = random_layer(64, 128, 128, 4, 2, device)
        with count_casts() as ledger:
            Layer(recipe, *inputs).step()
        parts = [f"{way}: " + " ".join(f"{c.kind}({c.tensor})" for c in ledger if c.direction == way)
                 for way in ("forward", "backward") if any(c.direction == way for c in ledger)]
        print(f"  {label:32} {len(ledger):2}  {'; '.join(parts)}")


def print_double_quantization(device) -> None:
    print("\nDouble quantization: SQNR in dB against the source, and the share of non-zero elements that become zero, [1024, 2048]")
    columns = ("row-wise fp32", "requantized fp32", "row-wise pow2", "requantized pow2", "direct")
    print(f"  {'':18}" + "".join(f"{c:>26}" for c in columns))
    for kind in kernels.KINDS:
        x = kernels.sample(kind, 1024, 2048, device)
        row = {s: kernels.quantize(x, s) for s in ("fp32", "pow2")}
        again = {s: kernels.dequantize(kernels.quantize(kernels.dequantize(q).t(), s)).t() for s, q in row.items()}
        results = (kernels.dequantize(row["fp32"]), again["fp32"], kernels.dequantize(row["pow2"]), again["pow2"],
                   kernels.dequantize(kernels.scaling_aware_transpose(row["pow2"])).t())
        lost = [((y == 0) & (x != 0)).sum() / (x != 0).sum() for y in results]
        print(f"  {kind:18}" + "".join(f"{kernels.sqnr(y, x):15.2f} ({100 * share:6.3f}%)" for y, share in zip(results, lost)))


LAYERS = ((16384, 2048, 2048, 8, 2), (32768, 2048, 1024, 32, 4), (16384, 4096, 2048, 16, 4))        # T, D, F, E, K
VARIANTS = {
    **RECIPES,
    "flow, requant": switch(RECIPES["flow"], transpose="requant"),
    "flow, swiglu unfused": switch(RECIPES["flow"], swiglu="unfused"),
    "flow, permute unfused": switch(RECIPES["flow"], permute="unfused"),
    "flow-row 128": switch(RECIPES["flow-row"], promote=128),
    "flow-row 256": switch(RECIPES["flow-row"], promote=256),
    "flow-row 1024": switch(RECIPES["flow-row"], promote=1024),
    "flow-row never": switch(RECIPES["flow-row"], promote=None),
    "bf16, recompute": switch(RECIPES["bf16"], recompute=True),
    "flow, recompute": switch(RECIPES["flow"], recompute=True),
}
SHARES = {"GEMM": ("gemm", "wgrad", "cutlass", "Gemm"), "transpose": ("transpose", "expert_scale"), "SwiGLU": ("swiglu",),
          "cast": ("quantize",), "permute": ("gather_rows", "sum_rows")}


def time_shares(step) -> dict[str, float]:
    """Milliseconds of GPU time by kind of kernel in one step, from the profiler."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(4):
            step()
        torch.cuda.synchronize()
    shares = dict.fromkeys([*SHARES, "other"], 0.0)
    for event in prof.key_averages():
        kind = next((k for k, names in SHARES.items() if any(n in event.key for n in names)), "other")
        shares[kind] += event.self_device_time_total / 4e3
    return shares


def print_layer_times(device) -> None:
    import triton
    bench = kernels.Bench(device)
    print("\nThe layer, forward + backward, weights already cast: median ms as a CUDA graph, speed-up over bf16 timed right before,"
          "\nms launched from Python; GPU time by kind of kernel, ms; MB held for backward; SQNR in dB of (out, dx, dprobs, dw1,"
          "\ndw2) against the bf16 layer")
    for shape in LAYERS:
        print("T {}, D {}, F {}, E {}, k {}".format(*shape))
        print(f"  {'':22}{'ms':>8}{'x bf16':>8}{'Python':>8}" + "".join(f"{k:>10}" for k in (*SHARES, "other"))
              + f"{'held MB':>10}{'x bf16':>8}{'peak MB':>9}   SQNR")
        inputs = random_layer(*shape, device, torch.bfloat16)               # bf16 masters: every recipe writes bf16 gradients
        bf16, bf16_held = Layer(RECIPES["bf16"], *inputs), None
        reference = bf16.step()
        for name, recipe in VARIANTS.items():
            layer = Layer(recipe, *inputs)
            results = layer.step()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            out = layer.forward()
            held = (torch.cuda.memory_allocated() - before - out.nbytes) / 1e6
            del out
            torch.cuda.reset_peak_memory_stats()
            layer.step()
            peak = (torch.cuda.max_memory_allocated() - before) / 1e6
            bf16_held = bf16_held or held
            bf16_ms, ms = (triton.testing.do_bench_cudagraph(step, rep=80, return_mode="median") for step in (bf16.step, layer.step))
            eager = triton.testing.do_bench(layer.step, warmup=20, rep=100, return_mode="median")
            shares = time_shares(layer.step)
            quality = " ".join(f"{kernels.sqnr(a, b):.1f}" for a, b in zip(results, reference)) if recipe.precision == "fp8" else ""
            print(f"  {name:22}{ms:8.3f}{bf16_ms / ms:8.2f}{eager:8.3f}" + "".join(f"{v:10.3f}" for v in shares.values())
                  + f"{held:10.1f}{held / bf16_held:8.2f}{peak:9.0f}   {quality}", flush=True)
            del layer, results
        del inputs, bf16, reference
        T, D, width, E, K = shape
        print("  its GEMMs alone, experts of equal size")
        kernels.bench_gemm(bench, T, D, E, K, width, device, (512, None))


def spread_of(x: Tensor, ref: Tensor, axis: int) -> str:
    """SQNR in dB of every row (axis -1) or column (axis -2) of dW [E, N, K]: median, worst percentile, worst; and how many
    came out all zero that should not have."""
    x, ref = x.double(), ref.double()
    signal, noise = ref.square().sum(axis), (x - ref).square().sum(axis)
    db = 10 * torch.log10(signal / noise.clamp(min=1e-300))[signal > 0]
    dead = ((x == 0).all(axis) & (signal > 0)).sum()
    low = db.flatten().kthvalue(max(1, db.numel() // 100)).values
    return f"{db.median():6.1f}{low:7.1f}{db.min():7.1f}{int(dead):6}"


def print_real(path: str, device) -> None:
    """The same questions on one layer of a trained model: tensors.pt, written by `train.py --save-tensors`."""
    saved = torch.load(path, map_location=device, weights_only=True)
    x, probs, dout = saved["x"].requires_grad_(), saved["probs"].requires_grad_(), saved["dout"]
    w1, w2 = (saved[k].requires_grad_() for k in ("w1", "w2"))
    plan = make_plan(saved["chosen"], len(w1))
    print(f"\n{path}: layer {saved['layer']} of {saved['recipe']} after {saved['step']} steps, T {len(x)}, D {x.shape[1]}, "
          f"F {w2.shape[2]}, E {len(w1)}, k {probs.shape[1]}, counts {plan.counts.min()}..{plan.counts.max()}")
    flow, used = RECIPES["flow"], (plan.tile_expert >= 0).repeat_interleave(BLOCK)
    bf16 = Layer(RECIPES["bf16"], x, probs, plan, w1, w2, dout)
    xp, dy = permute(x.detach(), plan, flow), permute(dout, plan, flow)
    h = F.grouped_mm(xp, bf16.operands[0].mT, offs=plan.ends)
    prob = spread(probs.detach(), plan)
    a = kernels.swiglu(h, prob, plan.tile_expert)
    dh, _ = kernels.swiglu_backward(F.grouped_mm(dy, bf16.operands[1], offs=plan.ends), h, prob, plan.tile_expert)

    print("Operands: row scales over the tensor, in binades; SQNR in dB and share of non-zero elements that underflow")
    print(f"  {'':4}{'spread':>8}{'1x128':>19}{'row':>19}{'tile, transposed':>21}{'expert, transposed':>21}")
    rows = plan.pair >= 0
    for name, t in (("X", xp), ("A", a), ("dY", dy), ("dH", dh)):
        t = torch.where(used[:, None], t, 0)
        results = []
        for granularity in ("block", "row"):
            q = kernels.quantize(t, granularity=granularity)
            target = kernels.expert_scale(q.scale, None, plan.ends) if granularity == "row" else None
            results += [kernels.dequantize(q), kernels.dequantize(kernels.scaling_aware_transpose(q, target=target)).t()]
        scales = q.scale[0][rows & (t != 0).any(1)].log2()
        cells = [f"{kernels.sqnr(y[rows], t[rows]):8.2f} ({100 * ((y == 0) & (t != 0))[rows].sum() / (t != 0)[rows].sum():6.3f}%)"
                 for y in (results[0], results[2], results[1], results[3])]
        print(f"  {name:4}{scales.max() - scales.min():8.0f}" + "  ".join(f"{c:>19}" for c in cells))

    print("dW against bf16: SQNR in dB, then of its rows and of its columns: median, worst 1%, worst, lost (all zero)")
    reference = bf16.step()
    print(f"  {'':16}{'out':>6}{'dx':>6}{'dprobs':>7}{'dw1':>6}   {'rows':<26}   {'columns':<26}{'dw2':>6}   {'rows':<26}   columns")
    for name in ("naive", "flow", "flow-row", "flow-row 2048", "flow-row never"):
        recipe = {**VARIANTS, "flow-row 2048": switch(RECIPES["flow-row"], promote=2048)}[name]
        out, dx, dprobs, dw1, dw2 = Layer(recipe, x, probs, plan, w1, w2, dout).step()
        overall = [kernels.sqnr(u, v) for u, v in zip((out, dx, dprobs), reference)]
        print(f"  {name:16}" + "{:6.1f}{:6.1f}{:7.1f}".format(*overall) + "".join(
            f"{kernels.sqnr(got, want):6.1f}   {spread_of(got, want, -1)}   {spread_of(got, want, -2)}"
            for got, want in ((dw1, reference[3]), (dw2, reference[4]))))

    if device.type == "cuda":
        print("Truncation on these operands: dW2 by promotion interval against 128: relative difference (signed bias), %")
        q = [kernels.quantize(torch.where(used[:, None], t, 0), granularity="row") for t in (dy, a)]
        q = [kernels.scaling_aware_transpose(t, None, kernels.expert_scale(t.scale, None, plan.ends)) for t in q]
        exact = kernels.grouped_wgrad(*q, plan.ends, "row", 128).double()
        for promote in (256, 512, 1024, 2048, None):
            d = kernels.grouped_wgrad(*q, plan.ends, "row", promote).double() - exact
            print(f"  {promote or 'never':<6} {100 * d.norm() / exact.norm():8.4f} ({100 * (d * exact.sign()).sum() / exact.abs().sum():+8.4f})")


def main() -> None:
    parser = argparse.ArgumentParser(prog="fp8flow.py", description="The cast ledger, the double-quantization table, the layer's times.")
    parser.add_argument("--tensors", metavar="PATH", help="instead: the numerics of a trained layer, saved by train.py --save-tensors")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}")
    if args.tensors:
        if not Path(args.tensors).is_file():
            parser.error(f"--tensors {args.tensors!r} is no file: train.py --save-tensors writes one as OUT/RECIPE/tensors.pt")
        return print_real(args.tensors, device)
    print_ledger(device)
    print_double_quantization(device)
    if device.type == "cpu" or not kernels.use_kernels(torch.empty(0, device=device)):
        print("\nno Hopper GPU here: the times of the layer need one")
        return
    print_layer_times(device)


if __name__ == "__main__":
    main()
