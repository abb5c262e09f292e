"""Every kernel of an FP8 MoE layer, and the PyTorch twin that specifies it.

An FP8 tensor is a pair, `x ~ code * scale`. A code is one E4M3 byte (1 sign, 4 exponent, 3 mantissa
bits: largest 448, smallest normal 2^-6, smallest subnormal 2^-9, one NaN per sign, no infinity); a
scale is one fp32 number for a group of codes along the axis that a GEMM sums over:

    activation, row-wise      1 x 128 blocks                 fprop and dgrad
    weight                    128 x 128 tiles                the same tile serves W and W^T
    activation, column-wise   transposed, one scale a tile   wgrad sums over tokens
                              (requantized: 1 x 128 blocks of the transposed tensor)

An operation is a twin, `op_ref`, which specifies it and runs anywhere; a Triton kernel; and a
wrapper, `op`. Wrappers are all alike, so read one, `quantize`: it checks its arguments, runs the
twin where no kernel can run, allocates the result and launches the kernel (on a GPU, and under
TRITON_INTERPRET=1); its helpers stand at the end of this file. It raises ValueError for a dtype,
shape, device or scale layout that the kernel was not written for. What index tensors hold is
checked only where the twin runs: on a GPU, reading it would make the host wait.

Tokens are sorted by expert and padded, so that each expert has whole tiles of 128 slots. How many
tiles are used depends on the routing, which the host must not wait for. So tensors have room for
the most there can be: `tile_expert` [M/128] names the expert of each tile, -1 for those at the end
that nobody uses, and kernels skip these. `ends` [E] says where each expert's slots end.

Reading order: E4M3 and its scales, quantize, the transpose, SwiGLU, moving rows, and the grouped
GEMM in three levels: the twin, the loop, and the loop without waiting. Then come SwiGLU's backward,
the weights, the casts and transposes that naive needs and flow does not, which kernel runs where,
and the checks.

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
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

_E4M3_MAX = tl.constexpr(E4M3_MAX)          # Inside a kernel only constexprs can be seen.
_SCALE_MIN = tl.constexpr(SCALE_MIN)
_INF_BITS = tl.constexpr(0x7F800000)        # of fp32: as integers, finite magnitudes lie below it
_MANTISSA_BITS = tl.constexpr(0x007FFFFF)
_MANTISSA_OF_448 = tl.constexpr(0x00600000)     # 0.75 of 2^23, since 448 = 1.75 * 2^8


class QTensor(NamedTuple):
    """An FP8 tensor.

    data    [..., R, C] float8_e4m3fn codes.
    scale   [..., C/128, R] fp32 for 1x128 blocks, or [..., C/128, R/128] for 128x128 tiles.
    policy  "pow2" or "fp32": how the scales were chosen. Only "pow2" can be shifted.

    Scales lie in the other order than codes: with 1x128 blocks, scale[c, r] belongs to
    data[r, 128c : 128c + 128], and data [256, 384] has scale [3, 256]. A GEMM walks along C, and
    reads the scales of all its rows at each step; so they lie side by side.
    """
    data: Tensor
    scale: Tensor
    policy: str

    @property
    def rows_per_scale(self) -> int:
        return self.data.shape[-2] // self.scale.shape[-1]


def scale_of(amax: Tensor, scales: str) -> tuple[Tensor, Tensor]:
    """The scale of a block whose largest magnitude is amax (fp32, any shape), and the factor that
    encodes with it, 1/scale.

    fp32: amax/448.   pow2: the smallest power of two >= amax/448. Thus 3.0 = 1.5 * 2^1 gets the
    scale 2^-7, and its code is 384.
    A block of zeros gets SCALE_MIN, the smallest scale. A block with NaN or Inf gets SCALE_MIN and
    a factor of NaN, so all its codes become NaN.
    """
    if scales == "pow2":
        # amax = mantissa * 2^exponent with 0.5 <= mantissa < 1, and 448 = 0.875 * 2^9.
        mantissa, exponent = torch.frexp(amax)
        exponent = exponent - 9 + (mantissa > 0.875).int()
        exponent = exponent.clamp(min=-126)
        scale = ((exponent + 127) << 23).view(torch.float32)        # 2^exponent
    else:
        # CUDA divides by a Python number through its inverse, which is off by an ulp.
        scale = amax / torch.full_like(amax, E4M3_MAX)
        scale = scale.clamp(min=SCALE_MIN)
    finite = amax.isfinite()
    scale = torch.where(finite & (amax > 0), scale, SCALE_MIN)
    return scale, torch.where(finite, 1 / scale, torch.nan)


@triton.jit
def _scale_of(amax_bits, POW2: tl.constexpr):
    """The same on the bits of amax (int32): exponent + 127, called biased, and 23 bits of mantissa.
    As integers, magnitudes are ordered as they are as floats, Inf and NaN on top."""
    finite = amax_bits < _INF_BITS
    if POW2:
        rounds_up = ((amax_bits & _MANTISSA_BITS) > _MANTISSA_OF_448).to(tl.int32)
        # 127 + the exponent: of 3.0 it is 128, of its scale 120, which stands for 2^-7.
        biased = (amax_bits >> 23) - 8 + rounds_up
        biased = tl.maximum(tl.where(finite, biased, 1), 1)     # 1 stands for 2^-126
        scale = (biased << 23).to(tl.float32, bitcast=True)
        # 1 / scale = 2^-exponent, whose biased exponent is 127 - exponent.
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


# ---- quantize ------------------------------------------------------------------------------------

def _to_fp8(x: Tensor) -> Tensor:
    """fp32 -> E4M3, ties to even; a NaN of either sign becomes 0x7F, as in the hardware's cast."""
    return torch.where(x.isnan(), torch.nan, x).to(FP8)


def quantize_ref(x: Tensor, scales: str = "pow2") -> QTensor:
    blocks = rearrange(x.float(), "r (c b) -> c r b", b=BLOCK)
    scale, factor = scale_of(reduce(blocks.abs(), "c r b -> c r", "max"), scales)
    codes = _to_fp8(blocks * factor[..., None])
    return QTensor(rearrange(codes, "c r b -> r (c b)").contiguous(), scale, scales)


@triton.jit
def _quantize_kernel(
        x,                                  # [R, C] bf16, fp16 or fp32
        data, scale,                        # [R, C] uint8, [C/128, R] fp32
        tile_expert,                        # [R/128] int32 or None
        R, C, POW2: tl.constexpr, R_TILE: tl.constexpr, TILE: tl.constexpr):
    """Grid (R/R_TILE, C/128). Reads 2RC (bf16), writes RC bytes: three quarters of a bf16 copy."""
    if _is_unused(tile_expert, tl.program_id(0) * R_TILE // TILE):
        return
    r = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = (r < R)[:, None]
    at = r[:, None] * C + c[None, :]
    block = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    s, factor = _scale_of(_amax_bits(block, 1), POW2)
    tl.store(data + at, _encode(block * factor[:, None]), mask=live)
    tl.store(scale + tl.program_id(1).to(tl.int64) * R + r, s, mask=r < R)


def quantize(x: Tensor, scales: str = "pow2", tile_expert: Tensor | None = None) -> QTensor:
    """Row-wise quantization in 1x128 blocks; the paper rounds scales up to powers of two.

    x [R, C] bf16, fp16 or fp32, C a multiple of 128; scales "pow2" | "fp32" -> QTensor [R, C],
    scale [C/128, R]. A block that holds NaN or Inf dequantizes to NaN.
    tile_expert [R/128] int32: tiles of rows marked -1 are skipped, and stay undefined.
    """
    check_choice("scales", scales, SCALES)
    check("x", x, FLOATS, ANY, BY_128)
    tile_expert = check_tiles(tile_expert, len(x), x)
    if not use_kernels(x):
        return quantize_ref(x, scales)
    x = x.contiguous()
    R, C = x.shape
    r_tile = 64
    q = _empty_q(x, R, C, scales)
    _quantize_kernel[triton.cdiv(R, r_tile), C // BLOCK](
        x, _bytes(q.data), q.scale, tile_expert, R, C,
        POW2=scales == "pow2", R_TILE=r_tile, TILE=BLOCK, num_warps=8)
    return q


def dequantize_ref(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    scale = repeat(q.scale, "... c r -> ... (r i) (c b)", i=q.rows_per_scale, b=BLOCK)
    return (q.data.float() * scale).to(dtype)


# ---- row-wise FP8 -> column-wise FP8 -------------------------------------------------------------

def scaling_aware_transpose_ref(q: QTensor, rows: Tensor | None = None) -> QTensor:
    """In each tile the largest of the 128 row scales becomes the scale of all: each code is
    multiplied by its row's scale over that one, rounded, and stored transposed."""
    if rows is not None:
        q = gather_rows_ref(q, rows)
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
        T, C, M, TILE: tl.constexpr):
    """Grid (M/128, C/128): one tile a program, neighbours write neighbouring columns.
    Reads MC, writes MC bytes."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    if _is_unused(tile_expert, i):
        return
    slot = i * TILE + tl.arange(0, TILE)
    c = j * TILE + tl.arange(0, TILE)
    if rows is not None:                    # Gathered on the way in, the permute costs nothing.
        r = tl.load(rows + slot)
    else:
        r = slot.to(tl.int64)
    live = r >= 0
    s = tl.load(scale + j.to(tl.int64) * T + r, mask=live, other=_SCALE_MIN)
    codes = tl.load(data + r[:, None] * C + c[None, :], mask=live[:, None], other=0)
    top = tl.max(s, 0)
    # Both are powers of two: the difference of their exponents is k = log2(top / s) >= 0.
    k = (top.to(tl.int32, bitcast=True) - s.to(tl.int32, bitcast=True)) >> 23
    factor = (tl.maximum(127 - k, 0) << 23).to(tl.float32, bitcast=True)        # 2^-k
    # fp16 is enough, and faster than fp32: in it products are exact down to 2^-21, and all that is
    # not above 2^-10 becomes the code 0.
    values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    codes = _encode(values * factor.to(tl.float16)[:, None])
    tl.store(out + c[:, None].to(tl.int64) * M + slot[None, :], tl.trans(codes))
    tl.store(out_scale + i * (C // TILE) + j, top)


def scaling_aware_transpose(q: QTensor, rows: Tensor | None = None,
                            tile_expert: Tensor | None = None) -> QTensor:
    """Row-wise FP8 [M, C] -> column-wise FP8 [C, M] without leaving FP8: the paper's central kernel
    (section 3.1).

    In each 128x128 tile the largest row scale S becomes the tile's scale, and the codes of a row
    with scale s move down by k = log2(S/s) powers of two: exact while they stay normal,
    nearest-even below 2^-6, NaN and -0 kept.
    rows [M] int64: transpose q[rows] instead, -1 for a zero row (q is then [T, C]).
    tile_expert [M/128] int32: skip tiles marked -1; what they hold stays undefined.
    M and C are multiples of 128 -> scale [M/128, C/128].
    Refuses fp32 scales: their ratios are no powers of two.
    """
    check_q("q", q, BY_128 if rows is None else ANY, BY_128)
    if q.policy != "pow2":
        raise ValueError(f"q.policy={q.policy!r} cannot be shifted: the direct transpose moves "
                         "exponents, quantize with scales='pow2'")
    T, C = q.data.shape
    M = T
    if rows is not None:
        check("rows", rows, (torch.int64,), BY_128, like=q.data)
        rows = rows.contiguous()
        M = len(rows)
    tile_expert = check_tiles(tile_expert, M, q.data)
    if not use_kernels(q.data):
        if rows is not None:
            check_values("rows", rows, -1, T)
        return scaling_aware_transpose_ref(q, rows)
    data = q.data.new_empty(C, M)
    scale = q.scale.new_empty(M // BLOCK, C // BLOCK)
    _scaling_aware_transpose_kernel[M // BLOCK, C // BLOCK](
        _bytes(q.data.contiguous()), q.scale.contiguous(), rows, tile_expert,
        _bytes(data), scale, T, C, M, TILE=BLOCK, num_warps=4)
    return QTensor(data, scale, q.policy)


# ---- SwiGLU: a = silu(gate) * up * prob, h = [gate | up], prob the router's weight of a slot -----

def swiglu_ref(h: Tensor, prob: Tensor) -> Tensor:
    gate, up = h.float().chunk(2, dim=-1)
    return (silu(gate) * up * prob[:, None]).to(h.dtype)


def swiglu_quantize_ref(h: Tensor, prob: Tensor, scales: str = "pow2") -> QTensor:
    return quantize_ref(swiglu_ref(h.float(), prob), scales)


@triton.jit
def _store_rows(x, first, data, scale, r, live, width, M, POW2: tl.constexpr, TILE: tl.constexpr):
    """Stores x [R_TILE, C_TILE], a program's tile, at rows r [R_TILE, 1] and the columns from
    `first` on of a matrix [M, width]: quantized in 1x128 blocks, or as it is if there is no `scale`
    to store."""
    c = first + tl.arange(0, x.shape[1])[None, :]
    if scale is not None:
        blocks = tl.reshape(x, (x.shape[0], x.shape[1] // TILE, TILE))      # [.., C_TILE/128, 128]
        s, factor = _scale_of(_amax_bits(blocks, 2), POW2)                  # [R_TILE, C_TILE/128]
        x = tl.reshape(_encode(blocks * factor[:, :, None]), x.shape)       # [R_TILE, C_TILE]
        block_index = first // TILE + tl.arange(0, x.shape[1] // TILE)[None, :].to(tl.int64)
        tl.store(scale + block_index * M + r, s, mask=live)
    tl.store(data + r * width + c, x.to(data.dtype.element_ty), mask=live)


@triton.jit
def _swiglu_kernel(
        h, prob, tile_expert,               # [M, 2F] bf16, [M] fp32, [M/128] int32 or None
        a, a_scale,                         # [M, F] uint8 and [F/128, M] fp32, or bf16 and None
        M, F,
        POW2: tl.constexpr, R_TILE: tl.constexpr, C_TILE: tl.constexpr, TILE: tl.constexpr):
    """Grid (M/R_TILE, F/C_TILE). Reads 4MF, writes MF bytes (2MF unquantized)."""
    if _is_unused(tile_expert, tl.program_id(0) * R_TILE // TILE):
        return
    r = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)[:, None]
    first = tl.program_id(1) * C_TILE
    c = first + tl.arange(0, C_TILE)[None, :]
    live = r < M
    p = tl.load(prob + r, mask=live, other=0.0)
    gate = tl.load(h + r * F * 2 + c, mask=live, other=0.0).to(tl.float32)
    up = tl.load(h + r * F * 2 + F + c, mask=live, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up * p
    _store_rows(y, first, a, a_scale, r, live, F, M, POW2, TILE)


def _check_swiglu(h: Tensor, prob: Tensor, scales: str = "pow2") -> None:
    check_choice("scales", scales, SCALES)
    check("h", h, FLOATS, ANY, BY_128)
    if h.shape[1] % (2 * BLOCK):
        raise ValueError(f"h has shape {list(h.shape)}: gate and up must each be a multiple of "
                         f"{BLOCK} wide, pad both")
    check("prob", prob, (torch.float32,), len(h), like=h)


def _swiglu_tile(F: int) -> tuple[int, int]:
    """Rows and columns of a program's tile: 2048 outputs, 16 for each thread of 4 warps, and
    columns that divide F."""
    columns = math.gcd(F, 2048)
    return 2048 // columns, columns


def _launch_swiglu(h: Tensor, prob: Tensor, tile_expert: Tensor | None, a) -> None:
    """Fills a: a QTensor, or a tensor like h, for which nothing is quantized."""
    M = len(h)
    F = h.shape[1] // 2
    r_tile, c_tile = _swiglu_tile(F)
    _swiglu_kernel[triton.cdiv(M, r_tile), F // c_tile](
        h.contiguous(), prob.contiguous(), tile_expert, *_data_and_scale(a), M, F,
        POW2=_is_pow2(a), R_TILE=r_tile, C_TILE=c_tile, TILE=BLOCK, num_warps=4)


def swiglu_quantize(h: Tensor, prob: Tensor, scales: str = "pow2",
                    tile_expert: Tensor | None = None) -> QTensor:
    """SwiGLU that emits FP8, a fused operator of the paper: h [M, 2F] bf16 = [gate | up],
    prob [M] fp32 -> A [M, F], with no bf16 tensor between SwiGLU and `quantize`.

    F is a multiple of 128.
    tile_expert [M/128] int32: the expert of each tile, -1 for tiles to skip (left undefined).
    """
    _check_swiglu(h, prob, scales)
    tile_expert = check_tiles(tile_expert, len(h), h)
    if not use_kernels(h):
        return swiglu_quantize_ref(h, prob, scales)
    a = _empty_q(h, len(h), h.shape[1] // 2, scales)
    _launch_swiglu(h, prob, tile_expert, a)
    return a


# ---- permute + pad is one gather of rows; unpermute + unpad is one gather and sum ----------------

def gather_rows_ref(x, rows: Tensor):
    live = rows >= 0                    # An index of -1 reads the last row, which is not used then.
    if isinstance(x, QTensor):
        data = gather_rows_ref(_bytes(x.data), rows).view(FP8)
        scale = torch.where(live, x.scale[:, rows], SCALE_MIN)
        return QTensor(data, scale, x.policy)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(live[:, None], x[rows], zero)


@triton.jit
def _gather_rows_kernel(
        x, scale,                           # [T, C] any type, [C/128, T] fp32 or None
        rows, tile_expert,                  # [M] int64, [M/128] int32 or None
        out, out_scale,                     # [M, C], [C/128, M] fp32 or None
        T, C, M, R_TILE: tl.constexpr, C_TILE: tl.constexpr, TILE: tl.constexpr):
    """Grid (M/R_TILE, C/C_TILE). Reads MC and writes MC elements; data and scales move together."""
    if _is_unused(tile_expert, tl.program_id(0) * R_TILE // TILE):
        return
    slot = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)
    c = tl.program_id(1) * C_TILE + tl.arange(0, C_TILE)[None, :]
    r = tl.load(rows + slot, mask=slot < M, other=-1)
    tile = tl.load(x + r[:, None] * C + c, mask=(r >= 0)[:, None], other=0)
    tl.store(out + slot[:, None] * C + c, tile, mask=(slot < M)[:, None])
    if scale is not None:
        first_block = tl.program_id(1).to(tl.int64) * (C_TILE // TILE)
        block = first_block + tl.arange(0, C_TILE // TILE)[:, None]
        s = tl.load(scale + block * T + r[None, :], mask=(r >= 0)[None, :], other=_SCALE_MIN)
        tl.store(out_scale + block * M + slot[None, :], s, mask=(slot < M)[None, :])


def gather_rows(x, rows: Tensor, tile_expert: Tensor | None = None):
    """out[i] = x[rows[i]], zeros (with the smallest scale) where rows[i] is -1: the paper's fused
    permute+pad.

    x [T, C] bf16, fp16, fp32 or a QTensor in 1x128 blocks, C a multiple of 128; rows [M] int64,
    each in [-1, T) -> [M, C] of the same kind.
    tile_expert [M/128] int32: skip tiles marked -1; no kernel reads their rows.
    """
    if isinstance(x, QTensor):
        check_q("x", x, ANY, BY_128)
        data = _bytes(x.data.contiguous())
        scale = x.scale.contiguous()
    else:
        check("x", x, FLOATS, ANY, BY_128)
        data = x.contiguous()
        scale = None
    check("rows", rows, (torch.int64,), ANY, like=data)
    T, C = data.shape
    M = len(rows)
    tile_expert = check_tiles(tile_expert, M, data)
    if not use_kernels(data):
        check_values("rows", rows, -1, T)
        return gather_rows_ref(x, rows)
    r_tile = 32
    c_tile = math.gcd(C, 512)
    out = data.new_empty(M, C)
    out_scale = None if scale is None else scale.new_empty(len(scale), M)
    _gather_rows_kernel[triton.cdiv(M, r_tile), C // c_tile](
        data, scale, rows.contiguous(), tile_expert, out, out_scale, T, C, M,
        R_TILE=r_tile, C_TILE=c_tile, TILE=BLOCK, num_warps=8)
    if scale is None:
        return out
    return QTensor(out.view(FP8), out_scale, x.policy)


def sum_rows_ref(x: Tensor, slots: Tensor) -> Tensor:
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


def sum_rows(x: Tensor, slots: Tensor) -> Tensor:
    """Unpermute+unpad: out[t] = sum of x[slots[t, j]] over j, in that order, in fp32.

    x [M, C] bf16, C a multiple of 128; slots [T, k] int64, each in [0, M) -> [T, C] bf16.
    No atomics: a token owns its sum.
    """
    check("x", x, FLOATS, ANY, BY_128)
    check("slots", slots, (torch.int64,), ANY, ANY, like=x)
    if not use_kernels(x):
        check_values("slots", slots, 0, len(x))
        return sum_rows_ref(x, slots)
    T, top_k = slots.shape
    C = x.shape[1]
    c_tile = math.gcd(C, 2048)
    r_tile = 2048 // c_tile
    out = x.new_empty(T, C)
    _sum_rows_kernel[triton.cdiv(T, r_tile), C // c_tile](
        x.contiguous(), slots.contiguous(), out, T, C,
        TOP_K=top_k, R_TILE=r_tile, C_TILE=c_tile, num_warps=4)
    return out


# ---- grouped GEMM, level 1: the twins ------------------------------------------------------------

def grouped_gemm_ref(a: QTensor, b: QTensor, tile_expert: Tensor) -> Tensor:
    x = dequantize_ref(a)
    w = dequantize_ref(b)
    out = x.new_zeros(len(x), w.shape[1], dtype=torch.bfloat16)
    row_expert = tile_expert.repeat_interleave(BLOCK)
    for e in range(len(w)):
        mine = row_expert == e
        out[mine] = (x[mine] @ w[e].T).to(out.dtype)
    return out


def grouped_wgrad_ref(a: QTensor, b: QTensor, ends: Tensor,
                      dtype: torch.dtype = torch.float32) -> Tensor:
    x = dequantize_ref(a)
    y = dequantize_ref(b)
    out = x.new_empty(len(ends), len(x), len(y), dtype=dtype)
    begin = 0
    for e, end in enumerate(ends.tolist()):
        out[e] = x[:, begin:end] @ y[:, begin:end].T
        begin = end
    return out


# ---- grouped GEMM, level 2: the loop -------------------------------------------------------------

@triton.jit
def _grouped_gemm_kernel(
        a, b,                       # [M, K] and [E, N, K] FP8; in wgrad [M, K] and [N, K]
        out,                        # [M, N] bf16; in wgrad [E, M, N] bf16 or fp32
        a_scale, b_scale,           # [K/128, M/A_PER] and [E, K/128, N/B_PER] fp32; in wgrad no E
        tile_expert,                # [M/128] int32; in wgrad None
        ends,                       # [E] int32, which the loop reads in wgrad alone
        M, N, K,
        WGRAD: tl.constexpr, A_PER: tl.constexpr, B_PER: tl.constexpr, TILE: tl.constexpr):
    """Grid (N/128, M/128), wgrad (N/128, M/128, E): a program makes one tile of out, and sums 128
    products at a time. Neighbours share rows of a, which then come from the L2 cache.

    Hopper's tensor core sums FP8 products in about 14 bits and truncates, so each partial sum of
    128 is promoted: the CUDA cores multiply it by its scales and add it to an fp32 accumulator.
    fprop and dgrad sum over all of K, a width, with the weight of the tile's expert. In wgrad M and
    N are widths and K is the slots: it sums over those of one expert.
    A_PER, B_PER: the rows that share a scale, 1 or 128.
    """
    n = tl.program_id(0)
    m = tl.program_id(1)
    if not WGRAD:
        e = tl.load(tile_expert + m)
        if e < 0:
            return
        first_step = 0              # A K-step is 128 long.
        end_step = K // TILE
        b_row = e * N + n * TILE    # The rows of all experts lie below each other.
        b_scale += e * (K // TILE) * (N // B_PER)
        out_row = m * TILE
    else:
        e = tl.program_id(2)
        first_step = tl.load(ends + e - 1, mask=e > 0, other=0) // TILE
        end_step = tl.load(ends + e) // TILE
        b_row = n * TILE
        out_row = e * M + m * TILE
    i = tl.arange(0, TILE)
    a_at = a + (m * TILE + i)[:, None].to(tl.int64) * K + i[None, :]
    b_at = b + (b_row + i)[None, :].to(tl.int64) * K + i[:, None]           # transposed
    acc = tl.zeros((TILE, TILE), tl.float32)
    for k in range(first_step, end_step):
        x = tl.load(a_at + k * TILE)
        y = tl.load(b_at + k * TILE)
        # 128 scales, or, where A_PER or B_PER is 128, one for all 128 rows.
        x_scale = tl.load(a_scale + k * (M // A_PER) + (m * TILE + i) // A_PER)
        y_scale = tl.load(b_scale + k * (N // B_PER) + (n * TILE + i) // B_PER)
        acc += tl.dot(x, y) * (x_scale[:, None] * y_scale[None, :])
    at = (out_row + i)[:, None].to(tl.int64) * N + (n * TILE + i)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty))


# ---- grouped GEMM, level 3: the loop without waiting, for Hopper, in Gluon -----------------------
#
# `acc += dot * scale` makes a program wait for the tensor core, then makes the tensor core wait
# while the CUDA cores promote. Here a program is three roles that run at the same time, each a
# function below:
#
#     loader     one warp. Asks the copy engine (TMA) for the tiles of the next K-steps, into a ring
#                of stages in shared memory, as soon as a stage is free.
#     consumers  two groups of four warps. Each owns 64 of the tile's 128 rows: it starts a product,
#                waits for it, and promotes it. Neither waits for the other: while one promotes, the
#                tensor core works for the other.
#
# In time, from left to right, where L and R are the left and the right half of a tile's columns:
#
#     consumer 0     product L   promote L   product R   promote R   product L   promote L
#     consumer 1                 product L   promote L   product R   promote R   product L
#     tensor core    for 0       for 1       for 0       for 1       for 0       for 1
#     loader         copies the tiles of later K-steps, whenever a stage is free
#
# Why does the loop of level 2 leave gaps? More stages would not close them: the loop has three
# K-steps under way already, and does not wait for tiles. More programs on a multiprocessor would,
# but each needs a sum and a partial sum of 128 x 128 in registers. That is 128 KB of 256 KB, and
# with some registers for addresses only one program fits.
#
# The roles meet at `mbarrier`s, counters in shared memory. The loader waits until a stage is
# `empty` (both consumers are done with it), a consumer until it is `full` (its bytes have arrived).
# A barrier goes through phases. One is complete when as many have arrived as the barrier was made
# for, and all bytes that were announced; then the next begins. `mbarrier.wait(barrier, p)` passes
# when the last complete phase has parity p: a barrier remembers no more than even or odd, and a new
# one stands as if it had just completed an odd phase. That is enough, because nobody can get two
# phases ahead: each side waits for the other. Loader and consumers count K-steps alike,
# i = 0, 1, 2, ..., so they mean the same phase. With four stages:
#
#     K-step i    stage i % 4    use i // 4    a consumer waits for    the loader waits for
#     0 .. 3      0 .. 3         0             full, phase 0: even     nothing: odd, as if complete
#     4 .. 7      0 .. 3         1             full, phase 1: odd      empty, phase 0: even
#     8 .. 11     0 .. 3         2             full, phase 2: even     empty, phase 1: odd
#
# The tile is 128 x 256: wider tiles read fewer bytes for a product, and L2 is the next limit. A
# consumer's 64 rows are two accumulators of 64 x 128, the `left` and the `right` half of the
# columns: 128 registers a thread, which leave room for the partial sum of one half (64 more), not
# of both. So the halves take turns, and each half of b has a `full` barrier of its own. Scales of
# rows and of tiles are a few registers, loaded a K-step ahead. Where b has one scale a column
# (wgrad of the requantizing transposes), a thread would need 64 more, for of each half it holds
# 2 rows x 32 columns: the loader copies them into the stage, beside the tiles.
#
# What a multiprocessor has, and where it goes:
#
#     registers        65,536       Hopper deals them out to groups of four warps, in eights, so the
#                                   loader's warp counts as four. 12 warps start with 168 a thread,
#                                   the most that fits: 64,512. The loader keeps 40, and the
#                                   consumers get the rest: 3 x 168 = 2 x 232 + 40
#     shared memory    227 KB       4 stages x (128 + 256) rows x 128 bytes: 192 KB,
#                                   and 32 KB of buffers for stores

_ROWS = gl.constexpr(BLOCK // 2)        # rows of a consumer
_TILE = gl.constexpr(BLOCK)             # rows of a tile, columns of its half, elements of a K-step
_WIDE = gl.constexpr(2 * BLOCK)         # columns of a tile
_BAND = gl.constexpr(4)                 # rows of tiles that are worked on at the same time

LAUNCH_REGISTERS = 168                  # a thread: 12 warps x 32 x 168 = 64,512
CONSUMER_REGISTERS = 232                # 2 x 128 x 232 + 128 x 40 = 64,512
LOADER_REGISTERS = 40
# These two are for the second consumer and the loader. The first consumer is the launch's own warps
# (num_warps=4), and gets the registers that are left.
_WORKER_WARPS = gl.constexpr([4, 1])
_WORKER_REGISTERS = gl.constexpr([CONSUMER_REGISTERS, LOADER_REGISTERS])

# Triton 3.8 renamed these three.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _locate(tile, problem, WGRAD: gl.constexpr):
    """Where the tile'th tile of out lies: its first row in a, its first column, its expert, and
    its K-steps, begin to end.

    Tiles are counted down four rows of tiles, then on to the next column, so that programs that run
    at the same time share operands in L2:

        0  4   8
        1  5   9
        2  6  10
        3  7  11

    Rows of tiles that nobody uses come last, and are not counted: no expert is -1 here.
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
            phase = use % 2
            left_full = full.index(2 * stage)
            right_full = full.index(2 * stage + 1)
            # The use before this is over. (Use 0 waits for odd, which passes at once.)
            mbarrier.wait(empty.index(stage), 1 - phase)
            if B_PER == 1:
                # 32 threads of one warp, four columns each, twice: 256 columns along one axis.
                lanes: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
                column = col + gl.arange(0, _WIDE, layout=lanes)
                # Columns past N are never stored: any place that exists will do.
                _copy(scale_ring.index(stage), b_scale + k * N + gl.minimum(column, N - 1))
                # Each thread adds one to the arrivals that this phase needs, and arrives when its
                # scales are there: the barrier's own count of 1, for `expect`, stays right.
                async_copy.mbarrier_arrive(left_full)
            # The loader's arrival, which announces bytes: with them the phase is complete. Rows of
            # b past N are those of the next expert, or zeros; their products are not stored.
            mbarrier.expect(left_full, 2 * _TILE * _TILE)
            _tma_load(a, [row, k * _TILE], left_full, a_ring.index(stage))
            _tma_load(b, [b_row, k * _TILE], left_full, b_ring.index(stage).slice(0, _TILE))
            mbarrier.expect(right_full, _TILE * _TILE)
            right_half = b_ring.index(stage).slice(_TILE, _TILE)
            _tma_load(b, [b_row + _TILE, k * _TILE], right_full, right_half)
            i += 1


@gluon.jit
def _pin(x):
    """Keeps the compiler from computing x later than here. Returns x.

    The compiler sees an instruction that needs x and has unknown effects, so it keeps what makes x
    before that, and what uses x behind it. The instruction is empty: in the program that runs
    nothing is left of it. ("=f,0": the result is an fp32 register, the same as the input's.)
    """
    return gl.inline_asm_elementwise("", "=f,0", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _product(a, b, SUM: gl.constexpr):
    """a [64, 128] times b [128, 128]^T on the tensor core, fp32 in layout SUM. To wait for it at
    once costs nothing: meanwhile the other consumer promotes."""
    zero = gl.zeros([_ROWS, _TILE], gl.float32, SUM)
    partial = hopper.warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)
    return hopper.warpgroup_mma_wait(0, deps=[partial])


@gluon.jit
def _outer(a_scale, b_scale, SUM: gl.constexpr):
    """A scale for each of 64 x 128 sums: a_scale [64] in registers, b_scale [128] in shared
    memory."""
    row = gl.expand_dims(b_scale.load(gl.SliceLayout(0, SUM)), 0)
    return gl.expand_dims(a_scale, 1) * row


@gluon.jit
def _consumer(consumer: gl.constexpr, a_scale, b_scale, out, buffers, ring, problem, tiles,
              PROGRAMS: gl.constexpr, WGRAD: gl.constexpr,
              A_PER: gl.constexpr, B_PER: gl.constexpr):
    a_ring, b_ring, scale_ring, full, empty = ring
    tile_expert, ends, M, N, K, m_tiles, n_tiles = problem
    STAGES: gl.constexpr = a_ring.shape[0]
    # How the tensor core returns its sums: wgmma (version 3.0), its four warps below each other,
    # in instructions of 16 rows (a warp) x 128 columns x 32 products (FP8).
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    r = consumer * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, SUM))
    a_scales = M // A_PER                       # how many scales of a there are in one K-step
    b_scales = N // B_PER
    i = 0                                       # K-steps so far, of all tiles
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        row, col, expert, begin, end = _locate(tile, problem, WGRAD)
        # Scales are loaded a K-step ahead; the last step loads its own again. An expert without
        # rows has no step. Then nobody uses what is loaded here, but the address must exist.
        last = gl.maximum(end - 1, 0)
        first = gl.minimum(begin, last)
        a_scale_at = a_scale + (row + r) // A_PER
        s_a = gl.load(a_scale_at + first * a_scales)
        if B_PER == _TILE:
            left_at = b_scale + col // _TILE
            if not WGRAD:
                left_at += expert * (K // _TILE) * b_scales
            # The right half has the next scale, unless N ends between the halves.
            right_at = left_at + gl.minimum(1, b_scales - 1 - col // _TILE)
            s_left = gl.load(left_at + first * b_scales)
            s_right = gl.load(right_at + first * b_scales)
        left = gl.zeros([_ROWS, _TILE], gl.float32, SUM)
        right = gl.zeros([_ROWS, _TILE], gl.float32, SUM)
        for k in range(begin, end):
            stage = i % STAGES
            use = i // STAGES
            phase = use % 2
            ahead = gl.minimum(k + 1, last)
            next_a = gl.load(a_scale_at + ahead * a_scales)
            if B_PER == _TILE:
                next_left = gl.load(left_at + ahead * b_scales)
                next_right = gl.load(right_at + ahead * b_scales)
            mbarrier.wait(full.index(2 * stage), phase)
            # The scales of the sums are by_left and by_right: [64, 1] where b has one scale a tile,
            # [64, 128] where it has one a column.
            if B_PER == _TILE:
                # Pinned before the products: left alone, the compiler multiplies the scales where
                # they are used, and then waits for the loads of the next ones between two products.
                by_left = gl.expand_dims(_pin(s_a * s_left), 1)
                by_right = gl.expand_dims(_pin(s_a * s_right), 1)
                s_left = next_left
                s_right = next_right
            x = a_ring.index(stage).slice(consumer * _ROWS, _ROWS)
            partial = _product(x, b_ring.index(stage).slice(0, _TILE), SUM)
            if B_PER == 1:
                by_left = _outer(s_a, scale_ring.index(stage).slice(0, _TILE), SUM)
            # Pinned before the next product: left alone, the compiler promotes `left` after that
            # has begun, and needs registers for both partial sums.
            left = _pin(left + partial * by_left)
            mbarrier.wait(full.index(2 * stage + 1), phase)
            partial = _product(x, b_ring.index(stage).slice(_TILE, _TILE), SUM)
            if B_PER == 1:
                by_right = _outer(s_a, scale_ring.index(stage).slice(_TILE, _TILE), SUM)
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
    that `_hopper_options` gave to the descriptor of out)."""
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
    the two halves must lie along it."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _store_box(x, out, row, col, buffer, WAIT: gl.constexpr = 0):
    """x through a buffer in shared memory to out. WAIT: stores that may be under way meanwhile,
    those of other buffers."""
    tma.store_wait(WAIT)
    buffer.store(x.to(out.dtype))
    hopper.fence_async_shared()                 # Ordinary writes, made visible to the copy engine.
    _tma_store(out, [row, col], buffer)


@gluon.jit
def _hopper_gemm_kernel(
        a, b, out,                              # TMA descriptors of the same matrices as in level 2
        a_scale, b_scale, tile_expert, ends, M, N, K, E,
        WGRAD: gl.constexpr, A_PER: gl.constexpr, B_PER: gl.constexpr,
        STAGES: gl.constexpr, BUFFERS: gl.constexpr, PROGRAMS: gl.constexpr):
    """Grid (PROGRAMS,), one on each multiprocessor, tile after tile. The same bits as level 2: the
    same partial sums are promoted in the same order."""
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])     # one axis, nothing swizzled
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES, _TILE, _TILE], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, _WIDE, _TILE], b.layout)
    scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, _WIDE], PLAIN)
    box: gl.constexpr = [BUFFERS, _ROWS, out.block_type.shape[1]]
    buffers = gl.allocate_shared_memory(out.dtype, box, out.layout)
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(2 * stage), count=1)           # The loader arrives,
        mbarrier.init(full.index(2 * stage + 1), count=1)
        mbarrier.init(empty.index(stage), count=2)              # and each consumer, as one.
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


# ---- grouped GEMM: the launch --------------------------------------------------------------------

_GLUON_TYPES = {FP8: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


@functools.lru_cache                    # to choose a layout takes longer than to launch a kernel
def _shared_layout(box: tuple[int, int], dtype: torch.dtype):
    return gl.NVMMASharedLayout.get_default_for(list(box), _GLUON_TYPES[dtype])


def _tma_descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix as the copy engine sees it, in boxes of rows x columns."""
    layout = _shared_layout((rows, columns), x.dtype)
    return TensorDescriptor.from_tensor(x, [rows, columns], layout)


def _hopper_options(b_per: int, out_bytes: int) -> tuple[int, dict]:
    """The columns of a store's box, and the kernel's constants.

    BUFFERS for stores: in bf16 one of 64 x 128 for each consumer, in fp32 two of 64 x 32, which
    take turns: 32 KB in all. STAGES of 48 KB: four fit beside them into 227 KB, 4 x 48 + 32 = 224.
    Where b has one scale a column, each stage needs 1 KB more for them, and only three fit
    (elsewhere the compiler drops the ring of scales).
    """
    if out_bytes == 2:
        columns = BLOCK
        buffers = 2
    else:
        columns = BLOCK // 4
        buffers = 4
    stages = 4 if b_per == BLOCK else 3
    options = dict(STAGES=stages, BUFFERS=buffers, num_warps=4, maxnreg=LAUNCH_REGISTERS)
    return columns, options


def _launch_gemm(a: QTensor, b: QTensor, out: Tensor, tile_expert: Tensor | None,
                 ends: Tensor) -> None:
    """Fills out: [M, N] for grouped_gemm, [E, M, N] for grouped_wgrad, which has no tile_expert."""
    wgrad = tile_expert is None
    M, K = a.data.shape
    N = b.data.shape[-2]
    E = len(ends)
    a_data = a.data.contiguous()
    b_data = b.data.contiguous().flatten(0, -2)         # experts below each other
    out = out.flatten(0, -2)
    arguments = (a.scale.contiguous(), b.scale.contiguous(),
                 tile_expert, ends.contiguous(), M, N, K)
    layout = dict(WGRAD=wgrad, A_PER=a.rows_per_scale, B_PER=b.rows_per_scale)
    if use_hopper_gemm(out):
        programs = torch.cuda.get_device_properties(out.device).multi_processor_count
        columns, options = _hopper_options(b.rows_per_scale, out.itemsize)
        _hopper_gemm_kernel[(programs,)](
            _tma_descriptor(a_data, BLOCK, BLOCK),
            _tma_descriptor(b_data, BLOCK, BLOCK),
            _tma_descriptor(out, BLOCK // 2, columns),
            *arguments, E, PROGRAMS=programs, **layout, **options)
    else:
        _grouped_gemm_kernel[N // BLOCK, M // BLOCK, E if wgrad else 1](
            a_data, b_data, out, *arguments, TILE=BLOCK, num_warps=8, num_stages=3, **layout)


def grouped_gemm(a: QTensor, b: QTensor, tile_expert: Tensor, ends: Tensor) -> Tensor:
    """out[rows of expert e] = a[rows of e] @ b[e]^T: fprop with W, dgrad with W^T.

    a [M, K] in 1x128 blocks, b [E, N, K] in 128x128 blocks -> [M, N] bf16; M, N, K multiples of
    128.
    tile_expert [M/128] int32: the expert of each row tile, -1 past the last one (those rows stay
    undefined).  ends [E] int32: where each expert's rows end, a multiple of 128.
    """
    check_q("a", a, BY_128, BY_128)
    check_q("b", b, ANY, BY_128, a.data.shape[1], rows_per_scale=(BLOCK,), like=a.data)
    check("tile_expert", tile_expert, (torch.int32,), len(a.data) // BLOCK, like=a.data)
    check("ends", ends, (torch.int32,), len(b.data), like=a.data)
    if not use_kernels(a.data):
        _check_ends(ends, len(a.data))
        _check_tile_expert(tile_expert, ends)
        return grouped_gemm_ref(a, b, tile_expert)
    out = a.data.new_empty(len(a.data), b.data.shape[1], dtype=torch.bfloat16)
    _launch_gemm(a, b, out, tile_expert.contiguous(), ends)
    return out


def grouped_wgrad(a: QTensor, b: QTensor, ends: Tensor,
                  dtype: torch.dtype = torch.float32) -> Tensor:
    """dW[e] = a[:, slots of e] @ b[:, slots of e]^T, zeros for an expert without slots.

    a [M, slots], b [N, slots] column-wise, scales in tiles (from the direct transpose) or 1x128
    blocks (requantized); M, N, slots multiples of 128.
    ends [E] int32: the end of each expert's slots, a multiple of 128.
    -> [E, M, N] of dtype, fp32 or bf16.
    """
    check_choice("dtype", dtype, (torch.float32, torch.bfloat16))
    check_q("a", a, BY_128, BY_128, rows_per_scale=(1, BLOCK))
    check_q("b", b, BY_128, a.data.shape[1], rows_per_scale=(1, BLOCK), like=a.data)
    check("ends", ends, (torch.int32,), ANY, like=a.data)
    if not use_kernels(a.data):
        _check_ends(ends, a.data.shape[1])
        return grouped_wgrad_ref(a, b, ends, dtype)
    out = a.data.new_empty(len(ends), len(a.data), len(b.data), dtype=dtype)
    _launch_gemm(a, b, out, None, ends)
    return out


# ---- SwiGLU backward -----------------------------------------------------------------------------

def swiglu_backward_ref(da: Tensor, h: Tensor, prob: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = h.float().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    dsilu = sigmoid * (1 + gate * (1 - sigmoid))
    da = da.float()
    dprob = (da * silu(gate) * up).sum(-1)
    dgate = da * prob[:, None] * up * dsilu
    dup = da * prob[:, None] * silu(gate)
    return torch.cat([dgate, dup], dim=-1).to(h.dtype), dprob


def swiglu_backward_quantize_ref(da: Tensor, h: Tensor, prob: Tensor, scales: str = "pow2"):
    dh, dprob = swiglu_backward_ref(da, h.float(), prob)
    return quantize_ref(dh, scales), dprob, swiglu_quantize_ref(h, prob, scales)


@triton.jit
def _swiglu_backward_kernel(
        da, h, prob, tile_expert,           # [M, F] bf16, [M, 2F] bf16, [M] fp32, [M/128] or None
        dh, dh_scale,                       # [M, 2F] uint8 and [2F/128, M] fp32, or bf16 and None
        dprob,                              # [M] fp32
        a, a_scale,                         # [M, F] uint8 and [F/128, M] fp32, or None and None
        M, F,
        POW2: tl.constexpr, R_TILE: tl.constexpr, C_TILE: tl.constexpr, TILE: tl.constexpr):
    """Grid (M/R_TILE,). Reads 6MF, writes 4MF bytes (dH and A in FP8: 3MF).

    A program owns whole rows and walks along them, so that dprob is a plain sum: no atomics.
    """
    if _is_unused(tile_expert, tl.program_id(0) * R_TILE // TILE):
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
        dgate = d * p * up * sigmoid * (1 + gate * (1 - sigmoid))
        dup = d * p * silu
        if a is not None:                   # A again is cheaper than A kept.
            _store_rows(silu * up * p, first, a, a_scale, r, live, F, M, POW2, TILE)
        _store_rows(dgate, first, dh, dh_scale, r, live, 2 * F, M, POW2, TILE)
        _store_rows(dup, F + first, dh, dh_scale, r, live, 2 * F, M, POW2, TILE)
    tl.store(dprob + r, dp, mask=live)


def _launch_swiglu_backward(da: Tensor, h: Tensor, prob: Tensor, tile_expert: Tensor | None,
                            dh, dprob: Tensor, a) -> None:
    """Fills dh, dprob and a: dh and a are QTensors, or dh is a tensor like h and a is None."""
    M, F = da.shape
    r_tile, c_tile = _swiglu_tile(F)
    _swiglu_backward_kernel[(triton.cdiv(M, r_tile),)](
        da.contiguous(), h.contiguous(), prob.contiguous(), tile_expert,
        *_data_and_scale(dh), dprob, *_data_and_scale(a), M, F,
        POW2=_is_pow2(dh), R_TILE=r_tile, C_TILE=c_tile, TILE=BLOCK, num_warps=4)


def swiglu_backward_quantize(
        da: Tensor, h: Tensor, prob: Tensor, scales: str = "pow2",
        tile_expert: Tensor | None = None) -> tuple[QTensor, Tensor, QTensor]:
    """The backward of `swiglu_quantize`, which emits FP8, too: da [M, F] bf16 -> dh [M, 2F]
    row-wise, dprob [M] fp32, and A [M, F] row-wise once more, from the h that is at hand, for the
    weight gradient of fc2."""
    _check_swiglu(h, prob, scales)
    check("da", da, (h.dtype,), len(h), h.shape[1] // 2, like=h)
    tile_expert = check_tiles(tile_expert, len(h), h)
    if not use_kernels(h):
        return swiglu_backward_quantize_ref(da, h, prob, scales)
    M, F = da.shape
    dh = _empty_q(h, M, 2 * F, scales)
    dprob = prob.new_empty(M)
    a = _empty_q(h, M, F, scales)
    _launch_swiglu_backward(da, h, prob, tile_expert, dh, dprob, a)
    return dh, dprob, a


# ---- weights: 128x128 tiles survive a transpose, so one pass over the master writes W and W^T ----

def quantize_weight_ref(w: Tensor, scales: str = "pow2") -> tuple[QTensor, QTensor]:
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

    One conversion could serve W and W^T, but ptxas 12.9 then corrupts the transposed store
    (github.com/triton-lang/triton/issues/11111). Halving and doubling are exact, and keep the
    compiler from making one conversion of the two.
    """
    return _encode(x * (factor * 0.5) * 2.0)


@triton.jit
def _quantize_weight_kernel(
        w,                                  # [E, N, K] fp32, bf16 or fp16
        data, scale,                        # [E, N, K] uint8, [E, K/128, N/128] fp32
        data_t, scale_t,                    # [E, K, N] uint8, [E, N/128, K/128] fp32
        N, K, POW2: tl.constexpr, TILE: tl.constexpr):
    """Grid (N/128, K/128, E). Reads 4NK (fp32), writes 2NK bytes an expert."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    e = tl.program_id(2).to(tl.int64)
    n = i * TILE + tl.arange(0, TILE)
    k = j * TILE + tl.arange(0, TILE)
    at = e * N * K + n[:, None].to(tl.int64) * K + k[None, :]
    at_t = e * N * K + k[:, None].to(tl.int64) * N + n[None, :]
    tile = tl.load(w + at).to(tl.float32)
    s, factor = _scale_of(tl.max(_amax_bits(tile, 1), 0), POW2)
    tl.store(data + at, _encode(tile * factor))
    tl.store(data_t + at_t, tl.trans(_encode_again(tile, factor)))
    first = e * (N // TILE) * (K // TILE)
    tl.store(scale + first + j * (N // TILE) + i, s)
    tl.store(scale_t + first + i * (K // TILE) + j, s)


def quantize_weight(w: Tensor, scales: str = "pow2") -> tuple[QTensor, QTensor]:
    """Weights for fprop and dgrad, each laid out as the MMA wants it, the summed axis last:
    w [E, N, K] fp32, bf16 or fp16 -> W [E, N, K] and W^T [E, K, N].

    N and K are multiples of 128; scales in 128x128 blocks, [E, K/128, N/128], [E, N/128, K/128].
    """
    check_choice("scales", scales, SCALES)
    check("w", w, FLOATS, ANY, BY_128, BY_128)
    if not use_kernels(w):
        return quantize_weight_ref(w, scales)
    w = w.contiguous()
    E, N, K = w.shape
    q = _empty_weight(w, N, K, scales)
    q_t = _empty_weight(w, K, N, scales)
    _quantize_weight_kernel[N // BLOCK, K // BLOCK, E](
        w, _bytes(q.data), q.scale, _bytes(q_t.data), q_t.scale, N, K,
        POW2=scales == "pow2", TILE=BLOCK, num_warps=8)
    return q, q_t


# ---- what flow does without: naive's casts and transposes, SwiGLU in bf16 ------------------------

@triton.jit
def _dequantize_kernel(
        data, scale,                        # [R, C] uint8, [C/128, R/R_PER] fp32
        out,                                # [R, C] bf16, fp16 or fp32
        tile_expert,                        # [R/128] int32 or None
        R, C,
        R_PER: tl.constexpr, R_TILE: tl.constexpr, TILE: tl.constexpr):
    """Grid (R/R_TILE, C/128). Reads RC, writes 2RC (bf16) bytes."""
    if _is_unused(tile_expert, tl.program_id(0) * R_TILE // TILE):
        return
    r = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = (r < R)[:, None]
    at = r[:, None] * C + c[None, :]
    scale_row = scale + tl.program_id(1).to(tl.int64) * (R // R_PER)
    s = tl.load(scale_row + r // R_PER, mask=r < R, other=0.0)
    codes = tl.load(data + at, mask=live, other=0).to(tl.float8e4nv, bitcast=True)
    x = codes.to(tl.float32) * s[:, None]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=live)


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32,
               tile_expert: Tensor | None = None) -> Tensor:
    """code * scale: QTensor [R, C] in 1x128 blocks or tiles -> [R, C] of dtype.

    Weights [E, R, C] go to the twin. tile_expert [R/128] int32: tiles marked -1 stay undefined.
    """
    check_choice("dtype", dtype, FLOATS)
    check_q("q", q, ..., ANY, BY_128, rows_per_scale=(1, BLOCK))
    tile_expert = check_tiles(tile_expert, q.data.shape[-2], q.data)
    if not use_kernels(q.data) or q.data.ndim != 2:
        return dequantize_ref(q, dtype)
    R, C = q.data.shape
    r_tile = 64
    out = q.data.new_empty(R, C, dtype=dtype)
    _dequantize_kernel[triton.cdiv(R, r_tile), C // BLOCK](
        _bytes(q.data.contiguous()), q.scale.contiguous(), out, tile_expert, R, C,
        R_PER=q.rows_per_scale, R_TILE=r_tile, TILE=BLOCK, num_warps=8)
    return out


@triton.jit
def _transpose_kernel(
        x, out,                             # [R, C], [C, R] of one dtype
        tile_expert,                        # [R/128] int32 or None
        R, C, TILE: tl.constexpr):
    """Grid (C/128, R/128). Reads 2RC, writes 2RC bytes."""
    r = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    c = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    out += c[:, None] * R + r[None, :]
    if _is_unused(tile_expert, tl.program_id(1)):
        tl.store(out, tl.zeros((TILE, TILE), x.dtype.element_ty))
        return
    tile = tl.load(x + r[:, None] * C + c[None, :])
    tl.store(out, tl.trans(tile))


def transpose_ref(x: Tensor) -> Tensor:
    return x.t().contiguous()


def transpose(x: Tensor, tile_expert: Tensor | None = None) -> Tensor:
    """[R, C] -> [C, R] contiguous, R and C multiples of 128: the middle one of naive's three
    launches, dequantize, transpose, quantize.

    A kernel of its own, because PyTorch's copy runs at a fraction of the bandwidth.
    tile_expert [R/128] int32: tiles of rows marked -1 are not read. The kernel writes zeros there,
    so that quantize reads nothing unwritten.
    """
    check("x", x, FLOATS, BY_128, BY_128)
    tile_expert = check_tiles(tile_expert, len(x), x)
    if not use_kernels(x):
        return transpose_ref(x)
    x = x.contiguous()
    R, C = x.shape
    out = x.new_empty(C, R)
    _transpose_kernel[C // BLOCK, R // BLOCK](
        x, out, tile_expert, R, C, TILE=BLOCK, num_warps=8)
    return out


def requantize_ref(q: QTensor, scales: str = "pow2") -> QTensor:
    return quantize_ref(dequantize_ref(q).t(), scales)


@triton.jit
def _requantize_kernel(
        data, scale,                        # [M, C] uint8, [C/128, M] fp32
        tile_expert,                        # [M/128] int32 or None
        out, out_scale,                     # [C, M] uint8, [M/128, C] fp32
        M, C, POW2: tl.constexpr, TILE: tl.constexpr):
    """Grid (M/128, C/128), a tile a program. Reads MC, writes MC bytes, and 128 times as many
    scales as the direct transpose."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    if _is_unused(tile_expert, i):
        return
    r = i * TILE + tl.arange(0, TILE)
    c = j * TILE + tl.arange(0, TILE)
    s = tl.load(scale + j.to(tl.int64) * M + r)
    codes = tl.load(data + r[:, None].to(tl.int64) * C + c[None, :])
    x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * s[:, None]
    s, factor = _scale_of(_amax_bits(x, 0), POW2)
    codes = _encode(x * factor[None, :])
    tl.store(out + c[:, None].to(tl.int64) * M + r[None, :], tl.trans(codes))
    tl.store(out_scale + i.to(tl.int64) * C + c, s)


def requantize(q: QTensor, scales: str = "pow2", tile_expert: Tensor | None = None) -> QTensor:
    """Row-wise FP8 [M, C] -> column-wise FP8 [C, M] in one launch: dequantize, take the amax along
    the other axis, quantize, store transposed. It moves hardly more than the direct transpose.

    M and C are multiples of 128; q has 1x128 blocks of either policy -> 1x128 blocks,
    scale [M/128, C]. With fp32 scales every element is rounded a second time (and by naive's three
    launches a third time, to bf16 between the casts). With powers of two it is not, and the codes
    are those of the three launches.
    tile_expert [M/128] int32: skip tiles marked -1; what they hold stays undefined.
    """
    check_choice("scales", scales, SCALES)
    check_q("q", q, BY_128, BY_128)
    M, C = q.data.shape
    tile_expert = check_tiles(tile_expert, M, q.data)
    if not use_kernels(q.data):
        return requantize_ref(q, scales)
    out = _empty_q(q.scale, C, M, scales)
    _requantize_kernel[M // BLOCK, C // BLOCK](
        _bytes(q.data.contiguous()), q.scale.contiguous(), tile_expert,
        _bytes(out.data), out.scale, M, C, POW2=scales == "pow2", TILE=BLOCK, num_warps=4)
    return out


def swiglu(h: Tensor, prob: Tensor, tile_expert: Tensor | None = None) -> Tensor:
    """silu(gate) * up * prob: `swiglu_quantize` without quantize, for naive and bf16."""
    _check_swiglu(h, prob)
    tile_expert = check_tiles(tile_expert, len(h), h)
    if not use_kernels(h):
        return swiglu_ref(h, prob)
    a = h.new_empty(len(h), h.shape[1] // 2)
    _launch_swiglu(h, prob, tile_expert, a)
    return a


def swiglu_backward(da: Tensor, h: Tensor, prob: Tensor,
                    tile_expert: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """da [M, F] bf16, h [M, 2F] bf16, prob [M] fp32 -> dh [M, 2F] bf16, dprob [M] fp32."""
    _check_swiglu(h, prob)
    check("da", da, (h.dtype,), len(h), h.shape[1] // 2, like=h)
    tile_expert = check_tiles(tile_expert, len(h), h)
    if not use_kernels(h):
        return swiglu_backward_ref(da, h, prob)
    dh = h.new_empty(h.shape)
    dprob = prob.new_empty(len(h))
    _launch_swiglu_backward(da, h, prob, tile_expert, dh, dprob, None)
    return dh, dprob


# ---- where a kernel runs -------------------------------------------------------------------------

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache                    # so that it warns once
def _capability(device_index: int) -> tuple[int, int]:
    capability = torch.cuda.get_device_capability(device_index)
    if capability < (8, 9):
        warnings.warn(f"compute capability {capability[0]}.{capability[1]} has no FP8 tensor cores "
                      "(8.9 has): the PyTorch twins run, slowly")
    return capability


def use_kernels(x: Tensor) -> bool:
    """True where Triton kernels run: CUDA from compute capability 8.9 on, or any tensor in the
    interpreter."""
    if INTERPRET:
        return True
    return x.is_cuda and torch.version.hip is None and _capability(x.device.index) >= (8, 9)


def use_hopper_gemm(x: Tensor) -> bool:
    """True where the GEMMs are warp-specialised: the instructions are those of compute capability
    9 alone."""
    return not INTERPRET and use_kernels(x) and _capability(x.device.index)[0] == 9


def _rounding_cast(values, source, target, rounding_mode=None):
    """Casts as the hardware does, nearest even and saturating, for Triton's interpreter, which
    truncates (interpreter._convert_float): bits of `source` in, bits of `target` out."""
    import numpy
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
             "fp64": torch.float64, "fp8e4nv": FP8, "fp8e5": torch.float8_e5m2}
    integers = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
    raw = torch.frombuffer(bytearray(values.tobytes()), dtype=integers[source.primitive_bitwidth])
    wide = raw.view(types[str(source)])
    if str(source) != "fp64":
        wide = wide.float()
    if str(target) == "fp8e4nv":        # saturates, and every NaN becomes 0x7F
        wide = torch.where(wide.isnan(), torch.nan, wide.clamp(-E4M3_MAX, E4M3_MAX))
    narrow = wide.to(types[str(target)]).view(integers[target.primitive_bitwidth])
    unsigned = numpy.dtype(f"uint{target.primitive_bitwidth}")
    return narrow.numpy().view(unsigned).reshape(values.shape)


if INTERPRET:
    from triton.runtime import interpreter
    interpreter._convert_float = _rounding_cast


# ---- what wrappers share -------------------------------------------------------------------------

def _empty_q(like: Tensor, R: int, C: int, scales: str) -> QTensor:
    data = like.new_empty(R, C, dtype=FP8)
    scale = like.new_empty(C // BLOCK, R, dtype=torch.float32)
    return QTensor(data, scale, scales)


def _bytes(x: Tensor) -> Tensor:
    """FP8 goes through kernels as uint8: no load or store depends on how a compiler treats fp8."""
    return x.view(torch.uint8)


def _data_and_scale(x) -> tuple[Tensor | None, Tensor | None]:
    """What a kernel gets for a QTensor, for a tensor, which has no scale, or for nothing."""
    if isinstance(x, QTensor):
        return _bytes(x.data), x.scale
    return x, None


def _is_pow2(x) -> bool:
    return isinstance(x, QTensor) and x.policy == "pow2"


def _empty_weight(w: Tensor, rows: int, columns: int, scales: str) -> QTensor:
    data = w.new_empty(len(w), rows, columns, dtype=FP8)
    scale = w.new_empty(len(w), columns // BLOCK, rows // BLOCK, dtype=torch.float32)
    return QTensor(data, scale, scales)


# ---- checks: one sentence with the argument, its value and the remedy, before any launch ---------

ANY = "any"                     # What the length of an axis may be, besides a number
BY_128 = "a multiple of 128"
ANY_OR_NONE = "any, or 0"


def check_choice(name: str, value, choices) -> None:
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"{name}={value!r} is unknown: choose one of {known}")


def check(name: str, x: Tensor, dtypes: tuple, *shape, like: Tensor | None = None) -> None:
    """Raises ValueError unless x has one of `dtypes`, the shape and the device of `like`.

    shape: for each axis a length, ANY or BY_128; a leading ... stands for any number of axes, which
    may be empty.
    Reads no values: nothing waits for a GPU.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is of type {type(x).__name__}: give a tensor")
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        raise ValueError(f"{name} is on {x.device}, not the current device: call "
                         "torch.cuda.set_device first")
    if x.dtype not in dtypes:
        accepted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} has dtype {x.dtype}: convert it to {accepted}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}: move it to {like.device}, where the other "
                         "arguments are")
    if shape[0] is ...:
        shape = (ANY_OR_NONE,) * (x.ndim - len(shape) + 1) + shape[1:]
    if x.ndim != len(shape):
        raise ValueError(f"{name} has shape {list(x.shape)}: reshape it to {len(shape)} axes")
    for axis, (length, want) in enumerate(zip(x.shape, shape)):
        if length == 0 and want not in (0, ANY_OR_NONE):
            raise ValueError(f"{name} has shape {list(x.shape)}: axis {axis} is empty, give it at "
                             "least one element")
        if want is BY_128 and length % BLOCK:
            raise ValueError(f"{name} has shape {list(x.shape)}: axis {axis} must be a multiple of "
                             f"{BLOCK}, pad it to {triton.cdiv(length, BLOCK) * BLOCK}")
        if isinstance(want, int) and length != want:
            raise ValueError(f"{name} has shape {list(x.shape)}: make axis {axis} {want} long, to "
                             "fit the others")


def check_q(name: str, q: QTensor, *shape, rows_per_scale=(1,), like: Tensor | None = None) -> None:
    """The same for an FP8 tensor, whose scales must cover r x 128 codes each, r one of
    `rows_per_scale`."""
    if not isinstance(q, QTensor):
        raise ValueError(f"{name} is of type {type(q).__name__}: give a QTensor, as quantize "
                         "returns it")
    check(f"{name}.data", q.data, (FP8,), *shape, like=like)
    check_choice(f"{name}.policy", q.policy, SCALES)
    check(f"{name}.scale", q.scale, (torch.float32,), ..., ANY, ANY, like=q.data)
    *experts, R, C = q.data.shape
    layouts = [[*experts, C // BLOCK, R // r] for r in rows_per_scale if R % r == 0]
    if list(q.scale.shape) not in layouts:
        needed = " or ".join(map(str, layouts))
        raise ValueError(f"{name}.scale has shape {list(q.scale.shape)}: {name} of shape "
                         f"{list(q.data.shape)} needs {needed}, quantize again")


def check_tiles(tile_expert: Tensor | None, slots: int, like: Tensor) -> Tensor | None:
    """Returns it contiguous."""
    if tile_expert is None:
        return None
    check("tile_expert", tile_expert, (torch.int32,), triton.cdiv(slots, BLOCK), like=like)
    return tile_expert.contiguous()


# What follows reads values: it is for the twins, where that is no wait.

def check_values(name: str, index: Tensor, low: int, high: int) -> None:
    if index.numel() > 0 and (index.min() < low or index.max() >= high):
        raise ValueError(f"{name} holds values from {index.min()} to {index.max()}: they must lie "
                         f"in [{low}, {high})")


def _check_ends(ends: Tensor, slots: int) -> None:
    outside = ends.min() < 0 or ends.max() > slots
    if outside or (ends % BLOCK).any() or (ends.diff() < 0).any():
        raise ValueError(f"ends holds {ends.tolist()}: give multiples of {BLOCK} up to {slots} "
                         "that do not decrease")


def _check_tile_expert(tile_expert: Tensor, ends: Tensor) -> None:
    tile = torch.arange(len(tile_expert), device=ends.device)
    expert = torch.searchsorted(ends // BLOCK, tile.to(ends.dtype), right=True)
    expert = torch.where(expert < len(ends), expert, -1)
    if not torch.equal(tile_expert, expert.int()):
        raise ValueError(f"tile_expert holds {tile_expert.tolist()}: ends say {expert.tolist()}")
