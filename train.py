"""Train a small MoE GPT on text, one recipe after the other, on the same seed and the same batches.

A recipe says how the expert layers compute: in bf16; naive, in FP8 with 12 casts of activations in
a layer; flow, with 2. A SPEC is a recipe and the switches that differ from it (see fp8flow.py).

    python train.py                             bf16, naive, flow: one table
    python train.py flow,swiglu=unfused         one run, named by its spec
    python train.py --ablate                    from naive to flow, a switch at a time
    python train.py bf16 flow --seeds 0 1 2     three seeds: means and differences
    python train.py --out out/1                 given again, it trains what has not finished there

Bytes are tokens. A run writes OUT/SPEC/log.csv, a row for each step, and at its end
OUT/SPEC/row.json, its row of the table with the settings that it depends on (with several seeds in
OUT/seed-N/SPEC). After the last run come OUT/compare.csv and OUT/loss.png. A run is all or nothing:
where row.json is there it has finished, and is not trained again; one that was stopped starts from
step 0.

The order of this file: presets, data, learning rate, one run (`train`), table, picture, main.
"""
import argparse
import contextlib
import csv
import fcntl
import gc
import hashlib
import itertools
import json
import math
import os
import random
import stat
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

# PyTorch's memory then comes in pieces that can grow, and fewer gaps stay between tensors. This is
# set before torch is imported, since PyTorch reads it only once.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import triton
from torch import Tensor
from tqdm import tqdm

import kernels
# require(condition, sentence, *got) raises ValueError with the sentence and what was got.
from fp8flow import LADDER, RECIPES, count_casts, parse_spec, require
from model import GPT, GPTConfig


# ---- presets -------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Preset(GPTConfig):
    """The model's sizes and how it is trained. (GPTConfig looks at all of them, and raises
    ValueError.)"""
    batch: int              # sequences in a step
    steps: int
    lr: float


PRESETS = {
    "tiny": Preset(
        n_layers=1, d_model=128, n_heads=4, d_expert=128, n_experts=4, top_k=2, seq_len=128,
        batch=8, steps=240, lr=4e-3),
    "small": Preset(
        n_layers=4, d_model=1024, n_heads=8, d_expert=1024, n_experts=8, top_k=2, seq_len=512,
        batch=32, steps=1200, lr=8e-4),
    "h100": Preset(
        n_layers=3, d_model=2048, n_heads=16, d_expert=2048, n_experts=16, top_k=4, seq_len=1024,
        batch=32, steps=700, lr=5e-4),
}
BALANCE = 0.1               # weight of the load-balancing loss: runs are short, it must act early
CLIP = 1.0                  # largest gradient norm
VAL_BATCHES = 32            # so many times the windows of a step are validated on


# ---- data ----------------------------------------------------------------------------------------

LOCK = "train.lock"         # lies in each OUT: what runs have written is no text to train on


def read_text(path: str | None) -> tuple[bytearray, str]:
    """The text of a file, of a folder or of torch's own source, and a sentence that says what was
    read. Raises ValueError where there is none.

    Files are joined in an order that is drawn once, the same every time: so the end, which is held
    out, is like the rest.
    """
    root = path or os.path.dirname(torch.__file__)
    skipped = []                # what is no text, and why
    texts = []
    files = files_below(root, skipped) if os.path.isdir(root) else [root]
    for file in files:
        if path is None and (not file.endswith(".py") or file.endswith("/version.py")):
            continue            # version.py differs from build to build.
        try:
            texts.append(read_file(file))
        except OSError as error:
            skipped.append(f"{file} ({error.strerror})")
        except ValueError as error:
            skipped.append(f"{file} ({error})")
    random.Random(0).shuffle(texts)
    text = bytearray().join(texts)
    sentence = f"{len(skipped)} skipped" + "".join(f", {name}" for name in skipped[:5])
    if len(skipped) > 5:
        sentence += ", ..."
    require(len(text) > 0, f"--data {root} holds no text ({sentence}): name a text file, or a "
            "folder of them")
    train_text, val_text = split(text)
    return text, f"{root}: {len(texts)} files, {len(train_text):,} bytes for training and " \
                 f"{len(val_text):,} for validation; {sentence}"


def split(text):
    """The last twentieth is held out, for validation."""
    held_out = len(text) // 20
    return text[:len(text) - held_out], text[len(text) - held_out:]


def files_below(root: str, skipped: list[str]):
    """Yields the files of a folder in order, without what is hidden and what was written by runs.
    Adds to `skipped` what it cannot enter."""
    def cannot_enter(error):
        skipped.append(f"{error.filename} ({error.strerror})")

    for folder, inner, files in os.walk(root, onerror=cannot_enter):
        if LOCK in files:
            inner.clear()
            skipped.append(f"{folder} (a folder of runs)")
            continue
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in inner:
            if os.path.islink(os.path.join(folder, name)):          # os.walk does not follow it.
                skipped.append(f"{os.path.join(folder, name)} (a link to a folder)")
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.join(folder, name)


def read_file(path: str) -> bytes:
    """Raises OSError, or ValueError with the reason, for what is no text."""
    require(stat.S_ISREG(os.stat(path).st_mode), "no regular file")
    with open(path, "rb") as file:
        head = file.read(8192)
        require(b"\0" not in head, "a zero byte in its first 8192")
        return head + file.read()


def windows_at(text: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    """starts [B] -> [B, seq_len + 1] int64: inputs without the last, targets without the first."""
    return text[starts[:, None] + torch.arange(seq_len + 1, device=text.device)].long()


def draw_windows(text: Tensor, seed: int, step: int, preset: Preset) -> Tensor:
    """The windows of a step, the same for every recipe. (Seeded with both numbers: with their sum
    seed 0 would have in step 1 what seed 1 has in step 0.)"""
    rng = np.random.default_rng([seed, step])
    starts = torch.from_numpy(rng.integers(len(text) - preset.seq_len, size=preset.batch))
    return windows_at(text, starts.to(text.device), preset.seq_len)


# ---- learning rate and validation ----------------------------------------------------------------

def learning_rate(step: int, preset: Preset) -> float:
    """Up in a line for a tenth of the steps, down in a cosine, and level at 1% of the peak for the
    last fifth: so the last loss is a steady one."""
    warmup = max(1, round(0.1 * preset.steps))
    if step < warmup:
        return preset.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1.0, 0.8 * preset.steps - warmup))
    return preset.lr * max(0.01, 0.5 + 0.5 * math.cos(math.pi * progress))


def validate(run_step, window: Tensor, text: Tensor) -> float:
    """Mean loss in nats a byte over windows spread evenly over the text: the same every time.

    run_step is the step of training, on `window`. Here only its loss is used, and its backward is
    done for nothing: a recorded step is replayed whole, in memory that it has already. A forward of
    its own would need memory besides.
    """
    batch, length = window.shape
    count = VAL_BATCHES * batch
    last = len(text) - length                   # where the last window starts; the first, at 0
    starts = torch.arange(count, device=text.device) * last // max(1, count - 1)
    losses = []
    for some in starts.split(batch):
        window.copy_(windows_at(text, some, length - 1))
        loss, *_ = run_step().clone()           # A replay writes into the same tensor again.
        losses.append(loss)
    return torch.stack(losses).mean().item()


# ---- one run -------------------------------------------------------------------------------------

@dataclass
class Run:
    """One recipe on one seed, in a folder of its own."""
    folder: Path
    preset: Preset
    settings: dict              # the recipe, the seed, and all else that its row depends on
    row: dict | None            # its row of the table, once it has finished


def make_model(run: Run, device: torch.device) -> tuple[GPT, torch.optim.Optimizer]:
    torch.manual_seed(run.settings["seed"])
    with device:                                # What is made inside is made there.
        model = GPT(run.preset, parse_spec(run.settings["recipe"]))
    if run.settings["compile"]:
        for block in model.blocks:              # But not their experts: `experts` disables it.
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=True)
    return model, optimizer


def waits_for_device(forward_backward) -> bool:
    """Calls it once, in a mode in which what makes the host wait for the GPU raises an error."""
    warnings.filterwarnings("ignore", "Synchronization debug mode")     # "is a prototype feature"
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward()
    except RuntimeError as error:
        if "synchronizing" not in str(error):   # but too little memory, say
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def recorded(forward_backward, eager: bool):
    """What to call instead of `forward_backward`, and a word on how it runs.

    Every tensor in it has a fixed size, since the layer has room for whatever the router chooses.
    If nothing in it waits for the GPU, either (this is tried), each step launches the same kernels
    on the same memory. A CUDA graph holds these launches, and one call replays them without Python.
    That pays where launching takes longer than computing (flow at the preset small becomes 1.4 to
    1.8 times as fast), and saves next to nothing where kernels are long (the preset h100).
    """
    if eager:
        return forward_backward, "called, as --eager asks"
    if not torch.cuda.is_available():
        return forward_backward, "called: there is no GPU"
    if waits_for_device(forward_backward):
        return forward_backward, "called: a step waits for the device"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        result = forward_backward()             # Launches are noted down, nothing is computed yet.

    def replay():
        graph.replay()
        return result                           # the same tensor each time, with new numbers
    return replay, "recorded as a CUDA graph: they do not wait for the device"


def train(run: Run, text: Tensor, val_text: Tensor) -> dict:
    """Trains a model, and returns its row of the table. Raises FloatingPointError where a number is
    not finite, torch.OutOfMemoryError and OSError."""
    preset = run.preset
    seed = run.settings["seed"]
    model, optimizer = make_model(run, text.device)
    window = draw_windows(text, seed, 0, preset)        # Each step writes its own into it.

    def forward_backward() -> Tensor:
        """Leaves the clipped gradients for `window`. Returns the loss, the load-balancing loss and
        the norm of the gradient before it was clipped, as one tensor."""
        # Without this, backward would add to the gradients of the step before. It makes new
        # tensors for them instead; where it is recorded, each replay overwrites the tensors that
        # were made then, and the optimizer finds the new numbers there.
        model.zero_grad()
        loss, balance = model(window[:, :-1], window[:, 1:])
        (loss + BALANCE * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        return torch.stack([loss.detach(), balance.detach(), norm])

    # A step that is discarded: it compiles the kernels, and counts the casts of activations.
    with count_casts() as casts:
        forward_backward()
    run_step, how = recorded(forward_backward, run.settings["eager"])
    total, active = model.parameter_counts()
    print(f"\n{run.settings['recipe']}, seed {seed}: {total / 1e6:.1f}M parameters, "
          f"{active / 1e6:.1f}M for a token; {len(casts) // preset.n_layers} casts in a layer\n"
          f"  forward and backward of a step are {how}", flush=True)
    if text.is_cuda:
        torch.cuda.empty_cache()                # What the discarded steps alone needed.
        torch.cuda.reset_peak_memory_stats()

    speeds = []
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "log.csv", "w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "loss", "val_loss", "tokens_per_s", "lr", "grad_norm", "balance"])
        bar = tqdm(range(preset.steps), run.settings["recipe"], unit="step")
        began = time.perf_counter()
        for step in bar:
            lr = learning_rate(step, preset)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # The graph reads the memory of this tensor. It would not see another tensor.
            window.copy_(draw_windows(text, seed, step, preset))
            numbers = run_step()
            loss, balance, grad_norm = numbers.tolist()         # Here the host waits, once a step.
            now = time.perf_counter()
            speeds.append(preset.batch * preset.seq_len / (now - began))
            began = now
            if not math.isfinite(loss + grad_norm):
                raise FloatingPointError(f"step {step} has the loss {loss} and a gradient of norm "
                                         f"{grad_norm}: lower --lr")
            # Outside of the graph, since its learning rate changes, and since it must not run when
            # the loss or the gradient is not finite.
            # The GPU works on it into the next step, which is timed with it.
            optimizer.step()

            val_loss = None
            if step + 1 in (preset.steps // 2, preset.steps):
                val_loss = validate(run_step, window, val_text)
                began = time.perf_counter()     # Validation is no part of a step's time.
            log.writerow([step, loss, val_loss, speeds[-1], lr, grad_norm, balance])
            file.flush()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    if not math.isfinite(val_loss):
        raise FloatingPointError(f"the validation loss is {val_loss}: lower --lr")

    # All memory that PyTorch holds. (A replay allocates nothing, so in max_memory_allocated a
    # graph's memory does not show.)
    peak = torch.cuda.max_memory_reserved() / 1e9 if text.is_cuda else None
    print(f"  validation loss {val_loss:.4f} nats a byte; after 'def ' the model writes\n")
    print(model.generate(b"def ", 200).decode("utf-8", "replace"), flush=True)
    if run.settings["save"]:
        torch.save({"model": model.state_dict(), "preset": asdict(preset),
                    "recipe": run.settings["recipe"]}, run.folder / "model.pt")
    row = {"casts": len(casts) // preset.n_layers, "val_loss": val_loss,
           # The median, since single steps are slow where the machine is busy.
           "tokens_per_s": statistics.median(speeds), "peak_mem_gb": peak, "steps_are": how,
           **run.settings}
    # Renamed when it is whole: if the process dies while it writes, there is no row.json.
    beside = run.folder / "row.json.new"
    beside.write_text(json.dumps(row, indent=1))
    os.replace(beside, run.folder / "row.json")
    return row


# ---- the table -----------------------------------------------------------------------------------

FORMATS = {"casts": "d", "val_loss": ".4f", "delta_pct": "+.3f", "tokens_per_s": ".0f",
           "speedup": ".3f", "peak_mem_gb": ".2f", "seed": "d"}


def compare(rows: list[dict]) -> list[dict]:
    """The rows, with the difference in loss and the speed-up over bf16 on the same seed. A recorded
    run has no speed-up over a called one: it would say how fast the host launches."""
    bases = {row["seed"]: row for row in rows if row["recipe"] == "bf16"}
    compared = []
    for row in rows:
        base = bases.get(row["seed"])
        delta = speedup = None
        if base:
            delta = 100 * (row["val_loss"] / base["val_loss"] - 1)
        if base and row["steps_are"] == base["steps_are"]:
            speedup = row["tokens_per_s"] / base["tokens_per_s"]
        compared.append({**row, "delta_pct": delta, "speedup": speedup})
    return compared


def print_table(rows: list[dict], is_emulated: bool) -> None:
    """Without delta_pct: on one seed it says nothing, and for several see print_seeds."""
    names = ["casts", "val_loss"]
    if not is_emulated:                         # Where it is, speed and memory say nothing.
        names += ["tokens_per_s", "speedup", "peak_mem_gb"]
    if len({row["seed"] for row in rows}) > 1:
        names.append("seed")
    width = max(len(row["recipe"]) for row in [{"recipe": "recipe"}, *rows])
    print(f"\n{'recipe':>{width}}" + "".join(f"{name:>14}" for name in names))
    for row in rows:
        words = ["-" if row[name] is None else format(row[name], FORMATS[name]) for name in names]
        print(f"{row['recipe']:>{width}}" + "".join(f"{word:>14}" for word in words))
    print("(python -m tools.trace SPEC lists the casts.)")


def print_seeds(rows: list[dict]) -> None:
    """The mean of each recipe over the seeds, and the mean of its differences to bf16 on the same
    seed: what a seed does to both recipes drops out of these."""
    print()
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == recipe]
        losses = [row["val_loss"] for row in mine]
        deltas = [row["delta_pct"] for row in mine if row["delta_pct"] is not None]
        line = f"{recipe}: {len(mine)} seeds, val loss {statistics.mean(losses):.4f}"
        if len(losses) > 1:
            line += f", standard deviation {statistics.stdev(losses):.4f}"
        if recipe != "bf16" and len(deltas) > 1:
            error = statistics.stdev(deltas) / len(deltas) ** 0.5
            line += f"; {statistics.mean(deltas):+.3f}% over bf16, standard error {error:.3f}%"
        print(line)


# ---- the picture ---------------------------------------------------------------------------------

def smooth(losses: np.ndarray) -> np.ndarray:
    """Means over a twentieth of the run."""
    width = max(1, len(losses) // 20)
    return np.convolve(losses, np.ones(width) / width, mode="valid")


def draw_losses(runs: list[Run], path: Path) -> None:
    """The loss of each run, and below it the difference to bf16 on the same seed, in percent and
    smoothed: the curves themselves coincide."""
    os.environ["MPLBACKEND"] = "agg"    # A notebook sets it to a backend that may not be installed.
    from matplotlib.figure import Figure
    losses = {}                 # (recipe, seed) -> those of all steps
    for run in runs:
        column = np.loadtxt(run.folder / "log.csv", delimiter=",", skiprows=1, usecols=1, ndmin=1)
        losses[run.settings["recipe"], run.settings["seed"]] = column
    colors = {}                 # recipe -> color
    figure = Figure(figsize=(7, 6), layout="constrained")       # without pyplot: no display
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for (recipe, seed), column in losses.items():
        label = None if recipe in colors else recipe
        color = colors.setdefault(recipe, f"C{len(colors)}")
        above.plot(column, color, label=label, linewidth=1)
        base = losses.get(("bf16", seed))
        if base is not None and recipe != "bf16":
            difference = 100 * (smooth(column) / smooth(base) - 1)
            last_steps = range(len(column) - len(difference), len(column))
            below.plot(last_steps, difference, color, linewidth=1)
    above.set(ylabel="training loss (nats a byte)")
    above.legend()
    below.set(xlabel="step", ylabel="difference to bf16, %")
    below.axhline(0, color="gray", linewidth=0.5)
    figure.savefig(path, dpi=150)


# ---- main: what to train, on what, and where -----------------------------------------------------

def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("specs", nargs="*", metavar="SPEC", help="a recipe (bf16, naive, flow) and the switches "
        "that differ from it: flow,swiglu=unfused (default: the three recipes)")
    add("--ablate", action="store_true", help="train the steps from naive to flow")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="after the specs (default: "
        "0)")
    add("--preset", choices=PRESETS, help="default: h100; small below 40 GB, tiny where FP8 is "
        "emulated")
    add("--data", metavar="PATH", help="a text file or a folder of them (default: torch's Python "
        "source)")
    add("--out", metavar="DIR", help="a folder (default: the next free out/N)")
    add("--compile", action="store_true", help="torch.compile all but the experts")
    add("--eager", action="store_true", help="call each step, do not record a CUDA graph")
    add("--deterministic", action="store_true", help="repeat bit for bit, and be slower")
    add("--save", action="store_true", help="keep the weights, in model.pt")
    sizes = parser.add_argument_group(f"sizes, over those of the preset ({' / '.join(PRESETS)})")
    for field in fields(Preset):
        values = [str(getattr(preset, field.name)) for preset in PRESETS.values()]
        sizes.add_argument("--" + field.name.replace("_", "-"), type=field.type, metavar="N",
                           help=" / ".join(values))
    return parser


def is_fp8_emulated(device: torch.device) -> bool:
    """True where the kernels' PyTorch twins run, or Triton's interpreter on a CPU: speed says
    nothing there."""
    return device.type == "cpu" or not kernels.use_kernels(device)


def choose_specs(args) -> list[str]:
    """What to train, each recipe once."""
    require(not (args.specs and args.ablate), "--ablate has a list of its own: leave out the SPECs",
            args.specs)
    specs = args.specs or list(RECIPES)
    if args.ablate:
        specs = LADDER
    spec_of = {}                # recipe -> the spec that named it
    for spec in specs:
        recipe = parse_spec(spec)
        require(recipe not in spec_of, f"SPEC {spec} is the same as {spec_of.get(recipe)}: give it "
                "once")
        spec_of[recipe] = spec
    return specs


def choose_preset(args, device: torch.device) -> Preset:
    """The preset for this machine, with what the command line changes."""
    name = args.preset
    if name is None and is_fp8_emulated(device):
        name = "tiny"
    if name is None:
        memory = torch.cuda.get_device_properties(device).total_memory
        name = "h100" if memory > 40e9 else "small"
    given = {field.name: getattr(args, field.name) for field in fields(Preset)}
    return replace(PRESETS[name], **{key: size for key, size in given.items() if size is not None})


def make_folder(out: str | None) -> Path:
    """--out, or the next free out/N: a number belongs to whoever makes its folder."""
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        return Path(out)
    Path("out").mkdir(exist_ok=True)
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            Path(f"out/{number}").mkdir()
            return Path(f"out/{number}")


@contextlib.contextmanager
def locked(out: Path):
    """One process at a time in a folder. The file stays and says nothing. The system keeps the
    lock, and drops it when the process ends, even by kill -9."""
    with open(out / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)    # for one alone; or fail at once
        except BlockingIOError:
            raise ValueError(f"another process trains in {out}: wait for it, or give another --out")
        yield


def find_runs(args, specs: list[str], preset: Preset, text: bytearray, device: torch.device,
              out: Path) -> list[Run]:
    """What is to be trained, and what has been. Raises ValueError where a folder holds a run with
    other settings."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    common = {**asdict(preset), "text": hashlib.sha256(text).hexdigest()[:12], "device": machine,
              "torch": str(torch.__version__), "triton": triton.__version__,
              "compile": args.compile, "eager": args.eager, "deterministic": args.deterministic,
              "save": args.save}
    runs = []
    for seed in args.seeds:
        parent = out / f"seed-{seed}" if len(args.seeds) > 1 else out
        for spec in specs:
            settings = {"recipe": spec, "seed": seed, **common}
            path = parent / spec / "row.json"
            row = json.loads(path.read_text()) if path.exists() else None
            if row:
                check_finished(path, row, settings)
            runs.append(Run(parent / spec, preset, settings, row))
    return runs


def check_finished(path: Path, row: dict, settings: dict) -> None:
    for name, value in settings.items():
        if name == "save" and row.get("save"):
            continue                    # It has weights, whether they are asked for or not.
        require(row.get(name) == value,
                f"{path} is of a run with {name}={row.get(name)}, not {value}: give the same "
                "arguments, or another --out")


def train_all(runs: list[Run], text: bytearray, device: torch.device) -> list[Run]:
    """Trains what has not finished. Returns the runs that have a row then."""
    train_text, val_text = split(torch.frombuffer(text, dtype=torch.uint8).to(device))
    for run in runs:
        name = f"{run.settings['recipe']}, seed {run.settings['seed']}"
        if run.row:
            print(f"\n{name} has finished before, in {run.folder}")
            continue
        try:
            run.row = train(run, train_text, val_text)
        except FloatingPointError as error:
            print(f"train.py: {name}: {error}", file=sys.stderr)
        except RuntimeError as error:
            # Where memory runs out while a step is recorded, the recording cannot be ended, either.
            # This second error is the one that arrives here, with the first as its __context__.
            if not (isinstance(error, torch.OutOfMemoryError)
                    or isinstance(error.__context__, torch.OutOfMemoryError)):
                raise
            print(f"train.py: {name}: the GPU's memory does not suffice: lower --batch",
                  file=sys.stderr)
        gc.collect()                            # One model goes before the next one comes.
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return [run for run in runs if run.row]


def write_comparison(finished: list[Run], out: Path, is_emulated: bool) -> None:
    rows = compare([run.row for run in finished])
    with open(out / "compare.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["recipe", *FORMATS], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    print_table(rows, is_emulated)
    if len({row["seed"] for row in rows}) > 1:
        print_seeds(rows)
    draw_losses(finished, out / "loss.png")
    print(f"\nwritten to {out}")


def set_deterministic(is_wanted: bool) -> None:
    torch.use_deterministic_algorithms(is_wanted)
    if is_wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # cuBLAS asks for this.
        # PyTorch would fill new tensors, which takes time; no result here reads them unwritten.
        torch.utils.deterministic.fill_uninitialized_memory = False


def main(argv=None) -> int:
    if hasattr(sys.stdout, "reconfigure"):      # A model may write what the terminal cannot show.
        sys.stdout.reconfigure(errors="replace")
    args = make_parser().parse_args(argv)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    set_deterministic(args.deterministic)
    with contextlib.ExitStack() as stack:
        try:
            require(min(args.seeds) >= 0 and len(set(args.seeds)) == len(args.seeds),
                    "--seeds must be different numbers from 0 on", args.seeds)
            require(args.data is None or args.out is None
                    or os.path.realpath(args.data) != os.path.realpath(args.out),
                    "--out is the folder of --data, which would read its own logs: give another "
                    "--out", args.out)
            specs = choose_specs(args)
            preset = choose_preset(args, device)
            text, sentence = read_text(args.data)
            require(len(split(text)[1]) > preset.seq_len + 1, f"--seq-len {preset.seq_len} needs "
                    f"more text for validation: give more --data ({sentence})")
            out = make_folder(args.out)
            stack.enter_context(locked(out))
            runs = find_runs(args, specs, preset, text, device, out)
        except ValueError as error:
            print(f"train.py: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"train.py: {error}: give another --out", file=sys.stderr)
            return 2
        print(f"torch {torch.__version__}, triton {triton.__version__}, "
              f"{runs[0].settings['device']}; writing to {out}\n{preset}\n{sentence}", flush=True)
        if device.type == "cuda":
            # A stream is a queue of work, and the one that is there by default cannot be recorded.
            # All runs share one, since PyTorch and cuBLAS keep memory for each stream.
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        try:
            finished = train_all(runs, text, device)
            if finished:
                write_comparison(finished, out, is_fp8_emulated(device))
        except KeyboardInterrupt:
            print(f"train.py: stopped; the same command with --out {out} keeps the runs that have "
                  "finished", file=sys.stderr)
            return 130
        except OSError as error:
            print(f"train.py: {error}", file=sys.stderr)
            return 1
    return 0 if len(finished) == len(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
