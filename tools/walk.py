"""One tensor, by hand: what FP8 does to sixteen numbers on their way from row-wise to column-wise.

    python -m tools.walk

The numbers lie in the corner of a 128x128 tile of zeros, so that the functions of kernels.py, whose
blocks are 128 long, compute every step as if a block were 4. Nothing here computes a code or a
scale: it prints theirs.
"""
import argparse
import math
import textwrap

import torch
from torch import Tensor

import kernels
from kernels import BLOCK, QTensor
from tools import trace

N = 4                           # rows and columns of the toy
TINY = 2.0 ** -13               # the scale of its last row, 14 binades below the first one's

# The largest numbers of the rows are 448 times 2, 1, 0.35 and TINY: these are the rows' fp32
# scales, and only 0.35 is no power of two. In the columns 448 times 2, 1, 0.35 and 2^-7 are.
TOY = [
    [896.0, 100.0, 40.0, 3.5],                          # 896 is exact, whatever is done to it.
    [300.0, 448.0, 1.07, 0.7],                          # 1.07 is rounded, and with 0.35 twice.
    [55.0, 0.3, 156.8, 1.9],
    [448 * TINY, 208 * TINY, 72 * TINY, 12 * TINY],     # Codes times TINY: row-wise all are exact.
]


def toy_tile() -> Tensor:
    tile = torch.zeros(BLOCK, BLOCK)
    tile[:N, :N] = torch.tensor(TOY)
    return tile


# ---- printing ------------------------------------------------------------------------------------

def say(text: str) -> None:
    print(textwrap.fill(" ".join(text.split()), width=100))


def scale_text(scale: Tensor) -> str:
    """Powers of two below 1 as 2^-k."""
    mantissa, exponent = math.frexp(scale.item())       # scale = mantissa * 2^exponent
    if mantissa == 0.5 and exponent <= 0:
        return f"2^{exponent - 1}"
    return f"{scale.item():.4g}"


def show(x: Tensor, q: QTensor, labels: list[str], column_wise: bool = False) -> None:
    """Each code as s eeee mmm, and the error of code * scale. A column-wise tensor is stored
    transposed: here it lies as x does, below the scales of its columns."""
    codes = q.data.t() if column_wise else q.data
    error = 100 * (worth(q, column_wise) / x - 1)
    if column_wise:
        scales = q.scale[0].expand(BLOCK)               # The direct transpose has one for all.
        print(" scale      " + "".join(f"{scale_text(scale):>21}" for scale in scales[:N]))
    for r in range(N):
        line = f" row {r} {labels[r]:>5}"
        for c in range(N):
            bits = f"{codes[r, c].view(torch.uint8).item():08b}"
            percent = "0" if error[r, c] == 0 else f"{error[r, c].item():+.1f}%"
            line += f"{bits[0]:>4} {bits[1:5]} {bits[5:]}{percent:>8}"
        print(line)


def worth(q: QTensor, column_wise: bool) -> Tensor:
    """code * scale, every element at its place in x."""
    y = kernels.dequantize(q)
    return y.t() if column_wise else y


# ---- the walk ------------------------------------------------------------------------------------

def walk_through_the_toy() -> None:
    x = toy_tile()
    say("""1. The matrix: four tokens, four columns. The rest of its 128x128 tile is zeros, which
        get the smallest scale there is and change nothing.""")
    for r in range(N):
        print(f" row {r}      " + "".join(f"{number:21.5g}" for number in x[r, :N].tolist()))

    fp32 = kernels.quantize(x, "fp32")
    pow2 = kernels.quantize(x, "pow2")
    print()
    say("""2. Quantize row-wise. The largest magnitude of a row, its amax, must fit into 448, so
        its scale, printed before the row, is amax/448. Each element is divided by it and rounded to
        the nearest code, a byte s eeee mmm. Behind each code stands the error of code * scale:""")
    show(x, fp32, [scale_text(scale) for scale in fp32.scale[0, :N]])
    say("Or the scale is rounded up to a power of two. Here this changes row 2 alone:")
    show(x, pow2, [scale_text(scale) for scale in pow2.scale[0, :N]])

    print()
    say("3. What wgrad needs. It sums over tokens, the rows r, down the columns of dY and X:")
    print(" dW[n, c] = sum over r of  scale_dY[r] * scale_X[r] * code_dY[r, n] * code_X[r, c]")
    say("""The tensor core sums products of codes, and scales are multiplied in afterwards. A row's
        scale changes with r, within the sum. So all rows of a column must share one scale.""")

    twice = kernels.requantize(fp32, "fp32")
    once = kernels.quantize(x.t(), "fp32")
    print()
    say("4. Requantize: dequantize, and quantize again with a scale for each column. fp32 scales:")
    show(x, twice, N * [""], column_wise=True)
    # 1.07 stands in row 1 of column 2, and in a transposed tensor in row 2 of column 1.
    first = kernels.dequantize(fp32)[1, 2]
    scale = twice.scale[0, 2]
    say(f"""{x[1, 2]:.3g}, in row 1, is rounded twice. It had become {first:.4g}. At the scale of
        its column that is {first:.4g} / {scale:.4g} = {first / scale:.4g}, the nearest code is
        {twice.data[2, 1].item():.4g}, and that is worth {worth(twice, True)[1, 2]:.5g}. Rounded
        once, at that scale, its code is {once.data[2, 1].item():.4g}, worth
        {worth(once, True)[1, 2]:.4g}. With powers of two only exponents change, and nothing is
        rounded again:""")
    show(x, kernels.requantize(pow2, "pow2"), N * [""], column_wise=True)

    direct = kernels.scaling_aware_transpose(pow2)
    shifts = (direct.scale[0, 0] / pow2.scale[0, :N]).log2()
    print()
    say("""5. The direct transpose. Where only exponents change, nothing needs to be dequantized.
        The whole tile gets one scale, S, the largest of its row scales, so that no code passes 448.
        A row of scale S/2^k (its k stands before it) moves down by k binades, factors of two: k is
        subtracted from eeee. This is exact while codes stay normal, 2^-6 or more. Below, eeee is
        0000, and codes are multiples of 2^-9, to which numbers are rounded, the smallest to 0:""")
    show(x, direct, [f"k={shift:.0f}" for shift in shifts], column_wise=True)
    say("""Only row 3, far below the others, pays for sharing S. Requantized, its small numbers had
        the smaller scales of columns 1 to 3.""")


def walk_through_a_tile() -> None:
    print()
    say("""6. A full tile, 128x128 random numbers: Gaussian, or with rows over 24 binades. Signal
        to noise in dB, and the same as rms error in percent (20 dB are a factor of ten). Large rows
        hide small ones in both, so there are also the non-zero elements that become zero, and the
        rows whose own error is above 10%. In the last line all elements share one scale, as 128x128
        weights do.""")
    samples = trace.samples(BLOCK, BLOCK, "cpu")
    for kind in ("Gaussian", "rows over 24 binades"):
        print(f" {kind:28}{'dB':>8}{'rms':>9}{'zeros':>10}{'rows':>9}")
        for way, y in trace.quantized_in_each_way(samples[kind]).items():
            loss = trace.loss_of(y, samples[kind])
            print(f"   {way:26}{loss.db:8.2f}{loss.rms:8.2f}%{loss.zeros:9.1f}%{loss.rows:8.1f}%")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.walk", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    walk_through_the_toy()
    walk_through_a_tile()


if __name__ == "__main__":
    main()
