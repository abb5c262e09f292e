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
import contextlib
import math
from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
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
    recompute   save only X and the routing, run fc1 again in backward.
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
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}")
        if self.transpose == "direct" and self.scales == "fp32":
            raise ValueError("transpose=direct needs scales=pow2: it shifts exponents, and the ratio of two fp32 scales "
                             "is no power of two; use scales=pow2 or transpose=requant")
        if self.promote is not None and (self.promote < BLOCK or self.promote % BLOCK):
            raise ValueError(f"promote={self.promote} is no interval: give a multiple of {BLOCK}, or never")
        if self.granularity == "block" and self.promote != BLOCK:
            raise ValueError(f"promote={self.promote or 'never'} needs granularity=row: block scales change every {BLOCK} "
                             f"elements, and each step is promoted with its own; use promote={BLOCK} or granularity=row")


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
    """The expert layer in FP8 (paper section 3, figure 2). Margin: explicit casts, flow / naive.

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
            aq = quantize(kernels.swiglu(h, prob, plan.tile_expert), recipe, "A", "forward")  # 0 / 1   Q(A)
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
        self.casts = None

    def cast_weights(self) -> None:
        self.casts = cast_weight(self.w1, self.recipe, "W1"), cast_weight(self.w2, self.recipe, "W2")

    def forward(self, x: Tensor, probs: Tensor, plan: Plan) -> Tensor:
        """x [T, D] bf16, probs [T, K] fp32, the plan of the chosen experts -> [T, D] bf16."""
        if self.casts is None:
            raise RuntimeError("the expert weights were never cast: call cast_weights() after each change of the weights")
        layer = FP8Experts if self.recipe.precision == "fp8" else BF16Experts
        return layer.apply(x, probs, self.w1, self.w2, *self.casts, plan, self.recipe)
