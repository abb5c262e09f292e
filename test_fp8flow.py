"""All tests. On a GPU the kernels run compiled; without one they run in Triton's interpreter, at small shapes."""
import os

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"                    # before the kernels are imported: @triton.jit reads it there

import csv
import subprocess
import sys
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


# ---------------------------------------------------------------------------------------------------------------------
# Triton's interpreter truncates casts to bf16 and fp8; the hardware rounds to nearest even. Repair it, and prove it.

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
    x = torch.cat([torch.randn(2000), torch.linspace(-0.02, 0.02, 2001), torch.tensor([0.0, -0.0, 1 + 2 ** -8, 1 + 3 * 2 ** -8]),
                   torch.tensor([17.0, 19.0, 448.0, -448.0, 2 ** -9, 2 ** -10, 3 * 2 ** -10, -2 ** -11])]).to(DEVICE)
    n = triton.next_power_of_2(len(x))
    x = torch.nn.functional.pad(x, (0, n - len(x)))
    bf16, fp8 = torch.empty(n, dtype=torch.bfloat16, device=DEVICE), torch.empty(n, dtype=torch.uint8, device=DEVICE)
    _cast_kernel[1,](x, bf16, n)
    _cast_fp8_kernel[1,](x, fp8, n)
    assert torch.equal(bf16.view(torch.int16), x.bfloat16().view(torch.int16))
    assert torch.equal(fp8, x.to(FP8).view(torch.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# helpers

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


# ---------------------------------------------------------------------------------------------------------------------
# quantize

@pytest.mark.parametrize("granularity", ["block", "row"])
@pytest.mark.parametrize("scales", ["pow2", "fp32"])
@pytest.mark.parametrize("kind", ["plain", "heavy", "gradient"])
@pytest.mark.parametrize("R, C", SHAPES)
def test_quantize_kernel_equals_twin(R, C, kind, scales, granularity):
    for dtype in (torch.bfloat16, torch.float32):
        x = data(kind, R, C, dtype=dtype)
        q = kernels.quantize(x, scales, granularity)
        assert same_bits(q, kernels.quantize_ref(x, scales, granularity))
        assert torch.equal(kernels.dequantize(q), kernels.dequantize_ref(q))
        assert torch.equal(kernels.dequantize(q, torch.bfloat16), kernels.dequantize_ref(q, torch.bfloat16))
        assert sqnr(kernels.dequantize(q), x) > (30 if kind != "heavy" or granularity == "block" else 25)


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


@pytest.mark.parametrize("granularity", ["block", "row"])
@pytest.mark.parametrize("scales", ["pow2", "fp32"])
def test_quantize_weight(scales, granularity):
    w = data("heavy", 3 * 256, 384, dtype=torch.float32).view(3, 256, 384) / 50
    w[1] = 0
    q, qt = kernels.quantize_weight(w, scales, granularity)
    ref, ref_t = kernels.quantize_weight_ref(w, scales, granularity)
    assert same_bits(q, ref) and same_bits(qt, ref_t)
    if granularity == "block":
        assert torch.equal(kernels.dequantize(q).mT, kernels.dequantize(qt))
    assert sqnr(kernels.dequantize(q), w) > 25 and sqnr(kernels.dequantize(qt), w.mT) > 25
    w[2, 5, 7] = torch.nan
    for q, at in zip(kernels.quantize_weight(w, scales, granularity), [(2, 5, 7), (2, 7, 5)]):
        y = kernels.dequantize(q)
        assert y[at].isnan() and y[:2].isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# transpose

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
    out = transpose(QTensor(x.view(FP8).to(DEVICE), scale.to(DEVICE)))
    assert out.scale.tolist() == [[2.0 ** 90]]
    got = out.data.view(torch.uint8).cpu().t()
    for i in range(2 * len(shifts)):
        assert got[i].tolist() == [shifted_code(c, int(k[i])) for c in x[i].tolist()], f"shift {k[i]}"
    assert all(shifted_code(c, 3) == torch.tensor(e4m3_value(c) / 8).to(FP8).view(torch.uint8) for c in range(127))


@pytest.mark.parametrize("kind", ["plain", "heavy", "gradient"])
@pytest.mark.parametrize("M, C", TILES)
def test_transpose_kernel_equals_twin(M, C, kind):
    for granularity in ("block", "row"):
        q = kernels.quantize(data(kind, M, C), granularity=granularity)
        out = kernels.scaling_aware_transpose(q)
        assert out.shape == (C, M) and same_bits(out, kernels.scaling_aware_transpose_ref(q))
        rows = torch.randint(-1, M, (256,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        target = torch.full((2,), 2.0 ** 40, device=DEVICE)
        for t in (None, target):
            assert same_bits(kernels.scaling_aware_transpose(q, rows, t), kernels.scaling_aware_transpose_ref(q, rows, t))
        assert same_bits(kernels.scaling_aware_transpose(q, rows),
                         kernels.scaling_aware_transpose(kernels.gather_rows(q, rows)))


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


def test_transpose_refuses():
    with pytest.raises(ValueError, match="pow2"):
        kernels.scaling_aware_transpose(kernels.quantize(data("plain", 128, 128), "fp32"))
    with pytest.raises(ValueError, match="multiple of 128"):
        kernels.scaling_aware_transpose(kernels.quantize(data("plain", 100, 128)))
    with pytest.raises(ValueError, match="multiple of 128"):
        kernels.quantize(data("plain", 128, 100))
    with pytest.raises(ValueError, match="scales"):
        kernels.quantize(data("plain", 128, 128), "e8m0")


# ---------------------------------------------------------------------------------------------------------------------
# SwiGLU: against fp64, and the emitted codes against quantizing the unquantized result

def swiglu_exact(h, prob, da=None):
    h = h.double().requires_grad_()
    prob = prob.double().requires_grad_()
    gate, up = h.chunk(2, -1)
    a = torch.nn.functional.silu(gate) * up * prob[:, None]
    if da is None:
        return a.detach()
    a.backward(da.double())
    return a.detach(), h.grad, prob.grad


@pytest.mark.parametrize("granularity", ["block", "row"])
@pytest.mark.parametrize("scales", ["pow2", "fp32"])
@pytest.mark.parametrize("M, width", [(3, 128), (128, 384)] + ([(1024, 2048), (640, 1408)] if CUDA else []))
def test_swiglu(M, width, scales, granularity):
    h, da = data("plain", M, 2 * width) * 3, data("plain", M, width, seed=1)
    prob = torch.rand(M, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    prob[0] = 0                                                         # a padding slot
    a, dh, dprob = swiglu_exact(h, prob, da)

    assert sqnr(kernels.swiglu(h, prob), a) > 50                        # bf16 rounds at 2^-9: 56 dB
    got_dh, got_dprob = kernels.swiglu_backward(da, h, prob)
    assert sqnr(got_dh, dh) > 50 and sqnr(got_dprob, dprob) > 110

    q = kernels.swiglu_quantize(h, prob, scales, granularity)
    qh, qprob, qa = kernels.swiglu_backward_quantize(da, h, prob, scales, granularity)
    assert sqnr(qprob, dprob) > 110 and same_bits(q, qa)                # backward recomputes the same codes
    for got, exact in ((q, a), (qh, dh)):
        want = kernels.quantize_ref(exact.float(), scales, granularity)
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
    assert same_bits(QTensor(wide.data[-128:, -128:].contiguous(), wide.scale[-1:, -1:]),
                     kernels.scaling_aware_transpose(kernels.quantize(h[-128:, -128:].contiguous())))


# ---------------------------------------------------------------------------------------------------------------------
# moving rows

@pytest.mark.parametrize("T, C, M", [(5, 128, 256), (130, 384, 384)] + ([(4096, 7168, 8192), (999, 1408, 3072)] if CUDA else []))
def test_gather_and_sum_rows(T, C, M):
    rows = torch.randint(-1, T, (M,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    rows[:7] = -1
    x = data("gradient", T, C)
    assert torch.equal(kernels.gather_rows(x, rows), kernels.gather_rows_ref(x, rows))
    for granularity in ("block", "row"):
        q = kernels.quantize(x, granularity=granularity)
        got = kernels.gather_rows(q, rows)
        assert same_bits(got, kernels.gather_rows_ref(q, rows))
        assert (got.data[:7].view(torch.uint8) == 0).all() and (got.scale[:, :7] == SCALE_MIN).all()
        assert torch.equal(kernels.dequantize(got), torch.where((rows >= 0)[:, None], kernels.dequantize(q)[rows], 0))
    for topk in (1, 2, 5):
        slots = torch.randint(0, T, (M, topk), generator=torch.Generator().manual_seed(4)).to(DEVICE)
        assert torch.equal(kernels.sum_rows(x, slots), kernels.sum_rows_ref(x, slots))


def test_views_are_taken_as_they_read():
    """A transposed view goes in as its contiguous copy would."""
    x, prob = data("plain", 256, 128).t(), torch.rand(128, 2, generator=torch.Generator().manual_seed(7)).to(DEVICE)[:, 0]
    assert same_bits(kernels.quantize(x), kernels.quantize(x.contiguous()))
    assert same_bits(kernels.swiglu_quantize(x, prob), kernels.swiglu_quantize(x.contiguous(), prob.contiguous()))
    rows = torch.arange(128, device=DEVICE)
    assert torch.equal(kernels.gather_rows(x, rows), x)
    assert torch.equal(kernels.sum_rows(x, rows[:, None]), x)
    da = data("plain", 128, 128, seed=1).t()
    for a, b in zip(kernels.swiglu_backward(da, x, prob), kernels.swiglu_backward(da.contiguous(), x.contiguous(), prob.contiguous())):
        assert torch.equal(a, b)
    q, (w, _) = kernels.quantize(x), kernels.quantize_weight(data("plain", 128, 256, dtype=torch.float32)[None])
    strided = q._replace(data=q.data.view(torch.uint8).t().contiguous().t().view(FP8))
    assert torch.equal(kernels.grouped_gemm(strided, w, *expert_tiles([1])), kernels.grouped_gemm(q, w, *expert_tiles([1])))


def test_gather_skips_unused_tiles():
    x, rows = data("plain", 4, 128), torch.zeros(384, dtype=torch.int64, device=DEVICE)
    tiles = torch.tensor([0, -1, 2], dtype=torch.int32, device=DEVICE)
    used = torch.tensor([True, False, True], device=DEVICE).repeat_interleave(BLOCK)
    assert torch.equal(kernels.gather_rows(x, rows, tiles)[used], x[rows][used])
    h, prob = data("plain", 384, 256), torch.ones(384, device=DEVICE)
    assert torch.equal(kernels.swiglu(h, prob, tiles)[used], kernels.swiglu(h, prob)[used])
    q, full = kernels.swiglu_quantize(h, prob, tiles=tiles), kernels.swiglu_quantize(h, prob)
    assert torch.equal(q.data.view(torch.uint8)[used], full.data.view(torch.uint8)[used])


# ---------------------------------------------------------------------------------------------------------------------
# grouped GEMM: against fp64 on the dequantized operands, so that quantization error cannot hide a bug

COUNTS = [[1, 0, 2]] + ([[3, 0, 7, 1, 0, 12], [0, 0, 32], [16, 16, 16, 16, 16, 16, 16]] if CUDA else [])


def expert_tiles(counts):
    """counts in tiles -> tile_expert (with one unused tile at the end) and ends."""
    tiles = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ends = torch.tensor(counts).cumsum(0) * BLOCK
    return torch.cat([tiles, torch.tensor([-1])]).int().to(DEVICE), ends.int().to(DEVICE)


def gemm_bar(promote) -> float:
    """dB. The tensor core keeps ~14 bits and truncates: 0.01% of error at 128, 0.1% at 2048 on zero-mean sums."""
    return 70 if promote == BLOCK else 55


@pytest.mark.parametrize("scales", ["pow2", "fp32"])
@pytest.mark.parametrize("granularity, promote", [("block", 128), ("row", 128), ("row", 256), ("row", 512), ("row", None)])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("N, K", [(256, 384)] + ([(1408, 2048), (4096, 1280)] if CUDA else []))
def test_grouped_gemm(N, K, counts, granularity, promote, scales):
    tile_expert, ends = expert_tiles(counts)
    M, E = len(tile_expert) * BLOCK, len(counts)
    x, w = data("gradient", M, K), data("plain", E * N, K, seed=1, dtype=torch.float32)
    if granularity == "block":
        x, w = vary_blocks(x), vary_blocks(w)
    a = kernels.quantize(x, scales, granularity)
    b, _ = kernels.quantize_weight(w.view(E, N, K), scales, granularity)
    out = kernels.grouped_gemm(a, b, tile_expert, ends, granularity, promote)
    assert out.shape == (M, N) and out.dtype == torch.bfloat16
    x, w = kernels.dequantize(a).double(), kernels.dequantize_ref(b).double()
    expert = tile_expert.repeat_interleave(BLOCK)
    for e in range(E):
        if counts[e]:
            want = x[expert == e] @ w[e].T
            unit = want.square().mean(1, keepdim=True).sqrt().clamp(min=1e-300)        # every row counts, tiny ones too
            assert sqnr(out[expert == e].double() / unit, want / unit) > min(50, gemm_bar(promote))


@pytest.mark.parametrize("operands, promote", [("direct block", 128), ("requant block", 128), ("direct row", 128),
                                               ("direct row", 512), ("direct row", None), ("requant row", 512)])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("M, N", [(128, 384)] + ([(2048, 1408)] if CUDA else []))
def test_grouped_wgrad(M, N, counts, promote, operands):
    kind, granularity = operands.split()
    tile_expert, ends = expert_tiles(counts)
    slots = len(tile_expert) * BLOCK
    rows = torch.arange(slots, device=DEVICE)

    def column_wise(x):
        if kind == "direct":
            q = kernels.quantize(x, granularity=granularity)
            target = kernels.expert_scale(q.scale, rows, ends) if granularity == "row" else None
            return kernels.scaling_aware_transpose(q, target=target)
        if granularity == "block":
            return kernels.quantize(x.t())
        return kernels.quantize(x.t(), scale=kernels.column_scale(x, ends, "pow2"))
    x, y = data("plain", slots, M), data("plain", slots, N, seed=1)
    if granularity == "block":
        x, y = vary_blocks(x), vary_blocks(y)
    a, b = column_wise(x), column_wise(y)
    for dtype in (torch.float32, torch.bfloat16):
        out = kernels.grouped_wgrad(a, b, ends, granularity, promote, dtype)
        assert out.shape == (len(counts), M, N) and out.dtype == dtype
        x, y, begin = kernels.dequantize(a).double(), kernels.dequantize(b).double(), 0
        for e, end in enumerate(ends.tolist()):
            if end > begin:
                want = x[:, begin:end] @ y[:, begin:end].T
                assert sqnr(out[e], want) > (gemm_bar(promote) if dtype == torch.float32 else 50)
            else:
                assert (out[e] == 0).all()                                              # zeros, not what was there
            begin = end


@pytest.mark.parametrize("granularity, promote", [("block", 128), ("row", 512), ("row", None)])
def test_gemms_repeat_and_leave_unused_tiles_alone(granularity, promote):
    """Loads, products and promotions overlap: a missing wait would show as a run that differs. Unused tiles hold anything."""
    runs, counts, N, K = (60, [9, 0, 23, 31], 2048, 1408) if CUDA else (2, [1, 0, 1], 128, 256)
    tile_expert, ends = expert_tiles(counts)
    rows, used = len(tile_expert) * BLOCK, sum(counts) * BLOCK
    x, dy = (kernels.quantize(data("plain", rows, C), granularity=granularity) for C in (K, N))
    w, _ = kernels.quantize_weight(data("plain", len(counts) * N, K, dtype=torch.float32).view(-1, N, K), granularity=granularity)
    xt, dyt = (kernels.scaling_aware_transpose(q, target=None if granularity == "block" else kernels.expert_scale(q.scale, None, ends))
               for q in (x, dy))

    def run():
        return (kernels.grouped_gemm(x, w, tile_expert, ends, granularity, promote)[:used],
                kernels.grouped_wgrad(dyt, xt, ends, granularity, promote))
    first = run()
    assert all(result.isfinite().all() for result in first)
    x.data.view(torch.uint8)[used:], x.scale[:, used:] = 0x7F, torch.nan
    for q in (xt, dyt):
        q.data.view(torch.uint8)[:, used:], q.scale[used // BLOCK:] = 0x7F, torch.nan
    for _ in range(runs - 1):
        assert all(torch.equal(a, b) for a, b in zip(run(), first))


@pytest.mark.parametrize("twin", [False, True])
def test_promote_is_checked(twin, monkeypatch):
    if twin:
        monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    tile_expert, ends = expert_tiles([1])
    a = kernels.quantize(data("plain", 256, 256))
    b, _ = kernels.quantize_weight(data("plain", 128, 256).view(1, 128, 256))
    with pytest.raises(ValueError, match="granularity=row"):
        kernels.grouped_gemm(a, b, tile_expert, ends, "block", 512)
    with pytest.raises(ValueError, match="multiple of 128"):
        kernels.grouped_gemm(a, b, tile_expert, ends, "row", 100)


def test_expert_scale():
    tile_expert, ends = expert_tiles([2, 0, 1])
    scale = torch.exp2(torch.randint(-40, 0, (1, 50), generator=torch.Generator().manual_seed(5)).float()).to(DEVICE)
    rows = torch.randint(-1, 50, (512,), generator=torch.Generator().manual_seed(6)).to(DEVICE)
    rows[256:384] = -1
    rows[300] = 7                                                                       # one live row in a tile of padding
    top = kernels.expert_scale(scale, rows, ends)[:3]
    want = torch.where(rows >= 0, scale[0, rows], SCALE_MIN)
    assert top.tolist() == [want[:256].max(), want[:256].max(), scale[0, 7]]
    assert torch.equal(top, kernels.expert_scale_ref(scale, rows, ends)[:3])


# ---------------------------------------------------------------------------------------------------------------------
# routing

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
    live = plan.pair >= 0
    assert live.sum() == T * K and torch.equal(plan.pair[live].sort().values, torch.arange(T * K, device=DEVICE))
    assert torch.equal(plan.pair[plan.slot.flatten()], torch.arange(T * K, device=DEVICE))          # inverse
    assert torch.equal(plan.token[live], plan.pair[live] // K) and (plan.token[~live] == -1).all()
    assert torch.equal(plan.tile_expert.repeat_interleave(BLOCK)[live], experts.flatten()[plan.pair[live]].int())
    assert (plan.tile_expert[plan.ends[-1] // BLOCK:] == -1).all() and (plan.tile_expert[:plan.ends[-1] // BLOCK] >= 0).all()
    assert torch.equal(plan.compact_slot[plan.compact.flatten()], plan.slot.flatten())
    assert torch.equal(plan.compact_token[plan.compact.flatten()], torch.arange(T * K, device=DEVICE) // K)
    if kind == "one" and K == 1:
        assert plan.counts.tolist() == [T if e == 1 else 0 for e in range(E)]


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


# ---------------------------------------------------------------------------------------------------------------------
# the layer

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
    module.cast_weights()
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
# Each FP8 operand adds 2.6% of noise (31.5 dB), and an output passes three or four of them: 31.5 - 10 log10(4) = 25.5
# before SwiGLU spreads it. fp32 scales requantized add a second rounding to half of the wgrad operands.
FP8_BAR, REQUANT_BAR, BF16_BAR = 22, 20, 42


@pytest.mark.parametrize("recipe", [*fp8flow.RECIPES, "never", "row requant fp32"])
@pytest.mark.parametrize("T, D, width, E, K, kind", [(150, 128, 256, 3, 2, "empty")] + (
    [(2048, 1024, 1408, 8, 2, "random"), (1000, 2048, 512, 7, 3, "one"), (4096, 512, 1536, 16, 4, "empty")] if CUDA else []))
def test_layer_against_fp64(T, D, width, E, K, kind, recipe):
    recipe = {"never": fp8flow.Recipe(granularity="row", promote=None),
              "row requant fp32": fp8flow.Recipe(transpose="requant", scales="fp32", granularity="row", promote=512),
              **fp8flow.RECIPES}[recipe]
    inputs = layer_inputs(T, D, width, E, K, kind)
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
    again = run_layer(fp8flow.switch(recipe, recompute=True), *inputs)
    for a, b in zip(run_layer(recipe, *inputs), again):
        assert torch.equal(a, b)


def test_nan_reaches_the_output_of_its_token_only():
    experts, probs, x, dout, w1, w2 = layer_inputs(100, 128, 128, 3, 2)
    x[7, 3] = torch.inf
    out = run_layer(fp8flow.RECIPES["flow"], experts, probs, x, dout, w1, w2)[0]
    assert out[7].isnan().all() and out[:7].isfinite().all() and out[8:].isfinite().all()


class NoSync(TorchDispatchMode):
    """What would make the host wait for a GPU, told on any device: values read by the host, shapes that depend on data."""
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


# ---------------------------------------------------------------------------------------------------------------------
# the ledger

def count(recipe):
    """(the ledger, the launches it ought to have seen: kernels.quantize and kernels.dequantize, counted by themselves)"""
    launches = []
    patch = pytest.MonkeyPatch()
    for name in ("quantize", "dequantize"):
        original = getattr(kernels, name)
        patch.setattr(kernels, name, lambda *a, _f=original, _n=name, **k: (launches.append(_n), _f(*a, **k))[1])
    try:
        with fp8flow.count_casts() as ledger:
            run_layer(recipe, *layer_inputs(1, 128, 128, 1, 1))       # one tile of slots: casts do not depend on the size
    finally:
        patch.undo()
    return ledger, launches


@pytest.mark.parametrize("preset, changes, casts", [
    ("bf16", {}, 0), ("naive", {}, 12), ("flow", {}, 2), ("flow-row", {}, 2),
    ("naive", dict(scales="pow2"), 12), ("naive", dict(scales="pow2", transpose="direct"), 4),
    ("naive", dict(swiglu="fused"), 10), ("naive", dict(permute="fused"), 12), ("naive", dict(granularity="row"), 12),
    ("flow", dict(transpose="requant"), 10), ("flow", dict(swiglu="unfused"), 4), ("flow", dict(permute="unfused"), 2),
    ("flow", dict(granularity="row"), 2), ("flow", dict(recompute=True), 2), ("naive", dict(recompute=True), 12)], ids=str)
def test_ledger(preset, changes, casts):
    ledger, launches = count(fp8flow.switch(fp8flow.RECIPES[preset], **changes))
    assert len(ledger) == casts == len(launches)
    assert [c.kind == "DQ" for c in ledger] == [name == "dequantize" for name in launches]
    assert len(ledger.weights) == 2
    if casts == 12:
        assert {(c.tensor, c.kind) for c in ledger} == {(t, k) for t in ("X", "A", "dY", "dH") for k in ("Q", "DQ", "Q'")}
    if casts == 2:
        assert list(ledger) == [("X", "Q", "forward"), ("dY", "Q", "backward")]


def test_what_the_commands_explain(capsys, monkeypatch):
    """The parts of `python fp8flow.py` and `python kernels.py` that need no GPU."""
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    device = torch.device(DEVICE)
    fp8flow.print_ledger(device)
    fp8flow.print_double_quantization(device)
    kernels.print_scales(device)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = {line[0]: line[1] for line in lines if line and line[0] in fp8flow.RECIPES and line[1].isdigit()}
    assert counts == {"bf16": "0", "naive": "12", "flow": "2", "flow-row": "2"}
    assert sum("refused:" in line for line in lines) == 2
    gaussian = next(line for line in lines if line and line[0] == "Gaussian" and len(line) > 6)
    fp32_once, fp32_twice, pow2_once, pow2_twice, direct = (float(v) for v in gaussian if v.endswith(tuple("0123456789")))
    assert fp32_once - fp32_twice > 2 and pow2_once - pow2_twice < 0.1 and pow2_once - direct < 0.1


def test_bench_lines(capsys, monkeypatch):
    """Every benchmark line runs what it names; the clock is a stub here."""
    if not CUDA:
        monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    monkeypatch.setattr(kernels.Bench, "__init__", lambda self: vars(self).update(device=DEVICE, copy=1.0, bf16=1.0, fp8=1.0))
    monkeypatch.setattr(kernels.Bench, "us", lambda self, *fns, ms=0: [(fn(), 2.0)[1] for fn in fns])
    kernels.bench_memory_bound(kernels.Bench(), 64, 128, 2, 1, 128, DEVICE)
    kernels.bench_gemm(kernels.Bench(), 64, 128, 2, 1, 128, DEVICE, (128, 512, None))
    printed = capsys.readouterr().out
    for line in ("quantize 1x128", "permute+pad FP8", "scaling-aware transpose", "SwiGLU backward+quantize", "fc1 fprop bf16",
                 "fc2 dgrad FP8 block 128", "fc2 wgrad FP8 row never"):
        assert line in printed
    rows, slots, tiles, ends = kernels.balanced_routing(64, 2, 3, DEVICE)
    live = rows >= 0
    assert live.sum() == 64 * 3 // 2 * 2 and torch.equal(rows[slots], torch.arange(64, device=DEVICE)[:, None].expand(-1, 3))
    assert len(tiles) * BLOCK == len(rows) == ends[-1]


# ---------------------------------------------------------------------------------------------------------------------
# what is refused

@pytest.mark.parametrize("changes, says", [
    (dict(scales="fp32"), "transpose=direct needs scales=pow2"), (dict(promote=512), "granularity=row"),
    (dict(granularity="row", promote=100), "multiple of 128"), (dict(swiglu="maybe"), "swiglu='maybe'")], ids=str)
def test_recipe_refuses(changes, says):
    with pytest.raises(ValueError, match=says):
        fp8flow.Recipe(**changes)


def train(*args, out=None, **environment):
    """train.py in a process of its own, without the interpreter: on a CPU the twins train."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, str(ROOT / "train.py"), *args] + ([] if out is None else ["--out", str(out)])
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_train_refuses(tmp_path, capsys):
    """One sentence that names the argument, exit code 2, nothing written."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "folder").mkdir()
    cases = [(["--scales", "fp32"], "scales=pow2"), (["--promote", "512"], "granularity=row"), (["--promote", "x"], "--promote"),
             (["--d-model", "100"], "d_model=100"), (["--d-expert", "192"], "d_expert=192"),
             (["--top-k", "9", "--n-experts", "8"], "top_k=9"), (["--n-heads", "3"], "n_heads=3"),
             (["--data", str(tmp_path / "none")], "does not exist"), (["--data", str(tmp_path / "empty.txt")], "no text"),
             (["--data", str(tmp_path / "short.txt")], "too short"), (["--data", str(tmp_path / "folder")], "no text"),
             (["--recipe", "bf16", "--swiglu", "fused"], "--swiglu"), (["--compare", "--scales", "pow2"], "--scales"),
             (["--steps", "0"], "steps=0"), (["--lr", "0"], "lr=0"), (["--compare", "fp4"], "fp4")]
    if not CUDA:
        cases.append((["--device", "cuda"], "--device cuda"))
    out = tmp_path / "out"
    for args, says in cases:
        with pytest.raises(SystemExit) as error:
            train_py.parse_args(["--preset", "tiny", *args, "--out", str(out)])
        assert error.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1], args
    done = train("--scales", "fp32", out=out)                           # and once from the shell
    assert done.returncode == 2 and "scales=pow2" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------------------------
# training

def read_log(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_training(tmp_path):
    """30 steps of every recipe on the tiny preset: the loss falls, the recipes agree, a second run repeats the first."""
    small = ("--preset", "tiny", "--steps", "30", "--deterministic")
    done = train("--compare", *small, out=tmp_path / "a")
    assert done.returncode == 0, done.stderr
    rows = read_log(tmp_path / "a" / "compare.csv")
    assert list(rows[0]) == "recipe,casts,val_loss,delta_pct,tokens_per_s,speedup,peak_mem_gb".split(",")
    assert [(r["recipe"], r["casts"]) for r in rows] == [("bf16", "0"), ("naive", "12"), ("flow", "2"), ("flow-row", "2")]
    for row in rows:
        log = read_log(tmp_path / "a" / row["recipe"] / "log.csv")
        losses = [float(r["loss"]) for r in log]
        assert len(log) == 30 and losses[0] > 5 and losses[-1] < 3.6                # ln 256 = 5.5 at the start
        assert abs(float(row["delta_pct"])) < 0.5                                   # 0.04% at the most over three seeds on a CPU
        assert abs(sum(float(log[-1][f"load_{e}"]) for e in range(4)) - 1) < 1e-3
        assert (tmp_path / "a" / row["recipe"] / "model.pt").exists() and (tmp_path / "a" / row["recipe"] / "sample.txt").exists()
    assert train("--recipe", "flow", *small, out=tmp_path / "b").returncode == 0
    first, second = ([r["loss"] for r in read_log(tmp_path / run / "flow" / "log.csv")] for run in "ab")
    assert first == second


def test_training_on_own_text(tmp_path, capsys, monkeypatch):
    """A file as --data, accumulation, a flipped switch, and a checkpoint that loads."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 400)
    done = train("--preset", "tiny", "--recipe", "flow", "--swiglu", "unfused", "--data", str(tmp_path / "text.txt"), "--steps", "12",
                 "--batch", "2", "--accumulate", "2", "--recompute", "--save-tensors", out=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "4 explicit casts a layer" in done.stdout and "last tenth" in done.stdout
    saved = torch.load(tmp_path / "out" / "flow" / "model.pt", weights_only=True, map_location="cpu")
    gpt = model.GPT(model.GPTConfig(**saved["config"]), fp8flow.Recipe(**saved["recipe"]))
    gpt.load_state_dict(saved["model"])
    if not CUDA:
        monkeypatch.setattr(kernels, "use_kernels", lambda x: False)                # the interpreter would take minutes
    assert saved["step"] == 12 and saved["recipe"]["swiglu"] == "unfused"
    fp8flow.print_real(str(tmp_path / "out" / "flow" / "tensors.pt"), torch.device(DEVICE))
    printed = capsys.readouterr().out
    assert "layer 1 of flow after 12 steps" in printed and "flow-row never" in printed and "nan" not in printed


def test_interrupted_training_is_on_disk(tmp_path, monkeypatch):
    calls = iter(range(100))
    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *a: real(*a) if next(calls) < 4 else (_ for _ in ()).throw(KeyboardInterrupt()))
    monkeypatch.setattr(kernels, "use_kernels", lambda x: False)
    with pytest.raises(KeyboardInterrupt):
        train_py.main(["--preset", "tiny", "--device", "cpu", "--steps", "6", "--batch", "1", "--seq-len", "32",
                       "--val-batches", "1", "--out", str(tmp_path)])
    assert len(read_log(tmp_path / "flow" / "log.csv")) == 4                        # the steps it took, none lost
    assert torch.load(tmp_path / "flow" / "model.pt", weights_only=True)["step"] == 4
