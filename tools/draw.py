"""The pictures of README.md and answers.md, from what the code and the measurements say.

    python -m tools.draw NAME [NAME ...]        writes assets/NAME.png

    dataflow    every launch of naive and of flow, as tools.trace records them
    bytes       how many bytes these launches move (takes a minute or two without a GPU)
    layer       the times in assets/layer.csv, which a GPU has written:
                python -m tools.bench layer --csv assets/layer.csv

(train.py draws loss.png. stripes.png, grid.png and timeline.png show what no data changes.)
"""
import argparse
import csv
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

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
BAND = "#eef0f3"
COLORS = {"weights": "#b7a35a", "GEMM": "#8a8f98", "transpose": "#d9902f", "SwiGLU": "#8b6bb1",
          "cast": RED, "permute": "#4f9463", "other": PALE}

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


def writes_fp8(launch: Launch) -> bool:
    """At the end of other work."""
    return launch.op.startswith("swiglu") and launch.writes[0].dtype == FP8


def color_of(launch: Launch) -> str:
    if launch.cast:
        return RED
    return BLUE if writes_fp8(launch) else GRAY


def launches_of_activations(spec: str) -> list[Launch]:
    """The plan and the casts of weights are no part of the picture."""
    launches = launches_of(spec, Size(T=64, D=128, F=128, E=4, k=2), "cpu")
    return [launch for launch in launches if launch.place and launch.op != "quantize_weight"]


def draw_launches(axes, left: int, width: int, name: str) -> None:
    """Two rails, 16 bits or more on the left, FP8 on the right. A launch goes from what it reads to
    what it writes."""
    launches = launches_of_activations(name)
    for direction in ("forward", "backward"):
        rows = [y for y, launch in enumerate(launches) if launch.place.direction == direction]
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
        label = launch.place.tensor
        if launch.op == "swiglu_backward" and writes_fp8(launch):
            label = "dH, A"             # A launch is named after the first tensor that it writes.
        if launch.cast:
            casts += 1
            look["weight"] = "bold"
            label = f"{launch.cast}({launch.place.tensor})"
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


def megabytes_of(spec: str, size: Size) -> list[float]:
    """What the launches of each kind in SHARES move."""
    moved = dict.fromkeys(SHARES, 0.0)
    for launch in launches_of(spec, size, "cuda" if torch.cuda.is_available() else "cpu"):
        moved["cast" if launch.cast else kind_of(launch.op)] += launch.bytes() / 1e6
    return list(moved.values())


def draw_bytes(folder: Path, size: Size = LAYERS["layer 1"]) -> Path:
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
    """The rows that are drawn: bf16, naive and flow in the layer of the training step, in turns.
    Raises ValueError where there are none."""
    remedy = "write it on a GPU with: python -m tools.bench layer --csv assets/layer.csv"
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"layer: {path} cannot be read ({error.strerror}): {remedy}")
    drawn = {"size": "training", "routing": "random", "weights": "float32"}
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
        write(axes, ms, y, f" {ms:.1f} ms, {float(row['speedup']):.2f}x", ha="left")
    axes.set_xlim(0, 1.25 * max(times))
    sizes = ", ".join(f"{name} {rows[0][name]}" for name in Size._fields)
    label = f"ms of one forward and backward, and speed-up over bf16 ({sizes})"
    figure.supxlabel(label, fontsize="medium")
    return save(figure, folder, "layer")


# ---- main ----------------------------------------------------------------------------------------

PICTURES = {"dataflow": draw_dataflow, "bytes": draw_bytes, "layer": draw_layer}


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
