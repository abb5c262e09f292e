"""Train a small MoE GPT on text: one recipe, or several on the same seed and the same batches.

    python train.py --compare                               bf16, naive, flow: one table
    python train.py --ablate                                from naive to flow, a switch at a time
    python train.py --compare --seeds 3                     seeds 0, 1, 2: means and differences
    python train.py --recipe flow,swiglu=unfused            one run, named by its spec
    python train.py --compare --resume --out out/1          go on with what was stopped
    python train.py --sample out/1/flow --prompt "def "     continue a text

Bytes are tokens. A run writes OUT/SPEC/log.csv, a row a step, and model.pt at its end (with --seeds
in OUT/seed-N/SPEC), then come OUT/compare.csv and OUT/loss.png. Without --out, OUT is out/N.
For the training itself read `train_step` and `train`; around them stand data, files and arguments.
"""
import argparse
import contextlib
import csv
import gc
import hashlib
import itertools
import math
import os
import shlex
import signal
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import triton
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import kernels
from fp8flow import RECIPES, count_casts, parse_spec, weights_cast_once
from model import GPT, GPTConfig


# ---- presets -------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Preset(GPTConfig):
    """The model's sizes and how it is trained. Raises ValueError where they make no sense."""
    batch: int              # sequences in a micro-batch
    accumulate: int         # micro-batches in a step
    steps: int
    lr: float
    val_every: int          # steps
    val_batches: int        # micro-batches

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr} must be positive and finite: give 1e-3, say")

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.accumulate * self.seq_len


PRESETS = {
    "tiny": Preset(
        n_layers=1, d_model=128, n_heads=4, d_expert=128, n_experts=4, top_k=2, seq_len=128,
        batch=8, accumulate=1, steps=300, lr=4e-3, val_every=150, val_batches=64),
    "small": Preset(
        n_layers=4, d_model=1024, n_heads=8, d_expert=1024, n_experts=8, top_k=2, seq_len=512,
        batch=32, accumulate=1, steps=1200, lr=8e-4, val_every=400, val_batches=64),
    "h100": Preset(
        n_layers=3, d_model=2048, n_heads=16, d_expert=2048, n_experts=16, top_k=4, seq_len=1024,
        batch=16, accumulate=2, steps=700, lr=5e-4, val_every=175, val_batches=64),
}
# --ablate trains these: bf16, from naive to flow a switch at a time, and from flow one step back.
LADDER = ["bf16", "naive", "naive,transpose=fused", "naive,transpose=fused,scales=pow2",
          "naive,transpose=direct,scales=pow2", "flow,permute=unfused", "flow",
          "flow,transpose=unfused"]
BALANCE = 0.1               # weight of the load-balancing loss: runs are short, it must act early
CLIP = 1.0                  # largest gradient norm
WARMUP = 0.1                # the learning rate rises in this first share of the steps
LEVEL = 0.2                 # the learning rate stays low in this last share of the steps
LOG_FIELDS = ["step", "loss", "val_loss", "tokens_per_s", "lr", "grad_norm", "balance"]
CHECKPOINT_SECONDS = 300    # a shorter run writes none, unless it is stopped
HELD_OUT = 20               # one file in so many is for validation
HEAD = 8192                 # a file with a zero byte among the first 8192 is no text


# ---- data ----------------------------------------------------------------------------------------

@dataclass
class Data:
    train: Tensor           # [bytes] uint8
    val: Tensor
    digest: str             # of both, so that a resumed run cannot go on with another text
    description: str


def read_texts(path: str | None) -> tuple[list[bytes], int]:
    """The texts, and how many files were skipped because they are no text."""
    root = Path(torch.__file__).parent if path is None else Path(path)
    pattern = "*.py" if path is None else "*"
    files = [root] if root.is_file() else sorted(root.rglob(pattern))
    texts = []
    skipped = 0
    for file in files:
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        differs_by_build = path is None and file.name == "version.py"
        if hidden or differs_by_build or not file.is_file():
            continue
        with open(file, "rb") as stream:
            head = stream.read(HEAD)
            if b"\0" in head:
                skipped += 1
            elif head:
                texts.append(head + stream.read())
    return texts, skipped


def read_data(path: str | None, seq_len: int) -> Data:
    """Raises ValueError where there is no text, or not enough of it."""
    name = path or f"the Python source of torch {torch.__version__}"
    if path is not None and not Path(path).exists():
        raise ValueError(f"--data {name}: there is no such file or folder, name a text file or a "
                         "folder of them")
    try:
        texts, skipped = read_texts(path)
    except OSError as error:
        raise ValueError(f"--data {name}: cannot read {error.filename!r} ({error.strerror}): name "
                         "files that you may read")
    if not texts:
        raise ValueError(f"--data {name} holds no text: name a text file or a folder of them")
    if len(texts) == 1:
        cut = len(texts[0]) * 9 // 10
        train = bytearray(texts[0][:cut])
        val = bytearray(texts[0][cut:])
    else:
        val = bytearray().join(texts[::HELD_OUT])
        train = bytearray().join(text for i, text in enumerate(texts) if i % HELD_OUT != 0)
    if min(len(train), len(val)) < seq_len + 2:
        raise ValueError(f"--seq-len {seq_len} needs {seq_len + 2} bytes for training and as many "
                         f"for validation: lower it, or give more --data ({name} is too short, "
                         f"{len(train)} and {len(val)})")
    description = f"{name}: {len(texts)} texts, {len(train):,} bytes for training and " \
                  f"{len(val):,} for validation; {skipped} files skipped that are no text"
    digest = hashlib.sha256(train)
    digest.update(hashlib.sha256(val).digest())         # A hash, so that the border counts, too.
    return Data(torch.frombuffer(train, dtype=torch.uint8),
                torch.frombuffer(val, dtype=torch.uint8), digest.hexdigest()[:12], description)


def windows_at(text: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    """starts [...] -> [..., seq_len + 1] int64: inputs without the last, targets without the
    first."""
    return text[starts[..., None] + torch.arange(seq_len + 1, device=text.device)].long()


def draw_windows(text: Tensor, seed: int, step: int, preset: Preset) -> Tensor:
    """All windows of a step, [accumulate, batch, seq_len + 1]: the same for every recipe and after
    a resume. Seeded with both numbers, since with their sum two seeds would share batches."""
    rng = np.random.default_rng([seed, step])
    places = len(text) - preset.seq_len
    starts = torch.from_numpy(rng.integers(places, size=(preset.accumulate, preset.batch)))
    return windows_at(text, starts.to(text.device, non_blocking=True), preset.seq_len)


# ---- learning rate and validation ----------------------------------------------------------------

def learning_rate(step: int, preset: Preset) -> float:
    """Up in a line, down in a cosine, level at 1% of the peak: so the last loss is a steady one."""
    warmup = max(1, round(WARMUP * preset.steps))
    if step < warmup:
        return preset.lr * (step + 1) / warmup
    level = (1 - LEVEL) * preset.steps
    progress = min(1.0, (step - warmup) / max(1.0, level - warmup))
    return preset.lr * max(0.01, 0.5 + 0.5 * math.cos(math.pi * progress))


@torch.no_grad()
def validate(model: GPT, text: Tensor, preset: Preset) -> float:
    """Mean loss in nats a byte over windows spread evenly over the text: the same every time."""
    count = preset.val_batches * preset.batch
    last = len(text) - preset.seq_len - 1
    starts = torch.arange(count, device=text.device) * last // max(1, count - 1)
    losses = []
    with weights_cast_once(model):
        for batch in starts.split(preset.batch):
            window = windows_at(text, batch, preset.seq_len)
            loss, _ = model(window[:, :-1], window[:, 1:])
            losses.append(loss)
    return torch.stack(losses).mean().item()


# ---- one step and the loop -----------------------------------------------------------------------

@dataclass
class Stop:
    """A plain flag: a signal may come while the lock of a threading.Event is held."""
    asked: bool = False     # by Ctrl-C or SIGTERM


@dataclass
class Run:
    """One recipe on one seed, in a folder of its own."""
    spec: str
    seed: int
    folder: Path
    preset: Preset
    digest: str             # of the data
    device: str
    compile: bool
    deterministic: bool
    result: dict | None = None  # what the table shows, once the run has finished

    @property
    def config(self) -> dict:
        """What must be equal for a run to go on. (Its last bits also depend on the machine and on
        the versions of its packages.)"""
        return {"spec": self.spec, "seed": self.seed, "data": self.digest, "device": self.device,
                "compile": self.compile, "deterministic": self.deterministic,
                **asdict(self.preset)}


def backward(model: GPT, window: Tensor, share: float) -> Tensor:
    """Adds a micro-batch's gradients, times its share of the step. Returns [loss, balance]."""
    loss, balance = model(window[:, :-1], window[:, 1:])
    (share * (loss + BALANCE * balance)).backward()
    return torch.stack([loss, balance]).detach()


def train_step(model: GPT, optimizer: torch.optim.Optimizer, windows: Tensor,
               lr: float) -> tuple[float, float, float]:
    """One step on windows [accumulate, batch, seq_len + 1]. Returns the loss, the load-balancing
    loss and the norm of the gradient. Raises FloatingPointError, before any weight changes, where
    the loss or the gradient is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    losses = []
    with weights_cast_once(model):      # for all micro-batches, not in each call of the experts
        for window in windows:
            losses.append(backward(model, window, 1 / len(windows)))
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()])
    numbers = torch.stack([*torch.stack(losses).mean(0), norm])
    loss, balance, grad_norm = numbers.tolist()         # Here the host waits for the device.
    check_finite(model, loss, grad_norm)
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), CLIP, norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss, balance, grad_norm


def check_finite(model: GPT, loss: float, grad_norm: float) -> None:
    """Raises FloatingPointError for a loss or a gradient that is not finite, the first by name."""
    if not math.isfinite(loss):
        raise FloatingPointError("the loss is not finite: lower --lr")
    if not math.isfinite(grad_norm):
        for name, weight in model.named_parameters():
            if not weight.grad.isfinite().all():
                raise FloatingPointError(f"the gradient of {name} is not finite: lower --lr")
        raise FloatingPointError("the norm of the gradient is not finite: lower --lr")


def make_model(run: Run) -> tuple[GPT, torch.optim.Optimizer]:
    torch.manual_seed(run.seed)
    model = GPT(run.preset, parse_spec(run.spec)).to(run.device)
    if run.compile:
        for block in model.blocks:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=True)
    return model, optimizer


def train(run: Run, data: Data, stop: Stop) -> dict:
    """Trains one model, from its checkpoint if there is one, and returns its row of the table.

    Once a stop is asked for, the step ends, a checkpoint is saved, and KeyboardInterrupt is raised.
    (Not in the last step: after it the run has finished.) Raises FloatingPointError for a loss or
    gradient that is not finite.
    """
    preset = run.preset
    train_text = data.train.to(run.device)
    val_text = data.val.to(run.device)
    model, optimizer = make_model(run)
    casts = print_model(run, model, train_text)
    run.folder.mkdir(parents=True, exist_ok=True)
    steps_done = load_checkpoint(run, model, optimizer)
    rows = read_log(run)[:steps_done]           # Steps after the checkpoint are done again.
    if run.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    bar = tqdm(range(steps_done, preset.steps), initial=steps_done, total=preset.steps,
               desc=run.spec, unit="step", disable=sys.stderr is None)
    with bar, open(run.folder / "log.csv", "w", newline="") as file:
        # A log that an earlier version began may have more columns, which are dropped.
        log = csv.DictWriter(file, LOG_FIELDS, extrasaction="ignore")
        log.writeheader()
        log.writerows(rows)
        file.flush()
        saved_at = time.monotonic()
        for step in bar:
            began = time.perf_counter()
            windows = draw_windows(train_text, run.seed, step, preset)
            lr = learning_rate(step, preset)
            loss, balance, grad_norm = train_step(model, optimizer, windows, lr)
            # The GPU is done but for the optimizer's work, which falls into the next step's time.
            speed = preset.tokens_per_step / (time.perf_counter() - began)

            done = step + 1
            val_loss = math.nan
            if done == preset.steps or done % preset.val_every == 0:
                val_loss = validate(model, val_text, preset)
            rows.append({"step": step, "loss": loss, "val_loss": val_loss, "tokens_per_s": speed,
                         "lr": lr, "grad_norm": grad_norm, "balance": balance})
            log.writerow(rows[-1])
            file.flush()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

            if done < preset.steps:
                if stop.asked:
                    save_checkpoint(run, model, optimizer, done)
                    raise KeyboardInterrupt
                if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                    save_checkpoint(run, model, optimizer, done)
                    saved_at = time.monotonic()

    if not math.isfinite(val_loss):
        raise FloatingPointError("the validation loss is not finite: lower --lr")
    # The median, since single steps are slow where a kernel is compiled or the machine is busy.
    speed = statistics.median(float(row["tokens_per_s"]) for row in rows)
    memory = memory_by_kind(model, optimizer) if run.device == "cuda" else {}
    result = {"recipe": run.spec, "casts": casts, "val_loss": val_loss, "tokens_per_s": speed,
              "peak_mem_gb": sum(memory.values()) if memory else math.nan, "seed": run.seed}
    # Saved before anything is printed: a pipe that nobody reads any more must not cost the weights.
    save(run.folder / "model.pt", {"model": model.state_dict(), "config": run.config,
                                   "row": result})
    (run.folder / "checkpoint.pt").unlink(missing_ok=True)
    print(f"  val loss {val_loss:.4f}, {speed:,.0f} tokens/s; in {run.folder}")
    for name, size in memory.items():
        print(f"  {size:6.2f} GB {name}")
    return result


def print_model(run: Run, model: GPT, text: Tensor) -> int:
    """Parameters, and the casts of a layer, counted on a micro-batch that runs for nothing else."""
    total, active = model.parameter_counts()
    print(f"\n{run.spec}, seed {run.seed}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M for "
          f"a token; {run.preset.tokens_per_step} tokens a step")
    with weights_cast_once(model), count_casts() as casts:
        backward(model, draw_windows(text, run.seed, 0, run.preset)[0], 1.0)
    model.zero_grad()
    casts_per_layer = len(casts) // run.preset.n_layers
    names = dict.fromkeys(f"{cast.kind}({cast.tensor})" for cast in casts)
    print(f"  {casts_per_layer} casts in each layer and micro-batch: {', '.join(names) or 'none'}")
    return casts_per_layer


def memory_by_kind(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What the peak of the GPU's memory consisted of, in GB. At the peak there were gradients, as
    large as the weights, and copies of the experts' weights, which are made once more to be
    measured."""
    peak = torch.cuda.max_memory_allocated()
    before = torch.cuda.memory_allocated()
    with weights_cast_once(model):
        copies = torch.cuda.memory_allocated() - before
    weights = sum(weight.nbytes for weight in model.parameters())
    moments = 0
    for state in optimizer.state.values():
        moments += sum(moment.nbytes for moment in state.values())
    rest = peak - 2 * weights - moments - copies
    return {"weights": weights / 1e9, "gradients": weights / 1e9, "optimizer": moments / 1e9,
            "copies of weights for GEMMs": copies / 1e9, "activations and the rest": rest / 1e9}


# ---- checkpoint ----------------------------------------------------------------------------------

def save(path: Path, contents: dict) -> None:
    """Writes beside `path`, then renames: a full disk or a kill leaves what was there."""
    beside = path.with_name(path.name + ".new")
    try:
        torch.save(contents, beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:            # torch.save raises either on a full disk
        raise OSError(f"{path} cannot be written, what was there is untouched ({error}): is the "
                      "disk full?")
    finally:
        beside.unlink(missing_ok=True)


def save_checkpoint(run: Run, model: GPT, optimizer: torch.optim.Optimizer, step: int) -> None:
    """All that a run needs to go on to the same bits (on a GPU with --deterministic): windows and
    learning rate follow from the number of the step, and training draws no other random numbers."""
    save(run.folder / "checkpoint.pt", {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
        "config": run.config})


def load_checkpoint(run: Run, model: GPT, optimizer: torch.optim.Optimizer) -> int:
    """Goes back to the checkpoint, if there is one (`finished_before` has seen that it is this
    run's). Returns how many steps are done."""
    path = run.folder / "checkpoint.pt"
    if not path.exists():
        return 0
    saved = torch.load(path, map_location=run.device, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    print(f"  goes on after step {saved['step']} of {run.preset.steps}")
    return saved["step"]


def read_log(run: Run) -> list[dict]:
    path = run.folder / "log.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def read_saved(path: Path, argument: str, remedy: str) -> dict:
    """What train.py has saved; with mmap its tensors stay on the disk until they are used. Raises
    ValueError, which names the argument and the remedy, for a file of somebody else."""
    saved = None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:           # torch.load raises whatever the bytes of such a file lead it to
        pass
    if not isinstance(saved, dict) or "spec" not in saved.get("config", {}):
        raise ValueError(f"{argument} {str(path)!r} is missing, damaged or not from train.py: "
                         f"{remedy}")
    return saved


def finished_before(run: Run) -> dict | None:
    """For --resume: the run's row of the table, if it has finished in its folder. Raises ValueError
    where that holds another run."""
    result = None
    for path in (run.folder / "checkpoint.pt", run.folder / "model.pt"):
        if path.exists():
            saved = read_saved(path, "--resume:", "remove it, and this run starts over")
            for key, value in run.config.items():
                there = saved["config"].get(key)
                if there != value:
                    raise ValueError(f"--resume: {str(path)!r} has {key}={there}, not {value}: "
                                     "give the same arguments, or another --out")
            result = saved.get("row")
    return result


# ---- comparison ----------------------------------------------------------------------------------

def percent_over(value: float, base: float) -> float:
    """By how many percent the value exceeds bf16's, `base`; nan where bf16's is 0."""
    return 100 * (value / base - 1) if base else math.nan


def table(results: list[dict]) -> list[dict]:
    """compare.csv's rows. Difference and speed-up are against bf16 on the same seed."""
    bases = {result["seed"]: result for result in results if result["recipe"] == "bf16"}
    rows = []
    for result in results:
        base = bases.get(result["seed"], {"val_loss": math.nan, "tokens_per_s": math.nan})
        delta = percent_over(result["val_loss"], base["val_loss"])
        rows.append({
            "recipe": result["recipe"],
            "casts": result["casts"],
            "val_loss": f"{result['val_loss']:.4f}",
            "delta_pct": f"{delta:+.3f}".replace("+nan", "nan"),
            "tokens_per_s": f"{result['tokens_per_s']:.0f}",
            "speedup": f"{result['tokens_per_s'] / base['tokens_per_s']:.3f}",
            "peak_mem_gb": f"{result['peak_mem_gb']:.2f}",
            "seed": result["seed"]})
    return rows


def print_table(rows: list[dict], is_emulated: bool) -> None:
    # Speed and memory of emulated FP8 say nothing about a recipe.
    hidden = ["tokens_per_s", "speedup", "peak_mem_gb"] if is_emulated else []
    names = [name for name in rows[0] if name not in ["recipe", *hidden]]
    width = max(len("recipe"), *(len(row["recipe"]) for row in rows))
    print(f"\n{'recipe':>{width}}" + "".join(f"{name:>14}" for name in names))
    for row in rows:
        print(f"{row['recipe']:>{width}}" + "".join(f"{row[name]:>14}" for name in names))


def print_seeds(results: list[dict]) -> None:
    """The mean of each spec over the seeds, and the mean of its differences to bf16, each on one
    seed: what a seed does to both recipes cancels there."""
    losses = {}                 # spec -> seed -> validation loss
    for result in results:
        losses.setdefault(result["recipe"], {})[result["seed"]] = result["val_loss"]
    bases = losses.get("bf16", {})
    print()
    for spec, by_seed in losses.items():
        values = list(by_seed.values())
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        line = f"{spec}: val loss {np.mean(values):.4f}, standard deviation {deviation:.4f}"
        pairs = [percent_over(by_seed[seed], bases[seed]) for seed in by_seed if seed in bases]
        if len(pairs) > 1 and spec != "bf16":
            error = statistics.stdev(pairs) / len(pairs) ** 0.5
            line += f"; {np.mean(pairs):+.3f}% over bf16, standard error {error:.3f}%"
        print(f"{line}; {len(values)} seeds")


# ---- what counting reaches -----------------------------------------------------------------------

PIECE = 1 << 22             # bytes of text that are counted at once


def numbers_of(text: Tensor, order: int):
    """Reads each byte and the `order` bytes before it as one number in base 256: "ab" is 97 * 256 +
    98. Yields them in pieces: for 100 MB of text, a tensor of all numbers would take 800 MB."""
    for start in range(0, len(text) - order, PIECE):
        piece = text[start:start + PIECE + order].long()
        length = len(piece) - order
        number = torch.zeros(length, dtype=torch.int64)
        for digit in range(order + 1):
            number = 256 * number + piece[digit:digit + length]
        yield number


def table_loss(train: Tensor, val: Tensor, order: int) -> float:
    """Nats a byte that counting alone reaches on `val`: what a model that has learned something
    must beat. A table holds how often each byte follows each `order` bytes in `train`, and 0.1
    more, so that nothing is impossible."""
    counts = torch.zeros(256 ** (order + 1), dtype=torch.int64)
    for number in numbers_of(train, order):
        counts += torch.bincount(number, minlength=len(counts))
    totals = counts.view(-1, 256).sum(1)
    nats = 0.0
    for number in numbers_of(val, order):
        probability = (counts[number] + 0.1) / (totals[number // 256] + 256 * 0.1)
        nats -= probability.log().double().sum().item()
    return nats / (len(val) - order)


# ---- picture -------------------------------------------------------------------------------------

def smooth(curve: list[float]) -> np.ndarray:
    """Means over a twentieth of the run."""
    window = max(1, len(curve) // 20)
    return np.convolve(curve, np.ones(window) / window, mode="valid")


def draw_losses(runs: list[Run], path: Path) -> None:
    """The loss of each run, and below it the difference to bf16 on the same seed, in percent and
    smoothed: the curves themselves coincide."""
    curves = {}                 # (spec, seed) -> the losses of all steps
    for run in runs:
        curves[run.spec, run.seed] = [float(row["loss"]) for row in read_log(run)]
    colors = {}                 # spec -> color
    figure = Figure(figsize=(7, 6), layout="constrained")       # without pyplot: no display
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for (spec, seed), curve in curves.items():
        label = None if spec in colors else spec
        color = colors.setdefault(spec, f"C{len(colors)}")
        above.plot(curve, color, label=label, linewidth=1)
        base = curves.get(("bf16", seed))
        if base is not None and spec != "bf16":
            difference = 100 * (smooth(curve) / smooth(base) - 1)
            last_steps = range(len(curve) - len(difference), len(curve))
            below.plot(last_steps, difference, color, linewidth=1)
    above.set(ylabel="training loss (nats a byte)")
    above.legend()
    below.set(xlabel="step", ylabel="difference to bf16, %")
    below.axhline(0, color="gray", linewidth=0.5)
    figure.savefig(path, dpi=150)


# ---- arguments -----------------------------------------------------------------------------------

def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False, description=(
        "Train a small MoE GPT in BF16, naive FP8 or casting-free FP8. A SPEC is a recipe (bf16, "
        "naive, flow) and the switches that differ from it: flow,swiglu=unfused."))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--recipe", metavar="SPEC", help="train this (default: flow)")
    what.add_argument("--compare", nargs="*", metavar="SPEC",
                      help="train these on the same batches (default: bf16 naive flow)")
    what.add_argument("--ablate", action="store_true", help="compare the steps from naive to flow")
    what.add_argument("--sample", metavar="OUT/SPEC", help="continue --prompt with a trained model")
    parser.add_argument("--prompt", help="the text that --sample continues (default: 'def ')")
    parser.add_argument("--preset", choices=PRESETS,
                        help="default: h100; small below 40 GB, tiny where FP8 is emulated")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", metavar="PATH",
                        help="a text file or a folder of them (default: torch's Python source)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="default: 0")
    seeds.add_argument("--seeds", type=int, metavar="N", help="train on each of the seeds 0 to N-1")
    parser.add_argument("--out", metavar="DIR", help="a folder (default: the next free out/N)")
    before = parser.add_mutually_exclusive_group()
    before.add_argument("--resume", action="store_true", help="go on with the runs in --out")
    before.add_argument("--overwrite", action="store_true", help="clear the runs in --out")
    parser.add_argument("--compile", action="store_true", help="torch.compile all but the experts")
    parser.add_argument("--deterministic", action="store_true",
                        help="attention's backward repeats bit for bit, too")
    sizes = parser.add_argument_group(f"sizes, over those of the preset ({' / '.join(PRESETS)})")
    for field in fields(Preset):
        if field.name != "vocab":               # bytes are bytes
            values = [getattr(preset, field.name) for preset in PRESETS.values()]
            sizes.add_argument("--" + field.name.replace("_", "-"), type=type(values[0]),
                               metavar="N", help=" / ".join(map(str, values)))
    return parser


def check_arguments(args, defaults) -> None:
    """What argparse cannot see. Raises ValueError, with a sentence."""
    for name in ("data", "out", "prompt", "sample"):
        if getattr(args, name) == "":
            raise ValueError(f"--{name} '' is empty: give a name, or leave it out")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here, use --device cpu")
    if args.prompt is not None and args.sample is None:
        raise ValueError(f"--prompt {args.prompt!r} needs --sample OUT/SPEC: name the model")
    if args.sample is not None:
        for name, value in vars(args).items():
            is_given = value != getattr(defaults, name)
            if is_given and name not in ("sample", "prompt", "seed", "device"):
                raise ValueError(f"--{name.replace('_', '-')} is for training: leave it out, "
                                 "--sample takes the model as it was trained")
    if not 0 <= args.seed < 2 ** 63:
        raise ValueError(f"--seed {args.seed}: give a number from 0 to 2^63 - 1")
    if args.seeds is not None and not 1 <= args.seeds <= 1000:
        raise ValueError(f"--seeds {args.seeds}: say how many, from 1 to 1000")


def specs_of(args) -> list[str]:
    """What to train, each recipe once."""
    specs = ["flow" if args.recipe is None else args.recipe]
    if args.ablate:
        specs = LADDER
    elif args.compare is not None:
        specs = args.compare or list(RECIPES)
    argument = "--recipe" if args.compare is None else "--compare"
    spec_of = {}                # recipe -> the spec that named it
    for spec in specs:
        try:
            recipe = parse_spec(spec)
        except ValueError as error:
            raise ValueError(f"{argument} {spec}: {error}")
        if recipe in spec_of:
            raise ValueError(f"{argument} {spec} is the same as {spec_of[recipe]}: give it once")
        spec_of[recipe] = spec
    return specs


def fp8_is_emulated(device: str) -> bool:
    """True where the twins run; on a CPU the interpreter, too, only emulates."""
    return device == "cpu" or not kernels.use_kernels(torch.empty(0, device=device))


def preset_of(args) -> Preset:
    """The preset for this machine, with what the command line changes."""
    name = args.preset or "tiny"
    if args.preset is None and not fp8_is_emulated(args.device):
        memory = torch.cuda.get_device_properties(0).total_memory
        name = "h100" if memory > 40e9 else "small"
    given = {field.name: getattr(args, field.name, None) for field in fields(Preset)}
    return replace(PRESETS[name], **{key: size for key, size in given.items() if size is not None})


def folder_of(args) -> Path:
    """--out, or the next free out/N, made and ready to be written to."""
    if args.out is None and (args.resume or args.overwrite):
        given = "--resume" if args.resume else "--overwrite"
        raise ValueError(f"{given} needs --out: name the folder")
    if args.resume and not Path(args.out).is_dir():
        raise ValueError(f"--resume: --out {args.out!r} is no folder: name one")
    try:
        out = next_free_folder() if args.out is None else Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {args.out or 'out'!r} cannot be written ({error.strerror}): name "
                         "another one")
    if any(out.iterdir()):
        if not any((folder / "log.csv").exists() for folder in run_folders(out)):
            raise ValueError(f"--out {args.out!r} is not empty, and nothing was trained in it: "
                             "name another folder")
        if args.overwrite:
            clear(out)
        elif not args.resume:
            raise ValueError(f"--out {args.out!r} is not empty: give --resume to go on, "
                             "--overwrite to start over, or another folder")
    return out


def run_folders(out: Path) -> list[Path]:
    """The folders in `out` that are named like runs."""
    folders = [*out.glob("*"), *out.glob("seed-*/*")]
    return [folder for folder in folders if folder.name.split(",")[0] in RECIPES]


def next_free_folder() -> Path:
    Path("out").mkdir(exist_ok=True)
    for number in itertools.count(1):
        out = Path("out", str(number))
        with contextlib.suppress(FileExistsError):      # also where another process was faster
            out.mkdir()
            return out


def runs_in(out: Path, specs: list[str], preset: Preset, data: Data, args) -> list[Run]:
    """What is to be trained, and with --resume what has been."""
    runs = []
    seeds = range(args.seeds) if args.seeds else [args.seed]
    for seed in seeds:
        parent = out / f"seed-{seed}" if args.seeds else out
        for spec in specs:
            run = Run(spec, seed, parent / spec, preset, data.digest, args.device, args.compile,
                      args.deterministic)
            if args.resume:
                run.result = finished_before(run)
            runs.append(run)
    return runs


def clear(out: Path) -> None:
    """Removes what train.py writes, by name, and the folders that are empty then."""
    for name in ("compare.csv", "loss.png"):
        (out / name).unlink(missing_ok=True)
    for folder in run_folders(out):
        for name in ("log.csv", "checkpoint.pt", "model.pt"):
            (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


# ---- main ----------------------------------------------------------------------------------------

def sample(saved: dict, args) -> None:
    config = saved["config"]
    preset = Preset(**{field.name: config[field.name] for field in fields(Preset)})
    model = GPT(preset, parse_spec(config["spec"])).to(args.device)
    model.load_state_dict(saved["model"])
    prompt = "def " if args.prompt is None else args.prompt
    with weights_cast_once(model):
        text = model.generate(os.fsencode(prompt), 400, args.seed)
    print(text.decode("utf-8", "replace"))


@contextlib.contextmanager
def stop_signals():
    """Gives a Stop that the first Ctrl-C or SIGTERM sets; a second one acts as it always did."""
    stop = Stop()
    before = {}

    def hear(number, frame):
        stop.asked = True
        signal.signal(number, before[number])

    try:
        if threading.current_thread() is threading.main_thread():   # no other may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, hear)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_all(runs: list[Run], data: Data, out: Path) -> int:
    """Trains what is not finished, then writes the table and the picture. Returns the exit code."""
    code = 0
    with stop_signals() as stop:
        for run in runs:
            if run.result:
                print(f"\n{run.spec}, seed {run.seed} has finished before, in {run.folder}")
                continue
            if stop.asked:
                raise KeyboardInterrupt
            try:
                run.result = train(run, data, stop)
            except FloatingPointError as error:
                print(f"train.py: {run.spec}, seed {run.seed}: {error}", file=sys.stderr)
                code = 1
            except torch.OutOfMemoryError:
                print(f"train.py: {run.spec}, seed {run.seed}: the GPU's memory does not suffice: "
                      "lower --batch, or take a smaller --preset", file=sys.stderr)
                code = 1
            gc.collect()                # The weights of one run go before those of the next come.
            torch.cuda.empty_cache()
    finished = [run for run in runs if run.result]
    if finished:
        write_comparison(finished, len(runs), out)
    print(f"\nwritten to {out}")
    return code


def write_comparison(finished: list[Run], asked: int, out: Path) -> None:
    """compare.csv and loss.png; and if more than one run was asked for, a printed table."""
    results = [run.result for run in finished]
    rows = table(results)
    with open(out / "compare.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    if asked > 1:
        print_table(rows, fp8_is_emulated(finished[0].device))
    if len({run.seed for run in finished}) > 1:
        print_seeds(results)
    draw_losses(finished, out / "loss.png")


def prepare(args) -> tuple[list[Run], Data, Path]:
    """What is to be trained, on what, and the folder for it. Raises ValueError, with a sentence."""
    specs = specs_of(args)
    preset = preset_of(args)
    data = read_data(args.data, preset.seq_len)
    out = folder_of(args)
    return runs_in(out, specs, preset, data, args), data, out


def print_header(runs: list[Run], data: Data, out: Path) -> None:
    machine = torch.cuda.get_device_name() if runs[0].device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, triton {triton.__version__}, {machine}; writing to {out}")
    print(", ".join(f"{name}={value}" for name, value in asdict(runs[0].preset).items()))
    print(f"{data.description}; sha256 {data.digest}")
    pairs = table_loss(data.train, data.val, 1)
    triples = table_loss(data.train, data.val, 2)
    print(f"a table of byte pairs reaches {pairs:.3f} nats a byte on the validation text, one of "
          f"triples {triples:.3f}")


def make_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")         # cuBLAS asks for this.
    torch.use_deterministic_algorithms(True)
    # PyTorch would then fill new tensors, which takes time; no result here reads them unwritten.
    torch.utils.deterministic.fill_uninitialized_memory = False


def how_to_go_on(words: list[str], args, out: Path) -> str:
    """The command that goes on with what was stopped; `words` is what was typed."""
    again = [word for word in words if word not in ("--resume", "--overwrite")] + ["--resume"]
    if args.out is None:
        again += ["--out", str(out)]
    return f"go on with: python train.py {shlex.join(again)}"


def main(argv=None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(words)
    try:
        check_arguments(args, parser.parse_args([]))
        if args.sample is not None:
            saved = read_saved(Path(args.sample, "model.pt"), "--sample",
                               "name the folder of a finished run, such as out/1/flow")
        else:
            runs, data, out = prepare(args)
    except ValueError as error:
        parser.error(str(error))
    if args.sample is not None:
        sample(saved, args)
        return 0
    if args.deterministic:
        make_deterministic()
    try:
        print_header(runs, data, out)
        return train_all(runs, data, out)
    except KeyboardInterrupt:
        print(f"train.py: stopped; {how_to_go_on(words, args, out)}", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"train.py: {error}; {how_to_go_on(words, args, out)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
