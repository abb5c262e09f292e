"""What quantization and the transpose do to the four tensors of every layer while a model trains.

    python -m tools.probe [N] [--preset P] [--steps S] [--out FILE]

Trains flow as train.py does. Every N steps one more micro-batch runs, whose gradients are dropped,
and X, A, dY and dH of each layer are looked at: their largest magnitude; the widest spread of row
scales in a 128x128 tile, in binades; the share of elements that the direct transpose turns to zero;
and the signal to noise ratio of the direct and of the requantizing transpose.
"""
import argparse
import csv
import math
from pathlib import Path

import torch
from torch import Tensor

import fp8flow
import kernels
import train
from fp8flow import Plan
from kernels import BLOCK, SCALE_MIN
from model import GPT

SEED = 0
FLOW = fp8flow.parse_spec("flow")
REQUANTIZING = fp8flow.parse_spec("naive,scales=pow2")
COLUMNS = ["step", "layer", "tensor", "amax", "binades", "underflow", "sqnr_direct",
           "sqnr_requantized"]


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
    a = kernels.swiglu(h, prob, plan.tile_expert)
    da = fp8flow.torch_grouped_mm(dy, w2, plan.ends)
    dh, _ = kernels.swiglu_backward(da, h, prob, plan.tile_expert)
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


def look_at(t: Tensor, plan: Plan) -> dict[str, float]:
    """t [M, C] bf16, zeros in the padding. Only what the transpose itself turns to zero is called
    underflow: quantization may have done so before it."""
    q = kernels.quantize(t)
    is_live = plan.pair >= 0
    direct = kernels.dequantize(fp8flow.column_wise(q, plan, FLOW)).t()[is_live]
    requantized = kernels.dequantize(fp8flow.column_wise(q, plan, REQUANTIZING)).t()[is_live]
    once = kernels.dequantize(q)[is_live]
    t = t[is_live]
    vanished = (direct == 0) & (once != 0)
    nonzero = (t != 0).sum().clamp(min=1)       # A tensor of zeros is no reason to stop.
    return {
        "amax": t.abs().max().item(),
        "binades": widest_tile(q.scale),
        "underflow": (vanished.sum() / nonzero).item(),
        "sqnr_direct": fp8flow.sqnr(direct, t),
        "sqnr_requantized": fp8flow.sqnr(requantized, t),
    }


def probe(model: GPT, window: Tensor, step: int) -> list[dict]:
    """One forward and backward on a micro-batch. A row for each layer and tensor."""
    seen = {}                   # the Experts -> its inputs, and the gradient of its output

    def look(experts, inputs, y):
        def keep(dy):
            seen[experts] = (*inputs, dy)
        y.register_hook(keep)

    hooks = [moe.experts.register_forward_hook(look) for moe in model.moes]
    train.backward(model, window, 1.0)
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    rows = []
    for layer, moe in enumerate(model.moes):
        x, top_k_index, top_k_weights, dy = seen[moe.experts]
        plan = fp8flow.make_plan(top_k_index, len(moe.experts.w1))
        tokens = x.detach().flatten(0, -2).bfloat16()
        probs = top_k_weights.detach().reshape(plan.slot.shape).float()
        tensors = four_tensors(moe.experts, tokens, probs, plan, dy.flatten(0, -2).bfloat16())
        for name, tensor in tensors.items():
            rows.append({"step": step, "layer": layer, "tensor": name, **look_at(tensor, plan)})
    return rows


def print_rows(rows: list[dict]) -> None:
    for row in rows:
        print(f"  layer {row['layer']}  {row['tensor']:3} amax {row['amax']:9.2e}  "
              f"{row['binades']:3.0f} binades  underflow {100 * row['underflow']:7.4f}%  "
              f"direct {row['sqnr_direct']:5.1f} dB  requantized {row['sqnr_requantized']:5.1f} dB",
              flush=True)


def run(preset: train.Preset, every: int, path: Path, device: str) -> None:
    text = train.read_data(None, preset.seq_len).train.to(device)
    torch.manual_seed(SEED)
    model = GPT(preset, FLOW).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=True)
    with open(path, "w", newline="") as file:
        log = csv.DictWriter(file, COLUMNS)
        log.writeheader()
        for step in range(1, preset.steps + 1):
            windows = train.draw_windows(text, SEED, step, preset)
            lr = train.learning_rate(step - 1, preset)
            loss, *_ = train.train_step(model, optimizer, windows, lr)
            if step % every == 0:
                print(f"step {step} of {preset.steps}, loss {loss:.3f}", flush=True)
                rows = probe(model, windows[0], step)
                print_rows(rows)
                log.writerows(rows)
                file.flush()
    print(f"written to {path}")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.probe", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("every", nargs="?", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--preset", choices=train.PRESETS, help="as in train.py")
    parser.add_argument("--steps", type=int, metavar="S", help="of the training (default: the "
                        "preset's)")
    parser.add_argument("--out", default="out/probe.csv", metavar="FILE",
                        help="default: out/probe.csv")
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    path = Path(args.out)
    try:
        if args.every < 1:
            raise ValueError(f"N {args.every}: give 1 or more steps between two looks")
        preset = train.preset_of(args)
        if args.every > preset.steps:
            raise ValueError(f"N {args.every} is more than the {preset.steps} steps of the "
                             "training: give fewer, or more --steps")
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "a").close()             # Fails for a folder, too.
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--out {args.out!r} cannot be written ({error.strerror}): name another file")
    run(preset, args.every, path, args.device)


if __name__ == "__main__":
    main()
