"""What quantization and the transpose do to the four tensors of every layer while a model trains.

    python -m tools.probe [N] [--preset P] [--steps S] [--out FILE]

Trains flow as train.py does, each step called. Every N steps one more batch runs, whose gradients
are dropped, and X, A, dY and dH of each layer are looked at: their largest magnitude; the widest
spread of row scales in a 128x128 tile, in binades; the share of elements that the direct transpose
turns to zero; and the signal to noise ratio of the row-wise tensor, which is rounded once, and of
what the direct and the requantizing transpose make of it. The same ratios for dW1 = dH^T X and
dW2 = dY^T A, whose products are exact here, say what this does to the weights' gradients.
"""
import argparse
import csv
import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fp8flow
import kernels
import train
from fp8flow import Plan
from kernels import BLOCK, SCALE_MIN
from model import GPT
from tools.bench import sqnr

SEED = 0
FLOW = fp8flow.parse_spec("flow")
REQUANTIZING = fp8flow.parse_spec("naive,scales=pow2")
WAYS = ["once", "direct", "requantized"]
COLUMNS = ["step", "layer", "tensor", "amax", "binades", "underflow", *WAYS]


def four_tensors(experts: fp8flow.Experts, x: Tensor, probs: Tensor, plan: Plan,
                 dy: Tensor) -> dict[str, Tensor]:
    """X, A, dY, dH of one expert layer in bf16, [M, ...], zeros in the padding.

    x and dy [T, D] bf16, probs [T, k] fp32.
    """
    w1 = experts.w1.detach().bfloat16()
    w2 = experts.w2.detach().bfloat16()
    prob = fp8flow.spread(probs, plan)
    x = fp8flow.permute(x, plan, FLOW)
    dy = fp8flow.permute(dy, plan, FLOW)
    h = fp8flow.torch_grouped_mm(x, w1.mT, plan.ends)
    a = kernels.swiglu(h, prob, None, plan.tile_expert)
    da = fp8flow.torch_grouped_mm(dy, w2, plan.ends)
    dh, _, _ = kernels.swiglu_backward(da, h, prob, None, plan.tile_expert)
    is_live = plan.pair[:, None] >= 0
    tensors = {"X": x, "A": a, "dY": dy, "dH": dh}
    return {name: torch.where(is_live, tensor, 0) for name, tensor in tensors.items()}


def widest_tile(scale: Tensor) -> float:
    """scale [C/128, M] of powers of two -> the most binades between two rows of one tile. Rows of
    zeros have the smallest scale there is, and no part in this."""
    exponent = scale.log2().unflatten(1, (-1, BLOCK))
    is_filled = scale.unflatten(1, (-1, BLOCK)) > SCALE_MIN
    highest = torch.where(is_filled, exponent, -math.inf).amax(2)
    lowest = torch.where(is_filled, exponent, math.inf).amin(2)
    return max(0.0, (highest - lowest).max().item())


class Quantized(NamedTuple):
    """A tensor [M, C] in bf16, and what FP8 leaves of it in three ways."""
    exact: Tensor
    scale: Tensor               # [C/128, M], of the row-wise form
    ways: dict[str, Tensor]     # WAYS -> [M, C] bf16, which holds each code * scale exactly


def quantized(t: Tensor, plan: Plan) -> Quantized:
    """t [M, C] bf16, zeros in the padding."""
    q = kernels.quantize(t)
    direct = fp8flow.column_wise(q, plan, FLOW)
    requantized = fp8flow.column_wise(q, plan, REQUANTIZING)
    ways = {
        "once": kernels.dequantize(q, torch.bfloat16),
        "direct": kernels.dequantize(direct, torch.bfloat16).t().contiguous(),
        "requantized": kernels.dequantize(requantized, torch.bfloat16).t().contiguous(),
    }
    return Quantized(t, q.scale, ways)


def look_at(q: Quantized, plan: Plan) -> dict[str, float]:
    """Only what the transpose itself turns to zero is called underflow: quantization may have done
    so before it."""
    is_live = plan.pair >= 0
    t = q.exact[is_live]
    ways = {way: y[is_live] for way, y in q.ways.items()}
    vanished = (ways["direct"] == 0) & (ways["once"] != 0)
    nonzero = (t != 0).sum().clamp(min=1)       # A tensor of zeros is no reason to stop.
    found = {
        "amax": t.abs().max().item(),
        "binades": widest_tile(q.scale),
        "underflow": (vanished.sum() / nonzero).item(),
    }
    for way, y in ways.items():
        found[way] = sqnr(y, t)
    return found


def look_at_gradient(dy: Quantized, x: Quantized, plan: Plan) -> dict[str, float]:
    """dW = dY^T X of each expert, of operands quantized in each way."""
    exact = fp8flow.torch_grouped_mm(dy.exact.t(), x.exact, plan.ends)
    found = {"amax": exact.abs().max().item()}
    for way in WAYS:
        dw = fp8flow.torch_grouped_mm(dy.ways[way].t(), x.ways[way], plan.ends)
        found[way] = sqnr(dw, exact)
    return found


def losses_of(model: GPT, window: Tensor) -> Tensor:
    """[loss, balance] of a batch, whose gradients it leaves."""
    loss, balance = model(window[:, :-1], window[:, 1:])
    (loss + train.BALANCE * balance).backward()
    return torch.stack([loss, balance]).detach()


def probe(model: GPT, window: Tensor, step: int) -> list[dict]:
    """One forward and backward on a batch. For each layer a row for each of the four tensors and of
    the two gradients."""
    moes = [block.moe for block in model.blocks]
    seen = {}                   # the Experts -> its inputs, and the gradient of its output

    def look(experts, inputs, y):
        def keep(dy):
            seen[experts] = (*inputs, dy)
        y.register_hook(keep)

    hooks = [moe.experts.register_forward_hook(look) for moe in moes]
    losses_of(model, window)
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    rows = []
    for layer, moe in enumerate(moes):
        x, top_k_index, top_k_weights, dy = seen[moe.experts]
        plan = fp8flow.make_plan(top_k_index, len(moe.experts.w1))
        tokens = x.detach().flatten(0, -2).bfloat16()
        probs = top_k_weights.detach().reshape(plan.slot.shape).float()
        tensors = four_tensors(moe.experts, tokens, probs, plan, dy.flatten(0, -2).bfloat16())
        tensors = {name: quantized(tensor, plan) for name, tensor in tensors.items()}
        found = {name: look_at(tensor, plan) for name, tensor in tensors.items()}
        found["dW1"] = look_at_gradient(tensors["dH"], tensors["X"], plan)
        found["dW2"] = look_at_gradient(tensors["dY"], tensors["A"], plan)
        for name, numbers in found.items():
            rows.append({"step": step, "layer": layer, "tensor": name, **numbers})
    return rows


def print_rows(rows: list[dict]) -> None:
    for row in rows:
        spread = ""
        if "binades" in row:
            spread = f"{row['binades']:3.0f} binades  underflow {100 * row['underflow']:7.4f}%"
        noise = "  ".join(f"{way} {row[way]:4.1f}" for way in WAYS)
        print(f"  layer {row['layer']}  {row['tensor']:3} amax {row['amax']:8.2e}  {spread:31}  "
              f"dB: {noise}", flush=True)


def run(preset: train.Preset, every: int, path: Path, device: torch.device) -> None:
    text, _ = train.read_text(None)
    text = torch.frombuffer(text, dtype=torch.uint8).to(device)
    settings = {"recipe": "flow", "seed": SEED, "compile": False}
    model, optimizer = train.make_model(train.Run(path.parent, preset, settings, None), device)
    with open(path, "w", newline="") as file:
        log = csv.DictWriter(file, COLUMNS)
        log.writeheader()
        for step in range(1, preset.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(step - 1, preset)
            window = train.draw_windows(text, SEED, step, preset)
            model.zero_grad()
            loss, _ = losses_of(model, window)
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.CLIP)
            optimizer.step()
            if step % every == 0:
                print(f"step {step} of {preset.steps}, loss {loss:.3f}", flush=True)
                rows = probe(model, window, step)
                print_rows(rows)
                log.writerows(rows)
                file.flush()
    print(f"written to {path}")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.probe", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("every", nargs="?", type=int, default=100, metavar="N", help="default: 100")
    for field in dataclasses.fields(train.Preset):
        parser.add_argument("--" + field.name.replace("_", "-"), type=field.type,
                            help=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=train.PRESETS, help="and the sizes, as in train.py")
    parser.add_argument("--out", default="out/probe.csv", metavar="FILE",
                        help="default: out/probe.csv")
    args = parser.parse_args(argv)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    path = Path(args.out)
    try:
        if args.every < 1:
            raise ValueError(f"N {args.every}: give 1 or more steps between two looks")
        preset = train.choose_preset(args, device)
        if args.every > preset.steps:
            raise ValueError(f"N {args.every} is more than the {preset.steps} steps of the "
                             "training: give fewer, or more --steps")
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "a").close()             # Fails for a folder, too.
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--out {args.out!r} cannot be written ({error.strerror}): name another file")
    run(preset, args.every, path, device)


if __name__ == "__main__":
    main()
