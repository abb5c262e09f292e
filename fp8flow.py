"""FP8-Flow-MoE: the expert layer of a Mixture-of-Experts model, trained in FP8 without casts
(arXiv 2511.02302).

An FP8 tensor is x ~ code * scale: a byte for every element, an fp32 scale for a block of 128 of
them (or for a tile of 128x128). A matrix product sums the products of codes, 128 at a time, and

    sum of (s * code) * (t * code') = s * t * sum of code * code'

holds only if the scales s and t are constant along the sum. So blocks lie along the axis that is
summed over. Outputs (fprop) and input gradients (dgrad) sum along a tensor's rows. Weight gradients
(wgrad) sum over tokens, along its columns. The same tensor is needed twice, with scales along
either axis.

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
precision of an activation or find new scales in it. And it rounds twice: a code times its scale,
divided by another scale, is seldom a code again. Between two scales that are powers of two it is:
only the exponent of the code changes. That is exact while codes stay normal, 2^-6 or more.

The direct transpose has a price: it shares one scale in a 128x128 tile, so that rows far smaller
than the largest round to subnormal codes or vanish. Only wgrad reads its result, and wgrad can pay:
there the rows of a tile are terms of one sum, in which the small ones hardly count. In fprop and
dgrad each row has a result of its own, and they read the row-wise blocks.

That leaves one dataflow with switches:

    switch      naive      flow      what flow removes
    transpose   unfused    direct    DQ and Q' of all four tensors: -8 casts (exponents are shifted)
    swiglu      unfused    fused     Q(A) and Q(dH): -2 casts (SwiGLU and its backward emit FP8)
    permute     unfused    fused     launches and traffic (permute and pad are one gather)
    scales      fp32       pow2      the double quantization error

Q(X) at the entry of forward and Q(dY) at the entry of backward are left: 2 casts. A third value of
`transpose`, between the two, is `requantize` (RQ): DQ, transpose and Q' in one launch, which counts
as one cast for each tensor. It moves hardly more bytes than the direct transpose, and with fp32
scales it rounds twice.

Weights are cast once in a forward: forward multiplies with W, and keeps W^T for backward. These
casts are not among the twelve.

Reading order: Recipe, Plan, the layer's definition, the switches, FP8Experts. What follows is the
bf16 baseline, `experts` and `Experts` for other people's models, and how casts are counted.

Shapes: T tokens, k experts per token, E experts, M padded token slots, D model width, F expert
width. The router's weight of a token's choice is `top_k_weights` [T, k], and `prob` [M] where it
stands beside its slot.
"""
import contextlib
import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, pad, silu

if __package__:                         # cloned as a package, beside another one called `kernels`
    from . import kernels
    from .kernels import BLOCK, QTensor, has_memory, require
else:
    import kernels
    from kernels import BLOCK, QTensor, has_memory, require

SWITCHES = {                            # what flow does comes first
    "transpose": ("direct", "requantize", "unfused"),
    "swiglu": ("fused", "unfused"),
    "permute": ("fused", "unfused"),
    "scales": ("pow2", "fp32"),
}


@dataclass(frozen=True)
class Recipe:
    """How the expert layer computes. The defaults are `flow`. Raises ValueError for a combination
    that has no meaning."""
    precision: str = "fp8"          # or "bf16": torch's grouped GEMM, no switches
    transpose: str = "direct"       # shift exponents; or "unfused": dequantize, transpose, quantize
                                    # again; or "requantize": these three in one launch
    swiglu: str = "fused"           # with quantization; or "unfused"
    permute: str = "fused"          # with padding; or "unfused": permute, then pad
    scales: str = "pow2"            # or "fp32": amax/448

    def __post_init__(self):
        require(self.precision in ("fp8", "bf16"), "precision must be 'fp8' or 'bf16'",
                self.precision)
        for name, choices in SWITCHES.items():
            value = getattr(self, name)
            require(value in choices, f"{name} must be one of {', '.join(choices)}", value)
            require(self.precision == "fp8" or value == choices[0],
                    f"{name}={value} is a switch of FP8: use it with naive or flow, not with bf16")
        require(self.transpose != "direct" or self.scales == "pow2",
                "transpose=direct shifts exponents, and the ratio of two fp32 scales is no power "
                "of two: use scales=pow2 or transpose=requantize")


RECIPES = {
    "bf16": Recipe(precision="bf16"),
    "naive": Recipe(transpose="unfused", swiglu="unfused", permute="unfused", scales="fp32"),
    "flow": Recipe(),
}
LADDER = [                              # what each step turns
    "bf16",
    "naive",
    "naive,transpose=requantize",                       # transpose, halfway
    "naive,transpose=requantize,scales=pow2",           # scales
    "naive,transpose=direct,scales=pow2",               # transpose
    "flow,permute=unfused",                             # swiglu
    "flow",                                             # permute
    "flow,transpose=unfused",                           # and from flow one step back
]


def parse_spec(spec: "str | Recipe") -> Recipe:
    """A recipe's name and the switches that differ from it: "flow" or "flow,swiglu=unfused". A
    Recipe is returned as it is. Raises ValueError for what is neither."""
    if isinstance(spec, Recipe):
        return spec
    require(isinstance(spec, str), "a recipe is a Recipe, or a spec such as 'flow,swiglu=unfused'",
            spec)
    name, *changes = spec.split(",")
    require(name in RECIPES, f"a recipe is one of {', '.join(RECIPES)}", spec)
    switches = {}
    for change in changes:
        key, _, value = change.partition("=")
        require(key in SWITCHES, f"a switch is one of {', '.join(SWITCHES)}", spec)
        require(key not in switches, f"{key} is set twice: set it once", spec)
        switches[key] = value
    return replace(RECIPES[name], **switches)


# ---- the routing plan ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Plan:
    """Where each token goes. A pair is a token and one of its k experts. M slots hold the pairs
    sorted by expert, each expert padded to a multiple of 128. Every shape follows from T, k and E
    alone, so nothing waits for the GPU."""
    slot: Tensor             # [T, k] int64  the slot of each pair
    token: Tensor            # [M] int64     the token in each slot, -1: padding or unused
    pair: Tensor             # [M] int64     the pair t*k + choice in each slot, -1 alike
    tile_expert: Tensor      # [M/128] int32 the expert of each tile, -1: unused
    ends: Tensor             # [E] int32     where each expert's slots end, a multiple of 128

    def tensors(self) -> tuple[Tensor, ...]:
        """As save_for_backward takes them: Plan(*plan.tensors()) is the plan again."""
        return self.slot, self.token, self.pair, self.tile_expert, self.ends

    @functools.cached_property
    def sorted_pairs(self) -> "SortedPairs":
        """Made when the unfused permute first asks: nothing else reads it."""
        is_row = self.pair >= 0
        row_of_slot = torch.where(is_row, is_row.cumsum(0) - 1, -1)
        row_of_pair = row_of_slot[self.slot]
        slot_of_row = torch.empty_like(self.slot.flatten())
        slot_of_row[row_of_pair.flatten()] = self.slot.flatten()
        return SortedPairs(self.token[slot_of_row], slot_of_row, row_of_slot, row_of_pair)


class SortedPairs(NamedTuple):
    """The pairs sorted by expert, a row each, but not padded yet. In make_plan's example four rows:
    token = [0 1 0 1], slot = [0 4 8 9], row_of_slot = [0 . . . 1 . . . 2 3 . . . . . .] and
    row_of_pair = [[2, 0], [3, 1]]."""
    token: Tensor            # [T*k] int64   the token of each row
    slot: Tensor             # [T*k] int64   the slot of each row
    row_of_slot: Tensor      # [M] int64     the row in each slot, -1: padding or unused
    row_of_pair: Tensor      # [T, k] int64  the row of each pair


def make_plan(top_k_index: Tensor, num_experts: int) -> Plan:
    """top_k_index [..., k] int32 or int64, the experts of each token, each in [0, num_experts)
    -> Plan. No sync, no atomics.

    M = round_up(T*k + min(E, T*k)*127, 128) is enough, whatever the router does: an expert that
    some token chose wastes at most 127 slots. An example with three experts and tiles of 4 instead
    of 128. Token 0 chooses experts 2 and 0, token 1 chooses 2 and 1; M = round_up(4 + 3*3, 4) = 16:

                       expert 0 | expert 1 | expert 2 | unused
        pair         = [1 . . .   3 . . .    0 2 . .    . . . .]       a dot is -1
        token        = [0 . . .   1 . . .    0 1 . .    . . . .]
        tile_expert  = [0,        1,         2,         -1]
        ends         = [4,        8,         12]
        slot         = [[8, 0], [9, 4]]                 of the two choices of each token

    Raises ValueError for another dtype and, on a CPU, for an index out of range. On a GPU the host
    would have to wait to see one: there the device asserts that there is none.
    """
    require(top_k_index.dtype in (torch.int32, torch.int64),
            "top_k_index holds numbers of experts: give it as int32 or int64", top_k_index.dtype)
    k = top_k_index.shape[-1]
    # Narrow keys are sorted faster. What is out of range becomes -1 or num_experts.
    chosen = top_k_index.flatten().clamp(-1, num_experts).int()
    # Pairs sorted by expert are called rows: those of expert e are bounds[e] to bounds[e + 1].
    expert_of_row, pair_of_row = chosen.sort(stable=True)                   # [0 1 2 2], [1 3 0 2]
    every_expert = torch.arange(num_experts + 1, device=expert_of_row.device,
                                dtype=expert_of_row.dtype)
    bounds = torch.searchsorted(expert_of_row, every_expert)                # [0 1 2 4]
    check_index(top_k_index, bounds)
    slot, *others = kernels.plan_slots(pair_of_row, bounds, k)
    return Plan(slot.view(-1, k), *others)


def check_index(top_k_index: Tensor, bounds: Tensor) -> None:
    """An index out of range is a row outside of all bounds: -1 comes before the first of them, and
    num_experts after the last."""
    in_range = bounds[-1] - bounds[0] == top_k_index.numel()
    sentence = f"top_k_index must hold experts from 0 to {len(bounds) - 2}"
    if in_range.is_cuda:
        torch._assert_async(in_range, sentence)         # The host does not wait for it.
    elif not in_range:
        raise ValueError(f"{sentence}; got values from {top_k_index.min()} to {top_k_index.max()}")


def spread(top_k_weights: Tensor, plan: Plan) -> Tensor:
    """[T, k] fp32 -> one for each slot [M], 0 in the padding (-1 meets the appended zero)."""
    return pad(top_k_weights.flatten(), (0, 1))[plan.pair]


# ---- the layer's definition: what every recipe approximates --------------------------------------

def exact_layer(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, w1: Tensor,
                w2: Tensor) -> Tensor:
    """The layer in fp64, one expert after the other over all tokens: x [T, D] -> [T, D].

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
    pairs = plan.sorted_pairs
    x_sorted = kernels.gather_rows(x, pairs.token)
    return kernels.gather_rows(x_sorted, pairs.row_of_slot, plan.tile_expert)


def unpermute(y: Tensor, plan: Plan, recipe: Recipe) -> Tensor:
    """Slots [M, D] bf16 -> tokens [T, D] bf16: the sum of each token's k rows."""
    if recipe.permute == "fused":
        return kernels.sum_rows(y, plan.slot)
    pairs = plan.sorted_pairs
    y_sorted = kernels.gather_rows(y, pairs.slot)
    return kernels.sum_rows(y_sorted, pairs.row_of_pair)


def swiglu_to_fp8(h: Tensor, prob: Tensor, plan: Plan, recipe: Recipe) -> QTensor:
    """H [M, 2F] bf16 -> A [M, F] in FP8."""
    if recipe.swiglu == "fused":
        return kernels.swiglu(h, prob, recipe.scales, plan.tile_expert)
    a = kernels.swiglu(h, prob, None, plan.tile_expert)
    return kernels.quantize(a, recipe.scales, plan.tile_expert)


def swiglu_backward_to_fp8(da: Tensor, h: Tensor, prob: Tensor, a: QTensor, plan: Plan,
                           recipe: Recipe) -> tuple[QTensor, Tensor, QTensor]:
    """dA [M, F] and H [M, 2F] bf16 -> dH [M, 2F] in FP8, dprob [M] fp32, A [M, F] in FP8.

    Fused, A is made again from H, which costs no cast. Unfused, it was kept.
    """
    if recipe.swiglu == "fused":
        return kernels.swiglu_backward(da, h, prob, recipe.scales, plan.tile_expert)
    dh, dprob, _ = kernels.swiglu_backward(da, h, prob, None, plan.tile_expert)
    return kernels.quantize(dh, recipe.scales, plan.tile_expert), dprob, a


def column_wise(q: QTensor, plan: Plan, recipe: Recipe, token: Tensor | None = None) -> QTensor:
    """Row-wise FP8 [M, C] -> column-wise FP8 [C, M], for wgrad. The direct transpose can also
    permute as it reads: then q is [T, C], and `token` names that of each slot."""
    if recipe.transpose == "direct":
        return kernels.scaling_aware_transpose(q, token, plan.tile_expert)
    if recipe.transpose == "requantize":
        return kernels.requantize(q, recipe.scales, plan.tile_expert)
    x = kernels.dequantize(q, torch.bfloat16, plan.tile_expert)
    x = kernels.transpose(x, plan.tile_expert)
    # Unused tiles are quantized, too: the transpose has written zeros there.
    return kernels.quantize(x, recipe.scales)


def keeps_x_unpermuted(recipe: Recipe) -> bool:
    """Where the transpose can permute, X is kept for backward as it came: T rows, not M."""
    return recipe.transpose == "direct" and recipe.permute == "fused"


# ---- the layer -----------------------------------------------------------------------------------

def plain_backward(backward):
    """What both backwards below have in common: autocast around them would change their bits, and a
    second derivative would be silently wrong."""
    @functools.wraps(backward)
    def call(ctx, dy):
        if torch.is_grad_enabled():
            raise RuntimeError("the experts have no second derivative: leave out create_graph")
        with torch.autocast(dy.device.type, enabled=False):
            return backward(ctx, dy)
    return call


class FP8Experts(torch.autograd.Function):
    """The expert layer in FP8: a line for each tensor. The margin numbers the explicit casts in the
    order in which they run.

    x [T, D] bf16, top_k_weights [T, k] fp32, w1 [E, 2F, D], w2 [E, D, F] -> [T, D] bf16.
    A name tells what x and dy are: _fp8 as they came, [T, D]; _slots permuted and padded, [M, D];
    _columns transposed, [D, M], for wgrad. What is _kept is so from forward to backward.
    """

    @staticmethod
    def forward(ctx, x, top_k_weights, w1, w2, plan, recipe):
        w1_fp8, w1_t = kernels.quantize_weight(w1, recipe.scales)
        w2_fp8, w2_t = kernels.quantize_weight(w2, recipe.scales)
        prob = spread(top_k_weights, plan)

        x_fp8 = kernels.quantize(x, recipe.scales)                      # naive 1, flow 1: Q(X)
        x_slots = permute(x_fp8, plan, recipe)
        h = kernels.grouped_gemm(x_slots, w1_fp8, plan.tile_expert, plan.ends)
        a = swiglu_to_fp8(h, prob, plan, recipe)                        # naive 2: Q(A)
        y = kernels.grouped_gemm(a, w2_fp8, plan.tile_expert, plan.ends)
        y = unpermute(y, plan, recipe)

        # Kept for backward: the plan; H in bf16, and prob; X in FP8, permuted or not; W1^T and
        # W2^T. Where SwiGLU is unfused (naive), A, too, since making it again from H would cost a
        # cast. What is saved here is freed at the end of backward; an attribute would live on.
        x_kept = x_fp8 if keeps_x_unpermuted(recipe) else x_slots
        nothing = QTensor(None, None, recipe.scales)
        a_kept = a if recipe.swiglu == "unfused" else nothing
        ctx.save_for_backward(*plan.tensors(), h, prob, *x_kept[:2], *a_kept[:2], *w1_t[:2],
                              *w2_t[:2])
        ctx.recipe = recipe
        ctx.wgrad_dtypes = wgrad_dtype(w1.dtype), wgrad_dtype(w2.dtype)
        return y

    @staticmethod
    @plain_backward
    def backward(ctx, dy):
        recipe = ctx.recipe
        saved = ctx.saved_tensors       # Once: torch.utils.checkpoint refuses a second call.
        plan = Plan(*saved[:5])
        h, prob = saved[5:7]
        x_kept, a_kept, w1_t, w2_t = qtensors(saved[7:], recipe.scales)
        wants_dx, _, wants_dw1, wants_dw2, *_ = ctx.needs_input_grad
        dw1_dtype, dw2_dtype = ctx.wgrad_dtypes
        dx = dw1 = dw2 = None

        dy_fp8 = kernels.quantize(dy, recipe.scales)                    # naive 3, flow 2: Q(dY)
        dy_slots = permute(dy_fp8, plan, recipe)
        da = kernels.grouped_gemm(dy_slots, w2_t, plan.tile_expert, plan.ends)
        dh, dprob, a = swiglu_backward_to_fp8(                          # naive 4: Q(dH)
            da, h, prob, a_kept, plan, recipe)
        del da, dy_fp8                  # Their memory is free for the next tensors.
        if wants_dx:
            dx = kernels.grouped_gemm(dh, w1_t, plan.tile_expert, plan.ends)
            dx = unpermute(dx, plan, recipe)
        if wants_dw2:
            dy_columns = column_wise(dy_slots, plan, recipe)            # naive 5 6: DQ(dY) Q'(dY)
            a_columns = column_wise(a, plan, recipe)                    # naive 7 8: DQ(A) Q'(A)
            dw2 = kernels.grouped_wgrad(dy_columns, a_columns, plan.ends, dw2_dtype)
            del dy_slots, dy_columns, a, a_columns
        if wants_dw1:
            dh_columns = column_wise(dh, plan, recipe)                  # naive 9 10: DQ(dH) Q'(dH)
            token = plan.token if keeps_x_unpermuted(recipe) else None
            x_columns = column_wise(x_kept, plan, recipe, token)        # naive 11 12: DQ(X) Q'(X)
            dw1 = kernels.grouped_wgrad(dh_columns, x_columns, plan.ends, dw1_dtype)
        return dx, dprob[plan.slot], dw1, dw2, None, None       # none for the plan and the recipe


def qtensors(tensors, policy: str) -> list[QTensor]:
    """[data, scale, data, scale, ...], as save_for_backward takes them, -> QTensors."""
    return [QTensor(data, scale, policy) for data, scale in zip(tensors[::2], tensors[1::2])]


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
    weight gradients in bf16, which autograd widens for fp32 masters; the FP8 one writes fp32 there.
    """

    @staticmethod
    def forward(ctx, x, top_k_weights, w1, w2, plan, recipe):
        w1 = w1.bfloat16()
        w2 = w2.bfloat16()
        prob = spread(top_k_weights, plan)
        x_slots = permute(x, plan, recipe)
        h = torch_grouped_mm(x_slots, w1.mT, plan.ends)
        a = kernels.swiglu(h, prob, None, plan.tile_expert)
        y = torch_grouped_mm(a, w2.mT, plan.ends)
        y = unpermute(y, plan, recipe)
        ctx.save_for_backward(*plan.tensors(), x_slots, h, a, prob, w1, w2)
        ctx.recipe = recipe
        return y

    @staticmethod
    @plain_backward
    def backward(ctx, dy):
        recipe = ctx.recipe
        saved = ctx.saved_tensors
        plan = Plan(*saved[:5])
        x_slots, h, a, prob, w1, w2 = saved[5:]
        wants_dx, _, wants_dw1, wants_dw2, *_ = ctx.needs_input_grad
        dx = dw1 = dw2 = None

        dy_slots = permute(dy, plan, recipe)
        da = torch_grouped_mm(dy_slots, w2, plan.ends)
        dh, dprob, _ = kernels.swiglu_backward(da, h, prob, None, plan.tile_expert)
        if wants_dx:
            dx = torch_grouped_mm(dh, w1, plan.ends)
            dx = unpermute(dx, plan, recipe)
        if wants_dw2:
            dw2 = torch_grouped_mm(dy_slots.t(), a, plan.ends)
        if wants_dw1:
            dw1 = torch_grouped_mm(dh.t(), x_slots, plan.ends)
        return dx, dprob[plan.slot], dw1, dw2, None, None


# ---- the layer for other people's models, as a function and as a module --------------------------

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_layer(x, top_k_index, top_k_weights, w1, w2) -> None:
    """Raises ValueError. Reads no values: nothing waits for a GPU."""
    tensors = {"x": x, "top_k_index": top_k_index, "top_k_weights": top_k_weights, "w1": w1,
               "w2": w2}
    for name, tensor in tensors.items():
        require(isinstance(tensor, Tensor), f"{name} must be a tensor", type(tensor))
        require(has_memory(tensor), f"{name} must be a plain tensor, with memory of its own (of a "
                "DTensor give to_local())", type(tensor))
        require(tensor.device == x.device, f"{name} must be on the device of x, {x.device}: move "
                "it", tensor.device)
        require(name == "top_k_index" or tensor.dtype in FLOATS,
                f"{name} must be float32, bfloat16 or float16: convert it", tensor.dtype)
    require(not x.is_cuda or x.device.index == torch.cuda.current_device(),
            "x must be on the current device: call torch.cuda.set_device first", x.device)
    require(w2.ndim == 3 and len(w2) > 0 and are_widths(*w2.shape[1:]),
            "w2 must be [E, D, F], D and F multiples of 128: pad it", w2.shape)
    E, D, F = w2.shape
    require(w1.shape == (E, 2 * F, D), "w1 must be [E, 2F, D] where w2 is [E, D, F]", w1.shape,
            w2.shape)
    require(x.ndim > 0 and x.shape[-1] == D, "x must be [..., D] where w2 is [E, D, F]", x.shape,
            w2.shape)
    require(top_k_index.ndim == x.ndim and top_k_index.shape[:-1] == x.shape[:-1]
            and top_k_index.shape[-1] > 0,
            "top_k_index must be [..., k] where x is [..., D], k at least 1", top_k_index.shape,
            x.shape)
    require(top_k_weights.shape == top_k_index.shape,
            "top_k_weights must have the shape of top_k_index", top_k_weights.shape,
            top_k_index.shape)


def are_widths(*widths: int) -> bool:
    return all(width > 0 and width % BLOCK == 0 for width in widths)


@torch.compiler.disable                 # What is compiled around the experts ends here.
def experts(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, w1: Tensor, w2: Tensor,
            recipe: "str | Recipe" = "flow") -> Tensor:
    """The expert layer as a function: for each token, the sum over its k choices e of
    top_k_weights * W2[e] (silu(gate) * up), with (gate, up) = W1[e] x.

    x              [..., D] fp32, bf16 or fp16; inside, it is bf16
    top_k_index    [..., k] int32 or int64, each in [0, E)
    top_k_weights  [..., k] fp32, bf16 or fp16
    w1             [E, 2F, D] fp32, bf16 or fp16: gate, then up (Hugging Face's gate_up_proj)
    w2             [E, D, F] (Hugging Face's down_proj)
    recipe         a name, a spec or a Recipe

    Returns x's shape and dtype. D and F are multiples of 128. The weights are cast in every call,
    so they are never stale. Gradients of x, w1 and w2 are computed only where they are wanted, and
    autocast outside changes no bit inside, forward or backward. Zero tokens give zeros and zero
    gradients.
    Raises ValueError for anything else, before any GPU work, and RuntimeError for a second
    derivative. (An index out of range is found without a sync: on a GPU the device asserts.)
    """
    recipe = parse_spec(recipe)
    check_layer(x, top_k_index, top_k_weights, w1, w2)
    if x.numel() == 0:
        # The result depends on all inputs, so that each gets a gradient of zeros.
        nothing = top_k_weights.sum() + w1[0, 0, 0] + w2[0, 0, 0]
        return x + 0 * nothing.to(x.dtype)
    E, D, F = w2.shape
    function = FP8Experts if recipe.precision == "fp8" else BF16Experts
    with torch.autocast(x.device.type, enabled=False):
        plan = make_plan(top_k_index, E)
        tokens = x.reshape(-1, D).bfloat16()
        weights = top_k_weights.reshape(plan.slot.shape).float()
        y = function.apply(tokens, weights, w1, w2, plan, recipe)
    y = y.to(x.dtype)
    # No view without need: FSDP2 warns of the view of a custom Function's output.
    return y if x.ndim == 2 else y.view(x.shape)


class Experts(nn.Module):
    """E SwiGLU experts: `experts` with weights of its own, w1 [E, 2F, D] (gate, then up) and
    w2 [E, D, F].

    dim D and hidden_dim F are multiples of 128; recipe is a name, a spec or a Recipe. Raises
    ValueError.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int,
                 recipe: "str | Recipe" = "flow", *, device=None, dtype=None):
        super().__init__()
        require(num_experts > 0, "num_experts must be at least 1", num_experts)
        require(are_widths(dim, hidden_dim), "dim and hidden_dim must be multiples of 128", dim,
                hidden_dim)
        require(dtype is None or dtype in FLOATS, "dtype must be float32, bfloat16 or float16",
                dtype)
        self.recipe = parse_spec(recipe)
        w1 = torch.empty(num_experts, 2 * hidden_dim, dim, device=device, dtype=dtype)
        w2 = torch.empty(num_experts, dim, hidden_dim, device=device, dtype=dtype)
        self.w1 = nn.Parameter(w1)
        self.w2 = nn.Parameter(w2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for w in (self.w1, self.w2):
            nn.init.normal_(w, std=w.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        E, D, F = self.w2.shape
        return f"num_experts={E}, dim={D}, hidden_dim={F}, recipe={self.recipe}"

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Shapes and dtypes as in `experts`."""
        return experts(x, top_k_index, top_k_weights, self.w1, self.w2, self.recipe)


# ---- the casts, counted as they happen -----------------------------------------------------------

@contextlib.contextmanager
def count_casts():
    """`with count_casts() as casts:` the name of each explicit cast of an activation, in order: one
    launch that only changes its precision, or finds new scales in it."""
    casts = []

    def note(name, arguments, result):
        if name in ("quantize", "dequantize", "requantize"):
            casts.append(name)

    kernels.hooks.append(note)
    try:
        yield casts
    finally:
        kernels.hooks.remove(note)
