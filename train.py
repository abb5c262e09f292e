"""Train a small MoE GPT on text: one recipe, or several on the same seeds and batches.

    python train.py --compare                               bf16, naive, flow: one table
    python train.py --ablate                                from naive to flow a switch at a time, and one step back
    python train.py --compare --seeds 3                     seeds 0, 1, 2: means, differences with their intervals
    python train.py --recipe flow,swiglu=unfused            one run, named by its spec
    python train.py --resume --out out/1 ...                go on where a run was stopped
    python train.py --sample out/1/flow --prompt "def "     continue a text

Bytes are tokens. A run writes OUT/SPEC/log.csv (a row a step), model.pt (fp32 weights), sample.txt and run.json, then
OUT/compare.csv and loss.png; with --seeds SPEC lies in OUT/seed-N/. Without --out, OUT is the next free out/N.
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
import re
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
from fp8flow import (CHOICES, RECIPES, Plan, Recipe, column_wise, count_casts, parse_spec, permute, spread,
                     torch_grouped_mm)
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
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr} must be positive and finite")

    tokens_per_step = property(lambda self: self.batch * self.accumulate * self.seq_len)


PRESETS = {
    "tiny": Preset(n_layers=1, d_model=128, n_heads=4, d_expert=128, n_experts=4, top_k=2, seq_len=128, batch=8,
                   accumulate=1, steps=300, lr=4e-3, val_every=150, val_batches=64),
    "small": Preset(n_layers=4, d_model=1024, n_heads=8, d_expert=1024, n_experts=8, top_k=2, seq_len=512, batch=32,
                    accumulate=1, steps=1200, lr=8e-4, val_every=400, val_batches=64),
    "h100": Preset(n_layers=3, d_model=2048, n_heads=16, d_expert=2048, n_experts=16, top_k=4, seq_len=1024, batch=16,
                   accumulate=2, steps=700, lr=5e-4, val_every=175, val_batches=64),
}
BALANCE = 0.1                               # weight of the load-balancing loss: runs are short, routing must even out
CLIP = 1.0                                  # largest gradient norm
WARMUP, LEVEL = 0.1, 0.2                    # shares of the steps: where the learning rate rises, and where it is level
LOG_EVERY = 10                              # steps between reads of the loss from the device
HELD_OUT = 20                               # one byte in so many is for validation
ARMS = {"bf16-nudged": "bf16", "flow-harmed": "flow"}      # recipes that test a comparison: see `interfere`
LADDER = ("bf16", "naive", "naive,scales=pow2", "naive,transpose=direct,scales=pow2", "flow,permute=unfused", "flow",
          "flow,transpose=requant")         # and back; the paper's rows are this and the rung before flow


def recipe_of(spec: str) -> Recipe:
    return parse_spec(ARMS.get(spec, spec))


# ---- data -----------------------------------------------------------------------------------------------------------

def read_corpus(path: str | None) -> tuple[list[bytes], str]:
    """The texts of a file, of a folder's text files, or of torch's own source; and what it is. Raises ValueError."""
    own = path is None                                          # version.py differs between the builds of one version
    root = Path(torch.__file__).parent if own else Path(path)
    if path == "" or not os.path.exists(root):
        raise ValueError(f"--data {path!r} does not exist: name a text file or a folder of them")

    def refuse(error: OSError):
        raise ValueError(f"--data: cannot read {error.filename!r} ({error.strerror}); name files you may read")
    names = [root] if os.path.isfile(root) else sorted(
        Path(folder, name) for folder, _, names in os.walk(root, onerror=refuse) for name in names
        if (name.endswith(".py") and name != "version.py" if own else not name.startswith("."))
        and os.path.isfile(os.path.join(folder, name))                              # no pipes, no dangling links
        and not any(part.startswith((".", "__pycache__")) for part in Path(folder).relative_to(root).parts))
    try:
        texts = [name.read_bytes() for name in names]
    except OSError as error:
        refuse(error)
    texts = [text for text in texts if text and (root.is_file() or b"\0" not in text)]      # binary files are no text
    if not texts:
        raise ValueError(f"--data {str(root)!r} holds no text: name a text file or a folder of them")
    return texts, f"the Python source of torch {torch.__version__.split('+')[0]}" if own else path


def split_corpus(texts: list[bytes], seq_len: int) -> tuple[Tensor, Tensor, str]:
    """(train, validation) as uint8 vectors, and how they were split. Whole files are held out, by the hash of what they
    hold: a text under two names stays on one side. Where one file is more than a twentieth, the last tenth of each."""
    if max(map(len, texts)) * HELD_OUT <= sum(map(len, set(texts))):
        order, held = sorted(set(texts), key=lambda text: (zlib.crc32(text), text)), {}
        total = sum(map(len, order))
        while sum(map(len, held)) * HELD_OUT < total:
            held[order.pop()] = True
        kept = [text for text in dict.fromkeys(texts) if text not in held]                     # in the order they came
        how = f"{len(held)} of {len(held) + len(kept)} different files held out"
    else:
        cuts = [len(text) * 9 // 10 for text in texts]
        kept, held = [t[:cut] for t, cut in zip(texts, cuts)], [t[cut:] for t, cut in zip(texts, cuts)]
        how = f"the last tenth of each of {len(texts)} file(s) held out"
    train, val = b"".join(kept), b"".join(held)
    for name, text in (("training", train), ("validation", val)):
        if len(text) <= seq_len:
            raise ValueError(f"--data is too short: {len(text)} bytes for {name}; give more than --seq-len {seq_len}")
    return *(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, val)), how


def table_loss(train: Tensor, val: Tensor, order: int) -> float:
    """Nats a byte on `val` of a table of `train`: how often each byte follows each `order` bytes, plus 0.1."""
    def context(text):
        return sum(text[i:len(text) - order + i].long() * 256 ** (order - 1 - i) for i in range(order))
    counts = torch.bincount(context(train) * 256 + train[order:], minlength=256 ** (order + 1)).view(-1, 256) + 0.1
    seen = context(val)
    return (counts.sum(1)[seen].log() - counts[seen, val[order:].long()].log()).mean().item()


def starts_of(windows: Tensor, places: int, seed: int) -> Tensor:
    """Where the windows of these numbers begin in so many places: a golden section of the text apart, so that any
    stretch of a run sees all of the text alike. `seed` says where number 0 begins."""
    return ((random.Random(seed).random() + windows.double() * (5 ** 0.5 - 1) / 2) % 1 * places).long()


def batch_of(text: Tensor, starts: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    window = text[starts[:, None] + torch.arange(seq_len + 1, device=text.device)].long()
    return window[:, :-1], window[:, 1:]


@torch.no_grad()
def validate(model: GPT, text: Tensor, preset: Preset) -> float:
    """Mean loss in nats a byte over windows spread evenly over the held-out text: the same ones every time."""
    n = preset.val_batches * preset.batch
    starts = torch.arange(n, device=text.device) * (len(text) - preset.seq_len - 1) // max(1, n - 1)
    return torch.stack([model(*batch_of(text, s, preset.seq_len))[0] for s in starts.split(preset.batch)]).mean().item()


# ---- what a run leaves on disk --------------------------------------------------------------------------------------

@dataclass
class Run:
    """One recipe on one seed, in a folder of its own. `config`: what must be equal for its results to be the same."""
    spec: str
    seed: int
    folder: Path
    config: dict

    def __str__(self) -> str:
        return f"{self.spec}, seed {self.seed}"

    checkpoint = property(lambda self: self.folder / "checkpoint.pt")

    def write(self, row: dict | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_safely(self.folder / "run.json", lambda p: p.write_text(json.dumps({"config": self.config, "row": row})))


def read_run(folder: Path) -> dict | None:
    """Its run.json, {"config", "row" (None until it has finished)}, or None where there is none of ours."""
    try:
        found = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() == {"config", "row"} else None


def write_safely(path: Path, write) -> None:
    """Written beside it, then renamed: a full disk or a kill in the middle leaves what was there."""
    beside = path.with_name(path.name + ".new")
    beside.unlink(missing_ok=True)                              # what a kill left
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def runs_in(out: Path) -> dict[Path, dict]:
    """The run.json of every run in `out`, with and without a folder for its seed."""
    return {folder: found for folder in (*out.glob("*"), *out.glob("seed-*/*")) if (found := read_run(folder))}


def check_same(folder: Path, there: dict, now: dict, resume: bool) -> None:
    """Raises ValueError unless a run in `out` belongs to what is asked. `resume` lets edits pass: `now` gets both."""
    different = [f"{key} ({there.get(key)!r} there, {now.get(key)!r} now)" for key in sorted({*there, *now})
                 if there.get(key) != now.get(key) and not (resume and key == "source")]
    if different:
        raise ValueError(f"--out: {str(folder)!r} has another {', '.join(different)}: --overwrite it or name another")
    if there["source"] != now["source"]:
        print(f"warning: the source was edited since {folder} was begun", file=sys.stderr)
        now["source"] = "+".join(dict.fromkeys([*there["source"].split("+"), now["source"]]))


def check_folder(run: Run, resume: bool, overwrite: bool) -> None:
    """Raises ValueError where what lies in the run's folder may not be continued or replaced."""
    found = read_run(run.folder)
    if found is None and os.path.lexists(run.folder) and (not run.folder.is_dir() or any(run.folder.iterdir())):
        raise ValueError(f"--out: {str(run.folder)!r} holds files of something else: name another")
    if found and found["row"] is None and not resume and not overwrite:
        raise ValueError(f"--out: {str(run.folder)!r} holds an unfinished run: go on with --resume, or --overwrite it")
    if resume and run.checkpoint.exists() and not zipfile.is_zipfile(run.checkpoint):
        raise ValueError(f"{str(run.checkpoint)!r} is damaged: delete it to start over")


def source_hash() -> str:
    names = ("kernels.py", "fp8flow.py", "model.py", "train.py")
    return hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in names)).hexdigest()[:12]


def append(path: Path, rows: list[dict]) -> None:
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


class Log:
    """log.csv, and the time of training. `pending`: (step, numbers on the device: to read them makes the host wait)."""

    def __init__(self, path: Path, preset: Preset, device: str):
        self.path, self.preset, self.device, self.pending = path, preset, device, []

    def lap(self) -> float:
        """Seconds since the last call, with the work that was queued."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        before, self.time = getattr(self, "time", 0.0), time.perf_counter()
        return self.time - before

    def tokens_per_s(self) -> float:
        """The median over all steps: the first ones compile."""
        rows = csv.DictReader(self.path.read_text().splitlines())
        return statistics.median(float(row["tokens_per_s"]) for row in rows)

    def write(self, model: GPT, seconds: float, val_loss: float) -> float:
        """The pending steps, which took `seconds`, the last with `val_loss`; its loss. Raises FloatingPointError."""
        names = ["gradient norm", *(f"gradient of {name}" for name, _ in model.named_parameters())]
        speed, rows = f"{len(self.pending) * self.preset.tokens_per_step / seconds:.1f}", []
        for step, values in self.pending:
            loss, balance, norm, bad, *load = values.tolist()
            broken = "loss" if not math.isfinite(loss) else "" if math.isfinite(norm) else names[-1 - int(bad)]
            rows.append(dict(step=step, loss=f"{loss:.6f}", val_loss=math.nan, tokens_per_s=speed,
                             lr=f"{learning_rate(step, self.preset):.3e}", grad_norm=f"{norm:.4f}", not_finite=broken,
                             balance=f"{balance:.4f}", **{f"load_{e}": f"{x:.4f}" for e, x in enumerate(load)}))
        rows[-1]["val_loss"] = f"{val_loss:.6f}"
        append(self.path, rows)
        self.pending.clear()
        for row in rows:
            if row["not_finite"]:
                raise FloatingPointError(f"the {row['not_finite']} of step {row['step']} is not finite; lower --lr")
        return loss


# ---- the probe: what quantization and the transpose do to the four tensors of every layer ---------------------------

def four_tensors(experts, x: Tensor, probs: Tensor, plan: Plan, dy: Tensor) -> dict[str, Tensor]:
    """X, A, dY, dH of one expert layer in bf16, [M, ...], zeros in the padding."""
    w1, w2, flow = experts.w1.detach().bfloat16(), experts.w2.detach().bfloat16(), RECIPES["flow"]
    x, dy, prob = permute(x.detach(), plan, flow), permute(dy, plan, flow), spread(probs.detach(), plan)
    h = torch_grouped_mm(x, w1.mT, plan.ends)
    a = kernels.swiglu(h, prob, plan.tile_expert)
    dh, _ = kernels.swiglu_backward(torch_grouped_mm(dy, w2, plan.ends), h, prob, plan.tile_expert)
    return {n: torch.where(plan.pair[:, None] >= 0, t, 0) for n, t in dict(X=x, A=a, dY=dy, dH=dh).items()}


def look_at(t: Tensor, plan: Plan) -> dict[str, float]:
    """amax; the widest spread of row scales in a 128x128 tile, in binades; the share of elements that underflow in the
    direct transpose; SQNR in dB of the direct and of the requantizing transpose against t."""
    q, live = kernels.quantize(t), plan.pair >= 0
    scales = q.scale.log2().unflatten(1, (-1, kernels.BLOCK))
    filled = q.scale.unflatten(1, (-1, kernels.BLOCK)) > kernels.SCALE_MIN
    widest = torch.where(filled, scales, -math.inf).amax(2) - torch.where(filled, scales, math.inf).amin(2)
    direct, requantized = (kernels.dequantize(column_wise(q, plan, parse_spec(spec))).t()[live]
                           for spec in ("flow", "flow,transpose=requant"))
    t, once = t[live], kernels.dequantize(q)[live]
    return dict(amax=t.abs().max().item(), binades=max(0.0, widest.max().item()),
                underflow=(((direct == 0) & (once != 0)).sum() / (t != 0).sum().clamp(min=1)).item(),
                sqnr_direct=kernels.sqnr(direct, t), sqnr_requant=kernels.sqnr(requantized, t))


def probe(trainer) -> list[dict]:
    """One extra micro-batch, whose gradients are dropped; a row for each layer and tensor."""
    seen = []
    def look(experts, inputs, y):
        y.register_hook(lambda dy: seen.append((experts, *inputs, dy)))
    hooks = [moe.experts.register_forward_hook(look) for moe in trainer.model.moes]
    trainer.micro_batch()
    trainer.optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    return [dict(step=trainer.step, layer=layer, tensor=name, **look_at(t, inputs[2]))
            for layer, (experts, *inputs) in enumerate(reversed(seen))      # backward comes to the last layer first
            for name, t in four_tensors(experts, *inputs).items()]


# ---- one run --------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def stop_signals():
    """A list of the signals heard: a first Ctrl-C, SIGTERM or SIGHUP ends the run after its step, a second at once."""
    def hear(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
    asked, signals = [], (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {s: signal.signal(s, hear) for s in signals if signal.getsignal(s) != signal.SIG_IGN}     # as nohup does
    before[signal.SIGPIPE] = signal.signal(signal.SIGPIPE, signal.SIG_IGN)                  # see the bar in `train`
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def learning_rate(step: int, preset: Preset) -> float:
    """Up in a line, down in a cosine, level at 1% of the peak: at the end of a run its loss means something."""
    warmup, level = max(1, round(WARMUP * preset.steps)), (1 - LEVEL) * preset.steps
    down = 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, step - warmup) / max(1.0, level - warmup)))
    return preset.lr * min((step + 1) / warmup, max(0.01, down))


def interfere(model: GPT, spec: str) -> None:
    """The arms that test a comparison itself. bf16-nudged: one weight of the first router, fp32 in every recipe, moves
    by one unit in the last place. flow-harmed: every other expert of every layer gets no gradient."""
    if spec == "bf16-nudged":
        weight = model.moes[0].router.weight.detach()[0, :1]
        weight.copy_(weight.nextafter(torch.full_like(weight, math.inf)))
    if spec == "flow-harmed":
        for w in (w for moe in model.moes for w in moe.experts.parameters()):
            w.register_hook(lambda grad: grad * (torch.arange(len(grad), device=grad.device) % 2)[:, None, None])


class Trainer:
    """A run in progress, what its checkpoint holds: model, optimizer, generator and the number of steps done."""

    def __init__(self, run: Run, preset: Preset, text: Tensor, args):
        self.run, self.preset, self.text, self.device, self.step = run, preset, text, args.device, 0
        torch.manual_seed(run.seed)
        self.model = GPT(preset, recipe_of(run.spec)).to(args.device)
        interfere(self.model, run.spec)
        for block in self.model.blocks if args.compile else ():
            block.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def micro_batch(self, i: int = 0) -> Tensor:
        """Adds the gradients of the step's micro-batch i; returns [loss, load-balancing loss], free of the graph."""
        first = (self.step * self.preset.accumulate + i) * self.preset.batch
        windows = torch.arange(first, first + self.preset.batch, device=self.device)
        starts = starts_of(windows, len(self.text) - self.preset.seq_len, self.run.seed)
        loss, balance = self.model(*batch_of(self.text, starts, self.preset.seq_len))
        ((loss + BALANCE * balance) / self.preset.accumulate).backward()
        return torch.stack([loss, balance]).detach()

    def train_step(self) -> Tensor:
        """[loss, load-balancing loss, gradient norm, the last weight whose gradient is not finite (its place from the
        end, -1: none), each expert's share of the last micro-batch], still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.preset)
        losses = torch.stack([self.micro_batch(i) for i in range(self.preset.accumulate)]).mean(0)
        norms = torch.stack([p.grad.norm() for p in self.model.parameters()])
        norm, bad = norms.norm(), norms.isfinite().logical_not().flip(0).int()
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), CLIP, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        load = torch.stack([moe.load for moe in self.model.moes]).mean(0)
        return torch.cat([losses, norm[None], (bad.argmax() - 1 + bad.max())[None], load])

    def save(self) -> None:
        write_safely(self.run.checkpoint, lambda path: torch.save({
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state(),
            "step": self.step, "lengths": {f.name: f.stat().st_size for f in self.run.folder.glob("*.csv")}}, path))

    def load(self) -> None:
        """From the checkpoint, if there is one. Rows that were written after it are cut off."""
        saved = {"lengths": {}}
        if self.run.checkpoint.exists():
            saved = torch.load(self.run.checkpoint, map_location=self.device, weights_only=True)
            self.step = saved["step"]
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"].cpu())
            print(f"  goes on after step {self.step} of {self.preset.steps}")
        for path in (self.run.folder / "log.csv", self.run.folder / "probe.csv"):
            if path.exists():
                os.truncate(path, min(path.stat().st_size, saved["lengths"].get(path.name, 0)))

    def memory(self) -> dict[str, float]:
        """What the peak of the GPU's memory consists of, in GB, all gradients counted; empty on a CPU."""
        if self.device == "cpu":
            return {}
        weights = list(self.model.parameters())
        parts = {"weights": weights, "gradients": weights,
                 "optimizer": [t for state in self.optimizer.state.values() for t in state.values()],
                 "copies of weights for GEMMs": kernels.leaves(tuple(moe.experts.operands for moe in self.model.moes))}
        sizes = {name: sum(t.nbytes for t in tensors) / 1e9 for name, tensors in parts.items()}
        return sizes | {"activations and the rest": torch.cuda.max_memory_allocated() / 1e9 - sum(sizes.values())}


def train(run: Run, preset: Preset, train_text: Tensor, val_text: Tensor, args, stop: list) -> dict:
    """Train one model, from its checkpoint if any; its table row. Raises KeyboardInterrupt, FloatingPointError."""
    print(f"\n{run}")
    trainer = Trainer(run, preset, train_text, args)
    with count_casts() as casts:                                    # measured on a micro-batch that trains nothing
        trainer.micro_batch()
    trainer.optimizer.zero_grad()
    (total, active), names = trainer.model.parameter_counts(), [f"{launch.cast}({launch.tensor})" for launch in casts]
    print(f"  {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M for a token; {preset.tokens_per_step} tokens a step; "
          f"{len(casts) // preset.n_layers} explicit casts a layer: {', '.join(dict.fromkeys(names)) or 'none'}")
    run.write(None)
    trainer.load()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    log, val_loss = Log(run.folder / "log.csv", preset, args.device), math.nan
    with tqdm(total=preset.steps, initial=trainer.step, desc=run.spec, unit="step", dynamic_ncols=True,
              disable=sys.stderr is None) as bar:
        log.lap()
        while trainer.step < preset.steps:
            log.pending.append((trainer.step, trainer.train_step()))
            due = what_is_due(trainer.step, preset, args, stopping := bool(stop))
            if due:
                seconds, new = log.lap(), math.nan                  # what is due is no training time
                if "validation" in due:
                    new = val_loss = validate(trainer.model, val_text, preset)
                loss = log.write(trainer.model, seconds, new)
                if "probe" in due:
                    append(run.folder / "probe.csv", probe(trainer))
                if "checkpoint" in due:
                    trainer.save()
                bar.set_postfix(loss=f"{loss:.3f}", val=f"{val_loss:.3f}", refresh=False)
                log.lap()
            with contextlib.suppress(BrokenPipeError):              # Ctrl-C ends the `tee` that reads this, too
                bar.update()
            if stopping and trainer.step < preset.steps:
                raise KeyboardInterrupt(f"stopped by {stop[0]} after step {trainer.step} of {preset.steps} of {run}")
    if not math.isfinite(val_loss):
        raise FloatingPointError("the validation loss after the last step is not finite; lower --lr")
    memory = trainer.memory()
    row = dict(recipe=run.spec, casts=len(casts) // preset.n_layers, val_loss=val_loss, seed=run.seed,
               tokens_per_s=log.tokens_per_s(), peak_mem_gb=sum(memory.values()) or math.nan)
    finish(trainer, row, args)
    print(f"  val loss {val_loss:.4f}, {row['tokens_per_s']:,.0f} tokens/s; in {run.folder}")
    print("".join(f"  {size:6.2f} GB {name}\n" for name, size in memory.items()), end="")
    return row


def what_is_due(step: int, preset: Preset, args, stopping: bool) -> set[str]:
    """What comes after so many steps: "log", "validation", "probe", "checkpoint"."""
    last = step == preset.steps
    due = {"validation"} if last or step % preset.val_every == 0 else set()
    due |= {"probe"} if args.probe and step % args.probe == 0 else set()
    due |= {"checkpoint"} if args.checkpoint == "last" and not last and (stopping or "validation" in due) else set()
    return due | {"log"} if due or stopping or step % LOG_EVERY == 0 else due


def finish(trainer: Trainer, row: dict, args) -> None:
    """The weights first: nothing that fails after training may cost them. Then the rest, and the run has finished."""
    if args.checkpoint == "last":
        weights = {"preset": asdict(trainer.preset), "config": trainer.run.config, "model": trainer.model.state_dict()}
        write_safely(trainer.run.folder / "model.pt", lambda path: torch.save(weights, path))
        with torch.compiler.set_stance("force_eager"):              # or each length of the window would compile anew
            (trainer.run.folder / "sample.txt").write_bytes(trainer.model.generate(b"def ", 200, trainer.run.seed))
    trainer.run.write(row)
    trainer.run.checkpoint.unlink(missing_ok=True)


# ---- comparison -----------------------------------------------------------------------------------------------------

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
         2.120, 2.110, 2.101, 2.093, 2.086)     # Student's t, two-sided 95%: 1, 2, ... 20 or more degrees of freedom


def table(rows: list[dict]) -> list[dict]:
    """compare.csv's rows; delta and speed-up are against bf16 on the same seed, nan where it did not run."""
    bases, cells = {row["seed"]: row for row in rows if row["recipe"] == "bf16"}, []
    for row in rows:
        base = bases.get(row["seed"], dict(val_loss=math.nan, tokens_per_s=math.nan))
        delta, speedup = 100 * (row["val_loss"] / base["val_loss"] - 1), row["tokens_per_s"] / base["tokens_per_s"]
        cells.append(dict(recipe=row["recipe"], casts=row["casts"], val_loss=f"{row['val_loss']:.4f}",
                          delta_pct=f"{delta:+.3f}", tokens_per_s=f"{row['tokens_per_s']:.0f}",
                          speedup=f"{speedup:.3f}", peak_mem_gb=f"{row['peak_mem_gb']:.2f}", seed=row["seed"]))
    return cells


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of its 95% interval) by Student's t; the half is nan for one value."""
    deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
    degrees = min(max(len(values) - 1, 1), len(T_975))
    return statistics.mean(values), T_975[degrees - 1] * deviation / len(values) ** 0.5


def summary(rows: list[dict]) -> list[str]:
    """Means over the seeds, and the paired differences to bf16, or of an arm to its recipe."""
    if len({row["seed"] for row in rows}) < 2:
        return ["  One seed: differences of this size are chaos, not evidence; --seeds gives intervals."]
    lines, losses = [], {(row["recipe"], row["seed"]): row["val_loss"] for row in rows}
    for spec in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == spec]
        mean, half = interval([row["val_loss"] for row in mine])
        line = f"  {spec:36} val loss {mean:.4f} over {len(mine)} seeds"
        base = ARMS.get(spec, "bf16")
        pairs = [100 * (r["val_loss"] / losses[base, r["seed"]] - 1) for r in mine if (base, r["seed"]) in losses]
        if spec == "bf16":
            line += f", 95% interval of the mean +-{half:.4f} ({100 * half / mean:.2f}%)"
        elif pairs:
            mean, half = interval(pairs)
            line += f"; {mean:+.3f}% of {base} in {len(pairs)}, 95% interval {mean - half:+.3f}% to {mean + half:+.3f}%"
        lines.append(line)
    return lines


def compare(runs: list[Run], preset: Preset, train_text: Tensor, val_text: Tensor, args) -> int:
    """Train what is not finished yet; the table after each run. Returns how many failed. Raises KeyboardInterrupt."""
    failures = 0
    with stop_signals() as stop:
        for run in runs:
            try:
                if (read_run(run.folder) or {}).get("row"):
                    print(f"\n{run}: finished before, reused from {run.folder}")
                else:
                    train(run, preset, train_text, val_text, args, stop)
            except FloatingPointError as error:
                print(f"train.py: {run}: {error}", file=sys.stderr)
                failures += 1
            write_table(args)
            gc.collect()                                                # one run's weights go before the next ones come
            torch.cuda.empty_cache()
            if stop and run is not runs[-1]:
                raise KeyboardInterrupt(f"stopped by {stop[0]} when {run} had ended")
    lines = table(rows := write_table(args))
    for spec, *cells in [lines[0].keys(), *map(dict.values, lines)] if lines else []:
        print(f"{spec:>36}" + "".join(f"{cell:>14}" for cell in cells))
    print("", *summary(rows), sep="\n")
    if args.ablate:
        print("  The order of the rungs decides which of them gets the credit for what two do together.")
    draw_losses([run for run in runs if (run.folder / "log.csv").exists()], args.out)
    print(f"written to {args.out}")
    return failures


def write_table(args) -> list[dict]:
    """compare.csv: what has finished in this folder, by this command or before; its rows."""
    rows = list({(r["seed"], r["recipe"]): r for run in runs_in(args.out).values() if (r := run["row"])}.values())
    rows.sort(key=lambda row: (row["seed"], [*args.specs, row["recipe"]].index(row["recipe"]), row["recipe"]))
    if rows:
        write_safely(args.out / "compare.csv", lambda path: append(path, table(rows)))
    return rows


def draw_losses(runs: list[Run], out: Path) -> None:
    """The curves, and below them the smoothed difference to bf16 on the same seed: the curves themselves coincide."""
    os.environ["MPLBACKEND"] = "Agg"                            # no window, whatever a notebook has left there
    from matplotlib.figure import Figure
    logs = {(run.spec, run.seed): (run.folder / "log.csv").read_text().splitlines() for run in runs}
    losses = {key: [float(row["loss"]) for row in csv.DictReader(lines)] for key, lines in logs.items()}
    window = max(1, min(map(len, losses.values()), default=1) // 20)                       # a twentieth of the run
    smooth = {key: torch.tensor(curve).unfold(0, window, 1).mean(1) for key, curve in losses.items()}
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for color, spec in enumerate(dict.fromkeys(spec for spec, _ in losses)):
        curves = {seed: curve for (name, seed), curve in losses.items() if name == spec}
        above.plot([statistics.mean(step) for step in zip(*curves.values())], f"C{color}", label=spec, linewidth=1)
        pairs = [(100 * (smooth[spec, seed] / smooth["bf16", seed] - 1)).tolist() for seed, curve in curves.items()
                 if len(losses.get(("bf16", seed), [])) == len(curve)]
        if pairs and spec != "bf16":
            mean, half = map(torch.tensor, zip(*(interval(list(step)) for step in zip(*pairs))))
            steps = range(window - 1, window - 1 + len(mean))
            below.plot(steps, mean, f"C{color}", linewidth=1)
            below.fill_between(steps, mean - half, mean + half, color=f"C{color}", alpha=0.2, linewidth=0)
    above.set(ylabel="training loss (nats a byte)")
    above.legend()
    below.set(xlabel="step", ylabel="difference to bf16, %")
    below.axhline(0, color="gray", linewidth=0.5)
    write_safely(out / "loss.png", lambda path: figure.savefig(path, dpi=150, format="png"))


# ---- command line ---------------------------------------------------------------------------------------------------

def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False, description=(
        "Train a small MoE GPT in BF16, naive FP8 or casting-free FP8. A SPEC is a recipe (bf16, naive, flow) and the "
        f"switches that differ from it: flow,swiglu=unfused; or one that tests a comparison: {', '.join(ARMS)}."))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--recipe", metavar="SPEC", help="train this (default: flow)")
    what.add_argument("--compare", nargs="*", metavar="SPEC", help="train these alike (default: bf16 naive flow)")
    what.add_argument("--ablate", action="store_true", help="compare the steps from naive to flow")
    what.add_argument("--sample", metavar="OUT/SPEC", help="continue --prompt with a model that was trained")
    parser.add_argument("--prompt", help="the text that --sample continues (default: 'def ')")
    parser.add_argument("--preset", choices=PRESETS, help="default: h100; small below 40 GB, tiny without a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", metavar="PATH", help="a text file or folder (default: torch's own Python source)")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--seeds", metavar="N|A,B,..", help="several: 3 is 0, 1, 2; 0,5 is 0 and 5")
    parser.add_argument("--out", metavar="DIR", help="where everything goes (default: the next free out/N)")
    before = parser.add_mutually_exclusive_group()
    before.add_argument("--resume", action="store_true", help="go on with what --out holds")
    before.add_argument("--overwrite", action="store_true", help="clear the runs that --out holds")
    parser.add_argument("--checkpoint", choices=("last", "none"), default="last", help="none: keep no weights either")
    parser.add_argument("--probe", type=int, metavar="N", help="every N steps look at each layer's tensors: probe.csv")
    parser.add_argument("--compile", action="store_true", help="torch.compile for all that is not the experts")
    parser.add_argument("--deterministic", action="store_true", help="attention's backward repeats bit for bit, too")
    switches = parser.add_argument_group("switches of a plain --recipe")
    for name, choices in CHOICES.items():
        switches.add_argument(f"--{name}", choices=choices)
    sizes = parser.add_argument_group(f"sizes, over those of the preset ({' / '.join(PRESETS)})")
    for field in fields(Preset):
        if field.name != "vocab":                           # bytes are bytes
            values = " / ".join(f"{getattr(preset, field.name)}" for preset in PRESETS.values())
            sizes.add_argument("--" + field.name.replace("_", "-"), type=field.type, metavar="N", help=values)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here; use --device cpu")
    if args.probe is not None and args.probe < 1:
        parser.error(f"--probe {args.probe} must be at least 1: the steps between two looks")
    if args.prompt == "" or args.prompt and args.sample is None:
        parser.error(f"--prompt {args.prompt!r}: give one character or more, and --sample OUT/SPEC to continue them")
    args.parser = parser
    return args


def spec_of(name: str, recipe: Recipe) -> str:
    """One spelling for each recipe: in the order of CHOICES, and only what differs from `name`."""
    switches = {key: getattr(recipe, key) for key in CHOICES}
    return ",".join([name, *(f"{k}={v}" for k, v in switches.items() if v != getattr(RECIPES[name], k))])


def specs_of(args) -> list[str]:
    """What to train. Raises ValueError."""
    flipped = {name: getattr(args, name) for name in CHOICES if getattr(args, name) is not None}
    if args.ablate or args.compare is not None:
        if flipped:
            raise ValueError(f"--{next(iter(flipped))} is for one run: write it into the specs of --compare")
        given = list(LADDER) if args.ablate else args.compare or list(RECIPES)
    else:
        spec = "flow" if args.recipe is None else args.recipe
        if flipped and "," in spec:
            raise ValueError(f"--recipe {spec} has switches already: write --{next(iter(flipped))} into it")
        given = [",".join([spec, *(f"{name}={value}" for name, value in flipped.items())])]
    meaning = {}
    for spec in given:
        recipe = spec if spec in ARMS else parse_spec(spec)
        if recipe in meaning:
            raise ValueError(f"--compare {spec} is the same as {meaning[recipe]}: give it once")
        meaning[recipe] = spec
    return [spec if spec in ARMS else spec_of(spec.split(",")[0], recipe) for recipe, spec in meaning.items()]


def seeds_of(args) -> list[int]:
    """--seed 7, --seeds 3 (0, 1, 2) or --seeds 0,5. Raises ValueError."""
    if args.seeds is not None and args.seed is not None:
        raise ValueError(f"--seed {args.seed} and --seeds {args.seeds}: give one of them")
    flag, given = ("--seed", str(args.seed or 0)) if args.seeds is None else ("--seeds", args.seeds)
    seeds = [int(seed) for seed in given.split(",")] if re.fullmatch(r"\d{1,20}(,\d{1,20})*", given) else []
    if args.seeds is not None and len(seeds) == 1:
        seeds = list(range(min(seeds[0], 1001)))
    if not 1 <= len(set(seeds)) == len(seeds) <= 1000 or max(seeds) >= 2 ** 63:
        raise ValueError(f"{flag} {given}: give how many, or different seeds from 0 to 2^63 - 1, as in 0,5")
    return seeds


def preset_of(args) -> tuple[str, Preset]:
    """The preset for this machine, with what the command line changes. Raises ValueError."""
    memory = torch.cuda.get_device_properties(0).total_memory if args.device == "cuda" else \
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    twins = args.device == "cpu" or not kernels.use_kernels(torch.empty(0, device=args.device))
    fits = "tiny" if twins else "h100" if memory > 40e9 else "small"
    name = args.preset or fits
    changed = {f.name: getattr(args, f.name) for f in fields(Preset) if getattr(args, f.name, None) is not None}
    preset = replace(PRESETS[name], **changed)
    layer = 4 * preset.d_model ** 2 + 3 * preset.n_experts * preset.d_model * preset.d_expert
    needed = 16 * (preset.n_layers * layer + 2 * preset.vocab * preset.d_model)     # fp32: weight, gradient, moments
    needed += 20 * preset.batch * (preset.seq_len * preset.d_model + preset.val_batches)        # a few activations
    if needed > memory:
        sizes = ", ".join(f"{name}={size}" for name, size in asdict(preset).items())
        raise ValueError(f"{sizes} need {needed / 1e9:,.0f} GB of {memory / 1e9:,.0f}: take less")
    if PRESETS[name].d_model > PRESETS[fits].d_model:
        print(f"warning: preset {name} is made for a larger machine than this: {fits} fits", file=sys.stderr)
    return name, preset


def out_of(args) -> Path | None:
    """--out as a folder, None for the next free one. Raises ValueError."""
    if args.out is None and (args.resume or args.overwrite):
        raise ValueError(f"--{'resume' if args.resume else 'overwrite'} needs --out: name the folder")
    if args.out == "" or args.resume and not os.path.isdir(args.out):
        raise ValueError(f"--out {args.out!r} is no folder: name one")
    out = Path(args.out or "out")
    if args.data and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(args.data)):
        raise ValueError(f"--out {str(out)!r} lies inside --data: what a run writes would be data, name another folder")
    return None if args.out is None else out


def claim(out: Path | None):
    """The folder, made, and a file whose lock is held while open. None: the next free out/N. Raises ValueError."""
    try:
        if out is None:
            out = next(free for n in itertools.count(1) if not (free := Path("out", str(n))).exists())
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / "lock", "a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {str(out)!r}: another process trains there; name another folder") from None
    except OSError as error:
        raise ValueError(f"--out {str(out)!r} cannot be written ({error.strerror}): name a folder of yours") from None
    return out, file


def sample(args) -> None:
    path = Path(args.sample) / "model.pt"
    if not args.sample or not zipfile.is_zipfile(path):                     # what torch.save writes
        raise ValueError(f"--sample {args.sample!r}: model.pt is missing or damaged, name a folder as in out/1/flow")
    saved = torch.load(path, map_location=args.device, weights_only=True)
    if saved["config"]["source"] != source_hash():
        print(f"warning: the source was edited since {args.sample} was trained", file=sys.stderr)
    model = GPT(Preset(**saved["preset"]), recipe_of(saved["config"]["spec"])).to(args.device)
    model.load_state_dict(saved["model"])
    print(model.generate(os.fsencode(args.prompt or "def "), 400, seeds_of(args)[0]).decode("utf-8", "replace"))


def main(argv=None) -> int:
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")       # a path or a sample, whatever the locale
    args = parse_args(argv)
    try:
        if args.sample is not None:
            sample(args)
            return 0
        args.specs, seeds, (name, preset), out = specs_of(args), seeds_of(args), preset_of(args), out_of(args)
        texts, what = read_corpus(args.data)
        train_text, val_text, how = split_corpus(texts, preset.seq_len)
        digest = hashlib.sha256(b"|".join(text.numpy().tobytes() for text in (train_text, val_text))).hexdigest()[:12]
        (args.out, args.lock), args.many = claim(out), args.seeds is not None       # locked until this function returns
        machine = torch.cuda.get_device_name() if args.device == "cuda" else "CPU (PyTorch twins, slowly)"
        args.same = dict(asdict(preset), data=digest, source=source_hash(), torch=str(torch.__version__),
                         triton=triton.__version__, machine=machine, deterministic=args.deterministic,
                         compile=args.compile)
        runs = [Run(spec, seed, args.out / (f"seed-{seed}" if args.many else "") / spec,
                    dict(args.same, spec=spec, seed=seed)) for seed in seeds for spec in args.specs]
        for run in runs:
            check_folder(run, args.resume, args.overwrite)
        asked = {run.folder: run.config for run in runs}
        for folder, found in runs_in(args.out).items():
            if args.overwrite:
                shutil.rmtree(folder)                           # runs, and nothing else
            else:
                check_same(folder, found["config"], asked.get(folder, found["config"] | args.same), args.resume)
        for name in ("compare.csv", "loss.png") if args.overwrite else ():
            (args.out / name).unlink(missing_ok=True)
    except ValueError as error:
        args.parser.error(str(error))
    print(f"torch {torch.__version__}, triton {triton.__version__}, {machine}; writing to {args.out}")
    print(f"preset {name}: " + ", ".join(f"{k}={v}" for k, v in asdict(preset).items()))
    print(f"data: {what}, {sum(map(len, texts)):,} bytes, sha256 {digest}, {how}")
    pairs, triples = (table_loss(train_text, val_text, order) for order in (1, 2))
    print(f"on the validation text a table of byte pairs reaches {pairs:.3f} nats, one of triples {triples:.3f}")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)                # with warn_only attention's backward would still vary
        torch.utils.deterministic.fill_uninitialized_memory = False         # the kernels write what they read
    try:
        return int(compare(runs, preset, train_text.to(args.device), val_text.to(args.device), args) > 0)
    except KeyboardInterrupt as stopped:
        again = [arg for arg in argv or sys.argv[1:] if arg not in ("--resume", "--overwrite")] + ["--resume"]
        again += [] if out else ["--out", str(args.out)]
        how = "go on" if args.checkpoint == "last" else "no checkpoint is kept, start this run over"
        print(f"{str(stopped) or 'stopped at once'}; {how} with: python train.py {shlex.join(again)}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)               # `| head` ends it without a traceback
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("train.py: stopped before the first step")
