"""FP8-Flow-MoE: the expert layer of a Mixture-of-Experts model, trained in FP8 without casts
(arXiv 2511.02302).

An FP8 tensor is x ~ code * scale: a byte for every element, an fp32 scale for a block of 128 of
them. A matrix product sums codes, and a scale can leave the sum only if it is constant along it. So
blocks lie along the axis that is summed over: for outputs (fprop) and input gradients (dgrad) along
a tensor's rows, for weight gradients (wgrad), which sum over tokens, along its columns. The same
tensor is needed twice, with scales along either axis.

An expert layer is two grouped linears, fc1 and fc2, around SwiGLU: H = X W1^T,
A = SwiGLU(H) * prob, Y = A W2^T. In one forward and backward, four tensors besides the weights
enter GEMMs, each twice:

    tensor           made by                                   row-wise      column-wise
    X   [M, D]       layer input, sent to the experts          fc1 fprop     fc1 wgrad
    A   [M, F]       SwiGLU, times the router's probability    fc2 fprop     fc2 wgrad
    dY  [M, D]       output gradient, sent to the experts      fc2 dgrad     fc2 wgrad
    dH  [M, 2F]      SwiGLU backward                           fc1 dgrad     fc1 wgrad

The naive dataflow casts each of the four three times: quantize row-wise (Q), dequantize (DQ),
quantize column-wise (Q'). That is 12 explicit casts, launches that do no more than change the
precision of an activation or find new scales in it. And it rounds twice: a code at one scale is
seldom a code at another. With powers of two as scales it is one: only its exponent changes, exactly
while codes stay normal, 2^-6 or more. (The direct transpose shares one scale in a 128x128 tile:
rows far smaller than the largest round to subnormal codes or vanish.) That leaves one dataflow with
switches:

    switch      naive      flow      what flow removes
    transpose   unfused    direct    DQ and Q' of all four tensors: -8 casts (exponents are shifted)
    swiglu      unfused    fused     Q(A) and Q(dH): -2 casts (SwiGLU and its backward emit FP8)
    permute     unfused    fused     launches and traffic (permute and pad are one gather)
    scales      fp32       pow2      the double quantization error

Q(X) at the entry of forward and Q(dY) at the entry of backward are left: 2 casts. Between the two
values of `transpose` lies `fused`: DQ, transpose and Q' in one launch, a requantization (RQ), which
counts as one cast a tensor. It moves hardly more bytes than the direct transpose, and with fp32
scales it rounds twice.

Reading order: Recipe, Plan, the layer's definition, the switches, FP8Experts. What follows is the
bf16 baseline, `experts` and `Experts` for other people's models, and how casts are counted.

Shapes: T tokens, k experts per token, E experts, M padded token slots, D model width, F expert
width. The router's weight of a token's choice is `top_k_weights` outside, `probs` [T, k] inside and
`prob` [M] where it stands beside its slot.
"""
import contextlib
import functools
import linecache
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, pad, silu

if __package__:                         # cloned as a package, beside another one called `kernels`
    from . import kernels
    from .kernels import ANY, BLOCK, BY_128, FLOATS, QTensor, check, check_choice
else:
    import kernels
    from kernels import ANY, BLOCK, BY_128, FLOATS, QTensor, check, check_choice

CHOICES = {
    "transpose": ("direct", "fused", "unfused"),
    "swiglu": ("fused", "unfused"),
    "permute": ("fused", "unfused"),
    "scales": ("pow2", "fp32"),
}


@dataclass(frozen=True)
class Recipe:
    """How the expert layer computes. The defaults are `flow`.

    precision   "fp8" | "bf16": bf16 has the same routing plan and fused kernels, torch's grouped
                GEMM, and no switches.
    transpose   "direct": shift exponents | "unfused": dequantize, transpose, quantize again |
                "fused": these three in one launch.
    swiglu      "fused" with quantization | "unfused".
    permute     "fused" with padding | "unfused": permute, then pad.
    scales      "pow2" | "fp32" (amax/448).
    Raises ValueError for a combination that has no meaning.
    """
    precision: str = "fp8"
    transpose: str = "direct"
    swiglu: str = "fused"
    permute: str = "fused"
    scales: str = "pow2"

    def __post_init__(self):
        check_choice("precision", self.precision, ("fp8", "bf16"))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            check_choice(name, value, choices)
            if self.precision == "bf16" and value != choices[0]:
                raise ValueError(f"{name}={value} is a switch of FP8: not for bf16, use naive or "
                                 "flow")
        if self.transpose == "direct" and self.scales == "fp32":
            raise ValueError("transpose=direct needs scales=pow2: it shifts exponents, and the "
                             "ratio of two fp32 scales is no power of two; use scales=pow2 or "
                             "transpose=fused")


RECIPES = {
    "bf16": Recipe(precision="bf16"),
    "naive": Recipe(transpose="unfused", swiglu="unfused", permute="unfused", scales="fp32"),
    "flow": Recipe(),
}


def parse_spec(spec: "str | Recipe") -> Recipe:
    """A recipe's name and the switches that differ from it, "flow" or "flow,swiglu=unfused".

    A Recipe is returned as it is. Raises ValueError for what is neither.
    """
    if isinstance(spec, Recipe):
        return spec
    if not isinstance(spec, str):
        raise ValueError(f"recipe={spec!r} is of type {type(spec).__name__}: give a Recipe or a "
                         "spec such as 'flow' or 'flow,swiglu=unfused'")
    name, *changes = spec.split(",")
    check_choice("recipe", name, RECIPES)
    if name == "bf16" and changes:
        raise ValueError(f"recipe={spec!r} sets a switch of FP8: not for bf16, use naive or flow")
    switches = {}
    for change in changes:
        key, _, value = change.partition("=")
        check_choice("switch", key, CHOICES)
        check_choice(key, value, CHOICES[key])
        if key in switches:
            raise ValueError(f"recipe={spec!r} sets {key} twice: set it once")
        switches[key] = value
    return replace(RECIPES[name], **switches)


# ---- the routing plan ----------------------------------------------------------------------------

class Plan(NamedTuple):
    """Where each token goes. A pair is a token and one of its k experts. M slots hold the pairs
    sorted by expert, each expert padded to a multiple of 128. Every shape is static: nothing waits
    for the GPU."""
    slot: Tensor             # [T, k] int64  the slot of each pair
    token: Tensor            # [M] int64     the token in each slot, -1: padding
    pair: Tensor             # [M] int64     the pair t*k + choice in each slot, -1: padding
    tile_expert: Tensor      # [M/128] int32 the expert of each tile, -1: unused
    ends: Tensor             # [E] int32     where each expert's slots end, a multiple of 128
    unpadded: "Unpadded"


def make_plan(top_k_index: Tensor, num_experts: int, block: int = BLOCK) -> Plan:
    """top_k_index [..., k] int32 or int64, the experts of each token, each in [0, num_experts)
    -> Plan. No sync, no atomics.

    M = round_up(T*k + E*127, 128) is enough, whatever the router does. Two tokens that choose
    experts 2, 0 and 2, 1 of three, in blocks of 4 (M = round_up(2*2 + 3*3, 4) = 16):

                       expert 0 | expert 1 | expert 2 | unused
        pair         = [1 . . .   3 . . .    0 2 . .    . . . .]       a dot is -1
        token        = [0 . . .   1 . . .    0 1 . .    . . . .]
        tile_expert  = [0,        1,         2,         -1]
        ends         = [4,        8,         12]
        slot         = [[8, 0], [9, 4]]                 of the two choices of each token

    Raises ValueError for other shapes and dtypes, on a CPU for values out of range, too; on a GPU
    (and in the interpreter, which does the same), where reading them is a sync, `gather` below
    meets those with an assertion.
    """
    check("top_k_index", top_k_index, (torch.int32, torch.int64), ..., ANY)
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")
    if top_k_index.is_cpu and not kernels.INTERPRET:
        kernels.check_values("top_k_index", top_k_index, 0, num_experts)
    device = top_k_index.device
    k = top_k_index.shape[-1]
    experts = top_k_index.reshape(-1).long()
    pairs = len(experts)
    M = -(-(pairs + num_experts * (block - 1)) // block) * block

    # Rows are the pairs sorted by expert: expert e has rows bounds[e] to bounds[e + 1]. At the
    # right stand the values of the example.
    expert_of_row, pair_of_row = experts.sort(stable=True)      # [0, 1, 2, 2] and [1, 3, 0, 2]
    bounds = torch.searchsorted(expert_of_row, torch.arange(num_experts + 1, device=device))
    first_row = bounds[:-1]                                     # [0, 1, 2] of [0, 1, 2, 4]
    ends = ((bounds.diff() + block - 1) // block * block).cumsum(0)         # [4, 8, 12]
    first_slot = pad(ends[:-1], (1, 0))                                     # [0, 4, 8]
    # gather refuses an expert of -1, where an index in brackets would count it from the end.
    row = torch.arange(pairs, device=device)
    slot_of_row = row + (first_slot - first_row).gather(0, expert_of_row)   # [0, 4, 8, 9]

    pair = torch.full((M,), -1, device=device)
    pair[slot_of_row] = pair_of_row                     # Each place is written once: no atomics.
    slot = torch.empty_like(row)
    slot[pair_of_row] = slot_of_row
    tile_expert = torch.searchsorted(ends, torch.arange(0, M, block, device=device), right=True)
    return Plan(
        slot=slot.view(-1, k),
        token=pair.div(k, rounding_mode="floor"),       # -1 stays -1.
        pair=pair,
        tile_expert=torch.where(tile_expert < num_experts, tile_expert, -1).int(),
        ends=ends.int(),
        unpadded=make_unpadded(pair_of_row, slot_of_row, M, k))


class Unpadded(NamedTuple):
    """For the unfused permute alone, which makes rows first: pairs sorted by expert, unpadded."""
    token: Tensor            # [T*k] int64   the token of each row
    slot: Tensor             # [T*k] int64   the slot of each row
    row_of_slot: Tensor      # [M] int64     the row in each slot, -1: padding
    row_of_pair: Tensor      # [T, k] int64  the row of each pair


def make_unpadded(pair_of_row: Tensor, slot_of_row: Tensor, M: int, k: int) -> Unpadded:
    row = torch.arange(len(pair_of_row), device=pair_of_row.device)
    row_of_slot = torch.full((M,), -1, device=row.device)
    row_of_slot[slot_of_row] = row
    row_of_pair = torch.empty_like(row)
    row_of_pair[pair_of_row] = row
    return Unpadded(pair_of_row // k, slot_of_row, row_of_slot, row_of_pair.view(-1, k))


def spread(probs: Tensor, plan: Plan) -> Tensor:
    """probs [T, k] fp32 -> one for each slot [M], 0 in the padding (-1 meets the appended zero)."""
    return pad(probs.flatten(), (0, 1))[plan.pair]


# ---- the layer's definition: what every recipe approximates --------------------------------------

def exact_layer(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, w1: Tensor,
                w2: Tensor) -> Tensor:
    """The layer in fp64, an expert after the other over all tokens: x [T, D] -> [T, D].

    Autograd gives its gradients. Nothing is shared with the code below.
    """
    x = x.double()
    y = torch.zeros_like(x)
    for expert in range(len(w1)):
        gate, up = (x @ w1[expert].double().T).chunk(2, dim=-1)
        chosen = torch.where(top_k_index == expert, top_k_weights.double(), 0)
        prob = chosen.sum(-1, keepdim=True)             # 0 for a token that chose others
        y = y + (silu(gate) * up * prob) @ w2[expert].double().T
    return y


# ---- the switches, a function each ---------------------------------------------------------------

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
    return kernels.quantize(kernels.swiglu(h, prob, plan.tile_expert), recipe.scales,
                            plan.tile_expert)


def swiglu_backward(da: Tensor, h: Tensor, prob: Tensor, a: QTensor | None, plan: Plan,
                    recipe: Recipe) -> tuple[QTensor, Tensor, QTensor]:
    """dA [M, F] and H [M, 2F] bf16 -> dH [M, 2F] in FP8, dprob [M] fp32, A [M, F] in FP8.

    A is made again from H where that costs no cast (fused), and was kept elsewhere.
    """
    if recipe.swiglu == "fused":
        return kernels.swiglu_backward_quantize(da, h, prob, recipe.scales, plan.tile_expert)
    dh, dprob = kernels.swiglu_backward(da, h, prob, plan.tile_expert)
    return kernels.quantize(dh, recipe.scales, plan.tile_expert), dprob, a


def column_wise(q: QTensor, plan: Plan, recipe: Recipe, rows: Tensor | None = None) -> QTensor:
    """Row-wise FP8 [M, C] -> column-wise FP8 [C, M], for wgrad. The direct transpose can also
    permute as it reads: then q is [T, C], and `rows` names the token of each slot."""
    if recipe.transpose == "direct":
        return kernels.scaling_aware_transpose(q, rows, plan.tile_expert)
    if recipe.transpose == "fused":
        return kernels.requantize(q, recipe.scales, plan.tile_expert)
    x = kernels.dequantize(q, torch.bfloat16, plan.tile_expert)
    x = kernels.transpose(x, plan.tile_expert)
    # Unused tiles, E at most, are quantized, too: the transpose has written zeros there.
    return kernels.quantize(x, recipe.scales)


def keeps_x_unpermuted(recipe: Recipe) -> bool:
    """Where the transpose can permute, X is kept for backward as it came: T rows, not M."""
    return recipe.transpose == "direct" and recipe.permute == "fused"


# ---- the layer -----------------------------------------------------------------------------------

def without_autocast(function):
    """Autocast around forward or backward would change the layer's bits: inside, it is off."""
    @functools.wraps(function)
    def call(ctx, x, *others):
        with torch.autocast(x.device.type, enabled=False):
            return function(ctx, x, *others)
    return call


class Operands(NamedTuple):
    """What the GEMMs multiply: the weights in FP8, [E, N, K], and transposed; or in bf16, where
    torch's GEMM reads either way and the transposes are None."""
    w1: QTensor | Tensor
    w1_t: QTensor | None
    w2: QTensor | Tensor
    w2_t: QTensor | None
    recipe: Recipe


def cast_weights(w1: Tensor, w2: Tensor, recipe: "str | Recipe") -> Operands:
    """The masters w1 [E, 2F, D] and w2 [E, D, F] -> what the GEMMs read."""
    recipe = parse_spec(recipe)
    if recipe.precision == "bf16":
        return Operands(w1.detach().bfloat16(), None, w2.detach().bfloat16(), None, recipe)
    w1_fp8, w1_fp8_t = kernels.quantize_weight(w1.detach(), recipe.scales)
    w2_fp8, w2_fp8_t = kernels.quantize_weight(w2.detach(), recipe.scales)
    return Operands(w1_fp8, w1_fp8_t, w2_fp8, w2_fp8_t, recipe)


def tensors_of(*qtensors: QTensor | None) -> list[Tensor | None]:
    """The data and scale of each: save_for_backward takes tensors alone."""
    tensors = []
    for q in qtensors:
        tensors += (None, None) if q is None else (q.data, q.scale)
    return tensors


def qtensors_of(tensors: list[Tensor | None], policy: str) -> list[QTensor | None]:
    """The way back."""
    qtensors = []
    for data, scale in zip(tensors[::2], tensors[1::2]):
        qtensors.append(None if data is None else QTensor(data, scale, policy))
    return qtensors


class FP8Experts(torch.autograd.Function):
    """The expert layer in FP8: a tensor a line. The margin numbers the explicit casts in the order
    in which they run.

    x [T, D] bf16, probs [T, k] fp32; w1 [E, 2F, D] and w2 [E, D, F], the master weights, are passed
    only to receive their gradients (in their dtype): what is multiplied is `operands`.
    -> [T, D] bf16.
    A name is used again, so that the form before is freed: dy is bf16, then FP8, then permuted,
    then column-wise.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x, probs, w1, w2, operands, plan, recipe):
        prob = spread(probs, plan)
        x = kernels.quantize(x, recipe.scales)                          # naive 1, flow 1: Q(X)
        x_slots = permute(x, plan, recipe)
        h = kernels.grouped_gemm(x_slots, operands.w1, plan.tile_expert, plan.ends)
        a = swiglu(h, prob, plan, recipe)                               # naive 2: Q(A)
        y = kernels.grouped_gemm(a, operands.w2, plan.tile_expert, plan.ends)
        y = unpermute(y, plan, recipe)

        # Kept for backward: X in FP8 (permuted or not); H in bf16; W1^T and W2^T; A only where to
        # make it again from H would be a cast (naive). What is saved here is freed at the end of
        # backward; an attribute would live on.
        x = x if keeps_x_unpermuted(recipe) else x_slots
        a = a if recipe.swiglu == "unfused" else None
        ctx.save_for_backward(h, prob, *tensors_of(x, a, operands.w1_t, operands.w2_t))
        ctx.plan = plan
        ctx.recipe = recipe
        ctx.wgrad_dtype = wgrad_dtype(w1.dtype)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        plan = ctx.plan
        recipe = ctx.recipe
        h, prob, *others = ctx.saved_tensors
        x, a, w1_t, w2_t = qtensors_of(others, recipe.scales)
        wants_dx, _, wants_dw1, wants_dw2, *_ = ctx.needs_input_grad
        dx = dw1 = dw2 = None

        dy = kernels.quantize(dy, recipe.scales)                        # naive 3, flow 2: Q(dY)
        dy = permute(dy, plan, recipe)
        da = kernels.grouped_gemm(dy, w2_t, plan.tile_expert, plan.ends)
        dh, dprob, a = swiglu_backward(da, h, prob, a, plan, recipe)    # naive 4: Q(dH)
        del da
        if wants_dx:
            dx = kernels.grouped_gemm(dh, w1_t, plan.tile_expert, plan.ends)
            dx = unpermute(dx, plan, recipe)
        if wants_dw1 or wants_dw2:
            dy = column_wise(dy, plan, recipe)                          # naive 5 6: DQ(dY) Q'(dY)
            a = column_wise(a, plan, recipe)                            # naive 7 8: DQ(A) Q'(A)
            dw2 = kernels.grouped_wgrad(dy, a, plan.ends, ctx.wgrad_dtype)
            dh = column_wise(dh, plan, recipe)                          # naive 9 10: DQ(dH) Q'(dH)
            rows = plan.token if keeps_x_unpermuted(recipe) else None
            x = column_wise(x, plan, recipe, rows)                      # naive 11 12: DQ(X) Q'(X)
            dw1 = kernels.grouped_wgrad(dh, x, plan.ends, ctx.wgrad_dtype)
        return dx, dprob[plan.slot], dw1, dw2, None, None, None     # none for the last three


def wgrad_dtype(master: torch.dtype) -> torch.dtype:
    """bf16 masters get bf16 gradients. All others get fp32, which autograd narrows for fp16."""
    return torch.bfloat16 if master == torch.bfloat16 else torch.float32


def torch_grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if a.is_cpu:                # Few CPUs multiply bf16 at the speed of fp32; the sums are alike.
        return grouped_mm(a.float(), b.float(), offs=ends).to(a.dtype)
    return grouped_mm(a, b, offs=ends)


class BF16Experts(torch.autograd.Function):
    """The baseline: the same plan, permute and SwiGLU kernels, torch's grouped GEMM.

    What it keeps is chosen for speed, as autograd would: X permuted, H and A. torch's GEMM writes
    weight gradients in bf16, which autograd widens for fp32 masters; the FP8 one writes fp32.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x, probs, w1, w2, operands, plan, recipe):
        prob = spread(probs, plan)
        x = permute(x, plan, recipe)
        h = torch_grouped_mm(x, operands.w1.mT, plan.ends)
        a = kernels.swiglu(h, prob, plan.tile_expert)
        y = torch_grouped_mm(a, operands.w2.mT, plan.ends)
        y = unpermute(y, plan, recipe)
        ctx.save_for_backward(x, h, a, prob, operands.w1, operands.w2)
        ctx.plan = plan
        ctx.recipe = recipe
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        plan = ctx.plan
        recipe = ctx.recipe
        x, h, a, prob, w1_bf16, w2_bf16 = ctx.saved_tensors
        wants_dx, _, wants_dw1, wants_dw2, *_ = ctx.needs_input_grad
        dx = dw1 = dw2 = None

        dy = permute(dy, plan, recipe)
        da = torch_grouped_mm(dy, w2_bf16, plan.ends)
        dh, dprob = kernels.swiglu_backward(da, h, prob, plan.tile_expert)
        if wants_dx:
            dx = torch_grouped_mm(dh, w1_bf16, plan.ends)
            dx = unpermute(dx, plan, recipe)
        if wants_dw1 or wants_dw2:
            dw2 = torch_grouped_mm(dy.t(), a, plan.ends)
            dw1 = torch_grouped_mm(dh.t(), x, plan.ends)
        return dx, dprob[plan.slot], dw1, dw2, None, None, None


FUNCTION = {"fp8": FP8Experts, "bf16": BF16Experts}          # by a recipe's precision


# ---- the layer for other people's models ---------------------------------------------------------

@torch.compiler.disable                 # What is compiled around the experts ends here.
def experts(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, w1: Tensor, w2: Tensor,
            recipe: "str | Recipe" = "flow", *, operands: Operands | None = None) -> Tensor:
    """The expert layer as a function: for each token, the sum over its k choices e of
    top_k_weights * W2[e] (silu(gate) * up), with (gate, up) = W1[e] x.

    x              [..., D] fp32, bf16 or fp16; inside, it is bf16
    top_k_index    [..., k] int32 or int64, each in [0, E)
    top_k_weights  [..., k] fp32, bf16 or fp16
    w1             [E, 2F, D] fp32, bf16 or fp16: gate, then up (Hugging Face's gate_up_proj)
    w2             [E, D, F] (Hugging Face's down_proj)
    recipe         a name, a spec or a Recipe
    operands       cast_weights(w1, w2, recipe), to share one cast among several calls; left out,
                   the weights are cast in this one

    Returns x's shape and dtype. Gradients of x and of the weights are computed only where wanted
    (those of both weights, if of either). Autocast outside changes no bit inside. D and F are
    multiples of 128.
    Raises ValueError, without a sync, for anything else; values out of range are seen on a CPU.
    """
    recipe = parse_spec(recipe)
    check("w2", w2, FLOATS, ANY, BY_128, BY_128)
    E, D, F = w2.shape
    check("w1", w1, FLOATS, E, 2 * F, D, like=w2)
    if operands is None:
        operands = cast_weights(w1, w2, recipe)
    elif not isinstance(operands, Operands) or operands.recipe != recipe:
        raise ValueError("operands were cast for another recipe: give cast_weights(w1, w2, recipe)")
    elif operands.w1.data.shape != w1.shape or operands.w2.data.shape != w2.shape:
        raise ValueError("operands were cast from weights of other shapes: give "
                         "cast_weights(w1, w2, recipe)")
    check("x", x, FLOATS, ..., D, like=w2)
    check("top_k_index", top_k_index, (torch.int32, torch.int64), *x.shape[:-1], ANY, like=w2)
    check("top_k_weights", top_k_weights, FLOATS, *top_k_index.shape, like=w2)
    if x.numel() == 0:
        # Nobody came. The result hangs on all inputs, so that each gets a gradient of zeros.
        nothing = top_k_weights.sum() + w1[0, 0, 0] + w2[0, 0, 0]
        return x + 0 * nothing.to(x.dtype)
    plan = make_plan(top_k_index, E)
    tokens = x.reshape(-1, D).bfloat16()
    probs = top_k_weights.reshape(plan.slot.shape).float()
    y = FUNCTION[recipe.precision].apply(tokens, probs, w1, w2, operands, plan, recipe)
    y = y.to(x.dtype)
    return y if y.shape == x.shape else y.view(x.shape)     # No view without need: FSDP2 warns.


class Experts(nn.Module):
    """E SwiGLU experts: `experts` with weights of its own, w1 [E, 2F, D] (gate, then up) and
    w2 [E, D, F].

    dim D and hidden_dim F are multiples of 128; recipe is a name, a spec or a Recipe. The weights
    are cast in every call, unless `weights_cast_once` is open. Raises ValueError.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int,
                 recipe: "str | Recipe" = "flow", *, device=None, dtype=None):
        super().__init__()
        self.recipe = parse_spec(recipe)
        w1 = torch.empty(num_experts, 2 * hidden_dim, dim, device=device, dtype=dtype)
        w2 = torch.empty(num_experts, dim, hidden_dim, device=device, dtype=dtype)
        check("w2, [num_experts, dim, hidden_dim],", w2, FLOATS, ANY, BY_128, BY_128)
        self.w1 = nn.Parameter(w1)
        self.w2 = nn.Parameter(w2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for w in (self.w1, self.w2):
            nn.init.normal_(w, std=w.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        E, D, F = self.w2.shape
        return f"num_experts={E}, dim={D}, hidden_dim={F}, recipe={self.recipe}"

    @torch.compiler.disable
    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Shapes and dtypes as in `experts`."""
        return experts(x, top_k_index, top_k_weights, self.w1, self.w2, self.recipe,
                       operands=_cast_once.get(self))


# The weights that `weights_cast_once` has cast: not in the modules, so that nothing of a module is
# ever copied, moved or saved with them.
_cast_once: WeakKeyDictionary = WeakKeyDictionary()


@contextlib.contextmanager
def weights_cast_once(model: nn.Module):
    """`with weights_cast_once(model):` casts the weights of each Experts in the model on entering,
    for all calls inside, and drops the copies on leaving.

    For the micro-batches between two optimizer steps. Weights that change inside go unseen: no
    optimizer step, no load, no move and no torch.func.functional_call inside. The model is on one
    device; not with FSDP2, which gathers its weights anew for each call.
    Raises ValueError for a model without Experts.
    """
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no fp8flow.Experts: there is nothing to "
                         "cast, call it without weights_cast_once")
    before = {layer: _cast_once.get(layer) for layer in layers}     # where one is open already
    try:
        # No inference tensors: what is cast in an evaluation may serve training.
        with torch.inference_mode(False), torch.no_grad():
            for layer in layers:
                _cast_once[layer] = cast_weights(layer.w1, layer.w2, layer.recipe)
        yield
    finally:
        for layer, operands in before.items():
            if operands is None:
                _cast_once.pop(layer, None)
            else:
                _cast_once[layer] = operands


# ---- the casts, counted as they happen -----------------------------------------------------------

class Place(NamedTuple):
    """A line of the layer, FP8Experts or BF16Experts."""
    direction: str              # "forward" or "backward"
    line: int                   # in this file
    tensor: str                 # what the line makes: "X", "dH"
    column_wise: bool           # inside the switch of that name


def place_in_layer() -> Place | None:
    """The line of the layer that is running now, None outside.

    So the layer needs no line that says what it works on: whoever counts or traces walks up the
    calls to the layer, and reads there what stands left of `=`.
    """
    inside_column_wise = False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is globals():        # a function of this file
            name = frame.f_code.co_name
            if name == "column_wise":
                inside_column_wise = True
            if name in ("forward", "backward"):         # the layer's: Experts.forward is above it
                source = linecache.getline(__file__, frame.f_lineno)
                tensor = tensor_name(source.partition("=")[0])
                return Place(name, frame.f_lineno, tensor, inside_column_wise)
        frame = frame.f_back
    return None


def tensor_name(targets: str) -> str:
    """What an assignment makes, as the table at the top writes it: "dh, dprob, a" -> "dH"."""
    variable = targets.split(",")[0].strip().partition("_")[0]
    if variable.startswith("d"):
        return "d" + variable[1:].upper()
    return variable.upper()


class Cast(NamedTuple):
    """An explicit cast of an activation: one launch that only changes its precision, or finds new
    scales in it."""
    kind: str                   # "Q" quantizes, "DQ" dequantizes, "Q'" quantizes column-wise,
                                # "RQ" requantizes: DQ, transpose and Q' in one
    tensor: str                 # "X", "A", "dY" or "dH"
    line: int                   # of the layer, in this file


@contextlib.contextmanager
def count_casts():
    """`with count_casts() as casts:` a list of Cast, in the order in which they ran.

    While it is open, the functions of `kernels` that cast note each call and do what they always
    do. Weights, which are cast once for many calls, do not count.
    """
    casts = []
    kinds = {"quantize": "Q", "dequantize": "DQ", "requantize": "RQ"}
    originals = {name: getattr(kernels, name) for name in kinds}

    def noting(name):
        @functools.wraps(originals[name])
        def call(*args, **kwargs):
            place = place_in_layer()
            if place is not None:
                kind = kinds[name]
                if kind == "Q" and place.column_wise:
                    kind = "Q'"
                casts.append(Cast(kind, place.tensor, place.line))
            return originals[name](*args, **kwargs)
        return call

    for name in kinds:
        setattr(kernels, name, noting(name))
    try:
        yield casts
    finally:
        for name in kinds:
            setattr(kernels, name, originals[name])


# ---- a layer to look at --------------------------------------------------------------------------

def sqnr(x: Tensor, ref: Tensor) -> float:
    """Signal to quantization-noise ratio in dB, 10 log10(|ref|^2 / |x - ref|^2): 31.5 dB is an
    error of 2.7%."""
    noise = (x.double() - ref).square().sum().clamp(min=1e-300)
    return 10 * (ref.double().square().sum() / noise).log10().item()


def random_layer(T: int, D: int, F: int, E: int, k: int, device, dtype=torch.float32):
    """(x, probs, plan, w1, w2, dy) of a layer with random routing; all but the plan and dy want
    gradients."""
    torch.manual_seed(0)
    scores, top_k_index = torch.rand(T, E, device=device).softmax(-1).topk(k, dim=-1)
    probs = (scores / scores.sum(-1, keepdim=True)).requires_grad_()
    x = torch.randn(T, D, device=device, dtype=torch.bfloat16).requires_grad_()
    w1 = torch.randn(E, 2 * F, D, device=device, dtype=dtype) * D ** -0.5
    w2 = torch.randn(E, D, F, device=device, dtype=dtype) * F ** -0.5
    dy = torch.randn_like(x)
    return x, probs, make_plan(top_k_index, E), w1.requires_grad_(), w2.requires_grad_(), dy


class Layer:
    """One recipe on given inputs: cast weights once, then call forward() or step() as often as you
    like."""

    def __init__(self, recipe: "str | Recipe", x, probs, plan, w1, w2, dy):
        self.recipe = parse_spec(recipe)
        self.inputs = (x, probs, w1, w2)
        self.plan = plan
        self.dy = dy
        self.operands = cast_weights(w1, w2, self.recipe)

    def forward(self) -> Tensor:
        function = FUNCTION[self.recipe.precision]
        return function.apply(*self.inputs, self.operands, self.plan, self.recipe)

    def step(self) -> tuple[Tensor, ...]:
        """(y, dx, dprobs, dw1, dw2)."""
        y = self.forward()
        return y.detach(), *torch.autograd.grad(y, self.inputs, self.dy)
