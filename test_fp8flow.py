"""What is promised, and held here. On a GPU the kernels run compiled; without one in Triton's
interpreter, small.

    quantize, transpose     numbers computed by hand, then every E4M3 code against exact arithmetic,
                            then random data
    moving rows             permute, pad and back against plain indexing
    grouped GEMM            against fp64 on the dequantized operands; on Hopper its kernel against
                            the loop, bit for bit; everywhere both compiled for GPUs that are not
                            here
    routing                 the plan: its invariants, empty experts and all
    the door                who is let in, and what runs
    the layer               against fp64, kernels against twins, memory, no host sync
    in other models         every dtype, stale weights, autocast, compile, checkpointing, DDP
    casts                   those of a run are those in the margin of the code
    what is refused         where strangers enter, in a sentence that names the argument
    training                data, schedule, what a run leaves, how it goes on, recording
    tools                   the trace and the profiler say the same
"""
import os

import torch

CUDA = torch.cuda.is_available()
torch.set_num_threads(1)                # tiny operations: threads would wait for each other
if not CUDA and __name__ != "__main__":
    os.environ["TRITON_INTERPRET"] = "1"    # before the kernels are imported: @triton.jit reads it

import contextlib
import copy
import csv
import doctest
import gc
import importlib.util
import inspect
import itertools
import json
import math
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import pytest
import triton
import triton.language as tl
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fp8flow
import kernels
import model
import train as train_py
from kernels import BLOCK, FP8, SCALE_MIN, QTensor
from tools import bench, draw, probe, trace, walk
from tools.bench import sqnr

DEVICE = "cuda" if CUDA else "cpu"
ROOT = Path(__file__).parent


# ---- the hardware rounds casts to nearest even, and the interpreter must -------------------------

@triton.jit
def _cast_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def _cast_fp8_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, kernels._encode(tl.load(x + i)))


def test_casts_round_to_nearest_even():
    by_hand = [0.0, -0.0, 1 + 2 ** -8, 1 + 3 * 2 ** -8, 17.0, 19.0, 448.0, -448.0,
               2 ** -9, 2 ** -10, 3 * 2 ** -10, -2 ** -11]
    x = torch.cat([torch.randn(2000), torch.linspace(-0.02, 0.02, 2001), torch.tensor(by_hand)])
    n = triton.next_power_of_2(len(x))
    x = torch.nn.functional.pad(x, (0, n - len(x))).to(DEVICE)
    bf16 = torch.empty(n, dtype=torch.bfloat16, device=DEVICE)
    fp8 = torch.empty(n, dtype=torch.uint8, device=DEVICE)
    _cast_kernel[1,](x, bf16, n)
    _cast_fp8_kernel[1,](x, fp8, n)
    assert torch.equal(bf16.view(torch.int16), x.bfloat16().view(torch.int16))
    assert torch.equal(fp8, x.to(FP8).view(torch.uint8))


# ---- helpers -------------------------------------------------------------------------------------

def data(kind: str, R: int, C: int, seed: int = 0, dtype=torch.bfloat16) -> torch.Tensor:
    """Matrices that look like what a layer quantizes: plain, heavy-tailed, and rows of very
    different size."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(R, C, generator=g)
    if kind == "heavy":
        x = x * torch.randn(R, C, generator=g).exp() ** 2
    if kind == "gradient":
        x = x * torch.exp2(torch.randint(-18, 18, (R, 1), generator=g).float())
        x[3::7] = 0
    return x.to(DEVICE, dtype)


def vary_blocks(x: torch.Tensor) -> torch.Tensor:
    """x with its 128x128 blocks scaled by 2^-2..2^2, so that a scale read from a neighbour's place
    shows."""
    row_block = torch.arange(x.shape[0], device=x.device) // BLOCK
    column_block = torch.arange(x.shape[1], device=x.device) // BLOCK
    binades = (3 * row_block[:, None] + column_block) % 5 - 2
    return x * torch.exp2(binades).to(x.dtype)


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def same_bits(a: QTensor, b: QTensor) -> bool:
    same_codes = torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
    return same_codes and torch.equal(a.scale, b.scale)


SHAPES = [(1, 128), (128, 128), (37, 384)]
TILES = [(128, 128), (256, 384)]
if CUDA:
    SHAPES += [(4096, 2048), (1000, 7168), (513, 1408)]
    TILES += [(4096, 2048), (1024, 7168), (640, 1408)]


# ---- quantize ------------------------------------------------------------------------------------

@pytest.mark.parametrize("scales", ["pow2", "fp32"])
@pytest.mark.parametrize("kind", ["plain", "heavy", "gradient"])
@pytest.mark.parametrize("R, C", SHAPES)
def test_quantize_kernel_equals_twin(R, C, kind, scales):
    for dtype in (torch.bfloat16, torch.float32):
        x = data(kind, R, C, dtype=dtype)
        q = kernels.quantize(x, scales)
        assert same_bits(q, kernels.quantize.twin(x, scales))
        assert torch.equal(kernels.dequantize(q), kernels.dequantize.twin(q))
        narrow = kernels.dequantize(q, torch.bfloat16)
        assert torch.equal(narrow, kernels.dequantize.twin(q, torch.bfloat16))
        assert sqnr(kernels.dequantize(q), x) > 30


def blocks_by_hand() -> torch.Tensor:
    x = torch.zeros(12, 128)
    x[1, 5] = 3.0                               # one live element
    x[2, 0] = 448.0
    x[2, 1] = -448.0
    x[3, 0] = 448.0001
    x[4] = torch.arange(128) * 1e-40            # fp32 subnormals
    x[5] = 1e-30
    x[6, 0] = 448.0                             # the largest code beside the smallest subnormal
    x[6, 1] = 2.0 ** -9
    x[7, 3] = torch.nan
    x[8, 4] = torch.inf
    x[9, 9] = -torch.inf
    x[10] = -0.0
    x[11, 0] = torch.finfo(torch.float32).max / 2
    return x.to(DEVICE)


@pytest.mark.parametrize("scales", ["pow2", "fp32"])
@pytest.mark.parametrize("twin", [False, True])
def test_quantize_by_hand(twin, scales):
    x = blocks_by_hand()
    q = kernels.quantize.twin(x, scales) if twin else kernels.quantize(x, scales)
    assert same_bits(q, kernels.quantize.twin(x, scales))
    y = kernels.dequantize(q)
    scale = q.scale[0]
    assert scale[0] == SCALE_MIN and scale[10] == SCALE_MIN             # never 1.0
    assert (y[0] == 0).all() and (q.data[10].view(torch.uint8) == 0x80).all()
    assert y[1, 5] == 3 and y[1].count_nonzero() == 1
    assert y[2, 0] == 448 and y[2, 1] == -448 and scale[2] == 1
    assert scale[3] == 2 if scales == "pow2" else scale[3] > 1
    assert y[6, 1] == 2.0 ** -9
    assert (y[5] - 1e-30).abs().max() < 1e-30 / 16
    assert (y[4] - x[4]).abs().max() <= 128e-40
    assert y[7:10].isnan().all() and y[[0, 1, 2, 3, 4, 5, 6, 10, 11]].isfinite().all()
    assert abs(y[11, 0] / x[11, 0] - 1) < 1 / 16


def test_pow2_scale_is_minimal():
    x = torch.zeros(400, 128)
    amax = torch.exp2(torch.linspace(-100, 100, 400)) * torch.linspace(1, 2, 400)
    amax[:4] = torch.tensor([448.0, 1.75, 1.75 + 2 ** -22, 1.75 * 2 ** 20])
    x[:, 17] = -amax
    scale = kernels.quantize(x.to(DEVICE)).scale[0].cpu()
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all()
    assert (scale * 448 >= amax).all() and (scale / 2 * 448 < amax).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", ["pow2", "fp32"])
def test_quantize_weight(scales, dtype):
    w = (data("heavy", 3 * 256, 384, dtype=torch.float32).view(3, 256, 384) / 50).to(dtype)
    w[1] = 0
    q, q_t = kernels.quantize_weight(w, scales)
    ref, ref_t = kernels.quantize_weight.twin(w, scales)
    assert same_bits(q, ref) and same_bits(q_t, ref_t)
    dequantize = kernels.dequantize.twin        # [E, N, K], too
    assert torch.equal(dequantize(q).mT, dequantize(q_t))
    assert sqnr(dequantize(q), w) > 25 and sqnr(dequantize(q_t), w.mT) > 25
    w[2, 5, 7] = torch.nan
    q, q_t = kernels.quantize_weight(w, scales)
    y = dequantize(q)
    y_t = dequantize(q_t)
    assert y[2, 5, 7].isnan() and y[:2].isfinite().all()
    assert y_t[2, 7, 5].isnan() and y_t[:2].isfinite().all()


# ---- transpose -----------------------------------------------------------------------------------

def e4m3_value(code: int) -> float:
    exponent = code >> 3 & 15
    mantissa = code & 7
    if exponent == 0:
        value = mantissa * 2.0 ** -9
    else:
        value = (8 + mantissa) * 2.0 ** (exponent - 10)
    return -value if code >> 7 else value


def shifted_code(code: int, k: int) -> int:
    """code * 2^-k rounded to nearest even in E4M3, in exact integer arithmetic."""
    if code & 0x7F == 0x7F:
        return 0x7F
    exponent = code >> 3 & 15
    mantissa = code & 7
    quanta = mantissa if exponent == 0 else (8 + mantissa) << exponent - 1      # units of 2^-9
    floor = quanta >> k
    rest = quanta & (1 << k) - 1
    if floor >= 16:                             # It stays normal: k only lowers the exponent.
        assert rest == 0 and floor % (1 << floor.bit_length() - 4) == 0
    elif k:
        half = 1 << k - 1
        if rest > half or rest == half and floor & 1:
            floor += 1
    if floor < 8:
        magnitude = floor                       # subnormal: the exponent's bits are zero
    else:
        shift = floor.bit_length() - 4          # a normal code keeps 4 bits, the first implied
        magnitude = shift + 1 << 3 | (floor >> shift) - 8
    return code & 0x80 | magnitude


@pytest.mark.parametrize("twin", [False, True])
def test_transpose_against_exact_arithmetic(twin):
    """All 256 codes under shifts 0..20 (and 60, 200): row r of a tile has scale 2^-k(r), and row 0
    holds the maximum."""
    shifts = list(range(21)) + [60, 200]
    halves = torch.arange(256, dtype=torch.uint8).view(2, 128)
    x = torch.zeros(128, 128, dtype=torch.uint8)
    scale = torch.full((1, 128), SCALE_MIN)
    for i, shift in enumerate(shifts):
        x[2 * i] = halves[0]
        x[2 * i + 1] = halves[1]
        scale[0, 2 * i:2 * i + 2] = 2.0 ** (90 - shift)
    transpose = kernels.scaling_aware_transpose.twin if twin else kernels.scaling_aware_transpose
    out = transpose(QTensor(x.view(FP8).to(DEVICE), scale.to(DEVICE), "pow2"))
    assert out.scale.tolist() == [[2.0 ** 90]]
    got = out.data.view(torch.uint8).cpu().t()
    for row in range(2 * len(shifts)):
        shift = shifts[row // 2]
        want = [shifted_code(code, shift) for code in x[row].tolist()]
        assert got[row].tolist() == want, f"shift {shift}"
    for code in range(127):
        by_torch = torch.tensor(e4m3_value(code) / 8).to(FP8).view(torch.uint8)
        assert shifted_code(code, 3) == by_torch


@pytest.mark.parametrize("kind", ["plain", "heavy", "gradient"])
@pytest.mark.parametrize("M, C", TILES)
def test_transpose_kernel_equals_twin(M, C, kind):
    q = kernels.quantize(data(kind, M, C))
    out = kernels.scaling_aware_transpose(q)
    assert out.data.shape == (C, M) and same_bits(out, kernels.scaling_aware_transpose.twin(q))
    rows = torch.randint(-1, M, (256,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    permuted = kernels.scaling_aware_transpose(q, rows)
    assert same_bits(permuted, kernels.scaling_aware_transpose.twin(q, rows))
    gathered = kernels.gather_rows(q, rows)
    assert same_bits(permuted, kernels.scaling_aware_transpose(gathered))


def test_zero_rows_do_not_flush_tiny_rows():
    x = torch.zeros(128, 128, device=DEVICE)
    x[::2] = data("plain", 64, 128, dtype=torch.float32) * 2 ** -10
    y = kernels.dequantize(kernels.scaling_aware_transpose(kernels.quantize(x)))
    assert sqnr(y.t(), x) > 30
    zeros = torch.zeros(128, 256, device=DEVICE)
    zero = kernels.scaling_aware_transpose(kernels.quantize(zeros))
    assert (zero.scale == SCALE_MIN).all() and (zero.data.view(torch.uint8) == 0).all()


def test_nan_stays_in_its_block():
    x = data("plain", 128, 256)
    clean = kernels.dequantize(kernels.scaling_aware_transpose(kernels.quantize(x)))
    x[3, 200] = torch.inf
    y = kernels.dequantize(kernels.scaling_aware_transpose(kernels.quantize(x)))
    assert y[128:, 3].isnan().all() and y.isnan().sum() == 128
    y[128:, 3] = clean[128:, 3]
    assert sqnr(y, clean) > 30


def requantized(q: QTensor) -> QTensor:
    """Row-wise to column-wise through fp32, by plain PyTorch between the two casts."""
    return kernels.quantize(kernels.dequantize(q).t(), q.policy)


def test_direct_transpose_against_requantizing():
    """Power-of-two scales are what cures the double quantization error; the direct transpose makes
    it cheap."""
    x = data("plain", 512, 512, dtype=torch.float32)
    fp32 = kernels.quantize(x, "fp32")
    pow2 = kernels.quantize(x, "pow2")
    fp32_twice = requantized(fp32)
    pow2_twice = requantized(pow2)
    direct = kernels.scaling_aware_transpose(pow2)
    lost_fp32 = sqnr(kernels.dequantize(fp32), x) - sqnr(kernels.dequantize(fp32_twice).t(), x)
    lost_pow2 = sqnr(kernels.dequantize(pow2), x) - sqnr(kernels.dequantize(pow2_twice).t(), x)
    lost_direct = sqnr(kernels.dequantize(pow2), x) - sqnr(kernels.dequantize(direct).t(), x)
    assert lost_fp32 > 2                        # about 3 dB: a second rounding
    assert lost_pow2 < 0.2 and lost_direct < 0.2


@pytest.mark.parametrize("scales", ["pow2", "fp32"])
@pytest.mark.parametrize("kind", ["plain", "heavy", "gradient"])
@pytest.mark.parametrize("M, C", TILES)
def test_requantize(M, C, kind, scales):
    """One launch for three. With powers of two the bits are the same; with fp32 scales the three
    round to bf16 on the way, which moves a few codes."""
    q = kernels.quantize(data(kind, M, C), scales)
    got = kernels.requantize(q, scales)
    assert got.data.shape == (C, M) and same_bits(got, kernels.requantize.twin(q, scales))
    assert same_bits(got, requantized(q))
    through_bf16 = kernels.transpose(kernels.dequantize(q, torch.bfloat16))
    three = kernels.quantize(through_bf16, scales)
    if scales == "pow2":
        assert same_bits(got, three)
    else:
        assert sqnr(kernels.dequantize(got), kernels.dequantize(three)) > 30
    tile_expert = int32([0] * (M // BLOCK - 1) + [-1])
    used = M - BLOCK
    skipped = kernels.requantize(q, scales, tile_expert)
    assert torch.equal(skipped.data.view(torch.uint8)[:, :used],
                       got.data.view(torch.uint8)[:, :used])
    assert torch.equal(skipped.scale[:used // BLOCK], got.scale[:used // BLOCK])


# ---- SwiGLU: against fp64, and the emitted codes against quantizing the unquantized result -------

def swiglu_exact(h, prob, da):
    h = h.double().requires_grad_()
    prob = prob.double().requires_grad_()
    gate, up = h.chunk(2, -1)
    a = torch.nn.functional.silu(gate) * up * prob[:, None]
    a.backward(da.double())
    return a.detach(), h.grad, prob.grad


SWIGLU_SHAPES = [(3, 128), (128, 384)]          # 384: a row is three steps of 128 columns
if CUDA:
    SWIGLU_SHAPES += [(1024, 2048), (640, 1408), (256, 14336)]


@pytest.mark.parametrize("scales", ["pow2", "fp32"])
@pytest.mark.parametrize("M, width", SWIGLU_SHAPES)
def test_swiglu(M, width, scales):
    h = data("plain", M, 2 * width) * 3
    da = data("plain", M, width, seed=1)
    prob = torch.rand(M, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    prob[0] = 0                                 # a padding slot
    a, dh, dprob = swiglu_exact(h, prob, da)

    assert sqnr(kernels.swiglu(h, prob), a) > 50            # bf16 rounds at 2^-9: 56 dB
    got_dh, got_dprob, no_a = kernels.swiglu_backward(da, h, prob)
    assert no_a is None and sqnr(got_dh, dh) > 50 and sqnr(got_dprob, dprob) > 110

    a_fp8 = kernels.swiglu(h, prob, scales)
    dh_fp8, fused_dprob, a_again = kernels.swiglu_backward(da, h, prob, scales)
    assert sqnr(fused_dprob, dprob) > 110
    assert same_bits(a_fp8, a_again)            # backward makes the same codes again
    for got, exact in ((a_fp8, a), (dh_fp8, dh)):
        want = kernels.quantize.twin(exact.float(), scales)
        assert got.scale.shape == want.scale.shape
        different = got.data.view(torch.uint8) != want.data.view(torch.uint8)
        assert different.float().mean() < 1e-3              # ties, in the last ulp
        assert sqnr(kernels.dequantize(got), kernels.dequantize(want)) > 45
        assert sqnr(kernels.dequantize(got), exact) > 30


@pytest.mark.skipif(not CUDA, reason="2^31 elements, 5 GB: the interpreter would take hours")
def test_offsets_beyond_2_31():
    M = 300_032
    width = 4096                                # M * 2F = 2.46e9 elements
    h = torch.randn(M, 2 * width, device=DEVICE, dtype=torch.bfloat16)
    prob = torch.rand(M, device=DEVICE)
    q = kernels.swiglu(h, prob, "pow2")
    tail = kernels.swiglu(h[-256:].contiguous(), prob[-256:].contiguous(), "pow2")
    assert torch.equal(q.data[-256:].view(torch.uint8), tail.data.view(torch.uint8))
    x = kernels.gather_rows(h, torch.arange(M - 256, M, device=DEVICE))
    assert torch.equal(x, h[-256:])
    wide = kernels.scaling_aware_transpose(kernels.quantize(h))
    corner = QTensor(wide.data[-128:, -128:].contiguous(), wide.scale[-1:, -1:], "pow2")
    alone = kernels.quantize(h[-128:, -128:].contiguous())
    assert same_bits(corner, kernels.scaling_aware_transpose(alone))


# ---- moving rows ---------------------------------------------------------------------------------

GATHERS = [(5, 128, 256), (130, 384, 384)]
if CUDA:
    GATHERS += [(4096, 7168, 8192), (999, 1408, 3072)]


@pytest.mark.parametrize("T, C, M", GATHERS)
def test_gather_and_sum_rows(T, C, M):
    rows = torch.randint(-1, T, (M,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    rows[:7] = -1
    x = data("gradient", T, C)
    assert torch.equal(kernels.gather_rows(x, rows), kernels.gather_rows.twin(x, rows))
    q = kernels.quantize(x)
    got = kernels.gather_rows(q, rows)
    assert same_bits(got, kernels.gather_rows.twin(q, rows))
    assert (got.data[:7].view(torch.uint8) == 0).all() and (got.scale[:, :7] == SCALE_MIN).all()
    want = torch.where((rows >= 0)[:, None], kernels.dequantize(q)[rows], 0)
    assert torch.equal(kernels.dequantize(got), want)
    for top_k in (1, 2, 5):
        g = torch.Generator().manual_seed(4)
        slots = torch.randint(0, T, (M, top_k), generator=g).to(DEVICE)
        assert torch.equal(kernels.sum_rows(x, slots), kernels.sum_rows.twin(x, slots))


def test_views_are_taken_as_they_read():
    """A transposed view goes in as its contiguous copy would."""
    x = data("plain", 256, 128).t()
    prob = torch.linspace(0, 1, 256, device=DEVICE)[::2]
    assert same_bits(kernels.quantize(x), kernels.quantize(x.contiguous()))
    straight = kernels.swiglu(x.contiguous(), prob.contiguous(), "pow2")
    assert same_bits(kernels.swiglu(x, prob, scales="pow2"), straight)
    rows = torch.arange(256, device=DEVICE)[::2] // 2       # every second of an int64 tensor
    assert torch.equal(kernels.gather_rows(x, rows), x)
    assert torch.equal(kernels.sum_rows(x, rows[:, None]), x)
    da = data("plain", 128, 128, seed=1).t()
    straight = kernels.swiglu_backward(da.contiguous(), x.contiguous(), prob.contiguous())
    views = {"da": da, "h": x, "prob": prob}    # keyword arguments, too
    for got, want in zip(kernels.swiglu_backward(**views)[:2], straight):
        assert torch.equal(got, want)
    q = kernels.quantize(x)
    w, _ = kernels.quantize_weight(data("plain", 128, 256, dtype=torch.float32)[None])
    strided = q._replace(data=q.data.view(torch.uint8).t().contiguous().t().view(FP8))
    tile_expert = int32([[0, -1]])
    ends = int32([[128, 0]])
    assert torch.equal(kernels.grouped_gemm(strided, w, tile_expert[:, 0], ends[:, 0]),
                       kernels.grouped_gemm(q, w, tile_expert[0, :1], ends[0, :1]))


def test_unused_tiles_are_left_alone(monkeypatch):
    """What a kernel does not write keeps the bytes that it had."""
    new_empty = torch.Tensor.new_empty

    def marked(*arguments, **options):
        out = new_empty(*arguments, **options)
        out.view(torch.uint8).fill_(0x33)
        return out
    monkeypatch.setattr(torch.Tensor, "new_empty", marked)
    tile_expert = int32([0, -1, 2])
    x = data("plain", 384, 128)
    h = data("plain", 384, 256)
    prob = torch.ones(384, device=DEVICE)
    q = kernels.quantize(x)
    rows = torch.arange(384, device=DEVICE)
    dh, dprob, a = kernels.swiglu_backward(x, h, prob, "pow2", tile_expert)
    dh_bf16, dprob_bf16, _ = kernels.swiglu_backward(x, h, prob, None, tile_expert)
    row_wise = [
        kernels.quantize(x, "pow2", tile_expert).data,
        kernels.dequantize(q, torch.float32, tile_expert),
        kernels.gather_rows(x, rows, tile_expert), kernels.gather_rows(q, rows, tile_expert).data,
        kernels.swiglu(h, prob, None, tile_expert), dh.data, dprob[:, None], a.data,
        kernels.swiglu(h, prob, "pow2", tile_expert).data,
        dh_bf16, dprob_bf16[:, None]]
    column_wise = [kernels.scaling_aware_transpose(q, None, tile_expert).data.t(),
                   kernels.requantize(q, "pow2", tile_expert).data.t()]
    for out in row_wise + column_wise:
        untouched = out.contiguous().view(torch.uint8)[128:256] == 0x33
        assert untouched.all()
    assert (kernels.transpose(x, tile_expert)[:, 128:256] == 0).all()       # quantize reads these.


def test_unused_tiles_are_skipped():
    """In the tiles that are used, every kernel writes what it writes without a list of tiles."""
    tile_expert = int32([0, -1, 2])
    used = torch.tensor([True, False, True], device=DEVICE).repeat_interleave(BLOCK)
    x = data("plain", 384, 128)
    rows = torch.arange(384, device=DEVICE) // 2
    assert torch.equal(kernels.gather_rows(x, rows, tile_expert)[used], x[rows][used])
    h = data("plain", 384, 256)
    prob = torch.ones(384, device=DEVICE)
    got = kernels.swiglu(h, prob, None, tile_expert)
    assert torch.equal(got[used], kernels.swiglu(h, prob)[used])
    codes = kernels.swiglu(h, prob, "pow2", tile_expert).data.view(torch.uint8)
    full = kernels.swiglu(h, prob, "pow2").data.view(torch.uint8)
    assert torch.equal(codes[used], full[used])
    q = kernels.quantize(x)
    rowwise = kernels.quantize(x, "pow2", tile_expert)
    assert torch.equal(rowwise.data.view(torch.uint8)[used], q.data.view(torch.uint8)[used])
    assert torch.equal(rowwise.scale[:, used], q.scale[:, used])
    narrow = kernels.dequantize(q, torch.bfloat16, tile_expert)
    assert torch.equal(narrow[used], kernels.dequantize(q, torch.bfloat16)[used])
    assert torch.equal(kernels.transpose(x, tile_expert)[:, used], x.t()[:, used])


# ---- grouped GEMM: against fp64 on the dequantized operands, so that quantization error cannot
# hide a bug ---------------------------------------------------------------------------------------

COUNTS = [[1, 0, 2]]                            # tiles of each expert
HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
LEVELS = ["loop", "hopper"] if HOPPER else ["loop"]
# N: 128 is half of a Hopper tile, the last tile of 384 and 1408 is half. K: one step, odd, many.
GEMM_SIZES = [(256, 384), (128, 128)]
WGRAD_SIZES = [(128, 384)]
if CUDA:
    COUNTS += [[3, 0, 7, 1, 0, 12], [0, 0, 32], [16, 16, 16, 16, 16, 16, 16]]
    GEMM_SIZES += [(384, 128), (1408, 2048), (4096, 1280)]
    WGRAD_SIZES += [(2048, 1408), (256, 128)]


def expert_tiles(counts):
    """counts in tiles -> tile_expert (with one unused tile at the end) and ends."""
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ends = torch.tensor(counts).cumsum(0) * BLOCK
    return int32([*expert.tolist(), -1]), int32(ends.tolist())


def at_every_level(gemm):
    """The result of `gemm()`, from every kernel that runs here: the same bits."""
    results = []
    for level in LEVELS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "use_hopper_gemm", lambda x: level == "hopper")
            results.append(gemm())
    for other in results[1:]:
        same = torch.equal(results[0].view(torch.uint8), other.view(torch.uint8))
        assert same, "level 3 differs from level 2"
    return results[-1]


@pytest.mark.parametrize("scales", ["pow2", "fp32"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("N, K", GEMM_SIZES)
def test_grouped_gemm(N, K, counts, scales):
    tile_expert, ends = expert_tiles(counts)
    M = len(tile_expert) * BLOCK
    E = len(counts)
    a = kernels.quantize(vary_blocks(data("gradient", M, K)), scales)
    w = vary_blocks(data("plain", E * N, K, seed=1, dtype=torch.float32)).view(E, N, K)
    b, _ = kernels.quantize_weight(w, scales)
    used = sum(counts) * BLOCK
    out = at_every_level(lambda: kernels.grouped_gemm(a, b, tile_expert, ends)[:used])
    assert out.shape == (used, N) and out.dtype == torch.bfloat16
    x = kernels.dequantize(a).double()[:used]
    w = kernels.dequantize.twin(b).double()
    expert = tile_expert.repeat_interleave(BLOCK)[:used]
    for e in range(E):
        mine = expert == e
        if counts[e]:
            want = x[mine] @ w[e].T
            # Every row counts, tiny ones too.
            unit = want.square().mean(1, keepdim=True).sqrt().clamp(min=1e-300)
            assert sqnr(out[mine].double() / unit, want / unit) > 50    # bf16 rounds: 56 dB


def wgrad_operand(kind: str, slots: int, C: int) -> QTensor:
    x = vary_blocks(data("plain", slots, C, seed=C))
    if kind == "column":
        return kernels.quantize(x.t())
    return kernels.scaling_aware_transpose(kernels.quantize(x))


@pytest.mark.parametrize("kind", ["tile", "column"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("M, N", WGRAD_SIZES)
def test_grouped_wgrad(M, N, counts, kind):
    """Scales a tile (from the direct transpose), and scales a column (requantized)."""
    tile_expert, ends = expert_tiles(counts)
    slots = len(tile_expert) * BLOCK
    a = wgrad_operand(kind, slots, M)
    b = wgrad_operand(kind, slots, N)
    x = kernels.dequantize(a).double()
    y = kernels.dequantize(b).double()
    for dtype, bar in ((torch.float32, 70), (torch.bfloat16, 50)):
        # The tensor core keeps about 14 bits and truncates: 0.01% of error on promoted sums of 128.
        out = at_every_level(lambda: kernels.grouped_wgrad(a, b, ends, dtype))
        assert out.shape == (len(counts), M, N) and out.dtype == dtype
        begin = 0
        for e, end in enumerate(ends.tolist()):
            if end > begin:
                assert sqnr(out[e], x[:, begin:end] @ y[:, begin:end].T) > bar
            else:
                assert (out[e] == 0).all()      # zeros, not what was there
            begin = end


def test_gemms_repeat_and_leave_unused_tiles_alone():
    """Loads, products and promotions overlap: a missing wait shows as a differing run. Unused tiles
    hold anything."""
    runs = 60 if CUDA else 2
    counts = [9, 0, 23, 31] if CUDA else [1, 0, 1]
    N = 2048 if CUDA else 128
    K = 1408 if CUDA else 256
    tile_expert, ends = expert_tiles(counts)
    slots = len(tile_expert) * BLOCK
    used = sum(counts) * BLOCK
    x = kernels.quantize(data("plain", slots, K))
    dy = kernels.quantize(data("plain", slots, N))
    master = data("plain", len(counts) * N, K, dtype=torch.float32).view(-1, N, K)
    w, _ = kernels.quantize_weight(master)
    direct = [kernels.scaling_aware_transpose(dy), kernels.scaling_aware_transpose(x)]
    twice = [requantized(dy), requantized(x)]

    def run():
        return (kernels.grouped_gemm(x, w, tile_expert, ends)[:used],
                kernels.grouped_wgrad(*direct, ends),
                kernels.grouped_wgrad(*twice, ends, torch.bfloat16))

    first = run()
    assert all(result.isfinite().all() for result in first)
    x.data.view(torch.uint8)[used:] = 0x7F
    x.scale[:, used:] = torch.nan
    for q in direct + twice:
        q.data.view(torch.uint8)[:, used:] = 0x7F
        q.scale[used // BLOCK:] = torch.nan
    for _ in range(runs - 1):
        for again, before in zip(run(), first):
            assert torch.equal(again, before)


@pytest.mark.skipif(not CUDA, reason="2^31 elements, 9 GB: the interpreter would take hours")
def test_gemm_offsets_beyond_2_31():
    slots = 2 ** 20 + 1024
    C = 2048
    x = data("plain", 1024, C).repeat(slots // 1024, 1)     # the last rows are the first
    q = kernels.quantize(x)
    w, _ = kernels.quantize_weight(data("plain", 128, C, dtype=torch.float32)[None])
    tile_expert = torch.zeros(slots // BLOCK, dtype=torch.int32, device=DEVICE)
    ends = int32([slots - 1024, slots])
    out = at_every_level(lambda: kernels.grouped_gemm(q, w, tile_expert, ends[1:]))
    assert torch.equal(out[:1024], out[-1024:]) and out.float().std() > 1
    a = kernels.scaling_aware_transpose(q)
    b = QTensor(a.data[-256:], a.scale[:, -2:], "pow2")
    dw = at_every_level(lambda: kernels.grouped_wgrad(a, b, ends))
    a_first = QTensor(a.data[:, :1024], a.scale[:8], "pow2")
    b_first = QTensor(b.data[:, :1024], b.scale[:8], "pow2")
    first = kernels.grouped_wgrad(a_first, b_first, int32([1024]))
    assert torch.equal(dw[1], first[0])         # expert 1 has the last 1024 slots


# ---- both GEMM kernels, compiled for GPUs that are not here --------------------------------------

# WGRAD, A_PER, B_PER, bytes of an element of out: fprop and dgrad; wgrad; wgrad of the requantized.
COMPILED = [(False, 1, 128, 2), (True, 128, 128, 2), (True, 128, 128, 4), (True, 1, 1, 2),
            (True, 1, 1, 4)]
LOOP_CAPABILITIES = (89, 90, 100, 120)


def compile_gemms(half: int) -> None:
    """Compiles every second case and prints the shared memory that each kernel needs. Runs in a
    process of its own, without the interpreter: python test_fp8flow.py HALF."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource
    for wgrad, a_per, b_per, out_bytes in COMPILED[half::2]:
        name, dtype = ("bf16", torch.bfloat16) if out_bytes == 2 else ("fp32", torch.float32)
        columns, options = kernels.hopper_options(b_per, out_bytes)
        layout = {"WGRAD": wgrad, "A_PER": a_per, "B_PER": b_per}
        if wgrad:
            layout["tile_expert"] = None
        loop = kernels._grouped_wgrad_kernel if wgrad else kernels._grouped_gemm_kernel
        operand = tma_type("fp8e4nv", FP8, BLOCK, BLOCK)
        types = {"a": operand, "b": operand, "out": tma_type(name, dtype, BLOCK // 2, columns)}
        constants = {"STAGES": options.pop("STAGES"), "BUFFERS": options.pop("BUFFERS"),
                     "PROGRAMS": 132}
        compile_one("hopper", 90, GluonASTSource, kernels._hopper_gemm_kernel, types,
                    constants | layout, options)
        types = {"a": "*fp8e4nv", "b": "*fp8e4nv", "out": f"*{name}"}
        for capability in LOOP_CAPABILITIES:
            compile_one("loop", capability, ASTSource, loop, types, {"PER": b_per} if wgrad else {},
                        {"num_warps": 8, "num_stages": 3})


def tma_type(name: str, dtype: torch.dtype, rows: int, columns: int) -> str:
    layout = kernels._shared_layout((rows, columns), dtype)
    return f"tensordesc<{name}[{rows}, {columns}],{layout!r}>"


def compile_one(level, capability, source, kernel, types, constants, options) -> None:
    from triton.backends.compiler import GPUTarget
    types = {"a_scale": "*fp32", "b_scale": "*fp32", "tile_expert": "*i32", "ends": "*i32"} | types
    signature = {}
    attributes = {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name][0] in "*i":
            attributes[(i,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source(kernel, signature, constants, attributes), target=target,
                              options=options)
    print("RESULT", level, capability, compiled.metadata.shared, flush=True)


def plain_environment(**others) -> dict:
    """For a process that runs what a user runs: without the interpreter."""
    environment = dict(os.environ, **others)
    environment.pop("TRITON_INTERPRET", None)
    return environment


def test_gemms_compile_without_a_gpu(tmp_path):
    """Both GEMM kernels for every layout of scales, by whatever Triton is installed: no spills, and
    they fit in the shared memory of the GPUs they are meant for: 227 KB on Hopper; 99 KB, what 8.9
    and 12.0 have, for the loop."""
    environment = plain_environment(TRITON_CACHE_DIR=str(tmp_path), TRITON_DUMP_PTXAS_LOG="1")
    processes = []
    lines = []
    try:
        for half in ("0", "1"):                 # two cores, two processes
            command = [sys.executable, __file__, half]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                              stderr=subprocess.STDOUT, env=environment))
        for process in processes:
            lines += process.communicate()[0].splitlines()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], lines
    results = [line.split()[1:] for line in lines if line.startswith("RESULT")]
    expected = len(COMPILED) * (1 + len(LOOP_CAPABILITIES))
    assert len(results) == expected
    for level, capability, shared in results:
        limit = (227 if level == "hopper" else 99) * 1024
        assert int(shared) <= limit, f"{level} for sm_{capability} needs {shared} bytes"
    spills = [line for line in lines if "bytes spill stores" in line]
    assert len(spills) == expected
    for line in spills:
        assert "0 bytes spill stores, 0 bytes spill loads" in line


# ---- routing -------------------------------------------------------------------------------------

ROUTES = [  # T, E, K and the reason
    (300, 4, 2, "T*K is no multiple of 128"),
    (1, 4, 1, "one token"),
    (130, 5, 1, "K = 1, prime E"),
    (64, 3, 3, "K = E: every expert sees every token"),
    (200, 7, 2, "prime E"),
    (128, 2, 2, "tiles without padding"),
    (1, 256, 8, "most experts without a token"),
    (40, 1, 1, "one expert"),
]


def routing(T, E, K, kind="random", seed=0):
    """top_k_index [T, K] without repeats in a row, weights [T, K] that sum to 1."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(T, E, generator=g)
    if kind == "one":
        scores[:, 1] += 10                      # expert 1 is the first choice of all
    if kind == "empty":
        scores[:, E // 2] -= 10                 # one in the middle is chosen by none
    weights, index = scores.softmax(-1).topk(K, dim=-1)
    return index.to(DEVICE), (weights / weights.sum(-1, keepdim=True)).to(DEVICE)


@pytest.mark.parametrize("kind", ["random", "one", "empty"])
@pytest.mark.parametrize("T, E, K, reason", ROUTES)
def test_plan(T, E, K, reason, kind):
    if E == 1 or (kind == "empty" and K == E):
        kind = "random"                         # No expert can be empty, or there is no other.
    index, _ = routing(T, E, K, kind)
    check_plan(index, E)


def test_200_plans(twins_on_cpu):
    g = torch.Generator().manual_seed(0)
    for seed in range(200):
        T, E = (int(torch.randint(1, high, (), generator=g)) for high in (300, 40))
        K = int(torch.randint(1, E + 1, (), generator=g))
        check_plan(routing(T, E, K, seed=seed)[0], E)


def check_plan(index, E):
    T, K = index.shape
    plan = fp8flow.make_plan(index, E)
    M = len(plan.token)
    pairs = torch.arange(T * K, device=DEVICE)
    # Static, a function of T, K and E: no more than T * K experts have slots.
    assert M == -(-(T * K + min(E, T * K) * 127) // BLOCK) * BLOCK
    counts = torch.stack([(index == e).sum() for e in range(E)])
    padded = (counts + 127) // BLOCK * BLOCK
    assert torch.equal(plan.ends, padded.cumsum(0).int())
    live = plan.pair >= 0
    assert live.sum() == T * K and torch.equal(plan.pair[live].sort().values, pairs)
    assert torch.equal(plan.pair[plan.slot.flatten()], pairs)           # inverse
    assert torch.equal(plan.token[live], plan.pair[live] // K)
    assert (plan.token[~live] == -1).all()
    expert_of_slot = plan.tile_expert.repeat_interleave(BLOCK)
    assert torch.equal(expert_of_slot[live], index.flatten()[plan.pair[live]].int())
    used = plan.ends[-1] // BLOCK
    assert (plan.tile_expert[used:] == -1).all() and (plan.tile_expert[:used] >= 0).all()
    rows = plan.sorted_pairs
    row = rows.row_of_pair.flatten()
    assert torch.equal(rows.slot[row], plan.slot.flatten())
    assert torch.equal(rows.token[row], pairs // K)
    assert torch.equal(rows.row_of_slot[rows.slot], pairs)
    # A stable sort: in each expert pairs keep their order.
    assert (rows.slot.diff() > 0).all() and (plan.pair[live].diff()[
        expert_of_slot[live].diff() == 0] > 0).all()


def test_plan_by_hand(monkeypatch):
    """The example in make_plan's docstring, with 4 for 128."""
    monkeypatch.setattr(kernels, "use_kernels", lambda device: False)
    monkeypatch.setattr(kernels, "BLOCK", 4)
    plan = fp8flow.make_plan(torch.tensor([[2, 0], [2, 1]]), 3)
    assert plan.pair.tolist() == [1, -1, -1, -1, 3, -1, -1, -1, 0, 2, -1, -1, -1, -1, -1, -1]
    assert plan.token.tolist() == [0, -1, -1, -1, 1, -1, -1, -1, 0, 1, -1, -1, -1, -1, -1, -1]
    assert plan.slot.tolist() == [[8, 0], [9, 4]] and plan.tile_expert.tolist() == [0, 1, 2, -1]
    assert plan.ends.tolist() == [4, 8, 12]


def test_permute_round_trip():
    """Fused and unfused permute+pad agree, and unpermute(permute(x)) is K times x."""
    index, _ = routing(70, 5, 2)
    plan = fp8flow.make_plan(index, 5)
    x = data("plain", 70, 128)
    q = kernels.quantize(x)
    fused = fp8flow.Recipe(permute="fused")
    unfused = fp8flow.Recipe(permute="unfused")
    used = (plan.tile_expert >= 0).repeat_interleave(BLOCK)
    assert torch.equal(fp8flow.permute(x, plan, fused)[used],
                       fp8flow.permute(x, plan, unfused)[used])
    a = fp8flow.permute(q, plan, fused)
    b = fp8flow.permute(q, plan, unfused)
    assert torch.equal(kernels.dequantize(a, tile_expert=plan.tile_expert)[used],
                       kernels.dequantize(b, tile_expert=plan.tile_expert)[used])
    for recipe in (fused, unfused):
        there_and_back = fp8flow.unpermute(fp8flow.permute(x, plan, recipe), plan, recipe)
        assert torch.equal(there_and_back, 2 * x)


# ---- the layer -----------------------------------------------------------------------------------

class Inputs:
    """A layer's inputs: x [T, D], index and weights [T, K], w1, w2 and dy."""

    def __init__(self, T, D, width, E, K, kind="random", seed=0):
        self.index, self.weights = routing(T, E, K, kind, seed)
        g = torch.Generator().manual_seed(seed + 1)
        self.x = torch.randn(T, D, generator=g).to(DEVICE, torch.bfloat16)
        self.dy = torch.randn(T, D, generator=g).to(DEVICE, torch.bfloat16)
        self.w1 = (torch.randn(E, 2 * width, D, generator=g) * D ** -0.5).to(DEVICE)
        self.w2 = (torch.randn(E, D, width, generator=g) * width ** -0.5).to(DEVICE)

    def leaves(self):
        """x, weights, w1, w2 as fresh leaves that want gradients."""
        tensors = (self.x, self.weights, self.w1, self.w2)
        return [t.detach().clone().requires_grad_() for t in tensors]


def small_inputs() -> Inputs:
    return Inputs(20, 128, 128, 2, 1)


def run_layer(recipe, inputs: Inputs):
    """(y, dx, dweights, dw1, dw2)."""
    x, weights, w1, w2 = leaves = inputs.leaves()
    y = fp8flow.experts(x, inputs.index, weights, w1, w2, recipe)
    y.backward(inputs.dy.to(y.dtype))
    return y.detach(), *(leaf.grad for leaf in leaves)


def build_layer(recipe, inputs: Inputs) -> fp8flow.Experts:
    E, D, width = inputs.w2.shape
    layer = fp8flow.Experts(E, D, width, recipe).to(DEVICE)
    layer.load_state_dict({"w1": inputs.w1, "w2": inputs.w2})
    return layer


NAMES = ["y", "dx", "dweights", "dw1", "dw2"]
# Each FP8 operand adds 2.7% of noise (31.5 dB), and an output passes three or four of them:
# 31.5 - 10 log10(4) = 25.5 before SwiGLU spreads it. fp32 scales requantized add a second rounding
# to half of the wgrad operands.
FP8_BAR = 22
REQUANT_BAR = 20
BF16_BAR = 42
BARS = {"bf16": BF16_BAR, "naive": REQUANT_BAR, "flow": FP8_BAR}

LAYERS = [(150, 128, 256, 3, 2, "empty")]
if CUDA:
    LAYERS += [(2048, 1024, 1408, 8, 2, "random"), (1000, 2048, 512, 7, 3, "one"),
               (4096, 512, 1536, 16, 4, "empty")]


@pytest.mark.parametrize("recipe", list(fp8flow.RECIPES))
@pytest.mark.parametrize("T, D, width, E, K, kind", LAYERS)
def test_layer_against_fp64(T, D, width, E, K, kind, recipe):
    inputs = Inputs(T, D, width, E, K, kind)
    x, weights, w1, w2 = leaves = inputs.leaves()
    y = fp8flow.exact_layer(x, inputs.index, weights, w1, w2)
    y.backward(inputs.dy.double())
    exact = [y.detach(), *(leaf.grad for leaf in leaves)]
    for name, got, want in zip(NAMES, run_layer(recipe, inputs), exact):
        assert got.shape == want.shape
        assert sqnr(got, want) > BARS[recipe], f"{name}: {sqnr(got, want):.1f} dB"
        if name.startswith("dw1") and kind == "empty":
            assert (got[E // 2] == 0).all()


@pytest.mark.parametrize("recipe", list(fp8flow.RECIPES))
def test_twins_and_kernels_agree(recipe, monkeypatch):
    inputs = Inputs(100, 128, 128, 3, 2)
    with_kernels = run_layer(recipe, inputs)
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    for name, a, b in zip(NAMES, with_kernels, run_layer(recipe, inputs)):
        # bf16 rounding of H moves a few codes by one.
        assert sqnr(a, b) > 38, f"{name}: {sqnr(a, b):.1f} dB"


def test_nan_reaches_the_output_of_its_token_only():
    inputs = Inputs(100, 128, 128, 3, 2)
    inputs.x[7, 3] = torch.inf
    y = run_layer("flow", inputs)[0]
    assert y[7].isnan().all() and y[:7].isfinite().all() and y[8:].isfinite().all()


class NoSync(TorchDispatchMode):
    """What would make the host wait for a GPU, told on any device: values it reads, shapes that
    depend on data."""
    WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount",
             "repeat_interleave", "equal"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name == "index" else []
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        assert name not in self.WAITS and not by_mask, f"{func} waits for the GPU"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", list(fp8flow.RECIPES))
def test_no_sync_in_the_layer(recipe, monkeypatch):
    """Weight casts, plan, forward and backward."""
    inputs = Inputs(256, 256, 256, 4, 2) if CUDA else small_inputs()
    if CUDA:
        run_layer(recipe, inputs)               # compiled before
        torch.cuda.set_sync_debug_mode("error")
    else:                                       # There the index is read and checked at once.
        monkeypatch.setattr(fp8flow, "check_index", lambda *arguments: None)
    monkeypatch.setattr(torch.Tensor, "tolist", None)       # It reads without a dispatch.
    try:
        with NoSync():
            run_layer(recipe, inputs)
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")


def test_no_second_derivative():
    """Whether dy wants a gradient, or a penalty on the gradient of x is what is differentiated."""
    inputs = small_inputs()
    x, weights, w1, w2 = inputs.leaves()
    for spec in ("bf16", "flow"):
        for dy in (inputs.dy, inputs.dy.clone().requires_grad_()):
            y = fp8flow.experts(x, inputs.index, weights, w1, w2, spec)
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(y, x, dy, create_graph=True)


@pytest.mark.parametrize("spec", ["bf16", "naive", "flow"])
def test_bytes_held_for_backward(spec, twins_on_cpu):
    """To the byte. Codes take one each, scales four for 128 of them, or for 128x128."""
    T, D, width, E, k = 200, 256, 384, 3, 2
    M = 896                                     # 400 pairs and 3 * 127 of padding, in tiles
    inputs = Inputs(T, D, width, E, k)
    held = {}
    plan = {"slot": 8 * T * k, "token": 8 * M, "pair": 8 * M, "tile_expert": 4 * M // BLOCK,
            "ends": 4 * E}
    in_bf16 = plan | {"H": 2 * M * 2 * width, "prob": 4 * M}
    weights_t = E * (2 * width * D + D * width)
    in_fp8 = in_bf16 | {"W^T": weights_t + 4 * weights_t // BLOCK ** 2}
    want = {
        "bf16": in_bf16 | {"X": 2 * M * D, "A": 2 * M * width, "W": 2 * weights_t},
        "naive": in_fp8 | {"X": M * D + M * D // 32, "A": M * width + M * width // 32},
        "flow": in_fp8 | {"X": T * D + T * D // 32},        # neither padded nor k times
    }[spec]

    def pack(tensor):
        held[tensor.data_ptr()] = tensor.nbytes
        return tensor

    x, weights, w1, w2 = inputs.leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fp8flow.experts(x, inputs.index, weights, w1, w2, spec)
    assert sum(held.values()) == sum(want.values()), (held, want)


@pytest.mark.parametrize("spec", ["bf16", "naive", "flow"])
def test_activations_do_not_outlive_backward(spec):
    """What backward has used is freed, even while the graph lives."""
    inputs = small_inputs()
    x = inputs.x.requires_grad_()
    w1 = inputs.w1.requires_grad_()
    y = fp8flow.experts(x, inputs.index, inputs.weights, w1, inputs.w2, spec)
    node = y.grad_fn
    while "Experts" not in node.name():         # behind the cast and the reshape of the result
        node = node.next_functions[0][0]
    kept = [value for name, value in vars(node).items() if name != "wgrad_dtypes"]
    assert kept == [fp8flow.parse_spec(spec)]               # no tensor, no plan
    assert sum(tensor is not None for tensor in node.saved_tensors) > 3
    y.backward(inputs.dy)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        node.saved_tensors                      # y and its graph live, what was saved is gone


def test_a_step_leaves_no_graph_behind(monkeypatch):
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    gpt = model.GPT(train_py.PRESETS["tiny"], fp8flow.RECIPES["flow"])
    text = torch.randint(256, (1, 17))
    loss, balance = gpt(text[:, :-1], text[:, 1:])
    (loss + balance).backward()
    for module in gpt.modules():
        for name, value in vars(module).items():
            assert not (isinstance(value, torch.Tensor) and value.grad_fn is not None), name


@pytest.fixture
def twins_on_cpu(monkeypatch):
    """For what does not depend on the kernels: on a CPU the twins, which are faster there."""
    if not CUDA:
        monkeypatch.setattr(kernels, "use_kernels", lambda x: False)


# ---- in other models: dtypes and shapes ----------------------------------------------------------

@pytest.mark.parametrize("spec", ["bf16", "naive", "flow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_comes_back(dtype, spec, twins_on_cpu):
    """Inside it is bf16: the same numbers, in the dtype of each input."""
    inputs = Inputs(24, 128, 128, 3, 2)
    want = run_layer(spec, inputs)
    inputs.index = inputs.index.int()
    inputs.x = inputs.x.to(dtype)
    inputs.weights = inputs.weights.to(dtype)
    if dtype == torch.float32:
        inputs.x = inputs.x.view(2, 12, 128)    # a batch of sequences
        inputs.dy = inputs.dy.view(2, 12, 128)
        inputs.index = inputs.index.view(2, 12, 2)
        inputs.weights = inputs.weights.view(2, 12, 2)
    got = run_layer(spec, inputs)
    assert [t.dtype for t in got] == [dtype, dtype, dtype, torch.float32, torch.float32]
    assert got[0].shape == inputs.x.shape == got[1].shape
    for name, a, b in zip(NAMES, got, want):
        if dtype == torch.float32:
            assert torch.equal(a.reshape(b.shape).to(b.dtype), b), name
        else:
            assert sqnr(a, b) > 30, name        # the router's weights were rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_in_any_dtype(dtype, twins_on_cpu):
    """The bits of fp32 masters that hold the same numbers; gradients are rounded once, to dtype."""
    inputs = small_inputs()
    inputs.w1 = inputs.w1.to(dtype).float()
    inputs.w2 = inputs.w2.to(dtype).float()
    want = run_layer("flow", inputs)
    inputs.w1 = inputs.w1.to(dtype)
    inputs.w2 = inputs.w2.to(dtype)
    got = run_layer("flow", inputs)
    assert got[3].dtype == got[4].dtype == dtype
    for name, a, b in zip(NAMES, got, want):
        assert torch.equal(a, b.to(a.dtype)), name
    inputs.w2 = inputs.w2.float()               # Each weight has a gradient of its own dtype.
    for name, a, b in zip(NAMES, run_layer("flow", inputs), want):
        assert torch.equal(a, b.to(a.dtype)), name


@pytest.mark.parametrize("spec", ["bf16", "flow"])
def test_no_tokens(spec, twins_on_cpu):
    inputs = small_inputs()
    inputs.x = inputs.x[:0]
    inputs.dy = inputs.dy[:0]
    inputs.index = inputs.index[:0]
    inputs.weights = inputs.weights[:0]
    y, dx, dweights, dw1, dw2 = run_layer(spec, inputs)
    assert y.shape == dx.shape == (0, 128) and dweights.shape == (0, 1)
    assert (dw1 == 0).all() and (dw2 == 0).all()


def test_a_row_sorted_by_expert_is_a_token_with_one_choice(twins_on_cpu):
    """What models hand over that permute before their experts (torchtitan, TransformerEngine)."""
    inputs = Inputs(60, 128, 128, 3, 2)
    for spec in ("bf16", "flow"):
        want = run_layer(spec, inputs)[0]
        pair = inputs.index.flatten().argsort(stable=True)
        rows = inputs.x[pair // 2]
        expert = inputs.index.flatten()[pair][:, None]
        weight = inputs.weights.flatten()[pair][:, None]
        y = fp8flow.experts(rows, expert, weight, inputs.w1, inputs.w2, spec)
        got = torch.zeros_like(want, dtype=torch.float32).index_add_(0, pair // 2, y.float())
        # In bf16 each row is rounded once more before the sum of a token's two rows.
        assert sqnr(got, want) > (45 if spec == "bf16" else 35)


# ---- in other models: weights --------------------------------------------------------------------

def loss_of(layer, inputs: Inputs):
    return layer(inputs.x, inputs.index, inputs.weights).float().square().mean()


def losses_of_five_steps(inputs: Inputs, update):
    layer = build_layer("flow", inputs)
    losses = []
    for _ in range(5):
        loss = loss_of(layer, inputs)
        loss.backward()
        losses.append(loss.item())
        update(layer)
        layer.zero_grad()
    return losses


def update_data(layer):
    for w in layer.parameters():
        w.data -= 0.5 * w.grad


@torch.no_grad()
def update_under_no_grad(layer):
    for w in layer.parameters():
        w -= 0.5 * w.grad


def test_weights_are_never_stale(monkeypatch):
    """However they change: through .data, under no_grad, by a fused optimizer, as an average that
    is swapped in and out, as another recipe."""
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    inputs = small_inputs()
    by_data = losses_of_five_steps(inputs, update_data)
    assert by_data == losses_of_five_steps(inputs, update_under_no_grad)
    assert by_data[-1] < by_data[0]

    layer = build_layer("flow", inputs)
    before = loss_of(layer, inputs)
    before.backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()
    after = loss_of(layer, inputs)
    assert after != before
    average = [torch.zeros_like(w) for w in layer.parameters()]
    for _ in range(2):                          # in, and out
        for w, other in zip(layer.parameters(), average):
            kept = w.data.clone()
            w.data.copy_(other)
            other.copy_(kept)
        if not average[0].any():
            continue
        assert loss_of(layer, inputs) == 0
    assert loss_of(layer, inputs) == after
    layer.recipe = "bf16"
    assert loss_of(layer, inputs) != after


def test_a_module_of_any_origin_works(twins_on_cpu):
    inputs = small_inputs()
    with torch.inference_mode():
        layer = fp8flow.Experts(2, 128, 128, device=DEVICE)
        assert layer(inputs.x, inputs.index, inputs.weights).isfinite().all()
    meta = fp8flow.Experts(2, 128, 128, "flow,swiglu=unfused", device="meta", dtype=torch.bfloat16)
    layer = meta.to_empty(device=DEVICE)
    layer.reset_parameters()
    assert layer.w1.dtype == torch.bfloat16 and 0.05 < layer.w1.std() < 0.15
    assert layer(inputs.x, inputs.index, inputs.weights).isfinite().all()
    assert "num_experts=2, dim=128, hidden_dim=128" in repr(layer)
    moved = layer.to(torch.float32)
    assert sorted(moved.state_dict()) == ["w1", "w2"]
    assert moved(inputs.x, inputs.index, inputs.weights).isfinite().all()
    weights = {"w1": layer.w1 * 2, "w2": layer.w2 * 2}
    arguments = (inputs.x, inputs.index, inputs.weights)
    doubled = torch.func.functional_call(layer, weights, arguments)
    assert not torch.equal(doubled, layer(*arguments))


# ---- in other models: autocast, frozen weights, checkpointing, compile, processes ----------------

@pytest.mark.parametrize("spec", ["bf16", "naive", "flow"])
def test_autocast_changes_no_bit(spec, twins_on_cpu):
    inputs = Inputs(24, 128, 128, 3, 2)
    plain = run_layer(spec, inputs)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE, dtype=dtype):           # backward is inside, too
            inside = run_layer(spec, inputs)
        for name, a, b in zip(NAMES, inside, plain):
            assert a.dtype == b.dtype and torch.equal(a, b), name


def test_the_router_stays_fp32(monkeypatch):
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    router = model.Router(128, 4, bias=False)
    x = torch.randn(8, 128).bfloat16()
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x), plain)
    assert plain.dtype == torch.float32 and router.bfloat16()(x).dtype == torch.float32
    tokens = torch.randint(256, (2, 17))
    gpt = model.GPT(train_py.PRESETS["tiny"], "flow")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = gpt(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    loss, _ = gpt.bfloat16()(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    for name, weight in gpt.named_parameters():
        assert weight.grad.isfinite().all(), name


@pytest.mark.parametrize("spec, casts, launches", [("naive", 2, 9), ("flow", 1, 6)])
def test_only_wanted_gradients(spec, casts, launches, twins_on_cpu):
    """With frozen experts backward makes no weight gradients, and no transposes for them; where
    one weight is frozen, the other has its gradient alone."""
    inputs = small_inputs()
    every = run_layer(spec, inputs)
    x = inputs.x.requires_grad_()
    layer = build_layer(spec, inputs).requires_grad_(False)
    y = layer(x, inputs.index, inputs.weights)
    with trace.record_launches() as record:
        y.backward(inputs.dy)
    assert torch.equal(x.grad, every[1])
    assert len(record) == launches
    assert sum(launch.cast != "" for launch in record) == casts
    x.requires_grad_(False)
    layer.requires_grad_(True)
    y = layer(x, inputs.index, inputs.weights)
    with trace.record_launches() as record:
        y.backward(inputs.dy)
    assert torch.equal(layer.w1.grad, every[3]) and torch.equal(layer.w2.grad, every[4])
    assert "dX" not in [launch.place.tensor for launch in record]
    for frozen, made in (("w1", "dW2"), ("w2", "dW1")):
        layer = build_layer(spec, inputs)
        getattr(layer, frozen).requires_grad_(False)
        y = layer(inputs.x, inputs.index, inputs.weights)
        with trace.record_launches() as record:
            y.backward(inputs.dy)
        products = [launch.place.tensor for launch in record if launch.op == "grouped_wgrad"]
        assert products == [made] and getattr(layer, frozen).grad is None


@pytest.mark.parametrize("recipe", list(fp8flow.RECIPES))
def test_checkpointing_is_bit_identical(recipe, twins_on_cpu):
    inputs = small_inputs()
    x, weights, w1, w2 = leaves = inputs.leaves()
    y = torch.utils.checkpoint.checkpoint(fp8flow.experts, x, inputs.index, weights, w1, w2, recipe,
                                          use_reentrant=False)
    y.backward(inputs.dy)
    again = [y.detach(), *(leaf.grad for leaf in leaves)]
    for a, b in zip(run_layer(recipe, inputs), again):
        assert torch.equal(a, b)


def test_one_graph_break(monkeypatch):
    """torch.compile stops at the experts, plan included, and nowhere else."""
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    torch._dynamo.reset()
    moe = model.MoE(train_py.PRESETS["tiny"], "flow")
    explanation = torch._dynamo.explain(moe)(torch.randn(2, 16, 128).bfloat16())
    assert explanation.graph_break_count == 1 and explanation.graph_count == 2
    assert "experts" in explanation.break_reasons[0].reason


def ddp_worker(rank: int, folder: Path) -> None:
    """One of two processes: three steps of a layer under DDP, on half of the tokens each."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        layer = torch.nn.parallel.DistributedDataParallel(fp8flow.Experts(2, 128, 128, "bf16"))
        losses = three_losses(layer, slice(16 * rank, 16 * rank + 16))
        torch.save(losses, folder / f"losses-{rank}.pt")
        # If DDP's reducer were the last to hold the group, it would free it with the GIL held, wait
        # for the group's threads, which may wait for the GIL, and never return.
        del layer
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()


def three_losses(layer, rows) -> list[float]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(32, 128, generator=g)[rows]
    index = (torch.arange(32) % 2)[rows, None]
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
    losses = []
    for _ in range(3):
        loss = layer(x, index, torch.ones_like(index).float()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_data_parallel_processes_learn_what_one_does(tmp_path, monkeypatch):
    processes = []
    try:
        for rank in ("0", "1"):
            command = [sys.executable, __file__, "ddp", rank, str(tmp_path)]
            environment = plain_environment(CUDA_VISIBLE_DEVICES="")
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment,
                                              stderr=subprocess.PIPE, text=True))
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], errors
    halves = [torch.load(tmp_path / f"losses-{rank}.pt") for rank in (0, 1)]
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    torch.manual_seed(0)
    alone = three_losses(fp8flow.Experts(2, 128, 128, "bf16"), slice(0, 32))
    for first, second, whole in zip(*halves, alone):
        assert abs((first + second) / 2 / whole - 1) < 0.01
    assert alone[2] < 0.9 * alone[0]


def test_a_package_beside_another_called_kernels(tmp_path):
    """`git clone URL fp8_flow_moe`, and `kernels` of PyPI is first on the path."""
    (tmp_path / "other" / "kernels").mkdir(parents=True)
    (tmp_path / "other" / "kernels" / "__init__.py").write_text("")
    (tmp_path / "fp8_flow_moe").symlink_to(ROOT)
    code = ("import kernels, fp8_flow_moe.model; from fp8_flow_moe.fp8flow import experts; "
            "from fp8_flow_moe.kernels import quantize; "
            "assert not hasattr(kernels, 'quantize')")
    path = os.pathsep.join([str(tmp_path / "other"), str(tmp_path)])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env=plain_environment(PYTHONPATH=path))
    assert done.returncode == 0, done.stderr


HUGGING_FACE = """
import sys, torch, kernels
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

device, errors = sys.argv[1], {}

def tiny(**changes):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, moe_intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_experts=8, num_experts_per_tok=2, max_position_embeddings=128, **changes)
    return Qwen3MoeForCausalLM(config).to(device)

def look_at(model):
    torch.manual_seed(1)
    tokens = torch.randint(256, (4, 128)).to(device)
    out = model(tokens, labels=tokens)
    out.loss.backward()
    experts = [weight.grad.flatten() for name, weight in model.named_parameters()
               if ".experts." in name]
    return {"logits": out.logits.detach(), "experts' gradients": torch.cat(experts)}

model = tiny()
model.set_experts_implementation("eager")
eager = look_at(model)
model = tiny()
LINES
for name, got in look_at(model).items():
    print(name, f"{(got - eager[name]).norm() / eager[name].norm():.4f}")
model = tiny(hidden_act="gelu")
model.set_experts_implementation("fp8flow")
try:
    look_at(model)
except ValueError as error:
    print("refused:", error)
"""


def test_the_hugging_face_lines_of_the_readme(tmp_path):
    """A Qwen3-MoE against eager, and one with GELU, beside PyPI's `kernels` where it is there."""
    pytest.importorskip("transformers")
    code = HUGGING_FACE.replace("LINES", indented("ALL_EXPERTS_FUNCTIONS"))
    (tmp_path / "fp8_flow_moe").symlink_to(ROOT)
    if importlib.util.find_spec("kernels").origin == str(ROOT / "kernels.py"):
        (tmp_path / "kernels.py").write_text("")            # PyPI's is hidden, or not installed.
    done = subprocess.run([sys.executable, "-c", code, DEVICE], cwd=tmp_path, text=True,
                          env=plain_environment(PYTHONPATH=str(tmp_path)), capture_output=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    logits, gradients, refused = done.stdout.splitlines()
    # 30 and 20 dB: a product of two operands with errors of 2.7% has 3.8%, and they add up.
    assert float(logits.split()[-1]) < 0.03 and float(gradients.split()[-1]) < 0.1
    assert refused.startswith("refused: Qwen3MoeExperts")


# ---- casts: counted as they happen, against the margin of the code -------------------------------

SPECS = [
    ("bf16", 0), ("naive", 12), ("flow", 2), ("naive,scales=pow2", 12),
    ("naive,transpose=requantize", 8), ("flow,transpose=requantize", 6),
    ("naive,scales=pow2,transpose=direct", 4), ("naive,swiglu=fused", 10),
    ("naive,permute=fused", 12), ("flow,transpose=unfused", 10), ("flow,swiglu=unfused", 4),
    ("flow,permute=unfused", 2)]


def launches_of_a_layer(spec) -> list:
    with fp8flow.count_casts() as casts, trace.record_launches() as launches:
        run_layer(spec, Inputs(1, 128, 128, 1, 1))
    assert casts == [launch.op for launch in launches if launch.cast]
    return [launch for launch in launches if launch.cast]


@pytest.mark.parametrize("spec, number", SPECS)
def test_casts(spec, number):
    casts = launches_of_a_layer(spec)
    assert len(casts) == number
    found = [(launch.place.tensor, launch.cast) for launch in casts]
    if number == 12:
        assert sorted(found) == sorted((tensor, kind) for tensor in ("X", "A", "dY", "dH")
                                       for kind in ("Q", "DQ", "Q'"))
    if number == 2:
        assert found == [("X", "Q"), ("dY", "Q")]
    assert kernels.hooks == []                  # Who counts leaves nothing behind.


@pytest.mark.parametrize("spec", ["naive", "naive,scales=pow2", "flow", "flow,swiglu=unfused",
                                  "naive,transpose=requantize", "naive,swiglu=fused"])
def test_every_fp8_tensor_has_the_scales_of_the_recipe(spec, monkeypatch, twins_on_cpu):
    """Weights, too: the dB of a layer do not tell the one from the other."""
    policies = set()

    def note(name, arguments, result):
        for x in result if type(result) is tuple else (result,):
            if isinstance(x, QTensor):
                policies.add(x.policy)
                # Unused tiles of activations hold anything.
                if name == "quantize_weight":
                    is_pow2 = (x.scale.log2() % 1 == 0).all()
                    assert is_pow2 == (x.policy == "pow2")
    monkeypatch.setattr(kernels, "hooks", [note])
    run_layer(spec, small_inputs())
    assert policies == {fp8flow.parse_spec(spec).scales}


def test_naive_casts_through_bf16(twins_on_cpu):
    """DQ, transpose, Q' of naive: what lies between the casts is bf16, which rounds once more."""
    plan = fp8flow.make_plan(torch.zeros(256, 1, dtype=torch.int64, device=DEVICE), 1)
    q = kernels.quantize(data("plain", len(plan.token), 128), "fp32")
    got = fp8flow.column_wise(q, plan, fp8flow.RECIPES["naive"])
    want = kernels.quantize.twin(kernels.dequantize.twin(q).bfloat16().t(), "fp32")
    assert torch.equal(got.data[:, :256].float(), want.data[:, :256].float())
    assert torch.equal(got.scale[:2], want.scale[:2])


@pytest.mark.parametrize("recipe", ["naive", "flow"])
def test_the_margin_of_the_layer_tells_the_casts(recipe):
    """On each line of the layer, '# naive 5 6: DQ(dY) Q'(dY)' says which casts run there, and as
    which numbers: those of a run."""
    lines, first = inspect.getsourcelines(fp8flow.FP8Experts)
    written = []
    for line, text in enumerate(lines, first):
        margin = re.search(rf"# .*{recipe} ([\d ]+).*: (.*)", text)
        if margin:
            casts = margin[2].split()
            for number, cast in zip(margin[1].split(), casts, strict=True):
                written.append((int(number), cast, line))
    ran = []
    for number, launch in enumerate(launches_of_a_layer(recipe), 1):
        ran.append((number, f"{launch.cast}({launch.place.tensor})", launch.place.line))
    assert sorted(written) == ran and len(ran) == {"naive": 12, "flow": 2}[recipe]


# ---- what is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("changes, says", [
    ({"scales": "fp32"}, "transpose=direct shifts exponents.*use scales=pow2"),
    ({"swiglu": "maybe"}, "swiglu must be one of fused, unfused; got 'maybe'"),
    ({"swiglu": True}, "swiglu must be one of fused, unfused; got True"),
    ({"precision": "bf16", "swiglu": "unfused"}, "swiglu=unfused is a switch of FP8")], ids=str)
def test_recipe_refuses(changes, says):
    with pytest.raises(ValueError, match=says):
        fp8flow.Recipe(**changes)


def test_specs():
    flow = fp8flow.Recipe()
    assert fp8flow.parse_spec("flow") == flow == fp8flow.parse_spec(flow)
    both = fp8flow.Recipe(swiglu="unfused", permute="unfused")
    assert fp8flow.parse_spec("flow,swiglu=unfused,permute=unfused") == both
    for spec, says in (("flaw", "'flaw'"), ("flow,fast=yes", "'flow,fast=yes'"), ("", "''"),
                       ("flow,swiglu=half", "'half'"), ("flow,swiglu", "''"),
                       ("flow,scales=fp32", "scales=pow2"), ("bf16,scales=fp32", "switch of FP8"),
                       ("flow,swiglu=fused,swiglu=unfused", "twice"), (None, "None")):
        with pytest.raises(ValueError, match=says):
            fp8flow.parse_spec(spec)


def misuse_of_kernels():
    """Each would read or write outside of a tensor, or be silently wrong."""
    k = kernels
    x = data("plain", 256, 256)
    h = data("plain", 256, 512)
    prob = torch.ones(256, device=DEVICE)
    w = data("plain", 256, 256, dtype=torch.float32)[None]
    q = k.quantize(x)
    b, _ = k.quantize_weight(w)
    narrow, _ = k.quantize_weight(w[..., :128])
    t = k.scaling_aware_transpose(q)
    rows = torch.arange(256, device=DEVICE)
    short = int32([0])
    tiles = int32([0, 0])
    ends = int32([256])
    return [
        lambda: k.quantize(x[:, :100]),
        lambda: k.quantize(x, "pow2", short),
        lambda: k.quantize(x, None),
        lambda: k.quantize.twin(x, "e8m0"),
        lambda: k.dequantize(q, torch.float32, short),
        lambda: k.dequantize(q._replace(scale=q.scale[:1])),
        lambda: k.scaling_aware_transpose(k.quantize(x, "fp32")),
        lambda: k.scaling_aware_transpose(k.quantize(x[:100])),
        lambda: k.scaling_aware_transpose(q, rows[:100]),
        lambda: k.scaling_aware_transpose(t),
        lambda: k.scaling_aware_transpose(q, None, short),
        lambda: k.transpose(x[:100]),
        lambda: k.requantize(k.quantize(x[:100])),
        lambda: k.requantize(t),
        lambda: k.swiglu(h[:, :128], prob),
        lambda: k.swiglu(h, prob[:100]),
        lambda: k.swiglu(h, prob, None, short),
        lambda: k.swiglu_backward(x, x, prob),
        lambda: k.swiglu_backward(x, h, prob[:1]),
        lambda: k.gather_rows(x[:, :100], rows),
        lambda: k.gather_rows(t, rows),
        lambda: k.gather_rows(x, rows, short),
        lambda: k.sum_rows(x[:, :100], rows[:, None]),
        lambda: k.quantize_weight(w[:, :100]),
        lambda: k.grouped_gemm(q, narrow, tiles, ends),
        lambda: k.grouped_gemm(q, b, short, ends),
        lambda: k.grouped_gemm(t, b, tiles, ends),
        lambda: k.grouped_wgrad(t, q, ends),
        lambda: k.grouped_wgrad(t, k.scaling_aware_transpose(k.quantize(x[:128])), ends)]


def test_launches_refuse():
    for number, call in enumerate(misuse_of_kernels()):
        with pytest.raises(ValueError) as error:
            call()
        assert "\n" not in str(error.value), number


def misuse_of_the_layer():
    """(the argument, what else the sentence says, the call)"""
    inputs = Inputs(100, 128, 256, 3, 2)
    x = inputs.x
    index = inputs.index
    p = inputs.weights
    w1 = inputs.w1
    w2 = inputs.w2
    e = fp8flow.experts
    return [
        ("top_k_index", "int64; got torch.float32", lambda: fp8flow.make_plan(p, 3)),
        ("top_k_index", "int64; got torch.float32", lambda: e(x, p, p, w1, w2)),
        ("x", "float64", lambda: e(x.double(), index, p, w1, w2)),
        ("x", "[100, 64]", lambda: e(x[:, :64], index, p, w1, w2)),
        ("x", "list", lambda: e([1.0], index, p, w1, w2)),
        ("x", "memory", lambda: e(x.to("meta"), index, p, w1, w2)),
        ("top_k_index", "[50, 2]", lambda: e(x, index[:50], p, w1, w2)),
        ("top_k_index", "[100]", lambda: e(x, index[:, 0], p[:, 0], w1, w2)),
        ("top_k_weights", "[100, 1]", lambda: e(x, index, p[:, :1], w1, w2)),
        ("top_k_weights", "float64", lambda: e(x, index, p.double(), w1, w2)),
        ("w1", "[3, 256, 128]", lambda: e(x, index, p, w1[:, :256], w2)),
        ("w1", "float64", lambda: e(x, index, p, w1.double(), w2)),
        ("w2", "multiples of 128", lambda: e(x, index, p, w1, w2[..., :100])),
        ("w2", "None", lambda: e(x, index, p, w1, None)),
        ("a recipe", "'flaw'", lambda: e(x, index, p, w1, w2, "flaw")),
        ("top_k_index", "[100, 2]", lambda: e(x[:0], index, p, w1, w2)),
        ("a recipe", "'flaw'", lambda: fp8flow.Experts(2, 128, 128, "flaw")),
        ("num_experts", "0", lambda: fp8flow.Experts(0, 128, 128)),
        ("dim", "100", lambda: fp8flow.Experts(2, 100, 128)),
        ("dtype", "float64", lambda: fp8flow.Experts(2, 128, 128, dtype=torch.float64))]


def test_the_layer_refuses():
    for name, says, call in misuse_of_the_layer():
        with pytest.raises((ValueError, TypeError)) as error:
            call()
        message = str(error.value)
        assert re.match(rf"{re.escape(name)}\b", message), message
        assert says in message and "\n" not in message, message


@pytest.mark.parametrize("wrong", [-1, 3, 2 ** 40])
def test_no_index_out_of_range(wrong, twins_on_cpu):
    """ValueError on a CPU; on a GPU an assertion of the device, which the process does not
    survive."""
    if not CUDA:
        inputs = Inputs(20, 128, 128, 3, 2)
        inputs.index[7, 1] = wrong
        for spec in ("bf16", "flow"):
            with pytest.raises(ValueError, match="^top_k_index must hold experts from 0 to 2"):
                run_layer(spec, inputs)
        return
    code = f"""
import torch, fp8flow
layer = fp8flow.Experts(3, 128, 128, device="cuda")
index = torch.zeros(20, 2, dtype=torch.int64, device="cuda")
index[7, 1] = {wrong}
layer(torch.randn(20, 128, device="cuda"), index, torch.ones(20, 2, device="cuda"))
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "device-side assert" in done.stderr


# ---- the door ------------------------------------------------------------------------------------

def test_every_operation_has_a_twin_and_tells_the_hooks(monkeypatch):
    told = []
    monkeypatch.setattr(kernels, "hooks", [lambda *what: told.append(what)])
    x = data("plain", 128, 128)
    q = kernels.quantize(x=x, scales="fp32")
    (name, arguments, result), = told
    assert name == "quantize" and arguments[0].shape == x.shape and arguments[1] == "fp32"
    assert result is q
    assert set(kernels.OPERATIONS) == {
        "quantize", "dequantize", "scaling_aware_transpose", "transpose", "requantize", "swiglu",
        "swiglu_backward", "plan_slots", "gather_rows", "sum_rows", "quantize_weight",
        "grouped_gemm", "grouped_wgrad"}
    for name, op in kernels.OPERATIONS.items():
        assert op is getattr(kernels, name) and op.twin is getattr(kernels, f"{name}_twin")
        # Twin and launch take the same arguments.
        parameters = [list(inspect.signature(function).parameters) for function in (op, op.twin)]
        assert parameters[0] == parameters[1], name


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_the_door_refuses_what_has_no_memory():
    """In place of a DTensor, which needs a group of processes, a FakeTensor; and its like."""
    with FakeTensorMode():
        fake = torch.empty(128, 128, device=DEVICE)
    for x in (fake, torch.empty(128, 128, device="meta")):
        if x.device.type == "meta" and CUDA:
            continue                            # The twin takes it.
        with pytest.raises(ValueError, match="plain tensor"):
            kernels.quantize(x)
    inputs = small_inputs()
    for recipe in ("bf16", "flow"):
        with pytest.raises(ValueError, match="^x must be a plain tensor"):
            with FakeTensorMode():
                x = torch.empty(20, 128, device=DEVICE)
            fp8flow.experts(x, inputs.index, inputs.weights, inputs.w1, inputs.w2, recipe)


# ---- the model -----------------------------------------------------------------------------------

def test_rotary_sees_distances():
    q, k = torch.randn(2, 1, 1, 1, 1, 64).expand(-1, -1, 40, -1, -1, -1)    # one at every position
    angles = model.rotation(40, 64, q.device, q.dtype)
    q_turned = model.turn(q, *angles)[0, :, 0, 0]
    k_turned = model.turn(k, *angles)[0, :, 0, 0]
    scores = q_turned @ k_turned.T
    assert torch.allclose(scores[5, 3], scores[37, 35], atol=1e-4) and scores.std() > 0.1
    assert torch.equal(q_turned[0], q[0, 0, 0, 0])          # position 0 is not turned


def test_balance_by_hand(monkeypatch):
    """1 where all experts are as likely; where half of the choices and all of the probability
    are one expert's, of four, 4 * 1/2 * 1."""
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    moe = model.MoE(train_py.PRESETS["tiny"], "bf16")
    x = torch.ones(1, 16, 128).bfloat16()
    with torch.no_grad():
        moe.router.weight.zero_()
        assert moe(x)[1].item() == pytest.approx(1)
        moe.router.weight[2] = 1.0
        assert moe(x)[1].item() == pytest.approx(2)


def test_attention_normalises_queries_and_keys():
    """So their size changes nothing, and no logit can run away."""
    torch.manual_seed(0)
    attention = model.Attention(train_py.PRESETS["tiny"])
    x = torch.randn(1, 16, 128)
    angles = model.rotation(16, 32, x.device, x.dtype)
    with torch.no_grad():
        before = attention(x, angles)
        attention.qk.weight.mul_(100)
        after = attention(x, angles)
    assert torch.allclose(before, after, atol=1e-5) and before.std() > 0.01


def test_a_router_with_one_choice_learns(monkeypatch):
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    torch.manual_seed(0)
    config = train_py.replace(train_py.PRESETS["tiny"], top_k=1)
    moe = model.MoE(config, "bf16")
    y, _ = moe(torch.randn(1, 16, 128).bfloat16())
    y.float().square().sum().backward()
    # p / p would leave rounding errors, 2e-5; here it is 82.
    assert moe.router.weight.grad.abs().max() > 1e-2


def test_generate_sees_what_came_before(monkeypatch):
    """As sampling from windows that hold nothing else, beyond the length of a window, too."""
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    torch.manual_seed(0)
    gpt = model.GPT(train_py.replace(train_py.PRESETS["tiny"], seq_len=6), fp8flow.RECIPES["flow"])
    with torch.no_grad():
        gpt.head.weight.mul_(1000)      # one choice stands out: no chance, no rounding decides
        text = list(b"abc")
        rng = torch.Generator().manual_seed(5)
        for _ in range(8):
            scores = gpt(torch.tensor([text[-6:]]))[0, -1].float() / 0.8
            text.append(int(torch.multinomial(scores.softmax(-1), 1, generator=rng)))
    assert gpt.generate(b"abc", 8, seed=5) == bytes(text)
    with pytest.raises(ValueError, match="prompt"):
        gpt.generate(b"", 8)


# ---- the command line: one sentence that names the argument, exit code 2, nothing written --------

BAD = [     # what is typed ({tmp} holds the files below), and what the last line must say
    ("flaw", "'flaw'"), ("flow,swiglu=half", "'half'"), ("flow,scales=fp32", "scales=pow2"),
    ("bf16,scales=fp32 flow", "switch of FP8"), ("flow flow", "flow is the same as flow"),
    ("flow flow,swiglu=fused", "is the same as flow"), ("flow --ablate", "--ablate"),
    ("--swiglu unfused", "--swiglu"), ("--step 3", "--step"), ("--preset huge", "--preset"),
    ("--seeds -1", "--seeds"), ("--seeds 1 1", "--seeds"), ("--n-heads 3", "n_heads"),
    ("--d-model 100", "d_model"), ("--top-k 9", "top_k"), ("--steps 0", "steps"),
    ("--steps 1e3", "--steps"), ("--lr 0", "lr"), ("--lr nan", "lr"),
    ("--data {tmp}/none", "--data {tmp}/none holds no text (1 skipped, {tmp}/none (No such file"),
    ("--data " + 300 * "x", "File name too long"),
    ("--data {tmp}/short.txt", "--seq-len"), ("--data {tmp}/folder", "holds no text"),
    ("--data {tmp}/pipe", "no regular file"), ("--data {tmp}/utf16.txt", "zero byte"),
    ("--data {tmp}/trained", "a folder of runs"), ("--seq-len 100000000", "--seq-len 100000000"),
    ("--out {tmp}/short.txt", "{tmp}/short.txt"),
    ("--data {tmp}/text --out {tmp}/text", "--out is the folder of --data")]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The folder {tmp} of the cases; the current folder is an empty one inside."""
    for name in ("folder", "text", "trained", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "utf16.txt").write_text("a text" * 1000, encoding="utf-16")
    os.mkfifo(tmp_path / "pipe")
    words = "the cat sat on a mat and saw two dogs".split()
    picks = torch.randint(len(words), (8000,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "text" / "a.txt").write_text(" ".join(words[pick] for pick in picks))
    (tmp_path / "trained" / train_py.LOCK).write_text("")
    (tmp_path / "trained" / "log.csv").write_text("step,loss")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_train_refuses(files, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)    # What is not refused is short.

    def everything():
        return sorted(str(path) for path in files.rglob("*"))
    before = everything()
    for line, says in BAD:
        data = [] if "--data" in line else ["--data", str(files / "text")]
        try:
            code = train_py.main([*line.format(tmp=files).split(), "--preset", "tiny", *data])
        except SystemExit as error:             # by argparse
            code = error.code
        message = capsys.readouterr().err.splitlines()[-1]
        assert code == 2 and message.startswith("train.py: "), (line, message)
        assert says.format(tmp=files) in message, (line, message)
        assert everything() == before, line


# ---- training: data, schedule, validation --------------------------------------------------------

def test_every_step_and_seed_has_windows_of_its_own():
    preset = train_py.replace(train_py.PRESETS["tiny"], batch=3, seq_len=8)
    text = torch.arange(256, dtype=torch.uint8).repeat(100)
    seen = {}
    for seed in range(10):
        for step in range(10):
            windows = train_py.draw_windows(text, seed, step, preset)
            assert windows.shape == (3, 9)
            assert torch.equal(windows, train_py.draw_windows(text, seed, step, preset))
            assert (windows.diff() % 256 == 1).all()
            seen[seed, step] = tuple(windows[:, 0].tolist())
    assert len(set(seen.values())) == 100


def test_the_last_twentieth_is_held_out():
    train, val = train_py.split(bytes(range(100)))
    assert train == bytes(range(95)) and val == bytes(range(95, 100))


def test_every_place_can_be_drawn():
    """The last window ends with the text."""
    preset = train_py.replace(train_py.PRESETS["tiny"], seq_len=8, batch=100)
    windows = train_py.draw_windows(torch.arange(12, dtype=torch.uint8), 0, 0, preset)
    assert set(windows[:, 0].tolist()) == {0, 1, 2, 3}


def test_the_optimizer_by_hand(tmp_path):
    """Without a gradient all weights shrink, by lr times 0.1."""
    settings = {"recipe": "bf16", "seed": 0, "compile": False}
    run = train_py.Run(tmp_path, train_py.PRESETS["tiny"], settings, None)
    gpt, optimizer = train_py.make_model(run, torch.device(DEVICE))
    before = [weight.detach().clone() for weight in gpt.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for weight in gpt.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for weight, old in zip(gpt.parameters(), before):
        assert torch.allclose(weight, 0.95 * old, rtol=1e-6, atol=0)
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_what_is_read(tmp_path):
    """Files in an order of their own, the same every time; what is skipped is named."""
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i:02};" * 10)
    whole, sentence = train_py.read_text(str(tmp_path))
    pieces = [whole[start:start + 80] for start in range(0, 3200, 80)]
    assert sorted(pieces) == [b"file %02d;" % i * 10 for i in range(40)] != pieces
    assert "40 files, 3,040 bytes for training and 160 for validation; 0 skipped" in sentence
    (tmp_path / "a.bin").write_bytes(b"text at first\0" + bytes(10))
    (tmp_path / ".hidden").write_text("secret")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret")
    (tmp_path / "runs" / "flow").mkdir(parents=True)
    (tmp_path / "runs" / train_py.LOCK).write_text("")
    (tmp_path / "runs" / "flow" / "log.csv").write_text("step,loss")
    (tmp_path / "link").symlink_to(tmp_path.parent)
    os.mkfifo(tmp_path / "pipe")
    again, sentence = train_py.read_text(str(tmp_path))
    assert again == whole and "40 files" in sentence and "4 skipped" in sentence
    for name, reason in (("link", "a link to a folder"), ("runs", "a folder of runs"),
                         ("a.bin", "a zero byte in its first 8192")):
        assert f"{tmp_path / name} ({reason})" in sentence
    one, sentence = train_py.read_text(str(tmp_path / "07.txt"))
    assert one == b"file 07;" * 10 and "76 bytes for training and 4 for" in sentence


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "theirs.txt").write_text("theirs")

    def refuse(path, *mode):
        if "theirs" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return open(path, *mode)
    monkeypatch.setattr(train_py, "open", refuse, raising=False)        # Root may read all.
    text, sentence = train_py.read_text(str(tmp_path))
    assert text == b"mine"
    assert f"1 skipped, {tmp_path / 'theirs.txt'} (Permission denied)" in sentence


def test_the_schedule_by_hand():
    preset = train_py.replace(train_py.PRESETS["tiny"], steps=100, lr=1.0)
    rates = {step: train_py.learning_rate(step, preset) for step in (0, 4, 9, 45, 80, 99)}
    assert rates == pytest.approx({0: 0.1, 4: 0.5, 9: 1.0, 45: 0.5, 80: 0.01, 99: 0.01})


def test_validation_reads_all_of_the_text():
    """Half of it zeros, half of it ones, by a step whose loss is the mean of what is to be said:
    each half counts alike, and both ends are read."""
    window = torch.zeros(8, 17, dtype=torch.int64)
    seen = []

    def mean_of_targets():
        seen.append(window.clone())
        return torch.stack([window[:, 1:].float().mean(), torch.tensor(9.0)])

    text = torch.arange(20_000) >= 10_000
    assert train_py.validate(mean_of_targets, window, text) == pytest.approx(0.5, abs=0.01)
    seen.clear()
    train_py.validate(mean_of_targets, window, torch.arange(20_000))
    windows = torch.cat(seen)
    assert windows[0, 0] == 0 and windows[-1, -1] == 19_999 and windows[:, 0].diff().min() > 0


# ---- training: runs ------------------------------------------------------------------------------

def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture
def small_train(files, monkeypatch):
    """small_train(arguments) -> exit code: small runs in this process, on the twins."""
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    monkeypatch.setattr(train_py, "VAL_BATCHES", 1)
    monkeypatch.setattr(model.GPT, "generate", lambda gpt, prompt, n: prompt + b"\xff")

    def run(*arguments):
        sizes = "--preset tiny --n-layers 2 --batch 1 --seq-len 32 --steps 3 --data"
        words = [*sizes.split(), files / "text", *arguments]
        return train_py.main([str(word) for word in words])
    return run


def before_forward(monkeypatch, number: int, act) -> None:
    """Calls act(model) before the forward of this number, counted over all models. The first of a
    run is discarded."""
    forward = model.GPT.forward
    calls = itertools.count(1)

    def counted(gpt, *tokens):
        if next(calls) == number:
            act(gpt)
        return forward(gpt, *tokens)
    monkeypatch.setattr(model.GPT, "forward", counted)


DISCARDED = 2 if CUDA else 1    # forwards before the first step: on a GPU one asks who waits


def test_training(files, small_train, capsys):
    """30 steps of every recipe. What follows from a few roundings is chaotic: only the first step
    is compared closely, where the same weights see the same batch."""
    assert small_train("--batch", 4, "--steps", 30, "--out", "x") == 0
    printed = capsys.readouterr().out
    assert "0 casts in a layer" in printed and "12 casts" in printed and "def \ufffd" in printed
    assert "delta_pct" not in printed and "speedup" not in printed and "called: " in printed
    rows = read_csv("x/compare.csv")
    names = "recipe,casts,val_loss,delta_pct,tokens_per_s,speedup,peak_mem_gb,seed"
    assert list(rows[0]) == names.split(",")
    casts = [(row["recipe"], row["casts"]) for row in rows]
    assert casts == [("bf16", "0"), ("naive", "12"), ("flow", "2")]
    bf16 = read_csv("x/bf16/log.csv")
    for row in rows:
        log = read_csv(f"x/{row['recipe']}/log.csv")
        assert [int(line["step"]) for line in log] == list(range(30))
        assert [i for i, line in enumerate(log) if line["val_loss"]] == [14, 29]
        assert float(log[0]["loss"]) > 5 and float(log[-1]["loss"]) < 3         # ln 256 = 5.5
        assert float(row["val_loss"]) == float(log[-1]["val_loss"])
        for name in ("loss", "grad_norm", "balance"):
            assert float(log[0][name]) == pytest.approx(float(bf16[0][name]), rel=0.02)
        assert sorted(os.listdir(f"x/{row['recipe']}")) == ["log.csv", "row.json"]
    assert float(rows[1]["delta_pct"]) == pytest.approx(
        100 * (float(rows[1]["val_loss"]) / float(rows[0]["val_loss"]) - 1))
    assert Path("x/loss.png").stat().st_size > 10_000
    assert small_train("bf16") == 0 and small_train("bf16") == 0
    assert Path("out/1/bf16/log.csv").exists() and Path("out/2/bf16/log.csv").exists()


def test_the_same_command_goes_on(small_train, capsys, monkeypatch):
    assert small_train("bf16", "--out", "x") == 0
    before = {path: path.read_bytes() for path in Path("x/bf16").iterdir()}
    assert small_train("bf16", "flow", "--out", "x") == 0
    assert "bf16, seed 0 has finished before" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path("x/bf16").iterdir()} == before
    assert [row["recipe"] for row in read_csv("x/compare.csv")] == ["bf16", "flow"]
    for changes, says in ((["--lr", "1e-3"], "lr=0.004, not 0.001"), (["--eager"], "eager=False"),
                          (["--seeds", "1"], "seed=0, not 1"), (["--save"], "save=False"),
                          (["--compile"], "compile=False, not True")):
        assert small_train("bf16", "--out", "x", *changes) == 2
        error, = capsys.readouterr().err.splitlines()
        assert says in error and "x/bf16/row.json" in error
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        assert small_train("bf16", "--out", "x") == 2
        assert "not 9.9" in capsys.readouterr().err
    with train_py.locked(Path("x")):                        # as another process would hold it
        assert small_train("naive", "--out", "x") == 2
    assert "another process trains in x" in capsys.readouterr().err


def test_killed_and_started_again(files):
    """kill -9 in the middle of the second run; then the same command."""
    words = "bf16 flow --preset tiny --steps 40 --batch 2 --seq-len 32 --out x --data"
    command = [sys.executable, str(ROOT / "train.py"), *words.split(), str(files / "text")]
    # Started on its own: this process may have the interpreter, and no GPU to spare.
    environment = plain_environment(CUDA_VISIBLE_DEVICES="")
    log = Path("x/flow/log.csv")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 5):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    before = {path: path.read_bytes() for path in Path("x/bf16").iterdir()}
    assert sorted(os.listdir("x")) == ["bf16", "flow", train_py.LOCK]
    assert os.listdir("x/flow") == ["log.csv"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in Path("x/bf16").iterdir()} == before
    assert len(read_csv("x/flow/log.csv")) == 40
    assert [row["recipe"] for row in read_csv("x/compare.csv")] == ["bf16", "flow"]
    assert Path("x/loss.png").exists()


def test_a_gradient_that_is_not_finite_ends_its_run_alone(small_train, monkeypatch, capsys):
    def poison(gpt):
        gpt.head.weight.register_hook(lambda gradient: gradient * math.inf)
    before_forward(monkeypatch, DISCARDED + 2, poison)          # in step 1 of bf16
    assert small_train("bf16", "flow", "--out", "x") == 1
    error, = [line for line in capsys.readouterr().err.splitlines() if "lower --lr" in line]
    assert "bf16, seed 0: step 1 has" in error and os.listdir("x/bf16") == ["log.csv"]
    assert [row["step"] for row in read_csv("x/bf16/log.csv")] == ["0"]
    assert [row["recipe"] for row in read_csv("x/compare.csv")] == ["flow"]


def test_a_loss_that_is_not_finite_ends_its_run(small_train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        before_forward(patch, DISCARDED + 1, lambda gpt: gpt.head.weight.data.fill_(math.nan))
        assert small_train("flow", "--out", "x") == 1
    assert "flow, seed 0: step 0 has the loss nan" in capsys.readouterr().err
    monkeypatch.setattr(train_py, "validate", lambda *arguments: math.inf)
    assert small_train("flow", "--out", "y") == 1
    assert "flow, seed 0: the validation loss is inf" in capsys.readouterr().err
    assert os.listdir("x/flow") == os.listdir("y/flow") == ["log.csv"]


def test_too_little_memory_ends_its_run_alone(small_train, monkeypatch, capsys):
    failed = []

    def exhaust(gpt):
        failed.append(weakref.ref(gpt))
        raise torch.OutOfMemoryError("CUDA out of memory")
    before_forward(monkeypatch, 1, exhaust)
    make_model = train_py.make_model

    def make_the_next(run, device):
        assert all(gpt() is None for gpt in failed)             # Its memory is free again.
        return make_model(run, device)
    monkeypatch.setattr(train_py, "make_model", make_the_next)
    assert small_train("bf16", "flow", "--out", "x") == 1
    error = capsys.readouterr().err
    assert "bf16, seed 0: the GPU's memory does not suffice: lower --batch" in error
    assert [row["recipe"] for row in read_csv("x/compare.csv")] == ["flow"]


def test_a_row_is_whole_or_not_there(small_train, monkeypatch, capsys):
    def die(source, target):
        assert json.loads(Path(source).read_text())["recipe"] == "flow"
        raise OSError(28, "No space left on device", str(target))
    monkeypatch.setattr(train_py.os, "replace", die)
    assert small_train("flow", "--out", "x") == 1
    assert "No space left" in capsys.readouterr().err and not Path("x/flow/row.json").exists()


def test_ctrl_c_ends_in_a_line(small_train, monkeypatch, capsys):
    def interrupt(gpt):
        raise KeyboardInterrupt
    before_forward(monkeypatch, DISCARDED + 2, interrupt)
    assert small_train("flow", "--out", "x") == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the same command with --out x keeps" in last and os.listdir("x/flow") == ["log.csv"]


def test_seeds_and_the_ladder(small_train, capsys):
    assert small_train("bf16", "flow", "--out", "y", "--seeds", 3, 0) == 0
    assert [row["seed"] for row in read_csv("y/compare.csv")] == ["3", "3", "0", "0"]
    assert Path("y/seed-3/flow/log.csv").exists() and "standard error" in capsys.readouterr().out
    losses = [("bf16", 0, 1.0), ("bf16", 1, 2.0), ("flow", 0, 1.01), ("flow", 1, 2.06)]
    train_py.print_seeds(train_py.compare(
        [{"recipe": r, "seed": s, "val_loss": v, "tokens_per_s": 1.0, "steps_are": "recorded"}
         for r, s, v in losses]))
    last = capsys.readouterr().out.splitlines()[-1]             # differences of 1% and 3%
    assert "1.5350, standard deviation 0.7425; +2.000% over bf16, standard error 1.000%" in last
    assert small_train("--ablate", "--steps", 1, "--out", "x") == 0
    casts = [row["casts"] for row in read_csv("x/compare.csv")]
    assert casts == ["0", "12", "8", "8", "4", "2", "2", "10"]


def test_gradients_are_clipped(small_train, monkeypatch):
    """To CLIP, whatever their norm: plain gradient descent then moves by learning rate * CLIP."""
    monkeypatch.setattr(train_py, "CLIP", 0.01)
    make_model = train_py.make_model
    seen = []

    def with_sgd(run, device):
        gpt, _ = make_model(run, device)
        seen.append((gpt, [weight.detach().clone() for weight in gpt.parameters()]))
        return gpt, torch.optim.SGD(gpt.parameters())
    monkeypatch.setattr(train_py, "make_model", with_sgd)
    assert small_train("bf16", "--steps", 1, "--lr", 1.0, "--out", "x") == 0
    (gpt, before), = seen
    moved = [(weight - old).norm() for weight, old in zip(gpt.parameters(), before)]
    assert torch.stack(moved).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert float(read_csv("x/bf16/log.csv")[0]["grad_norm"]) > 0.1


def test_in_a_thread(small_train, capsys):
    """As a notebook calls it."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(small_train("bf16", "--out", "x")))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_speedup_is_between_runs_of_one_kind():
    rows = [{"recipe": recipe, "seed": 0, "val_loss": 1.0, "tokens_per_s": speed, "steps_are": how}
            for recipe, speed, how in (("bf16", 1.0, "called"), ("naive", 2.0, "called"),
                                       ("flow", 3.0, "recorded"))]
    assert [row["speedup"] for row in train_py.compare(rows)] == [1.0, 2.0, None]


def test_any_backend_of_matplotlib(files):
    """What a notebook's shell sets must not be installed."""
    code = "import train, tools.trace, tools.bench, tools.probe; train.make_parser().format_help()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=plain_environment(MPLBACKEND="module://not_installed"))
    assert done.returncode == 0, done.stderr


GENERATE = model.GPT.generate    # which small_train replaces


def test_saved_weights_continue_a_text(small_train, monkeypatch, capsys):
    """By README's own lines, from the same weights."""
    written = []

    def keep(gpt, prompt, n):
        written.append(GENERATE(gpt, prompt, 20))
        return b""
    monkeypatch.setattr(model.GPT, "generate", keep)
    assert small_train("flow", "--out", "out/1", "--save") == 0
    monkeypatch.setattr(model.GPT, "generate", GENERATE)
    lines = indented("torch.load(")
    capsys.readouterr()
    exec(lines.replace(", 400)", ", 20)"), {})
    assert capsys.readouterr().out == written[0].decode("utf-8", "replace") + "\n"


def test_compile_is_for_what_is_not_the_experts(small_train, monkeypatch):
    compiled = []
    monkeypatch.setattr(model.Block, "compile", lambda block: compiled.append(block))
    assert small_train("flow") == 0 and compiled == []
    assert small_train("flow", "--compile") == 0 and len(compiled) == 2


# ---- training on a GPU: recorded, or called where a step waits -----------------------------------

ON_A_GPU = pytest.mark.skipif(not CUDA, reason="records CUDA graphs")
RECORDS = CUDA and torch.cuda.get_device_capability()[0] in (9, 10)     # torch's grouped_mm, too


@ON_A_GPU
def test_recorded_losses_are_those_of_called_steps(files):
    """20 steps, bit for bit."""
    for how, says in (([], "recorded as a CUDA graph"), (["--eager"], "called, as --eager asks")):
        command = [sys.executable, str(ROOT / "train.py"), "--preset", "tiny", "--steps", "20",
                   "--deterministic", "--out", f"x{''.join(how)}", *how]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(says) == (3 if RECORDS or how else 2), done.stdout
    for recipe in fp8flow.RECIPES:
        recorded = [row["loss"] for row in read_csv(f"x/{recipe}/log.csv")]
        assert recorded == [row["loss"] for row in read_csv(f"x--eager/{recipe}/log.csv")]
        assert len(set(recorded)) == 20


@ON_A_GPU
@pytest.mark.skipif(not RECORDS, reason="torch's grouped_mm waits here")
def test_too_little_memory_while_recording(files, monkeypatch, capsys):
    def exhaust(gpt):
        assert torch.cuda.is_current_stream_capturing()
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    before_forward(monkeypatch, 3, exhaust)                 # of bf16, after two that are discarded
    monkeypatch.setattr(train_py, "VAL_BATCHES", 1)
    assert train_py.main("bf16 flow --preset tiny --steps 3 --out x".split()) == 1
    error = capsys.readouterr().err
    assert "bf16, seed 0: the GPU's memory does not suffice: lower --batch" in error
    assert [row["recipe"] for row in read_csv("x/compare.csv")] == ["flow"]


@ON_A_GPU
@pytest.mark.skipif(not RECORDS, reason="torch's grouped_mm waits here")
def test_each_run_needs_the_memory_of_the_first(files, monkeypatch):
    """A stream for each run would keep cuBLAS's memory once more for each."""
    monkeypatch.setattr(train_py, "VAL_BATCHES", 1)
    seeds = [str(seed) for seed in range(4)]
    arguments = "bf16 --preset tiny --steps 3 --out x --seeds".split()
    assert train_py.main([*arguments, *seeds]) == 0
    first, *others = [float(row["peak_mem_gb"]) for row in read_csv("x/compare.csv")]
    assert max(others) < first + 0.03           # cuBLAS keeps 0.03 GB or more for a stream.


@ON_A_GPU
def test_twins_wait_and_are_called(small_train, capsys):
    assert small_train("flow", "--out", "x") == 0           # small_train forces the twins.
    assert "called: a step waits for the device" in capsys.readouterr().out


@ON_A_GPU
def test_a_step_that_waits_is_called(files, monkeypatch, capsys):
    """A bf16 layer that reads a number of its result."""
    grouped_mm = fp8flow.torch_grouped_mm

    def waiting(*arguments):
        result = grouped_mm(*arguments)
        result.sum().item()                     # The host waits.
        return result
    monkeypatch.setattr(fp8flow, "torch_grouped_mm", waiting)
    assert train_py.main("bf16 --preset tiny --steps 3 --out x".split()) == 0
    assert "called: a step waits for the device" in capsys.readouterr().out


# ---- tools/: what the programs around the lesson say ---------------------------------------------

@pytest.mark.parametrize("spec, launches, casts", [("naive", 32, 12), ("flow", 18, 2),
                                                   ("bf16", 12, 0)])
def test_the_launches_of_a_layer(spec, launches, casts, twins_on_cpu, capsys):
    grouped_mm = fp8flow.torch_grouped_mm
    every = trace.launches_of(spec, bench.Size(64, 128, 128, 4, 2), DEVICE)
    assert grouped_mm is fp8flow.torch_grouped_mm and kernels.hooks == []
    plan = [launch.op for launch in every if launch.place is None]
    assert plan == ["torch.sort", "torch.searchsorted", "plan_slots"]
    found = [x for x in every if x.place and x.op != "quantize_weight"]
    assert len(every) - len(found) == (3 if spec == "bf16" else 5)
    assert (len(found), len([x for x in found if x.cast])) == (launches, casts)
    assert all(x.place.tensor and x.place.direction and x.bytes() > 0 for x in found)
    gemms = [(x.place.tensor, x.place.direction) for x in found if "grouped" in x.op]
    assert gemms == [("H", "forward"), ("Y", "forward"), ("dA", "backward"), ("dX", "backward"),
                     ("dW2", "backward"), ("dW1", "backward")]
    trace.print_launches(spec, bench.Size(64, 128, 128, 4, 2), DEVICE)
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[:2] == [str(len(every)), str(casts)]


def test_bytes_of_a_launch(twins_on_cpu):
    """Slots of unused tiles move nothing: here 200 pairs of one expert in two tiles of four."""
    with trace.record_launches() as launches:
        plan = fp8flow.make_plan(torch.zeros(100, 2, dtype=torch.int64, device=DEVICE), 2)
        y = kernels.gather_rows(data("plain", 100, 256), plan.token, plan.tile_expert)
        kernels.sum_rows(y, plan.slot)
    assert len(plan.tile_expert) == 4 and plan.ends.tolist() == [256, 256]
    gather, total = launches[-2:]
    assert gather.bytes() == 100 * 256 * 2 + 256 * 8 + 4 * 4 + 256 * 256 * 2
    assert total.bytes() == 256 * 256 * 2 + 200 * 8 + 100 * 256 * 2


def test_what_the_trace_explains(twins_on_cpu, capsys):
    trace.print_casts(DEVICE)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    counts = {line[0]: int(line[1]) for line in lines}
    assert (counts["bf16"], counts["naive"], counts["flow,swiglu=unfused"]) == (0, 12, 4)
    samples = trace.samples(1024, 2048, DEVICE)
    ways = trace.quantized_in_each_way(samples["Gaussian"])
    decibels = [trace.loss_of(y, samples["Gaussian"]).db for y in ways.values()]
    assert decibels[:2] == pytest.approx([31.8, 28.8], abs=0.1)     # fp32 scales: once, twice
    assert decibels[2:] == pytest.approx(4 * [31.5], abs=0.1)       # pow2: once, twice, ...
    x = samples["rows over 24 binades"]
    _, _, rows, _, _, tiles = [trace.loss_of(y, x) for y in trace.quantized_in_each_way(x).values()]
    assert rows.zeros < 0.01 and rows.rows == 0
    assert 30 < tiles.zeros < 32 and 36 < tiles.rows < 39 and abs(tiles.db - 31.5) < 0.1


@pytest.mark.skipif(not CUDA, reason="asks the profiler which kernels ran")
@pytest.mark.parametrize("spec", ["bf16", "naive", "flow", "flow,permute=unfused"])
def test_the_profiler_sees_what_the_trace_says(spec):
    from torch.profiler import ProfilerActivity, profile
    layer = bench.Layer(spec, bench.random_inputs(bench.Size(1000, 256, 384, 5, 2), DEVICE))
    layer.step()                                                        # compiled before
    with trace.record_launches() as launches, profile(activities=[ProfilerActivity.CUDA]) as prof:
        layer.step()
        torch.cuda.synchronize()
    ours = re.compile(r"_(\w+)_kernel$")
    events = sorted(prof.events(), key=lambda event: event.time_range.start)
    matches = [ours.match(event.name) for event in events]
    is_hopper = kernels.use_hopper_gemm(torch.device("cuda:0"))
    gemms = {"grouped_gemm": "hopper_gemm", "grouped_wgrad": "hopper_gemm"} if is_hopper else {}
    ran = [match[1] for match in matches if match]
    assert ran == [gemms.get(launch.op, launch.op) for launch in launches
                   if not launch.op.startswith("torch")]


def test_bench_routes_as_it_says():
    size = bench.Size(64, 128, 128, 16, 2)
    skewed = bench.route(size, "skewed", DEVICE).flatten().bincount()
    assert skewed[0] == 4 * 64 * 2 // 16 and skewed.sum() == 128
    balanced = bench.route(size, "balanced", DEVICE).flatten().bincount()
    assert balanced.tolist() == 16 * [64 * 2 // 16]


def test_sqnr_by_hand():
    x = torch.tensor([3.0, 4.0])
    assert sqnr(x, x) == math.inf == sqnr(0 * x, 0 * x) and sqnr(x, 0 * x) == -math.inf
    assert sqnr(1.1 * x, x) == pytest.approx(20, abs=1e-3)      # an error of a tenth


@pytest.mark.skipif(not CUDA, reason="times need a GPU")
def test_bench_runs(monkeypatch, tmp_path, capsys):
    size = bench.Size(1024, 256, 384, 4, 2)
    monkeypatch.setattr(bench, "LAYERS", {"layer 1": size})
    monkeypatch.setattr(bench, "PAPER", {})
    monkeypatch.setattr(bench, "MIXTRAL", size)
    case = ({"training": size}, "random", torch.float32)
    monkeypatch.setattr(bench, "CASES", ((*case, False, True), (*case, True, False)))
    bench.main(["kernels", "--csv", str(tmp_path / "kernels.csv")])
    bench.main(["layer", "flow", "naive", "--csv", str(tmp_path / "layer.csv")])
    bench.main(["kernels", "swiglu", "--csv", str(tmp_path / "group.csv")])
    rows = read_csv(tmp_path / "group.csv")
    assert rows and all(row["kernel"].startswith("SwiGLU") for row in rows)
    quantize = read_csv(tmp_path / "kernels.csv")[0]
    moved = 3 * 1024 * 256                      # bf16 in, FP8 out; GB/s are bytes a nanosecond
    assert float(quantize["rate"]) == pytest.approx(moved / float(quantize["us"]) / 1e3, rel=1e-2)
    flow = [row for row in read_csv(tmp_path / "layer.csv") if row["spec"] == "flow"]
    assert [row["weights"] for row in flow] == ["float32", "float32, frozen"]
    assert float(flow[0]["sqnr_y"]) > 20 and float(flow[0]["ms"]) > 0 and flow[1]["sqnr_dw1"] == ""
    rows = [float(row["ms"]) for row in draw.read_layer(tmp_path / "layer.csv")]
    assert len(rows) == 3 and draw.draw_layer(tmp_path).exists()


@pytest.mark.parametrize("tool, words, sentence", [
    ("trace", "flow,scales=fp32", "SPEC flow,scales=fp32"), ("bench", "layer flow fast", "'fast'"),
    ("bench", "kernels flow", "no group flow"), ("bench", "layer", "there is no GPU"),
    ("probe", "0", "N 0"), ("probe", "--steps 0", "steps must be positive; got 0"),
    ("probe", "1 --steps 1 --out /dev/null/x", "--out '/dev/null/x'"),
    ("draw", "everything", "NAME"), ("draw", "layer", "layer.csv cannot be read")])
def test_tools_refuse_in_a_sentence(tool, words, sentence, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(draw, "ASSETS", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        {"trace": trace, "bench": bench, "probe": probe, "draw": draw}[tool].main(words.split())
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]


def test_probe_by_hand(twins_on_cpu):
    """Rows whose scales lie 12 binades apart: the small ones keep only their largest elements."""
    plan = fp8flow.make_plan(torch.zeros(120, 1, dtype=torch.int64, device=DEVICE), 1)
    x = torch.full((256, 128), 1.0, device=DEVICE, dtype=torch.bfloat16)
    x[:64] *= 2.0 ** -12
    x[:64, 64:] *= 2.0 ** -8
    x[120:] = 0                         # padding, in the same tile, too
    x[64, 0] = 2.0 ** -30               # lost before, by quantization: does not count
    q = probe.quantized(x, plan)
    found = probe.look_at(q, plan)
    assert found["amax"] == 1 and found["binades"] == 12
    assert found["underflow"] == pytest.approx(64 * 64 / (120 * 128))
    zeros = probe.look_at(probe.quantized(torch.zeros_like(x), plan), plan)     # no reason to stop
    assert zeros["direct"] == math.inf and zeros["underflow"] == zeros["binades"] == 0
    # Where large and small rows meet in no column, only the direct transpose loses something; and
    # where no large row of dY meets them, it shows in the gradient.
    x[64:, 64:] = 0
    dy = torch.zeros_like(x)
    dy[:64] = 1.0
    x = probe.quantized(x, plan)
    dy = probe.quantized(dy, plan)
    for gradient in (probe.look_at_gradient(dy, x, plan), probe.look_at_gradient(x, dy, plan)):
        assert gradient["once"] > 100 and gradient["requantized"] > 100 and gradient["direct"] < 50


def test_probe_sees_the_tensors_of_a_training(twins_on_cpu, monkeypatch, tmp_path):
    text = bytearray(i % 251 for i in range(5000))
    monkeypatch.setattr(train_py, "read_text", lambda path: (text, ""))
    path = tmp_path / "new" / "probe.csv"
    probe.main(["2", "--steps", "4", "--preset", "tiny", "--out", str(path)])
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["step"] for row in rows] == 6 * ["2"] + 6 * ["4"]
    assert [row["tensor"] for row in rows] == 2 * ["X", "A", "dY", "dH", "dW1", "dW2"]
    assert all(float(row["amax"]) > 0 and float(row["direct"]) > 25 for row in rows)
    assert rows[4]["amax"] != rows[5]["amax"]
    gpt = model.GPT(train_py.PRESETS["tiny"], probe.FLOW).to(DEVICE)
    window = torch.frombuffer(text, dtype=torch.uint8)[:1032].view(8, 129).long()
    x, _, dy, *_ = probe.probe(gpt, window.to(DEVICE), 1)
    assert 1 < x["amax"] < 10 and dy["amax"] < 0.01     # normalised; the gradient of a mean
    assert all(weight.grad is None for weight in gpt.parameters())


SMALL = bench.Size(T=320, D=128, F=256, E=4, k=2)


def test_pictures_fit_a_page(twins_on_cpu, monkeypatch, tmp_path, capsys):
    """900 pixels wide, below 150 kB, several in one command. (layer: see test_bench_runs.)"""
    monkeypatch.setattr(draw, "ASSETS", tmp_path)
    monkeypatch.setitem(draw.PICTURES, "bytes", lambda folder: draw.draw_bytes(folder, SMALL))
    names = ["dataflow", "bytes"]
    draw.main(names)
    assert capsys.readouterr().out.count("drawn: ") == 2
    for name in names:
        path = tmp_path / f"{name}.png"
        assert Image.open(path).width == 900 and path.stat().st_size < 150_000


def test_bytes_are_those_of_the_trace(twins_on_cpu):
    """Each launch is of one kind."""
    for spec, casts in (("naive", 12), ("flow", 2)):
        launches = trace.launches_of(spec, SMALL, DEVICE)
        moved = sum(launch.bytes() for launch in launches)
        assert sum(draw.megabytes_of(spec, SMALL)) == pytest.approx(moved / 1e6)
        kinds = ["cast" if launch.cast else bench.kind_of(launch.op) for launch in launches]
        counts = [kinds.count(kind) for kind in bench.SHARES]
        permutes = 8 if spec == "naive" else 4
        assert counts == [2, 6, 4, 2, casts, permutes, 3]


def test_the_walk_shows_every_case(twins_on_cpu, capsys):
    """What its sentences claim, by the functions that it prints from."""
    walk.main([])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    text = " ".join(lines)
    x = walk.toy_tile()
    fp32 = kernels.quantize(x, "fp32")
    pow2 = kernels.quantize(x, "pow2")
    is_other = (fp32.data.float() != pow2.data.float()).any(1)
    assert is_other.nonzero().tolist() == [[2]]                 # Step 2: row 2 alone changes.
    # Step 4: with powers of two nothing is rounded again, and with fp32 scales 1.07 is.
    assert torch.equal(walk.worth(kernels.requantize(pow2), True), kernels.dequantize(pow2))
    second = walk.worth(kernels.requantize(fp32, "fp32"), True)[1, 2].item()
    assert second == pytest.approx(1.1375) and f"is worth {second:.4f}." in text
    assert "1.125 / 0.35 = 3.214, the nearest code is 3.25" in text
    assert "its code is 3, worth 1.05." in text
    # Step 5: every element outside the last row is exact, which has each of the other fates.
    direct = kernels.scaling_aware_transpose(pow2)
    before = kernels.dequantize(pow2)
    after = walk.worth(direct, True)
    is_subnormal = (direct.data.t().float().abs() < 2.0 ** -6) & (after != 0)
    assert torch.equal(after[:3], before[:3])
    assert (after == before)[3, :4].tolist() == [True, False, False, False]
    assert is_subnormal[3, :4].tolist() == [False, True, True, False]
    assert (after == 0)[3, :4].tolist() == [False, False, False, True]
    # Whole rows, codes and errors: row-wise with both scales, requantized with both, direct.
    shown = [" ".join(line.split()) for line in lines]
    for row in ("row 2 0.35 0 1110 010 +1.8% 0 0110 110 +2.1% 0 1111 110 0 0 1001 011 +1.3%",
                "row 2 2^-1 0 1101 110 +1.8% 0 0110 010 +4.2% 0 1111 010 +2.0% 0 1000 111 -1.3%",
                "row 1 0 1110 001 -4.0% 0 1111 110 0 0 1000 101 +6.3% 0 1101 011 -1.8%",
                "row 1 0 1110 001 -4.0% 0 1111 110 0 0 1000 001 +5.1% 0 1101 011 -1.8%",
                "row 2 0 1011 110 +1.8% 0 0101 010 +4.2% 0 1111 010 +2.0% 0 1110 111 -1.3%",
                "row 3 2^-13 0 1111 110 0 0 1110 101 0 0 1101 001 0 0 1010 100 0",
                "scale 2 1 2^-1 2^-7",
                "row 2 k=2 0 1011 110 +1.8% 0 0100 010 +4.2% 0 1101 010 +2.0% 0 0110 111 -1.3%",
                "row 3 k=14 0 0001 110 0 0 0000 110 -7.7% 0 0000 010 -11.1% 0 0000 000 -100.0%"):
        assert row in shown
    assert "requantized, fp32 scales 28.72 3.67% 0.0% 0.0%" in shown
    assert "direct transpose, pow2 31.46 2.67% 0.0% 0.0%" in shown


# ---- README: what is drawn there as text ---------------------------------------------------------

def indented(words: str) -> str:
    """The indented piece of README.md that holds these words."""
    pieces = re.findall(r"(?:^    .*\n|^\n)+", (ROOT / "README.md").read_text(), re.MULTILINE)
    piece, = [piece for piece in pieces if words in piece]
    return textwrap.dedent(piece)


def numbers_behind(piece: str, label: str) -> list[float]:
    """Those of the line that begins so, or of what follows the label in a line."""
    line, = [line for line in piece.splitlines() if label in line]
    line = line.partition(label)[2]
    return [float(word) for word in re.findall(r"-?[\d.]+\b", line.split("scale")[0])]


def test_the_six_lines_print_what_readme_says():
    test = doctest.DocTestParser().get_doctest(indented(">>> import"), {}, "README.md", None, 0)
    runner = doctest.DocTestRunner()
    assert runner.run(test) == (0, 8)


def test_the_tile_in_readme():
    piece = indented("column 3")
    q = kernels.quantize(walk.toy_tile())
    t = kernels.scaling_aware_transpose(q)
    for i in range(4):
        row, column = (x.data[i, :4].float().tolist() for x in (q, t))
        assert numbers_behind(piece, f"row {i}") == pytest.approx(row, rel=5e-3)
        assert numbers_behind(piece, f"column {i}") == pytest.approx(column, rel=5e-3)
    assert q.scale[0, :4].log2().tolist() == [1, 0, -1, -13] and t.scale.item() == 2
    assert re.findall(r"scale (\S+)", piece) == ["2", "1", "2^-1", "2^-13", "2"]


def test_the_slots_in_readme(monkeypatch):
    monkeypatch.setattr(kernels, "use_kernels", lambda device: False)
    monkeypatch.setattr(kernels, "BLOCK", 4)
    plan = fp8flow.make_plan(torch.tensor([[2, 0], [2, 1]]), 3)
    piece = indented("tile_expert").replace(".", "-1")
    assert numbers_behind(piece, "token   ") == plan.token.tolist()
    assert numbers_behind(piece, "tile_expert") == plan.tile_expert.tolist()
    assert numbers_behind(piece, "ends") == plan.ends.tolist()
    first, second = plan.slot.tolist()
    assert f"token 0: {first[0]} and {first[1]}" in piece
    assert f"token 1: {second[0]} and {second[1]}" in piece


def test_the_ring_in_readme():
    """By a ring of four stages whose barriers flip a bit: nothing waits for ever, and what is
    waited for is what README says."""
    full = [1, 1, 1, 1]                         # the parity of a new barrier
    empty = [1, 1, 1, 1]
    rows = []
    for i in range(6):
        stage = i % 4
        use = i // 4
        parity = use % 2                        # as in _loader and _consumer
        assert empty[stage] == 1 - parity       # The loader passes,
        full[stage] ^= 1                        # and the bytes come.
        assert full[stage] == parity            # The consumers pass,
        empty[stage] ^= 1                       # read, and arrive.
        rows.append([i, stage, use, 1 - parity, parity])
    lines = indented("of parity").strip().splitlines()[1:]
    assert [[int(number) for number in re.findall(r"\d+", line)] for line in lines] == rows


if __name__ == "__main__":              # what the tests above start in processes of their own
    if sys.argv[1] == "ddp":
        ddp_worker(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        compile_gemms(int(sys.argv[1]))
