"""Train a small MoE GPT on text: one recipe, or several on the same seeds and batches.

    python train.py --compare                               bf16, naive, flow: one table
    python train.py --compare flow flow,swiglu=unfused      any recipes, each named by its spec
    python train.py --ablate                                from naive to flow a switch at a time, and one step back
    python train.py --compare --seeds 3                     seeds 0, 1, 2: means, differences with their intervals
    python train.py --recipe flow --swiglu unfused          one run
    python train.py --resume --out out/1 ...                go on where a run was stopped
    python train.py --sample out/1/flow --prompt "def "     continue a text

Default data: the Python source of the installed torch package, bytes as tokens. What a run writes goes under --out
(default: the next free out/N): SPEC/log.csv (a row a step), SPEC/model.pt (the fp32 weights), SPEC/sample.txt,
SPEC/run.json, and compare.csv and loss.png beside them; with --seeds SPEC lies in seed-N/.
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
import shlex
import shutil
import signal
import statistics
import sys
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import triton
from torch import Tensor
from tqdm import tqdm

import kernels
from fp8flow import CHOICES, RECIPES, Plan, column_wise, count_casts, parse_spec, permute, spread, torch_grouped_mm
from model import GPT, GPTConfig


@dataclass(frozen=True, kw_only=True)
class Preset(GPTConfig):
    """The model's sizes and how it is trained. Raises ValueError where they make no sense."""
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
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr} must be positive and finite")

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(**{f.name: getattr(self, f.name) for f in fields(GPTConfig)})

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.accumulate * self.seq_len


PRESETS = {
    "tiny": Preset(n_layers=2, d_model=128, n_heads=4, d_expert=128, n_experts=4, top_k=2, seq_len=128, batch=8,
                   accumulate=1, steps=300, lr=2e-3, val_every=100, val_batches=64),
    "small": Preset(n_layers=4, d_model=512, n_heads=8, d_expert=512, n_experts=8, top_k=2, seq_len=512, batch=16,
                    accumulate=1, steps=1000, lr=1e-3, val_every=250, val_batches=128),
    "h100": Preset(n_layers=3, d_model=2048, n_heads=16, d_expert=2048, n_experts=16, top_k=4, seq_len=1024, batch=16,
                   accumulate=2, steps=300, lr=4e-4, val_every=50, val_batches=64),
}
BALANCE = 0.1                               # weight of the load-balancing loss: runs are short, routing must even out
CLIP, WARMUP = 1.0, 0.1                     # largest gradient norm; share of the steps
LOG_EVERY = 10                              # steps between reads of the loss from the device
HELD_OUT = 20                               # one byte in so many is for validation
LADDER = ("bf16", "naive", "naive,scales=pow2", "naive,scales=pow2,transpose=direct", "flow,permute=unfused", "flow",
          "flow,transpose=requant")         # and back; the paper's rows are this and the rung before flow


# ---------------------------------------------------------------------------------------------------------------------
# data

def read_corpus(path: str | None) -> tuple[list[bytes], str]:
    """The texts of a file, of a folder's text files, or of torch's own source; and what it is. Raises ValueError."""
    if path is None:                                            # version.py differs between the builds of one version
        root, what = Path(torch.__file__).parent, f"the Python source of torch {torch.__version__.split('+')[0]}"
        wanted = lambda name: name.endswith(".py") and name != "version.py"
    else:
        root, what, wanted = Path(path), path, lambda name: not name.startswith(".")
        if not path or not root.exists():
            raise ValueError(f"--data {path!r} does not exist: name a text file or a folder of them")

    def refuse(error: OSError):
        raise ValueError(f"--data: cannot read {error.filename!r} ({error.strerror}); name files you may read")
    names = [root] if root.is_file() else sorted(
        Path(folder, name) for folder, _, names in os.walk(root, onerror=refuse) for name in names
        if wanted(name) and os.path.isfile(os.path.join(folder, name))              # no pipes, no dangling links
        and not any(part.startswith((".", "__pycache__")) for part in Path(folder).relative_to(root).parts))
    texts = []
    for name in names:
        try:
            text = name.read_bytes()
        except OSError as error:
            refuse(error)
        texts += [text] if text and (root.is_file() or b"\0" not in text) else []    # binary files are no text
    if not texts:
        raise ValueError(f"--data {str(root)!r} holds no text: name a text file or a folder of them")
    return texts, what


def split_corpus(texts: list[bytes], seq_len: int) -> tuple[Tensor, Tensor, str]:
    """(train, validation) as uint8 vectors, and how they were split. With 20 files or more, whole files are held out,
    by the hash of what they hold: a text under two names stays on one side. With fewer, the last tenth of each."""
    if len(set(texts)) >= HELD_OUT:
        kept, held = sorted(set(texts), key=lambda text: (zlib.crc32(text), text)), []
        while sum(map(len, held)) * HELD_OUT < sum(map(len, kept + held)):
            held.append(kept.pop())
        how = f"{len(held)} of {len(held) + len(kept)} different files held out"
    else:
        cuts = [len(text) * 9 // 10 for text in texts]
        kept, held = [t[:cut] for t, cut in zip(texts, cuts)], [t[cut:] for t, cut in zip(texts, cuts)]
        how = f"the last tenth of each of {len(texts)} file(s) held out"
    train, val = b"".join(kept), b"".join(held)
    for name, text in (("training", train), ("validation", val)):
        if len(text) <= seq_len:
            raise ValueError(f"--data is too short: {len(text)} bytes for {name}, one sequence needs seq_len + 1 = "
                             f"{seq_len + 1}; give more text or a smaller --seq-len")
    return *(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, val)), how


def table_loss(train: Tensor, val: Tensor, order: int) -> float:
    """Nats a byte on `val` of a table of `train`: how often each byte follows each `order` bytes, plus 0.1."""
    def context(text):
        return sum(text[i:len(text) - order + i].long() * 256 ** (order - 1 - i) for i in range(order))
    counts = torch.bincount(context(train) * 256 + train[order:], minlength=256 ** (order + 1)).view(-1, 256) + 0.1
    seen = context(val)
    return (counts.sum(1)[seen].log() - counts[seen, val[order:].long()].log()).mean().item()


def batch_of(text: Tensor, starts: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    window = text[starts[:, None] + torch.arange(seq_len + 1, device=text.device)].long()
    return window[:, :-1], window[:, 1:]


@torch.no_grad()
def validate(model: GPT, text: Tensor, preset: Preset) -> float:
    """Mean loss in nats a byte over windows spread evenly over the held-out text: the same ones every time."""
    n = preset.val_batches * preset.batch
    starts = torch.arange(n, device=text.device) * (len(text) - preset.seq_len - 1) // max(1, n - 1)
    return torch.stack([model(*batch_of(text, s, preset.seq_len))[0] for s in starts.split(preset.batch)]).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# what a run leaves on disk

@dataclass
class Run:
    """One recipe on one seed, in a folder of its own. `config`: what must be equal for its results to be the same."""
    spec: str
    seed: int
    folder: Path
    config: dict

    def write(self, row: dict | None) -> None:
        text = json.dumps({"config": self.config, "row": row})
        write_safely(self.folder / "run.json", lambda path: path.write_text(text))


def read_run(path: Path) -> dict | None:
    """A run.json: {"config", "row" (None until it has finished)}, or None where there is none of ours."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() == {"config", "row"} else None


def write_safely(path: Path, write) -> None:
    """Written beside it, then renamed: a full disk or a kill in the middle leaves what was there."""
    beside = path.with_name(path.name + ".new")
    write(beside)
    os.replace(beside, path)


def differing(a: dict, b: dict) -> str:
    keys = sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
    return ", ".join(f"{key} ({a.get(key)!r} there, {b.get(key)!r} now)" for key in keys)


def check_folder(run: Run, resume: bool, overwrite: bool) -> None:
    """Raises ValueError where what lies in the run's folder is neither this run nor may be continued as it."""
    found = read_run(run.folder / "run.json")
    if found is None and run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
        raise ValueError(f"--out: {str(run.folder)!r} holds files of something else: name another --out")
    if found is None or overwrite:
        return
    edited = {key: value for key, value in run.config.items() if resume and key == "source"}
    different = differing(found["config"] | edited, run.config)
    if different:
        raise ValueError(f"--out: {str(run.folder)!r} holds a run of another configuration: {different}; give another "
                         "--out, or --overwrite")
    if found["row"] is None and not resume:
        raise ValueError(f"--out: {str(run.folder)!r} holds an unfinished run: go on with --resume, or --overwrite it")
    if found["config"]["source"] != run.config["source"]:
        print(f"warning: the source was edited since {run.folder} was begun; it goes on with the code as it is now",
              file=sys.stderr)


def source_hash() -> str:
    names = ("kernels.py", "fp8flow.py", "model.py", "train.py")
    return hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in names)).hexdigest()[:12]


class Log:
    """log.csv, a row a step. Numbers stay on the device until `flush`: reading one would wait for the GPU."""

    def __init__(self, path: Path, preset: Preset, steps: int):
        """steps: how many are done: rows of later ones, written before a stop, are dropped."""
        self.preset, self.pending = preset, []
        names = ["step", "loss", "val_loss", "tokens_per_s", "lr", "grad_norm", "balance",
                 *(f"load_{e}" for e in range(preset.n_experts))]
        rows = [row for row in read_log(path) if int(row["step"]) < steps] if steps else []
        self.file = open(path, "w", newline="")
        self.writer = csv.DictWriter(self.file, names)
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.file.flush()

    def add(self, step: int, losses: Tensor, norm: Tensor, model: GPT) -> None:
        load = torch.stack([moe.load for moe in model.moes]).mean(0)            # each expert's share, mean over layers
        self.pending.append((step, torch.cat([losses, norm[None], load])))

    def flush(self, seconds: float, val_loss: float) -> tuple[float, float, int | None]:
        """Write the pending steps, which took `seconds`; (last loss, tokens/s, the first step that was not finite)."""
        loss, speed, bad = math.nan, len(self.pending) * self.preset.tokens_per_step / seconds, None
        for i, (step, values) in enumerate(self.pending):
            loss, balance, norm, *load = values.tolist()
            bad = step if bad is None and not math.isfinite(loss + norm) else bad
            val = f"{val_loss:.6f}" if i == len(self.pending) - 1 else "nan"
            self.writer.writerow(dict(zip(self.writer.fieldnames, [
                step, f"{loss:.6f}", val, f"{speed:.1f}", f"{learning_rate(step, self.preset):.3e}", f"{norm:.4f}",
                f"{balance:.4f}", *(f"{share:.4f}" for share in load)])))
        self.file.flush()
        self.pending.clear()
        return loss, speed, bad


def read_log(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------------------
# the probe: what quantization and the transpose do to the four tensors of every layer

def four_tensors(experts, x: Tensor, probs: Tensor, plan: Plan, dy: Tensor) -> dict[str, Tensor]:
    """X, A, dY, dH of one expert layer in bf16, [M, ...], zeros in the padding."""
    w1, w2, flow = experts.w1.detach().bfloat16(), experts.w2.detach().bfloat16(), RECIPES["flow"]
    x, dy, prob = permute(x.detach(), plan, flow), permute(dy, plan, flow), spread(probs.detach(), plan)
    h = torch_grouped_mm(x, w1.mT, plan.ends)
    a = kernels.swiglu(h, prob, plan.tile_expert)
    dh, _ = kernels.swiglu_backward(torch_grouped_mm(dy, w2, plan.ends), h, prob, plan.tile_expert)
    tensors = dict(X=x, A=a, dY=dy, dH=dh)
    return {name: torch.where(plan.pair[:, None] >= 0, t, 0) for name, t in tensors.items()}


def look_at(t: Tensor, plan: Plan) -> dict[str, float]:
    """amax; the widest spread of row scales in a 128x128 tile, in binades; the share of elements that underflow in the
    direct transpose; SQNR in dB of the direct and of the requantizing transpose against t."""
    q, live = kernels.quantize(t), plan.pair >= 0
    scales = q.scale.log2().unflatten(1, (-1, kernels.BLOCK))
    filled = q.scale.unflatten(1, (-1, kernels.BLOCK)) > kernels.SCALE_MIN
    widest = torch.where(filled, scales, -math.inf).amax(2) - torch.where(filled, scales, math.inf).amin(2)
    direct, requantized = (kernels.dequantize(column_wise(q, plan, parse_spec(spec))).t()[live]
                           for spec in ("flow", "flow,transpose=requant"))
    t = t[live]
    return dict(amax=t.abs().max().item(), binades=max(0.0, widest.max().item()),
                underflow=(((direct == 0) & (t != 0)).sum() / (t != 0).sum().clamp(min=1)).item(),
                sqnr_direct=kernels.sqnr(direct, t), sqnr_requant=kernels.sqnr(requantized, t))


def probe(model: GPT, micro_batch, step: int, path: Path) -> None:
    """One extra micro-batch, whose gradients the caller drops; a row a layer and tensor appended to `path`."""
    seen = []

    def look(experts, inputs, y):
        y.register_hook(lambda dy: seen.append((experts, *inputs, dy)))
    hooks = [moe.experts.register_forward_hook(look) for moe in model.moes]
    micro_batch(torch.Generator().manual_seed(step))
    for hook in hooks:
        hook.remove()
    rows = [dict(step=step, layer=layer, tensor=name, **look_at(t, inputs[2]))
            for layer, (experts, *inputs) in enumerate(reversed(seen))      # backward comes to the last layer first
            for name, t in four_tensors(experts, *inputs).items()]
    header = [] if path.exists() else [list(rows[0])]
    with open(path, "a", newline="") as file:
        csv.writer(file).writerows(header + [list(row.values()) for row in rows])


# ---------------------------------------------------------------------------------------------------------------------
# one run

class Stop:
    """The first Ctrl-C, SIGTERM or SIGHUP ends the run after the step it is in; a second one at once."""
    asked: str | None = None

    def __enter__(self):
        heard = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
        self.before = {s: signal.signal(s, self.hear) for s in heard}               # nohup ignores SIGHUP
        return self

    def hear(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """The run was asked to stop and can go on from its checkpoint."""


class NotFinite(Exception):
    """A loss or gradient norm was NaN or Inf."""


class Damaged(ValueError):
    """A file of weights cannot be read."""


class Clock:
    """Seconds spent training (`stop`: since `start`), not validating or saving; queued GPU work counts."""

    def __init__(self, device: str):
        self.device, self.seconds = device, 0.0

    def start(self) -> None:
        self.sync()
        self.started = time.perf_counter()

    def stop(self) -> float:
        self.sync()
        elapsed = time.perf_counter() - self.started
        self.seconds += elapsed
        return elapsed

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def learning_rate(step: int, preset: Preset) -> float:
    """Linear warm-up, then linearly down to zero: the end of a run is level, so that its loss means something."""
    warmup = max(1, round(WARMUP * preset.steps))
    return preset.lr * min((step + 1) / warmup, (preset.steps - step) / max(1, preset.steps - warmup))


def describe(model: GPT, preset: Preset, run: Run, casts: list) -> None:
    total, active = model.parameter_counts()
    flops = 6 * active + 6 * preset.n_layers * preset.d_model * preset.seq_len
    print("  " + ", ".join(f"{k}={v}" for k, v in asdict(parse_spec(run.spec)).items()))
    print(f"  {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active a token, {flops / 1e6:.0f} MFLOP a token, "
          f"{preset.tokens_per_step} tokens a step")
    names = ", ".join(dict.fromkeys(f"{launch.cast}({launch.tensor})" for launch in casts))
    print(f"  {len(casts) // preset.n_layers} explicit casts a layer: {names or 'none'}")


def train(run: Run, preset: Preset, train_text: Tensor, val_text: Tensor, args) -> dict:
    """Train one model, from its checkpoint if there is one; write its log, weights and sample; return its table row.

    Raises Stopped when asked to stop, NotFinite, Damaged.
    """
    print(f"\n{run.spec}, seed {run.seed}")
    torch.manual_seed(run.seed)
    rng, checkpoint = torch.Generator().manual_seed(run.seed), run.folder / "checkpoint.pt"
    model = GPT(preset.config, parse_spec(run.spec)).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def micro_batch(rng) -> Tensor:
        """Adds its gradients; returns [loss, load-balancing loss], detached: what is logged must not hold the graph."""
        starts = torch.randint(len(train_text) - preset.seq_len, (preset.batch,), generator=rng)
        loss, balance = model(*batch_of(train_text, starts.to(args.device, non_blocking=True), preset.seq_len))
        ((loss + BALANCE * balance) / preset.accumulate).backward()
        return torch.stack([loss, balance]).detach()

    def save(step: int) -> None:
        if args.checkpoint == "last":
            write_safely(checkpoint, lambda path: torch.save({
                "config": run.config, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "data_rng": rng.get_state(), "torch_rng": torch.get_rng_state()}, path))

    with count_casts() as casts:                                # measured on a step that trains nothing
        micro_batch(torch.Generator().manual_seed(0))
    optimizer.zero_grad()
    describe(model, preset, run, casts)
    begin = 0
    if checkpoint.exists():
        saved = load_checkpoint(checkpoint, args.device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        rng.set_state(saved["data_rng"].cpu())
        torch.set_rng_state(saved["torch_rng"].cpu())
        begin = saved["step"]
        print(f"  goes on after step {begin} of {preset.steps}")
    run.folder.mkdir(parents=True, exist_ok=True)
    run.write(None)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if begin == 0:
        (run.folder / "probe.csv").unlink(missing_ok=True)
    clock, log, val_loss = Clock(args.device), Log(run.folder / "log.csv", preset, begin), math.nan
    timed_from, warm_seconds = begin + min(LOG_EVERY, (preset.steps - begin) // 2), 0.0
    with Stop() as stop, tqdm(total=preset.steps, initial=begin, desc=run.spec, unit="step", dynamic_ncols=True) as bar:
        clock.start()
        for step in range(begin, preset.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, preset)
            losses = torch.stack([micro_batch(rng) for _ in range(preset.accumulate)]).mean(0)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            log.add(step, losses, norm, model)
            bar.update()
            done = step + 1
            validating = done % preset.val_every == 0 or done == preset.steps
            probing = args.probe and done % args.probe == 0
            if not (validating or probing or stop.asked or done % LOG_EVERY == 0 or done == timed_from):
                continue
            elapsed = clock.stop()
            warm_seconds = clock.seconds if done == timed_from else warm_seconds
            val_loss = validate(model, val_text, preset) if validating else val_loss
            loss, speed, bad = log.flush(elapsed, val_loss if validating else math.nan)
            bar.set_postfix(loss=f"{loss:.3f}", val=f"{val_loss:.3f}", tok_s=f"{speed:,.0f}")
            if bad is not None:
                broken = [name for name, p in model.named_parameters() if not p.isfinite().all()] or ["no weight yet"]
                raise NotFinite(f"{run.spec}, seed {run.seed}: loss or gradient norm of step {bad} is not finite, "
                                f"first in {broken[0]}; lower --lr. The checkpoint before it is kept")
            if probing:
                probe(model, micro_batch, done, run.folder / "probe.csv")
                optimizer.zero_grad()
            if done < preset.steps and (validating or stop.asked):
                save(done)
            if stop.asked and done < preset.steps:
                raise Stopped(f"{stop.asked} after step {done} of {preset.steps} of {run.spec}, seed {run.seed}")
            clock.start()
    log.file.close()
    row = dict(recipe=run.spec, casts=len(casts) // preset.n_layers, val_loss=val_loss, seed=run.seed,
               tokens_per_s=(preset.steps - timed_from) * preset.tokens_per_step / (clock.seconds - warm_seconds),
               peak_mem_gb=torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else math.nan)
    finish(run, model, row, args)
    if stop.asked:
        raise Stopped(f"{stop.asked} when {run.spec}, seed {run.seed} was done")
    return row


def finish(run: Run, model: GPT, row: dict, args) -> None:
    """The weights first: nothing that fails after training may cost them."""
    if args.checkpoint == "last":
        weights = {"spec": run.spec, "model_config": asdict(model.config), "model": model.state_dict()}
        write_safely(run.folder / "model.pt", lambda path: torch.save(weights, path))
    run.write(row)
    (run.folder / "checkpoint.pt").unlink(missing_ok=True)
    (run.folder / "sample.txt").write_bytes(model.generate(b"def ", 200, run.seed))
    print(f"  val loss {row['val_loss']:.4f}, {row['tokens_per_s']:,.0f} tokens/s; written to {run.folder}")


def load_checkpoint(path: Path, device: str) -> dict:
    """Raises Damaged: torch.save writes a zip file, whose directory stands at the end."""
    if not zipfile.is_zipfile(path):
        raise Damaged(f"{str(path)!r} is damaged: delete it to start over")
    return torch.load(path, map_location=device, weights_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# comparison

HEADER = ["recipe", "casts", "val_loss", "delta_pct", "tokens_per_s", "speedup", "peak_mem_gb"]
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
         2.120, 2.110, 2.101, 2.093, 2.086)     # Student's t, two-sided 95%, for 1, 2, ... 20 degrees of freedom


def table(rows: list[dict]) -> list[list[str]]:
    """compare.csv's cells; delta and speed-up are against bf16 on the same seed, nan where it did not run."""
    cells = []
    for row in rows:
        base = next((r for r in rows if r["recipe"] == "bf16" and r["seed"] == row["seed"]), {})
        delta = 100 * (row["val_loss"] / base.get("val_loss", math.nan) - 1)
        speedup = row["tokens_per_s"] / base.get("tokens_per_s", math.nan)
        cells.append([row["recipe"], str(row["casts"]), f"{row['val_loss']:.4f}", f"{delta:+.3f}",
                      f"{row['tokens_per_s']:.0f}", f"{speedup:.3f}", f"{row['peak_mem_gb']:.2f}"])
    return cells


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of its 95% interval) by Student's t; the half is nan for one value."""
    deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
    t = T_975[min(max(len(values) - 2, 0), len(T_975) - 1)]
    return statistics.mean(values), t * deviation / len(values) ** 0.5


def summary(rows: list[dict]) -> list[str]:
    """Means over the seeds, and the paired differences to bf16."""
    lines, base = [], {row["seed"]: row for row in rows if row["recipe"] == "bf16"}
    for spec in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == spec]
        mean, half = interval([row["val_loss"] for row in mine])
        line = f"  {spec:36} val loss {mean:.4f} over {len(mine)} seeds"
        pairs = [100 * (row["val_loss"] / base[row["seed"]]["val_loss"] - 1) for row in mine if row["seed"] in base]
        if spec == "bf16":
            line += f", 95% interval of the mean +-{half:.4f} ({100 * half / mean:.2f}%)"
        elif pairs:
            delta, half = interval(pairs)
            line += f", {delta:+.3f}% of bf16, 95% interval {delta - half:+.3f}% to {delta + half:+.3f}%"
        lines.append(line)
    return lines


def compare(runs: list[Run], preset: Preset, train_text: Tensor, val_text: Tensor, args) -> int:
    """Train what is not finished yet; write the table after each run. Returns how many failed."""
    rows, failures = [], 0
    for run in runs:
        found = read_run(run.folder / "run.json")
        if found and found["row"]:
            print(f"\n{run.spec}, seed {run.seed}: finished before, reused from {run.folder}")
            rows.append(found["row"])
        else:
            try:
                rows.append(train(run, preset, train_text, val_text, args))
            except NotFinite as error:
                print(f"train.py: {error}", file=sys.stderr)
                failures += 1
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
        lines = [HEADER + ["seed"] * args.many]                         # after each run: what is done is on disk
        lines += [cells + [str(row["seed"])] * args.many for row, cells in zip(rows, table(rows))]
        text = "".join(",".join(f'"{cell}"' if "," in cell else cell for cell in line) + "\r\n" for line in lines)
        write_safely(args.out / "compare.csv", lambda path: path.write_text(text, newline=""))
    lines = [f"{cells[0]:>36}" + "".join(f"{cell:>14}" for cell in cells[1:]) for cells in [HEADER, *table(rows)]]
    chaos = ["  One seed: differences of this size are chaos, not evidence; --seeds gives intervals."]
    print("", *lines, "", *(summary(rows) if args.many else chaos), sep="\n")
    if args.ablate:
        print("  The order of the rungs decides which of them gets the credit for what two do together.")
    draw_losses([run for run in runs if (run.folder / "log.csv").exists()], args.out)
    print(f"written to {args.out}")
    return failures


def draw_losses(runs: list[Run], out: Path) -> None:
    """The curves, and below them the smoothed difference to bf16 on the same seed: the curves themselves coincide."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def smooth(curve: list[float], window: int) -> list[float]:
        return [statistics.mean(curve[max(0, i - window + 1):i + 1]) for i in range(len(curve))]
    losses = {(run.spec, run.seed): [float(row["loss"]) for row in read_log(run.folder / "log.csv")] for run in runs}
    figure, (above, below) = plt.subplots(2, figsize=(7, 6), sharex=True, layout="constrained", height_ratios=(2, 1))
    for color, spec in enumerate(dict.fromkeys(spec for spec, _ in losses)):
        curves = {seed: curve for (name, seed), curve in losses.items() if name == spec}
        window = max(1, min(map(len, curves.values())) // 20)
        mean = [statistics.mean(step) for step in zip(*curves.values())]
        above.plot(mean, label=spec, linewidth=1, color=f"C{color}")
        pairs = [[100 * (a / b - 1) for a, b in zip(smooth(curve, window), smooth(losses["bf16", seed], window))]
                 for seed, curve in curves.items() if ("bf16", seed) in losses]
        if pairs and spec != "bf16":
            bands = [interval(list(step)) for step in zip(*pairs)]
            below.plot([m for m, _ in bands], linewidth=1, color=f"C{color}")
            if len(pairs) > 1:
                below.fill_between(range(len(bands)), [m - h for m, h in bands], [m + h for m, h in bands], alpha=0.2,
                                   color=f"C{color}", linewidth=0)
    above.set(ylabel="training loss (nats a byte)")
    above.legend()
    below.set(xlabel="step", ylabel="difference to bf16, %")
    below.axhline(0, color="gray", linewidth=0.5)
    write_safely(out / "loss.png", lambda path: figure.savefig(path, dpi=150, format="png"))
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# command line

def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False, description=(
        "Train a small MoE GPT in BF16, naive FP8 or casting-free FP8. A SPEC is a recipe (bf16, naive, flow) and the "
        "switches that differ from it: flow,swiglu=unfused."))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--recipe", metavar="SPEC", help="train this (default: flow)")
    what.add_argument("--compare", nargs="*", metavar="SPEC",
                      help="train these on the same seeds and batches (default: bf16 naive flow)")
    what.add_argument("--ablate", action="store_true", help="compare the steps from naive to flow")
    what.add_argument("--sample", metavar="OUT/SPEC", help="continue --prompt with a model that was trained")
    parser.add_argument("--prompt", default="def ", help="the text that --sample continues (default: %(default)r)")
    parser.add_argument("--preset", choices=PRESETS, help="default: h100; small below 40 GB, tiny without a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--data", metavar="PATH", help="a text file or folder (default: torch's own Python source)")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--seeds", metavar="N|A,B,..", help="several: 3 is 0, 1, 2; 0,5 is 0 and 5")
    parser.add_argument("--out", metavar="DIR", help="where everything goes (default: the next free out/N)")
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds")
    parser.add_argument("--overwrite", action="store_true", help="clear the runs that --out holds")
    parser.add_argument("--checkpoint", choices=("last", "none"), default="last",
                        help="last: keep the newest while training and the weights at the end; none: neither")
    parser.add_argument("--probe", type=int, metavar="N", help="every N steps look at each layer's tensors: probe.csv")
    parser.add_argument("--deterministic", action="store_true",
                        help="repeat bit for bit on a GPU too: the experts always do, attention's backward only so")
    switches = parser.add_argument_group("switches of a plain --recipe")
    for name, choices in CHOICES.items():
        switches.add_argument(f"--{name}", choices=choices)
    sizes = parser.add_argument_group("sizes, over those of the preset")
    for field in fields(Preset):
        if field.name != "vocab":                           # bytes are bytes
            sizes.add_argument("--" + field.name.replace("_", "-"), type=field.type)
    args = parser.parse_args(argv)
    args.parser = parser
    return args


def specs_of(args) -> list[str]:
    """What to train. Raises ValueError."""
    flipped = {name: getattr(args, name) for name in CHOICES if getattr(args, name) is not None}
    if args.ablate or args.compare is not None:
        if flipped:
            raise ValueError(f"--{next(iter(flipped))} is for one run: write it into a spec, as in --compare "
                             f"flow,{'='.join(next(iter(flipped.items())))}")
        specs = list(LADDER) if args.ablate else args.compare or list(RECIPES)
    else:
        spec = args.recipe or "flow"
        if flipped and "," in spec:
            raise ValueError(f"--recipe {spec} has switches already: write --{next(iter(flipped))} into it")
        specs = [",".join([spec, *(f"{name}={value}" for name, value in flipped.items())])]
    recipes = [parse_spec(spec) for spec in specs]
    for i, recipe in enumerate(recipes):
        if recipe in recipes[:i]:
            raise ValueError(f"--compare {specs[i]} is the same as {specs[recipes.index(recipe)]}: give it once")
    return specs


def seeds_of(args) -> list[int]:
    try:
        given = args.seeds if args.seeds is not None else str(args.seed or 0)
        seeds = [int(seed) for seed in given.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {args.seeds!r} is no list of seeds: give a number of them, or 0,5") from None
    if args.seeds is not None and args.seed is not None:
        raise ValueError(f"--seed {args.seed} and --seeds {args.seeds}: give one of them")
    if args.seeds is not None and len(seeds) == 1:
        if not 1 <= seeds[0] <= 1000:
            raise ValueError(f"--seeds {seeds[0]} must lie between 1 and 1000")
        seeds = list(range(seeds[0]))
    for seed in seeds:
        if not 0 <= seed < 2 ** 63:
            raise ValueError(f"--seed {seed} must lie between 0 and 2^63 - 1")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {args.seeds} names a seed twice: give it once")
    return seeds


def preset_of(args) -> tuple[str, Preset]:
    """The preset for this machine, with what the command line changes. Raises ValueError."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    memory = torch.cuda.get_device_properties(0).total_memory if args.device == "cuda" else \
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = "h100" if memory > 40e9 else "small"
    if args.device == "cpu" or not kernels.use_kernels(torch.empty(0, device=args.device)):
        fits = "tiny"                                       # the twins
    if args.probe is not None and args.probe < 1:
        raise ValueError(f"--probe {args.probe} must be at least 1: the steps between two looks")
    name = args.preset or fits
    changed = {f.name: getattr(args, f.name) for f in fields(Preset) if getattr(args, f.name, None) is not None}
    preset = replace(PRESETS[name], **changed)
    layer = 4 * preset.d_model ** 2 + 3 * preset.n_experts * preset.d_model * preset.d_expert
    needed = 16 * (preset.n_layers * layer + 2 * preset.vocab * preset.d_model)     # fp32: weight, gradient, moments
    if needed > memory:
        raise ValueError(f"n_layers={preset.n_layers}, d_model={preset.d_model}, d_expert={preset.d_expert}, n_experts="
                         f"{preset.n_experts}: weights and optimizer need {needed / 1e9:,.0f} GB, "
                         f"{args.device} has {memory / 1e9:,.0f} GB: make it smaller")
    if PRESETS[name].d_model > PRESETS[fits].d_model:
        print(f"warning: preset {name} is made for a larger machine than this: {fits} fits", file=sys.stderr)
    return name, preset


def out_of(args) -> Path | None:
    """--out as a folder that can be written, None for the next free one. Raises ValueError."""
    if args.out is None and (args.resume or args.overwrite):
        raise ValueError(f"--{'resume' if args.resume else 'overwrite'} needs --out: name the folder")
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with what --overwrite clears: give one of them")
    out = Path("out" if args.out is None else args.out)
    parent = next(p for p in (out, *out.absolute().parents) if p.exists() or p.is_symlink())
    if args.out == "" or not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out {str(out) if args.out else ''!r} cannot be written: name a folder of yours")
    if args.data and Path(args.data).is_dir() and out.resolve().is_relative_to(Path(args.data).resolve()):
        raise ValueError(f"--out {str(out)!r} lies inside --data: what a run writes would be data, name another folder")
    return None if args.out is None else out


def next_free(parent: Path) -> Path:
    """parent/1, parent/2, ...: the first that is not there, made."""
    for folder in (parent / str(number) for number in itertools.count(1)):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def lock(out: Path):
    """A file whose lock is held while this process lives. Raises ValueError if another has it."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {str(out)!r}: another process trains there; name another folder") from None
    return file


def clear(out: Path) -> None:
    """Remove the runs in `out` and what was drawn from them, and nothing else."""
    for found in (*out.glob("*/run.json"), *out.glob("seed-*/*/run.json")):
        if read_run(found):
            shutil.rmtree(found.parent)
    for name in ("compare.csv", "loss.png"):
        (out / name).unlink(missing_ok=True)


def sample(args) -> None:
    path = Path(args.sample) / "model.pt"
    if not path.is_file():
        raise ValueError(f"--sample {args.sample!r} holds no model.pt: name a run's folder, as in out/1/flow")
    if not args.prompt:
        raise ValueError("--prompt '' is empty: give at least one character")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    saved = load_checkpoint(path, device)
    model = GPT(GPTConfig(**saved["model_config"]), parse_spec(saved["spec"])).to(device)
    model.load_state_dict(saved["model"])
    text = model.generate(args.prompt.encode(), 400, args.seed or 0).decode("utf-8", "replace")
    sys.stdout.buffer.write(text.encode() + b"\n")             # whatever the locale


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        if args.sample is not None:
            sample(args)
            return 0
        specs, seeds, (name, preset), out = specs_of(args), seeds_of(args), preset_of(args), out_of(args)
        texts, what = read_corpus(args.data)
        train_text, val_text, how = split_corpus(texts, preset.seq_len)
        digest = hashlib.sha256(b"|".join(text.numpy().tobytes() for text in (train_text, val_text))).hexdigest()[:12]
        args.out, args.many = out or next_free(Path("out")), args.seeds is not None
        held = lock(args.out)
        machine = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        same = dict(asdict(preset), data=digest, source=source_hash(), torch=str(torch.__version__),
                    triton=triton.__version__, machine=machine, deterministic=args.deterministic)
        runs = [Run(spec, seed, args.out / (f"seed-{seed}" if args.many else "") / spec,
                    dict(same, spec=spec, seed=seed)) for seed in seeds for spec in specs]
        for run in runs:
            check_folder(run, args.resume, args.overwrite)
        if args.overwrite:
            clear(args.out)
    except ValueError as error:
        args.parser.error(str(error))
    twins = "" if kernels.use_kernels(torch.empty(0, device=args.device)) else " (PyTorch twins, slowly)"
    print(f"torch {torch.__version__}, triton {triton.__version__}, {machine}{twins}; writing to {args.out}")
    print(f"preset {name}: " + ", ".join(f"{k}={v}" for k, v in asdict(preset).items()))
    print(f"data: {what}, {sum(map(len, texts)):,} bytes, sha256 {digest}, {how}")
    pairs, triples = (table_loss(train_text, val_text, order) for order in (1, 2))
    print(f"on the validation text a table of byte pairs reaches {pairs:.3f} nats, one of triples {triples:.3f}")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False         # the kernels write what they read
    try:
        failures = compare(runs, preset, train_text.to(args.device), val_text.to(args.device), args)
    except Damaged as error:
        args.parser.error(str(error))
    except Stopped as stopped:
        again = [arg for arg in argv or sys.argv[1:] if arg not in ("--resume", "--overwrite")] + ["--resume"]
        again += [] if out else ["--out", str(args.out)]
        print(f"train.py: stopped by {stopped}; go on with: python train.py {shlex.join(again)}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("train.py: stopped at once; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        held.close()
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
