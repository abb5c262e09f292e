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


def worth(column_wise: QTensor) -> Tensor:
    """code * scale, with every element back at its place in the matrix."""
    return kernels.dequantize(column_wise).t()


def fate(before: Tensor, after: Tensor) -> str:
    """What the direct transpose did to an element. It can only round what becomes subnormal: other
    codes keep their mantissa."""
    if after == before:
        return "exact"
    if after == 0:
        return "flushed to zero"
    return "rounded, subnormal"


# ---- printing ------------------------------------------------------------------------------------

def say(text: str) -> None:
    print(textwrap.fill(" ".join(text.split()), width=100))


def step(text: str) -> None:
    print()
    say(text)


def scale_text(scale: Tensor) -> str:
    """Powers of two below 1 as 2^-k."""
    mantissa, exponent = math.frexp(scale.item())       # scale = mantissa * 2^exponent
    if mantissa == 0.5 and exponent <= 0:
        return f"2^{exponent - 1}"
    return f"{scale.item():.4g}"


def code_text(code: Tensor) -> str:
    """The code as a number, and its byte as s eeee mmm."""
    bits = f"{code.view(torch.uint8).item():08b}"
    return f"{code.item():10.5g} {bits[0]} {bits[1:5]} {bits[5:]}"


def error_text(y: Tensor, x: Tensor) -> str:
    error = f"{100 * (y / x - 1).item():+.1f}%"
    return "0" if error in ("+0.0%", "-0.0%") else error


def print_row(label: str, cells: list[str], width: int = 22) -> None:
    print(f" {label:11}" + "".join(f"{cell:>{width}}" for cell in cells))


def print_matrix(x: Tensor) -> None:
    for r in range(N):
        print_row(f"row {r}", [f"{value.item():.5g}" for value in x[r, :N]])


def print_row_wise(q: QTensor) -> None:
    """Each row behind its scale."""
    for r in range(N):
        label = f"row {r}{scale_text(q.scale[0, r]):>6}"
        print_row(label, [code_text(code) for code in q.data[r, :N]])


def print_column_wise(q: QTensor) -> None:
    """Each column below its scale, at its place in the matrix: stored, it is a row."""
    scales = q.scale[0].expand(BLOCK)                   # The direct transpose has one for all.
    print_row("scale", [scale_text(scale) for scale in scales[:N]])
    for r in range(N):
        print_row(f"row {r}", [code_text(code) for code in q.data.t()[r, :N]])


def print_errors(x: Tensor, left_name: str, left: Tensor, right_name: str, right: Tensor) -> None:
    """x as two ways leave it, in percent of each element."""
    print_row("error of", [f"{left_name:>36}", "|", f"{right_name:>36}"], width=9)
    for r in range(N):
        left_cells = [error_text(left[r, c], x[r, c]) for c in range(N)]
        right_cells = [error_text(right[r, c], x[r, c]) for c in range(N)]
        print_row(f"row {r}", left_cells + ["|"] + right_cells, width=9)


# ---- the walk ------------------------------------------------------------------------------------

def walk_through_the_toy() -> None:
    x = toy_tile()
    say("""1. The matrix: four tokens, four columns. The rest of its 128x128 tile is zeros, which
        get the smallest scale there is and change nothing.""")
    print_matrix(x)

    fp32 = kernels.quantize(x, "fp32")
    pow2 = kernels.quantize(x, "pow2")
    step("""2. Quantize row-wise. The largest magnitude of a row, its amax, must fit into 448, so
        the scale, printed before the row, is amax/448. Each element is divided by it and rounded to
        the nearest code, a byte s eeee mmm:""")
    print_row_wise(fp32)
    say("Or the scale is rounded up to a power of two. Here this changes row 2 alone:")
    print_row_wise(pow2)
    print_errors(x, "fp32 scales", kernels.dequantize(fp32),
                 "powers of two", kernels.dequantize(pow2))

    step("3. What wgrad needs. It sums over tokens, the rows r, down the columns of dY and X:")
    print(" dW[n, c] = sum over r of  scale_dY[r] * scale_X[r] * code_dY[r, n] * code_X[r, c]")
    say("""The tensor core sums products of codes, and scales are multiplied in afterwards. A row's
        scale changes with r, within the sum. So all rows of a column must share one scale.""")

    twice = kernels.requantize(fp32, "fp32")
    step("4. Requantize. Dequantized (code * scale), the tensor with fp32 scales is")
    print_matrix(kernels.dequantize(fp32))
    say("and quantized again, with a scale for each column:")
    print_column_wise(twice)
    # 1.07 stands in row 1 of column 2, and in a transposed tensor in row 2 of column 1.
    first = kernels.dequantize(fp32)[1, 2]
    scale = twice.scale[0, 2]
    once = kernels.quantize(x.t(), "fp32")
    say(f"""So {x[1, 2]:.3g} is rounded twice. It had become {first:.4g}. At the scale of its column
        that is {first:.4g} / {scale:.4g} = {first / scale:.4g}, the nearest code is
        {twice.data[2, 1].item():.4g}, and that is worth {worth(twice)[1, 2]:.5g}. Rounded once, at
        scale {once.scale[0, 2]:.4g}, its code is {once.data[2, 1].item():.4g}, worth
        {worth(once)[1, 2]:.4g}. With powers of two only exponents change, and nothing is rounded
        again:""")
    again = kernels.requantize(pow2, "pow2")
    print_column_wise(again)
    print_errors(x, "requantized, fp32 scales", worth(twice),
                 "requantized, powers of two", worth(again))

    direct = kernels.scaling_aware_transpose(pow2)
    step("""5. The direct transpose. Where only exponents change, nothing needs to be dequantized.
        The whole tile gets one scale, S, the largest of its row scales, so that no code passes 448.
        A row of scale S/2^k moves down by k binades (factors of two): k is subtracted from eeee.
        This is exact while codes stay normal, 2^-6 or more. Below, they are multiples of 2^-9.""")
    print_column_wise(direct)
    for r in range(N):
        shift = (direct.scale[0, 0] / pow2.scale[0, r]).log2()
        fates = [fate(kernels.dequantize(pow2)[r, c], worth(direct)[r, c]) for c in range(N)]
        print_row(f"row {r} k={shift:.0f}", fates)
    print_errors(x, "requantized, powers of two", worth(again),
                 "direct transpose", worth(direct))
    say("""Only row 3, far below the others, pays for sharing S. Requantized, its small numbers had
        the smaller scales of columns 1 to 3.""")


def walk_through_a_tile() -> None:
    step("""6. A full tile, 128x128 random numbers: Gaussian, or with rows over 24 binades. Signal
        to noise in dB, and the same as rms error in percent. Large rows hide small ones in both, so
        there are also the non-zero elements that become zero, and the rows whose own error is above
        10%. In the last line all elements share one scale, as 128x128 weights do.""")
    samples = trace.samples(BLOCK, BLOCK, "cpu")
    gaussian = samples["Gaussian"]
    spread = samples["rows over 24 binades"]
    spread_ways = trace.quantized_in_each_way(spread)
    print(f" {'':28}{'Gaussian':>16}{'rows over 24 binades':>39}")
    print(f" {'':28}{'dB':>8}{'rms':>8}{'dB':>14}{'rms':>8}{'zeros':>9}{'rows':>8}")
    for way, y in trace.quantized_in_each_way(gaussian).items():
        plain = trace.loss_of(y, gaussian)
        wide = trace.loss_of(spread_ways[way], spread)
        print(f" {way:28}{plain.db:8.2f}{rms_percent(plain.db):7.2f}%{wide.db:14.2f}"
              f"{rms_percent(wide.db):7.2f}%{wide.zeros:8.1f}%{wide.rows:7.1f}%")


def rms_percent(db: float) -> float:
    """20 dB are a factor of ten between the sizes of error and signal."""
    return 100 * 10 ** (-db / 20)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.walk", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    walk_through_the_toy()
    walk_through_a_tile()


if __name__ == "__main__":
    main()
