"""Every kernel of an FP8 MoE layer, each below the PyTorch twin that specifies it.

An FP8 tensor is a pair: `x ~ code * scale`. A code is one E4M3 byte (1 sign, 4 exponent, 3 mantissa bits: largest
448, smallest normal 2^-6, smallest subnormal 2^-9, one NaN per sign, no infinity); a scale is one fp32 number shared
by a group of codes. The tensor core multiplies codes, the kernel multiplies scales. Groups lie along the axis that
the GEMM reduces, because a scale can only be pulled out of a sum that it is constant over:

    activation, row-wise      1 x 128 blocks                 fprop and dgrad
    weight                    128 x 128 blocks               the same block serves W and W^T
    activation, column-wise   transposed, one scale a tile   wgrad reduces over tokens

With power-of-two scales, changing a scale by 2^k only moves the exponents of its codes. That is what makes the
scaling-aware transpose possible: row-wise FP8 becomes column-wise FP8 without a trip through BF16.

Each operation is three things: `op_ref` (the twin: the specification, any device), `_op_kernel` (Triton), and `op`,
which checks its arguments and runs the kernel on a GPU (and under TRITON_INTERPRET=1) or the twin. Every `op` raises
ValueError for a dtype, shape, device or scale layout that the kernel was not written for. What index tensors hold is
checked only where the twin runs: on a GPU, reading it would make the host wait.

Reading order: QTensor, quantize, scaling_aware_transpose, swiglu_quantize, gather_rows, and the grouped GEMM in three
levels: grouped_gemm_ref, _grouped_gemm_kernel (the loop), _hopper_gemm_kernel (the loop without waiting).
`python kernels.py [NAME ...]` times the kernels against the ceilings of the machine.

Shapes: R rows, C columns of any matrix; T tokens, M padded token slots, F expert width, E experts; a GEMM is
[M, K] times [N, K]^T.
"""
import argparse
import contextlib
import functools
import inspect
import itertools
import math
import os
import statistics
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn.functional import grouped_mm, pad, silu
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

BLOCK = 128                     # codes per scale, rows per expert tile, K-step of the GEMMs
FP8 = torch.float8_e4m3fn
E4M3_MAX = 448.0                # 1.75 * 2^8
SCALE_MIN = 2.0 ** -126         # the smallest normal fp32: what an all-zero block gets, so that it never wins a maximum
SCALES = ("pow2", "fp32")       # how a scale is chosen: the smallest power of two >= amax/448, or amax/448 itself
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# An fp32 number is sign, 8 bits of exponent + 127, 23 bits of mantissa.
INF_BITS = 0x7F800000           # as an integer, every finite magnitude lies below it
MANTISSA_BITS = 0x007FFFFF
MANTISSA_OF_448 = 0x00600000    # 0.75 of 2^23
# The same inside kernels, which see only constexprs:
_SCALE_MIN, _E4M3_MAX, _INF_BITS = tl.constexpr(SCALE_MIN), tl.constexpr(E4M3_MAX), tl.constexpr(INF_BITS)
_MANTISSA_BITS, _MANTISSA_OF_448 = tl.constexpr(MANTISSA_BITS), tl.constexpr(MANTISSA_OF_448)


class QTensor(NamedTuple):
    """An FP8 tensor.

    data   [..., R, C] float8_e4m3fn codes.
    scale  [..., C/128, R/r] float32: one for every r x 128 codes, reduction axis first: a GEMM step reads a row.
           r = 1: 1x128 blocks, [C/128, R].  r = 128: tiles, [C/128, R/128].
    scales "pow2" or "fp32": how the scales were chosen; only "pow2" can be shifted.
    """
    data: Tensor
    scale: Tensor
    scales: str

    @property
    def rows_per_scale(self) -> int:
        return self.data.shape[-2] // self.scale.shape[-1]


# ---- where a kernel runs --------------------------------------------------------------------------------------------

@functools.lru_cache                                                # says so once
def _capability(device_index: int) -> tuple[int, int]:
    capability = torch.cuda.get_device_capability(device_index)
    if capability < (8, 9):
        warnings.warn(f"compute capability {capability[0]}.{capability[1]} has no FP8 tensor cores (8.9 has): "
                      "the PyTorch twins run, slowly")
    return capability


def use_kernels(x: Tensor) -> bool:
    """True where Triton kernels run: CUDA from compute capability 8.9 on, or any tensor in the interpreter."""
    return INTERPRET or (x.is_cuda and torch.version.hip is None and _capability(x.device.index) >= (8, 9))


def use_hopper_gemm(x: Tensor) -> bool:
    """True where the GEMMs are warp-specialised: the instructions are those of compute capability 9 alone."""
    return not INTERPRET and x.is_cuda and use_kernels(x) and _capability(x.device.index)[0] == 9


def _bytes(x: Tensor) -> Tensor:
    """FP8 goes through kernels as uint8: no load or store depends on how a compiler treats the fp8 type."""
    return x.view(torch.uint8)


# ---- checks: one sentence with the argument, its value and the remedy, before any launch and without a sync ---------

ANY, BLOCKS = "any", "a multiple of 128"                            # what an axis may be, besides a given length
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}")


def check(name: str, x: Tensor, dtypes: tuple, *shape, like: Tensor | None = None) -> None:
    """Raises ValueError unless x has one of `dtypes`, the shape and the device of `like`.

    shape: for each axis a length, ANY or BLOCKS; a leading ... stands for any number of axes.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is of type {type(x).__name__}: give a tensor")
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        raise ValueError(f"{name} is on {x.device}, not the current device: call torch.cuda.set_device first")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {x.dtype}: convert it to {' or '.join(map(str, dtypes))}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}: move it to {like.device}, where the other arguments are")
    if shape[0] is ...:
        shape = (ANY,) * (x.ndim - len(shape) + 1) + shape[1:]
    if x.ndim != len(shape):
        raise ValueError(f"{name} has shape {list(x.shape)}: reshape it to {len(shape)} axes")
    for axis, (length, want) in enumerate(zip(x.shape, shape)):
        if length == 0:
            raise ValueError(f"{name} has shape {list(x.shape)}: axis {axis} is empty, give it at least one element")
        if want is BLOCKS and length % BLOCK:
            raise ValueError(f"{name} has shape {list(x.shape)}: axis {axis} must be a multiple of {BLOCK}, "
                             f"pad it to {triton.cdiv(length, BLOCK) * BLOCK}")
        if isinstance(want, int) and length != want:
            raise ValueError(f"{name} has shape {list(x.shape)}: make axis {axis} {want} long, to fit the others")


def check_q(name: str, q: QTensor, *shape, rows_per_scale=(1,), like: Tensor | None = None) -> None:
    """The same for an FP8 tensor, whose scales must cover r x 128 codes each, r one of `rows_per_scale`."""
    if not isinstance(q, QTensor):
        raise ValueError(f"{name} is of type {type(q).__name__}: give a QTensor, as quantize returns it")
    check(f"{name}.data", q.data, (FP8,), *shape, like=like)
    check_choice(f"{name}.scales", q.scales, SCALES)
    *experts, R, C = q.data.shape
    check(f"{name}.scale", q.scale, (torch.float32,), ..., ANY, ANY, like=q.data)
    layouts = [[*experts, C // BLOCK, R // r] for r in rows_per_scale if R % r == 0]
    if list(q.scale.shape) not in layouts:
        raise ValueError(f"{name}.scale has shape {list(q.scale.shape)}: {name} of shape {list(q.data.shape)} needs "
                         f"{' or '.join(map(str, layouts))}, quantize again")


def _check_tiles(tiles: Tensor | None, M: int, like: Tensor) -> None:
    if tiles is not None:
        check("tiles", tiles, (torch.int32,), triton.cdiv(M, BLOCK), like=like)


def check_values(name: str, index: Tensor, low: int, high: int) -> None:
    """For the twins: index must hold values in [low, high)."""
    if index.min() < low or index.max() >= high:
        raise ValueError(f"{name} holds values from {index.min()} to {index.max()}: they must lie in [{low}, {high})")


def _check_ends(ends: Tensor, slots: int) -> None:
    """For the twins: where each expert's slots end."""
    if ends.min() < 0 or ends.max() > slots or (ends % BLOCK).any() or (ends.diff() < 0).any():
        raise ValueError(f"ends holds {ends.tolist()}: give multiples of {BLOCK} up to {slots} that do not decrease")


# ---- the trace: every launch of a wrapper, recorded as it happens ---------------------------------------------------

@dataclass
class Launch:
    """What one launch did. `tensor` is given afterwards by `named`: a wrapper does not know for whom it works.

    cast: "Q" quantizes an activation, "DQ" dequantizes it, "Q'" is a Q right after a DQ, if casts alone are counted;
    "" changes no precision, or on the way of other work.
    """
    op: str                                                         # the wrapper's name
    direction: str                                                  # forward or backward
    reads: list[tuple[tuple[int, ...], torch.dtype]]                # shape and dtype of each input
    writes: list[tuple[tuple[int, ...], torch.dtype]]
    cast: str
    tensor: str = ""


class Trace(list):
    """The launches in the order in which they ran."""
    tiles: Tensor | None = None                                     # the expert of each tile, as the launches saw it

    def bytes(self, launch: Launch) -> int:
        """What must move: each input and output once, slots in unused tiles left out (of every axis that is as long as
        there are slots). Waits for the GPU."""
        tiles = [] if self.tiles is None else self.tiles.tolist()
        slots, used = BLOCK * len(tiles), BLOCK * sum(tile >= 0 for tile in tiles)
        return sum(math.prod(used if n == slots else n for n in shape) * dtype.itemsize
                   for shape, dtype in launch.reads + launch.writes)


_traces: list[Trace] = []
_directions: list[str] = ["forward"]


@contextlib.contextmanager
def trace():
    """`with trace() as launches:` collects every launch, of this and of other threads (autograd's backward)."""
    launches = Trace()
    _traces.append(launches)
    try:
        yield launches
    finally:
        _traces[:] = [other for other in _traces if other is not launches]


@contextlib.contextmanager
def direction(name: str):
    """What is launched meanwhile belongs to the forward or the backward pass. Also a decorator."""
    _directions.append(name)
    try:
        yield
    finally:
        _directions.pop()


def named(tensor: str, result):
    """Says for which tensor the launches since the last name worked; returns `result`."""
    for launch in itertools.chain(*_traces):
        launch.tensor = launch.tensor or tensor
    return result


def leaves(values) -> list[Tensor]:
    return [leaf for v in values for leaf in (leaves(v) if isinstance(v, tuple) else [v]) if isinstance(leaf, Tensor)]


def recorded(cast: str = ""):
    """Decorates a wrapper of one launch: while somebody traces, each call leaves a record. cast: "Q", "DQ" or ""."""
    def decorate(wrapper):
        @functools.wraps(wrapper)
        def call(*args, **kwargs):
            result = wrapper(*args, **kwargs)
            if _traces:
                reads, writes = ([(tuple(t.shape), t.dtype) for t in leaves(values)]
                                 for values in ((*args, *kwargs.values()), (result,)))
                given = inspect.signature(wrapper).bind(*args, **kwargs).arguments
                tiles = given.get("tiles", given.get("tile_expert"))
                for launches in _traces:
                    again = cast == "Q" and [x.cast for x in launches if x.cast][-1:] == ["DQ"]
                    launches.append(Launch(wrapper.__name__, _directions[-1], reads, writes, "Q'" if again else cast))
                    launches.tiles = launches.tiles if tiles is None else tiles
            return result
        return call
    return decorate


# ---- scales ---------------------------------------------------------------------------------------------------------

def scale_of(amax: Tensor, scales: str) -> tuple[Tensor, Tensor]:
    """The scale of a block whose largest magnitude is `amax` (fp32, any shape), and the factor that encodes with it.

    fp32: amax/448.   pow2: the smallest power of two >= amax/448, by integer arithmetic on the bits: amax = m * 2^e
    with 1 <= m < 2 gets 2^(e-8), or 2^(e-7) where m > 1.75. Thus 3.0 = 1.5 * 2^1 gets 2^-7, and its code is 384.
    A non-finite block gets SCALE_MIN and a NaN factor: all its codes become NaN, and no neighbour is touched.
    """
    finite = amax.isfinite()
    if scales == "pow2":
        bits = amax.view(torch.int32)
        exponent = (bits >> 23) - 8 + ((bits & MANTISSA_BITS) > MANTISSA_OF_448).int()      # e - 8 or e - 7, plus 127
        exponent = torch.where(finite, exponent, 1).clamp(min=1)                            # 1 is 2^-126
        scale = (exponent << 23).view(torch.float32)
        factor = ((2 * 127 - exponent) << 23).view(torch.float32)                           # 1/scale: exponent negated
    else:
        scale = amax / torch.full_like(amax, E4M3_MAX)      # by a number, CUDA multiplies by its inverse: off by an ulp
        scale = torch.where(finite, scale, SCALE_MIN).clamp(min=SCALE_MIN)
        factor = 1 / scale
    return scale, torch.where(finite, factor, torch.nan)


@triton.jit
def _scale_of(amax_bits, POW2: tl.constexpr):
    """scale_of on the bits of amax >= 0 (int32): ordered like the floats, with Inf and NaN above every number."""
    finite = amax_bits < _INF_BITS
    if POW2:
        exponent = (amax_bits >> 23) - 8 + ((amax_bits & _MANTISSA_BITS) > _MANTISSA_OF_448).to(tl.int32)
        exponent = tl.maximum(tl.where(finite, exponent, 1), 1)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        factor = ((2 * 127 - exponent) << 23).to(tl.float32, bitcast=True)
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
def _quantize_blocks(x, POW2: tl.constexpr, TILE: tl.constexpr):
    """x [R, C] fp32 -> codes [R, C], scale [R, C/TILE]."""
    blocks = tl.reshape(x, (x.shape[0], x.shape[1] // TILE, TILE))
    scale, factor = _scale_of(_amax_bits(blocks, 2), POW2)
    return tl.reshape(_encode(blocks * factor[:, :, None]), x.shape), scale


# ---- quantize, dequantize -------------------------------------------------------------------------------------------

def _to_fp8(x: Tensor) -> Tensor:
    """fp32 -> E4M3, nearest even; a NaN of either sign becomes the code 0x7F, as the hardware's cast makes it."""
    return torch.where(x.isnan(), torch.nan, x).to(FP8)


def quantize_ref(x: Tensor, scales: str = "pow2") -> QTensor:
    blocks = rearrange(x.float(), "r (c b) -> c r b", b=BLOCK)
    scale, factor = scale_of(reduce(blocks.abs(), "c r b -> c r", "max"), scales)
    codes = _to_fp8(blocks * factor[..., None])
    return QTensor(rearrange(codes, "c r b -> r (c b)").contiguous(), scale, scales)


@triton.jit
def _quantize_kernel(x, data, scale,                        # x [R, C] bf16 or fp32, data [R, C] uint8, scale [C/128, R]
                     R, C, POW2: tl.constexpr, R_TILE: tl.constexpr, TILE: tl.constexpr):
    """Grid (R/R_TILE, C/128). Reads 2RC, writes RC bytes: three quarters of a BF16 copy."""
    r = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = (r < R)[:, None]
    at = r[:, None] * C + c[None, :]
    tile = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    s, factor = _scale_of(_amax_bits(tile, 1), POW2)
    tl.store(data + at, _encode(tile * factor[:, None]), mask=live)
    tl.store(scale + tl.program_id(1).to(tl.int64) * R + r, s, mask=r < R)


@recorded(cast="Q")
def quantize(x: Tensor, scales: str = "pow2") -> QTensor:
    """Row-wise quantization in 1x128 blocks; the paper rounds scales up to powers of two.

    x [R, C] bf16, fp16 or fp32, C a multiple of 128; scales "pow2" | "fp32" -> QTensor [R, C], scale [C/128, R].
    A block that holds NaN or Inf dequantizes to NaN.
    """
    check_choice("scales", scales, SCALES)
    check("x", x, FLOATS, ANY, BLOCKS)
    if not use_kernels(x):
        return quantize_ref(x, scales)
    x, (R, C), r_tile = x.contiguous(), x.shape, 64
    q = _empty_q(x, R, C, scales)
    _quantize_kernel[triton.cdiv(R, r_tile), C // BLOCK](
        x, _bytes(q.data), q.scale, R, C, POW2=scales == "pow2", R_TILE=r_tile, TILE=BLOCK, num_warps=8)
    return q


def _empty_q(like: Tensor, R: int, C: int, scales: str) -> QTensor:
    return QTensor(like.new_empty(R, C, dtype=FP8), like.new_empty(C // BLOCK, R, dtype=torch.float32), scales)


def dequantize_ref(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    scale = repeat(q.scale, "... c r -> ... (r i) (c b)", i=q.rows_per_scale, b=BLOCK)
    return (q.data.float() * scale).to(dtype)


@triton.jit
def _dequantize_kernel(data, scale, out,                    # data [R, C] uint8, scale [C/128, R/R_PER], out [R, C]
                       R, C, R_PER: tl.constexpr, R_TILE: tl.constexpr, TILE: tl.constexpr):
    """Grid (R/R_TILE, C/128). Reads RC, writes 2RC (bf16) bytes."""
    r = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = (r < R)[:, None]
    at = r[:, None] * C + c[None, :]
    s = tl.load(scale + tl.program_id(1).to(tl.int64) * (R // R_PER) + r // R_PER, mask=r < R, other=0.0)
    codes = tl.load(data + at, mask=live, other=0).to(tl.float8e4nv, bitcast=True)
    tl.store(out + at, (codes.to(tl.float32) * s[:, None]).to(out.dtype.element_ty), mask=live)


@recorded(cast="DQ")
def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale: QTensor [R, C] in 1x128 blocks or tiles -> [R, C] of `dtype`. Weights [E, R, C] go to the twin."""
    check_choice("dtype", dtype, FLOATS)
    check_q("q", q, ..., ANY, BLOCKS, rows_per_scale=(1, BLOCK))
    if not use_kernels(q.data) or q.data.ndim != 2:
        return dequantize_ref(q, dtype)
    (R, C), r_tile, out = q.data.shape, 64, q.data.new_empty(q.data.shape, dtype=dtype)
    _dequantize_kernel[triton.cdiv(R, r_tile), C // BLOCK](
        _bytes(q.data.contiguous()), q.scale.contiguous(), out, R, C,
        R_PER=q.rows_per_scale, R_TILE=r_tile, TILE=BLOCK, num_warps=8)
    return out


# ---- weights: 128x128 blocks survive a transpose, so one pass over the fp32 master writes W and W^T -----------------

def quantize_weight_ref(w: Tensor, scales: str = "pow2") -> tuple[QTensor, QTensor]:
    blocks = rearrange(w.float(), "e (n i) (k j) -> e k n i j", i=BLOCK, j=BLOCK)
    scale, factor = scale_of(reduce(blocks.abs(), "e k n i j -> e k n", "max"), scales)
    codes = rearrange(_to_fp8(blocks * factor[..., None, None]), "e k n i j -> e (n i) (k j)")
    return QTensor(codes.contiguous(), scale, scales), QTensor(codes.mT.contiguous(), scale.mT.contiguous(), scales)


@triton.jit
def _quantize_weight_kernel(w,                              # [E, N, K] fp32
                            data, scale,                    # [E, N, K] uint8, [E, K/128, N/128]
                            data_t, scale_t,                # [E, K, N] uint8, [E, N/128, K/128]
                            N, K, POW2: tl.constexpr, TILE: tl.constexpr):
    """Grid (N/128, K/128, E). Reads 4NK, writes 2NK bytes an expert."""
    i, j, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, k = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    at = e * N * K + n[:, None].to(tl.int64) * K + k[None, :]
    at_t = e * N * K + k[:, None].to(tl.int64) * N + n[None, :]
    tile = tl.load(w + at).to(tl.float32)
    s, factor = _scale_of(tl.max(_amax_bits(tile, 1), 0), POW2)
    tl.store(data + at, _encode(tile * factor))
    # The same codes by another route (halving and doubling are exact). Where both stores share one conversion,
    # ptxas 12.9 corrupts the transposed one (github.com/triton-lang/triton/issues/11111).
    tl.store(data_t + at_t, tl.trans(_encode(tile * (factor * 0.5) * 2.0)))
    blocks = e * (N // TILE) * (K // TILE)
    tl.store(scale + blocks + j * (N // TILE) + i, s)
    tl.store(scale_t + blocks + i * (K // TILE) + j, s)


@recorded()
def quantize_weight(w: Tensor, scales: str = "pow2") -> tuple[QTensor, QTensor]:
    """Weights for fprop and dgrad, both K-major for the MMA: w [E, N, K] fp32 -> W [E, N, K] and W^T [E, K, N].

    N and K are multiples of 128; scales in 128x128 blocks, [E, K/128, N/128] and [E, N/128, K/128].
    """
    check_choice("scales", scales, SCALES)
    check("w", w, FLOATS, ANY, BLOCKS, BLOCKS)
    if not use_kernels(w):
        return quantize_weight_ref(w, scales)
    w, (E, N, K) = w.contiguous(), w.shape
    q, q_t = (QTensor(w.new_empty(E, rows, cols, dtype=FP8),
                      w.new_empty(E, cols // BLOCK, rows // BLOCK, dtype=torch.float32), scales)
              for rows, cols in ((N, K), (K, N)))
    _quantize_weight_kernel[N // BLOCK, K // BLOCK, E](
        w, _bytes(q.data), q.scale, _bytes(q_t.data), q_t.scale, N, K, POW2=scales == "pow2", TILE=BLOCK, num_warps=8)
    return q, q_t


# ---- row-wise FP8 -> column-wise FP8 --------------------------------------------------------------------------------

def scaling_aware_transpose_ref(q: QTensor, rows: Tensor | None = None) -> QTensor:
    """For each tile: S is the largest of its 128 scales, a code of row r times s_r / S, rounded, transposed."""
    q = q if rows is None else gather_rows_ref(q, rows)
    M, C = q.data.shape
    data, scale = q.data.new_empty(C, M), q.scale.new_empty(M // BLOCK, C // BLOCK)
    for i, j in itertools.product(range(M // BLOCK), range(C // BLOCK)):
        r, c = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
        s = q.scale[j, r]
        scale[i, j] = s.max()
        data[c, r] = _to_fp8(q.data[r, c].float() * (s / s.max())[:, None]).t()
    return QTensor(data, scale, q.scales)


@triton.jit
def _scaling_aware_transpose_kernel(data, scale,            # [T, C] uint8, [C/128, T]
                                    rows, tile_expert,      # [M] int64 or None, [M/128] int32 or None
                                    out, out_scale,         # [C, M] uint8, [M/128, C/128]
                                    T, C, M, TILE: tl.constexpr):
    """Grid (M/128, C/128): one tile a program, neighbours write neighbouring columns. Reads MC, writes MC bytes."""
    i, j = tl.program_id(0), tl.program_id(1)
    if tile_expert is not None:
        if tl.load(tile_expert + i) < 0:
            return
    slot, c = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    r = slot.to(tl.int64)
    if rows is not None:                                    # gather on the way in: the permute costs nothing here
        r = tl.load(rows + slot)
    s = tl.load(scale + j.to(tl.int64) * T + r, mask=r >= 0, other=_SCALE_MIN)
    codes = tl.load(data + r[:, None] * C + c[None, :], mask=(r >= 0)[:, None], other=0)
    top = tl.max(s, 0)
    k = (top.to(tl.int32, bitcast=True) - s.to(tl.int32, bitcast=True)) >> 23                   # log2(top / s) >= 0
    # 2^-k in fp16, which holds every code and whatever of it E4M3 can still see: k = 18 is the last that leaves a code
    shift = (tl.maximum(127 - k, 0) << 23).to(tl.float32, bitcast=True).to(tl.float16)
    codes = _encode(codes.to(tl.float8e4nv, bitcast=True).to(tl.float16) * shift[:, None])
    tl.store(out + c[:, None].to(tl.int64) * M + slot[None, :], tl.trans(codes))
    tl.store(out_scale + i * (C // TILE) + j, top)


@recorded()
def scaling_aware_transpose(q: QTensor, rows: Tensor | None = None, tiles: Tensor | None = None) -> QTensor:
    """Row-wise FP8 [M, C] -> column-wise FP8 [C, M] without leaving FP8: the paper's central kernel (section 3.1).

    In each 128x128 tile the largest row scale S becomes the tile's scale, and the codes of a row with scale s move down
    by k = log2(S/s) binades: exact while they stay normal, nearest-even below 2^-6, NaN and -0 kept.
    rows [M] int64: transpose q[rows] instead, -1 for a zero row (q is then [T, C]).
    tiles [M/128] int32: skip tiles marked -1; what they hold stays undefined.
    M and C are multiples of 128 -> scale [M/128, C/128]. Refuses fp32 scales: their ratios are no powers of two.
    """
    check_q("q", q, BLOCKS if rows is None else ANY, BLOCKS)
    if q.scales != "pow2":
        raise ValueError(f"q.scales={q.scales!r} cannot be shifted: the direct transpose moves exponents, "
                         "quantize with scales='pow2'")
    if rows is not None:
        check("rows", rows, (torch.int64,), BLOCKS, like=q.data)
    (T, C), M = q.data.shape, len(q.data) if rows is None else len(rows)
    _check_tiles(tiles, M, q.data)
    if not use_kernels(q.data):
        if rows is not None:
            check_values("rows", rows, -1, T)
        return scaling_aware_transpose_ref(q, rows)
    out = QTensor(q.data.new_empty(C, M), q.scale.new_empty(M // BLOCK, C // BLOCK), q.scales)
    _scaling_aware_transpose_kernel[M // BLOCK, C // BLOCK](
        _bytes(q.data.contiguous()), q.scale.contiguous(), _contiguous(rows), _contiguous(tiles), _bytes(out.data),
        out.scale, T, C, M, TILE=BLOCK, num_warps=4)
    return out


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@triton.jit
def _transpose_kernel(x, out, R, C, TILE: tl.constexpr):    # x [R, C] bf16, out [C, R]
    """Grid (C/128, R/128). Reads 2RC, writes 2RC bytes."""
    r = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    c = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tile = tl.load(x + r[:, None] * C + c[None, :])
    tl.store(out + c[:, None] * R + r[None, :], tl.trans(tile))


@recorded()
def transpose(x: Tensor) -> Tensor:
    """[R, C] -> [C, R] contiguous, R and C multiples of 128: the middle step of the requantizing transpose.

    A kernel of its own, because PyTorch's copy runs at a fraction of the bandwidth. Fused with its neighbours it would
    move a fifth of the bytes; the naive recipe is the one that fuses nothing.
    """
    check("x", x, FLOATS, BLOCKS, BLOCKS)
    if not use_kernels(x):
        return x.t().contiguous()
    x, (R, C), out = x.contiguous(), x.shape, x.new_empty(x.shape[::-1])
    _transpose_kernel[C // BLOCK, R // BLOCK](x, out, R, C, TILE=BLOCK, num_warps=8)
    return out


# ---- SwiGLU: a = silu(gate) * up * prob, with h = [gate | up] and prob the router's weight of each slot -------------

def swiglu_ref(h: Tensor, prob: Tensor) -> Tensor:
    gate, up = h.float().chunk(2, dim=-1)
    return (silu(gate) * up * prob[:, None]).to(h.dtype)


def swiglu_quantize_ref(h: Tensor, prob: Tensor, scales: str = "pow2") -> QTensor:
    return quantize_ref(swiglu_ref(h.float(), prob), scales)


def swiglu_backward_ref(da: Tensor, h: Tensor, prob: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = h.float().chunk(2, dim=-1)
    da, prob, sigmoid = da.float(), prob[:, None], torch.sigmoid(gate)
    dgate = da * prob * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = da * prob * gate * sigmoid
    return torch.cat([dgate, dup], dim=-1).to(h.dtype), (da * gate * sigmoid * up).sum(-1)


def swiglu_backward_quantize_ref(da: Tensor, h: Tensor, prob: Tensor, scales: str = "pow2"):
    dh, dprob = swiglu_backward_ref(da, h.float(), prob)
    return quantize_ref(dh, scales), dprob, swiglu_quantize_ref(h, prob, scales)


@triton.jit
def _swiglu_kernel(h, prob, tile_expert,                    # h [M, 2F] bf16, prob [M] fp32, tile_expert [M/128] or None
                   a, scale,                                # [M, F] uint8 and [F/128, M] fp32, or bf16 and None
                   M, F, POW2: tl.constexpr, R_TILE: tl.constexpr, C_TILE: tl.constexpr, TILE: tl.constexpr):
    """Grid (M/R_TILE, F/C_TILE). Reads 4MF, writes MF bytes (2MF unquantized)."""
    if tile_expert is not None:
        if tl.load(tile_expert + tl.program_id(0) * R_TILE // TILE) < 0:
            return
    r = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)
    c = tl.program_id(1) * C_TILE + tl.arange(0, C_TILE)
    live = (r < M)[:, None]
    at = r[:, None] * F * 2 + c[None, :]
    gate = tl.load(h + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(h + F + at, mask=live, other=0.0).to(tl.float32)
    p = tl.load(prob + r, mask=r < M, other=0.0)
    y = gate * tl.sigmoid(gate) * up * p[:, None]
    if scale is not None:
        y, s = _quantize_blocks(y, POW2, TILE)
        block = tl.program_id(1) * (C_TILE // TILE) + tl.arange(0, C_TILE // TILE)
        tl.store(scale + block[None, :].to(tl.int64) * M + r[:, None], s, mask=live)
    tl.store(a + r[:, None] * F + c[None, :], y.to(a.dtype.element_ty), mask=live)


@triton.jit
def _swiglu_backward_kernel(da, h, prob, tile_expert,       # [M, F] bf16, [M, 2F] bf16, [M] fp32, [M/128] or None
                            dh, dh_scale, dprob,            # [M, 2F] uint8 and [2F/128, M], or bf16 and None; [M]
                            a, a_scale,                     # [M, F] uint8 and [F/128, M], or None and None
                            M, F, POW2: tl.constexpr, R_TILE: tl.constexpr, C_TILE: tl.constexpr, TILE: tl.constexpr):
    """Grid (M/R_TILE,): a program owns whole rows, so that dprob is a plain sum. Reads 6MF, writes 3MF bytes (4MF
    unquantized)."""
    if tile_expert is not None:
        if tl.load(tile_expert + tl.program_id(0) * R_TILE // TILE) < 0:
            return
    r = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)[:, None]
    c = tl.arange(0, C_TILE)[None, :]                       # C_TILE is the power of two that holds F
    live = (r < M) & (c < F)
    gate = tl.load(h + r * F * 2 + c, mask=live, other=0.0).to(tl.float32)
    up = tl.load(h + r * F * 2 + F + c, mask=live, other=0.0).to(tl.float32)
    d = tl.load(da + r * F + c, mask=live, other=0.0).to(tl.float32)
    p = tl.load(prob + r, mask=r < M, other=0.0)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dprob + r, tl.sum(d * silu * up, 1, keep_dims=True), mask=r < M)
    y = silu * up * p
    dgate, dup = d * p * up * sigmoid * (1 + gate * (1 - sigmoid)), d * p * silu
    if dh_scale is not None:
        block = tl.arange(0, C_TILE // TILE)[None, :]
        scaled = (r < M) & (block * TILE < F)
        dgate, s = _quantize_blocks(dgate, POW2, TILE)
        tl.store(dh_scale + block.to(tl.int64) * M + r, s, mask=scaled)
        dup, s = _quantize_blocks(dup, POW2, TILE)
        tl.store(dh_scale + (block + F // TILE).to(tl.int64) * M + r, s, mask=scaled)
        y, s = _quantize_blocks(y, POW2, TILE)              # A once more: cheaper than to keep it
        tl.store(a_scale + block.to(tl.int64) * M + r, s, mask=scaled)
        tl.store(a + r * F + c, y, mask=live)
    tl.store(dh + r * F * 2 + c, dgate.to(dh.dtype.element_ty), mask=live)
    tl.store(dh + r * F * 2 + F + c, dup.to(dh.dtype.element_ty), mask=live)


def _check_swiglu(h: Tensor, prob: Tensor, tiles: Tensor | None, scales: str = "pow2") -> None:
    check_choice("scales", scales, SCALES)
    check("h", h, FLOATS, ANY, BLOCKS)
    if h.shape[1] % (2 * BLOCK):
        raise ValueError(f"h has shape {list(h.shape)}: gate and up must each be a multiple of {BLOCK} wide, pad both")
    check("prob", prob, (torch.float32,), len(h), like=h)
    _check_tiles(tiles, len(h), h)


def _launch_swiglu(h, prob, tiles, a, scale=None, scales="pow2") -> None:
    h, M, F = h.contiguous(), len(h), h.shape[1] // 2
    c_tile = math.gcd(F, 2048)                              # the largest power of two up to 2048 that divides F
    r_tile = 2048 // c_tile                                 # 2048 outputs a program, 16 a thread
    _swiglu_kernel[triton.cdiv(M, r_tile), F // c_tile](
        h, prob.contiguous(), _contiguous(tiles), a, scale, M, F,
        POW2=scales == "pow2", R_TILE=r_tile, C_TILE=c_tile, TILE=BLOCK, num_warps=4)


def _launch_swiglu_backward(da, h, prob, tiles, dh, dh_scale, dprob, a=None, a_scale=None, scales="pow2") -> None:
    (M, F), c_tile = da.shape, triton.next_power_of_2(da.shape[1])
    r_tile = triton.cdiv(2048, c_tile)                      # whole rows, 2048 outputs a program or more
    _swiglu_backward_kernel[triton.cdiv(M, r_tile),](
        da.contiguous(), h.contiguous(), prob.contiguous(), _contiguous(tiles), dh, dh_scale, dprob, a, a_scale, M, F,
        POW2=scales == "pow2", R_TILE=r_tile, C_TILE=c_tile, TILE=BLOCK, num_warps=4)


@recorded()
def swiglu(h: Tensor, prob: Tensor, tiles: Tensor | None = None) -> Tensor:
    """silu(gate) * up * prob, unquantized: h [M, 2F] bf16 = [gate | up], prob [M] fp32 -> [M, F] bf16.

    F is a multiple of 128.  tiles [M/128] int32: the expert of each tile, -1 for tiles to skip (left undefined).
    """
    _check_swiglu(h, prob, tiles)
    if not use_kernels(h):
        return swiglu_ref(h, prob)
    a = h.new_empty(len(h), h.shape[1] // 2)
    _launch_swiglu(h, prob, tiles, a)
    return a


@recorded()
def swiglu_quantize(h: Tensor, prob: Tensor, scales: str = "pow2", tiles: Tensor | None = None) -> QTensor:
    """`swiglu` that emits FP8 (a fused operator of the paper): no BF16 tensor between SwiGLU and `quantize`."""
    _check_swiglu(h, prob, tiles, scales)
    if not use_kernels(h):
        return swiglu_quantize_ref(h, prob, scales)
    a = _empty_q(h, len(h), h.shape[1] // 2, scales)
    _launch_swiglu(h, prob, tiles, _bytes(a.data), a.scale, scales)
    return a


@recorded()
def swiglu_backward(da: Tensor, h: Tensor, prob: Tensor, tiles: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """da [M, F] bf16, h [M, 2F] bf16, prob [M] fp32 -> dh [M, 2F] bf16, dprob [M] fp32."""
    _check_swiglu(h, prob, tiles)
    check("da", da, (h.dtype,), len(h), h.shape[1] // 2, like=h)
    if not use_kernels(h):
        return swiglu_backward_ref(da, h, prob)
    dh, dprob = h.new_empty(h.shape), prob.new_empty(len(h))
    _launch_swiglu_backward(da, h, prob, tiles, dh, dh_scale=None, dprob=dprob)
    return dh, dprob


@recorded()
def swiglu_backward_quantize(da: Tensor, h: Tensor, prob: Tensor, scales: str = "pow2",
                             tiles: Tensor | None = None) -> tuple[QTensor, Tensor, QTensor]:
    """`swiglu_backward` that emits FP8 (a fused operator of the paper): dh [M, 2F] row-wise, dprob [M] fp32, and
    a [M, F] row-wise once more, from the h that is at hand, for the weight gradient of fc2."""
    _check_swiglu(h, prob, tiles, scales)
    check("da", da, (h.dtype,), len(h), h.shape[1] // 2, like=h)
    if not use_kernels(h):
        return swiglu_backward_quantize_ref(da, h, prob, scales)
    (M, F), dprob = da.shape, prob.new_empty(len(h))
    dh, a = _empty_q(h, M, 2 * F, scales), _empty_q(h, M, F, scales)
    _launch_swiglu_backward(da, h, prob, tiles, _bytes(dh.data), dh.scale, dprob, _bytes(a.data), a.scale, scales)
    return dh, dprob, a


# ---- permute + pad is one gather of rows; unpermute + unpad is one gather and sum -----------------------------------

def gather_rows_ref(x, rows: Tensor):
    if isinstance(x, QTensor):
        return QTensor(gather_rows_ref(_bytes(x.data), rows).view(FP8),
                       torch.where(rows >= 0, x.scale[:, rows], SCALE_MIN), x.scales)
    return torch.where((rows >= 0)[:, None], x[rows], torch.zeros((), dtype=x.dtype, device=x.device))


@triton.jit
def _gather_rows_kernel(x, scale, rows, tile_expert,        # [T, C], [C/128, T] or None, [M] int64, [M/128] or None
                        out, out_scale,                     # [M, C], [C/128, M] or None
                        T, C, M, R_TILE: tl.constexpr, C_TILE: tl.constexpr, TILE: tl.constexpr):
    """Grid (M/R_TILE, C/C_TILE). Reads MC and writes MC elements; data and scales move together."""
    if tile_expert is not None:
        if tl.load(tile_expert + tl.program_id(0) * R_TILE // TILE) < 0:
            return
    slot = tl.program_id(0).to(tl.int64) * R_TILE + tl.arange(0, R_TILE)
    c = tl.program_id(1) * C_TILE + tl.arange(0, C_TILE)[None, :]
    r = tl.load(rows + slot, mask=slot < M, other=-1)
    tile = tl.load(x + r[:, None] * C + c, mask=(r >= 0)[:, None], other=0)
    tl.store(out + slot[:, None] * C + c, tile, mask=(slot < M)[:, None])
    if scale is not None:
        block = (tl.program_id(1) * (C_TILE // TILE) + tl.arange(0, C_TILE // TILE)[:, None]).to(tl.int64)
        s = tl.load(scale + block * T + r[None, :], mask=(r >= 0)[None, :], other=_SCALE_MIN)
        tl.store(out_scale + block * M + slot[None, :], s, mask=(slot < M)[None, :])


@recorded()
def gather_rows(x, rows: Tensor, tiles: Tensor | None = None):
    """out[i] = x[rows[i]], zeros (with the smallest scale) where rows[i] is -1: the paper's fused permute+pad.

    x [T, C] bf16, fp16, fp32 or a QTensor in 1x128 blocks, C a multiple of 128; rows [M] int64, each in [-1, T)
    -> [M, C] of the same kind.  tiles [M/128] int32: skip tiles marked -1; no kernel reads their rows.
    """
    if isinstance(x, QTensor):
        check_q("x", x, ANY, BLOCKS)
        data, scale = _bytes(x.data.contiguous()), x.scale.contiguous()
    else:
        check("x", x, FLOATS, ANY, BLOCKS)
        data, scale = x.contiguous(), None
    check("rows", rows, (torch.int64,), ANY, like=data)
    (T, C), M = data.shape, len(rows)
    _check_tiles(tiles, M, data)
    if not use_kernels(data):
        check_values("rows", rows, -1, T)
        return gather_rows_ref(x, rows)
    r_tile, c_tile = 32, math.gcd(C, 512)
    out, out_scale = data.new_empty(M, C), None if scale is None else scale.new_empty(len(scale), M)
    _gather_rows_kernel[triton.cdiv(M, r_tile), C // c_tile](
        data, scale, rows.contiguous(), _contiguous(tiles), out, out_scale, T, C, M,
        R_TILE=r_tile, C_TILE=c_tile, TILE=BLOCK, num_warps=8)
    return out if scale is None else QTensor(out.view(FP8), out_scale, x.scales)


def sum_rows_ref(x: Tensor, slots: Tensor) -> Tensor:
    return sum(x[slot].float() for slot in slots.unbind(1)).to(x.dtype)


@triton.jit
def _sum_rows_kernel(x, slots, out,                         # x [M, C] bf16, slots [T, k] int64, out [T, C]
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


@recorded()
def sum_rows(x: Tensor, slots: Tensor) -> Tensor:
    """Unpermute+unpad: out[t] = sum of x[slots[t, j]] over j, in that order, in fp32.

    x [M, C] bf16, C a multiple of 128; slots [T, k] int64, each in [0, M) -> [T, C] bf16. No atomics: a token owns
    its sum.
    """
    check("x", x, FLOATS, ANY, BLOCKS)
    check("slots", slots, (torch.int64,), ANY, ANY, like=x)
    if not use_kernels(x):
        check_values("slots", slots, 0, len(x))
        return sum_rows_ref(x, slots)
    x, slots, (T, top_k), C = x.contiguous(), slots.contiguous(), slots.shape, x.shape[1]
    c_tile = math.gcd(C, 2048)
    r_tile, out = 2048 // c_tile, x.new_empty(T, C)
    _sum_rows_kernel[triton.cdiv(T, r_tile), C // c_tile](
        x, slots, out, T, C, TOP_K=top_k, R_TILE=r_tile, C_TILE=c_tile, num_warps=4)
    return out


# ---- grouped GEMM, level 1: the twins -------------------------------------------------------------------------------

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


# ---- grouped GEMM, level 2: the loop --------------------------------------------------------------------------------

@triton.jit
def _grouped_gemm_kernel(a, b, out,                         # [M, K], [E, N, K], [M, N]; wgrad: b [N, K], out [E, M, N]
                         a_scale, b_scale,                  # [K/128, M/A_PER], [E, K/128, N/B_PER]; wgrad: no E
                         tile_expert, ends,                 # [M/128] int32, [E] int32
                         M, N, K, WGRAD: tl.constexpr, A_PER: tl.constexpr, B_PER: tl.constexpr, TILE: tl.constexpr):
    """Grid (M/128, N/128), wgrad (M/128, N/128, E): a program sums one tile, 128 products of K at a time.

    Hopper's tensor core sums FP8 products in about 14 bits and truncates, so each partial sum of 128 is promoted: the
    CUDA cores multiply it by its scales and add it to an fp32 accumulator. fprop and dgrad sum over all of K with
    the weight of the tile's expert; wgrad sums over the slots of one expert, which are K-steps begin to end.
    """
    m, n, e = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, end = 0, K // TILE
    if WGRAD:
        begin, end = tl.load(ends + e - 1, mask=e > 0, other=0) // TILE, tl.load(ends + e) // TILE
        b_row, out_row = n * TILE, e * M + m * TILE
    else:
        e = tl.load(tile_expert + m)
        if e < 0:
            return
        b_row, out_row = e * N + n * TILE, m * TILE
        b_scale += e * end * (N // B_PER)
    i = tl.arange(0, TILE)
    a_at = a + (m * TILE + i)[:, None].to(tl.int64) * K + i[None, :]
    b_at = b + (b_row + i)[None, :].to(tl.int64) * K + i[:, None]
    acc = tl.zeros((TILE, TILE), tl.float32)
    for k in range(begin, end):
        x = tl.load(a_at + k * TILE).to(tl.float8e4nv, bitcast=True)
        y = tl.load(b_at + k * TILE).to(tl.float8e4nv, bitcast=True)
        x_scale = tl.load(a_scale + k * (M // A_PER) + (m * TILE + i) // A_PER)
        y_scale = tl.load(b_scale + k * (N // B_PER) + (n * TILE + i) // B_PER)
        acc += tl.dot(x, y) * (x_scale[:, None] * y_scale[None, :])
    at = (out_row + i)[:, None].to(tl.int64) * N + (n * TILE + i)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty))


# ---- grouped GEMM, level 3: the loop without waiting, for Hopper, in Gluon ------------------------------------------
#
# `acc += dot * scale` makes a program wait for the tensor core, then makes the tensor core wait while the CUDA cores
# promote. Here a program is three roles that run at the same time, each a function below:
#
#     loader     one warp. Asks the copy engine (TMA) for the tiles of the next K-steps, into a ring of stages in shared
#                memory, as soon as a stage is free.
#     consumers  two groups of four warps. Each owns 64 of the tile's 128 rows: it starts a product, waits for it, and
#                promotes it. They do not wait for each other (but one can be no more than the ring ahead): while one
#                promotes, the tensor core works for the other.
#
# They meet at `mbarrier`s, counters in shared memory. The loader waits until a stage is `empty` (both consumers are
# done with it), a consumer until it is `full` (its bytes have arrived). A barrier is waited for by the parity of its
# phase: stage s of the ring is in its first, second, ... use, so K-step number i waits for phase i // STAGES & 1.
#
# The tile is 128 x 256: wider tiles read fewer bytes for a product, and L2 is the next limit. A consumer's 64 x 256
# are two accumulators of 64 x 128, `left` and `right`: 128 registers a thread, which leave room for the partial sum of
# one half, not of both. So the halves take turns, and each half of b has a `full` barrier of its own. Scales of rows
# and of tiles are a few registers, loaded a K-step ahead. Where b has one scale a column (wgrad of the requantizing
# transpose), they would be 64 more: the loader copies them into the stage, beside the tiles.

_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared         # renamed in Triton 3.8
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_shared_layout = functools.lru_cache(gl.NVMMASharedLayout.get_default_for)              # slow for what it does
_GL = {FP8: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
_HALF, _TILE, _WIDE = gl.constexpr(BLOCK // 2), gl.constexpr(BLOCK), gl.constexpr(2 * BLOCK)


@gluon.jit
def _locate(tile, problem, WGRAD: gl.constexpr):
    """The tile'th tile of out: its first row in a, first column, expert, and K-steps begin to end.

    Tiles are counted in bands of four rows: programs that run at the same time share operands in L2.
    """
    tile_expert, ends, M, N, K, m_tiles, n_tiles = problem
    if WGRAD:
        e, tile = tile // (m_tiles * n_tiles), tile % (m_tiles * n_tiles)
    band, inside = tile // (4 * n_tiles), tile % (4 * n_tiles)
    height = gl.minimum(m_tiles - 4 * band, 4)
    m, n = 4 * band + inside % height, inside // height
    if WGRAD:
        begin, end = gl.load(ends + e - 1, mask=e > 0, other=0) // _TILE, gl.load(ends + e) // _TILE
    else:
        e, begin, end = gl.load(tile_expert + m), 0, K // _TILE
    return m * _TILE, n * _WIDE, e, begin, end


@gluon.jit
def _loader(a, b, b_scale, ring, problem, tiles, PROGRAMS: gl.constexpr, WGRAD: gl.constexpr, B_PER: gl.constexpr):
    a_ring, b_ring, scale_ring, full, empty = ring
    N = problem[3]
    i = 0                                                   # K-steps so far, of all tiles: the place in the ring
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        row, col, e, begin, end = _locate(tile, problem, WGRAD)
        b_row = col if WGRAD else e * N + col
        for k in range(begin, end):
            s, phase = i % a_ring.shape[0], i // a_ring.shape[0] & 1
            left, right = full.index(2 * s), full.index(2 * s + 1)
            mbarrier.wait(empty.index(s), phase ^ 1)        # the phase before the first has passed: no wait at first
            if B_PER == 1:
                c = col + gl.arange(0, _WIDE, layout=gl.BlockedLayout([4], [32], [1], [0]))
                _copy(scale_ring.index(s), b_scale + k * N + gl.minimum(c, N - 1))
                async_copy.mbarrier_arrive(left)            # not full before these have arrived
            mbarrier.expect(left, 2 * _TILE * _TILE)        # nor before so many bytes
            _tma_load(a, [row, k * _TILE], left, a_ring.index(s))
            _tma_load(b, [b_row, k * _TILE], left, b_ring.index(s).slice(0, _TILE))
            mbarrier.expect(right, _TILE * _TILE)           # past N: the next expert's rows or zeros, never stored
            _tma_load(b, [b_row + _TILE, k * _TILE], right, b_ring.index(s).slice(_TILE, _TILE))
            i += 1


@gluon.jit
def _here(x):
    """x, computed at this place: an empty instruction that LLVM can neither look into nor move (ptxas sees nothing)."""
    return gl.inline_asm_elementwise("", "=f,0", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _product(a, b, SUM: gl.constexpr):
    """a [64, 128] times b [128, 128]^T on the tensor core, fp32 in layout SUM."""
    zero = gl.zeros([_HALF, _TILE], gl.float32, SUM)
    partial = hopper.warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)
    return hopper.warpgroup_mma_wait(0, deps=[partial])


@gluon.jit
def _outer(a_scale, b_scale, SUM: gl.constexpr):
    """A scale for each of 64 x 128 products: a_scale [64] in registers, b_scale [128] in shared memory."""
    return gl.expand_dims(a_scale, 1) * gl.expand_dims(b_scale.load(gl.SliceLayout(0, SUM)), 0)


@gluon.jit
def _consumer(half: gl.constexpr, a_scale, b_scale, out, buffers, ring, problem, tiles, PROGRAMS: gl.constexpr,
              WGRAD: gl.constexpr, A_PER: gl.constexpr, B_PER: gl.constexpr):
    a_ring, b_ring, scale_ring, full, empty = ring
    M, N, K = problem[2], problem[3], problem[4]
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])        # how wgmma returns its sums
    r = half * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(1, SUM))
    a_scales, b_scales = M // A_PER, N // B_PER             # scales in a K-step
    i = 0
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        row, col, e, begin, end = _locate(tile, problem, WGRAD)
        last = gl.maximum(end - 1, 0)
        first = gl.minimum(begin, last)                     # an expert without rows: any place that exists
        a_at = a_scale + (row + r) // A_PER
        sa = gl.load(a_at + first * a_scales)
        if B_PER == _TILE:
            left_at = b_scale + col // _TILE
            if not WGRAD:
                left_at += e * (K // _TILE) * b_scales
            right_at = left_at + gl.minimum(1, b_scales - 1 - col // _TILE)             # N may end at the tile's middle
            s_left, s_right = gl.load(left_at + first * b_scales), gl.load(right_at + first * b_scales)
        left, right = gl.zeros([_HALF, _TILE], gl.float32, SUM), gl.zeros([_HALF, _TILE], gl.float32, SUM)
        for k in range(begin, end):
            s, phase = i % a_ring.shape[0], i // a_ring.shape[0] & 1
            ahead = gl.minimum(k + 1, last)
            next_a = gl.load(a_at + ahead * a_scales)
            if B_PER == _TILE:
                next_left, next_right = gl.load(left_at + ahead * b_scales), gl.load(right_at + ahead * b_scales)
            mbarrier.wait(full.index(2 * s), phase)
            if B_PER == _TILE:
                # here: else the compiler multiplies where it promotes, and waits for the loads between two products
                by_left, by_right = gl.expand_dims(_here(sa * s_left), 1), gl.expand_dims(_here(sa * s_right), 1)
                s_left, s_right = next_left, next_right
            x = a_ring.index(s).slice(half * _HALF, _HALF)
            partial = _product(x, b_ring.index(s).slice(0, _TILE), SUM)
            if B_PER == 1:
                by_left = _outer(sa, scale_ring.index(s).slice(0, _TILE), SUM)
            # here: else it promotes `left` after the second product has begun, with registers for both partial sums
            left = _here(left + partial * by_left)
            mbarrier.wait(full.index(2 * s + 1), phase)
            partial = _product(x, b_ring.index(s).slice(_TILE, _TILE), SUM)
            if B_PER == 1:
                by_right = _outer(sa, scale_ring.index(s).slice(_TILE, _TILE), SUM)
            mbarrier.arrive(empty.index(s), count=1)        # all has been read: the loader may refill the stage
            right = _here(right + partial * by_right)
            sa = next_a
            i += 1
        out_row = row + half * _HALF + (e * M if WGRAD else 0)
        _store(left, out, out_row, col, half, buffers)
        _store(right, out, out_row, col + _TILE, half, buffers)                         # past column N, TMA drops it
    tma.store_wait(0)


@gluon.jit
def _store(x, out, row, col, half: gl.constexpr, buffers):
    """x [64, C] in pieces as wide as the copy engine's box, through a consumer's buffers in turns."""
    WIDTH: gl.constexpr = x.shape[1]
    TURNS: gl.constexpr = buffers.shape[0] // 2
    if WIDTH > out.block_type.shape[1]:
        first, second = x.reshape([_HALF, 2, WIDTH // 2]).permute((0, 2, 1)).split()
        _store(first, out, row, col, half, buffers)
        _store(second, out, row, col + WIDTH // 2, half, buffers)
    else:
        buffer = buffers.index(TURNS * half + col // WIDTH % TURNS)
        tma.store_wait(TURNS - 1)                           # the last store has been read from this buffer
        buffer.store(x.to(out.dtype))
        hopper.fence_async_shared()                         # ordinary writes, made visible to the copy engine
        _tma_store(out, [row, col], buffer)


@gluon.jit
def _hopper_gemm_kernel(a, b, out,                          # TMA descriptors of the same matrices as in level 2
                        a_scale, b_scale, tile_expert, ends, M, N, K, E,
                        WGRAD: gl.constexpr, A_PER: gl.constexpr, B_PER: gl.constexpr,
                        STAGES: gl.constexpr, BUFFERS: gl.constexpr, PROGRAMS: gl.constexpr):
    """Grid (PROGRAMS,), one on each multiprocessor, tile after tile. The same bits as level 2."""
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES, _TILE, _TILE], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, _WIDE, _TILE], b.layout)
    scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, _WIDE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    buffers = gl.allocate_shared_memory(out.dtype, [BUFFERS, _HALF, out.block_type.shape[1]], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(2 * s), count=1)           # the loader's `expect`, then bytes
        mbarrier.init(full.index(2 * s + 1), count=1)
        mbarrier.init(empty.index(s), count=2)              # both consumers
    hopper.fence_async_shared()                             # the copy engine must see the barriers as they are now
    m_tiles, n_tiles = (M if WGRAD else gl.load(ends + E - 1)) // _TILE, gl.cdiv(N, _WIDE)
    tiles = m_tiles * n_tiles * (E if WGRAD else 1)
    ring, problem = (a_ring, b_ring, scale_ring, full, empty), (tile_expert, ends, M, N, K, m_tiles, n_tiles)
    gl.warp_specialize([
        (_consumer, (0, a_scale, b_scale, out, buffers, ring, problem, tiles, PROGRAMS, WGRAD, A_PER, B_PER)),
        (_consumer, (1, a_scale, b_scale, out, buffers, ring, problem, tiles, PROGRAMS, WGRAD, A_PER, B_PER)),
        (_loader, (a, b, b_scale, ring, problem, tiles, PROGRAMS, WGRAD, B_PER)),
    ], [4, 1], [232, 40])                                   # warps and registers a thread, of the last two roles


def _tma(x: Tensor, *box) -> TensorDescriptor:
    """A matrix [R, C] as the copy engine sees it, in boxes."""
    return TensorDescriptor.from_tensor(x, list(box), _shared_layout(box, _GL[x.dtype]))


def _hopper_options(b_per: int, out_bytes: int) -> tuple[tuple[int, int], dict]:
    """The box of a store and the kernel's constants.

    BUFFERS for stores: in bf16 one of [64, 128] for each consumer, in fp32 two of [64, 32], which take turns.
    STAGES: as many as fit beside them (32 KB) into Hopper's 227 KB of shared memory, 48 KB each, and beside b's scales,
    a ring that the compiler drops where nobody uses it. The launch counts 12 warps, the loader as four: with 168
    registers a thread they fill the register file.
    """
    columns, turns = (BLOCK, 1) if out_bytes == 2 else (BLOCK // 4, 2)
    return (BLOCK // 2, columns), dict(STAGES=4 if b_per == BLOCK else 3, BUFFERS=2 * turns, num_warps=4, maxnreg=168)


def _launch_gemm(a: QTensor, b: QTensor, out: Tensor, tile_expert: Tensor, ends: Tensor) -> Tensor:
    wgrad, E, (M, K), N = out.ndim == 3, len(ends), a.data.shape, b.data.shape[-2]
    x, y, flat = a.data.contiguous(), b.data.contiguous().flatten(0, -2), out.flatten(0, -2)
    scales, indices = (a.scale.contiguous(), b.scale.contiguous()), (tile_expert.contiguous(), ends.contiguous())
    layout = dict(WGRAD=wgrad, A_PER=a.rows_per_scale, B_PER=b.rows_per_scale)
    if use_hopper_gemm(out):
        programs = torch.cuda.get_device_properties(out.device).multi_processor_count
        box, options = _hopper_options(b.rows_per_scale, out.itemsize)
        matrices = _tma(x, BLOCK, BLOCK), _tma(y, BLOCK, BLOCK), _tma(flat, *box)
        _hopper_gemm_kernel[programs,](*matrices, *scales, *indices, M, N, K, E, PROGRAMS=programs, **layout, **options)
    else:
        _grouped_gemm_kernel[M // BLOCK, N // BLOCK, E if wgrad else 1](
            _bytes(x), _bytes(y), flat, *scales, *indices, M, N, K, TILE=BLOCK, num_warps=8, num_stages=3, **layout)
    return out


@recorded()
def grouped_gemm(a: QTensor, b: QTensor, tile_expert: Tensor, ends: Tensor) -> Tensor:
    """out[rows of expert e] = a[rows of e] @ b[e]^T: fprop with W, dgrad with W^T.

    a [M, K] in 1x128 blocks, b [E, N, K] in 128x128 blocks -> [M, N] bf16; M, N, K multiples of 128.
    tile_expert [M/128] int32: the expert of each row tile, -1 past the last one (those rows stay undefined).
    ends [E] int32: where each expert's rows end, a multiple of 128.
    """
    check_q("a", a, BLOCKS, BLOCKS)
    check_q("b", b, ANY, BLOCKS, a.data.shape[1], rows_per_scale=(BLOCK,), like=a.data)
    check("tile_expert", tile_expert, (torch.int32,), len(a.data) // BLOCK, like=a.data)
    check("ends", ends, (torch.int32,), len(b.data), like=a.data)
    if not use_kernels(a.data):
        _check_ends(ends, len(a.data))
        expert = torch.searchsorted(ends // BLOCK, torch.arange(len(tile_expert)).to(ends), right=True)
        if not torch.equal(tile_expert, torch.where(expert < len(ends), expert, -1).int()):
            raise ValueError(f"tile_expert holds {tile_expert.tolist()}: ends say {expert.tolist()}, past them -1")
        return grouped_gemm_ref(a, b, tile_expert)
    out = a.scale.new_empty(len(a.data), b.data.shape[1], dtype=torch.bfloat16)
    return _launch_gemm(a, b, out, tile_expert, ends)


@recorded()
def grouped_wgrad(a: QTensor, b: QTensor, ends: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """dW[e] = a[:, slots of e] @ b[:, slots of e]^T, zeros for an expert without slots.

    a [M, slots], b [N, slots] column-wise, scales in tiles (from the direct transpose) or 1x128 blocks (requantized);
    M, N, slots multiples of 128.  ends [E] int32: the end of each expert's slots, a multiple of 128.
    -> [E, M, N] of `dtype`, fp32 or bf16.
    """
    check_choice("dtype", dtype, (torch.float32, torch.bfloat16))
    check_q("a", a, BLOCKS, BLOCKS, rows_per_scale=(1, BLOCK))
    check_q("b", b, BLOCKS, a.data.shape[1], rows_per_scale=(1, BLOCK), like=a.data)
    check("ends", ends, (torch.int32,), ANY, like=a.data)
    if not use_kernels(a.data):
        _check_ends(ends, a.data.shape[1])
        return grouped_wgrad_ref(a, b, ends, dtype)
    out = a.scale.new_empty(len(ends), len(a.data), len(b.data), dtype=dtype)
    return _launch_gemm(a, b, out, ends, ends)


# ---- python kernels.py [NAME ...]: timings on a GPU -----------------------------------------------------------------

def sqnr(x: Tensor, ref: Tensor) -> float:
    """Signal to quantization-noise ratio in dB: 10 log10(|ref|^2 / |x - ref|^2). 31.5 dB is 2.7% of error."""
    return 10 * (ref.double().square().sum() / (x.double() - ref).square().sum().clamp(min=1e-300)).log10().item()


# tokens, d_model, expert width, experts, top-k
LAYERS = ((16384, 2048, 2048, 8, 2), (32768, 2048, 1024, 32, 4), (16384, 4096, 2048, 16, 4))
PAPER = ((4096, 1280, 1024, 64, 7), (4096, 2048, 1408, 64, 6), (4096, 5120, 1536, 160, 6), (4096, 7168, 2048, 256, 8))


class Bench:
    """Prints a line a kernel: us, GB/s or TFLOPS, share of the ceiling measured here, speed-up over baselines."""

    def __init__(self):
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")               # larger than L2
        x, y = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda")
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        q, one = a.to(FP8), torch.ones((), device="cuda")
        copy, bf16, fp8 = self.us(lambda: y.copy_(x), lambda: a @ a,
                                  lambda: torch._scaled_mm(q, q.t(), one, one, out_dtype=a.dtype))
        self.ceiling = {"GB/s": (2 << 30) / copy / 1e3, "TFLOPS": 2 * 8192 ** 3 / fp8 / 1e6}
        print(f"ceilings: copy {self.ceiling['GB/s']:.0f} GB/s; 8192^3 in FP8 {self.ceiling['TFLOPS']:.0f} TFLOPS, "
              f"one scale, in bf16 {2 * 8192 ** 3 / bf16 / 1e6:.0f} TFLOPS")

    def us(self, *functions, rounds: int = 100) -> list[float]:
        """Median us of each function, all launches queued, L2 flushed before each launch.

        The functions take turns, so that all of them see the same clock, and for long enough that the chip reaches its
        power limit: in a short burst the clock is higher, and what waits for memory looks slower beside it.
        """
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2 * len(functions))] for _ in range(rounds + 3)]
        for events in marks:                                                                # three rounds to warm up
            for i, fn in enumerate(functions):
                self.flush.zero_()
                events[2 * i].record()
                fn()
                events[2 * i + 1].record()
        torch.cuda.synchronize()
        return [1e3 * statistics.median(events[2 * i].elapsed_time(events[2 * i + 1]) for events in marks[3:])
                for i in range(len(functions))]

    def line(self, name: str, fn, work: int, unit: str = "GB/s", **baselines) -> None:
        """work: bytes that must move (GB/s) or operations (TFLOPS)."""
        us, *others = self.us(fn, *baselines.values())
        rate = work / us / (1e3 if unit == "GB/s" else 1e6)
        print(f"  {name:32} {us:9.1f} us {rate:7.0f} {unit:6} {rate / self.ceiling[unit]:5.2f} of the ceiling"
              + "".join(f"   {other / us:5.2f}x {label}" for label, other in zip(baselines, others)), flush=True)


def balanced_routing(T: int, E: int, top_k: int, device):
    """rows [M], slots [T', k], tile_expert, ends for experts of equal size (T' <= T: whole tokens only)."""
    per = T * top_k // E
    padded = triton.cdiv(per, BLOCK) * BLOCK
    pairs = torch.randperm(E * per, device=device).view(E, per)
    rows = pad(pairs // top_k, (0, padded - per), value=-1).flatten()
    slots = torch.empty(E * per, dtype=torch.int64, device=device)
    slots[pairs.flatten()] = torch.arange(E * padded, device=device).view(E, padded)[:, :per].flatten()
    tiles = torch.arange(E, device=device, dtype=torch.int32).repeat_interleave(padded // BLOCK)
    ends = torch.arange(1, E + 1, device=device, dtype=torch.int32) * padded
    return rows, slots[:per * E // top_k * top_k].view(-1, top_k), tiles, ends


def bench_quantize(bench: Bench, T, D, F, E, top_k, device) -> None:
    x, w = torch.randn(T, D, device=device, dtype=torch.bfloat16), torch.randn(min(E, 8), 2 * F, D, device=device)
    bench.line("quantize", lambda: quantize(x), 3 * T * D)
    bench.line("quantize_weight", lambda: quantize_weight(w), 6 * w.numel())


def bench_permute(bench: Bench, T, D, F, E, top_k, device) -> None:
    rows, slots, _, _ = balanced_routing(T, E, top_k, device)
    live, M = rows >= 0, len(rows)
    compact, padding = rows[live], torch.where(live, live.cumsum(0) - 1, -1)
    x = torch.randn(T, D, device=device, dtype=torch.bfloat16)
    for name, size, t in (("FP8", 1, quantize(x)), ("bf16", 2, x)):
        bench.line(f"permute+pad {name}", lambda: gather_rows(t, rows), size * (T + M) * D,
                   unfused=lambda: gather_rows(gather_rows(t, compact), padding))
    y, unpadded, rank = gather_rows(x, rows), slots.flatten(), torch.arange(slots.numel(), device=device).view_as(slots)
    bench.line("unpermute+unpad bf16", lambda: sum_rows(y, slots), 2 * (slots.numel() + len(slots)) * D,
               unfused=lambda: sum_rows(gather_rows(y, unpadded), rank))


def bench_transpose(bench: Bench, T, D, F, E, top_k, device) -> None:
    rows = balanced_routing(T, E, top_k, device)[0]
    q = quantize(torch.randn(T, D, device=device, dtype=torch.bfloat16))
    permuted = gather_rows(q, rows)
    bench.line("scaling-aware transpose", lambda: scaling_aware_transpose(permuted), 2 * len(rows) * D,
               requantizing=lambda: quantize(transpose(dequantize(permuted, torch.bfloat16))))
    bench.line("  with the permute inside", lambda: scaling_aware_transpose(q, rows), (T + len(rows)) * D,
               apart=lambda: scaling_aware_transpose(gather_rows(q, rows)))


def bench_swiglu(bench: Bench, T, D, F, E, top_k, device) -> None:
    M = len(balanced_routing(T, E, top_k, device)[0])
    h, prob = torch.randn(M, 2 * F, device=device, dtype=torch.bfloat16), torch.rand(M, device=device)
    da = torch.randn(M, F, device=device, dtype=torch.bfloat16)
    bench.line("SwiGLU+quantize", lambda: swiglu_quantize(h, prob), 5 * M * F,
               unfused=lambda: quantize(swiglu(h, prob)))
    bench.line("SwiGLU backward+quantize, A again", lambda: swiglu_backward_quantize(da, h, prob), 9 * M * F,
               unfused=lambda: quantize(swiglu_backward(da, h, prob)[0]))               # which has kept A


def bench_gemm(bench: Bench, T, D, F, E, top_k, device) -> None:
    """fprop and dgrad read W and W^T; wgrad reads both operands transposed. bf16: torch's grouped GEMM, in turns."""
    rows, _, tiles, ends = balanced_routing(T, E, top_k, device)
    M, live = len(rows), int((rows >= 0).sum())
    for fc, N, K in (("fc1", 2 * F, D), ("fc2", D, F)):
        x, dy = (torch.randn(M, C, device=device, dtype=torch.bfloat16) for C in (K, N))
        w = torch.randn(E, N, K, device=device, dtype=torch.bfloat16) * K ** -0.5
        (wq, wt), xq, dyq = quantize_weight(w), quantize(x), quantize(dy)
        direct = [scaling_aware_transpose(q) for q in (dyq, xq)]
        requantized = [quantize(transpose(t)) for t in (dy, x)]
        bf16 = {"fprop": lambda: grouped_mm(x, w.mT, offs=ends), "dgrad": lambda: grouped_mm(dy, w, offs=ends),
                "wgrad": lambda: grouped_mm(dy.t(), x, offs=ends)}
        fp8 = {"fprop": lambda: grouped_gemm(xq, wq, tiles, ends), "dgrad": lambda: grouped_gemm(dyq, wt, tiles, ends),
               "wgrad to bf16": lambda: grouped_wgrad(*direct, ends, torch.bfloat16),
               "wgrad to fp32": lambda: grouped_wgrad(*direct, ends),
               "wgrad to bf16, requantized": lambda: grouped_wgrad(*requantized, ends, torch.bfloat16)}
        for name, fn in fp8.items():
            bench.line(f"{fc} {name}", fn, 2 * live * N * K, "TFLOPS", bf16=bf16[name[:5]])


BENCHES = {"quantize": bench_quantize, "permute": bench_permute, "transpose": bench_transpose, "swiglu": bench_swiglu,
           "gemm": bench_gemm}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="kernels.py", allow_abbrev=False,
                                     description=f"Time kernels on a GPU: all, or some of {', '.join(BENCHES)}.")
    parser.add_argument("names", nargs="*", metavar="NAME", choices=["all", *BENCHES], default="all")
    names = parser.parse_args(argv).names
    if not torch.cuda.is_available() or not use_kernels(torch.empty(0, device="cuda")):
        parser.error("there is no GPU of compute capability 8.9 or later here: timings need one")
    print(f"torch {torch.__version__}, triton {triton.__version__}, {torch.cuda.get_device_name()}")
    bench = Bench()
    for shape in (*LAYERS, *PAPER):
        print("\nT {}, D {}, F {}, E {}, k {}".format(*shape))
        for name in BENCHES if "all" in names else names:
            BENCHES[name](bench, *shape, "cuda")


if __name__ == "__main__":
    main()
