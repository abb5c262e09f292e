"""The pictures of README.md, from what the code and the measurements say.

    python -m tools.draw NAME [NAME ...]        writes assets/NAME.png

    dataflow    every launch of naive and of flow, as tools.trace records them
    bytes       how many bytes these launches move (takes 40 seconds and 5 GB of memory)
    stripes     what shares a scale, and along which axis each product sums
    grid        1.07 rounded once and twice, between the codes of E4M3
    timeline    the GEMM that waits and the one that does not
    layer       the times in assets/layer.csv, which a GPU has written:
                python -m tools.bench layer --csv assets/layer.csv

(train.py draws loss.png.)
"""
import argparse
import csv
from pathlib import Path
from unittest import mock

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import kernels
from fp8flow import RECIPES
from kernels import FP8
from tools.bench import LAYER_COLUMNS, LAYERS, SHARES, Size, kind_of
from tools.trace import Launch, launches_of

ASSETS = Path(__file__).parent.parent / "assets"
RED = "#c8102e"                 # a cast
BLUE = "#1f6fb2"                # FP8
GRAY = "#646a73"                # bf16, and the rest
INK = "#222222"
PALE = "#d0d3d8"
PALE_BLUE = "#c3daee"
BAND = "#eef0f3"
COLORS = {"GEMM": "#8a8f98", "transpose": "#d9902f", "SwiGLU": "#8b6bb1", "cast": RED,
          "permute": "#4f9463", "other": PALE}

# Pictures are 900 pixels wide, 9 inches of 100 dots. So 12 points are 17 pixels; README's text has
# 16.
WIDTH = 900
DOTS = 100
matplotlib.rc("font", size=12)


def figure_of(height: int, **options) -> Figure:
    return Figure(figsize=(WIDTH / DOTS, height / DOTS), dpi=DOTS, **options)   # needs no display


def canvas(height: int):
    """A figure, and axes in pixels, from the left and from the top."""
    figure = figure_of(height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def write(axes, x, y, words, **options) -> None:
    options = {"ha": "center", "va": "center_baseline", "color": INK, **options}
    axes.text(x, y, words, **options)


def arrow(axes, begin, end, color=INK) -> None:
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 2, "mutation_scale": 14,
             "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, begin, arrowprops=style)


def box(axes, x, y, width, height, color) -> None:
    axes.add_patch(Rectangle((x, y), width, height, color=color, linewidth=0))


def save(figure: Figure, folder: Path, name: str) -> Path:
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=DOTS, facecolor="white")
    few_colors = Image.open(path).convert("RGB").quantize(128)      # a third of the bytes
    few_colors.save(path, optimize=True)
    return path


# ---- dataflow ------------------------------------------------------------------------------------

ROW = 26                        # pixels for a launch
TOP = 62                        # above the first


def color_of(launch: Launch) -> str:
    if launch.cast:
        return RED
    if launch.op.endswith("_quantize"):
        return BLUE
    return GRAY


def draw_launches(axes, left: int, width: int, name: str) -> None:
    """Two rails, 16 bits or more on the left, FP8 on the right. A launch goes from what it reads to
    what it writes."""
    launches = launches_of(name, Size(T=64, D=128, F=128, E=4, k=2), "cpu")
    for direction in ("forward", "backward"):
        rows = [y for y, launch in enumerate(launches) if launch.direction == direction]
        top = TOP + ROW * rows[0]
        height = ROW * len(rows)
        box(axes, left, top + 2, width, height - 4, BAND)
        write(axes, left + 15, top + height / 2, direction, rotation=90, va="center")
    rails = (left + 50, left + 108)
    for rail, label in zip(rails, ("bf16", "fp8")):
        box(axes, rail - 3, TOP, 6, ROW * len(launches), PALE)
        write(axes, rail, TOP - 15, label)
    casts = 0
    for y, launch in enumerate(launches):
        top = TOP + ROW * y
        middle = top + ROW / 2
        begin = rails[launch.reads[0].dtype == FP8]
        end = rails[launch.writes[0].dtype == FP8]
        look = {"color": color_of(launch), "ha": "left"}
        arrow(axes, (begin, top + 3), (end, top + ROW - 3), color_of(launch))
        write(axes, left + 231, middle, launch.op, **look)
        label = launch.tensor
        if launch.op == "swiglu_backward_quantize":
            label = "dH, A"             # A launch is named after the first tensor that it writes.
        if launch.cast:
            casts += 1
            look["weight"] = "bold"
            label = f"{launch.cast}({launch.tensor})"
            write(axes, left + 147, middle, casts, **{**look, "ha": "right"})
        write(axes, left + 155, middle, label, **look)
    title = f"{name}: {len(launches)} launches, {casts} casts"
    write(axes, left + 4, 20, title, ha="left", weight="bold", fontsize="large")


def draw_dataflow(folder: Path) -> Path:
    figure, axes = canvas(900)
    draw_launches(axes, 5, 401, "naive")
    draw_launches(axes, 416, 479, "flow")
    notes = {640: ("a cast", RED), 670: ("writes FP8 at the end of other work", BLUE),
             700: ("everything else", GRAY)}
    for y, (words, color) in notes.items():
        arrow(axes, (430, y), (475, y), color)
        write(axes, 490, y, words, color=color, ha="left")
    return save(figure, folder, "dataflow")


# ---- bytes and layer: bars of several kinds ------------------------------------------------------

def draw_bars(axes, names: list[str], rows: list[list[float]], height: float) -> None:
    """A bar for each name, whose parts are of the kinds in SHARES."""
    left = [0.0] * len(names)
    for kind, widths in zip(SHARES, zip(*rows)):
        if any(widths):
            axes.barh(names, widths, height, left, color=COLORS[kind], label=kind)
        left = [start + width for start, width in zip(left, widths)]
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.legend(ncols=len(SHARES), loc="outside upper center", frameon=False,
                       handlelength=1.2, columnspacing=1.5)


def kind_of_launch(launch: Launch) -> str:
    if launch.cast:
        return "cast"
    if launch.op == "grouped_wgrad":
        return "GEMM"
    return kind_of(launch.op)


def megabytes_of(spec: str, size: Size) -> list[float]:
    """What the launches of each kind in SHARES move. Shapes alone decide that, and on a CPU most of
    the time would go into products, so zeros stand for their results."""

    def gemm(a, b, tile_expert):
        return torch.zeros(len(a.data), b.data.shape[1], dtype=torch.bfloat16)

    def wgrad(a, b, ends, dtype):
        return torch.zeros(len(ends), len(a.data), len(b.data), dtype=dtype)

    with mock.patch.multiple(kernels, grouped_gemm_ref=gemm, grouped_wgrad_ref=wgrad):
        launches = launches_of(spec, size, "cpu")
    moved = dict.fromkeys(SHARES, 0.0)
    for launch in launches:
        moved[kind_of_launch(launch)] += launch.bytes() / 1e6
    return list(moved.values())


def draw_bytes(folder: Path, size: Size = LAYERS[0]) -> Path:
    names = ["naive", "flow"]
    rows = [megabytes_of(name, size) for name in names]
    figure = figure_of(290, layout="constrained")
    axes = figure.subplots()
    draw_bars(axes, names, rows, 0.6)
    for y, row in enumerate(rows):
        begin = 0.0
        for kind, width in zip(SHARES, row):
            middle = begin + width / 2
            if kind == "cast":
                write(axes, middle, y + 0.42, f"{width:.0f}", color=RED, weight="bold")
            elif width:
                write(axes, middle, y - 0.42, f"{width:.0f}")
            begin += width
        write(axes, begin, y, f" {begin:.0f} MB", ha="left", weight="bold")
    axes.set(xlim=(0, 1.15 * max(map(sum, rows))), ylim=(1.55, -0.6))
    figure.supxlabel(f"MB in one forward and backward ({size})", fontsize="medium")
    return save(figure, folder, "bytes")


def read_layer(path: Path) -> list[dict]:
    """The rows that are drawn: bf16, naive and flow at the first size, random routing, weights cast
    before, in turns. Raises ValueError where there are none."""
    remedy = "write it on a GPU with: python -m tools.bench layer --csv assets/layer.csv"
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"layer: {path} cannot be read ({error.strerror}): {remedy}")
    drawn = {"size": "layer 1", "routing": "random", "weights": "cast before", "method": "in turns"}
    chosen = []
    for row in rows:
        is_drawn = all(row.get(column) == value for column, value in drawn.items())
        if is_drawn and row.get("spec") in RECIPES:
            chosen.append(row)
    if not chosen or not set(LAYER_COLUMNS) <= set(chosen[0]):
        raise ValueError(f"layer: {path} holds no such times: {remedy}")
    return chosen


def parts_of(row: dict) -> list[float]:
    """The measured ms, divided among the kinds of kernels as the profiler's ms are: it saw the
    kernels one after the other, without the graph that was timed."""
    by_kind = [float(row[f"ms_{kind}"]) for kind in SHARES]
    return [float(row["ms"]) * ms / sum(by_kind) for ms in by_kind]


def draw_layer(folder: Path) -> Path:
    rows = read_layer(folder / "layer.csv")
    times = [float(row["ms"]) for row in rows]
    figure = figure_of(130 + 44 * len(rows), layout="constrained")
    axes = figure.subplots()
    draw_bars(axes, [row["spec"] for row in rows], [parts_of(row) for row in rows], 0.8)
    for y, (row, ms) in enumerate(zip(rows, times)):
        write(axes, ms, y, f" {ms:.2f} ms, {float(row['speedup']):.2f}x", ha="left")
    axes.set_xlim(0, 1.35 * max(times))
    sizes = ", ".join(f"{name} {rows[0][name]}" for name in Size._fields)
    label = f"ms of one forward and backward, and speed-up over bf16 ({sizes})"
    figure.supxlabel(label, fontsize="medium")
    return save(figure, folder, "layer")


# ---- stripes -------------------------------------------------------------------------------------

SIDE = 168                      # pixels of a matrix
BLOCKS = 4                      # along a side, of 128 each
STRIPES = 6                     # in a block; 128 could not be seen


def draw_matrix(axes, left: int, top: int, rows: int, columns: int) -> None:
    """Each block in rows x columns parts that have a scale each. One is marked."""
    height = SIDE / BLOCKS / rows
    width = SIDE / BLOCKS / columns
    box(axes, left, top, SIDE, SIDE, PALE_BLUE)
    for color, lines, gaps in (("white", BLOCKS * rows, BLOCKS * columns), (GRAY, BLOCKS, BLOCKS)):
        across = [top + SIDE * i / lines for i in range(lines + 1)]
        down = [left + SIDE * i / gaps for i in range(gaps + 1)]
        axes.hlines(across, left, left + SIDE, color, linewidth=1)
        axes.vlines(down, top, top + SIDE, color, linewidth=1)
    x = left + (columns + columns // 2) * width
    y = top + (rows + rows // 2) * height
    axes.add_patch(Rectangle((x, y), width, height, color=BLUE, zorder=3))


def draw_stripes(folder: Path) -> Path:
    figure, axes = canvas(345)
    top = 70
    panels = [
        ("1x128 stripes", "row-wise", STRIPES, 1, "fprop, dgrad", ""),
        ("128x1 columns", "requantized", 1, STRIPES, "", "wgrad"),
        ("128x128 tiles", "direct transpose", 1, 1, "", "wgrad"),
        ("128x128 tiles", "weights", 1, 1, "fprop", "dgrad"),
    ]
    for number, (title, use, rows, columns, across, down) in enumerate(panels):
        left = 50 + 222 * number
        middle = left + SIDE / 2
        below = top + SIDE + 16
        write(axes, middle, 22, title, weight="bold", fontsize="large")
        write(axes, middle, 48, use)
        draw_matrix(axes, left, top, rows, columns)
        if across:
            arrow(axes, (left, below), (left + SIDE, below))
            write(axes, middle, below + 18, across)
        if down:
            arrow(axes, (left - 14, top), (left - 14, top + SIDE))
            write(axes, left - 32, top + SIDE / 2, down, rotation=90, va="center")
    box(axes, 50, 314, 24, 16, BLUE)
    write(axes, 84, 322, "one scale", ha="left")
    arrow(axes, (272, 322), (322, 322))
    write(axes, 332, 322, "a product sums this way", ha="left")
    return save(figure, folder, "stripes")


# ---- grid ----------------------------------------------------------------------------------------

EXAMPLE = 1.07
LOW = 0.94                      # what is drawn of the number lines
HIGH = 1.27
LINES = {0.7: 0, 1.0: 1, 0.5: 2}        # scales, from the top; the first rounding is at 1.0


def codes_between(low: float, high: float, scale: float) -> list[float]:
    """The codes of E4M3 whose values at this scale lie there."""
    codes = torch.arange(256).to(torch.uint8).view(FP8).float()
    values = codes * scale
    return codes[(low < values) & (values < high)].tolist()


def rounded(x: float, scale: float) -> float:
    """The nearest value that a code has at this scale."""
    return torch.tensor(x / scale).to(FP8).item() * scale


def say_error(axes, value: float, scale: float, when: str) -> None:
    """How far from the example the value is, written beside it."""
    y = LINES[scale]
    y += 0.22 if y == 0 else -0.22              # where no code is written
    words = f"{when}: {abs(value / EXAMPLE - 1):.0%} off"
    if value > EXAMPLE:
        write(axes, value + 0.008, y, words, ha="left")
    else:
        write(axes, value - 0.008, y, words, ha="right")


def draw_grid(folder: Path) -> Path:
    figure = figure_of(440)
    axes = figure.add_axes((0.11, 0, 0.88, 1))
    axes.vlines(EXAMPLE, -0.57, 2.5, INK, linestyle=":", linewidth=2, zorder=0)
    write(axes, EXAMPLE, -0.68, EXAMPLE, weight="bold")
    for scale, y in LINES.items():
        axes.hlines(y, LOW, HIGH, GRAY, linewidth=2)
        write(axes, LOW - 0.004, y, f"scale {scale:g}", ha="right", weight="bold")
        for code in codes_between(LOW, HIGH, scale):
            value = code * scale
            axes.vlines(value, y - 0.08, y + 0.08, GRAY, linewidth=2)
            label = f"{value:.5g}\n{code:g} x {scale:g}"
            write(axes, value, y - 0.27 if y == 0 else y + 0.27, label, va="center")
        axes.plot(rounded(EXAMPLE, scale), y, "o", color=BLUE, markersize=11, zorder=3)
    first = rounded(EXAMPLE, 1.0)
    say_error(axes, first, 1.0, "once")
    say_error(axes, rounded(EXAMPLE, 0.7), 0.7, "once")
    for scale, begin, end in ((0.7, 0.9, 0.11), (0.5, 1.5, 1.89)):
        again = rounded(first, scale)
        arrow(axes, (first, begin), (again, end), RED)
        axes.plot(again, LINES[scale], "o", color=RED, markersize=14, fillstyle="none",
                  markeredgewidth=2.5, zorder=4)
        say_error(axes, again, scale, "again")
    axes.set(xlim=(LOW, HIGH), ylim=(2.6, -0.85))
    axes.axis("off")
    return save(figure, folder, "grid")


# ---- timeline ------------------------------------------------------------------------------------

SLOT = 108                      # pixels of a product, and of a promotion
LANE = 40
LANES = 124                     # where they begin; their names stand before
LOOKS = {"product": (BLUE, "white"), "for": (BLUE, "white"), "idle": ("white", INK)}


def draw_lane(axes, y: int, name: str, work: list[str], begin: int = 0, slots: int = 1) -> None:
    """What one worker does from slot `begin` on, each for so many slots."""
    write(axes, LANES - 8, y, name, ha="right")
    for number, what in enumerate(work):
        left = LANES + SLOT * (begin + number)
        color, ink = LOOKS.get(what.partition(" ")[0], (PALE, INK))
        box(axes, left + 1, y - LANE / 2 + 2, SLOT * slots - 2, LANE - 4, color)
        write(axes, left + SLOT * slots / 2, y, what, color=ink)


def draw_timeline(folder: Path) -> Path:
    figure, axes = canvas(380)
    titles = {20: "The loop: the tensor core waits", 160: "Two consumers: it does not"}
    for y, title in titles.items():
        write(axes, LANES, y, title, ha="left", weight="bold", fontsize="large")
    steps = ["product", "promote"] * 4
    draw_lane(axes, 60, "program", steps[:7])
    draw_lane(axes, 100, "tensor core", ["product", "idle"] * 3 + ["product"])
    draw_lane(axes, 200, "consumer 0", steps[:7])
    draw_lane(axes, 240, "consumer 1", steps[:6], begin=1)
    draw_lane(axes, 280, "tensor core", ["for 0", "for 1"] * 3 + ["for 0"])
    draw_lane(axes, 320, "loader", ["copies the tiles of later steps, when there is room"], slots=7)
    arrow(axes, (LANES, 358), (LANES + 7 * SLOT, 358))
    write(axes, LANES - 8, 358, "time", ha="right")
    return save(figure, folder, "timeline")


# ---- main ----------------------------------------------------------------------------------------

PICTURES = {"dataflow": draw_dataflow, "bytes": draw_bytes, "stripes": draw_stripes,
            "grid": draw_grid, "timeline": draw_timeline, "layer": draw_layer}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.draw", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=PICTURES, metavar="NAME",
                        help=f"some of {', '.join(PICTURES)}")
    args = parser.parse_args(argv)
    for name in args.names:
        try:
            path = PICTURES[name](ASSETS)
        except ValueError as error:
            parser.error(str(error))
        print(f"drawn: {path}")


if __name__ == "__main__":
    main()
