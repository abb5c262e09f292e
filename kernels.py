"""Every kernel of an FP8 MoE layer, each below the PyTorch twin that specifies it.

An FP8 tensor is a pair: `x ~ code * scale`. A code is one E4M3 byte (1 sign, 4 exponent, 3 mantissa bits: largest
448, smallest normal 2^-6, smallest subnormal 2^-9, one NaN per sign, no infinity); a scale is one fp32 number shared
by a group of codes. The tensor core multiplies codes, the kernel multiplies scales. Groups lie along the axis that
the GEMM reduces, because a scale can only be pulled out of a sum that it is constant over:

    activation, row-wise     1 x 128 blocks                 fprop and dgrad
    weight                   128 x 128 blocks               the same block serves W and W^T
    activation, column-wise  transposed, one scale a tile   wgrad reduces over tokens
    granularity "row"        one scale for a whole row      fewer scales: less range, the same precision

With power-of-two scales, changing a scale by 2^k only moves the exponents of its codes. That is what makes the
scaling-aware transpose possible: row-wise FP8 becomes column-wise FP8 without a trip through BF16.

Reading order: QTensor, quantize, scaling_aware_transpose, swiglu_quantize, gather_rows, grouped_gemm.
Each operation is three things: `op_ref` (the twin: the specification, any device), `_op_kernel` (Triton), and `op`,
which runs the kernel on Hopper and later (and under TRITON_INTERPRET=1) and the twin anywhere else.
Run `python kernels.py` to time each kernel against the ceiling of the machine.

Shapes: R rows, C columns of any matrix; T tokens, M padded token slots, F expert width, E experts; GEMM M, N, K.
"""
import math
import os
import statistics
import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange, reduce, repeat
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK = 128                     # codes per scale, rows per expert tile, K-step of the GEMMs
FP8 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SCALE_MIN = 2.0 ** -126         # the smallest normal fp32: what an all-zero block gets, so that it never wins a maximum
_SCALE_MIN, _E4M3_MAX = tl.constexpr(SCALE_MIN), tl.constexpr(E4M3_MAX)                    # the same, inside kernels
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


class QTensor(NamedTuple):
    """An FP8 tensor.

    data   [..., R, C] float8_e4m3fn codes.
    scale  [..., C/c, R/r] float32: one scale for every r x c codes, reduction axis first (a GEMM step reads a row).
           1x128 blocks: [C/128, R].  128x128 tiles: [C/128, R/128].  Whole rows: [1, R].
    scales "pow2" or "fp32": how the scales were chosen; only "pow2" can be shifted.
    """
    data: Tensor
    scale: Tensor
    scales: str = "pow2"

    @property
    def shape(self):
        return self.data.shape

    @property
    def rows_per_scale(self) -> int:
        return self.data.shape[-2] // self.scale.shape[-1]

    @property
    def cols_per_scale(self) -> int:
        return self.data.shape[-1] // self.scale.shape[-2]


# ---------------------------------------------------------------------------------------------------------------------
# where a kernel runs

@lru_cache                                                          # says so once
def _is_hopper(device_index: int) -> bool:
    capability = torch.cuda.get_device_capability(device_index)
    if capability < (9, 0):
        warnings.warn(f"compute capability {capability[0]}.{capability[1]}: the kernels need 9.0 (FP8 tensor cores fed by TMA), "
                      "so the PyTorch twins run: same numbers, slowly")
    return capability >= (9, 0)


def use_kernels(x: Tensor) -> bool:
    """True where Triton kernels run: CUDA from compute capability 9.0 on, or any tensor in the interpreter."""
    return INTERPRET or (x.is_cuda and _is_hopper(x.device.index))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    """Persistent kernels launch one program, or two, on each."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _bytes(x: Tensor) -> Tensor:
    """FP8 goes through kernels as uint8: no load or store depends on how a compiler treats the fp8 type."""
    return x.view(torch.uint8)


def _check_blocks(name: str, x: Tensor, *axes: int) -> None:
    for axis in axes:
        if x.shape[axis] % BLOCK or x.shape[axis] == 0:
            raise ValueError(f"{name} has shape {list(x.shape)}: axis {axis} must be a multiple of {BLOCK}, "
                             f"pad it to {max(1, -(-x.shape[axis] // BLOCK)) * BLOCK}")


def check_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}")


# ---------------------------------------------------------------------------------------------------------------------
# scales

def scale_of(amax: Tensor, scales: str) -> tuple[Tensor, Tensor]:
    """The scale of a block whose largest magnitude is `amax` (fp32, any shape), and the factor that encodes with it.

    pow2: the smallest power of two >= amax/448. With amax = m * 2^e, 1 <= m < 2, it is 2^(e-8) if m <= 1.75 (448 is
    1.75 * 2^8), else 2^(e-7): integer arithmetic on the bits, no logarithm.   fp32: amax/448.
    A non-finite block gets SCALE_MIN and a NaN factor: all its codes become NaN, and no neighbour is touched.
    """
    finite = amax.isfinite()
    if scales == "pow2":
        bits = amax.view(torch.int32)
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()
        exponent = torch.where(finite, exponent, 1).clamp(min=1)
        scale, factor = (exponent << 23).view(torch.float32), ((254 - exponent) << 23).view(torch.float32)
    else:
        scale = amax / torch.full_like(amax, E4M3_MAX)      # by a tensor: CUDA multiplies by a number's inverse, off by an ulp
        scale = torch.where(finite, scale, SCALE_MIN).clamp(min=SCALE_MIN)
        factor = 1 / scale
    return scale, torch.where(finite, factor, torch.nan)


@triton.jit
def _scale_of(amax_bits, POW2: tl.constexpr):
    """scale_of on the bits of amax >= 0 (int32): ordered like the floats, with Inf and NaN above every number."""
    finite = amax_bits < 0x7F800000
    if POW2:
        exponent = (amax_bits >> 23) - 8 + ((amax_bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        exponent = tl.maximum(tl.where(finite, exponent, 1), 1)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    else:
        amax = amax_bits.to(tl.float32, bitcast=True)
        scale = tl.maximum(tl.where(finite, tl.div_rn(amax, _E4M3_MAX), 0.0), _SCALE_MIN)
        factor = tl.div_rn(1.0, scale)
    return scale, tl.where(finite, factor, float("nan"))


@triton.jit
def _amax_bits(x, axis: tl.constexpr):
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis)


@triton.jit
def _encode(x):
    """fp32 or fp16 -> the byte of the nearest E4M3 code, ties to even."""
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _decode(byte):
    return byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def _quantize_groups(x, GROUP: tl.constexpr, POW2: tl.constexpr):
    """x [R, C] fp32 -> codes [R, C], scale [R, C/GROUP]: every GROUP neighbours in a row share a scale."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    x = tl.reshape(x, (R, C // GROUP, GROUP))
    scale, factor = _scale_of(_amax_bits(x, 2), POW2)
    return tl.reshape(_encode(x * factor[:, :, None]), (R, C)), scale


# ---------------------------------------------------------------------------------------------------------------------
# quantize, dequantize

def _to_fp8(x: Tensor) -> Tensor:
    """fp32 -> E4M3, nearest even; a NaN of either sign becomes the code 0x7F, as the hardware's cast makes it."""
    return torch.where(x.isnan(), torch.nan, x).to(FP8)


def quantize_ref(x: Tensor, scales: str = "pow2", granularity: str = "block", scale: Tensor | None = None) -> QTensor:
    group = BLOCK if granularity == "block" else x.shape[1]
    blocks = rearrange(x.float(), "r (c g) -> c r g", g=group)
    if scale is None:
        scale, factor = scale_of(reduce(blocks.abs(), "c r g -> c r", "max"), scales)
    else:
        factor = 1 / scale
    codes = _to_fp8(blocks * factor[..., None])
    return QTensor(rearrange(codes, "c r g -> r (c g)").contiguous(), scale, scales)


@triton.jit
def _quantize_kernel(x, data, scale, R, C,  # x [R, C] bf16 or fp32, data [R, C] uint8, scale [C/COLS, R] fp32
                     POW2: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Grid (R/ROWS, C/COLS). Reads 2RC, writes RC bytes: three quarters of a BF16 copy."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    live = (row < R)[:, None] & (col < C)[None, :]
    at = row[:, None] * C + col[None, :]
    tile = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    scale_at = scale + tl.program_id(1).to(tl.int64) * R + row
    if GIVEN:
        codes = _encode(tile * tl.div_rn(1.0, tl.load(scale_at, mask=row < R, other=1.0))[:, None])
    else:
        s, factor = _scale_of(_amax_bits(tile, 1), POW2)
        codes = _encode(tile * factor[:, None])
        tl.store(scale_at, s, mask=row < R)
    tl.store(data + at, codes, mask=live)


def quantize(x: Tensor, scales: str = "pow2", granularity: str = "block", scale: Tensor | None = None) -> QTensor:
    """Row-wise quantization; the paper rounds scales up to powers of two.

    x [R, C] bf16, fp16 or fp32, C a multiple of 128.  scales "pow2" | "fp32".  granularity "block" (1x128, scale
    [C/128, R]) | "row" (scale [1, R]).  scale: use this one instead of finding it, block granularity's shape.
    A block that holds NaN or Inf dequantizes to NaN. Raises ValueError on other shapes and names.
    """
    check_choice("scales", scales, ("pow2", "fp32"))
    check_choice("granularity", granularity, ("block", "row"))
    if x.ndim != 2:
        raise ValueError(f"x has shape {list(x.shape)}: quantize takes a matrix, flatten the leading axes")
    _check_blocks("x", x, 1)
    if not use_kernels(x):
        return quantize_ref(x, scales, granularity, scale)
    x, (R, C) = x.contiguous(), x.shape
    cols = BLOCK if granularity == "block" else triton.next_power_of_2(C)
    q = QTensor(torch.empty_like(x, dtype=FP8),
                x.new_empty(triton.cdiv(C, cols), R, dtype=torch.float32) if scale is None else scale, scales)
    rows = max(1, 8192 // cols)                             # 8192 elements a program, 32 a thread
    _quantize_kernel[triton.cdiv(R, rows), triton.cdiv(C, cols)](
        x, _bytes(q.data), q.scale, R, C, scales == "pow2", scale is not None, rows, cols, num_warps=8)
    return q


def dequantize_ref(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    scale = repeat(q.scale, "... c r -> ... (r i) (c j)", i=q.rows_per_scale, j=q.cols_per_scale)
    return (q.data.float() * scale).to(dtype)


@triton.jit
def _dequantize_kernel(data, scale, out, R, C,  # data [R, C] uint8, scale [C/C_PER_SCALE, R/R_PER_SCALE], out [R, C]
                       R_PER_SCALE, C_PER_SCALE, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Grid (R/ROWS, C/COLS). Reads RC, writes 2RC (bf16) bytes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    live = (row < R)[:, None]
    s = tl.load(scale + (tl.program_id(1) * COLS // C_PER_SCALE).to(tl.int64) * (R // R_PER_SCALE) + row // R_PER_SCALE,
                mask=row < R, other=0.0)
    at = row[:, None] * C + col[None, :]
    tl.store(out + at, (_decode(tl.load(data + at, mask=live, other=0)) * s[:, None]).to(out.dtype.element_ty), mask=live)


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale: QTensor [R, C] (or [E, R, C], weights) of any granularity -> [R, C] of `dtype`."""
    if not use_kernels(q.data) or q.data.ndim != 2:
        return dequantize_ref(q, dtype)
    R, C = q.shape
    out = q.data.new_empty(R, C, dtype=dtype)
    _dequantize_kernel[triton.cdiv(R, 64), C // BLOCK](
        _bytes(q.data.contiguous()), q.scale.contiguous(), out, R, C, q.rows_per_scale, q.cols_per_scale, 64, BLOCK, num_warps=8)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# weights: 128x128 blocks survive a transpose, so one pass over the fp32 master writes W and W^T

def quantize_weight_ref(w: Tensor, scales: str = "pow2", granularity: str = "block") -> tuple[QTensor, QTensor]:
    if granularity == "row":
        by_row = [quantize_ref(m.reshape(-1, m.shape[2]), scales, "row") for m in (w, w.mT.contiguous())]
        return tuple(QTensor(q.data.view(m.shape), rearrange(q.scale, "1 (e r) -> e 1 r", e=len(w)), scales)
                     for q, m in zip(by_row, (w, w.mT)))
    blocks = rearrange(w.float(), "e (n i) (k j) -> e k n i j", i=BLOCK, j=BLOCK)
    scale, factor = scale_of(reduce(blocks.abs(), "e k n i j -> e k n", "max"), scales)
    codes = rearrange(_to_fp8(blocks * factor[..., None, None]), "e k n i j -> e (n i) (k j)")
    return QTensor(codes.contiguous(), scale, scales), QTensor(codes.mT.contiguous(), scale.mT.contiguous(), scales)


@triton.jit
def _weight_amax_kernel(w, amax, amax_t, N, K, TILE: tl.constexpr):  # w [E, N, K], amax [E, K/128, N], amax_t [E, N/128, K]
    """Grid (N/128, K/128, E). Reads 4NK bytes an expert: the largest magnitude of each row and column of a tile, as bits."""
    n, k, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, col = n * TILE + tl.arange(0, TILE), k * TILE + tl.arange(0, TILE)
    tile = tl.load(w + e * N * K + row[:, None].to(tl.int64) * K + col[None, :]).to(tl.float32)
    tl.store(amax + (e * (K // TILE) + k) * N + row, _amax_bits(tile, 1))
    tl.store(amax_t + (e * (N // TILE) + n) * K + col, _amax_bits(tile, 0))


@triton.jit
def _row_scale_kernel(amax, scale, N, TILES, POW2: tl.constexpr, TILE: tl.constexpr):  # amax [E, TILES, N], scale [E, 1, N]
    """Grid (N/128, E): the scale of each row from its tiles' maxima, NaN where a row is not finite."""
    e, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * TILE + tl.arange(0, TILE)
    bits = tl.zeros((TILE,), tl.int32)
    for t in range(TILES):
        bits = tl.maximum(bits, tl.load(amax + (e * TILES + t) * N + row))
    s, _ = _scale_of(bits, POW2)
    tl.store(scale + e * N + row, tl.where(bits < 0x7F800000, s, float("nan")))


@triton.jit
def _quantize_weight_kernel(w, data, scale, data_t, scale_t,  # [E, N, K] fp32 -> uint8 [E, N, K], [E, K, N]
                            N, K, POW2: tl.constexpr, ROW: tl.constexpr, TILE: tl.constexpr):
    """Grid (N/128, K/128, E). Reads 4NK, writes 2NK bytes an expert. ROW: the scales are given, one a row."""
    n, k, e = tl.program_id(0) * TILE, tl.program_id(1) * TILE, tl.program_id(2).to(tl.int64)
    row, col = n + tl.arange(0, TILE), k + tl.arange(0, TILE)
    tile = tl.load(w + e * N * K + row[:, None].to(tl.int64) * K + col[None, :]).to(tl.float32)
    if ROW:
        codes = _encode(tile * tl.div_rn(1.0, tl.load(scale + e * N + row))[:, None])
        codes_t = _encode(tile * tl.div_rn(1.0, tl.load(scale_t + e * K + col))[None, :])
    else:
        s, factor = _scale_of(tl.max(_amax_bits(tile, 1), 0), POW2)
        codes = _encode(tile * factor)
        # The same codes by another route (halving and doubling are exact). Where both stores share one conversion,
        # ptxas 12.9 corrupts the transposed one (github.com/triton-lang/triton/issues/11111).
        codes_t = _encode(tile * (factor * 0.5) * 2.0)
        blocks = e * (N // TILE) * (K // TILE)
        tl.store(scale + blocks + tl.program_id(1) * (N // TILE) + tl.program_id(0), s)
        tl.store(scale_t + blocks + tl.program_id(0) * (K // TILE) + tl.program_id(1), s)
    tl.store(data + e * N * K + row[:, None].to(tl.int64) * K + col[None, :], codes)
    tl.store(data_t + e * N * K + col[:, None].to(tl.int64) * N + row[None, :], tl.trans(codes_t))


def quantize_weight(w: Tensor, scales: str = "pow2", granularity: str = "block") -> tuple[QTensor, QTensor]:
    """Weights for fprop and dgrad: w [E, N, K] fp32 -> W [E, N, K] and W^T [E, K, N], both K-major for the MMA.

    granularity "block": 128x128, scale [E, K/128, N/128] and its transpose. "row": one scale a row of W and one a row
    of W^T, [E, 1, N] and [E, 1, K]: two encodings. Raises ValueError unless N and K are multiples of 128.
    """
    _check_blocks("w", w, 1, 2)
    if not use_kernels(w):
        return quantize_weight_ref(w, scales, granularity)
    w, (E, N, K) = w.contiguous(), w.shape
    row = granularity == "row"
    grid = (N // BLOCK, K // BLOCK, E)
    if row:
        scale, scale_t = (w.new_empty(E, 1, width, dtype=torch.float32) for width in (N, K))
        amax, amax_t = (w.new_empty(E, a // BLOCK, b, dtype=torch.int32) for a, b in ((K, N), (N, K)))
        _weight_amax_kernel[grid](w, amax, amax_t, N, K, BLOCK, num_warps=4)
        for bits, s in ((amax, scale), (amax_t, scale_t)):
            _row_scale_kernel[s.shape[2] // BLOCK, E](bits, s, s.shape[2], bits.shape[1], scales == "pow2", BLOCK)
    else:
        scale, scale_t = (w.new_empty(E, *tiles, dtype=torch.float32)
                          for tiles in ((K // BLOCK, N // BLOCK), (N // BLOCK, K // BLOCK)))
    data, data_t = w.new_empty(E, N, K, dtype=FP8), w.new_empty(E, K, N, dtype=FP8)
    _quantize_weight_kernel[grid](
        w, _bytes(data), scale, _bytes(data_t), scale_t, N, K, scales == "pow2", row, BLOCK, num_warps=4 if row else 8)
    return QTensor(data, scale, scales), QTensor(data_t, scale_t, scales)


# ---------------------------------------------------------------------------------------------------------------------
# row-wise FP8 -> column-wise FP8

def scaling_aware_transpose_ref(q: QTensor, rows: Tensor | None = None, target: Tensor | None = None) -> QTensor:
    if rows is not None:
        q = gather_rows_ref(q, rows)
    scale = rearrange(q.scale, "c (m i) -> m c i", i=BLOCK)                         # [M/128, C/128 or 1, 128]
    top = reduce(scale, "m c i -> m c", "max") if target is None else repeat(target, "m -> m c", c=scale.shape[1])
    k = (top.view(torch.int32)[..., None] - scale.view(torch.int32)) >> 23           # log2(top / scale) >= 0
    shift = torch.ldexp(torch.ones_like(scale), -k.clamp(max=149))                  # below 2^-149 nothing survives
    codes = rearrange(q.data.float(), "(m i) (c j) -> m c i j", i=BLOCK, c=scale.shape[1])
    return QTensor(rearrange(_to_fp8(codes * shift[..., None]), "m c i j -> (c j) (m i)").contiguous(), top, q.scales)


@triton.jit
def _scaling_aware_transpose_kernel(data, scale, rows, target, tile_expert, out, out_scale,
                                    # data [T, C] uint8, scale [C/128 or 1, T], rows [M] int64 or None,
                                    # target [M/128] or None, out [C, M] uint8, out_scale [M/128, C/128 or 1]
                                    T, C, M, SCALES: tl.constexpr, TILE: tl.constexpr):
    """Grid (M/128, C/128): one tile a program, neighbours write neighbouring columns. Reads MC, writes MC bytes."""
    i, j = tl.program_id(0), tl.program_id(1)
    if tile_expert is not None:
        if tl.load(tile_expert + i) < 0:
            return
    slot, col = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    row = slot.to(tl.int64)
    if rows is not None:                                    # gather on the way in: the permute costs nothing here
        row = tl.load(rows + slot)
    js = j if SCALES > 1 else 0
    s = tl.load(scale + js.to(tl.int64) * T + row, mask=row >= 0, other=_SCALE_MIN)
    if target is None:
        top = tl.max(s, 0)
    else:
        top = tl.load(target + i)
    codes = tl.load(data + row[:, None] * C + col[None, :], mask=(row >= 0)[:, None], other=0)
    k = (top.to(tl.int32, bitcast=True) - s.to(tl.int32, bitcast=True)) >> 23
    # 2^-k in fp16, which holds every code and whatever of it E4M3 can still see; beyond k = 20 no code is left
    shift = tl.where(k <= 20, (tl.maximum(127 - k, 0) << 23).to(tl.float32, bitcast=True), 0.0).to(tl.float16)
    codes = _encode(codes.to(tl.float8e4nv, bitcast=True).to(tl.float16) * shift[:, None])
    tl.store(out + col[:, None].to(tl.int64) * M + slot[None, :], tl.trans(codes))
    if (SCALES > 1) | (j == 0):
        tl.store(out_scale + i * SCALES + js, top)


def scaling_aware_transpose(q: QTensor, rows: Tensor | None = None, target: Tensor | None = None,
                            tiles: Tensor | None = None) -> QTensor:
    """Row-wise FP8 [M, C] -> column-wise FP8 [C, M] without leaving FP8: the paper's central kernel.

    In each 128x128 tile the largest row scale S becomes the tile's scale, and the codes of a row with scale s move down
    by k = log2(S/s) binades: exact while they stay normal, nearest-even below 2^-6, NaN and -0 kept.
    rows [M] int64: transpose q[rows] instead, -1 for a zero row (q is then [T, C]).
    target [M/128] fp32: take this power of two for S in each tile; it must not lie below the tile's row scales.
    tiles [M/128] int32: skip tiles marked -1; what they hold stays undefined.
    Returns scale [M/128, C/128] (1x128 input) or [M/128, 1] (row input). Raises ValueError on fp32 scales, whose
    ratios are no powers of two, and on sizes that are not multiples of 128.
    """
    if q.scales != "pow2":
        raise ValueError(f"scales={q.scales!r} cannot be shifted: the direct transpose moves exponents, "
                         "quantize with scales='pow2'")
    T, C = q.shape
    M = T if rows is None else len(rows)
    _check_blocks("q", q.data, 1)
    _check_blocks("q" if rows is None else "rows", q.data if rows is None else rows, 0)
    if not use_kernels(q.data):
        return scaling_aware_transpose_ref(q, rows, target)
    scales = q.scale.shape[0]
    out = QTensor(q.data.new_empty(C, M), q.scale.new_empty(M // BLOCK, scales))
    _scaling_aware_transpose_kernel[M // BLOCK, C // BLOCK](
        _bytes(q.data.contiguous()), q.scale.contiguous(), rows, target, tiles, _bytes(out.data), out.scale, T, C, M,
        scales, BLOCK, num_warps=4)
    return out


@triton.jit
def _transpose_kernel(x, out, R, C, TILE: tl.constexpr):    # x [R, C] bf16, out [C, R]
    """Grid (C/128, R/128). Reads 2RC, writes 2RC bytes."""
    row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    col = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tile = tl.load(x + row[:, None] * C + col[None, :])
    tl.store(out + col[:, None] * R + row[None, :], tl.trans(tile))


def transpose(x: Tensor) -> Tensor:
    """[R, C] -> [C, R] contiguous, R and C multiples of 128: the middle step of the requantizing transpose.

    A kernel of its own (PyTorch's copy runs at a fraction of the bandwidth), so that the naive recipe is no straw man.
    """
    if not use_kernels(x):
        return x.t().contiguous()
    _check_blocks("x", x, 0, 1)
    x, (R, C), out = x.contiguous(), x.shape, x.new_empty(x.shape[::-1])
    _transpose_kernel[C // BLOCK, R // BLOCK](x, out, R, C, BLOCK, num_warps=8)
    return out


def expert_scale_ref(scale: Tensor, rows: Tensor | None, ends: Tensor) -> Tensor:
    s = scale[0] if rows is None else torch.where(rows >= 0, scale[0, rows], SCALE_MIN)
    top = torch.full_like(s[::BLOCK], SCALE_MIN)
    for begin, end in zip([0, *ends.tolist()], ends.tolist()):
        if end > begin:
            top[begin // BLOCK:end // BLOCK] = s[begin:end].amax()
    return top


@triton.jit
def _expert_scale_kernel(scale, rows, ends, top, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Grid (E,). scale [T], rows [M] int64 or None, ends [E] int32, top [M/128]."""
    e = tl.program_id(0)
    begin, end = tl.load(ends + e - 1, mask=e > 0, other=0), tl.load(ends + e)
    largest = tl.zeros((CHUNK,), tl.float32)
    for at in range(begin, end, CHUNK):
        slot = at + tl.arange(0, CHUNK)
        row = tl.where(slot < end, slot, -1)
        if rows is not None:
            row = tl.load(rows + slot, mask=slot < end, other=-1)
        largest = tl.maximum(largest, tl.load(scale + row, mask=row >= 0, other=_SCALE_MIN))
    largest = tl.max(largest, 0)
    for at in range(begin // TILE, end // TILE, CHUNK):
        tile = at + tl.arange(0, CHUNK)
        tl.store(top + tile, largest + tl.zeros((CHUNK,), tl.float32), mask=tile < end // TILE)


def expert_scale(scale: Tensor, rows: Tensor | None, ends: Tensor) -> Tensor:
    """The largest row scale of each expert, written to each of its tiles: `target` for row granularity.

    scale [1, T] fp32, rows [M] int64 (the row in each slot, -1: padding; None: slot i holds row i), ends [E] int32
    (where each expert's slots end) -> [M/128] fp32; tiles past the last expert stay undefined.
    """
    if not use_kernels(scale):
        return expert_scale_ref(scale, rows, ends)
    top = scale.new_empty((scale.shape[1] if rows is None else len(rows)) // BLOCK)
    _expert_scale_kernel[len(ends),](scale, rows, ends, top, 8192, BLOCK, num_warps=16)
    return top


def column_scale(x: Tensor, ends: Tensor, scales: str) -> Tensor:
    """Scales for quantizing x [M, C] column-wise with one scale per column and expert: [M/128, C], for `quantize(x.t())`.

    The requantizing path of row granularity, an ablation: plain PyTorch, no host-device synchronisation.
    """
    amax = reduce(x.float().abs(), "(m i) c -> m c", "max", i=BLOCK)
    tile = torch.arange(len(amax), device=x.device)[:, None] * BLOCK
    begin = F.pad(ends, (1, 0))
    for e in range(len(ends)):
        mine = (tile >= begin[e]) & (tile < begin[e + 1])
        amax = torch.where(mine, torch.where(mine, amax, 0).amax(0), amax)
    return torch.where(amax.isfinite(), scale_of(amax, scales)[0], torch.nan)     # the quantizer will not see the maximum


# ---------------------------------------------------------------------------------------------------------------------
# SwiGLU: a = silu(gate) * up * prob, with h = [gate | up] and prob the router's weight of each slot

def swiglu_ref(h: Tensor, prob: Tensor) -> Tensor:
    gate, up = h.float().chunk(2, dim=-1)
    return (F.silu(gate) * up * prob[:, None]).to(h.dtype)


def swiglu_quantize_ref(h: Tensor, prob: Tensor, scales: str = "pow2", granularity: str = "block") -> QTensor:
    return quantize_ref(swiglu_ref(h.float(), prob), scales, granularity)


def swiglu_backward_ref(da: Tensor, h: Tensor, prob: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = h.float().chunk(2, dim=-1)
    da, prob, sigmoid = da.float(), prob[:, None], torch.sigmoid(gate)
    silu = gate * sigmoid
    dgate = da * prob * up * sigmoid * (1 + gate * (1 - sigmoid))
    dh = torch.cat([dgate, da * prob * silu], dim=-1)
    return dh.to(h.dtype), (da * silu * up).sum(-1)


def swiglu_backward_quantize_ref(da: Tensor, h: Tensor, prob: Tensor, scales: str = "pow2", granularity: str = "block"):
    dh, dprob = swiglu_backward_ref(da, h.float(), prob)
    return quantize_ref(dh, scales, granularity), dprob, swiglu_quantize_ref(h, prob, scales, granularity)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _swiglu_kernel(h, prob, a, scale, tile_expert,          # h [M, 2F] bf16, prob [M] fp32, a [M, F] uint8 or bf16
                   M, F, QUANTIZE: tl.constexpr, POW2: tl.constexpr,  # scale [F/GROUP, M] fp32
                   ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Grid (M/ROWS, F/COLS). Reads 4MF, writes MF bytes (2MF unquantized)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    if tile_expert is not None:
        if tl.load(tile_expert + tl.program_id(0) * ROWS // TILE) < 0:
            return
    live = (row < M)[:, None] & (col < F)[None, :]
    at = row[:, None] * F * 2 + col[None, :]
    gate = tl.load(h + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(h + F + at, mask=live, other=0.0).to(tl.float32)
    p = tl.load(prob + row, mask=row < M, other=0.0)
    y = gate * _sigmoid(gate) * up * p[:, None]
    if QUANTIZE:
        y, s = _quantize_groups(y, GROUP, POW2)
        group = tl.program_id(1) * (COLS // GROUP) + tl.arange(0, COLS // GROUP)
        tl.store(scale + group[None, :].to(tl.int64) * M + row[:, None], s, mask=(row < M)[:, None])
    tl.store(a + row[:, None] * F + col[None, :], y.to(a.dtype.element_ty), mask=live)


@triton.jit
def _swiglu_backward_kernel(da, h, prob, tile_expert,               # da [M, F] bf16, h [M, 2F] bf16, prob [M] fp32
                            dh, dh_scale, dprob, a, a_scale,        # dh [M, 2F] uint8 or bf16, a [M, F] uint8 or None
                            M, F, QUANTIZE: tl.constexpr, POW2: tl.constexpr, ROW: tl.constexpr,
                            COLS: tl.constexpr, TILE: tl.constexpr):
    """Grid (M,): a program owns a row, so that dprob is a plain sum. Reads 6MF, writes 3MF bytes (4MF unquantized)."""
    row = tl.program_id(0).to(tl.int64)
    if tile_expert is not None:
        if tl.load(tile_expert + row // TILE) < 0:
            return
    col = tl.arange(0, COLS)[None, :]
    live = col < F
    gate = tl.load(h + row * F * 2 + col, mask=live, other=0.0).to(tl.float32)
    up = tl.load(h + row * F * 2 + F + col, mask=live, other=0.0).to(tl.float32)
    d = tl.load(da + row * F + col, mask=live, other=0.0).to(tl.float32)
    p = tl.load(prob + row)
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dprob + row, tl.sum(tl.sum(d * silu * up, 1), 0))
    y = silu * up * p
    d *= p
    dgate, dup = d * up * sigmoid * (1 + gate * (1 - sigmoid)), d * silu
    if QUANTIZE:
        GROUP: tl.constexpr = COLS if ROW else TILE
        group = tl.arange(0, COLS // GROUP)[None, :]
        scaled = group * GROUP < F
        if ROW:                                                     # gate and up share the row's scale
            s, factor = _scale_of(tl.maximum(_amax_bits(dgate, 1), _amax_bits(dup, 1)), POW2)
            dgate, dup = _encode(dgate * factor[:, None]), _encode(dup * factor[:, None])
            tl.store(dh_scale + row + tl.arange(0, 1), s)
        else:
            dgate, s = _quantize_groups(dgate, GROUP, POW2)
            tl.store(dh_scale + group.to(tl.int64) * M + row, s, mask=scaled)
            dup, s = _quantize_groups(dup, GROUP, POW2)
            tl.store(dh_scale + (group + F // GROUP).to(tl.int64) * M + row, s, mask=scaled)
        if a is not None:                                           # cheaper to make again from h than to keep
            y, s = _quantize_groups(y, GROUP, POW2)
            tl.store(a_scale + group.to(tl.int64) * M + row, s, mask=scaled)
            tl.store(a + row * F + col, y, mask=live)
    out: tl.constexpr = dh.dtype.element_ty
    tl.store(dh + row * F * 2 + col, dgate.to(out), mask=live)
    tl.store(dh + row * F * 2 + F + col, dup.to(out), mask=live)


def _empty_q(like: Tensor, R: int, C: int, scales: str, granularity: str) -> QTensor:
    return QTensor(like.new_empty(R, C, dtype=FP8),
                   like.new_empty(C // BLOCK if granularity == "block" else 1, R, dtype=torch.float32), scales)


def _launch_swiglu(h, prob, tiles, a, scale, scales, granularity):
    h, M, width = h.contiguous(), h.shape[0], h.shape[1] // 2
    row = granularity == "row"
    cols = triton.next_power_of_2(width) if row else math.gcd(width, 2048)
    rows = max(1, 2048 // cols)                             # 2048 outputs a program, 16 a thread
    _swiglu_kernel[triton.cdiv(M, rows), triton.cdiv(width, cols)](
        h, prob.contiguous(), a, scale, tiles, M, width, scale is not None, scales == "pow2", rows, cols,
        cols if row else BLOCK, BLOCK, num_warps=4)


def swiglu(h: Tensor, prob: Tensor, tiles: Tensor | None = None) -> Tensor:
    """silu(gate) * up * prob, unquantized: h [M, 2F] bf16 = [gate | up], prob [M] fp32 -> [M, F] bf16.

    tiles [M/128] int32: the expert of each tile, -1 for tiles to skip (their rows stay undefined).
    """
    _check_blocks("h", h.chunk(2, -1)[0], 1)
    if not use_kernels(h):
        return swiglu_ref(h, prob)
    a = h.new_empty(len(h), h.shape[1] // 2)
    _launch_swiglu(h, prob, tiles, a, None, "pow2", "block")
    return a


def swiglu_quantize(h: Tensor, prob: Tensor, scales: str = "pow2", granularity: str = "block",
                    tiles: Tensor | None = None) -> QTensor:
    """SwiGLU that emits FP8 (a fused operator of the paper): `swiglu`, then `quantize`, without the BF16 tensor between them."""
    _check_blocks("h", h.chunk(2, -1)[0], 1)
    if not use_kernels(h):
        return swiglu_quantize_ref(h, prob, scales, granularity)
    q = _empty_q(h, len(h), h.shape[1] // 2, scales, granularity)
    _launch_swiglu(h, prob, tiles, _bytes(q.data), q.scale, scales, granularity)
    return q


def swiglu_backward(da: Tensor, h: Tensor, prob: Tensor, tiles: Tensor | None = None):
    """da [M, F] bf16, h [M, 2F] bf16, prob [M] fp32 -> dh [M, 2F] bf16, dprob [M] fp32."""
    _check_blocks("da", da, 1)
    if not use_kernels(h):
        return swiglu_backward_ref(da, h, prob)
    da, h, prob = da.contiguous(), h.contiguous(), prob.contiguous()
    dh, dprob = torch.empty_like(h), torch.empty_like(prob)
    _swiglu_backward_kernel[len(h),](da, h, prob, tiles, dh, None, dprob, None, None, *da.shape, False, False, False,
                                     triton.next_power_of_2(da.shape[1]), BLOCK)
    return dh, dprob


def swiglu_backward_quantize(da: Tensor, h: Tensor, prob: Tensor, scales: str = "pow2", granularity: str = "block",
                             tiles: Tensor | None = None, again: bool = True) -> tuple[QTensor, Tensor, QTensor | None]:
    """SwiGLU backward that emits FP8 (a fused operator of the paper): dh [M, 2F] row-wise, dprob [M] fp32, and, where `again`,
    a [M, F] row-wise once more, recomputed from the h that is at hand, for the weight gradient of fc2."""
    _check_blocks("da", da, 1)
    if not use_kernels(h):
        dh, dprob, a = swiglu_backward_quantize_ref(da, h, prob, scales, granularity)
        return dh, dprob, a if again else None
    da, h, prob, (M, width) = da.contiguous(), h.contiguous(), prob.contiguous(), da.shape
    dh, dprob = _empty_q(h, M, 2 * width, scales, granularity), torch.empty_like(prob)
    a = _empty_q(h, M, width, scales, granularity) if again else None
    _swiglu_backward_kernel[M,](da, h, prob, tiles, _bytes(dh.data), dh.scale, dprob, *((_bytes(a.data), a.scale) if again
                                else (None, None)), M, width, True, scales == "pow2", granularity == "row",
                                triton.next_power_of_2(width), BLOCK)
    return dh, dprob, a


# ---------------------------------------------------------------------------------------------------------------------
# permute + pad is one gather of rows; unpermute + unpad is one gather and sum

def gather_rows_ref(x, rows: Tensor):
    if isinstance(x, QTensor):
        return QTensor(gather_rows_ref(x.data.view(torch.uint8), rows).view(FP8),
                       torch.where(rows >= 0, x.scale[:, rows], SCALE_MIN), x.scales)
    return torch.where((rows >= 0)[:, None], x[rows], torch.zeros((), dtype=x.dtype, device=x.device))


@triton.jit
def _gather_rows_kernel(x, scale, rows, tile_expert, out, out_scale,  # x [T, C], scale [S, T], rows [M], out [M, C], [S, M]
                        T, C, M, S, ROWS: tl.constexpr, COLS: tl.constexpr, S_COLS: tl.constexpr, TILE: tl.constexpr):
    """Grid (M/ROWS, C/COLS). Reads MC and writes MC elements; data and scales move together."""
    if tile_expert is not None:
        if tl.load(tile_expert + tl.program_id(0) * ROWS // TILE) < 0:
            return
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + slot, mask=slot < M, other=-1)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    tile = tl.load(x + row[:, None] * C + col, mask=(row >= 0)[:, None], other=0)
    tl.store(out + slot[:, None] * C + col, tile, mask=(slot < M)[:, None])
    if scale is not None:
        s = tl.program_id(1) * S_COLS + tl.arange(0, S_COLS)[:, None]
        values = tl.load(scale + s.to(tl.int64) * T + row[None, :], mask=(s < S) & (row >= 0)[None, :],
                         other=_SCALE_MIN)
        tl.store(out_scale + s.to(tl.int64) * M + slot[None, :], values, mask=(s < S) & (slot < M)[None, :])


def gather_rows(x, rows: Tensor, tiles: Tensor | None = None):
    """out[i] = x[rows[i]], zeros (with the smallest scale) where rows[i] is -1: the paper's fused permute+pad.

    x [T, C] bf16 or QTensor, C a multiple of 128; rows [M] int64 -> [M, C] of the same kind.
    tiles [M/128] int32: skip tiles marked -1; their rows stay undefined and no kernel reads them.
    """
    data, scale = (_bytes(x.data.contiguous()), x.scale.contiguous()) if isinstance(x, QTensor) else (x.contiguous(), None)
    _check_blocks("x", data, 1)
    if not use_kernels(data):
        return gather_rows_ref(x, rows)
    (T, C), M = data.shape, len(rows)
    cols, n_rows = math.gcd(C, 512), 32                     # gcd: the largest power of two up to 512 that divides C
    S = 0 if scale is None else len(scale)
    out, out_scale = data.new_empty(M, C), None if scale is None else scale.new_empty(S, M)
    _gather_rows_kernel[triton.cdiv(M, n_rows), C // cols](
        data, scale, rows, tiles, out, out_scale, T, C, M, S, n_rows, cols, cols // BLOCK, BLOCK, num_warps=8)
    return out if scale is None else QTensor(out.view(FP8), out_scale, x.scales)


def sum_rows_ref(x: Tensor, slots: Tensor) -> Tensor:
    return sum(x[slot].float() for slot in slots.unbind(1)).to(x.dtype)


@triton.jit
def _sum_rows_kernel(x, slots, out, T, C, TOPK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Grid (T/ROWS, C/COLS). x [M, C] bf16, slots [T, k] int64, out [T, C]. Reads 2kTC, writes 2TC bytes."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    live = (token < T)[:, None]
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for j in tl.static_range(TOPK):
        slot = tl.load(slots + token * TOPK + j, mask=token < T, other=0)
        acc += tl.load(x + slot[:, None] * C + col, mask=live, other=0.0).to(tl.float32)
    tl.store(out + token[:, None] * C + col, acc.to(out.dtype.element_ty), mask=live)


def sum_rows(x: Tensor, slots: Tensor) -> Tensor:
    """Unpermute+unpad: out[t] = sum of x[slots[t, j]] over j, in that order, in fp32.

    x [M, C] bf16, C a multiple of 128; slots [T, k] int64 -> [T, C] bf16. No atomics: a token owns its sum.
    """
    _check_blocks("x", x, 1)
    if not use_kernels(x):
        return sum_rows_ref(x, slots)
    x, slots, (T, topk), C = x.contiguous(), slots.contiguous(), slots.shape, x.shape[1]
    cols = math.gcd(C, 2048)
    rows = 2048 // cols
    out = x.new_empty(T, C)
    _sum_rows_kernel[triton.cdiv(T, rows), C // cols](x, slots, out, T, C, topk, rows, cols, num_warps=4)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# grouped GEMM

def grouped_gemm_ref(a: QTensor, b: QTensor, tile_expert: Tensor) -> Tensor:
    x, w = dequantize_ref(a), dequantize_ref(b)
    out = x.new_zeros(len(x), w.shape[1], dtype=torch.bfloat16)
    expert = tile_expert.repeat_interleave(BLOCK)
    for e in range(len(w)):
        out[expert == e] = (x[expert == e] @ w[e].T).to(out.dtype)
    return out


def grouped_wgrad_ref(a: QTensor, b: QTensor, ends: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = dequantize_ref(a), dequantize_ref(b)
    return torch.stack([(x[:, begin:end] @ y[:, begin:end].T).to(dtype)
                        for begin, end in zip([0, *ends.tolist()], ends.tolist())])


@triton.jit
def _load_scale(scale, row, limit, PER_SCALE: tl.constexpr, SIZE: tl.constexpr, AXIS: tl.constexpr):
    """Scales of rows [row, row + SIZE) below limit: one number where they share it, else a vector along AXIS of the tile."""
    if PER_SCALE >= SIZE:
        return tl.load(scale + row // PER_SCALE, mask=row < limit, other=0.0)
    else:
        rows = row + tl.arange(0, SIZE)
        return tl.expand_dims(tl.load(scale + rows // PER_SCALE, mask=rows < limit, other=0.0), 1 - AXIS)


@triton.jit
def _accumulate(a, b, row_a, row_b, begin, end,                     # TMA descriptors, first row of each tile, K-steps
                a_scale, b_scale, scale_row_a, scale_row_b,         # scales at K-step 0, first row of the tile in them
                a_rows, b_rows, A_PER: tl.constexpr, B_PER: tl.constexpr,
                PER_STEP: tl.constexpr, PROMOTE: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """sum over k of a[rows_a, k] b[rows_b, k]^T, fp32 [BM, BN].

    Hopper's tensor core sums FP8 products in about 14 bits and truncates, so a partial sum is promoted: added to an
    fp32 accumulator by the CUDA cores. PER_STEP: every K-step has scales of its own and is promoted with them.
    Else the scales hold for the whole sum, and a promotion comes every PROMOTE steps (0: never).
    """
    acc = tl.zeros((BM, BN), tl.float32)
    a_limit = tl.where(end > begin, a_rows, 0)                      # an empty expert has no scales to read
    b_limit = tl.where(end > begin, b_rows, 0)
    if PER_STEP:
        # The scales are loaded a step ahead and multiplied in their own step: multiplied where they are loaded, the
        # compiler puts the wait for them between two MMA instructions.
        sa = _load_scale(a_scale + begin * (a_rows // A_PER), scale_row_a, a_limit, A_PER, BM, 0)
        sb = _load_scale(b_scale + begin * (b_rows // B_PER), scale_row_b, b_limit, B_PER, BN, 1)
        for k in range(begin, end):
            ahead = tl.minimum(k + 1, end - 1)
            next_sa = _load_scale(a_scale + ahead * (a_rows // A_PER), scale_row_a, a_rows, A_PER, BM, 0)
            next_sb = _load_scale(b_scale + ahead * (b_rows // B_PER), scale_row_b, b_rows, B_PER, BN, 1)
            acc += tl.dot(a.load([row_a, k * BK]), b.load([row_b, k * BK]).T) * (sa * sb)
            sa, sb = next_sa, next_sb
    else:
        partial = tl.zeros((BM, BN), tl.float32)
        for k in range(begin, end):
            partial = tl.dot(a.load([row_a, k * BK]), b.load([row_b, k * BK]).T, partial)
            if PROMOTE > 0:
                if (k - begin) % PROMOTE == PROMOTE - 1:
                    acc += partial
                    partial = tl.zeros((BM, BN), tl.float32)
        acc = partial if PROMOTE == 0 else acc + partial
        acc *= (_load_scale(a_scale, scale_row_a, a_limit, A_PER, BM, 0)
                * _load_scale(b_scale, scale_row_b, b_limit, B_PER, BN, 1))
    return acc


@triton.jit
def _accumulate_halves(a, b, row_a, row_b, begin, end,              # a's descriptor loads half a tile
                       a_scale, b_scale, a_tiles, b_tiles,          # the tile's scale at K-step 0, scales in a K-step
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The same sum where a scale is one number a tile and K-step, as upper and lower half, fp32 [BM/2, BN] each.

    A half's partial sum is promoted while the tensor core works for the other half, or for the multiprocessor's other
    program: scales that are vectors would leave no registers for two partial sums, or for two programs.
    """
    HALF: tl.constexpr = BM // 2
    upper, lower = tl.zeros((HALF, BN), tl.float32), tl.zeros((HALF, BN), tl.float32)
    scale = (tl.load(a_scale + begin * a_tiles, mask=end > begin, other=0.0)
             * tl.load(b_scale + begin * b_tiles, mask=end > begin, other=0.0))
    for k in range(begin, end):
        ahead = tl.minimum(k + 1, end - 1)
        next_sa, next_sb = tl.load(a_scale + ahead * a_tiles), tl.load(b_scale + ahead * b_tiles)
        right = b.load([row_b, k * BK]).T
        upper += tl.dot(a.load([row_a, k * BK]), right) * scale
        lower += tl.dot(a.load([row_a + HALF, k * BK]), right) * scale
        scale = next_sa * next_sb
    return upper, lower


@triton.jit
def _store_halves(out, row, col, tile, BM: tl.constexpr, BN: tl.constexpr):
    """Left, then right: a whole fp32 tile would not fit beside the pipeline's buffers."""
    left, right = tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))
    out.store([row, col], left.to(out.dtype))
    out.store([row, col + BN // 2], right.to(out.dtype))


@triton.jit
def _tile_of(tile, m_tiles, n_tiles, GROUP: tl.constexpr):
    """Tiles in bands of GROUP rows: programs that run together share operands in L2."""
    band = tile // (GROUP * n_tiles)
    height = tl.minimum(m_tiles - band * GROUP, GROUP)
    inside = tile % (GROUP * n_tiles)
    return band * GROUP + inside % height, inside // height


@triton.jit
def _grouped_gemm_kernel(a, b, out, a_scale, b_scale, tile_expert, ends,  # a [M, K], b [E*N, K], out [M, N]: descriptors
                         M, N, K, E, A_PER: tl.constexpr, B_PER: tl.constexpr, PER_STEP: tl.constexpr,
                         PROMOTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                         GROUP: tl.constexpr, PROGRAMS: tl.constexpr):
    """Grid (PROGRAMS,), persistent over (used m tiles, n tiles). fprop: X W^T; dgrad: dY (W^T)^T."""
    m_tiles, n_tiles, steps = tl.load(ends + E - 1) // BM, tl.cdiv(N, BN), K // BK
    # flatten: the next tile's first loads start under this tile's last steps; with promotions it costs more than it gains
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, PROGRAMS, flatten=PROMOTE == 0):
        m, n = _tile_of(tile, m_tiles, n_tiles, GROUP)
        e = tl.load(tile_expert + m)
        w_scale = b_scale + e * (N // B_PER) * (steps if PER_STEP else 1)
        acc = _accumulate(a, b, m * BM, e * N + n * BN, 0, steps, a_scale, w_scale, m * BM, n * BN, M, N,
                          A_PER, B_PER, PER_STEP, PROMOTE, BM, BN, BK)
        out.store([m * BM, n * BN], acc.to(out.dtype))


@triton.jit
def _grouped_wgrad_kernel(a, b, out, a_scale, b_scale, ends,        # a [M, slots], b [N, slots], out [E*M, N]: descriptors
                          M, N, E, A_PER: tl.constexpr, B_PER: tl.constexpr, PER_STEP: tl.constexpr,
                          PROMOTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                          GROUP: tl.constexpr, PROGRAMS: tl.constexpr):
    """Grid (PROGRAMS,), persistent over (experts, m tiles, n tiles). The sum runs over an expert's slots."""
    m_tiles, n_tiles = M // BM, tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), E * m_tiles * n_tiles, PROGRAMS):
        e = tile // (m_tiles * n_tiles)
        m, n = _tile_of(tile % (m_tiles * n_tiles), m_tiles, n_tiles, GROUP)
        begin, end = tl.load(ends + e - 1, mask=e > 0, other=0) // BK, tl.load(ends + e) // BK
        row, col = m * BM, n * BN
        if PER_STEP and A_PER == BM and B_PER == BN:                # tile scales (_launch_gemm then loads a in halves)
            upper, lower = _accumulate_halves(a, b, row, col, begin, end, a_scale + m, b_scale + n, m_tiles, n_tiles, BM, BN, BK)
            _store_halves(out, e * M + row, col, upper, BM // 2, BN)
            _store_halves(out, e * M + row + BM // 2, col, lower, BM // 2, BN)
        else:
            first = 0 if PER_STEP else begin                        # whole-sum scales: any tile of the expert has them
            acc = _accumulate(a, b, row, col, begin, end, a_scale + first * (M // A_PER), b_scale + first * (N // B_PER),
                              row, col, M, N, A_PER, B_PER, PER_STEP, PROMOTE, BM, BN, BK)
            _store_halves(out, e * M + row, col, acc, BM, BN)


def _gemm_config(promote: int | None, per_step: bool, halves: bool) -> dict:
    """Tile shape, pipeline depth and programs on a multiprocessor, tuned on Hopper.

    The wide tile reads less, but its two accumulators fill the register file: it wins where promotions are rare. Two
    programs share a multiprocessor where each needs half of its registers: one multiplies while the other promotes.
    """
    if halves:
        return dict(BM=128, BN=128, num_warps=4, num_stages=3, programs=2)
    if promote is None or promote >= 512:
        return dict(BM=128, BN=256, num_warps=8, num_stages=3, programs=1)
    return dict(BM=128, BN=128, num_warps=8, num_stages=3 if per_step else 4, programs=1)


def check_interval(granularity: str, promote: int | None) -> None:
    """Raises ValueError unless the accumulator can be promoted every `promote` elements (None: never)."""
    check_choice("granularity", granularity, ("block", "row"))
    if promote is not None and (promote < BLOCK or promote % BLOCK):
        raise ValueError(f"promote={promote} is no interval: give a multiple of {BLOCK}, or never (None)")
    if granularity == "block" and promote != BLOCK:
        raise ValueError(f"promote={promote or 'never'} needs granularity=row: block scales change every {BLOCK} elements, "
                         f"and each step is promoted with its own; use promote={BLOCK} or granularity=row")


def _launch_gemm(kernel, a: QTensor, b: QTensor, out: Tensor, pointers, sizes, granularity, promote) -> Tensor:
    wgrad, per_step = kernel is _grouped_wgrad_kernel, granularity == "block"
    halves = wgrad and per_step and a.rows_per_scale == b.rows_per_scale == BLOCK       # what the direct transpose makes
    config = _gemm_config(promote, per_step, halves)
    BM, BN, programs = config["BM"], config["BN"], config.pop("programs") * _multiprocessors(out.device)
    box_m, tma = BM // 2 if halves else BM, TensorDescriptor.from_tensor
    kernel[programs,](
        tma(a.data.contiguous(), [box_m, BLOCK]), tma(b.data.contiguous().flatten(0, -2), [BN, BLOCK]),
        tma(out.flatten(0, -2), [box_m, BN // 2 if wgrad else BN]), a.scale.contiguous(), b.scale.contiguous(),
        *pointers, *sizes, A_PER=a.rows_per_scale, B_PER=b.rows_per_scale, PER_STEP=per_step,
        PROMOTE=(promote or 0) // BLOCK, BK=BLOCK, GROUP=4, PROGRAMS=programs, **config)
    return out


def grouped_gemm(a: QTensor, b: QTensor, tile_expert: Tensor, ends: Tensor, granularity: str = "block",
                 promote: int | None = BLOCK) -> Tensor:
    """out[rows of expert e] = a[rows of e] @ b[e]^T: fprop with W, dgrad with W^T.

    a [M, K] in 1x128 blocks or rows, b [E, N, K] in 128x128 blocks or rows -> [M, N] bf16; M, N, K multiples of 128.
    tile_expert [M/128] int32: the expert of each row tile, -1 past the last one (those rows stay undefined).
    ends [E] int32: where each expert's rows end.
    promote: elements of K between promotions to the fp32 accumulator, None for never; with "block" it is 128.
    Raises ValueError for another interval.
    """
    check_interval(granularity, promote)
    if not use_kernels(a.data):
        return grouped_gemm_ref(a, b, tile_expert)
    (M, K), (E, N, _) = a.shape, b.shape
    return _launch_gemm(_grouped_gemm_kernel, a, b, a.scale.new_empty(M, N, dtype=torch.bfloat16),
                        (tile_expert, ends), (M, N, K, E), granularity, promote)


def grouped_wgrad(a: QTensor, b: QTensor, ends: Tensor, granularity: str = "block", promote: int | None = BLOCK,
                  dtype: torch.dtype = torch.float32) -> Tensor:
    """dW[e] = a[:, slots of e] @ b[:, slots of e]^T, zeros for an expert without slots.

    a [M, slots], b [N, slots] column-wise: "block": scales per tile or per column, any in each 128 slots; "row": one
    per expert (or per column and expert), repeated in each of its tiles.  ends [E] int32: end of each expert's slots.
    promote: slots between promotions. Returns [E, M, N] of `dtype`.
    """
    check_interval(granularity, promote)
    if not use_kernels(a.data):
        return grouped_wgrad_ref(a, b, ends, dtype)
    M, N, E = a.shape[0], b.shape[0], len(ends)
    return _launch_gemm(_grouped_wgrad_kernel, a, b, a.scale.new_empty(E, M, N, dtype=dtype),
                        (ends,), (M, N, E), granularity, promote)


# ---------------------------------------------------------------------------------------------------------------------
# python kernels.py: numerics anywhere, timings on a GPU

def sqnr(x: Tensor, ref: Tensor) -> float:
    """Signal to quantization-noise ratio in dB: 10 log10(|ref|^2 / |x - ref|^2). 31.5 dB is 2.6% of error."""
    ref = ref.double()
    return 10 * math.log10(ref.square().sum() / (x.double() - ref).square().sum().clamp(min=1e-300))


def sample(kind: str, R: int, C: int, device, seed: int = 0) -> Tensor:
    """[R, C] fp32 that looks like what a layer quantizes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(R, C, generator=g)
    if kind == "heavy-tailed":                                                      # Student t, 3 degrees of freedom
        x = x / (torch.randn(3, R, C, generator=g).square().mean(0)).sqrt()
    if kind == "outlier channels":
        x[:, ::64] *= 64
    if kind == "gradient-like":                                                     # rows over 24 binades, some zero
        x = x * torch.exp2(torch.randint(-12, 13, (R, 1), generator=g).float())
        x[::7] = 0
    return x.to(device)


KINDS = ("Gaussian", "heavy-tailed", "outlier channels", "gradient-like")


def print_scales(device) -> None:
    print("\nSQNR in dB of one quantization, [1024, 2048]: what scales and their granularity cost")
    print(f"{'':18}" + "".join(f"{g + ' ' + s:>14}" for g in ("block", "row") for s in ("pow2", "fp32")))
    for kind in KINDS:
        x = sample(kind, 1024, 2048, device)
        print(f"{kind:18}" + "".join(f"{sqnr(dequantize(quantize(x, s, g)), x):14.2f}" for g in ("block", "row") for s in ("pow2", "fp32")))


def operand_error(x: Tensor, y: Tensor, promote: int | None) -> tuple[float, float]:
    """(relative error, signed bias) of x @ y^T of FP8 operands [m, K], summed by the tensor core, against fp64.

    The operands are exact in E4M3, so all of the error is the accumulator's.
    """
    a, b = (QTensor(t.to(FP8), torch.ones(t.shape[1] // BLOCK, 1, device=t.device)) for t in (x, y))
    ends = torch.tensor([x.shape[1]], dtype=torch.int32, device=x.device)
    got = grouped_wgrad(a, b, ends, "row", promote)[0].double()
    exact = a.data.double() @ b.data.double().T
    return ((got - exact).norm() / exact.norm()).item(), ((got - exact) * exact.sign()).sum().item() / exact.abs().sum().item()


def print_promotion(device) -> None:
    print("\nError of an FP8 dot product by the length of the sum and the promotion interval: relative error (signed bias), %")
    kinds = {"zero-mean": torch.randn, "relu-like": lambda *s, **k: torch.randn(*s, **k).relu(), "positive": torch.rand}
    lengths = (2048, 8192, 32768)
    print(f"{'promoted every':16}" + "".join(f"{kind + ' ' + str(K):>22}" for kind in kinds for K in lengths))
    for promote in (128, 256, 512, 1024, 2048, None):
        cells = []
        for make in kinds.values():
            for K in lengths:
                torch.manual_seed(0)
                error, bias = operand_error(make(256, K, device=device), make(256, K, device=device), promote)
                cells.append(f"{100 * error:11.3f} ({100 * bias:+7.3f})")
        print(f"{promote or 'never':<16}" + " ".join(f"{c:>21}" for c in cells))


SHAPES = {  # tokens, hidden, experts, top-k, expert width: the reference layer, the h100 preset's, the paper's four
    "layer": (16384, 2048, 8, 2, 2048), "preset": (16384, 2048, 16, 4, 2048), "paper 1": (4096, 1280, 64, 7, 1024),
    "paper 2": (4096, 2048, 64, 6, 1408), "paper 3": (4096, 5120, 160, 6, 1536), "paper 4": (4096, 7168, 256, 8, 2048),
}


class Bench:
    """Prints one line a kernel: us, GB/s or TFLOPS, share of the ceiling measured here, speed-up over a baseline."""

    def __init__(self, device):
        self.device = device
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)               # larger than L2
        self.copy = (2 << 30) / self.us(self.copy_of(2 << 30))[0] / 1e3
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        q, one = a.to(FP8), torch.ones((), device=device)
        bf16, fp8 = self.us(lambda: a @ a, lambda: torch._scaled_mm(q, q.t(), one, one, out_dtype=torch.bfloat16), ms=100)
        self.bf16, self.fp8 = 2 * 8192 ** 3 / bf16 / 1e6, 2 * 8192 ** 3 / fp8 / 1e6
        print(f"\nceilings: copy {self.copy:.0f} GB/s, dense bf16 {self.bf16:.0f} TFLOPS, dense FP8 {self.fp8:.0f} TFLOPS (8192^3)")

    def us(self, *functions, ms: int = 20) -> list[float]:
        """Median us of each function, all launches queued, for so many ms a function, L2 flushed before each launch.

        The functions take turns, so that all of them see the same clock: matrix products draw all the power there is.
        """
        estimate = triton.testing.do_bench(lambda: [fn() for fn in functions], warmup=5, rep=5, return_mode="median")
        rounds = max(10, int(ms * len(functions) / max(estimate, 1e-3)))
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2 * len(functions))] for _ in range(rounds)]
        for events in marks:
            for i, fn in enumerate(functions):
                self.flush.zero_()
                events[2 * i].record()
                fn()
                events[2 * i + 1].record()
        torch.cuda.synchronize()
        return [statistics.median(events[2 * i].elapsed_time(events[2 * i + 1]) for events in marks) * 1e3
                for i in range(len(functions))]

    def copy_of(self, nbytes: int):
        """PyTorch's copy that moves as many bytes: half of them in, half out. Short copies do not reach full bandwidth."""
        x = torch.empty(nbytes // 2, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        return lambda: y.copy_(x)

    def bytes(self, name: str, fn, nbytes: int, **baselines) -> None:
        us, copy, *others = self.us(fn, self.copy_of(nbytes), *baselines.values())
        print(f"  {name:34} {us:9.1f} us {nbytes / us / 1e3:7.0f} GB/s   {nbytes / us / 1e3 / self.copy:5.2f} of copy"
              f"   {copy / us:5.2f} of a copy this short"
              + "".join(f"   {other / us:5.2f}x {label.replace('_', ' ')}" for label, other in zip(baselines, others)), flush=True)

    def flops(self, name: str, fn, flops: int, ceiling: float, bf16=None) -> None:
        us, *base = self.us(*filter(None, (fn, bf16)), ms=60)
        print(f"  {name:34} {us:9.1f} us {flops / us / 1e6:7.0f} TFLOPS {flops / us / 1e6 / ceiling:5.2f} of dense"
              + (f"   {base[0] / us:5.2f}x bf16" if bf16 else ""), flush=True)


def balanced_routing(T: int, E: int, topk: int, device):
    """rows [M], slots [T', k], tile_expert, ends for experts of equal size (T' <= T: whole tokens only)."""
    per = T * topk // E
    padded = -(-per // BLOCK) * BLOCK
    pairs = torch.randperm(E * per, device=device).view(E, per)
    rows = F.pad(pairs // topk, (0, padded - per), value=-1).flatten()
    slots = torch.empty(E * per, dtype=torch.int64, device=device)
    slots[pairs.flatten()] = (torch.arange(E, device=device)[:, None] * padded + torch.arange(per, device=device)).flatten()
    tiles = torch.arange(E, device=device, dtype=torch.int32).repeat_interleave(padded // BLOCK)
    ends = torch.arange(1, E + 1, device=device, dtype=torch.int32) * padded
    return rows, slots[:per * E // topk * topk].view(-1, topk), tiles, ends


def bench_memory_bound(bench: Bench, T, D, E, topk, width, device) -> None:
    """Bytes are those that must move: every input once, every output once, scales left out."""
    rows, slots, tiles, ends = balanced_routing(T, E, topk, device)
    M, live = len(rows), int((rows >= 0).sum())
    x = torch.randn(T, D, device=device, dtype=torch.bfloat16)
    q = quantize(x)
    bench.bytes("quantize 1x128", lambda: quantize(x), 3 * T * D)
    bench.bytes("quantize row", lambda: quantize(x, granularity="row"), 3 * T * D)
    w = torch.randn(min(E, 8), 2 * width, D, device=device)
    bench.bytes("weights, W and W^T, 128x128", lambda: quantize_weight(w), 6 * w.numel())
    bench.bytes("weights, W and W^T, row (2 passes)", lambda: quantize_weight(w, granularity="row"), 10 * w.numel())
    del w
    compact = rows[rows >= 0]
    pad = torch.where(rows >= 0, (rows >= 0).cumsum(0) - 1, -1)
    bench.bytes("permute+pad FP8", lambda: gather_rows(q, rows), (live + M) * D,
                unfused=lambda: gather_rows(gather_rows(q, compact), pad))
    bench.bytes("permute+pad bf16", lambda: gather_rows(x, rows), 2 * (live + M) * D,
                unfused=lambda: gather_rows(gather_rows(x, compact), pad))
    xp, qp = gather_rows(x, rows), gather_rows(q, rows)
    unpad, rank = slots.flatten(), torch.arange(slots.numel(), device=device).view_as(slots)
    bench.bytes("unpermute+unpad bf16", lambda: sum_rows(xp, slots), 2 * (slots.numel() + len(slots)) * D,
                unfused=lambda: sum_rows(gather_rows(xp, unpad), rank))
    bench.bytes("scaling-aware transpose", lambda: scaling_aware_transpose(qp), 2 * M * D,
                requantizing=lambda: quantize(transpose(dequantize(qp, torch.bfloat16))))
    bench.bytes("  with the permute inside", lambda: scaling_aware_transpose(q, rows), (live + M) * D,
                permute_then_transpose=lambda: scaling_aware_transpose(gather_rows(q, rows)))
    del xp, qp, x, q
    h, prob = torch.randn(M, 2 * width, device=device, dtype=torch.bfloat16), torch.rand(M, device=device)
    da = torch.randn(M, width, device=device, dtype=torch.bfloat16)
    leaf = h.clone().requires_grad_()

    def eager(h):
        gate, up = h.chunk(2, -1)
        return (F.silu(gate) * up * prob[:, None]).bfloat16()
    graph = eager(leaf)
    bench.bytes("SwiGLU+quantize", lambda: swiglu_quantize(h, prob), 5 * M * width,
                unfused=lambda: quantize(swiglu(h, prob)), eager=lambda: quantize(eager(h)))
    bench.bytes("SwiGLU+quantize row", lambda: swiglu_quantize(h, prob, granularity="row"), 5 * M * width,
                unfused=lambda: quantize(swiglu(h, prob), granularity="row"))
    def backward(granularity, again):
        return lambda: swiglu_backward_quantize(da, h, prob, granularity=granularity, again=again)
    def pair(granularity):
        return lambda: quantize(swiglu_backward(da, h, prob)[0], granularity=granularity)
    bench.bytes("SwiGLU backward+quantize", backward("block", False), 8 * M * width, unfused=pair("block"),
                eager=lambda: quantize(torch.autograd.grad(graph, leaf, da, retain_graph=True)[0]))
    bench.bytes("  and A again", backward("block", True), 9 * M * width)
    bench.bytes("SwiGLU backward+quantize row", backward("row", False), 8 * M * width, unfused=pair("row"))


def bench_gemm(bench: Bench, T, D, E, topk, width, device, intervals) -> None:
    """fprop and dgrad read W and W^T; wgrad reads both operands transposed. bf16: torch's grouped GEMM."""
    rows, _, tiles, ends = balanced_routing(T, E, topk, device)
    M, live = len(rows), int((rows >= 0).sum())
    for fc, N, K in (("fc1", 2 * width, D), ("fc2", D, width)):
        flops = 2 * live * N * K
        x, dy = (torch.randn(M, C, device=device, dtype=torch.bfloat16) for C in (K, N))
        w = torch.randn(E, N, K, device=device, dtype=torch.bfloat16) * K ** -0.5
        base = {"fprop": lambda: F.grouped_mm(x, w.mT, offs=ends), "dgrad": lambda: F.grouped_mm(dy, w, offs=ends),
                "wgrad": lambda: F.grouped_mm(dy.t(), x, offs=ends)}
        for name, fn in base.items():
            bench.flops(f"{fc} {name} bf16", fn, flops, bench.bf16)
        for granularity, promotes in (("block", (128,)), ("row", intervals)):
            wq, wqt = quantize_weight(w, granularity=granularity)
            xq, dyq = quantize(x, granularity=granularity), quantize(dy, granularity=granularity)
            xt, dyt = (scaling_aware_transpose(q, target=None if granularity == "block" else expert_scale(q.scale, None, ends))
                       for q in (xq, dyq))
            for promote in promotes:
                label = f"FP8 {granularity} {promote or 'never'}"
                for name, fn in (("fprop", lambda: grouped_gemm(xq, wq, tiles, ends, granularity, promote)),
                                 ("dgrad", lambda: grouped_gemm(dyq, wqt, tiles, ends, granularity, promote)),
                                 ("wgrad", lambda: grouped_wgrad(dyt, xt, ends, granularity, promote, torch.bfloat16))):
                    bench.flops(f"{fc} {name} {label}", fn, flops, bench.fp8, base[name])
            if granularity == "block":
                xt, dyt = quantize(transpose(x)), quantize(transpose(dy))
                bench.flops(f"{fc} wgrad FP8 block 128, requantized", lambda: grouped_wgrad(
                    dyt, xt, ends, dtype=torch.bfloat16), flops, bench.fp8, base["wgrad"])
            del wq, wqt


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"torch {torch.__version__}, triton {triton.__version__}, {name}")
    print_scales(device)
    if device.type == "cpu" or not use_kernels(torch.empty(0, device=device)):
        print("\nno Hopper GPU here: the promotion errors and the timings need one")
        return
    print_promotion(device)
    bench = Bench(device)
    print("\nscaling-aware transpose, 32768 x 7168")
    q = quantize(torch.randn(32768, 7168, device=device, dtype=torch.bfloat16))
    bench.bytes("scaling-aware transpose", lambda: scaling_aware_transpose(q), 2 * q.data.numel(),
                requantizing=lambda: quantize(transpose(dequantize(q, torch.bfloat16))))
    del q
    for label, (T, D, E, topk, width) in SHAPES.items():
        print(f"\n{label}: T {T}, D {D}, E {E}, k {topk}, F {width}")
        bench_memory_bound(bench, T, D, E, topk, width, device)
        bench_gemm(bench, T, D, E, topk, width, device, (128, 256, 512, 1024, 2048, None) if label == "layer" else (512, None))


if __name__ == "__main__":
    main()
