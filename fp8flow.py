"""FP8-Flow-MoE: the expert layer of a Mixture-of-Experts model, trained in FP8 without casts (arXiv 2511.02302).

Why FP8 makes casts. An FP8 tensor is x ~ code * scale: a byte for every element, an fp32 scale for a block of 128 of
them, chosen so that the largest of the 128 just fits. A matrix product sums along one axis,

    y[m, n] = sum over k of x[m, k] w[n, k] = sum over blocks of s_x s_w (sum over k in the block of codes),

and a scale can leave the inner sum, which the tensor core computes, only if it is constant over it. So the blocks lie
along the axis that is summed over. Outputs (fprop) and input gradients (dgrad) sum along a tensor's rows; weight
gradients (wgrad) sum over tokens, along its columns. The same tensor is needed twice, with scales along either axis.

An expert layer is two grouped linears, fc1 and fc2, around SwiGLU: H = X W1^T, A = SwiGLU(H) * prob, Y = A W2^T. In one
forward and backward, four tensors enter GEMMs, each twice:

    tensor           made by                                   row-wise      column-wise
    X   [M, D]       layer input, sent to the experts          fc1 fprop     fc1 wgrad
    A   [M, F]       SwiGLU, times the router's probability    fc2 fprop     fc2 wgrad
    dY  [M, D]       output gradient, sent to the experts      fc2 dgrad     fc2 wgrad
    dH  [M, 2F]      SwiGLU backward                           fc1 dgrad     fc1 wgrad

The naive dataflow casts each of the four three times: quantize row-wise (Q), dequantize (DQ), quantize column-wise
(Q'). That is 12 explicit casts, launches whose only job is to change the precision of an activation. And it rounds
twice: 1.07 at scale 1 becomes the code 1.125; at another scale, 0.7, that is 1.607, whose nearest code 1.625 stands for
1.1375, 6% off, where rounding 1.07 at 0.7 once gives 1.05, 2% off. At scale 0.5, 1.125 is 2.25, a code, and stays:
scales that are powers of two move exponents, which is exact while codes stay normal, 2^-6 or more. (The direct
transpose shares one scale in a 128x128 tile: rows far smaller than the largest round to subnormal codes or vanish.)
That leaves one dataflow with switches:

    switch      naive      flow      what flow removes
    transpose   requant    direct    DQ and Q' of all four tensors: -8 casts (the transpose only shifts exponents)
    swiglu      unfused    fused     Q(A) and Q(dH): -2 casts (SwiGLU and its backward emit FP8)
    permute     unfused    fused     launches and traffic (permute and pad are one gather)
    scales      fp32       pow2      the double quantization error
    recompute   off        off       (on: H is not kept but made again in backward, from X in FP8)

Q(X) at the entry of forward and Q(dY) at the entry of backward are left: 2 casts.

Reading order: Recipe, Plan, the switches, FP8Experts. `python fp8flow.py` prints the casts of every recipe and of every
switch flipped, the double-quantization table and, on a GPU, the time of the layer; `--trace SPEC` prints every launch
of one layer.

Shapes: T tokens, k experts per token, E experts, M padded token slots, D model width, F expert width.
"""
import argparse
import contextlib
import signal
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, pad
from torch.optim.optimizer import register_optimizer_step_post_hook

import kernels
from kernels import ANY, BLOCK, BLOCKS, FLOATS, QTensor, check, check_choice, named, recorded

CHOICES = {"transpose": ("direct", "requant"), "swiglu": ("fused", "unfused"), "permute": ("fused", "unfused"),
           "scales": ("pow2", "fp32"), "recompute": ("off", "on")}


@dataclass(frozen=True)
class Recipe:
    """How the expert layer computes. The defaults are `flow`.

    precision   "fp8" | "bf16": bf16 has the same routing plan and fused kernels, torch's grouped GEMM, and of the
                switches only `recompute`.
    transpose   "direct": shift exponents | "requant": dequantize, transpose, quantize again.
    swiglu      "fused" with quantization | "unfused".
    permute     "fused" with padding | "unfused": permute, then pad.
    scales      "pow2" | "fp32" (amax/448).
    recompute   "off" | "on": keep only X and the routing, run fc1 again in backward (swiglu=unfused keeps A too: a cast
                would make it).
    Raises ValueError for a combination that has no meaning.
    """
    precision: str = "fp8"
    transpose: str = "direct"
    swiglu: str = "fused"
    permute: str = "fused"
    scales: str = "pow2"
    recompute: str = "off"

    def __post_init__(self):
        check_choice("precision", self.precision, ("fp8", "bf16"))
        for name, choices in CHOICES.items():
            check_choice(name, value := getattr(self, name), choices)
            if self.precision == "bf16" and name != "recompute" and value != choices[0]:
                raise ValueError(f"{name}={value} is a switch of FP8: not for bf16, use naive or flow")
        if self.transpose == "direct" and self.scales == "fp32":
            raise ValueError("transpose=direct needs scales=pow2: it shifts exponents, and the ratio of two fp32 "
                             "scales is no power of two; use scales=pow2 or transpose=requant")


RECIPES = {"bf16": Recipe(precision="bf16"),
           "naive": Recipe(transpose="requant", swiglu="unfused", permute="unfused", scales="fp32"),
           "flow": Recipe()}


def parse_spec(spec: str) -> Recipe:
    """A recipe's name and the switches that differ from it: "flow", "flow,swiglu=unfused". Raises ValueError."""
    name, *changes = spec.split(",")
    check_choice("recipe", name, RECIPES)
    pairs = [change.partition("=")[::2] for change in changes]
    for key, value in pairs:
        check_choice("switch", key, CHOICES)
        check_choice(key, value, CHOICES[key])
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"recipe={spec!r} sets a switch twice: set it once")
    return replace(RECIPES[name], **dict(pairs))


# ---- the cast ledger, read from the trace ---------------------------------------------------------------------------

@contextlib.contextmanager
def count_casts():
    """`with count_casts() as casts:` the explicit casts of activations, as kernels.Launch, in the order in which they
    ran: a list, filled at the end. Weights, cast once per optimizer step, do not count; `kernels.trace` shows them."""
    casts = []
    with kernels.trace() as launches:
        yield casts
    casts += [launch for launch in launches if launch.cast]


# ---- the routing plan -----------------------------------------------------------------------------------------------

class Unpadded(NamedTuple):
    """What the unfused permute needs besides: pairs sorted by expert without padding are rows [T*k]."""
    token: Tensor            # [T*k] int64   the token of each row
    slot: Tensor             # [T*k] int64   the slot of each row
    row_of_slot: Tensor      # [M] int64     the row in each slot, -1: padding
    row_of_pair: Tensor      # [T, k] int64  the row of each pair


class Plan(NamedTuple):
    """Where each (token, choice) pair goes. Every shape is static: nothing here waits for the GPU."""
    slot: Tensor             # [T, k] int64  the slot of each pair
    token: Tensor            # [M] int64     the token in each slot, -1: padding
    pair: Tensor             # [M] int64     the pair t*k + choice in each slot, -1: padding
    tile_expert: Tensor      # [M/128] int32 the expert of each tile, -1: unused
    ends: Tensor             # [E] int32     where each expert's slots end, a multiple of 128
    counts: Tensor           # [E] int64     pairs of each expert
    unpadded: Unpadded


def make_plan(experts: Tensor, n_experts: int, block: int = BLOCK) -> Plan:
    """experts [T, k] int64, the chosen experts of each token, each in 0..E-1 -> Plan. No sync, no atomics.

    Each expert's slots start at a multiple of 128 and are padded to one. M = round_up(T*k + E*127, 128) is enough,
    whatever the router does. Three tokens that choose experts 1, 0, 1 of two, in blocks of 4
    (M = round_up(3 + 2*3, 4) = 12):

        sorted by expert   expert 0: token 1 | expert 1: tokens 0, 2
        slots              1 . . . | 0 2 . . | . . . .        token (dots are -1); slot = [[4], [0], [5]]
        tiles              0         1         -1             tile_expert;         ends = [4, 8], counts = [1, 2]

    Raises ValueError for other shapes and dtypes, on a CPU for values out of range, too; on a GPU, where reading them
    is a sync, `gather` meets those with a device-side assertion.
    """
    check("experts", experts, (torch.int64,), kernels.ANY, kernels.ANY)
    if experts.device.type == "cpu" and not kernels.INTERPRET:
        kernels.check_values("experts", experts, 0, n_experts)
    (T, k), device = experts.shape, experts.device
    M = -(-(T * k + n_experts * (block - 1)) // block) * block
    expert_of_row, pair_of_row = experts.flatten().sort(stable=True)
    bounds = torch.searchsorted(expert_of_row, torch.arange(n_experts + 1, device=device))
    counts = bounds.diff()                                          # rows of expert e: bounds[e] to bounds[e + 1]
    ends = ((counts + block - 1) // block * block).cumsum(0)
    row = torch.arange(T * k, device=device)
    slot_of_row = row + (pad(ends[:-1], (1, 0)) - bounds[:-1]).gather(0, expert_of_row)     # -1 fails; [] would wrap
    pair, row_of_slot = torch.full((2, M), -1, device=device)
    pair[slot_of_row], row_of_slot[slot_of_row] = pair_of_row, row  # each place is written once
    slot, row_of_pair = torch.empty((2, T * k), dtype=torch.int64, device=device)
    slot[pair_of_row], row_of_pair[pair_of_row] = slot_of_row, row
    tile_expert = torch.searchsorted(ends, torch.arange(0, M, block, device=device), right=True)
    return Plan(slot=slot.view(T, k), token=pair.div(k, rounding_mode="floor"), pair=pair,
                tile_expert=torch.where(tile_expert < n_experts, tile_expert, -1).int(), ends=ends.int(), counts=counts,
                unpadded=Unpadded(pair_of_row // k, slot_of_row, row_of_slot, row_of_pair.view(T, k)))


def spread(probs: Tensor, plan: Plan) -> Tensor:
    """probs [T, k] fp32 -> one for each slot [M], 0 in the padding (index -1 meets the appended zero)."""
    return pad(probs.flatten(), (0, 1))[plan.pair]


# ---- the switches, a function each ----------------------------------------------------------------------------------

def permute(x, plan: Plan, recipe: Recipe):
    """Tokens [T, D] (bf16 or FP8) -> slots [M, D], zeros in the padding."""
    if recipe.permute == "fused":
        return kernels.gather_rows(x, plan.token, plan.tile_expert)
    rows = kernels.gather_rows(x, plan.unpadded.token)
    return kernels.gather_rows(rows, plan.unpadded.row_of_slot, plan.tile_expert)


def unpermute(y: Tensor, plan: Plan, recipe: Recipe) -> Tensor:
    """Slots [M, D] bf16 -> tokens [T, D] bf16: the sum of each token's k rows."""
    if recipe.permute == "fused":
        return kernels.sum_rows(y, plan.slot)
    return kernels.sum_rows(kernels.gather_rows(y, plan.unpadded.slot), plan.unpadded.row_of_pair)


def swiglu(h: Tensor, prob: Tensor, plan: Plan, recipe: Recipe) -> QTensor:
    """H [M, 2F] bf16 -> A [M, F] in FP8."""
    if recipe.swiglu == "fused":
        return kernels.swiglu_quantize(h, prob, recipe.scales, plan.tile_expert)
    return kernels.quantize(kernels.swiglu(h, prob, plan.tile_expert), recipe.scales)


def swiglu_backward(da: Tensor, h: Tensor, prob: Tensor, a: QTensor | None, plan: Plan, recipe: Recipe):
    """dA [M, F] and H [M, 2F] bf16 -> dH [M, 2F] in FP8, dprob [M] fp32, A [M, F] in FP8 (fused: made again from H)."""
    if recipe.swiglu == "fused":
        return kernels.swiglu_backward_quantize(da, h, prob, recipe.scales, plan.tile_expert)
    dh, dprob = kernels.swiglu_backward(da, h, prob, plan.tile_expert)
    return kernels.quantize(dh, recipe.scales), dprob, a


def column_wise(q: QTensor, plan: Plan, recipe: Recipe) -> QTensor:
    """Row-wise FP8 [M, C] -> column-wise FP8 [C, M], for wgrad."""
    if recipe.transpose == "direct":
        return kernels.scaling_aware_transpose(q, None, plan.tile_expert)
    return kernels.quantize(kernels.transpose(kernels.dequantize(q, torch.bfloat16)), recipe.scales)


def permuted_column_wise(x: QTensor, plan: Plan, recipe: Recipe) -> QTensor:
    """X as it was kept, [T, D] -> [D, M]: the direct transpose can permute as it reads, the others permute first."""
    if recipe.transpose == "direct" and recipe.permute == "fused":
        return kernels.scaling_aware_transpose(x, plan.token, plan.tile_expert)
    return column_wise(permute(x, plan, recipe), plan, recipe)


# ---- what is kept for backward --------------------------------------------------------------------------------------

def pack(ctx, *values) -> None:
    """save_for_backward, for QTensors and None too. What hangs on ctx as an attribute lives as long as the graph; what
    is saved is freed as soon as backward has used it."""
    ctx.scales = [value.scales if isinstance(value, QTensor) else None for value in values]
    ctx.save_for_backward(*(t for v in values for t in (v[:2] if isinstance(v, QTensor) else (v, None))))


def unpack(ctx) -> list:
    saved = ctx.saved_tensors
    return [QTensor(data, scale, scales) if scales else data
            for data, scale, scales in zip(saved[::2], saved[1::2], ctx.scales)]


def keep(ctx, x: QTensor, h: Tensor, a: QTensor, *others) -> None:
    """X in FP8 and unpermuted: T rows, not M. H, unless it is made again. A only where that would need a cast: the
    fused backward of SwiGLU makes it again from H on its way."""
    h = h if ctx.recipe.recompute == "off" else None
    a = a if ctx.recipe.swiglu == "unfused" else None
    pack(ctx, x, h, a, *others)


def kept(ctx) -> list:
    x, h, a, prob, w1, *others = unpack(ctx)
    if h is None:
        xp = named("X", permute(x, ctx.plan, ctx.recipe))
        h = named("H", kernels.grouped_gemm(xp, w1, ctx.plan.tile_expert, ctx.plan.ends))
    return [x, h, a, prob, *others]


# ---- the layer ------------------------------------------------------------------------------------------------------

class FP8Experts(torch.autograd.Function):
    """The expert layer in FP8: a tensor a line. The margin numbers the explicit casts in the order in which they run.

    x [T, D] bf16, probs [T, k] fp32; w1 [E, 2F, D] and w2 [E, D, F], the master weights, are passed only to receive
    their gradients (in their dtype): what is multiplied is `operands`, (W1, W1^T), (W2, W2^T) in FP8, cast once per
    optimizer step. -> [T, D] bf16. `named` tells a trace for which tensor a line works.
    A name is one of the tensors in its latest form (dy: bf16, then FP8, then permuted, then column-wise); the form
    in FP8 before is freed, unless `keep` has it.
    """

    @staticmethod
    @kernels.direction("forward")
    def forward(ctx, x, probs, w1, w2, operands, plan, recipe):
        ctx.plan, ctx.recipe, ctx.dtype = plan, recipe, w1.dtype
        (w1, w1_t), (w2, w2_t) = operands
        prob = spread(probs, plan)
        x = named("X", kernels.quantize(x, recipe.scales))                          # naive 1     flow 1   Q(X)
        xp = named("X", permute(x, plan, recipe))
        h = named("H", kernels.grouped_gemm(xp, w1, plan.tile_expert, plan.ends))
        a = named("A", swiglu(h, prob, plan, recipe))                               # naive 2              Q(A)
        y = named("Y", kernels.grouped_gemm(a, w2, plan.tile_expert, plan.ends))
        y = named("Y", unpermute(y, plan, recipe))
        keep(ctx, x, h, a, prob, w1, w1_t, w2_t)
        return y

    @staticmethod
    @once_differentiable
    @kernels.direction("backward")
    def backward(ctx, dy):
        plan, recipe, dtype = ctx.plan, ctx.recipe, ctx.dtype
        x, h, a, prob, w1_t, w2_t = kept(ctx)
        dy = named("dY", kernels.quantize(dy, recipe.scales))                       # naive 3     flow 2   Q(dY)
        dy = named("dY", permute(dy, plan, recipe))
        da = named("dA", kernels.grouped_gemm(dy, w2_t, plan.tile_expert, plan.ends))
        dh, dprob, a = named("dH", swiglu_backward(da, h, prob, a, plan, recipe))   # naive 4              Q(dH)
        del da
        dx = named("dX", kernels.grouped_gemm(dh, w1_t, plan.tile_expert, plan.ends))
        dx = named("dX", unpermute(dx, plan, recipe))
        dy = named("dY", column_wise(dy, plan, recipe))                             # naive 5 6            DQ(dY) Q'(dY)
        a = named("A", column_wise(a, plan, recipe))                                # naive 7 8            DQ(A) Q'(A)
        dw2 = named("dW2", kernels.grouped_wgrad(dy, a, plan.ends, dtype))
        dh = named("dH", column_wise(dh, plan, recipe))                             # naive 9 10           DQ(dH) Q'(dH)
        x = named("X", permuted_column_wise(x, plan, recipe))                       # naive 11 12          DQ(X) Q'(X)
        dw1 = named("dW1", kernels.grouped_wgrad(dh, x, plan.ends, dtype))
        return dx, dprob[plan.slot], dw1, dw2, None, None, None     # no gradient for operands, plan and recipe


@recorded()
def torch_grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    wide = torch.float32 if a.is_cpu else a.dtype           # few CPUs multiply bf16 at the speed of fp32; sums alike
    return grouped_mm(a.to(wide), b.to(wide), offs=ends).to(a.dtype)


def keep_bf16(ctx, x: Tensor, xp: Tensor, h: Tensor, a: Tensor, *others) -> None:
    """Chosen for speed, as autograd would: X permuted, H and A. With `recompute` only X as it came."""
    pack(ctx, *((x, None, None, None) if ctx.recipe.recompute == "on" else (None, xp, h, a)), *others)


def kept_bf16(ctx) -> list:
    x, xp, h, a, prob, w1, w2 = unpack(ctx)
    if xp is None:
        xp = named("X", permute(x, ctx.plan, ctx.recipe))
        h = named("H", torch_grouped_mm(xp, w1.mT, ctx.plan.ends))
        a = named("A", kernels.swiglu(h, prob, ctx.plan.tile_expert))
    return [xp, h, a, prob, w1, w2]


class BF16Experts(torch.autograd.Function):
    """The baseline: the same plan, permute and SwiGLU kernels, torch's grouped GEMM; operands are W1 and W2 in bf16.

    torch's GEMM writes weight gradients in bf16, which autograd widens for fp32 masters; the FP8 one writes fp32.
    """

    @staticmethod
    @kernels.direction("forward")
    def forward(ctx, x, probs, w1, w2, operands, plan, recipe):
        ctx.plan, ctx.recipe = plan, recipe
        w1, w2 = operands
        prob = spread(probs, plan)
        xp = named("X", permute(x, plan, recipe))
        h = named("H", torch_grouped_mm(xp, w1.mT, plan.ends))
        a = named("A", kernels.swiglu(h, prob, plan.tile_expert))
        y = named("Y", torch_grouped_mm(a, w2.mT, plan.ends))
        y = named("Y", unpermute(y, plan, recipe))
        keep_bf16(ctx, x, xp, h, a, prob, w1, w2)
        return y

    @staticmethod
    @once_differentiable
    @kernels.direction("backward")
    def backward(ctx, dy):
        plan, recipe = ctx.plan, ctx.recipe
        xp, h, a, prob, w1, w2 = kept_bf16(ctx)
        dy = named("dY", permute(dy, plan, recipe))
        da = named("dA", torch_grouped_mm(dy, w2, plan.ends))
        dh, dprob = named("dH", kernels.swiglu_backward(da, h, prob, plan.tile_expert))
        dx = named("dX", torch_grouped_mm(dh, w1, plan.ends))
        dx = named("dX", unpermute(dx, plan, recipe))
        dw2 = named("dW2", torch_grouped_mm(dy.t(), a, plan.ends))
        dw1 = named("dW1", torch_grouped_mm(dh.t(), xp, plan.ends))
        return dx, dprob[plan.slot], dw1, dw2, None, None, None


FUNCTION = {"fp8": FP8Experts, "bf16": BF16Experts}          # by a recipe's precision


def cast_weights(w1: Tensor, w2: Tensor, recipe: Recipe) -> tuple:
    """The masters [E, N, K] -> what the GEMMs read: (W, W^T) in FP8 of each, or each in bf16."""
    if recipe.precision == "bf16":
        return w1.detach().bfloat16(), w2.detach().bfloat16()
    return tuple(named(n, kernels.quantize_weight(w.detach(), recipe.scales)) for n, w in (("W1", w1), ("W2", w2)))


_optimizer_steps = [0]


def _count_optimizer_step(*_) -> None:
    _optimizer_steps[0] += 1


register_optimizer_step_post_hook(_count_optimizer_step)     # of every optimizer: fused AdamW leaves `_version` alone


class Experts(nn.Module):
    """E SwiGLU experts with fp32 master weights: w1 [E, 2F, D] (gate, then up), w2 [E, D, F].

    The weights are cast at the first forward and again at the first one after an optimizer step, a write, a load or a
    move: once per step, for all its micro-batches. A write that bumps no version (through `.data` or numpy, or by a
    functional fused optimizer) goes unseen: call `cast_weights()` then.
    Raises ValueError unless d_model and d_expert are multiples of 128.
    """

    def __init__(self, n_experts: int, d_model: int, d_expert: int, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        self.w1 = nn.Parameter(torch.randn(n_experts, 2 * d_expert, d_model) * d_model ** -0.5)
        self.w2 = nn.Parameter(torch.randn(n_experts, d_model, d_expert) * d_expert ** -0.5)
        check("w2, [n_experts, d_model, d_expert],", self.w2, FLOATS, ANY, BLOCKS, BLOCKS)
        self.operands = self.operands_of = None

    def _weights_as_they_are(self) -> tuple:
        return _optimizer_steps[0], *((w._version, w.data_ptr(), w.device, w.dtype) for w in (self.w1, self.w2))

    def cast_weights(self) -> None:
        with torch.inference_mode(False), torch.no_grad():          # what is cast in evaluation serves training too
            self.operands = cast_weights(self.w1, self.w2, self.recipe)
        self.operands_of = self._weights_as_they_are()
        self.cast_from = self.w1.detach(), self.w2.detach()         # alive, so that no others can get their addresses

    @torch.compiler.disable                             # what is compiled around the experts ends here
    def forward(self, x: Tensor, probs: Tensor, plan: Plan) -> Tensor:
        """x [T, D] bf16, probs [T, k] fp32, the plan of the T tokens' experts -> [T, D] bf16. Raises ValueError."""
        T, k = plan.slot.shape
        check("w1", self.w1, (torch.float32, torch.bfloat16), ANY, BLOCKS, BLOCKS)
        check("x", x, (torch.bfloat16,), T, self.w1.shape[2], like=self.w1)
        check("probs", probs, (torch.float32,), T, k, like=self.w1)
        check("plan.ends", plan.ends, (torch.int32,), len(self.w1), like=self.w1)
        if self.operands_of != self._weights_as_they_are():
            self.cast_weights()
        return FUNCTION[self.recipe.precision].apply(x, probs, self.w1, self.w2, self.operands, plan, self.recipe)


# ---- python fp8flow.py: casts and double quantization anywhere, the time of the layer on a GPU ----------------------

def random_layer(T: int, D: int, F: int, E: int, k: int, device, dtype=torch.float32):
    """(x, probs, plan, w1, w2, dy) of a layer with random routing; x, probs and the weights want gradients."""
    torch.manual_seed(0)
    scores, chosen = torch.rand(T, E, device=device).softmax(-1).topk(k, dim=-1)
    probs = (scores / scores.sum(-1, keepdim=True)).requires_grad_()
    x = torch.randn(T, D, device=device, dtype=torch.bfloat16).requires_grad_()
    w1 = (torch.randn(E, 2 * F, D, device=device, dtype=dtype) * D ** -0.5).requires_grad_()
    w2 = (torch.randn(E, D, F, device=device, dtype=dtype) * F ** -0.5).requires_grad_()
    return x, probs, make_plan(chosen, E), w1, w2, torch.randn_like(x)


class Layer:
    """One recipe on given inputs: cast weights once, then call forward() or step() as often as you like."""

    def __init__(self, recipe: Recipe, x, probs, plan, w1, w2, dy):
        self.inputs, self.plan, self.dy, self.recipe = (x, probs, w1, w2), plan, dy, recipe
        self.operands = cast_weights(w1, w2, recipe)

    def forward(self) -> Tensor:
        return FUNCTION[self.recipe.precision].apply(*self.inputs, self.operands, self.plan, self.recipe)

    def step(self) -> tuple[Tensor, ...]:
        """(y, dx, dprobs, dw1, dw2)."""
        y = self.forward()
        return y.detach(), *torch.autograd.grad(y, self.inputs, self.dy)


def print_ledger(device) -> None:
    print("\nExplicit casts in one forward and backward of the layer (weights apart, once per optimizer step)")
    flipped = [f"{name},{key}={value}" for name in ("naive", "flow") for key, choices in CHOICES.items()
               for value in choices if value != getattr(RECIPES[name], key)]
    for spec in (*RECIPES, *(spec for spec in flipped if spec not in ("naive,transpose=direct", "flow,scales=fp32"))):
        with count_casts() as casts:
            Layer(parse_spec(spec), *random_layer(64, 128, 128, 4, 2, device)).step()
        print(f"  {spec:26} {len(casts):2}  " + " ".join(f"{launch.cast}({launch.tensor})" for launch in casts))


def print_trace(spec: str, device) -> None:
    """Every launch of one forward and backward, in order, weights already cast."""
    shape = kernels.LAYERS[0] if device.type == "cuda" else (64, 128, 128, 4, 2)
    layer = Layer(parse_spec(spec), *random_layer(*shape, device))
    with kernels.trace() as launches:
        layer.step()
    print("\n{}: T {}, D {}, F {}, E {}, k {}; MB: each input and output once, slots in use".format(spec, *shape))
    print(f"  {'':3}{'cast':>6}  {'operation':26}{'tensor':8}{'direction':11}{'shape':18}{'in -> out':22}{'MB':>8}")
    short = {torch.float8_e4m3fn: "fp8", torch.bfloat16: "bf16", torch.float32: "fp32"}
    casts = moved = 0
    for i, launch in enumerate(launches, 1):
        casts += bool(launch.cast)
        moved += launches.bytes(launch)
        (_, before), (after_shape, after) = launch.reads[0], launch.writes[0]
        print(f"  {i:3}{casts if launch.cast else '':>6}  {launch.op:26}{launch.tensor:8}{launch.direction:11}"
              f"{' x '.join(map(str, after_shape)):18}{short[before] + ' -> ' + short[after]:22}"
              f"{launches.bytes(launch) / 1e6:8.1f}")
    print(f"  {len(launches):3}{casts:6}  {'launches, casts, MB in all':85}{moved / 1e6:8.1f}")


def samples(R: int, C: int, device) -> dict[str, Tensor]:
    """[R, C] fp32 tensors that look like what a layer quantizes."""
    g = torch.Generator().manual_seed(0)
    x, student = torch.randn(R, C, generator=g), torch.randn(3, R, C, generator=g).square().mean(0).sqrt()
    binades, live = torch.randint(-12, 13, (R, 1), generator=g), torch.arange(R)[:, None] % 7 > 0
    return {"Gaussian": x.to(device), "heavy-tailed": (x / student).to(device),         # Student t, 3 d.o.f.
            "outlier channels": torch.where(torch.arange(C) % 64 == 0, 64 * x, x).to(device),
            "rows over 24 binades": (x * 2.0 ** binades * live).to(device)}             # a seventh of them zero


def print_double_quantization(device) -> None:
    print("\nDouble quantization of [1024, 2048]: SQNR in dB, and the share of non-zero elements that become zero")
    columns = ("row-wise fp32", "requantized fp32", "row-wise pow2", "requantized pow2", "direct")
    print(f"  {'':22}" + "".join(f"{column:>20}" for column in columns))
    for kind, x in samples(1024, 2048, device).items():
        results = []
        for q in (kernels.quantize(x, "fp32"), kernels.quantize(x)):
            again = kernels.quantize(kernels.dequantize(q).t(), q.scales)
            results += [kernels.dequantize(q), kernels.dequantize(again).t()]
        results.append(kernels.dequantize(kernels.scaling_aware_transpose(q)).t())
        lost = [100 * ((y == 0) & (x != 0)).sum() / (x != 0).sum() for y in results]
        cells = (f"{kernels.sqnr(y, x):10.2f} ({share:6.3f}%)" for y, share in zip(results, lost))
        print(f"  {kind:22}" + "".join(cells))


VARIANTS = ("bf16", "naive", "naive,scales=pow2", "naive,transpose=direct,scales=pow2", "flow,permute=unfused", "flow",
            "flow,transpose=requant", "flow,swiglu=unfused", "flow,recompute=on", "bf16,recompute=on")
SHARES = {"GEMM": ("gemm", "cutlass", "Gemm"), "transpose": ("transpose",), "SwiGLU": ("swiglu",),
          "cast": ("quantize",), "permute": ("gather_rows", "sum_rows"), "other": ("",)}      # parts of kernels' names


def time_shares(step) -> dict[str, float]:
    """Milliseconds of GPU time by kind of kernel in one step, from the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        for _ in range(4):
            step()
        torch.cuda.synchronize()
    shares = dict.fromkeys(SHARES, 0.0)
    for event in prof.key_averages():
        kind = next(kind for kind, names in SHARES.items() if any(name in event.key for name in names))
        shares[kind] += event.self_device_time_total / 4e3
    return shares


def bytes_held(layer: Layer) -> int:
    """What one forward leaves on the GPU for its backward, besides its inputs."""
    before = torch.cuda.memory_allocated()
    y = layer.forward()
    return torch.cuda.memory_allocated() - before - y.nbytes


def print_layer_times(device) -> None:
    from triton.testing import do_bench_cudagraph
    print("\nThe layer, forward + backward, weights cast before: median ms as a CUDA graph, speed-up over bf16 timed"
          "\nright before; ms by kind of kernel; MB held for backward; SQNR in dB of (y, dx, dprobs, dw1, dw2)")
    for shape in kernels.LAYERS:
        print("T {}, D {}, F {}, E {}, k {}".format(*shape))
        print(f"  {'':36}{'ms':>8}{'x bf16':>8}" + "".join(f"{kind:>10}" for kind in (*SHARES, "held MB")) + "   SQNR")
        inputs = random_layer(*shape, device, torch.bfloat16)   # bf16 masters: every recipe writes bf16 gradients
        bf16 = Layer(RECIPES["bf16"], *inputs)
        reference = bf16.step()
        for spec in VARIANTS:
            layer = Layer(parse_spec(spec), *inputs)
            quality = [f"{kernels.sqnr(got, want):.1f}" for got, want in zip(layer.step(), reference)]
            bf16_ms, ms = (do_bench_cudagraph(step, rep=80, return_mode="median") for step in (bf16.step, layer.step))
            numbers = (*time_shares(layer.step).values(), bytes_held(layer) / 1e6)
            print(f"  {spec:36}{ms:8.3f}{bf16_ms / ms:8.2f}" + "".join(f"{number:10.3f}" for number in numbers)
                  + "   " + " ".join(quality) * ("bf16" not in spec), flush=True)


def main(argv=None) -> None:
    """The casts of every recipe and switch, the double-quantization table and, on a GPU, the layer's times."""
    parser = argparse.ArgumentParser(prog="fp8flow.py", allow_abbrev=False, description=main.__doc__)
    parser.add_argument("--trace", metavar="SPEC", help="instead: each launch of one layer: flow, flow,swiglu=unfused")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}")
    if args.trace is not None:
        try:
            return print_trace(args.trace, device)
        except ValueError as error:
            parser.error(f"--trace {args.trace}: {error}")
    print_ledger(device)
    print_double_quantization(device)
    if device.type == "cuda" and kernels.use_kernels(torch.empty(0, device=device)):
        print_layer_times(device)
    else:
        print("\nno GPU with FP8 here: the times of the layer need one")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)               # `| head` ends it without a traceback
    main()
