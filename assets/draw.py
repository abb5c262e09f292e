"""The README's pictures of the layer, drawn from what the code says of itself, and its tables as data.

    python assets/draw.py dataflow                          every launch of naive and flow, from their traces
    python fp8flow.py | python assets/draw.py layer         GPU time by kind of kernel, from the first table of times
    python kernels.py | python assets/draw.py kernels       the table as comma-separated values, to compare with others
    python assets/draw.py evidence                          prints the intervals of the runs in evidence.csv

The first three write into assets/: dataflow.png, layer.png, kernels.csv. (`train.py --compare --seeds N` draws losses.)
"""
import csv
import itertools
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import fp8flow
import kernels
import train

RED, BLUE, GRAY, INK = "#c8102e", "#1f6fb2", "#8a8f98", "#222222"
PALE = "#d0d3d8"
KINDS = dict(zip(fp8flow.SHARES, (GRAY, "#e2a03f", BLUE, RED, "#5a9e6f", PALE), strict=True))


def dataflow() -> None:
    """Two rails, 16 bits or more on the left, FP8 on the right. A launch goes from what it reads to what it writes."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 9), layout="constrained", sharey=True)
    for panel, name in zip(panels, ("naive", "flow")):
        layer = fp8flow.Layer(fp8flow.RECIPES[name], *fp8flow.random_layer(64, 128, 128, 4, 2, "cpu"))
        with kernels.trace() as launches:
            layer.step()
        casts = 0
        for y, launch in enumerate(launches):
            begin, end = (int(side[0][1] == kernels.FP8) for side in (launch.reads, launch.writes))
            color = RED if launch.cast else BLUE if launch.op.endswith("_quantize") else GRAY
            panel.annotate("", (end, y + 0.9), (begin, y), arrowprops=dict(arrowstyle="->", color=color, linewidth=1.8))
            casts += bool(launch.cast)
            number = f"{casts:2}  {launch.cast}({launch.tensor})" if launch.cast else f"{launch.tensor}"
            panel.text(1.25, y + 0.45, number, color=color, va="center", weight="bold" if launch.cast else "normal")
            panel.text(2.35, y + 0.45, launch.op.replace("_", " "), color=color, va="center")
        backward = [launch.direction for launch in launches].index("backward")
        panel.axhline(backward, 0.02, 0.98, color=INK, linewidth=0.6, linestyle=":")
        for rail, label in enumerate(("bf16", "fp8")):
            panel.plot([rail, rail], [0, len(launches)], color=PALE, linewidth=5, zorder=0)
            panel.text(rail, -0.5, label, ha="center", color=INK)
        panel.set(title=f"{name}: {len(launches)} launches, {casts} casts", xlim=(-0.3, 5.2), ylim=(34.5, -1.3))
        panel.axis("off")
    notes = ("red: a cast", "blue: FP8 on the way out of other work", "gray: the rest", "dotted: where backward begins",
             "GEMMs read FP8, write bf16 (dW1, dW2: fp32)")
    panel.text(0, 21, "\n".join(notes), va="top", color=INK, linespacing=1.6)
    figure.savefig(HERE / "dataflow.png", dpi=110, facecolor="white")


def layer() -> None:
    lines = sys.stdin.read().split("ms by kind of kernel")[1].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("T "))
    table = itertools.takewhile(lambda line: not line.startswith("T "), lines[first + 1:])
    cells = [line.split() for line in table]
    rows = [(spec, list(map(float, ms[2:2 + len(KINDS)]))) for spec, *ms in cells if spec in fp8flow.VARIANTS]
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for i, (kind, color) in enumerate(KINDS.items()):
        times, before = [times[i] for _, times in rows], [sum(times[:i]) for _, times in rows]
        axes.barh([spec for spec, _ in rows], times, left=before, color=color, label=kind)
    axes.invert_yaxis()
    figure.supxlabel(f"GPU ms, forward and backward of one layer ({lines[first]})", fontsize="medium")
    figure.legend(ncols=len(KINDS), loc="outside upper center", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "layer.png", dpi=130, facecolor="white")


def table_of_kernels() -> None:
    shape, rows = "", [["shape", "kernel", "us", "rate", "unit", "of_ceiling", "speedup", "over"]]
    for line in sys.stdin:
        found = re.match(r"  (.{32}.*?) +([\d.]+) us +(\d+) (\S+) +([\d.]+) of the ceiling(?: +([\d.]+)x (\w+))?", line)
        shape = line.strip() if line.startswith("T ") else shape
        rows += [[shape, *(cell.strip() for cell in found.groups(""))]] if found else []
    with open(HERE / "kernels.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def evidence() -> None:
    """What `train.py --compare --seeds` prints under its table, for the runs of each commit."""
    with open(HERE / "evidence.csv") as file:
        for commit, rows in itertools.groupby(csv.DictReader(file), lambda row: row["commit"]):
            rows = [dict(row, val_loss=float(row["val_loss"])) for row in rows]
            print(f"commit {commit}, {rows[0]['gpu']}", *train.summary(rows), sep="\n")


if __name__ == "__main__":
    modes = dict(dataflow=dataflow, layer=layer, kernels=table_of_kernels, evidence=evidence)
    if len(sys.argv) != 2 or sys.argv[1] not in modes:
        sys.exit(__doc__)
    modes[sys.argv[1]]()
