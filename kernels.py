"""Every kernel of an FP8 MoE layer, and the PyTorch twin that specifies it.

An FP8 tensor is a pair, `x ~ code * scale`. A code is one E4M3 byte (1 sign, 4 exponent, 3 mantissa
bits: largest 448, smallest normal 2^-6, smallest subnormal 2^-9, one NaN per sign, no infinity); a
scale is one fp32 number for a group of codes along the axis that a GEMM sums over:

    activation, row-wise      1 x 128 blocks                 fprop and dgrad
    weight                    128 x 128 tiles                the same tile serves W and W^T
    activation, column-wise   transposed, 128 x 128 tiles    wgrad sums over tokens
                              (requantized: 1 x 128 blocks of the transposed tensor)

(The rows of a weight have similar magnitudes, so they can share a scale. Tokens differ.) In a GEMM
the tensor core sums 128 products of codes, and the sum is *promoted*: multiplied by the two scales,
and added to an fp32 sum. Then come the next 128.

An operation is three parts, always in this order:

    quantize_twin             says in PyTorch what must come out, and runs anywhere
    _quantize_kernel          computes it, in Triton
    quantize                  the launch: makes room for the result, and starts the kernel

`@operation(twin)` stands above each launch and is the one door to all of them: it makes arguments
contiguous, and calls the launch where kernels can run and the twin elsewhere. A launch refuses
shapes with which its kernel would read or write outside of its tensors. What index tensors hold is
not looked at, since on a GPU the host would have to wait for it.

Tokens are sorted by expert and padded, so that each expert has whole tiles of 128 slots. How many
tiles are used depends on the routing, which the host must not wait for. So tensors have room for
the most there can be: `tile_expert` [M/128] names the expert of each tile, -1 for those at the end
that no expert uses, and kernels skip these. `ends` [E] says where each expert's slots end.

The first evening is everything up to the last section: E4M3 and its scales, the door, quantize, the
transposes, SwiGLU, the plan's slots, moving rows, weights, and the grouped GEMM as a loop. The last
section is the second evening: the same product for Hopper (H100, H200; compute capability 9), in a
form that keeps the tensor core busy, in Gluon. That is Triton's lower level, where layouts, shared
memory and barriers are in one's own hands.

In kernels `r` and `c` are the rows and columns that a program works on, and `live` is the mask of
those that exist. x + at is a block of pointers, which tl.load and tl.store follow.

Padding and unused are two things: *padding* is slots of zeros at the end of an expert's last tile,
*unused* are whole tiles at the end of all, which no product reads, and most kernels do not write.

Shapes: R rows, C columns of any matrix; T tokens, M padded token slots, F expert width, E experts;
a GEMM is [M, K] times [N, K]^T (in wgrad M and N are widths, and K is the slots).
"""
import functools
import itertools
import math
import os
import warnings
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn.functional import silu
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# ---- E4M3 and its scales -------------------------------------------------------------------------

BLOCK = 128                     # codes per scale, rows per expert tile, K-step of the GEMMs
FP8 = torch.float8_e4m3fn
E4M3_MAX = 448.0                # 1.75 * 2^8
SCALE_MIN = 2.0 ** -126         # the smallest normal fp32: the scale of an all-zero block
SCALES = ("pow2", "fp32")       # the smallest power of two >= amax/448, or amax/448 itself

_TILE = tl.constexpr(BLOCK)                 # Inside a kernel only constexprs can be seen.
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_SCALE_MIN = tl.constexpr(SCALE_MIN)
_INF_BITS = tl.constexpr(0x7F800000)        # of fp32: as integers, finite magnitudes lie below it
FRACTION = 0x007FFFFF           # of fp32: the lowest 23 bits, what stands behind "1."
FRACTION_OF_448 = 0x00600000    # 0.75 of 2^23, since 448 = 1.75 * 2^8
_FRACTION = tl.constexpr(FRACTION)
_FRACTION_OF_448 = tl.constexpr(FRACTION_OF_448)


class QTensor(NamedTuple):
    """An FP8 tensor.

    data    [..., R, C] float8_e4m3fn codes
    scale   [..., C/128, R] fp32 for 1x128 blocks, or [..., C/128, R/128] for 128x128 tiles
    policy  "pow2" or "fp32": the `scales` that it was quantized with. Only powers of two can be
            shifted.

    Scales lie in the other order than codes: with 1x128 blocks, scale[c, r] belongs to
    data[r, 128c : 128c + 128], and data [256, 384] has scale [3, 256]. A GEMM walks along C, and
    reads the scales of all its rows at each step; so they lie side by side.
    """
    data: Tensor
    scale: Tensor
    policy: str

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def rows_per_scale(self) -> int:
        return 1 if self.scale.shape[-1] == self.data.shape[-2] else BLOCK


def empty_q(like: Tensor, *shape: int, policy: str, rows_per_scale: int = 1) -> QTensor:
    """Room for an FP8 tensor of this shape, [..., R, C]."""
    require(policy in SCALES, "scales must be 'pow2' or 'fp32'", policy)
    *experts, R, C = shape
    data = like.new_empty(shape, dtype=FP8)
    scale = like.new_empty(*experts, C // BLOCK, R // rows_per_scale, dtype=torch.float32)
    return QTensor(data, scale, policy)


def as_bytes(x: Tensor) -> Tensor:
    """FP8 goes through all kernels but the GEMMs as uint8: no load or store there depends on how a
    compiler treats fp8."""
    return x.view(torch.uint8)


# ---- the door: a kernel where it can run, its twin elsewhere -------------------------------------

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
OPERATIONS = {}             # name -> operation
hooks = []                  # Each is called after every operation, with (name, arguments, result).


def require(condition: bool, sentence: str, *got) -> None:
    """Raises ValueError with the sentence, and with what was got, which is put into words only
    then."""
    if not condition:
        words = " and ".join(map(repr, got))
        raise ValueError(f"{sentence}; got {words}" if got else sentence)


@functools.lru_cache                    # asked before each launch, and warns once
def capability(device: torch.device) -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        warnings.warn(f"compute capability {major}.{minor} has no FP8 tensor cores (8.9 has): the "
                      "PyTorch twins run, slowly")
    return major, minor


def use_kernels(device: torch.device) -> bool:
    """In Triton's interpreter, and on NVIDIA's GPUs with FP8 tensor cores, from 8.9 on."""
    if INTERPRET:
        return True
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and capability(device) >= (8, 9)


def has_memory(x: Tensor) -> bool:
    """False for what only stands for a tensor, a DTensor, a FakeTensor or one on the meta device:
    for these a kernel would get a null pointer."""
    try:
        return x.numel() == 0 or x.data_ptr() != 0
    except RuntimeError:                # how some of them answer
        return False


def admit(x):
    """An argument as a kernel can read it: contiguous, with memory, on the current device."""
    if isinstance(x, QTensor):
        *experts, R, C = x.data.shape
        # Divided by /, not //: a length that is no multiple of 128 shall fit nothing.
        layouts = [(*experts, C / BLOCK, R), (*experts, C / BLOCK, R / BLOCK)]
        require(x.scale.shape in layouts, "FP8 data [R, C] has scales [C/128, R] or [C/128, R/128]",
                x.data.shape, x.scale.shape)
        return QTensor(admit(x.data), admit(x.scale), x.policy)
    if not isinstance(x, Tensor):
        return x
    require(has_memory(x), "kernels read memory: give a plain tensor", type(x))
    require(not x.is_cuda or x.device.index == torch.cuda.current_device(),
            "kernels run on the current device: call torch.cuda.set_device first", x.device)
    return x.contiguous()


def operation(twin):
    """The one door to a kernel, see the top of this file. Twin and launch take the same arguments.
    (Where `tile_expert` only says what to skip, a twin does not use it.)

    op(...) runs the launch or the twin; op.twin is the twin. Before a launch it raises ValueError
    for tensors without memory or on another device than the current one.
    """
    def decorate(launch):
        @functools.wraps(launch)
        def op(*args, **kwargs):
            first = args[0] if args else next(iter(kwargs.values()))
            if use_kernels(first.device):
                args = [admit(x) for x in args]
                kwargs = {name: admit(x) for name, x in kwargs.items()}
                result = launch(*args, **kwargs)
            else:
                result = twin(*args, **kwargs)
            for hook in hooks:
                hook(launch.__name__, [*args, *kwargs.values()], result)
            return result
        op.twin = twin
        OPERATIONS[launch.__name__] = op
        return op
    return decorate


def covers(tile_expert: Tensor | None, rows: int) -> bool:
    """True where tile_expert has an entry for each tile of 128 rows, and where there is none."""
    return tile_expert is None or BLOCK * len(tile_expert) >= rows


# ---- scales --------------------------------------------------------------------------------------

def scale_of(amax: Tensor, scales: str) -> tuple[Tensor, Tensor]:
    """The scale of a block whose largest magnitude is amax (fp32, any shape), and the factor that
    encodes with it, 1/scale.

    fp32: amax/448.   pow2: the smallest power of two >= amax/448. Thus 3.0 = 1.5 * 2^1 gets the
    scale 2^-7, and its code is 384. (An amax above 1.94 * 2^127 gets the code 256 and the scale
    2^120, whose product is no fp32 number: it dequantizes to Inf.)
    A block of zeros gets SCALE_MIN, the smallest scale. A block with NaN or Inf gets SCALE_MIN and
    a factor of NaN, so all its codes become NaN.
    """
    require(scales in SCALES, "scales must be 'pow2' or 'fp32'", scales)
    finite = amax.isfinite()
    if scales == "pow2":
        # fp32 is a sign, 8 bits of biased exponent (127 is added) and 23 of fraction. 3.0 = 1.5 * 2
        # has the biased exponent 128, its scale 128 - 8 = 120, which stands for 2^-7. Where the
        # fraction exceeds that of 448 = 1.75 * 2^8, the scale must be twice as large.
        bits = amax.view(torch.int32)
        rounds_up = (bits & FRACTION) > FRACTION_OF_448
        biased = (bits >> 23) - 8 + rounds_up.int()
        scale = (biased.clamp(min=1) << 23).view(torch.float32)     # 1 stands for 2^-126
    else:
        # CUDA divides by a Python number through its inverse, whose last bit is off.
        scale = amax / torch.full_like(amax, E4M3_MAX)
        scale = scale.clamp(min=SCALE_MIN)
    scale = torch.where(finite, scale, SCALE_MIN)
    return scale, torch.where(finite, 1 / scale, torch.nan)


@triton.jit
def _scale_of(amax_bits, POW2: tl.constexpr):
    """The same, given the bits of amax (int32). As integers, magnitudes are ordered as they are as
    floats, Inf and NaN on top."""
    finite = amax_bits < _INF_BITS
    if POW2:
        rounds_up = ((amax_bits & _FRACTION) > _FRACTION_OF_448).to(tl.int32)
        biased = (amax_bits >> 23) - 8 + rounds_up              # of 3.0: 120
        biased = tl.maximum(tl.where(finite, biased, 1), 1)     # 1 stands for 2^-126
        scale = (biased << 23).to(tl.float32, bitcast=True)
        # scale = 2^(biased - 127), so 1 / scale = 2^(127 - biased), whose exponent's bits are
        # 254 - biased.
        factor = ((2 * 127 - biased) << 23).to(tl.float32, bitcast=True)
    else:
        amax = amax_bits.to(tl.float32, bitcast=True)
        scale = tl.where(finite, tl.div_rn(amax, _E4M3_MAX), _SCALE_MIN)
        scale = tl.maximum(scale, _SCALE_MIN)
        factor = tl.div_rn(1.0, scale)
    return scale, tl.where(finite, factor, float("nan"))


@triton.jit
def _amax_bits(x, axis: tl.constexpr):
    """The bits of the largest magnitude along an axis of fp32 x: without the sign they are ordered
    as integers, and a NaN wins, where a maximum of floats could drop it."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis)


@triton.jit
def _is_unused(tile_expert, tile):
    """True for a tile of 128 slots that no expert uses; without tile_expert all are used."""
    if tile_expert is None:                 # known when the kernel is compiled
        return False
    else:
        return tl.load(tile_expert + tile) < 0


@triton.jit
def _encode(x):
    """fp32 or fp16 -> the byte of the nearest E4M3 code, ties to even."""
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


def _to_fp8(x: Tensor) -> Tensor:
    """fp32 -> E4M3, ties to even; a NaN of either sign becomes 0x7F, as in the hardware's cast."""
    return torch.where(x.isnan(), torch.nan, x).to(FP8)


def _rounding_cast(values, source, target, rounding_mode=None):
    """Triton's interpreter truncates where it casts, and the hardware rounds to nearest even and
    saturates: so does this, which takes its place. Bits of `source` in, bits of `target` out, as
    numpy arrays."""
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": FP8}
    x = torch.tensor(values).view(types[str(source)]).float()
    if str(target) == "fp8e4nv":
        return as_bytes(_to_fp8(x.clamp(-E4M3_MAX, E4M3_MAX))).numpy()
    narrow = x.to(types[str(target)])
    unsigned = torch.uint16 if narrow.itemsize == 2 else torch.uint32
    return narrow.view(unsigned).numpy()


if INTERPRET:
    from triton.runtime import interpreter
    interpreter._convert_float = _rounding_cast


# ---- quantize ------------------------------------------------------------------------------------

def quantize_twin(x: Tensor, scales: str = "pow2", tile_expert=None) -> QTensor:
    blocks = rearrange(x.float(), "r (c b) -> c r b", b=BLOCK)
    scale, factor = scale_of(reduce(blocks.abs(), "c r b -> c r", "max"), scales)
    codes = _to_fp8(blocks * factor[..., None])
    return QTensor(rearrange(codes, "c r b -> r (c b)").contiguous(), scale, scales)


@triton.jit
def _quantize_kernel(
        x,                                  # [R, C] bf16, fp16 or fp32
        data, scale,                        # [R, C] uint8, [C/128, R] fp32
        tile_expert,                        # [R/128] int32 or None
        R, C, POW2: tl.constexpr, R_TILE: tl.constexpr):
    """Grid (R/R_TILE, C/128). Reads 2RC (bf16), writes RC bytes: three quarters of a bf16 copy."""
    if _is_unused(tile_expert, tl.program_id(0) * R_TILE // _TILE):
        return
    r = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)
    c = tl.program_id(1) * _TILE + tl.arange(0, _TILE)
    live = (r < R)[:, None]
    at = r[:, None] * C + c[None, :]
    block = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    s, factor = _scale_of(_amax_bits(block, 1), POW2)
    tl.store(data + at, _encode(block * factor[:, None]), mask=live)
    tl.store(scale + tl.program_id(1).to(tl.int64) * R + r, s, mask=r < R)


@operation(quantize_twin)
def quantize(x: Tensor, scales: str = "pow2", tile_expert: Tensor | None = None) -> QTensor:
    """Row-wise quantization in 1x128 blocks; the paper rounds scales up to powers of two
    (section 3.1).

    x [R, C] bf16, fp16 or fp32, C a multiple of 128; scales "pow2" | "fp32" -> QTensor [R, C],
    scale [C/128, R]. A block that holds NaN or Inf dequantizes to NaN.
    tile_expert [R/128] int32, here and below: what lies in tiles marked -1 stays undefined.
    """
    R, C = x.shape
    require(C % BLOCK == 0 and covers(tile_expert, R),
            "quantize takes x [R, C], C a multiple of 128, and tile_expert [R/128]", x.shape)
    q = empty_q(x, R, C, policy=scales)
    _quantize_kernel[triton.cdiv(R, 64), C // BLOCK](
        x, as_bytes(q.data), q.scale, tile_expert, R, C, POW2=scales == "pow2", R_TILE=64,
        num_warps=8)
    return q


def dequantize_twin(q: QTensor, dtype: torch.dtype = torch.float32, tile_expert=None) -> Tensor:
    scale = repeat(q.scale, "... c r -> ... (r i) (c b)", i=q.rows_per_scale, b=BLOCK)
    return (q.data.float() * scale).to(dtype)


@triton.jit
def _dequantize_kernel(
        data, scale,                        # [R, C] uint8, [C/128, R/R_PER] fp32
        out,                                # [R, C] bf16, fp16 or fp32
        tile_expert,                        # [R/128] int32 or None
        R, C,
        R_PER: tl.constexpr, R_TILE: tl.constexpr):
    """Grid (R/R_TILE, C/128). Reads RC, writes 2RC (bf16) bytes."""
    if _is_unused(tile_expert, tl.program_id(0) * R_TILE // _TILE):
        return
    r = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)
    c = tl.program_id(1) * _TILE + tl.arange(0, _TILE)
    live = (r < R)[:, None]
    at = r[:, None] * C + c[None, :]
    scale_row = scale + tl.program_id(1).to(tl.int64) * (R // R_PER)
    s = tl.load(scale_row + r // R_PER, mask=r < R, other=0.0)
    codes = tl.load(data + at, mask=live, other=0).to(tl.float8e4nv, bitcast=True)
    x = codes.to(tl.float32) * s[:, None]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=live)


@operation(dequantize_twin)
def dequantize(q: QTensor, dtype: torch.dtype = torch.float32,
               tile_expert: Tensor | None = None) -> Tensor:
    """code * scale: QTensor [R, C] in 1x128 blocks or 128x128 tiles -> [R, C] of dtype."""
    R, C = q.data.shape
    require(covers(tile_expert, R), "dequantize takes q [R, C] and tile_expert [R/128]",
            q.data.shape)
    out = q.data.new_empty(R, C, dtype=dtype)
    _dequantize_kernel[triton.cdiv(R, 64), C // BLOCK](
        as_bytes(q.data), q.scale, out, tile_expert, R, C, R_PER=q.rows_per_scale, R_TILE=64,
        num_warps=8)
    return out


# ---- row-wise FP8 -> column-wise FP8 -------------------------------------------------------------
#
# For wgrad, which sums over tokens. Flow's way is the first: 4.6 times as fast as the three
# launches of naive, dequantize, transpose and quantize. `requantize` makes one launch of the three.
#
# What does one scale for a tile cost? In a row far smaller than the largest one codes become
# subnormal and lose bits (in a row of scale S/2^15 all are subnormal), or zero (at S/2^19 all are).
# wgrad can pay that: the 128 rows are terms of one sum, in which such a row hardly counts. (A term
# is a product of two rows, of dY and X, say. Both factors would have to be out of proportion. While
# the presets train, the gradients of the weights lose nothing that shows: tools.probe measures it.)
# fprop and dgrad cannot pay: there each row has a result of its own.

def scaling_aware_transpose_twin(q: QTensor, rows: Tensor | None = None,
                                 tile_expert=None) -> QTensor:
    """In each tile the largest of the 128 row scales becomes the scale of all: each code is
    multiplied by its row's scale over that one, rounded, and stored transposed."""
    require(q.policy == "pow2", "the direct transpose moves exponents, which fp32 scales do not "
            "allow: quantize with scales='pow2'", q.policy)
    if rows is not None:
        q = gather_rows_twin(q, rows)
    M, C = q.data.shape
    data = q.data.new_empty(C, M)
    scale = q.scale.new_empty(M // BLOCK, C // BLOCK)       # of data [C, M]
    for i, j in itertools.product(range(M // BLOCK), range(C // BLOCK)):
        r = slice(i * BLOCK, (i + 1) * BLOCK)
        c = slice(j * BLOCK, (j + 1) * BLOCK)
        s = q.scale[j, r]
        top = s.max()
        scale[i, j] = top
        data[c, r] = _to_fp8(q.data[r, c].float() * (s / top)[:, None]).t()
    return QTensor(data, scale, q.policy)


@triton.jit
def _scaling_aware_transpose_kernel(
        data, scale,                        # [T, C] uint8, [C/128, T] fp32
        rows, tile_expert,                  # [M] int64 or None, [M/128] int32 or None
        out, out_scale,                     # [C, M] uint8, [M/128, C/128] fp32
        T, C, M):
    """Grid (M/128, C/128): one tile a program, neighbours write neighbouring columns.
    Reads MC, writes MC bytes."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    if _is_unused(tile_expert, i):
        return
    slot = i * _TILE + tl.arange(0, _TILE)
    c = j * _TILE + tl.arange(0, _TILE)
    if rows is not None:                    # Gathered on the way in, the permute costs nothing.
        r = tl.load(rows + slot).to(tl.int64)
    else:
        r = slot.to(tl.int64)
    live = r >= 0
    s = tl.load(scale + j.to(tl.int64) * T + r, mask=live, other=_SCALE_MIN)
    codes = tl.load(data + r[:, None] * C + c[None, :], mask=live[:, None], other=0)
    top = tl.max(s, 0)
    # Both are powers of two: the difference of their exponents is k = log2(top / s) >= 0.
    k = (top.to(tl.int32, bitcast=True) - s.to(tl.int32, bitcast=True)) >> 23
    factor = (tl.maximum(127 - k, 0) << 23).to(tl.float32, bitcast=True)        # 2^-k
    # fp16 is enough, and faster than fp32. A code has 4 significant bits, and fp16 reaches down to
    # 2^-24: so a product of 2^-21 or more is exact. Smaller ones may be wrong, and become 0 in any
    # case, since E4M3's smallest code is 2^-9. A factor that is 0 in fp16 makes all of them 0.
    values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    codes = _encode(values * factor.to(tl.float16)[:, None])
    tl.store(out + c[:, None].to(tl.int64) * M + slot[None, :], tl.trans(codes))
    tl.store(out_scale + i * (C // _TILE) + j, top)


@operation(scaling_aware_transpose_twin)
def scaling_aware_transpose(q: QTensor, rows: Tensor | None = None,
                            tile_expert: Tensor | None = None) -> QTensor:
    """Row-wise FP8 [M, C] -> column-wise FP8 [C, M] without leaving FP8: the paper's central kernel
    (section 3.1).

    In each 128x128 tile the largest row scale S becomes the tile's scale, and the codes of a row
    with scale s move down by k = log2(S/s) powers of two: exact while they stay normal,
    nearest-even below 2^-6, NaN and -0 kept.
    rows [M] int64: transpose q[rows] instead, -1 for a zero row (q is then [T, C]).
    M and C are multiples of 128 -> scale [M/128, C/128].
    Refuses fp32 scales: their ratios are no powers of two.
    """
    T, C = q.data.shape
    M = T if rows is None else len(rows)
    require(q.policy == "pow2" and q.rows_per_scale == 1 and M % BLOCK == 0
            and covers(tile_expert, M),
            "the direct transpose takes q [M, C] in 1x128 blocks with scales='pow2' (fp32 scales "
            "cannot be shifted), M a multiple of 128, and tile_expert [M/128]", q.policy, M)
    out = empty_q(q.data, C, M, policy=q.policy, rows_per_scale=BLOCK)
    _scaling_aware_transpose_kernel[M // BLOCK, C // BLOCK](
        as_bytes(q.data), q.scale, rows, tile_expert, as_bytes(out.data), out.scale, T, C, M,
        num_warps=4)
    return out


def transpose_twin(x: Tensor, tile_expert=None) -> Tensor:
    return x.t().contiguous()


@triton.jit
def _transpose_kernel(
        x, out,                             # [R, C], [C, R] of one dtype
        tile_expert,                        # [R/128] int32 or None
        R, C):
    """Grid (C/128, R/128). Reads 2RC, writes 2RC bytes."""
    r = tl.program_id(1).to(tl.int64) * _TILE + tl.arange(0, _TILE)
    c = tl.program_id(0).to(tl.int64) * _TILE + tl.arange(0, _TILE)
    out += c[:, None] * R + r[None, :]
    if _is_unused(tile_expert, tl.program_id(1)):
        tl.store(out, tl.zeros((_TILE, _TILE), x.dtype.element_ty))
        return
    tile = tl.load(x + r[:, None] * C + c[None, :])
    tl.store(out, tl.trans(tile))


@operation(transpose_twin)
def transpose(x: Tensor, tile_expert: Tensor | None = None) -> Tensor:
    """[R, C] -> [C, R], R and C multiples of 128: the middle one of naive's three launches.
    (PyTorch's copy runs at a fraction of the bandwidth.)

    tile_expert [R/128] int32: the kernel writes zeros in tiles marked -1. The quantize after it
    works on all tiles, and shall read nothing that was never written.
    """
    R, C = x.shape
    require(R % BLOCK == 0 and C % BLOCK == 0 and covers(tile_expert, R),
            "transpose takes x [R, C], multiples of 128, and tile_expert [R/128]", x.shape)
    out = x.new_empty(C, R)
    _transpose_kernel[C // BLOCK, R // BLOCK](x, out, tile_expert, R, C, num_warps=8)
    return out


def requantize_twin(q: QTensor, scales: str = "pow2", tile_expert=None) -> QTensor:
    return quantize_twin(dequantize_twin(q).t(), scales)


@triton.jit
def _requantize_kernel(
        data, scale,                        # [M, C] uint8, [C/128, M] fp32
        tile_expert,                        # [M/128] int32 or None
        out, out_scale,                     # [C, M] uint8, [M/128, C] fp32
        M, C, POW2: tl.constexpr):
    """Grid (M/128, C/128), a tile for each program. Reads MC, writes MC bytes and 4MC/128 of
    scales, of which the direct transpose writes one for 128."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    if _is_unused(tile_expert, i):
        return
    r = i * _TILE + tl.arange(0, _TILE)
    c = j * _TILE + tl.arange(0, _TILE)
    s = tl.load(scale + j.to(tl.int64) * M + r)
    codes = tl.load(data + r[:, None].to(tl.int64) * C + c[None, :])
    x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * s[:, None]
    s, factor = _scale_of(_amax_bits(x, 0), POW2)
    codes = _encode(x * factor[None, :])
    tl.store(out + c[:, None].to(tl.int64) * M + r[None, :], tl.trans(codes))
    tl.store(out_scale + i.to(tl.int64) * C + c, s)


@operation(requantize_twin)
def requantize(q: QTensor, scales: str = "pow2", tile_expert: Tensor | None = None) -> QTensor:
    """Row-wise FP8 [M, C] -> column-wise FP8 [C, M] in one launch: dequantize, take the amax along
    the other axis, quantize, store transposed.

    M and C are multiples of 128; q has 1x128 blocks of either policy -> 1x128 blocks,
    scale [M/128, C]. With fp32 scales every element is rounded a second time (and by naive's three
    launches a third time, to bf16 between the casts). With powers of two it is not, while codes
    stay normal, and the codes are those of the three launches.
    """
    M, C = q.data.shape
    require(q.rows_per_scale == 1 and M % BLOCK == 0 and covers(tile_expert, M),
            "requantize takes q [M, C] in 1x128 blocks, M a multiple of 128, and tile_expert "
            "[M/128]", q.data.shape)
    out = empty_q(q.data, C, M, policy=scales)
    _requantize_kernel[M // BLOCK, C // BLOCK](
        as_bytes(q.data), q.scale, tile_expert, as_bytes(out.data), out.scale, M, C,
        POW2=scales == "pow2", num_warps=4)
    return out


# ---- SwiGLU: a = silu(gate) * up * prob, h = [gate | up], prob the router's weight of a slot -----
#
# With scales=None the results have the dtype of h. Else they are emitted in FP8, with no tensor
# between SwiGLU and quantize: the paper's fused operator, 1.8 times as fast as the two launches.

def swiglu_twin(h: Tensor, prob: Tensor, scales: str | None = None, tile_expert=None):
    gate, up = h.float().chunk(2, dim=-1)
    a = silu(gate) * up * prob[:, None]
    return quantize_twin(a, scales) if scales else a.to(h.dtype)


@triton.jit
def _store_fp8(x, first, data, scale, r, live, width, M, POW2: tl.constexpr):
    """Quantizes x [R_TILE, C_TILE], a program's tile, in 1x128 blocks, and stores it at rows r
    [R_TILE, 1] and the columns from `first` on of a matrix [M, width]. So a tile of 2 x 256 becomes
    blocks [2, 2, 128] with scales [2, 2]."""
    BLOCKS: tl.constexpr = x.shape[1] // _TILE
    blocks = tl.reshape(x, (x.shape[0], BLOCKS, _TILE))
    s, factor = _scale_of(_amax_bits(blocks, 2), POW2)                  # [R_TILE, BLOCKS]
    codes = tl.reshape(_encode(blocks * factor[:, :, None]), x.shape)   # [R_TILE, C_TILE]
    c = first + tl.arange(0, x.shape[1])[None, :]
    tl.store(data + r * width + c, codes, mask=live)
    block = first // _TILE + tl.arange(0, BLOCKS)[None, :].to(tl.int64)
    tl.store(scale + block * M + r, s, mask=live)


@triton.jit
def _store_rows(x, first, data, scale, r, live, width, M, POW2: tl.constexpr):
    """Stores x there in FP8, or as it is, if there is no `scale` to store."""
    if scale is not None:
        _store_fp8(x, first, data, scale, r, live, width, M, POW2)
    else:
        c = first + tl.arange(0, x.shape[1])[None, :]
        tl.store(data + r * width + c, x.to(data.dtype.element_ty), mask=live)


@triton.jit
def _swiglu_kernel(
        h, prob, tile_expert,               # [M, 2F] bf16, [M] fp32, [M/128] int32 or None
        a, a_scale,                         # [M, F] uint8 and [F/128, M] fp32, or bf16 and None
        M, F,
        POW2: tl.constexpr, R_TILE: tl.constexpr, C_TILE: tl.constexpr):
    """Grid (M/R_TILE, F/C_TILE). Reads 4MF, writes MF bytes (2MF unquantized)."""
    if _is_unused(tile_expert, tl.program_id(0) * R_TILE // _TILE):
        return
    r = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)[:, None]
    first = tl.program_id(1) * C_TILE
    c = first + tl.arange(0, C_TILE)[None, :]
    live = r < M
    p = tl.load(prob + r, mask=live, other=0.0)
    gate = tl.load(h + r * F * 2 + c, mask=live, other=0.0).to(tl.float32)
    up = tl.load(h + r * F * 2 + F + c, mask=live, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up * p
    _store_rows(y, first, a, a_scale, r, live, F, M, POW2)


def _emit(like: Tensor, R: int, C: int, scales: str | None):
    """What is returned, and the two tensors that a kernel fills."""
    if scales is None:
        out = like.new_empty(R, C)
        return out, (out, None)
    out = empty_q(like, R, C, policy=scales)
    return out, (as_bytes(out.data), out.scale)


def _swiglu_tile(F: int) -> dict:
    """A program's tile: 2048 elements, 16 for each thread of 4 warps, in columns that divide F."""
    columns = math.gcd(F, 2048)
    return dict(R_TILE=2048 // columns, C_TILE=columns, num_warps=4)


@operation(swiglu_twin)
def swiglu(h: Tensor, prob: Tensor, scales: str | None = None, tile_expert: Tensor | None = None):
    """h [M, 2F] bf16 = [gate | up], prob [M] fp32 -> A [M, F], a QTensor, or with scales=None a
    tensor of h's dtype. F is a multiple of 128."""
    M = len(h)
    F = h.shape[1] // 2
    require(h.shape[1] % (2 * BLOCK) == 0 and len(prob) == M and covers(tile_expert, M),
            "swiglu takes h [M, 2F], F a multiple of 128, prob [M] and tile_expert [M/128]",
            h.shape, prob.shape)
    out, pointers = _emit(h, M, F, scales)
    tile = _swiglu_tile(F)
    _swiglu_kernel[triton.cdiv(M, tile["R_TILE"]), F // tile["C_TILE"]](
        h, prob, tile_expert, *pointers, M, F, POW2=scales == "pow2", **tile)
    return out


def swiglu_backward_twin(da: Tensor, h: Tensor, prob: Tensor, scales: str | None = None,
                         tile_expert=None):
    gate, up = h.float().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    dsilu = sigmoid * (1 + gate * (1 - sigmoid))        # silu(x) = x * sigmoid(x), differentiated
    da = da.float()
    dprob = (da * silu(gate) * up).sum(-1)
    dgate = da * prob[:, None] * up * dsilu
    dup = da * prob[:, None] * silu(gate)
    dh = torch.cat([dgate, dup], dim=-1)
    if scales is None:
        return dh.to(h.dtype), dprob, None
    return quantize_twin(dh, scales), dprob, swiglu_twin(h, prob, scales)


@triton.jit
def _swiglu_backward_kernel(
        da, h, prob, tile_expert,           # [M, F] bf16, [M, 2F] bf16, [M] fp32, [M/128] or None
        dh, dh_scale,                       # [M, 2F] uint8 and [2F/128, M] fp32, or bf16 and None
        dprob,                              # [M] fp32
        a, a_scale,                         # [M, F] uint8 and [F/128, M] fp32, or None and None
        M, F,
        POW2: tl.constexpr, R_TILE: tl.constexpr, C_TILE: tl.constexpr):
    """Grid (M/R_TILE,). Reads 6MF, writes 4MF bytes (dH and A in FP8: 3MF).

    A program owns whole rows and walks along them, so that dprob is a plain sum: no atomics.
    """
    if _is_unused(tile_expert, tl.program_id(0) * R_TILE // _TILE):
        return
    r = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)[:, None]
    live = r < M
    p = tl.load(prob + r, mask=live, other=0.0)
    dp = tl.zeros((R_TILE, 1), tl.float32)
    for first in range(0, F, C_TILE):
        c = first + tl.arange(0, C_TILE)[None, :]
        gate = tl.load(h + r * F * 2 + c, mask=live, other=0.0).to(tl.float32)
        up = tl.load(h + r * F * 2 + F + c, mask=live, other=0.0).to(tl.float32)
        d = tl.load(da + r * F + c, mask=live, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dp += tl.sum(d * silu * up, 1, keep_dims=True)
        dgate = d * p * up * sigmoid * (1 + gate * (1 - sigmoid))       # silu', as in the twin
        dup = d * p * silu
        if a is not None:                   # Made again, A need not be kept since forward.
            _store_rows(silu * up * p, first, a, a_scale, r, live, F, M, POW2)
        _store_rows(dgate, first, dh, dh_scale, r, live, 2 * F, M, POW2)
        _store_rows(dup, F + first, dh, dh_scale, r, live, 2 * F, M, POW2)
    tl.store(dprob + r, dp, mask=live)


@operation(swiglu_backward_twin)
def swiglu_backward(da: Tensor, h: Tensor, prob: Tensor, scales: str | None = None,
                    tile_expert: Tensor | None = None):
    """The backward of `swiglu`: da [M, F] bf16, h [M, 2F] bf16, prob [M] fp32 -> dh [M, 2F],
    dprob [M] fp32, and A [M, F].

    In FP8 (with scales), A is made once more from the h that is at hand, for the weight gradient of
    fc2. With scales=None dh has the dtype of h, and A is None.
    """
    M, F = da.shape
    require(h.shape == (M, 2 * F) and F % BLOCK == 0 and len(prob) == M and covers(tile_expert, M),
            "swiglu_backward takes da [M, F], F a multiple of 128, h [M, 2F], prob [M] and "
            "tile_expert [M/128]", da.shape, h.shape, prob.shape)
    dh, dh_pointers = _emit(h, M, 2 * F, scales)
    a, a_pointers = _emit(h, M, F, scales) if scales else (None, (None, None))
    dprob = prob.new_empty(M)
    tile = _swiglu_tile(F)
    _swiglu_backward_kernel[(triton.cdiv(M, tile["R_TILE"]),)](
        da, h, prob, tile_expert, *dh_pointers, dprob, *a_pointers, M, F, POW2=scales == "pow2",
        **tile)
    return dh, dprob, a


# ---- the routing plan: pairs sorted by expert -> slots -------------------------------------------
#
# A pair is a token and one of its k experts. make_plan in fp8flow.py has a worked example.

def most_slots(pairs: int, experts: int) -> int:
    """Room enough whatever the router does: an expert with pairs wastes at most 127 slots."""
    with_pairs = min(experts, pairs)
    return triton.cdiv(pairs + with_pairs * (BLOCK - 1), BLOCK) * BLOCK


def plan_slots_twin(pair_of_row: Tensor, bounds: Tensor, top_k: int):
    row = bounds.tolist()
    E = len(row) - 1
    M = most_slots(len(pair_of_row), E)
    slot = torch.empty_like(pair_of_row)
    pair = pair_of_row.new_full((M,), -1)
    tile_expert = pair_of_row.new_full((M // BLOCK,), -1, dtype=torch.int32)
    ends = pair_of_row.new_zeros(E, dtype=torch.int32)
    first = 0                               # the first slot of expert e
    for e in range(E):
        mine = pair_of_row[row[e]:row[e + 1]]
        end = first + triton.cdiv(len(mine), BLOCK) * BLOCK
        slot[mine] = torch.arange(first, first + len(mine), device=mine.device)
        pair[first:first + len(mine)] = mine
        tile_expert[first // BLOCK:end // BLOCK] = e
        ends[e] = end
        first = end
    token = pair.div(top_k, rounding_mode="floor")      # -1 stays -1.
    return slot, token, pair, tile_expert, ends


@triton.jit
def _plan_slots_kernel(
        pair_of_row, bounds,                # [T*k] int64, [E+1] int64
        slot, token, pair,                  # [T*k] int64, [M] int64, [M] int64
        tile_expert, ends,                  # [M/128] int32, [E] int32
        top_k, pairs, E, EXPERTS: tl.constexpr):
    """Grid (M/128,): a tile of 128 slots a program. It counts the tiles of all experts up to its
    own, and so finds its expert, and the rows of that expert that come into its slots. No atomics:
    a slot, a pair and a tile belong to one program. EXPERTS: E rounded up to a power of two."""
    tile = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    first_row = tl.load(bounds + e, mask=e < E, other=pairs)
    end_row = tl.load(bounds + e + 1, mask=e < E, other=pairs)
    tiles = (end_row - first_row + _TILE - 1) // _TILE          # of each expert
    end_tile = tl.cumsum(tiles, 0)
    expert = tl.sum((end_tile <= tile).to(tl.int32), 0)         # so many end before this tile
    # Triton cannot index a block: x[expert] is a sum in which all others are 0. In an unused tile
    # `expert` is EXPERTS, which no e is: the sums are 0, and no row is live.
    is_mine = e == expert
    row_of_tile = first_row + (tile - (end_tile - tiles)) * _TILE
    row = tl.sum(tl.where(is_mine, row_of_tile, 0), 0) + tl.arange(0, _TILE)
    live = row < tl.sum(tl.where(is_mine, end_row, 0), 0)
    p = tl.load(pair_of_row + row, mask=live, other=-1)
    s = tile.to(tl.int64) * _TILE + tl.arange(0, _TILE)
    tl.store(slot + p, s, mask=live)
    tl.store(pair + s, p)
    tl.store(token + s, tl.where(live, p // top_k, -1))
    tl.store(tile_expert + tile, tl.where(expert < E, expert, -1))
    if tile == 0:
        tl.store(ends + e, (end_tile * _TILE).to(tl.int32), mask=e < E)


@operation(plan_slots_twin)
def plan_slots(pair_of_row: Tensor, bounds: Tensor, top_k: int):
    """pair_of_row [T*k] int64, the pairs t*k + choice sorted by expert; bounds [E+1] int64: the
    rows of expert e are bounds[e] to bounds[e + 1] -> what a Plan holds:

    slot [T*k] int64 of each pair; token and pair [M] int64 of each slot, -1 in the padding;
    tile_expert [M/128] int32, -1 where a tile is unused; ends [E] int32. M is most_slots(T*k, E).
    """
    pairs = len(pair_of_row)
    E = len(bounds) - 1
    M = most_slots(pairs, E)
    slot = torch.empty_like(pair_of_row)
    token = slot.new_empty(M)
    pair = slot.new_empty(M)
    tile_expert = slot.new_empty(M // BLOCK, dtype=torch.int32)
    ends = slot.new_empty(E, dtype=torch.int32)
    _plan_slots_kernel[(M // BLOCK,)](
        pair_of_row, bounds, slot, token, pair, tile_expert, ends, top_k, pairs, E,
        EXPERTS=triton.next_power_of_2(E))
    return slot, token, pair, tile_expert, ends


# ---- permute + pad is one gather of rows; unpermute + unpad is one gather and sum ----------------

def gather_rows_twin(x, rows: Tensor, tile_expert=None):
    live = rows >= 0                    # An index of -1 reads the last row, which is not used then.
    if isinstance(x, QTensor):
        data = gather_rows_twin(as_bytes(x.data), rows).view(FP8)
        scale = torch.where(live, x.scale[:, rows], SCALE_MIN)
        return QTensor(data, scale, x.policy)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(live[:, None], x[rows], zero)


@triton.jit
def _gather_rows_kernel(
        x, scale,                           # [T, C] any type, [C/128, T] fp32 or None
        rows, tile_expert,                  # [M] int64, [M/128] int32 or None
        out, out_scale,                     # [M, C], [C/128, M] fp32 or None
        T, C, M, R_TILE: tl.constexpr, C_TILE: tl.constexpr):
    """Grid (M/R_TILE, C/C_TILE). Reads MC and writes MC elements; data and scales move together."""
    if _is_unused(tile_expert, tl.program_id(0) * R_TILE // _TILE):
        return
    slot = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)
    c = tl.program_id(1) * C_TILE + tl.arange(0, C_TILE)[None, :]
    r = tl.load(rows + slot, mask=slot < M, other=-1).to(tl.int64)
    tile = tl.load(x + r[:, None] * C + c, mask=(r >= 0)[:, None], other=0)
    tl.store(out + slot[:, None] * C + c, tile, mask=(slot < M)[:, None])
    if scale is not None:
        first_block = tl.program_id(1).to(tl.int64) * (C_TILE // _TILE)
        block = first_block + tl.arange(0, C_TILE // _TILE)[:, None]
        s = tl.load(scale + block * T + r[None, :], mask=(r >= 0)[None, :], other=_SCALE_MIN)
        tl.store(out_scale + block * M + slot[None, :], s, mask=(slot < M)[None, :])


@operation(gather_rows_twin)
def gather_rows(x, rows: Tensor, tile_expert: Tensor | None = None):
    """out[i] = x[rows[i]], zeros (with the smallest scale) where rows[i] is -1: the paper's fused
    permute+pad.

    x [T, C], C a multiple of 128, a tensor or a QTensor in 1x128 blocks; rows [M] int64, each in
    [-1, T) -> [M, C] of the same kind. Unused tiles stay undefined, see quantize.
    """
    is_fp8 = isinstance(x, QTensor)
    data = as_bytes(x.data) if is_fp8 else x
    scale = x.scale if is_fp8 else None
    T, C = data.shape
    M = len(rows)
    require(C % BLOCK == 0 and covers(tile_expert, M) and (not is_fp8 or x.rows_per_scale == 1),
            "gather_rows takes x [T, C], C a multiple of 128, in FP8 with a scale for each row, "
            "and tile_expert [M/128]", data.shape)
    out = data.new_empty(M, C)
    out_scale = scale.new_empty(len(scale), M) if is_fp8 else None
    c_tile = math.gcd(C, 512)
    _gather_rows_kernel[triton.cdiv(M, 32), C // c_tile](
        data, scale, rows, tile_expert, out, out_scale, T, C, M, R_TILE=32, C_TILE=c_tile,
        num_warps=8)
    return QTensor(out.view(FP8), out_scale, x.policy) if is_fp8 else out


def sum_rows_twin(x: Tensor, slots: Tensor) -> Tensor:
    return sum(x[slot].float() for slot in slots.unbind(1)).to(x.dtype)


@triton.jit
def _sum_rows_kernel(
        x, slots, out,                      # [M, C] bf16, [T, k] int64, [T, C] bf16
        T, C, TOP_K: tl.constexpr, R_TILE: tl.constexpr, C_TILE: tl.constexpr):
    """Grid (T/R_TILE, C/C_TILE). Reads 2kTC, writes 2TC bytes."""
    t = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)
    c = tl.program_id(1) * C_TILE + tl.arange(0, C_TILE)[None, :]
    live = (t < T)[:, None]
    acc = tl.zeros((R_TILE, C_TILE), tl.float32)
    for j in tl.static_range(TOP_K):
        slot = tl.load(slots + t * TOP_K + j, mask=t < T, other=0)
        acc += tl.load(x + slot[:, None] * C + c, mask=live, other=0.0).to(tl.float32)
    tl.store(out + t[:, None] * C + c, acc.to(out.dtype.element_ty), mask=live)


@operation(sum_rows_twin)
def sum_rows(x: Tensor, slots: Tensor) -> Tensor:
    """Unpermute+unpad: out[t] = sum of x[slots[t, j]] over j, in that order, in fp32.

    x [M, C] bf16, C a multiple of 128; slots [T, k] int64, each in [0, M) -> [T, C] bf16.
    No atomics: a token owns its sum.
    """
    T, top_k = slots.shape
    C = x.shape[1]
    require(C % BLOCK == 0, "sum_rows takes x [M, C], C a multiple of 128", x.shape)
    c_tile = math.gcd(C, 2048)
    r_tile = 2048 // c_tile
    out = x.new_empty(T, C)
    _sum_rows_kernel[triton.cdiv(T, r_tile), C // c_tile](
        x, slots, out, T, C, TOP_K=top_k, R_TILE=r_tile, C_TILE=c_tile, num_warps=4)
    return out


# ---- weights: 128x128 tiles survive a transpose, so one pass over the master writes W and W^T ----

def quantize_weight_twin(w: Tensor, scales: str = "pow2") -> tuple[QTensor, QTensor]:
    blocks = rearrange(w.float(), "e (n i) (k j) -> e k n i j", i=BLOCK, j=BLOCK)
    scale, factor = scale_of(reduce(blocks.abs(), "e k n i j -> e k n", "max"), scales)
    codes = _to_fp8(blocks * factor[..., None, None])
    codes = rearrange(codes, "e k n i j -> e (n i) (k j)")
    q = QTensor(codes.contiguous(), scale, scales)
    q_t = QTensor(codes.mT.contiguous(), scale.mT.contiguous(), scales)
    return q, q_t


@triton.jit
def _encode_again(x, factor):
    """The codes of _encode(x * factor), from a second conversion.

    One conversion could serve W and W^T, but ptxas 12.9, NVIDIA's assembler, then corrupts the
    transposed store (github.com/triton-lang/triton/issues/11111). Halving and doubling are exact,
    and to the compiler the two conversions are not the same one.
    """
    return _encode(x * (factor * 0.5) * 2.0)


@triton.jit
def _quantize_weight_kernel(
        w,                                  # [E, N, K] fp32, bf16 or fp16
        data, scale,                        # [E, N, K] uint8, [E, K/128, N/128] fp32
        data_t, scale_t,                    # [E, K, N] uint8, [E, N/128, K/128] fp32
        N, K, POW2: tl.constexpr):
    """Grid (N/128, K/128, E). Reads 4NK (fp32), writes 2NK bytes an expert."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    e = tl.program_id(2).to(tl.int64)
    n = i * _TILE + tl.arange(0, _TILE)
    k = j * _TILE + tl.arange(0, _TILE)
    at = e * N * K + n[:, None].to(tl.int64) * K + k[None, :]
    at_t = e * N * K + k[:, None].to(tl.int64) * N + n[None, :]
    tile = tl.load(w + at).to(tl.float32)
    s, factor = _scale_of(tl.max(_amax_bits(tile, 1), 0), POW2)
    tl.store(data + at, _encode(tile * factor))
    tl.store(data_t + at_t, tl.trans(_encode_again(tile, factor)))
    first = e * (N // _TILE) * (K // _TILE)
    tl.store(scale + first + j * (N // _TILE) + i, s)
    tl.store(scale_t + first + i * (K // _TILE) + j, s)


@operation(quantize_weight_twin)
def quantize_weight(w: Tensor, scales: str = "pow2") -> tuple[QTensor, QTensor]:
    """Weights for fprop and dgrad, each as Hopper's FP8 instruction wants it, the summed axis last:
    w [E, N, K] fp32, bf16 or fp16 -> W [E, N, K] and W^T [E, K, N], in 128x128 tiles.

    N and K are multiples of 128; scales are [E, K/128, N/128] and [E, N/128, K/128].
    """
    E, N, K = w.shape
    require(N % BLOCK == 0 and K % BLOCK == 0,
            "quantize_weight takes w [E, N, K], N and K multiples of 128", w.shape)
    q = empty_q(w, E, N, K, policy=scales, rows_per_scale=BLOCK)
    q_t = empty_q(w, E, K, N, policy=scales, rows_per_scale=BLOCK)
    _quantize_weight_kernel[N // BLOCK, K // BLOCK, E](
        w, as_bytes(q.data), q.scale, as_bytes(q_t.data), q_t.scale, N, K, POW2=scales == "pow2",
        num_warps=8)
    return q, q_t


# ---- grouped GEMM as a loop ----------------------------------------------------------------------
#
# Two products: fprop and dgrad sum over a width, and each tile of rows has its expert's weight.
# wgrad sums over the slots of each expert. On Hopper the kernel of the last section takes over,
# with the same bits. Why promote every 128 products? Hopper's tensor core keeps about 14 bits of a
# sum of FP8 products and truncates the rest, which over thousands of products would be too much.

def grouped_gemm_twin(a: QTensor, b: QTensor, tile_expert: Tensor, ends: Tensor) -> Tensor:
    x = dequantize_twin(a)
    w = dequantize_twin(b)
    out = x.new_zeros(len(x), w.shape[1], dtype=torch.bfloat16)
    row_expert = tile_expert.repeat_interleave(BLOCK)
    for e in range(len(w)):
        mine = row_expert == e
        out[mine] = (x[mine] @ w[e].T).to(out.dtype)
    return out


@triton.jit
def _grouped_gemm_kernel(
        a, a_scale,                 # [M, K] FP8, [K/128, M] fp32
        b, b_scale,                 # [E, N, K] FP8, [E, K/128, N/128] fp32
        tile_expert,                # [M/128] int32
        out,                        # [M, N] bf16
        M, N, K):
    """Grid (N/128, M/128): a program makes one 128x128 tile of out, in K-steps of 128 products.
    Neighbours share rows of a, which then come from the L2 cache. The last line of the loop
    promotes.
    """
    n = tl.program_id(0)
    m = tl.program_id(1)
    e = tl.load(tile_expert + m)
    if e < 0:
        return
    i = tl.arange(0, _TILE)
    row = m * _TILE + i
    col = n * _TILE + i
    a_at = a + row[:, None].to(tl.int64) * K + i[None, :]
    b_at = b + (e * N + col)[None, :].to(tl.int64) * K + i[:, None]         # transposed
    b_scale += e * (K // _TILE) * (N // _TILE)
    acc = tl.zeros((_TILE, _TILE), tl.float32)
    for k in range(K // _TILE):
        x = tl.load(a_at + k * _TILE)
        y = tl.load(b_at + k * _TILE)
        x_scale = tl.load(a_scale + k * M + row)                    # 128, one for each row
        y_scale = tl.load(b_scale + k * (N // _TILE) + n)           # one for the tile
        acc += tl.dot(x, y) * (x_scale * y_scale)[:, None]
    at = row[:, None].to(tl.int64) * N + col[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty))


@operation(grouped_gemm_twin)
def grouped_gemm(a: QTensor, b: QTensor, tile_expert: Tensor, ends: Tensor) -> Tensor:
    """out[rows of expert e] = a[rows of e] @ b[e]^T. In fprop b is W (X @ W^T), in dgrad it is what
    quantize_weight returned as W^T (dH @ W).

    a [M, K] in 1x128 blocks, b [E, N, K] in 128x128 tiles -> [M, N] bf16; all multiples of 128.
    tile_expert [M/128] int32: the expert of each tile of rows, -1 past the last one (those rows
    stay undefined). ends [E] int32: where each expert's rows end, a multiple of 128. (The Hopper
    kernel alone reads it, for the number of tiles in use.)
    """
    M, K = a.data.shape
    N = b.data.shape[1]
    require(a.rows_per_scale == 1 and b.rows_per_scale == BLOCK and K == b.data.shape[2]
            and M == BLOCK * len(tile_expert),
            "grouped_gemm takes a [M, K] in 1x128 blocks, b [E, N, K] in 128x128 tiles, and "
            "tile_expert [M/128]", a.data.shape, b.data.shape, tile_expert.shape)
    out = a.data.new_empty(M, N, dtype=torch.bfloat16)
    if use_hopper_gemm(a.device):
        launch_hopper_gemm(a, b, out, tile_expert, ends)
    else:
        launch_gemm_loop(a, b, out, tile_expert)
    return out


def launch_gemm_loop(a: QTensor, b: QTensor, out: Tensor, tile_expert: Tensor) -> None:
    """Fills out [M, N]."""
    M, K = a.data.shape
    N = b.data.shape[1]
    _grouped_gemm_kernel[N // BLOCK, M // BLOCK](
        a.data, a.scale, b.data, b.scale, tile_expert, out, M, N, K, num_warps=8, num_stages=3)


def grouped_wgrad_twin(a: QTensor, b: QTensor, ends: Tensor,
                       dtype: torch.dtype = torch.float32) -> Tensor:
    x = dequantize_twin(a)
    y = dequantize_twin(b)
    out = x.new_empty(len(ends), len(x), len(y), dtype=dtype)
    begin = 0
    for e, end in enumerate(ends.tolist()):
        out[e] = x[:, begin:end] @ y[:, begin:end].T
        begin = end
    return out


@triton.jit
def _grouped_wgrad_kernel(
        a, a_scale,                 # [M, K] FP8, [K/128, M/PER] fp32: K is the slots
        b, b_scale,                 # [N, K] FP8, [K/128, N/PER] fp32
        ends, out,                  # [E] int32, [E, M, N] bf16 or fp32
        M, N, K, PER: tl.constexpr):
    """Grid (N/128, M/128, E): the same, but M and N are widths, and the sum is over the slots of
    one expert. PER: the rows that share a scale, 128, or 1 where slots were quantized again."""
    n = tl.program_id(0)
    m = tl.program_id(1)
    e = tl.program_id(2)
    begin = tl.load(ends + e - 1, mask=e > 0, other=0)
    end = tl.load(ends + e)
    i = tl.arange(0, _TILE)
    row = m * _TILE + i
    col = n * _TILE + i
    a_at = a + row[:, None].to(tl.int64) * K + i[None, :]
    b_at = b + col[None, :].to(tl.int64) * K + i[:, None]
    acc = tl.zeros((_TILE, _TILE), tl.float32)
    for k in range(begin // _TILE, end // _TILE):
        x = tl.load(a_at + k * _TILE)
        y = tl.load(b_at + k * _TILE)
        x_scale = tl.load(a_scale + k * (M // PER) + row // PER)
        y_scale = tl.load(b_scale + k * (N // PER) + col // PER)
        acc += tl.dot(x, y) * (x_scale[:, None] * y_scale[None, :])
    at = (e * M + row)[:, None].to(tl.int64) * N + col[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty))


@operation(grouped_wgrad_twin)
def grouped_wgrad(a: QTensor, b: QTensor, ends: Tensor,
                  dtype: torch.dtype = torch.float32) -> Tensor:
    """dW[e] = a[:, slots of e] @ b[:, slots of e]^T, zeros for an expert without slots.

    a [M, slots], b [N, slots] column-wise, both in 128x128 tiles (from the direct transpose) or
    both in 1x128 blocks (requantized); M, N, slots multiples of 128. ends [E] int32: the end of
    each expert's slots. -> [E, M, N] of dtype, fp32 or bf16.
    """
    M, K = a.data.shape
    N = len(b.data)
    E = len(ends)
    require(a.rows_per_scale == b.rows_per_scale and K == b.data.shape[1]
            and M % BLOCK == N % BLOCK == K % BLOCK == 0,
            "grouped_wgrad takes a [M, slots] and b [N, slots], all multiples of 128, with scales "
            "of one kind", a.data.shape, b.data.shape)
    out = a.data.new_empty(E, M, N, dtype=dtype)
    if use_hopper_gemm(a.device):
        launch_hopper_gemm(a, b, out, None, ends)
    else:
        _grouped_wgrad_kernel[N // BLOCK, M // BLOCK, E](
            a.data, a.scale, b.data, b.scale, ends, out, M, N, K, PER=a.rows_per_scale,
            num_warps=8, num_stages=3)
    return out


# ---- grouped GEMM on Hopper: a tensor core that is kept busy, in Gluon ---------------------------
#
# The second evening. `acc += dot * scale` makes a program wait for the tensor core, and then makes
# the tensor core wait while the CUDA cores promote. Here a program is three roles that run at the
# same time, `_loader` once and `_consumer` twice:
#
#     loader     one warp, 32 threads. Asks the copy engine (TMA) for the tiles of later K-steps,
#                into a ring of stages in shared memory, as soon as a stage is free.
#     consumers  two groups of four warps. Each owns 64 of the tile's 128 rows: it starts a product,
#                waits for it, and promotes it. (wgmma, the instruction for a product, belongs to
#                four warps together, since a multiprocessor has four quarters, each with a tensor
#                core of its own. "The tensor core" below is all four.)
#
# In time, from left to right, where L and R are the left and the right half of a tile's columns:
#
#     consumer 0     product L   promote L   product R   promote R   product L   promote L
#     consumer 1                 product L   promote L   product R   promote R   product L
#     tensor core    for 0       for 1       for 0       for 1       for 0       for 1
#     loader         copies the tiles of later K-steps, whenever a stage is free
#
# What makes the consumers take turns? No barrier. Both start at once, and the tensor core serves a
# product after the other: so consumer 1 has its first one later, by the length of a product. From
# then on each finds the tensor core free when it has promoted, because the other is promoting then.
# (That products are served one after the other is not documented. It shows in the time: mixed, both
# would end together and promote together, and the kernel would be no faster than the loop.)
#
# The loop above leaves gaps because in one program product and promotion come one after the other.
# More stages would not close them: it has three K-steps under way already (num_stages=3), and does
# not wait for tiles. More programs on a multiprocessor would, but each needs a sum and a partial
# sum of 128 x 128 fp32 numbers in registers. That is 128 KB of 256 KB, and with some registers for
# addresses only one program fits.
#
# The roles meet at `mbarrier`s, counters in shared memory. A barrier expects a number of arrivals
# and of bytes. When all have come, a phase of it ends: it flips one bit, its parity, and counts
# anew. `mbarrier.wait(barrier, p)` returns when the parity is p. A new barrier has parity 1, and so
# it has parity 0 after its first phase.
#
# Each stage has a barrier `empty`, for the arrivals of both consumers when they have read it, and
# two barriers `full`, for the bytes of a with the left half of b, and of the right half of b. Stage
# 0, one event after the other:
#
#     use 0   loader      waits until empty has parity 1: a new barrier has, so it passes at once
#             loader      asks for the bytes of K-step 0; when they are there, full has parity 0
#             consumers   wait until full has parity 0, read the stage, and arrive at empty
#                         when both have, empty has parity 0
#     use 1   loader      waits until empty has parity 0: use 0 is over
#             loader      asks for the bytes of K-step 4; when they are there, full has parity 1
#             consumers   wait until full has parity 1, read the stage, and arrive at empty
#                         when both have, empty has parity 1; and so on
#
# So in use u a consumer waits for parity u % 2 of `full`, and the loader for the other parity of
# `empty`. Loader and consumers count K-steps alike, i = 0, 1, 2, ..., which gives them the stage,
# i % 4, and its use, i // 4. One bit is enough, because each side waits for the other: neither gets
# two phases ahead.
#
# The tile is 128 x 256, since wider tiles read fewer bytes for a product: after the tensor core,
# what L2 delivers is the next limit. The halves of its columns, `left` and `right`, take turns in a
# consumer, because registers do not suffice for the partial sums of both. What a multiprocessor
# has, and where it goes:
#
#     registers        65,536       at launch      12 warps x 32 threads x 168 = 64,512
#                                   (three groups of four, though the loader needs one warp);
#                                   then each group has other numbers:
#                                   2 consumers    232 a thread: 64 for the sums of the left half
#                                                  (64 x 128 over 128 threads), 64 for those of the
#                                                  right one, 64 for a partial sum, 40 for the rest
#                                   1 loader       40 a thread; 2 x 232 + 40 = 3 x 168
#     shared memory    227 KB       4 stages x (128 + 256) rows x 128 bytes: 192 KB,
#                                   and 32 KB of buffers for stores
#
# Words of Gluon. A *layout* says which thread holds which elements of a tensor in registers: SUM is
# the one in which wgmma leaves its sums. A *slice*, SliceLayout(1, SUM), is SUM without its axis 1,
# for one number per row: each thread holds the numbers of the rows that it has in SUM, so the two
# multiply in place. (SliceLayout(0, SUM): one number per column.) A *swizzled* layout is for shared
# memory, where bytes lie in 32 banks that serve one request at a time: it rotates the pieces of
# each row, so that threads which read down a column ask different banks. wgmma and TMA want it so.
#
# Lines marked `# naive` are for a b that has one scale per column, in the wgrad of every recipe
# whose transpose is not direct. A thread would need 64 of these scales, for which registers do not
# suffice: the loader copies them into the stage, beside the tiles. (Elsewhere the compiler drops
# these lines, and the ring for the scales.)

_ROWS = gl.constexpr(BLOCK // 2)        # rows of a consumer
_WIDE = gl.constexpr(2 * BLOCK)         # columns of a tile
_BAND = gl.constexpr(4)                 # rows of tiles that are worked on at the same time

LAUNCH_REGISTERS = 168                  # a thread, a multiple of 8
CONSUMER_REGISTERS = 232
LOADER_REGISTERS = 40
# warp_specialize below runs its first function, consumer 0, on the warps of the launch (num_warps
# is 4), with the registers that are left. The lists are for its second and third function.
_WORKER_WARPS = gl.constexpr([4, 1])                    # consumer 1, loader
_WORKER_REGISTERS = gl.constexpr([CONSUMER_REGISTERS, LOADER_REGISTERS])

# Triton 3.8 renamed these three.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _locate(tile, problem, WGRAD: gl.constexpr):
    """Where the tile'th tile of out lies: its first row in a, its first column, its expert, and
    its K-steps, begin to end.

    In bands: tiles are counted down four rows of tiles, then on to the next column, so that
    programs that run at the same time share operands in L2. (Without bands, m = tile % m_tiles and
    n = tile // m_tiles.)

              n = 0  1   2
        m = 0     0  4   8
        m = 1     1  5   9
        m = 2     2  6  10
        m = 3     3  7  11
        m = 4    12 14  16          the last band may have fewer rows
        m = 5    13 15  17

    Rows of tiles that no expert uses come last, and are not counted: no expert is -1 here.
    """
    tile_expert, ends, M, N, K, m_tiles, n_tiles = problem
    if WGRAD:
        expert = tile // (m_tiles * n_tiles)
        tile = tile % (m_tiles * n_tiles)
    band = tile // (_BAND * n_tiles)
    inside = tile % (_BAND * n_tiles)
    height = gl.minimum(m_tiles - _BAND * band, _BAND)
    m = _BAND * band + inside % height
    n = inside // height
    if WGRAD:
        begin = gl.load(ends + expert - 1, mask=expert > 0, other=0) // _TILE
        end = gl.load(ends + expert) // _TILE
    else:
        expert = gl.load(tile_expert + m)
        begin = 0
        end = K // _TILE
    return m * _TILE, n * _WIDE, expert, begin, end


@gluon.jit
def _loader(a, b, b_scale, ring, problem, tiles,
            PROGRAMS: gl.constexpr, WGRAD: gl.constexpr, B_PER: gl.constexpr):
    a_ring, b_ring, scale_ring, full, empty = ring
    tile_expert, ends, M, N, K, m_tiles, n_tiles = problem
    STAGES: gl.constexpr = a_ring.shape[0]
    i = 0                                       # K-steps so far, of all tiles
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        row, col, expert, begin, end = _locate(tile, problem, WGRAD)
        if WGRAD:
            b_row = col
        else:
            b_row = expert * N + col
        for k in range(begin, end):
            stage = i % STAGES
            use = i // STAGES
            parity = use % 2
            left_full = full.index(2 * stage)
            right_full = full.index(2 * stage + 1)
            mbarrier.wait(empty.index(stage), 1 - parity)       # The use before this is over.
            if B_PER == 1:                                                          # naive
                # 32 threads of a warp, four columns each: 128 columns along one axis.
                lanes: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])         # naive
                scales = b_scale + k * N + gl.arange(0, _TILE, layout=lanes)        # naive
                left_scales = scale_ring.index(stage).slice(0, _TILE)               # naive
                right_scales = scale_ring.index(stage).slice(_TILE, _TILE)          # naive
                # Where N ends between the halves, the right one is not stored: any place will do.
                right_col = gl.minimum(col // _TILE + 1, N // _TILE - 1) * _TILE    # naive
                _copy(left_scales, scales + col)                                    # naive
                _copy(right_scales, scales + right_col)                             # naive
                # `left_full` waits for both copies, too: each of the 32 threads lets it expect one
                # arrival more, and that arrival comes when the thread's copies have ended.
                async_copy.mbarrier_arrive(left_full)                               # naive
            # `expect` arrives, and tells the barrier how many bytes to wait for besides. Rows of b
            # past N are those of the next expert, or zeros; their products are not stored.
            mbarrier.expect(left_full, 2 * _TILE * _TILE)
            _tma_load(a, [row, k * _TILE], left_full, a_ring.index(stage))
            _tma_load(b, [b_row, k * _TILE], left_full, b_ring.index(stage).slice(0, _TILE))
            mbarrier.expect(right_full, _TILE * _TILE)
            right_half = b_ring.index(stage).slice(_TILE, _TILE)
            _tma_load(b, [b_row + _TILE, k * _TILE], right_full, right_half)
            i += 1


@gluon.jit
def _pin(x):
    """Makes the compiler finish x here, and not later: an instruction that needs x, and of whose
    effects it knows nothing (is_pure=False). It is empty. ("=f,0": the result is an fp32 register,
    the one that x came in. pack=1: one element at a time.)"""
    return gl.inline_asm_elementwise("", "=f,0", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _product(a, b, SUM: gl.constexpr):
    """a [64, 128] times b [128, 128]^T by wgmma, fp32 in layout SUM. That the consumer waits for it
    here (until 0 products are unfinished) costs nothing: meanwhile the other one promotes."""
    zero = gl.zeros([_ROWS, _TILE], gl.float32, SUM)
    partial = hopper.warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)
    return hopper.warpgroup_mma_wait(0, deps=[partial])


@gluon.jit
def _outer(a_scale, b_scale, SUM: gl.constexpr):
    """naive: a scale for each of 64 x 128 sums, from a_scale [64] in registers and b_scale [128] in
    shared memory."""
    row = gl.expand_dims(b_scale.load(gl.SliceLayout(0, SUM)), 0)
    return gl.expand_dims(a_scale, 1) * row


@gluon.jit
def _consumer(consumer: gl.constexpr, a_scale, b_scale, out, buffers, ring, problem, tiles,
              PROGRAMS: gl.constexpr, WGRAD: gl.constexpr,
              A_PER: gl.constexpr, B_PER: gl.constexpr):
    a_ring, b_ring, scale_ring, full, empty = ring
    tile_expert, ends, M, N, K, m_tiles, n_tiles = problem
    STAGES: gl.constexpr = a_ring.shape[0]
    # How wgmma returns its sums. [3, 0]: version 3.0 of the instruction. [4, 1]: of its four warps
    # each has a quarter of the rows, and all columns. [16, 128, 32]: a warp's part of one
    # instruction is 16 rows x 128 columns, and sums 32 products.
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    r = consumer * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, SUM))
    a_scales = M // A_PER                       # how many scales of a there are in one K-step
    b_scales = N // B_PER
    i = 0                                       # K-steps so far, of all tiles
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        row, col, expert, begin, end = _locate(tile, problem, WGRAD)
        # Scales are loaded a K-step ahead; the last step loads its own again. An expert without
        # rows has no step (begin == end): what is loaded here is not used then, but the address
        # must exist, hence `last` and `first`.
        last = gl.maximum(end - 1, 0)
        first = gl.minimum(begin, last)
        a_scale_at = a_scale + (row + r) // A_PER
        s_a = gl.load(a_scale_at + first * a_scales)
        if B_PER == _TILE:
            left_block = col // _TILE
            # The right half has the next scale, unless N ends between the halves.
            right_block = gl.minimum(left_block + 1, b_scales - 1)
            if not WGRAD:
                b_scale_of_expert = b_scale + expert * (K // _TILE) * b_scales
            else:
                b_scale_of_expert = b_scale
            left_at = b_scale_of_expert + left_block
            right_at = b_scale_of_expert + right_block
            s_left = gl.load(left_at + first * b_scales)
            s_right = gl.load(right_at + first * b_scales)
        left = gl.zeros([_ROWS, _TILE], gl.float32, SUM)
        right = gl.zeros([_ROWS, _TILE], gl.float32, SUM)
        for k in range(begin, end):
            stage = i % STAGES
            use = i // STAGES
            parity = use % 2
            ahead = gl.minimum(k + 1, last)
            next_a = gl.load(a_scale_at + ahead * a_scales)
            if B_PER == _TILE:
                next_left = gl.load(left_at + ahead * b_scales)
                next_right = gl.load(right_at + ahead * b_scales)
            mbarrier.wait(full.index(2 * stage), parity)
            # The scales of the sums are by_left and by_right, [64, 1]; for naive [64, 128].
            if B_PER == _TILE:
                # Without _pin the compiler multiplies these scales where they are used. That is
                # correct but slow: it waits for the next scales between two products.
                by_left = gl.expand_dims(_pin(s_a * s_left), 1)
                by_right = gl.expand_dims(_pin(s_a * s_right), 1)
                s_left = next_left
                s_right = next_right
            x = a_ring.index(stage).slice(consumer * _ROWS, _ROWS)
            partial = _product(x, b_ring.index(stage).slice(0, _TILE), SUM)
            if B_PER == 1:                                                          # naive
                by_left = _outer(s_a, scale_ring.index(stage).slice(0, _TILE), SUM)         # naive
            # Without _pin the compiler promotes after the next product has begun. That is correct
            # but slow: it keeps both partial sums, for which registers do not suffice.
            left = _pin(left + partial * by_left)
            mbarrier.wait(full.index(2 * stage + 1), parity)
            partial = _product(x, b_ring.index(stage).slice(_TILE, _TILE), SUM)
            if B_PER == 1:                                                          # naive
                by_right = _outer(s_a, scale_ring.index(stage).slice(_TILE, _TILE), SUM)    # naive
            # All of the stage has been read: the loader may fill it again.
            mbarrier.arrive(empty.index(stage), count=1)
            right = _pin(right + partial * by_right)
            s_a = next_a
            i += 1
        out_row = row + consumer * _ROWS
        if WGRAD:
            out_row += expert * M
        _store(left, out, out_row, col, consumer, buffers)
        # What lies past column N is dropped by TMA.
        _store(right, out, out_row, col + _TILE, consumer, buffers)
    tma.store_wait(0)


@gluon.jit
def _store(x, out, row, col, consumer: gl.constexpr, buffers):
    """x [64, 128]: in bf16 one box of the copy engine, in fp32 four boxes of 32 columns (the width
    that `hopper_options` gave to the descriptor of out)."""
    if out.block_type.shape[1] == _TILE:
        _store_box(x, out, row, col, buffers.index(consumer))
    else:
        WIDTH: gl.constexpr = _TILE // 4
        left, right = _halves(x)
        first, second = _halves(left)
        third, fourth = _halves(right)
        # Two buffers take turns: one is filled while the other is read.
        even = buffers.index(2 * consumer)
        odd = buffers.index(2 * consumer + 1)
        _store_box(first, out, row, col, even, WAIT=1)
        _store_box(second, out, row, col + WIDTH, odd, WAIT=1)
        _store_box(third, out, row, col + 2 * WIDTH, even, WAIT=1)
        _store_box(fourth, out, row, col + 3 * WIDTH, odd, WAIT=1)


@gluon.jit
def _halves(x):
    """x [R, C] -> its left and its right half, [R, C/2] each. `split` takes the last axis apart, so
    the two halves must lie along it: a row [0 1 2 3] becomes [[0 1] [2 3]], then [[0 2] [1 3]]."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _store_box(x, out, row, col, buffer, WAIT: gl.constexpr = 0):
    """x through a buffer in shared memory to out. WAIT: stores that may be under way meanwhile,
    those of other buffers."""
    tma.store_wait(WAIT)
    buffer.store(x.to(out.dtype))
    # The copy engine need not see what threads have written to shared memory before this fence.
    hopper.fence_async_shared()
    _tma_store(out, [row, col], buffer)


@gluon.jit
def _hopper_gemm_kernel(
        a, b, out,                              # TMA descriptors of the same matrices as above
        a_scale, b_scale, tile_expert, ends, M, N, K, E,
        WGRAD: gl.constexpr, A_PER: gl.constexpr, B_PER: gl.constexpr,
        STAGES: gl.constexpr, BUFFERS: gl.constexpr, PROGRAMS: gl.constexpr):
    """Grid (PROGRAMS,), one on each multiprocessor, tile after tile. The same bits as the loop: the
    same partial sums are promoted in the same order."""
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])     # one axis, nothing swizzled
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES, _TILE, _TILE], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, _WIDE, _TILE], b.layout)
    scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, _WIDE], PLAIN)      # naive
    box: gl.constexpr = [BUFFERS, _ROWS, out.block_type.shape[1]]
    buffers = gl.allocate_shared_memory(out.dtype, box, out.layout)
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(2 * stage), count=1)           # The loader arrives,
        mbarrier.init(full.index(2 * stage + 1), count=1)
        mbarrier.init(empty.index(stage), count=2)              # one thread of each consumer there
    hopper.fence_async_shared()         # The copy engine must see the barriers as they are now.
    n_tiles = gl.cdiv(N, _WIDE)
    if WGRAD:
        m_tiles = M // _TILE
        tiles = m_tiles * n_tiles * E
    else:
        m_tiles = gl.load(ends + E - 1) // _TILE                # those in use
        tiles = m_tiles * n_tiles
    ring = (a_ring, b_ring, scale_ring, full, empty)
    problem = (tile_expert, ends, M, N, K, m_tiles, n_tiles)
    gl.warp_specialize([
        (_consumer, (0, a_scale, b_scale, out, buffers, ring, problem, tiles,
                     PROGRAMS, WGRAD, A_PER, B_PER)),
        (_consumer, (1, a_scale, b_scale, out, buffers, ring, problem, tiles,
                     PROGRAMS, WGRAD, A_PER, B_PER)),
        (_loader, (a, b, b_scale, ring, problem, tiles, PROGRAMS, WGRAD, B_PER)),
    ], _WORKER_WARPS, _WORKER_REGISTERS)


def use_hopper_gemm(device: torch.device) -> bool:
    """The instructions are those of compute capability 9 alone."""
    return not INTERPRET and capability(device)[0] == 9


_GLUON_TYPES = {FP8: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


@functools.lru_cache                    # to choose a layout takes longer than to launch a kernel
def _shared_layout(box: tuple[int, int], dtype: torch.dtype):
    return gl.NVMMASharedLayout.get_default_for(list(box), _GLUON_TYPES[dtype])


def _tma_descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix as the copy engine sees it, in boxes of rows x columns."""
    layout = _shared_layout((rows, columns), x.dtype)
    return TensorDescriptor.from_tensor(x, [rows, columns], layout)


def hopper_options(b_per: int, out_bytes: int) -> tuple[int, dict]:
    """The columns of a store's box, and the kernel's constants.

    BUFFERS for stores: in bf16 one of 64 x 128 for each consumer, in fp32 two of 64 x 32, which
    take turns: 32 KB in all. STAGES of 48 KB: four fit beside them into 227 KB, 4 x 48 + 32 = 224.
    """
    columns = BLOCK if out_bytes == 2 else BLOCK // 4
    buffers = 2 if out_bytes == 2 else 4
    stages = 4 if b_per == BLOCK else 3         # naive: 1 KB of scales in each, and three fit
    return columns, dict(STAGES=stages, BUFFERS=buffers, num_warps=4, maxnreg=LAUNCH_REGISTERS)


def launch_hopper_gemm(a: QTensor, b: QTensor, out: Tensor, tile_expert: Tensor | None,
                       ends: Tensor) -> None:
    """Fills out: [M, N] for grouped_gemm, [E, M, N] for grouped_wgrad, which has no tile_expert."""
    M, K = a.data.shape
    N = b.data.shape[-2]
    columns, options = hopper_options(b.rows_per_scale, out.itemsize)
    programs = torch.cuda.get_device_properties(out.device).multi_processor_count
    _hopper_gemm_kernel[(programs,)](
        _tma_descriptor(a.data, BLOCK, BLOCK),
        _tma_descriptor(b.data.flatten(0, -2), BLOCK, BLOCK),
        _tma_descriptor(out.flatten(0, -2), BLOCK // 2, columns),
        a.scale, b.scale, tile_expert, ends, M, N, K, len(ends), WGRAD=tile_expert is None,
        A_PER=a.rows_per_scale, B_PER=b.rows_per_scale, PROGRAMS=programs, **options)
