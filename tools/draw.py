"""The pictures of the layer, from what the code and the measurements say.

    python -m tools.draw dataflow       every launch of naive and flow, as tools.trace records them
    python -m tools.draw layer          the times in assets/layer.csv, which this has written:
                                        python -m tools.bench layer --csv assets/layer.csv

They go to assets/dataflow.png and assets/layer.png. (train.py draws loss.png.)
"""
import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

from kernels import FP8
from tools.bench import LAYER_COLUMNS, SHARES, Size
from tools.trace import launches_of

ASSETS = Path(__file__).parent.parent / "assets"
RED = "#c8102e"
BLUE = "#1f6fb2"
GRAY = "#8a8f98"
INK = "#222222"
PALE = "#d0d3d8"
COLORS = {"GEMM": GRAY, "transpose": "#e2a03f", "SwiGLU": BLUE, "cast": RED, "permute": "#5a9e6f",
          "other": PALE}


# ---- dataflow.png --------------------------------------------------------------------------------

def color_of(launch) -> str:
    if launch.cast:
        return RED
    if launch.op.endswith("_quantize"):
        return BLUE
    return GRAY


def draw_panel(panel, name: str) -> None:
    """Two rails, 16 bits or more on the left, FP8 on the right. A launch goes from what it reads to
    what it writes."""
    launches = launches_of(name, Size(T=64, D=128, F=128, E=4, k=2), "cpu")
    casts = 0
    for y, launch in enumerate(launches):
        begin = int(launch.reads[0].dtype == FP8)
        end = int(launch.writes[0].dtype == FP8)
        color = color_of(launch)
        arrow = {"arrowstyle": "->", "color": color, "linewidth": 1.8}
        panel.annotate("", (end, y + 0.9), (begin, y), arrowprops=arrow)
        label = launch.tensor
        weight = "normal"
        if launch.cast:
            casts += 1
            label = f"{casts:2}  {launch.cast}({launch.tensor})"
            weight = "bold"
        panel.text(1.25, y + 0.45, label, color=color, va="center", weight=weight)
        panel.text(2.35, y + 0.45, launch.op.replace("_", " "), color=color, va="center")
    directions = [launch.direction for launch in launches]
    panel.axhline(directions.index("backward"), 0.02, 0.98, color=INK, linewidth=0.6, linestyle=":")
    for rail, label in enumerate(("bf16", "fp8")):
        panel.plot([rail, rail], [0, len(launches)], color=PALE, linewidth=5, zorder=0)
        panel.text(rail, -0.5, label, ha="center", color=INK)
    panel.set(title=f"{name}: {len(launches)} launches, {casts} casts", xlim=(-0.3, 5.2))
    panel.axis("off")


def draw_dataflow(folder: Path) -> Path:
    figure = Figure(figsize=(9, 9), layout="constrained")       # without pyplot: no display
    naive, flow = figure.subplots(1, 2, sharey=True)
    draw_panel(naive, "naive")
    draw_panel(flow, "flow")
    naive.set(ylim=(34.5, -1.3))
    notes = ("red: a cast", "blue: FP8 on the way out of other work", "gray: the rest",
             "dotted: where backward begins", "GEMMs read FP8, write bf16 (dW1, dW2: fp32)")
    flow.text(0, 21, "\n".join(notes), va="top", color=INK, linespacing=1.6)
    path = folder / "dataflow.png"
    figure.savefig(path, dpi=110, facecolor="white")
    return path


# ---- layer.png -----------------------------------------------------------------------------------

def read_layer(path: Path) -> list[dict]:
    """The rows that are drawn: the first size, random routing, weights cast before, in turns.
    Raises ValueError where there are none."""
    remedy = "write it on a GPU with: python -m tools.bench layer --csv assets/layer.csv"
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"layer: {path} cannot be read ({error.strerror}): {remedy}")
    drawn = {"size": "layer 1", "routing": "random", "weights": "cast before", "method": "in turns"}
    chosen = []
    for row in rows:
        if all(row.get(column) == value for column, value in drawn.items()):
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
    specs = [row["spec"] for row in rows]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    parts = [parts_of(row) for row in rows]
    for kind, widths in zip(SHARES, zip(*parts)):
        axes.barh(specs, widths, left=left, color=COLORS[kind], label=kind)
        left = [start + width for start, width in zip(left, widths)]
    for y, row in enumerate(rows):
        label = f" {float(row['ms']):.2f} ms, {float(row['speedup']):.2f}x"
        axes.text(left[y], y, label, va="center", color=INK, fontsize="small")
    axes.set_xlim(0, 1.2 * max(left))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    sizes = ", ".join(f"{name} {rows[0][name]}" for name in Size._fields)
    figure.supxlabel(f"ms in turns, forward and backward of one layer ({sizes})", fontsize="medium")
    figure.legend(ncols=len(SHARES), loc="outside upper center", frameon=False)
    path = folder / "layer.png"
    figure.savefig(path, dpi=130, facecolor="white")
    return path


# ---- main ----------------------------------------------------------------------------------------

PICTURES = {"dataflow": draw_dataflow, "layer": draw_layer}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.draw", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PICTURES, metavar="NAME", help=" or ".join(PICTURES))
    args = parser.parse_args(argv)
    try:
        path = PICTURES[args.name](ASSETS)
    except ValueError as error:
        parser.error(str(error))
    print(f"drawn: {path}")


if __name__ == "__main__":
    main()
