"""What is promised, and held here. On a GPU the kernels run compiled; without one in Triton's interpreter, small.

    quantize, transpose     numbers computed by hand, then every E4M3 code against exact arithmetic, then random data
    moving rows             permute, pad and back against plain indexing
    grouped GEMM            against fp64 on the dequantized operands; on Hopper its kernel against the loop, bit for
                            bit; everywhere both compiled for GPUs that are not here
    routing                 the plan against a plain loop, empty experts and all
    the layer               against fp64, kernels against twins, recompute, weights that change, memory, no host sync
    trace and ledger        the casts in the margin of the code, the trace and the profiler say the same
    what is refused         every wrapper and command, in a sentence that names the argument
    training                resume, reuse, growing tables, broken losses, probes, the arms that test the comparison
"""
import os

import torch

CUDA = torch.cuda.is_available()
torch.set_num_threads(1)                                    # tiny operations: threads would wait for each other
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"                    # before the kernels are imported: @triton.jit reads it

import copy
import csv
import inspect
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

import fp8flow
import kernels
import model
import train as train_py
from kernels import BLOCK, FP8, SCALE_MIN, QTensor, sqnr

DEVICE = "cuda" if CUDA else "cpu"
ROOT = Path(__file__).parent


# ---- Triton's interpreter truncates casts to bf16 and fp8; the hardware rounds to nearest even. Repair, and prove it.

def _rounding_cast(values, source, target, rounding_mode=None):
    """interpreter._convert_float, done by torch: bits of `source` in, bits of `target` out, as PTX cvt.rn.satfinite."""
    import numpy as np
    torch_type = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
                  "fp8e4nv": FP8, "fp8e5": torch.float8_e5m2}
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    raw = torch.frombuffer(bytearray(values.tobytes()), dtype=signed[source.primitive_bitwidth // 8])
    wide = raw.view(torch_type[str(source)]).double() if str(source) == "fp64" else \
        raw.view(torch_type[str(source)]).float()
    if str(target) == "fp8e4nv":                            # saturates; every NaN becomes 0x7F
        wide = torch.where(wide.isnan(), torch.nan, wide.clamp(-448, 448))
    narrow = wide.to(torch_type[str(target)])
    unsigned = np.dtype(f"uint{target.primitive_bitwidth}")
    return narrow.view(signed[target.primitive_bitwidth // 8]).numpy().view(unsigned).reshape(values.shape)


if not CUDA:
    from triton.runtime import interpreter
    interpreter._convert_float = _rounding_cast


@triton.jit
def _cast_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def _cast_fp8_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, kernels._encode(tl.load(x + i)))


def test_casts_round_to_nearest_even():
    x = torch.cat([torch.randn(2000), torch.linspace(-0.02, 0.02, 2001),
                   torch.tensor([0.0, -0.0, 1 + 2 ** -8, 1 + 3 * 2 ** -8]),
                   torch.tensor([17.0, 19.0, 448.0, -448.0, 2 ** -9, 2 ** -10, 3 * 2 ** -10, -2 ** -11])]).to(DEVICE)
    n = triton.next_power_of_2(len(x))
    x = torch.nn.functional.pad(x, (0, n - len(x)))
    bf16, fp8 = torch.empty(n, dtype=torch.bfloat16, device=DEVICE), torch.empty(n, dtype=torch.uint8, device=DEVICE)
    _cast_kernel[1,](x, bf16, n)
    _cast_fp8_kernel[1,](x, fp8, n)
    assert torch.equal(bf16.view(torch.int16), x.bfloat16().view(torch.int16))
    assert torch.equal(fp8, x.to(FP8).view(torch.uint8))


# ---- helpers --------------------------------------------------------------------------------------------------------

def data(kind: str, R: int, C: int, seed: int = 0, dtype=torch.bfloat16) -> torch.Tensor:
    """Matrices that look like what a layer quantizes: plain, heavy-tailed, and rows of very different size."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(R, C, generator=g)
    if kind == "heavy":
        x = x * torch.randn(R, C, generator=g).exp() ** 2
    if kind == "gradient":
        x = x * torch.exp2(torch.randint(-18, 18, (R, 1), generator=g).float())
        x[3::7] = 0
    return x.to(DEVICE, dtype)


def vary_blocks(x: torch.Tensor) -> torch.Tensor:
    """x with its 128x128 blocks scaled by 2^-2..2^2, so that a scale read from a neighbour's place shows."""
    i, j = (torch.arange(n, device=x.device) // BLOCK for n in x.shape)
    return x * torch.exp2((3 * i[:, None] + j) % 5 - 2).to(x.dtype)


def same_bits(a: QTensor, b: QTensor) -> bool:
    return torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(a.scale, b.scale)


SHAPES = [(1, 128), (128, 128), (37, 384)] + ([(4096, 2048), (1000, 7168), (513, 1408)] if CUDA else [])
TILES = [(128, 128), (256, 384)] + ([(4096, 2048), (1024, 7168), (640, 1408)] if CUDA else [])


# ---- quantize -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scales", ["pow2", "fp32"])
@pytest.mark.parametrize("kind", ["plain", "heavy", "gradient"])
@pytest.mark.parametrize("R, C", SHAPES)
def test_quantize_kernel_equals_twin(R, C, kind, scales):
    for dtype in (torch.bfloat16, torch.float32):
        x = data(kind, R, C, dtype=dtype)
        q = kernels.quantize(x, scales)
        assert same_bits(q, kernels.quantize_ref(x, scales))
        assert torch.equal(kernels.dequantize(q), kernels.dequantize_ref(q))
        assert torch.equal(kernels.dequantize(q, torch.bfloat16), kernels.dequantize_ref(q, torch.bfloat16))
        assert sqnr(kernels.dequantize(q), x) > 30


def blocks_by_hand() -> torch.Tensor:
    x = torch.zeros(12, 128)
    x[1, 5] = 3.0                                                       # one live element
    x[2, :2] = torch.tensor([448.0, -448.0])
    x[3, 0] = 448.0001
    x[4] = torch.arange(128) * 1e-40                                    # fp32 subnormals
    x[5] = 1e-30
    x[6, 0], x[6, 1] = 448.0, 2.0 ** -9                                 # the smallest subnormal code beside the largest
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
    q = (kernels.quantize_ref if twin else kernels.quantize)(x, scales)
    assert same_bits(q, kernels.quantize_ref(x, scales))
    y, scale = kernels.dequantize(q), q.scale[0]
    assert scale[0] == SCALE_MIN and scale[10] == SCALE_MIN             # never 1.0
    assert (y[0] == 0).all() and (q.data[10].view(torch.uint8) == 0x80).all()
    assert y[1, 5] == 3 and y[1].count_nonzero() == 1
    assert y[2, 0] == 448 and y[2, 1] == -448 and scale[2] == 1
    assert scale[3] == 2 if scales == "pow2" else scale[3] > 1
    assert y[6, 1] == 2.0 ** -9
    assert (y[5] - 1e-30).abs().max() < 1e-30 / 16
    assert (y[4] - x[4]).abs().max() <= 128e-40
    assert y[7:10].isnan().all() and y[[0, 1, 2, 3, 4, 5, 6, 10, 11]].isfinite().all()
    assert torch.equal(y[11, :1], x[11, :1]) or abs(y[11, 0] / x[11, 0] - 1) < 1 / 16


def test_pow2_scale_is_minimal():
    x = torch.zeros(400, 128)
    amax = torch.exp2(torch.linspace(-100, 100, 400)) * torch.linspace(1, 2, 400)
    amax[:4] = torch.tensor([448.0, 1.75, 1.75 + 2 ** -22, 1.75 * 2 ** 20])
    x[:, 17] = -amax
    scale = kernels.quantize(x.to(DEVICE)).scale[0].cpu()
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all()
    assert (scale * 448 >= amax).all() and (scale / 2 * 448 < amax).all()


@pytest.mark.parametrize("scales", ["pow2", "fp32"])
def test_quantize_weight(scales):
    w = data("heavy", 3 * 256, 384, dtype=torch.float32).view(3, 256, 384) / 50
    w[1] = 0
    q, qt = kernels.quantize_weight(w, scales)
    ref, ref_t = kernels.quantize_weight_ref(w, scales)
    assert same_bits(q, ref) and same_bits(qt, ref_t)
    assert torch.equal(kernels.dequantize(q).mT, kernels.dequantize(qt))
    assert sqnr(kernels.dequantize(q), w) > 25 and sqnr(kernels.dequantize(qt), w.mT) > 25
    w[2, 5, 7] = torch.nan
    for q, at in zip(kernels.quantize_weight(w, scales), [(2, 5, 7), (2, 7, 5)]):
        y = kernels.dequantize(q)
        assert y[at].isnan() and y[:2].isfinite().all()


# ---- transpose ------------------------------------------------------------------------------------------------------

def e4m3_value(code: int) -> float:
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    value = mantissa * 2.0 ** -9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -value if sign else value


def shifted_code(code: int, k: int) -> int:
    """code * 2^-k rounded to nearest even in E4M3, in exact integer arithmetic."""
    if code & 0x7F == 0x7F:
        return 0x7F
    exponent, mantissa = code >> 3 & 15, code & 7
    quanta = mantissa if exponent == 0 else (8 + mantissa) << exponent - 1          # the value in units of 2^-9
    floor, rest = quanta >> k, quanta & (1 << k) - 1
    unit = 0 if floor < 16 else floor.bit_length() - 4                              # a normal code keeps 4 bits
    if unit:                                                                        # exact: k only lowers the exponent
        assert rest == 0 and floor % (1 << unit) == 0
    elif k and (rest << 1 > 1 << k or rest << 1 == 1 << k and floor & 1):
        floor += 1
    unit = 0 if floor < 16 else floor.bit_length() - 4
    magnitude = floor if floor < 8 else unit + 1 << 3 | (floor >> unit) - 8
    return code & 0x80 | magnitude


@pytest.mark.parametrize("twin", [False, True])
def test_transpose_against_exact_arithmetic(twin):
    """All 256 codes under shifts 0..20 (and 60, 200): row r of a tile has scale 2^-k(r), row 0 holds the maximum."""
    shifts = list(range(21)) + [60, 200]
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    x = torch.zeros(128, 128, dtype=torch.uint8)
    scale = torch.full((1, 128), SCALE_MIN)
    k = torch.zeros(128, dtype=torch.int64)
    for i, (shift, half) in enumerate((s, h) for s in shifts for h in range(2)):
        x[i], scale[0, i], k[i] = codes[half], 2.0 ** (90 - shift), shift
    transpose = kernels.scaling_aware_transpose_ref if twin else kernels.scaling_aware_transpose
    out = transpose(QTensor(x.view(FP8).to(DEVICE), scale.to(DEVICE), "pow2"))
    assert out.scale.tolist() == [[2.0 ** 90]]
    got = out.data.view(torch.uint8).cpu().t()
    for i in range(2 * len(shifts)):
        assert got[i].tolist() == [shifted_code(c, int(k[i])) for c in x[i].tolist()], f"shift {k[i]}"
    assert all(shifted_code(c, 3) == torch.tensor(e4m3_value(c) / 8).to(FP8).view(torch.uint8) for c in range(127))


@pytest.mark.parametrize("kind", ["plain", "heavy", "gradient"])
@pytest.mark.parametrize("M, C", TILES)
def test_transpose_kernel_equals_twin(M, C, kind):
    q = kernels.quantize(data(kind, M, C))
    out = kernels.scaling_aware_transpose(q)
    assert out.data.shape == (C, M) and same_bits(out, kernels.scaling_aware_transpose_ref(q))
    rows = torch.randint(-1, M, (256,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    permuted = kernels.scaling_aware_transpose(q, rows)
    assert same_bits(permuted, kernels.scaling_aware_transpose_ref(q, rows))
    assert same_bits(permuted, kernels.scaling_aware_transpose(kernels.gather_rows(q, rows)))


def test_zero_rows_do_not_flush_tiny_rows():
    x = torch.zeros(128, 128, device=DEVICE)
    x[::2] = data("plain", 64, 128, dtype=torch.float32) * 2 ** -10
    y = kernels.dequantize(kernels.scaling_aware_transpose(kernels.quantize(x)))
    assert sqnr(y.t(), x) > 30
    zero = kernels.scaling_aware_transpose(kernels.quantize(torch.zeros(128, 256, device=DEVICE)))
    assert (zero.scale == SCALE_MIN).all() and (zero.data.view(torch.uint8) == 0).all()


def test_nan_stays_in_its_block():
    x = data("plain", 128, 256)
    clean = kernels.dequantize(kernels.scaling_aware_transpose(kernels.quantize(x)))
    x[3, 200] = torch.inf
    y = kernels.dequantize(kernels.scaling_aware_transpose(kernels.quantize(x)))
    assert y[128:, 3].isnan().all() and y.isnan().sum() == 128
    y[128:, 3] = clean[128:, 3]
    assert sqnr(y, clean) > 30


def test_direct_transpose_against_requantizing():
    """Power-of-two scales are what cures the double quantization error; the direct transpose makes it cheap."""
    x = data("plain", 512, 512, dtype=torch.float32)
    error = {}
    for scales in ("fp32", "pow2"):
        q = kernels.quantize(x, scales)
        error["row", scales] = sqnr(kernels.dequantize(q), x)
        error["requant", scales] = sqnr(kernels.dequantize(kernels.quantize(kernels.dequantize(q).t(), scales)).t(), x)
    error["direct"] = sqnr(kernels.dequantize(kernels.scaling_aware_transpose(kernels.quantize(x))).t(), x)
    assert error["row", "fp32"] - error["requant", "fp32"] > 2                      # about 3 dB: a second rounding
    assert error["row", "pow2"] - error["requant", "pow2"] < 0.2 and error["row", "pow2"] - error["direct"] < 0.2


# ---- SwiGLU: against fp64, and the emitted codes against quantizing the unquantized result --------------------------

def swiglu_exact(h, prob, da=None):
    h = h.double().requires_grad_()
    prob = prob.double().requires_grad_()
    gate, up = h.chunk(2, -1)
    a = torch.nn.functional.silu(gate) * up * prob[:, None]
    if da is None:
        return a.detach()
    a.backward(da.double())
    return a.detach(), h.grad, prob.grad


@pytest.mark.parametrize("scales", ["pow2", "fp32"])
@pytest.mark.parametrize("M, width", [(3, 128), (128, 384)] + ([(1024, 2048), (640, 1408)] if CUDA else []))
def test_swiglu(M, width, scales):
    h, da = data("plain", M, 2 * width) * 3, data("plain", M, width, seed=1)
    prob = torch.rand(M, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    prob[0] = 0                                                         # a padding slot
    a, dh, dprob = swiglu_exact(h, prob, da)

    assert sqnr(kernels.swiglu(h, prob), a) > 50                        # bf16 rounds at 2^-9: 56 dB
    got_dh, got_dprob = kernels.swiglu_backward(da, h, prob)
    assert sqnr(got_dh, dh) > 50 and sqnr(got_dprob, dprob) > 110

    q = kernels.swiglu_quantize(h, prob, scales)
    qh, qprob, qa = kernels.swiglu_backward_quantize(da, h, prob, scales)
    assert sqnr(qprob, dprob) > 110 and same_bits(q, qa)                # backward recomputes the same codes
    for got, exact in ((q, a), (qh, dh)):
        want = kernels.quantize_ref(exact.float(), scales)
        assert got.scale.shape == want.scale.shape
        assert (got.data.view(torch.uint8) != want.data.view(torch.uint8)).float().mean() < 1e-3   # ties, last ulp
        assert sqnr(kernels.dequantize(got), kernels.dequantize(want)) > 45
        assert sqnr(kernels.dequantize(got), exact) > 30


@pytest.mark.skipif(not CUDA, reason="more than 2^31 elements, 5 GB: the interpreter would take hours")
def test_offsets_beyond_2_31():
    M, width = 300_032, 4096                                            # M * 2F = 2.46e9 elements
    h = torch.randn(M, 2 * width, device=DEVICE, dtype=torch.bfloat16)
    prob = torch.rand(M, device=DEVICE)
    q, tail = kernels.swiglu_quantize(h, prob), kernels.swiglu_quantize(h[-256:].contiguous(), prob[-256:].contiguous())
    assert torch.equal(q.data[-256:].view(torch.uint8), tail.data.view(torch.uint8))
    x = kernels.gather_rows(h, torch.arange(M - 256, M, device=DEVICE))
    assert torch.equal(x, h[-256:])
    wide = kernels.scaling_aware_transpose(kernels.quantize(h))
    assert same_bits(QTensor(wide.data[-128:, -128:].contiguous(), wide.scale[-1:, -1:], "pow2"),
                     kernels.scaling_aware_transpose(kernels.quantize(h[-128:, -128:].contiguous())))


# ---- moving rows ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T, C, M", [(5, 128, 256), (130, 384, 384)]
                         + ([(4096, 7168, 8192), (999, 1408, 3072)] if CUDA else []))
def test_gather_and_sum_rows(T, C, M):
    rows = torch.randint(-1, T, (M,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    rows[:7] = -1
    x = data("gradient", T, C)
    assert torch.equal(kernels.gather_rows(x, rows), kernels.gather_rows_ref(x, rows))
    q = kernels.quantize(x)
    got = kernels.gather_rows(q, rows)
    assert same_bits(got, kernels.gather_rows_ref(q, rows))
    assert (got.data[:7].view(torch.uint8) == 0).all() and (got.scale[:, :7] == SCALE_MIN).all()
    assert torch.equal(kernels.dequantize(got), torch.where((rows >= 0)[:, None], kernels.dequantize(q)[rows], 0))
    for topk in (1, 2, 5):
        slots = torch.randint(0, T, (M, topk), generator=torch.Generator().manual_seed(4)).to(DEVICE)
        assert torch.equal(kernels.sum_rows(x, slots), kernels.sum_rows_ref(x, slots))


def test_views_are_taken_as_they_read():
    """A transposed view goes in as its contiguous copy would."""
    x, prob = data("plain", 256, 128).t(), torch.linspace(0, 1, 256, device=DEVICE)[::2]
    assert same_bits(kernels.quantize(x), kernels.quantize(x.contiguous()))
    assert same_bits(kernels.swiglu_quantize(x, prob), kernels.swiglu_quantize(x.contiguous(), prob.contiguous()))
    rows = torch.arange(256, device=DEVICE)[::2] // 2                               # every second of an int64 tensor
    assert torch.equal(kernels.gather_rows(x, rows), x)
    assert torch.equal(kernels.sum_rows(x, rows[:, None]), x)
    da = data("plain", 128, 128, seed=1).t()
    straight = kernels.swiglu_backward(da.contiguous(), x.contiguous(), prob.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(kernels.swiglu_backward(da, x, prob), straight))
    q, (w, _) = kernels.quantize(x), kernels.quantize_weight(data("plain", 128, 256, dtype=torch.float32)[None])
    strided = q._replace(data=q.data.view(torch.uint8).t().contiguous().t().view(FP8))
    tile_expert, ends = torch.tensor([[0, -1]], device=DEVICE).int(), torch.tensor([[128, 0]], device=DEVICE).int()
    assert torch.equal(kernels.grouped_gemm(strided, w, tile_expert[:, 0], ends[:, 0]),
                       kernels.grouped_gemm(q, w, tile_expert[0, :1], ends[0, :1]))


def test_gather_skips_unused_tiles():
    x, rows = data("plain", 4, 128), torch.zeros(384, dtype=torch.int64, device=DEVICE)
    tiles = torch.tensor([0, -1, 2], dtype=torch.int32, device=DEVICE)
    used = torch.tensor([True, False, True], device=DEVICE).repeat_interleave(BLOCK)
    assert torch.equal(kernels.gather_rows(x, rows, tiles)[used], x[rows][used])
    h, prob = data("plain", 384, 256), torch.ones(384, device=DEVICE)
    assert torch.equal(kernels.swiglu(h, prob, tiles)[used], kernels.swiglu(h, prob)[used])
    q, full = kernels.swiglu_quantize(h, prob, tiles=tiles), kernels.swiglu_quantize(h, prob)
    assert torch.equal(q.data.view(torch.uint8)[used], full.data.view(torch.uint8)[used])


# ---- grouped GEMM: against fp64 on the dequantized operands, so that quantization error cannot hide a bug -----------

COUNTS = [[1, 0, 2]] + ([[3, 0, 7, 1, 0, 12], [0, 0, 32], [16, 16, 16, 16, 16, 16, 16]] if CUDA else [])
LEVELS = ["loop", "hopper"] if CUDA and torch.cuda.get_device_capability()[0] == 9 else ["loop"]


def expert_tiles(counts):
    """counts in tiles -> tile_expert (with one unused tile at the end) and ends."""
    tiles = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ends = torch.tensor(counts).cumsum(0) * BLOCK
    return torch.cat([tiles, torch.tensor([-1])]).int().to(DEVICE), ends.int().to(DEVICE)


def at_every_level(gemm):
    """The result of `gemm()`, from every kernel that runs here: the same bits."""
    results = []
    for level in LEVELS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "use_hopper_gemm", lambda x: level == "hopper")
            results.append(gemm())
    for other in results[1:]:
        assert torch.equal(results[0].view(torch.uint8), other.view(torch.uint8)), "level 3 differs from level 2"
    return results[-1]


# N: 128 (half of a Hopper tile), 384 and 1408 (its last tile is half), K: one step, an odd number of steps, many
@pytest.mark.parametrize("scales", ["pow2", "fp32"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("N, K", [(256, 384), (128, 128)] + ([(384, 128), (1408, 2048), (4096, 1280)] if CUDA else []))
def test_grouped_gemm(N, K, counts, scales):
    tile_expert, ends = expert_tiles(counts)
    M, E = len(tile_expert) * BLOCK, len(counts)
    x, w = vary_blocks(data("gradient", M, K)), vary_blocks(data("plain", E * N, K, seed=1, dtype=torch.float32))
    a, (b, _) = kernels.quantize(x, scales), kernels.quantize_weight(w.view(E, N, K), scales)
    used = sum(counts) * BLOCK
    out = at_every_level(lambda: kernels.grouped_gemm(a, b, tile_expert, ends)[:used])
    assert out.shape == (used, N) and out.dtype == torch.bfloat16
    x, w = kernels.dequantize(a).double()[:used], kernels.dequantize_ref(b).double()
    expert = tile_expert.repeat_interleave(BLOCK)[:used]
    for e in range(E):
        if counts[e]:
            want = x[expert == e] @ w[e].T
            unit = want.square().mean(1, keepdim=True).sqrt().clamp(min=1e-300)        # every row counts, tiny ones too
            assert sqnr(out[expert == e].double() / unit, want / unit) > 50             # bf16 rounds at 2^-9: 56 dB


@pytest.mark.parametrize("operands", ["tile, tile", "column, column", "column, tile", "tile, column"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("M, N", [(128, 384)] + ([(2048, 1408), (256, 128)] if CUDA else []))
def test_grouped_wgrad(M, N, counts, operands):
    """Scales a tile (from the direct transpose), scales a column (requantized), and one of each."""
    tile_expert, ends = expert_tiles(counts)
    slots = len(tile_expert) * BLOCK
    a, b = (kernels.quantize(x.t()) if kind == "column" else kernels.scaling_aware_transpose(kernels.quantize(x))
            for kind, x in zip(operands.split(", "), (vary_blocks(data("plain", slots, C, seed=C)) for C in (M, N))))
    x, y = kernels.dequantize(a).double(), kernels.dequantize(b).double()
    for dtype in (torch.float32, torch.bfloat16):
        out, begin = at_every_level(lambda: kernels.grouped_wgrad(a, b, ends, dtype)), 0
        assert out.shape == (len(counts), M, N) and out.dtype == dtype
        for e, end in enumerate(ends.tolist()):
            if end > begin:
                # the tensor core keeps ~14 bits and truncates: 0.01% of error on sums of 128, promoted
                assert sqnr(out[e], x[:, begin:end] @ y[:, begin:end].T) > (70 if dtype == torch.float32 else 50)
            else:
                assert (out[e] == 0).all()                                              # zeros, not what was there
            begin = end


def test_gemms_repeat_and_leave_unused_tiles_alone():
    """Loads, products and promotions overlap: a missing wait shows as a differing run. Unused tiles hold anything."""
    runs, counts, N, K = (60, [9, 0, 23, 31], 2048, 1408) if CUDA else (2, [1, 0, 1], 128, 256)
    tile_expert, ends = expert_tiles(counts)
    rows, used = len(tile_expert) * BLOCK, sum(counts) * BLOCK
    x, dy = (kernels.quantize(data("plain", rows, C)) for C in (K, N))
    w, _ = kernels.quantize_weight(data("plain", len(counts) * N, K, dtype=torch.float32).view(-1, N, K))
    direct = [kernels.scaling_aware_transpose(q) for q in (dy, x)]
    requantized = [kernels.quantize(kernels.dequantize(q).t()) for q in (dy, x)]

    def run():
        return (kernels.grouped_gemm(x, w, tile_expert, ends)[:used], kernels.grouped_wgrad(*direct, ends),
                kernels.grouped_wgrad(*requantized, ends, torch.bfloat16))
    first = run()
    assert all(result.isfinite().all() for result in first)
    x.data.view(torch.uint8)[used:], x.scale[:, used:] = 0x7F, torch.nan
    for q in direct + requantized:
        q.data.view(torch.uint8)[:, used:], q.scale[used // BLOCK:] = 0x7F, torch.nan
    for _ in range(runs - 1):
        assert all(torch.equal(a, b) for a, b in zip(run(), first))


@pytest.mark.skipif(not CUDA, reason="operands of more than 2^31 elements, 9 GB: the interpreter would take hours")
def test_gemm_offsets_beyond_2_31():
    slots, C = 2 ** 20 + 1024, 2048
    x = data("plain", 1024, C).repeat(slots // 1024, 1)                                 # the last rows are the first
    q, (w, _) = kernels.quantize(x), kernels.quantize_weight(data("plain", 128, C, dtype=torch.float32)[None])
    tiles = torch.zeros(slots // BLOCK, dtype=torch.int32, device=DEVICE)
    ends = torch.tensor([slots - 1024, slots], dtype=torch.int32, device=DEVICE)
    out = at_every_level(lambda: kernels.grouped_gemm(q, w, tiles, ends[1:]))
    assert torch.equal(out[:1024], out[-1024:]) and out.float().std() > 1
    a = kernels.scaling_aware_transpose(q)
    b = QTensor(a.data[-256:], a.scale[:, -2:], "pow2")
    dw = at_every_level(lambda: kernels.grouped_wgrad(a, b, ends))                      # expert 1: the last 1024 slots
    a_first, b_first = (QTensor(t.data[:, :1024], t.scale[:8], "pow2") for t in (a, b))
    first = torch.tensor([1024], dtype=torch.int32, device=DEVICE)
    assert torch.equal(dw[1], kernels.grouped_wgrad(a_first, b_first, first)[0])


COMPILE = """
import kernels, sys, triton
from kernels import BLOCK, gl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

def descriptor(name, dtype, rows, cols):
    layout = gl.NVMMASharedLayout.get_default_for([rows, cols], dtype)
    return f"tensordesc<{name}[{rows}, {cols}],{layout!r}>"

def report(level, capability, source, kernel, types, constants, **options):
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    compiled = triton.compile(source(kernel, signature, constants, attrs), target=GPUTarget("cuda", capability, 32),
                              options=options)
    print("RESULT", level, capability, compiled.metadata.shared, flush=True)

pointers = dict.fromkeys(("a_scale", "b_scale"), "*fp32") | dict.fromkeys(("tile_expert", "ends"), "*i32")
cases = [(False, 1, 128, 2), (True, 128, 128, 2), (True, 128, 128, 4), (True, 1, 1, 2), (True, 1, 1, 4)]
for wgrad, a_per, b_per, out_bytes in cases[int(sys.argv[1])::2]:   # fprop, dgrad; wgrad, requantized: bf16 and fp32
    out, out_type = ("bf16", gl.bfloat16) if out_bytes == 2 else ("fp32", gl.float32)
    layout = dict(WGRAD=wgrad, A_PER=a_per, B_PER=b_per)
    box, options = kernels._hopper_options(b_per, out_bytes)
    types = dict(a=descriptor("fp8e4nv", gl.float8e4nv, BLOCK, BLOCK),
                 out=descriptor(out, out_type, *box), **pointers)
    report("hopper", 90, GluonASTSource, kernels._hopper_gemm_kernel, dict(types, b=types["a"]),
           dict(layout, PROGRAMS=132, STAGES=options.pop("STAGES"), BUFFERS=options.pop("BUFFERS")), **options)
    for capability in (89, 90, 100, 120):
        types = dict(a="*u8", b="*u8", out="*" + out, **pointers)
        report("loop", capability, ASTSource, kernels._grouped_gemm_kernel, types, dict(layout, TILE=BLOCK),
               num_warps=8, num_stages=3)
"""


def test_gemms_compile_without_a_gpu(tmp_path):
    """Both GEMM kernels for every layout of scales, by whatever Triton is installed: no spills, and they fit in the
    shared memory of the GPUs they are meant for: 227 KB on Hopper; 99 KB, what 8.9 and 12.0 have, for the loop."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DUMP_PTXAS_LOG": "1"}
    halves = [subprocess.Popen([sys.executable, "-c", COMPILE, half], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, cwd=ROOT, env=env) for half in "01"]              # two cores, two processes
    lines = [line for half in halves for line in half.communicate()[0].splitlines()]
    assert not any(half.returncode for half in halves), lines
    results = [line.split()[1:] for line in lines if line.startswith("RESULT")]
    assert len(results) == 25
    for level, capability, shared in results:
        limit = (227 if level == "hopper" else 99) * 1024
        assert int(shared) <= limit, f"{level} for sm_{capability} needs {shared} bytes"
    spills = [line for line in lines if "bytes spill stores" in line]
    assert len(spills) == 25 and all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills), spills


# ---- routing --------------------------------------------------------------------------------------------------------

ROUTES = [  # T, E, K and the reason
    (300, 4, 2, "T*K is no multiple of 128"),
    (1, 4, 1, "one token"),
    (130, 5, 1, "K = 1, prime E"),
    (64, 3, 3, "K = E: every expert sees every token"),
    (200, 7, 2, "prime E"),
]


def routing(T, E, K, kind="random", seed=0):
    """experts [T, K] without repeats in a row, probs [T, K] that sum to 1."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(T, E, generator=g)
    if kind == "one":
        scores[:, 1] += 10                                              # expert 1 is everybody's first choice
    if kind == "empty":
        scores[:, E // 2] -= 10                                         # nobody's choice, in the middle
    probs, experts = scores.softmax(-1).topk(K, dim=-1)
    return experts.to(DEVICE), (probs / probs.sum(-1, keepdim=True)).to(DEVICE)


@pytest.mark.parametrize("kind", ["random", "one", "empty"])
@pytest.mark.parametrize("T, E, K, reason", ROUTES)
def test_plan(T, E, K, reason, kind):
    if kind == "empty" and K == E:
        kind = "random"                                                 # nobody can be empty
    experts, _ = routing(T, E, K, kind)
    plan = fp8flow.make_plan(experts, E)
    M = len(plan.token)
    assert M % BLOCK == 0 and M == -(-(T * K + E * 127) // BLOCK) * BLOCK           # static: a function of T, K, E
    assert plan.counts.sum() == T * K
    assert torch.equal(plan.counts, torch.stack([(experts == e).sum() for e in range(E)]))
    padded = (plan.counts + 127) // BLOCK * BLOCK
    assert torch.equal(plan.ends, padded.cumsum(0).int())
    live, unpadded = plan.pair >= 0, plan.unpadded
    assert live.sum() == T * K and torch.equal(plan.pair[live].sort().values, torch.arange(T * K, device=DEVICE))
    assert torch.equal(plan.pair[plan.slot.flatten()], torch.arange(T * K, device=DEVICE))          # inverse
    assert torch.equal(plan.token[live], plan.pair[live] // K) and (plan.token[~live] == -1).all()
    assert torch.equal(plan.tile_expert.repeat_interleave(BLOCK)[live], experts.flatten()[plan.pair[live]].int())
    used = plan.ends[-1] // BLOCK
    assert (plan.tile_expert[used:] == -1).all() and (plan.tile_expert[:used] >= 0).all()
    assert torch.equal(unpadded.slot[unpadded.row_of_pair.flatten()], plan.slot.flatten())
    assert torch.equal(unpadded.token[unpadded.row_of_pair.flatten()], torch.arange(T * K, device=DEVICE) // K)
    assert torch.equal(unpadded.row_of_slot[unpadded.slot], torch.arange(T * K, device=DEVICE))
    if kind == "one" and K == 1:
        assert plan.counts.tolist() == [T if e == 1 else 0 for e in range(E)]


def test_plan_by_hand():
    """The example in make_plan's docstring."""
    plan = fp8flow.make_plan(torch.tensor([[1], [0], [1]], device=DEVICE), 2, block=4)
    assert plan.token.tolist() == [1, -1, -1, -1, 0, 2, -1, -1, -1, -1, -1, -1]
    assert plan.slot.tolist() == [[4], [0], [5]] and plan.tile_expert.tolist() == [0, 1, -1]
    assert plan.ends.tolist() == [4, 8] and plan.counts.tolist() == [1, 2]


def test_permute_round_trip():
    """Fused and unfused permute+pad agree, and unpermute(permute(x)) is K times x."""
    experts, _ = routing(70, 5, 2)
    plan, x = fp8flow.make_plan(experts, 5), data("plain", 70, 128)
    fused, unfused = (fp8flow.Recipe(permute=p) for p in ("fused", "unfused"))
    used = (plan.tile_expert >= 0).repeat_interleave(BLOCK)
    for t in (x, kernels.quantize(x)):
        a, b = fp8flow.permute(t, plan, fused), fp8flow.permute(t, plan, unfused)
        pick = (lambda q: kernels.dequantize(q)[used]) if isinstance(t, QTensor) else (lambda y: y[used])
        assert torch.equal(pick(a), pick(b))
    for recipe in (fused, unfused):
        assert torch.equal(fp8flow.unpermute(fp8flow.permute(x, plan, recipe), plan, recipe), 2 * x)


# ---- the layer ------------------------------------------------------------------------------------------------------

def layer_inputs(T, D, width, E, K, kind="random", seed=0):
    experts, probs = routing(T, E, K, kind, seed)
    g = torch.Generator().manual_seed(seed + 1)
    x, dout = (torch.randn(T, D, generator=g).to(DEVICE, torch.bfloat16) for _ in range(2))
    w1 = (torch.randn(E, 2 * width, D, generator=g) * D ** -0.5).to(DEVICE)
    w2 = (torch.randn(E, D, width, generator=g) * width ** -0.5).to(DEVICE)
    return experts, probs, x, dout, w1, w2


def build_layer(recipe, w1, w2):
    module = fp8flow.Experts(len(w1), w1.shape[2], w2.shape[2], recipe).to(DEVICE)
    with torch.no_grad():
        module.w1.copy_(w1)
        module.w2.copy_(w2)
    return module


def run_layer(recipe, experts, probs, x, dout, w1, w2, module=None):
    """(out, dx, dprobs, dw1, dw2) of the expert layer."""
    module = module or build_layer(recipe, w1, w2)
    x, probs = x.clone().requires_grad_(), probs.clone().requires_grad_()
    out = module(x, probs, fp8flow.make_plan(experts, len(w1)))
    out.backward(dout)
    return out.detach(), x.grad, probs.grad, module.w1.grad, module.w2.grad


def exact_layer(experts, probs, x, dout, w1, w2):
    """The same in fp64, token by expert mask, nothing shared with the code under test."""
    x, probs, w1, w2 = (t.double().detach().requires_grad_() for t in (x, probs, w1, w2))
    out = torch.zeros_like(x)
    for e in range(len(w1)):
        weight = torch.where(experts == e, probs, 0).sum(1, keepdim=True)
        gate, up = (x @ w1[e].T).chunk(2, -1)
        out = out + (torch.nn.functional.silu(gate) * up * weight) @ w2[e].T
    out.backward(dout.double())
    return out.detach(), x.grad, probs.grad, w1.grad, w2.grad


NAMES = ["out", "dx", "dprobs", "dw1", "dw2"]
# Each FP8 operand adds 2.7% of noise (31.5 dB), and an output passes three or four of them: 31.5 - 10 log10(4) = 25.5
# before SwiGLU spreads it. fp32 scales requantized add a second rounding to half of the wgrad operands.
FP8_BAR, REQUANT_BAR, BF16_BAR = 22, 20, 42


@pytest.mark.parametrize("recipe", list(fp8flow.RECIPES))
@pytest.mark.parametrize("T, D, width, E, K, kind", [(150, 128, 256, 3, 2, "empty")] + (
    [(2048, 1024, 1408, 8, 2, "random"), (1000, 2048, 512, 7, 3, "one"), (4096, 512, 1536, 16, 4, "empty")]
    if CUDA else []))
def test_layer_against_fp64(T, D, width, E, K, kind, recipe):
    recipe, inputs = fp8flow.RECIPES[recipe], layer_inputs(T, D, width, E, K, kind)
    bar = BF16_BAR if recipe.precision == "bf16" else FP8_BAR if recipe.transpose == "direct" else REQUANT_BAR
    for name, got, want in zip(NAMES, run_layer(recipe, *inputs), exact_layer(*inputs)):
        assert got.shape == want.shape and sqnr(got, want) > bar, f"{name}: {sqnr(got, want):.1f} dB"
        if name.startswith("dw") and kind == "empty":
            assert (got[E // 2] == 0).all()


@pytest.mark.parametrize("recipe", list(fp8flow.RECIPES))
def test_twins_and_kernels_agree(recipe, monkeypatch):
    inputs = layer_inputs(100, 128, 128, 3, 2)
    with_kernels = run_layer(fp8flow.RECIPES[recipe], *inputs)
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    for name, a, b in zip(NAMES, with_kernels, run_layer(fp8flow.RECIPES[recipe], *inputs)):
        assert sqnr(a, b) > 38, f"{name}: {sqnr(a, b):.1f} dB"          # bf16 rounding of H moves a few codes by one


@pytest.mark.parametrize("recipe", list(fp8flow.RECIPES))
def test_recompute_is_bit_identical(recipe):
    inputs = layer_inputs(100, 128, 128, 3, 2) if CUDA else layer_inputs(40, 128, 128, 2, 2)
    recipe = fp8flow.RECIPES[recipe]
    again = run_layer(fp8flow.replace(recipe, recompute="on"), *inputs)
    for a, b in zip(run_layer(recipe, *inputs), again):
        assert torch.equal(a, b)


def test_nan_reaches_the_output_of_its_token_only():
    experts, probs, x, dout, w1, w2 = layer_inputs(100, 128, 128, 3, 2)
    x[7, 3] = torch.inf
    out = run_layer(fp8flow.RECIPES["flow"], experts, probs, x, dout, w1, w2)[0]
    assert out[7].isnan().all() and out[:7].isfinite().all() and out[8:].isfinite().all()


class NoSync(TorchDispatchMode):
    """What would make the host wait for a GPU, told on any device: values it reads, shapes that depend on data."""
    WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "repeat_interleave", "equal"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in self.WAITS and not by_mask, f"{func} waits for the GPU"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", list(fp8flow.RECIPES))
def test_no_sync_in_the_layer(recipe, monkeypatch):
    inputs = layer_inputs(256, 256, 256, 4, 2) if CUDA else layer_inputs(20, 128, 128, 2, 1)
    module = build_layer(fp8flow.RECIPES[recipe], *inputs[-2:])
    if CUDA:
        run_layer(None, *inputs, module)                                # compiled before
    monkeypatch.setattr(torch.Tensor, "tolist", None)                   # reads without a dispatch
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoSync():
            run_layer(None, *inputs, module)                            # weight casts, plan, forward, backward
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")


# ---- weights are cast once per optimizer step, and never used stale -------------------------------------------------

def test_changed_weights_are_cast_again(tmp_path):
    experts, probs, x, _, w1, w2 = layer_inputs(20, 128, 128, 2, 1)
    module, plan = build_layer(fp8flow.RECIPES["flow"], w1, w2), fp8flow.make_plan(experts, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    casts = []

    def fresh(layer=module):
        """The output equals that of weights cast this moment; `casts` counts the casts that the layer made itself."""
        with kernels.trace() as launches:
            y = layer(x, probs, plan)
        casts.append(sum(launch.op == "quantize_weight" for launch in launches) // 2)
        layer.cast_weights()
        assert torch.equal(y, layer(x, probs, plan))
        return y
    first = fresh()
    assert torch.equal(fresh(), first) and casts == [1, 0]              # unchanged: not cast again
    (module.w1.sum() + module.w2.sum()).backward()
    optimizer.step()                                                    # fused: leaves w1._version alone
    assert not torch.equal(fresh(), first) and casts[-1] == 1
    with torch.no_grad():
        module.w2[0].mul_(2)
    fresh()
    state = {name: 3 * w for name, w in module.state_dict().items()}
    module.load_state_dict(state)
    fresh()
    module.load_state_dict(state, assign=True)
    fresh()
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.w1.neg_()
    fresh(other)
    fresh()
    assert casts[2:] == [1, 1, 1, 1, 1, 0]
    module.to(torch.bfloat16).to(torch.float32)
    fresh()
    assert casts[-1] == 1
    with torch.no_grad():
        torch.func.functional_call(module, dict(w1=module.w1 * 2, w2=module.w2 * 2), (x, probs, plan))
    # those weights are gone, but no others can get their addresses and be taken for them
    assert [w.data_ptr() for w in module.cast_from] == [address for _, address, *_ in module.operands_of[1:]]
    fresh()


def test_evaluation_serves_training():
    experts, probs, x, dy, w1, w2 = layer_inputs(20, 128, 128, 2, 1)
    module, plan = build_layer(fp8flow.RECIPES["flow"], w1, w2), fp8flow.make_plan(experts, 2)
    with torch.inference_mode():
        module(x, probs, plan)
    module(x, probs, plan).backward(dy)
    assert module.w1.grad.isfinite().all() and module.w1.grad.any()


def test_no_second_derivative():
    experts, probs, x, dy, w1, w2 = layer_inputs(20, 128, 128, 2, 1)
    module = build_layer(fp8flow.RECIPES["bf16"], w1, w2)
    y = module(x.requires_grad_(), probs, fp8flow.make_plan(experts, 2))
    dx, = torch.autograd.grad(y, x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# ---- memory: what backward has used is freed, even while the graph lives --------------------------------------------

def held_by(ctx) -> list:
    """The attributes of an autograd context that hold activations or weights."""
    return [name for name, value in vars(ctx).items() for t in kernels.leaves((value,)) if t.is_floating_point()]


@pytest.mark.parametrize("spec", ["bf16", "naive", "flow", "flow,recompute=on"])
def test_activations_do_not_outlive_backward(spec):
    experts, probs, x, dy, w1, w2 = layer_inputs(20, 128, 128, 2, 1)
    module = build_layer(fp8flow.parse_spec(spec), w1, w2)
    y = module(x.requires_grad_(), probs, fp8flow.make_plan(experts, 2))
    assert held_by(y.grad_fn) == [] and sum(t is not None for t in y.grad_fn.saved_tensors) > 3
    y.backward(dy)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.grad_fn.saved_tensors                                         # y and its graph live, what was saved is gone


def test_a_step_leaves_no_graph_behind(monkeypatch):
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    gpt = model.GPT(train_py.PRESETS["tiny"], fp8flow.RECIPES["flow"])
    text = torch.randint(256, (1, 17))
    loss, balance = gpt(text[:, :-1], text[:, 1:])
    (loss + balance).backward()
    held = [name for module in gpt.modules() for name, value in vars(module).items()
            for t in kernels.leaves((value,)) if t.grad_fn is not None]
    assert held == []


# ---- the trace and the ledger ---------------------------------------------------------------------------------------

def traced(recipe):
    with kernels.trace() as launches:
        run_layer(recipe, *layer_inputs(1, 128, 128, 1, 1))             # one tile of slots: the casts are the same
    return launches


def count(recipe):
    """(the casts, the launches they ought to be: kernels.quantize and kernels.dequantize, counted by themselves)"""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("quantize", "dequantize"):
            original = getattr(kernels, name)
            patch.setattr(kernels, name, lambda *a, _f=original, _n=name, **k: (calls.append(_n), _f(*a, **k))[1])
        with fp8flow.count_casts() as casts:
            run_layer(recipe, *layer_inputs(1, 128, 128, 1, 1))
    return casts, calls


@pytest.mark.parametrize("spec, casts", [
    ("bf16", 0), ("naive", 12), ("flow", 2), ("naive,scales=pow2", 12), ("naive,scales=pow2,transpose=direct", 4),
    ("naive,swiglu=fused", 10), ("naive,permute=fused", 12), ("flow,transpose=requant", 10), ("flow,swiglu=unfused", 4),
    ("flow,permute=unfused", 2), ("flow,recompute=on", 2), ("naive,recompute=on", 12), ("bf16,recompute=on", 0)])
def test_ledger(spec, casts):
    found, calls = count(fp8flow.parse_spec(spec))
    assert [launch.op for launch in found] == calls and len(calls) == casts
    if casts == 12:
        four_by_three = {(tensor, cast) for tensor in ("X", "A", "dY", "dH") for cast in ("Q", "DQ", "Q'")}
        assert {(launch.tensor, launch.cast) for launch in found} == four_by_three
    if casts == 2:
        assert [(c.tensor, c.cast, c.direction) for c in found] == [("X", "Q", "forward"), ("dY", "Q", "backward")]


@pytest.mark.parametrize("recipe", ["naive", "flow"])
def test_the_margin_of_the_layer_tells_the_casts(recipe):
    """The numbers and names behind '# naive 1   flow 1   Q(X)' in the source are those of a run."""
    written = {}
    for line in inspect.getsource(fp8flow.FP8Experts).splitlines():
        if margin := re.search(rf"# .*{recipe} ([\d ]+)", line):
            names = re.findall(r"(DQ|Q'|Q)\((\w+)\)", line[margin.start():])
            written |= zip(map(int, margin[1].split()), names, strict=True)
    casts = [(launch.cast, launch.tensor) for launch in traced(fp8flow.RECIPES[recipe]) if launch.cast]
    assert written == dict(enumerate(casts, 1)) and len(casts) == {"naive": 12, "flow": 2}[recipe]


def test_trace_of_flow():
    """Every launch has a tensor, a direction and bytes; the GEMMs stand where the dataflow has them."""
    launches = traced(fp8flow.RECIPES["flow"])
    assert [(x.tensor, x.direction) for x in launches if x.op in ("grouped_gemm", "grouped_wgrad")] == [
        ("H", "forward"), ("Y", "forward"),
        ("dA", "backward"), ("dX", "backward"), ("dW2", "backward"), ("dW1", "backward")]
    assert [x.tensor for x in launches if x.op == "quantize_weight"] == ["W1", "W2"] and all(x.tensor for x in launches)
    quantize = next(x for x in launches if x.op == "quantize")
    assert launches.bytes(quantize) == 128 * 2 + 128 + 4                # one token: bf16 in; codes and a scale out
    assert kernels._traces == [] and kernels._directions == ["forward"]


def test_bytes_of_a_launch():
    """Slots of unused tiles move nothing: here one tile of three."""
    x, rows = data("plain", 4, 256), torch.zeros(384, dtype=torch.int64, device=DEVICE)
    with kernels.trace() as launches:
        kernels.named("X", kernels.gather_rows(x, rows, torch.tensor([0, -1, 2], dtype=torch.int32, device=DEVICE)))
    assert launches.bytes(launches[0]) == 4 * 256 * 2 + 256 * 8 + 3 * 4 + 256 * 256 * 2     # x, rows, tiles; out


@pytest.mark.skipif(not CUDA, reason="asks the profiler which kernels ran")
@pytest.mark.parametrize("spec", ["bf16", "naive", "flow", "flow,recompute=on", "flow,permute=unfused"])
def test_the_profiler_sees_what_the_trace_says(spec):
    from torch.profiler import ProfilerActivity, profile
    layer = fp8flow.Layer(fp8flow.parse_spec(spec), *fp8flow.random_layer(1000, 256, 384, 5, 2, DEVICE))
    layer.step()                                                        # compiled before
    with kernels.trace() as launches, profile(activities=[ProfilerActivity.CUDA]) as prof:
        layer.step()
        torch.cuda.synchronize()
    ours = re.compile(r"_(quantize|dequantize|scaling_aware_transpose|transpose|swiglu|swiglu_backward|gather_rows|"
                      r"sum_rows|hopper_gemm|grouped_gemm)_kernel")
    seen = [ours.match(event.name)[1] for event in sorted(prof.events(), key=lambda event: event.time_range.start)
            if ours.match(event.name)]
    gemm = "hopper_gemm" if "hopper" in LEVELS else "grouped_gemm"
    kernel = {"swiglu_quantize": "swiglu", "swiglu_backward_quantize": "swiglu_backward", "grouped_gemm": gemm,
              "grouped_wgrad": gemm}
    assert seen == [kernel.get(launch.op, launch.op) for launch in launches if launch.op != "torch_grouped_mm"]


def test_what_the_commands_explain(capsys, monkeypatch):
    """The parts of `python fp8flow.py` that need no GPU."""
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    device = torch.device(DEVICE)
    fp8flow.print_ledger(device)
    fp8flow.print_double_quantization(device)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = {line[0]: line[1] for line in lines if line and line[0] in fp8flow.RECIPES and line[1].isdigit()}
    assert counts == {"bf16": "0", "naive": "12", "flow": "2"}
    gaussian = next(line for line in lines if line and line[0] == "Gaussian")
    fp32_once, fp32_twice, pow2_once, pow2_twice, direct = (float(v) for v in gaussian if v[-1].isdigit())
    assert fp32_once - fp32_twice > 2 and pow2_once - pow2_twice < 0.1 and pow2_once - direct < 0.1
    for spec, last in (("naive", ["34", "12"]), ("flow", ["18", "2"]), ("bf16", ["12", "0"])):
        monkeypatch.setattr(kernels, "LAYERS", ((64, 128, 128, 4, 2),))
        fp8flow.print_trace(spec, device)
        assert capsys.readouterr().out.splitlines()[-1].split()[:2] == last


def test_bench_lines(capsys, monkeypatch):
    """Every benchmark line runs what it names; the clock is a stub here."""
    if not CUDA:
        monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    monkeypatch.setattr(kernels.Bench, "__init__", lambda self: vars(self).update(ceiling={"GB/s": 1.0, "TFLOPS": 1.0}))
    monkeypatch.setattr(kernels.Bench, "us", lambda self, *fns: [(fn(), 2.0)[1] for fn in fns])
    for bench in kernels.BENCHES.values():
        bench(kernels.Bench(), 64, 128, 128, 2, 1, DEVICE)
    printed = capsys.readouterr().out
    for line in ("quantize ", "permute+pad FP8", "scaling-aware transpose", "SwiGLU backward+quantize", "fc1 fprop",
                 "fc2 dgrad", "fc2 wgrad to bf16, requantized"):
        assert line in printed
    rows, slots, tiles, ends = kernels.balanced_routing(64, 2, 3, DEVICE)
    live = rows >= 0
    tokens = torch.arange(64, device=DEVICE)
    assert live.sum() == 64 * 3 // 2 * 2 and torch.equal(rows[slots], tokens[:, None].expand(-1, 3))
    assert len(tiles) * BLOCK == len(rows) == ends[-1]


def test_kernels_py_refuses_names_it_does_not_know(capsys):
    with pytest.raises(SystemExit) as error:
        kernels.main(["gemm", "bogus"])
    assert error.value.code == 2 and "'bogus'" in capsys.readouterr().err
    if not CUDA:
        with pytest.raises(SystemExit) as error:
            kernels.main([])
        assert error.value.code == 2 and "no GPU" in capsys.readouterr().err.splitlines()[-1]


# ---- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, says", [
    (dict(scales="fp32"), "transpose=direct needs scales=pow2"), (dict(swiglu="maybe"), "swiglu='maybe'"),
    (dict(recompute="no"), "recompute='no'"), (dict(recompute=True), "recompute=True"),
    (dict(precision="bf16", swiglu="unfused"), "swiglu=unfused is a switch of FP8")], ids=str)
def test_recipe_refuses(changes, says):
    with pytest.raises(ValueError, match=says):
        fp8flow.Recipe(**changes)


def test_specs():
    assert fp8flow.parse_spec("flow") == fp8flow.Recipe()
    assert fp8flow.parse_spec("flow,swiglu=unfused,recompute=on") == fp8flow.Recipe(swiglu="unfused", recompute="on")
    for spec, says in (("flaw", "'flaw'"), ("flow,fast=yes", "'fast'"), ("flow,swiglu=half", "'half'"), ("", "''"),
                       ("flow,swiglu", "''"), ("flow,scales=fp32", "scales=pow2"),
                       ("bf16,scales=fp32", "switch of FP8"),
                       ("flow,swiglu=fused,swiglu=unfused", "twice")):
        with pytest.raises(ValueError, match=says):
            fp8flow.parse_spec(spec)


def misuse():
    """(what is named, what says it, the call): each was garbage or a crash without a check."""
    k, x, h, prob = kernels, data("plain", 256, 256), data("plain", 256, 512), torch.ones(256, device=DEVICE)
    w = data("plain", 256, 256, dtype=torch.float32)[None]
    q, fp32, (b, _) = k.quantize(x), k.quantize(x, "fp32"), k.quantize_weight(w)
    t, rows = k.scaling_aware_transpose(q), torch.arange(256, device=DEVICE)
    tiles, ends = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in ([0, 0], [256]))
    experts, layer = rows[:100, None] % 2, fp8flow.Experts(2, 256, 128, fp8flow.Recipe()).to(DEVICE)
    plan, p = fp8flow.make_plan(experts, 2), prob[:100, None]
    return [
        ("x", "multiple of 128", lambda: k.quantize(x[:, :100])),
        ("x", "2 axes", lambda: k.quantize(x[0])),
        ("x", "int64", lambda: k.quantize(rows[:, None].expand(-1, 128))),
        ("x", "empty", lambda: k.quantize(x[:0])),
        ("x", "list", lambda: k.quantize([1.0])),
        ("scales", "'e8m0'", lambda: k.quantize(x, "e8m0")),
        ("scales", "'e8m0'", lambda: k.swiglu_quantize(h, prob, "e8m0")),
        ("scales", "'row'", lambda: k.quantize_weight(w, "row")),
        ("scales", "'row'", lambda: k.swiglu_backward_quantize(x, h, prob, "row")),
        ("w", "3 axes", lambda: k.quantize_weight(w[0])),
        ("w", "multiple of 128", lambda: k.quantize_weight(w[:, :100])),
        ("q", "QTensor", lambda: k.dequantize(x)),
        ("q", "QTensor", lambda: k.dequantize(None)),
        ("q.scale", "quantize again", lambda: k.dequantize(QTensor(q.data[:200], t.scale[:, :1], "pow2"))),
        ("da", "NoneType", lambda: k.swiglu_backward(None, h, prob)),
        ("dtype", "int8", lambda: k.dequantize(q, torch.int8)),
        ("q.scale", "quantize again", lambda: k.dequantize(q._replace(scale=q.scale[:1]))),
        ("q.scales", "'fp32'", lambda: k.scaling_aware_transpose(fp32)),
        ("q.scale", "quantize again", lambda: k.scaling_aware_transpose(t)),
        ("q.data", "multiple of 128", lambda: k.scaling_aware_transpose(k.quantize(x[:100]))),
        ("rows", "multiple of 128", lambda: k.scaling_aware_transpose(q, rows[:100])),
        ("rows", "int32", lambda: k.scaling_aware_transpose(q, rows.int())),
        ("tiles", "2 long", lambda: k.scaling_aware_transpose(q, rows, tiles[:1])),
        ("x", "multiple of 128", lambda: k.transpose(x[:100])),
        ("h", "gate and up", lambda: k.swiglu(h[:, :384], prob)),
        ("prob", "256 long", lambda: k.swiglu(h, prob[:128])),
        ("prob", "int64", lambda: k.swiglu_backward(x, h, prob.long())),
        ("da", "256 long", lambda: k.swiglu_backward(x[:128], h, prob)),
        ("da", "256 long", lambda: k.swiglu_backward_quantize(x[:, :128], h, prob)),
        ("da", "float32", lambda: k.swiglu_backward(x.float(), h, prob)),
        ("tiles", "int64", lambda: k.swiglu(h, prob, tiles.long())),
        ("rows", "int32", lambda: k.gather_rows(x, rows.int())),
        ("x.scale", "quantize again", lambda: k.gather_rows(t, rows)),
        ("x", "multiple of 128", lambda: k.gather_rows(x[:, :72], rows)),
        ("slots", "2 axes", lambda: k.sum_rows(x, rows)),
        ("b.data", "256 long", lambda: k.grouped_gemm(q, k.quantize_weight(w[..., :128])[0], tiles, ends)),
        ("b", "QTensor", lambda: k.grouped_gemm(q, w, tiles, ends)),
        ("a.scale", "quantize again", lambda: k.grouped_gemm(t, b, tiles, ends)),
        ("tile_expert", "2 long", lambda: k.grouped_gemm(q, b, tiles[:1], ends)),
        ("ends", "1 long", lambda: k.grouped_gemm(q, b, tiles, ends.repeat(2))),
        ("ends", "int64", lambda: k.grouped_gemm(q, b, tiles, ends.long())),
        ("b.data", "256 long", lambda: k.grouped_wgrad(t, k.scaling_aware_transpose(k.quantize(x[:128])), ends)),
        ("a.scale", "quantize again", lambda: k.grouped_wgrad(t._replace(scale=t.scale[:1]), t, ends)),
        ("dtype", "float16", lambda: k.grouped_wgrad(t, t, ends, torch.float16)),
        ("experts", "int32", lambda: fp8flow.make_plan(experts.int(), 2)),
        ("probs", "100 long", lambda: layer(x[:100], prob[:, None], plan)),
        ("x", "100 long", lambda: layer(x[:200], p, plan)),                             # dropped half of the tokens
        ("x", "float32", lambda: layer(x[:100].float(), p, plan)),
        ("plan.ends", "2 long", lambda: layer(x[:100], p, fp8flow.make_plan(experts, 3)))]


@pytest.mark.parametrize("twin", [False, True])
def test_wrappers_refuse(twin, monkeypatch):
    if twin:
        monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    for name, says, call in misuse():
        with pytest.raises(ValueError) as error:
            call()
        message = str(error.value)
        assert re.match(rf"{name}\b", message) and says in message and "\n" not in message, message


def test_twins_refuse_wrong_indices(monkeypatch):
    """Values are checked where reading them is no sync."""
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    monkeypatch.setattr(kernels, "INTERPRET", False)
    x, (w, _) = data("plain", 128, 128), kernels.quantize_weight(data("plain", 128, 128, dtype=torch.float32)[None])
    q, one = kernels.quantize(x), torch.ones(1, dtype=torch.int32, device=DEVICE)
    for name, call in (("rows", lambda: kernels.gather_rows(x, torch.tensor([128], device=DEVICE))),
                       ("slots", lambda: kernels.sum_rows(x, torch.tensor([[-1]], device=DEVICE))),
                       ("rows", lambda: kernels.scaling_aware_transpose(q, torch.full((128,), 128, device=DEVICE))),
                       ("tile_expert", lambda: kernels.grouped_gemm(q, w, one, 128 * one)),
                       ("tile_expert", lambda: kernels.grouped_gemm(q, w, 0 * one, 0 * one)),
                       ("ends", lambda: kernels.grouped_gemm(q, w, 0 * one, 64 * one)),
                       ("ends", lambda: kernels.grouped_wgrad(q, q, 256 * one)),
                       ("ends", lambda: kernels.grouped_wgrad(q, q, torch.tensor([128, 0], device=DEVICE).int()))):
        with pytest.raises(ValueError, match=f"^{name} holds"):
            call()
    with pytest.raises(ValueError, match="^experts holds values"):
        fp8flow.make_plan(torch.tensor([[2]]), 2)
    monkeypatch.setattr(kernels, "INTERPRET", True)                     # as with kernels: nothing is read, but -1 fails
    for wrong in (-1, 2):
        with pytest.raises(RuntimeError, match="out of bounds"):
            fp8flow.make_plan(torch.tensor([[0], [wrong]]), 2)


def train(*args, **environment):
    """train.py in a process of its own, without the interpreter: on a CPU the twins train."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


# ---- the command line: one sentence that names the argument, exit code 2, nothing written ---------------------------

BAD = [  # what is typed ({tmp} holds the files below), and what the last line must say
    ("--recipe flaw", "'flaw'"), ("--recipe flow,fast=yes", "'fast'"), ("--recipe flow,swiglu=half", "'half'"),
    ("--recipe ,", "''"), ("--recipe bf16 --swiglu unfused", "swiglu=unfused"), ("--scales fp32", "scales=pow2"),
    ("--recipe flow,swiglu=unfused --permute unfused", "--permute"), ("--recompute maybe", "--recompute"),
    ("--compare fp4", "'fp4'"), ("--compare flow flow", "flow is the same"),
    ("--compare flow flow,swiglu=fused", "flow,swiglu=fused is the same"),
    ("--compare flow,permute=unfused,swiglu=unfused flow,swiglu=unfused,permute=unfused", "is the same"),
    ("--compare --scales pow2", "--scales"),
    ("--ablate --swiglu fused", "--swiglu"), ("--ablate --recipe flow", "--recipe"),
    ("--compare --sample x", "--sample"), ("--prom x", "--prom"), ("--bogus", "--bogus"), ("--preset huge", "--preset"),
    ("--checkpoint some", "--checkpoint"),
    ("--seed -1", "--seed -1"), ("--seed 18446744073709551616", "--seed 18446744073709551616"), ("--seed x", "--seed"),
    ("--seeds 0", "--seeds 0"), ("--seeds a", "--seeds a"), ("--seeds 1,1", "--seeds 1,1"),
    ("--seeds 2 --seed 1", "--seed 1"), ("--n-heads 0", "n_heads=0"), ("--n-heads 3", "n_heads=3"),
    ("--n-heads 128", "n_heads=128"), ("--n-layers 0", "n_layers=0"), ("--d-model 100", "d_model=100"),
    ("--d-expert 192", "d_expert=192"), ("--top-k 9", "top_k=9"), ("--top-k 0", "top_k=0"),
    ("--d-model 1280000", "d_model=1280000"), ("--n-experts 1000000000", "n_experts="),
    ("--steps 0", "steps=0"), ("--batch 0", "batch=0"), ("--val-batches 0", "val_batches=0"),
    ("--steps 1e3", "--steps"), ("--steps 3000000000", "steps=3000000000"), ("--batch 100000000", "batch=100000000"),
    ("--val-batches 1000000000", "val_batches=1000000000"), ("--d-model 128" + 330 * "0", "d_model=128000"),
    ("--probe 0", "--probe 0"), ("--probe x", "--probe"),
    ("--lr 0", "lr=0"), ("--lr inf", "lr=inf"), ("--lr nan", "lr=nan"), ("--lr -1", "lr=-1"),
    ("--data {tmp}/none", "does not exist"), ("--data=", "--data ''"), ("--data {tmp}/empty.txt", "no text"),
    ("--data {tmp}/short.txt", "too short"), ("--data {tmp}/folder", "no text"),
    ("--seq-len 100000000", "seq_len=100000000"),
    ("--out=", "--out ''"), ("--out {tmp}/short.txt", "--out"), ("--out {tmp}/short.txt/x", "--out"),
    ("--out {tmp}/dangling", "--out"), ("--out {tmp}/" + 300 * "x", "--out"), ("--out {tmp}/locked", "--out"),
    ("--data {tmp}/text --out {tmp}/text/out", "inside --data"),
    ("--data {tmp}/text --out {tmp}/taken", "something else"), ("--resume", "--resume needs --out"),
    ("--overwrite", "--overwrite needs --out"), ("--resume --overwrite --out {tmp}/x", "--overwrite"),
    ("--resume --out {tmp}/x", "is no folder"), ("--sample=", "--sample ''"), ("--data " + 300 * "x", "does not exist"),
    ("--prompt x", "--prompt 'x'"), ("--prompt= --sample {tmp}/damaged", "--prompt ''"),
    ("--sample {tmp}/folder", "model.pt"), ("--sample {tmp}/damaged", "damaged")]
BAD += [] if CUDA else [("--device cuda", "--device cuda")]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The folder {tmp} of the cases; the current folder is an empty one inside."""
    for name in ("folder", "text", "taken/flow/log.csv", "damaged", "here", "locked/lock"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "text" / "a.txt").write_text("To be, or not to be, that is the question.\n" * 400)
    (tmp_path / "damaged" / "model.pt").write_bytes(b"PK no archive")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def everything(folder) -> list:
    return sorted(str(p) for p in folder.rglob("*") if p.name != "lock")


def test_train_refuses(files, capsys):
    before = everything(files)
    for line, says in BAD:
        preset = [] if "--preset" in line else ["--preset", "tiny"]
        with pytest.raises(SystemExit) as error:
            train_py.main([*preset, *line.format(tmp=files).split()])
        message = capsys.readouterr().err.splitlines()[-1]
        assert error.value.code == 2 and message.startswith("train.py: error: ") and says in message, (line, message)
        assert everything(files) == before, line
    done = train("--scales", "fp32", "--out", files / "out")            # and once from the shell
    assert done.returncode == 2 and "scales=pow2" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


# ---- training -------------------------------------------------------------------------------------------------------

def read_log(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_training(tmp_path):
    """30 steps of every recipe on the default data: the loss falls, the recipes agree, a picture is drawn."""
    done = train("--compare", "--preset", "tiny", "--steps", "30", "--val-batches", "8", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_log(tmp_path / "compare.csv")
    assert list(rows[0]) == "recipe,casts,val_loss,delta_pct,tokens_per_s,speedup,peak_mem_gb,seed".split(",")
    assert [(r["recipe"], r["casts"]) for r in rows] == [("bf16", "0"), ("naive", "12"), ("flow", "2")]
    assert "byte pairs" in done.stdout and "chaos" in done.stdout and (tmp_path / "loss.png").stat().st_size > 10_000
    for row in rows:
        log = read_log(tmp_path / row["recipe"] / "log.csv")
        losses = [float(r["loss"]) for r in log]
        assert len(log) == 30 and losses[0] > 5 and losses[-1] < 3.6                # ln 256 = 5.5 at the start
        assert abs(float(row["delta_pct"])) < 0.6           # without the gradient of w1 it is 1.0
        assert abs(sum(float(log[-1][f"load_{e}"]) for e in range(4)) - 1) < 1e-3
        left = sorted(p.name for p in (tmp_path / row["recipe"]).iterdir())
        assert left == ["log.csv", "model.pt", "run.json", "sample.txt"]


SMALL = ["--device", "cpu", *"--preset tiny --n-layers 2 --batch 1 --seq-len 32 --val-batches 1".split(),
         *"--steps 24 --val-every 8".split()]


@pytest.fixture
def here(files, monkeypatch):
    """train(args) -> exit code: small runs in this process, on the twins, on a text of their own, a short sample."""
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    generate = model.GPT.generate
    monkeypatch.setattr(model.GPT, "generate", lambda self, prompt, n, seed: generate(self, prompt, 4, seed))
    return lambda *args: train_py.main([*SMALL, "--data", str(files / "text"), *map(str, args)])


def stop_after(monkeypatch, steps: int, act) -> None:
    """act() in the middle of the step after so many."""
    calls, real = iter(range(10 ** 6)), torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_",
                        lambda *a: (act() if next(calls) == steps else None, real(*a))[1])


@pytest.mark.parametrize("spec", ["bf16", "naive", "flow,swiglu=unfused"])
def test_a_stopped_run_goes_on_as_if_it_had_not(spec, here, files, monkeypatch, capsys):
    assert here("--recipe", spec, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert here("--recipe", spec, "--out", "parts") == 130
    assert "stopped by SIGTERM after step 13 of 24" in capsys.readouterr().err
    assert not (files / "here/parts" / spec / "model.pt").exists()
    with pytest.raises(SystemExit):
        here("--recipe", spec, "--out", "parts")                        # not without being asked
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert here("--recipe", spec, "--out", "parts", "--resume") == 0
    whole, parts = (read_log(files / "here" / run / spec / "log.csv") for run in ("whole", "parts"))
    assert [{**row, "tokens_per_s": 0} for row in whole] == [{**row, "tokens_per_s": 0} for row in parts]
    a, b = (torch.load(files / "here" / run / spec / "model.pt")["model"] for run in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_signal_at_any_time_leaves_a_checkpoint(here, files, monkeypatch):
    """Also one that comes after step 10, when it was decided already that a log is due and no checkpoint."""
    with monkeypatch.context() as patch:
        lap, calls = train_py.Log.lap, iter(range(10 ** 6))
        patch.setattr(train_py.Log, "lap",
                      lambda log: (os.kill(os.getpid(), signal.SIGTERM) if next(calls) == 3 else None, lap(log))[1])
        assert here("--out", "x") == 130
    steps = len(read_log(files / "here/x/flow/log.csv"))
    assert torch.load(files / "here/x/flow/checkpoint.pt")["step"] == steps == 11


def test_ctrl_c_behind_a_pipe_leaves_a_checkpoint(tmp_path):
    """`train.py 2>&1 | tee log`: Ctrl-C ends tee as well, and nothing can be written to it any more."""
    (tmp_path / "text").write_text("what is read and what is written " * 300)
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--steps", "100000", "--val-every", "100000"]
    run = subprocess.Popen([*command, "--data", str(tmp_path / "text"), "--out", str(tmp_path / "x")],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"})
    log = tmp_path / "x/flow/log.csv"
    while not log.exists() and run.poll() is None:
        time.sleep(0.05)
    run.stdout.close()
    run.send_signal(signal.SIGINT)
    run.wait(60)
    assert torch.load(tmp_path / "x/flow/checkpoint.pt")["step"] == len(read_log(log)) > 0


def test_a_killed_run_goes_on_from_its_last_validation(here, files, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        def die():
            raise MemoryError
        stop_after(patch, 12, die)
        here("--out", "x", "--probe", "5")
    (files / "here/x/flow/notes.csv").write_text("mine")
    (files / "here/x/compare.csv.new").write_text("what a kill left")
    assert torch.load(files / "here/x/flow/checkpoint.pt")["step"] == 8
    assert [row["step"] for row in read_log(files / "here/x/flow/log.csv")] == [str(step) for step in range(10)]
    assert here("--out", "x", "--resume", "--probe", "5") == 0 and not (files / "here/x/flow/checkpoint.pt").exists()
    assert [row["step"] for row in read_log(files / "here/x/flow/log.csv")] == [str(step) for step in range(24)]
    assert [row["step"] for row in read_log(files / "here/x/flow/probe.csv")][::8] == ["5", "10", "15", "20"]
    assert (files / "here/x/flow/notes.csv").read_text() == "mine" and len(read_log(files / "here/x/compare.csv")) == 1


def test_runs_are_reused_refused_or_cleared(here, files, monkeypatch, capsys):
    assert here("--recipe", "bf16", "--out", "x") == 0
    log = (files / "here/x/bf16/log.csv").read_bytes()
    assert here("--compare", "bf16", "flow", "--out", "x") == 0 and "reused" in capsys.readouterr().out
    assert (files / "here/x/bf16/log.csv").read_bytes() == log
    for changes, says in ((["--lr", "1e-3"], "lr (0.004 there, 0.001 now)"),
                          (["--seed", "1"], "seed (0 there, 1 now)")):
        with pytest.raises(SystemExit):
            here("--recipe", "bf16", "--out", "x", *changes)
        assert says in capsys.readouterr().err.splitlines()[-1]
    with monkeypatch.context() as patch:
        patch.setattr(train_py, "source_hash", lambda: "edited")        # an edited kernel is no finished run
        with pytest.raises(SystemExit):
            here("--recipe", "bf16", "--out", "x")
        assert "source (" in capsys.readouterr().err.splitlines()[-1]
        assert here("--recipe", "bf16", "--out", "x", "--resume") == 0 and "edited" in capsys.readouterr().err
        there = train_py.read_run(files / "here/x/bf16")["config"]
        train_py.check_same(files, there, now := dict(there, source="edited"), resume=True)
        assert now["source"] == f"{there['source']}+edited"             # what goes on is a run of both
    _, held = train_py.claim(files / "here/x")
    with pytest.raises(SystemExit):
        here("--recipe", "bf16", "--out", "x")
    assert "another process" in capsys.readouterr().err.splitlines()[-1]
    held.close()
    assert here("--recipe", "naive", "--out", "x") == 0                  # the table grows, here and from a shell
    assert [row["recipe"] for row in read_log(files / "here/x/compare.csv")] == ["naive", "bf16", "flow"]
    assert here("--recipe", "flow,permute=unfused,swiglu=unfused", "--steps", "2", "--out", "y") == 0
    assert (files / "here/y/flow,swiglu=unfused,permute=unfused/model.pt").exists()         # one spelling of a spec
    for changes in (["--recipe", "flow,recompute=on", "--lr", "1e-3"], ["--compare", "--seeds", "1", "--lr", "1e-3"]):
        with pytest.raises(SystemExit):                                 # nor may others lie beside it
            here("--out", "x", *changes)
        assert "lr (0.004 there, 0.001 now)" in capsys.readouterr().err.splitlines()[-1]
    (files / "here/x/seed-0/wandb").mkdir(parents=True)
    for foreign in ("mine.txt", "seed-0/wandb/run.json"):
        (files / "here/x" / foreign).write_text("{}")
    assert here("--recipe", "naive", "--out", "x", "--overwrite") == 0
    assert (files / "here/x/mine.txt").exists() and (files / "here/x/seed-0/wandb/run.json").exists()
    assert not (files / "here/x/flow").exists() and (files / "here/x/naive/model.pt").exists()
    assert here() == 0 and here() == 0 and (files / "here/out/2/flow/log.csv").exists()       # the next free folder


def test_a_loss_that_is_not_finite_ends_its_run_alone(here, files, capsys, monkeypatch):
    assert here("--compare", "bf16", "flow", "--lr", "1e30", "--out", "x") == 1
    errors = capsys.readouterr().err
    for spec in ("bf16", "flow"):
        assert re.search(rf"{spec}, seed 0: the (loss|gradient of \S+) of step \d+ is not finite", errors)
        assert not (files / f"here/x/{spec}/model.pt").exists()
    with monkeypatch.context() as patch:                                # and stopped in the step that breaks it
        stop_after(patch, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert here("--compare", "bf16", "flow", "--lr", "1e30", "--steps", "1", "--out", "y") == 130
    assert "stopped by SIGTERM when bf16, seed 0 had ended" in capsys.readouterr().err
    assert here("--compare", "bf16", "flow", "--lr", "1e38", "--steps", "1", "--out", "z") == 1       # seen afterwards
    assert capsys.readouterr().err.count("validation loss after the last step is not finite") == 2
    assert not (files / "here/y/flow").exists()


def test_arms_that_test_the_comparison(monkeypatch):
    preset = train_py.replace(train_py.PRESETS["tiny"], n_layers=2)
    def fresh(spec):
        torch.manual_seed(0)
        gpt = model.GPT(preset, train_py.recipe_of(spec))
        train_py.interfere(gpt, spec)
        return gpt
    plain, nudged = (dict(fresh(spec).named_parameters()) for spec in ("bf16", "bf16-nudged"))
    (name, places), = ((n, (plain[n] != nudged[n]).nonzero()) for n in plain if not torch.equal(plain[n], nudged[n]))
    a, b = (weights[name].view(torch.int32)[0, 0] for weights in (plain, nudged))
    assert name == "blocks.0.moe.router.weight" and places.tolist() == [[0, 0]] and abs(a - b) == 1     # the next float
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    tokens = torch.randint(256, (2, 64))
    for spec in ("flow", "flow-harmed"):
        gpt = fresh(spec)
        gpt(tokens, tokens)[0].backward()
        learning = [moe.experts.w1.grad.abs().amax((1, 2)) > 0 for moe in gpt.moes]
        assert torch.stack(learning).tolist() == [[spec == "flow", True] * 2] * 2


def test_damaged_checkpoint_and_sampling(here, files, capsys, monkeypatch):
    assert here("--out", "x") == 0
    capsys.readouterr()
    assert train_py.main(["--sample", str(files / "here/x/flow"), "--prompt", "To be", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("To be")
    with monkeypatch.context() as patch:
        stop_after(patch, 12, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert here("--out", "y") == 130
    (files / "here/y/flow/checkpoint.pt").write_bytes(b"half of a file")
    with pytest.raises(SystemExit) as error:
        here("--out", "y", "--resume")
    assert error.value.code == 2 and "damaged" in capsys.readouterr().err.splitlines()[-1]
    assert here("--out", "z", "--checkpoint", "none") == 0 and not (files / "here/z/flow/model.pt").exists()


def test_compile_is_for_what_is_not_the_experts(here, monkeypatch):
    compiled = []
    monkeypatch.setattr(model.Block, "compile", lambda self: compiled.append(self))
    assert here("--steps", "2") == 0 and compiled == []
    assert here("--steps", "2", "--compile") == 0 and len(compiled) == 2
    assert fp8flow.Experts.forward._torchdynamo_disable


def test_probe_changes_nothing(here, files):
    assert here("--out", "plain") == here("--out", "probed", "--probe", "12") == 0
    plain, probed = (read_log(files / "here" / out / "flow/log.csv") for out in ("plain", "probed"))
    assert [row["loss"] for row in plain] == [row["loss"] for row in probed]
    rows = read_log(files / "here/probed/flow/probe.csv")
    assert [(r["step"], r["layer"], r["tensor"]) for r in rows] == [
        (step, layer, name) for step in ("12", "24") for layer in "01" for name in ("X", "A", "dY", "dH")]
    for row in rows:
        assert float(row["amax"]) > 0 and 0 <= float(row["underflow"]) < 0.5 and 0 <= float(row["binades"]) < 60
        assert float(row["sqnr_direct"]) > 25 and abs(float(row["sqnr_direct"]) - float(row["sqnr_requant"])) < 2


def test_probe_by_hand():
    """Rows whose scales lie 12 binades apart: the small ones keep no bit but their largest elements."""
    plan = fp8flow.make_plan(torch.zeros(128, 1, dtype=torch.int64, device=DEVICE), 1)
    x = torch.full((256, 128), 1.0, device=DEVICE, dtype=torch.bfloat16)
    x[:64] *= 2.0 ** -12
    x[:64, 64:] *= 2.0 ** -8
    x[128:] = 0
    x[64, 0] = 2.0 ** -30                                               # lost before, by quantization: does not count
    found = train_py.look_at(x, plan)
    assert found["amax"] == 1 and found["binades"] == 12 and found["underflow"] == 0.25
    assert train_py.look_at(torch.zeros_like(x), plan)["sqnr_direct"] == -math.inf          # no reason to stop a run


def test_the_ladder_and_seeds(here, files, capsys):
    assert here("--ablate", "--steps", "2", "--out", "x") == 0
    rows = read_log(files / "here/x/compare.csv")
    assert [row["casts"] for row in rows] == ["0", "12", "12", "4", "2", "2", "10"]
    assert "order of the rungs" in capsys.readouterr().out
    assert here("--compare", "bf16", "flow", "--seeds", "0,2,5", "--steps", "2", "--out", "y") == 0
    rows = read_log(files / "here/y/compare.csv")
    assert list(rows[0])[-1] == "seed" and [r["seed"] for r in rows] == ["0", "0", "2", "2", "5", "5"]
    assert (files / "here/y/seed-5/flow/log.csv").exists()
    printed = capsys.readouterr().out
    assert "over 3 seeds" in printed and re.search(r"of bf16 in 3, 95% interval [+-][\d.]+% to [+-]", printed)


def test_interval():
    mean, half = train_py.interval([1.0, 2.0, 3.0])
    assert mean == 2 and abs(half - 4.303 / 3 ** 0.5) < 1e-9            # t of 2 degrees of freedom, s = 1
    lines = train_py.summary([dict(recipe=r, seed=s, val_loss=v) for r, s, v in (
        ("bf16", 0, 1.0), ("bf16", 1, 2.0), ("flow", 0, 1.01), ("flow", 1, 2.02))])
    assert "+1.000% of bf16 in 2, 95% interval +1.000% to +1.000%" in lines[1]
    lines = train_py.summary([dict(recipe=r, seed=s, val_loss=v) for r, s, v in (("flow", 0, 1.0), ("flow", 1, 2.0),
        ("flow-harmed", 0, 1.03), ("flow-harmed", 1, 2.06), ("flow-harmed", 2, 9.0))])          # an arm: to its recipe
    assert "over 3 seeds; +3.000% of flow in 2, 95% interval +3.000% to +3.000%" in lines[1]


def test_split_and_tables():
    texts = [bytes([65 + i % 26]) * (10 + i) for i in range(60)]
    kept, held, how = train_py.split_corpus(texts + texts[:30], 8)       # thirty texts under two names
    assert len(kept) + len(held) == sum(map(len, set(texts))) and len(held) >= len(kept) / 20 and "held out" in how
    kept, held, how = train_py.split_corpus([b"x" * 90_000, *(b"%5d" % i * 9 for i in range(60))], 64)
    assert len(kept) > 80_000 and "last tenth" in how           # one file is most of it: it is not held out whole
    a = torch.tensor(list(b"abababababac"), dtype=torch.uint8)
    b = torch.tensor(list(b"ab"), dtype=torch.uint8)
    assert abs(train_py.table_loss(a, b, 1) + math.log(5.1 / (6 + 25.6))) < 1e-5         # after a: 5 b and 1 c
    assert abs(train_py.table_loss(a, torch.tensor(list(b"aba")).byte(), 2) + math.log(5.1 / (5 + 25.6))) < 1e-5


def test_a_run_sees_all_of_the_text_alike():
    """Windows are a golden section apart: no gap in any stretch of them is much wider than in a regular grid, and the
    22,400 of the largest run never overlap. Every seed begins elsewhere."""
    places = 44_000_000
    starts = train_py.starts_of(torch.arange(22_400), places, seed=0)
    for n in (32, 2240):
        stretch = starts[7000:7000 + n].sort().values
        assert torch.cat([stretch.diff(), places + stretch[:1] - stretch[-1:]]).max() < 2 * places / n
    assert starts.min() >= 0 and starts.max() < places and starts.sort().values.diff().min() > 1024
    assert len({train_py.starts_of(torch.zeros(1), places, seed).item() for seed in range(100)}) == 100


# ---- the model ------------------------------------------------------------------------------------------------------

def test_rotary_sees_distances():
    q, k = torch.randn(2, 1, 1, 1, 1, 64).expand(-1, -1, 40, -1, -1, -1)    # one vector at every position
    angles = model.rotation(40, 64, q.device, q.dtype)
    turned = [model.turn(t, *angles)[0, :, 0, 0] for t in (q, k)]
    scores = turned[0] @ turned[1].T
    assert torch.allclose(scores[5, 3], scores[37, 35], atol=1e-4) and scores.std() > 0.1
    assert torch.equal(turned[0][0], q[0, 0, 0, 0])                         # position 0 is not turned
    x, angles = torch.randn(2, 5, 1, 1, 16).double().requires_grad_(), model.rotation(5, 16, q.device, torch.float64)
    assert torch.autograd.gradcheck(lambda x: model.Rotary.apply(x, *angles), x)
    with torch.inference_mode():
        angles = model.rotation(6, 16, q.device, q.dtype)                   # what an evaluation left trains, too
    model.Rotary.apply(torch.randn(1, 6, 1, 1, 16).requires_grad_(), *angles).sum().backward()


def test_a_router_with_one_choice_learns(monkeypatch):
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    config = train_py.replace(train_py.PRESETS["tiny"], top_k=1)
    moe = model.MoE(config, fp8flow.RECIPES["bf16"])
    y, _ = moe(torch.randn(1, 16, 128).bfloat16())
    y.float().square().sum().backward()
    assert moe.router.weight.grad.abs().max() > 0
