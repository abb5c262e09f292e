"""Train a small MoE GPT on text, in one recipe or in several on the same seed and batches (--compare).

    python train.py --compare                               bf16, naive, flow: one table, OUT/compare.csv
    python train.py --recipe flow --swiglu unfused          one run with a switch flipped

Default data: the Python standard library's own source, bytes as tokens. Everything a run writes goes under --out:
RECIPE/log.csv (a row a step), RECIPE/model.pt (the fp32 weights), RECIPE/sample.txt, and for --compare compare.csv
and loss.png.
"""
import argparse
import csv
import gc
import hashlib
import math
import os
import sysconfig
import time
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import triton
from torch import Tensor
from tqdm import tqdm

import kernels
from fp8flow import CHOICES, RECIPES, Recipe, count_casts, switch
from model import GPT, GPTConfig


@dataclass(frozen=True, kw_only=True)
class Preset(GPTConfig):
    """The model's sizes and how it is trained."""
    batch: int              # sequences a micro-batch
    accumulate: int         # micro-batches a step
    steps: int
    lr: float
    val_every: int          # steps
    val_batches: int        # micro-batches

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch", "accumulate", "steps", "val_every", "val_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} must be positive")

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(**{f.name: getattr(self, f.name) for f in fields(GPTConfig)})

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.accumulate * self.seq_len


PRESETS = {
    "tiny": Preset(n_layers=2, d_model=128, n_heads=4, d_expert=128, n_experts=4, top_k=2, seq_len=128, batch=8,
                   accumulate=1, steps=300, lr=1e-3, val_every=100, val_batches=8),
    "h100": Preset(n_layers=3, d_model=2048, n_heads=16, d_expert=2048, n_experts=16, top_k=4, seq_len=1024, batch=16,
                   accumulate=2, steps=300, lr=4e-4, val_every=50, val_batches=8),
}
BALANCE = 0.1                               # weight of the load-balancing loss: runs are short, routing must even out fast
CLIP, WARMUP = 1.0, 0.1                     # largest gradient norm; share of the steps
LOG_EVERY = 10                              # steps between reads of the loss from the device


# ---------------------------------------------------------------------------------------------------------------------
# data

def read_corpus(path: str | None) -> tuple[list[tuple[str, bytes]], str]:
    """[(name, bytes)] of a file, of a folder's text files, or of the standard library's source; and what it is."""
    if path is None:
        root, pattern, what = Path(sysconfig.get_paths()["stdlib"]), "*.py", "the Python standard library's source"
    else:
        root, pattern, what = Path(path), "*", path
        if not root.exists():
            raise ValueError(f"--data {path!r} does not exist: name a text file or a folder of them")
    names = [root] if root.is_file() else sorted(
        p for p in root.rglob(pattern) if p.is_file()
        and not any(part.startswith(".") or part in ("site-packages", "dist-packages") for part in p.relative_to(root).parts))
    files = []
    for name in names:
        try:
            text = name.read_bytes()
        except OSError as error:
            raise ValueError(f"--data: cannot read {str(name)!r} ({error.strerror}); name files you may read") from None
        if text and (root.is_file() or b"\0" not in text):          # a folder's binary files are no text
            files.append((str(name.relative_to(root)) if name != root else name.name, text))
    if not files:
        raise ValueError(f"--data {str(root)!r} holds no text: name a text file or a folder of them")
    return files, what


def split_corpus(files: list[tuple[str, bytes]], seq_len: int) -> tuple[Tensor, Tensor, str]:
    """(train, validation) as uint8 vectors, and how they were split: whole files held out, by the hash of their name;
    with fewer than 20 files, the last tenth of each."""
    if len(files) >= 20:
        held_out = [zlib.crc32(name.encode()) % 20 == 0 for name, _ in files]
        train = b"".join(text for (_, text), held in zip(files, held_out) if not held)
        val = b"".join(text for (_, text), held in zip(files, held_out) if held)
        how = f"{sum(held_out)} of {len(files)} files held out"
    else:
        cuts = [len(text) * 9 // 10 for _, text in files]
        train = b"".join(text[:cut] for (_, text), cut in zip(files, cuts))
        val = b"".join(text[cut:] for (_, text), cut in zip(files, cuts))
        how = f"the last tenth of each of {len(files)} file(s) held out"
    for name, text in (("training", train), ("validation", val)):
        if len(text) <= seq_len:
            raise ValueError(f"--data is too short: {len(text)} bytes for {name}, one sequence needs seq_len + 1 = "
                             f"{seq_len + 1}; give more text or a smaller --seq-len")
    return *(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, val)), how


def batch_of(text: Tensor, starts: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    window = text[starts[:, None] + torch.arange(seq_len + 1, device=text.device)].long()
    return window[:, :-1], window[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# one run

def learning_rate(step: int, preset: Preset) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warmup = max(1, round(WARMUP * preset.steps))
    if step < warmup:
        return preset.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, preset.steps - warmup)
    return preset.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


@torch.no_grad()
def validate(model: GPT, text: Tensor, preset: Preset) -> float:
    """Mean loss in nats a byte over windows spread evenly over the held-out text: the same ones every time."""
    starts = torch.linspace(0, len(text) - preset.seq_len - 1, preset.val_batches * preset.batch).long().to(text.device)
    losses = [model(*batch_of(text, s, preset.seq_len))[0] for s in starts.split(preset.batch)]
    return torch.stack(losses).mean().item()


def describe(model: GPT, preset: Preset, recipe: Recipe) -> None:
    total, active = model.parameter_counts()
    flops = 6 * active + 6 * preset.n_layers * preset.d_model * preset.seq_len
    print("  " + ", ".join(f"{k}={v}" for k, v in asdict(preset).items()))
    print("  " + ", ".join(f"{k}={v}" for k, v in asdict(recipe).items()))
    print(f"  {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active a token, {flops / 1e6:.0f} MFLOP a token, "
          f"{preset.tokens_per_step} tokens a step")


class Log:
    """log.csv, a row a step. Numbers stay on the device until `flush`: reading one would wait for the GPU."""

    def __init__(self, path: Path, preset: Preset):
        self.preset, self.file, self.steps, self.pending = preset, open(path, "w", newline=""), 0, []
        self.writer = csv.writer(self.file)
        self.writer.writerow(["step", "loss", "val_loss", "tokens_per_s", "lr", "grad_norm", "balance",
                              *(f"load_{e}" for e in range(preset.n_experts))])

    def add(self, step: int, loss: Tensor, balance: Tensor, norm: Tensor, model: GPT) -> None:
        load = torch.stack([moe.load for moe in model.moes]).mean(0)            # each expert's share, mean over layers
        self.pending.append((step, torch.cat([torch.stack([loss, norm, balance]), load])))
        self.steps = step + 1

    def flush(self, seconds: float, val_loss: float) -> tuple[float, float]:
        """Write the pending steps, which took `seconds`, and the loss validated after the last; (loss, tokens/s)."""
        loss, speed = math.nan, len(self.pending) * self.preset.tokens_per_step / seconds
        for step, values in self.pending:
            loss, norm, balance, *load = values.tolist()
            val = val_loss if step == self.steps - 1 else math.nan
            self.writer.writerow([step, f"{loss:.6f}", f"{val:.6f}", f"{speed:.1f}", f"{learning_rate(step, self.preset):.3e}",
                                  f"{norm:.4f}", f"{balance:.4f}", *(f"{share:.4f}" for share in load)])
        self.file.flush()
        self.pending.clear()
        return loss, speed

    def close(self) -> None:
        self.flush(math.inf, math.nan)                                          # steps cut short: no speed to report
        self.file.close()


class Clock:
    """Seconds spent training: stopped during validation, honest about queued GPU work."""

    def __init__(self, device: str):
        self.device, self.seconds, self.started = device, 0.0, None

    def start(self) -> None:
        self.sync()
        self.started = time.perf_counter()

    def stop(self) -> float:
        """Seconds since start."""
        self.sync()
        elapsed = time.perf_counter() - self.started
        self.seconds += elapsed
        return elapsed

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def train(name: str, recipe: Recipe, preset: Preset, train_text: Tensor, val_text: Tensor, args) -> dict:
    """Train one model; write its log, weights and a sample; return its row of compare.csv."""
    print(f"\n{name}")
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    model = GPT(preset.config, recipe).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    describe(model, preset, recipe)

    def micro_batch(rng) -> Tensor:
        """Adds its gradients; returns [loss, load-balancing loss], detached: what is logged must not hold the graph."""
        starts = torch.randint(len(train_text) - preset.seq_len, (preset.batch,), generator=rng)
        loss, balance = model(*batch_of(train_text, starts.to(args.device, non_blocking=True), preset.seq_len))
        ((loss + BALANCE * balance) / preset.accumulate).backward()
        return torch.stack([loss, balance]).detach()

    with count_casts() as casts:                                    # measured on a step that trains nothing
        micro_batch(torch.Generator().manual_seed(0))
    optimizer.zero_grad()
    names = dict.fromkeys(f"{launch.cast}({launch.tensor})" for launch in casts)
    casts = len(casts) // preset.n_layers                           # the layers are alike
    print(f"  {casts} explicit casts a layer: {', '.join(names) or 'none'}")

    out = Path(args.out) / name
    out.mkdir(parents=True, exist_ok=True)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock, log, val_loss = Clock(args.device), Log(out / "log.csv", preset), math.nan
    timed_from, warm_seconds = min(LOG_EVERY, preset.steps // 2), 0.0
    bar = tqdm(total=preset.steps, desc=name, unit="step", dynamic_ncols=True)
    try:
        clock.start()
        for step in range(preset.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, preset)
            loss, balance = torch.stack([micro_batch(rng) for _ in range(preset.accumulate)]).mean(0)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            log.add(step, loss, balance, norm, model)
            bar.update()
            done, last = step + 1, step + 1 == preset.steps
            if not (last or done % LOG_EVERY == 0 or done % preset.val_every == 0 or done == timed_from):
                continue
            elapsed = clock.stop()
            if done == timed_from:
                warm_seconds = clock.seconds
            validated = last or done % preset.val_every == 0
            if validated:
                val_loss = validate(model, val_text, preset)
            loss, speed = log.flush(elapsed, val_loss if validated else math.nan)
            bar.set_postfix(loss=f"{loss:.3f}", val=f"{val_loss:.3f}", tok_s=f"{speed:,.0f}")
            if not math.isfinite(loss):
                raise SystemExit(f"train.py: the loss of {name} is {loss} at step {step}: lower --lr; "
                                 f"the steps before are in {out / 'log.csv'}")
            clock.start()
    finally:                                                        # also on Ctrl-C: what was trained is on disk
        bar.close()
        log.close()
        torch.save({"config": asdict(preset.config), "recipe": asdict(recipe), "step": log.steps,
                    "model": model.state_dict()}, out / "model.pt")
    timed = preset.steps - timed_from
    row = dict(recipe=name, casts=casts, val_loss=val_loss,
               tokens_per_s=timed * preset.tokens_per_step / (clock.seconds - warm_seconds),
               peak_mem_gb=torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else math.nan)
    sample = model.generate(b"def ", 200, args.seed).decode("utf-8", "replace")
    (out / "sample.txt").write_text(sample)
    print(f"  val loss {val_loss:.4f}, {row['tokens_per_s']:,.0f} tokens/s; written to {out}\n  sample: {sample!r}")
    return row


# ---------------------------------------------------------------------------------------------------------------------
# comparison

HEADER = ["recipe", "casts", "val_loss", "delta_pct", "tokens_per_s", "speedup", "peak_mem_gb"]


def table(rows: list[dict]) -> list[list[str]]:
    """compare.csv's cells; delta and speed-up are against bf16, nan where it did not run."""
    base = next((r for r in rows if r["recipe"] == "bf16"), dict(val_loss=math.nan, tokens_per_s=math.nan))
    return [[r["recipe"], str(r["casts"]), f"{r['val_loss']:.4f}",
             f"{100 * (r['val_loss'] / base['val_loss'] - 1):+.3f}", f"{r['tokens_per_s']:.0f}",
             f"{r['tokens_per_s'] / base['tokens_per_s']:.3f}", f"{r['peak_mem_gb']:.2f}"] for r in rows]


def compare(names: list[str], preset: Preset, train_text: Tensor, val_text: Tensor, args) -> None:
    rows, out = [], Path(args.out)
    for name in names:
        rows.append(train(name, RECIPES[name], preset, train_text, val_text, args))
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        with open(out / "compare.csv", "w", newline="") as file:    # after each recipe: an interrupted run keeps its rows
            csv.writer(file).writerows([HEADER, *table(rows)])
    print()
    for cells in [HEADER, *table(rows)]:
        print("  ".join(f"{cell:>12}" for cell in cells))
    print(f"\nwritten to {out / 'compare.csv'}")
    draw_losses(names, out)


def draw_losses(names: list[str], out: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no loss.png: `pip install matplotlib` draws the loss curves")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in names:
        with open(out / name / "log.csv") as file:
            rows = list(csv.DictReader(file))
        axes.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows], label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss (nats a byte)")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=150)
    plt.close(figure)
    print(f"written to {out / 'loss.png'}")


# ---------------------------------------------------------------------------------------------------------------------
# command line

def recipe_name(text: str) -> str:
    if text not in RECIPES:
        raise argparse.ArgumentTypeError(f"{text!r} is no recipe: choose from {', '.join(RECIPES)}")
    return text


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="train.py", description="Train a small MoE GPT in BF16, naive FP8 or casting-free FP8.")
    parser.add_argument("--recipe", choices=RECIPES, help="what to train (default: flow)")
    parser.add_argument("--compare", nargs="*", type=recipe_name, metavar="RECIPE",
                        help="train these recipes (default: all) one after the other on the same seed and batches")
    parser.add_argument("--preset", choices=PRESETS, help="default: h100 with a GPU, tiny without")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--data", metavar="PATH", help="a text file or folder (default: the Python standard library's source)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out", metavar="DIR", help="everything a run writes; an earlier run's files are replaced")
    switches = parser.add_argument_group("switches of the recipe")
    for name, choices in CHOICES.items():
        switches.add_argument(f"--{name}", choices=choices, default=argparse.SUPPRESS)
    parser.add_argument("--deterministic", action="store_true",
                        help="repeat a run bit for bit on a GPU too: the expert layer always does, attention's backward only so")
    sizes = parser.add_argument_group("sizes, over those of the preset")
    for field in fields(Preset):
        if field.name != "vocab":                           # bytes are bytes
            sizes.add_argument("--" + field.name.replace("_", "-"), type=field.type, default=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    flipped = {name: getattr(args, name) for name in CHOICES if hasattr(args, name)}
    if args.compare is not None and (args.recipe or flipped):
        parser.error(f"--compare trains recipes as they are: drop {'--recipe' if args.recipe else '--' + next(iter(flipped))}, "
                     "or drop --compare")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here; use --device cpu")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        parser.error(f"--out {args.out!r} is a file: name a folder")
    try:
        recipe = switch(RECIPES[args.recipe or "flow"], **flipped)
        preset = replace(PRESETS[args.preset or ("h100" if args.device == "cuda" else "tiny")],
                         **{f.name: getattr(args, f.name) for f in fields(Preset) if hasattr(args, f.name)})
        files, what = read_corpus(args.data)
        train_text, val_text, how = split_corpus(files, preset.seq_len)
    except ValueError as error:
        parser.error(str(error))
    digest = hashlib.sha256(b"".join(text for _, text in files)).hexdigest()[:12]
    print(f"data: {what}, {sum(len(text) for _, text in files):,} bytes, sha256 {digest}, {how}")
    return args, recipe, preset, train_text, val_text


def main(argv=None) -> None:
    args, recipe, preset, train_text, val_text = parse_args(argv)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, triton {triton.__version__}, {machine}: "
          f"{'Triton kernels' if kernels.use_kernels(torch.empty(0, device=args.device)) else 'PyTorch twins, slowly'}")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False         # the kernels write what they read
    texts = train_text.to(args.device), val_text.to(args.device)
    if args.compare is not None:
        compare(args.compare or list(RECIPES), preset, *texts, args)
    else:
        train(args.recipe or "flow", recipe, preset, *texts, args)


if __name__ == "__main__":
    main()
