"""Times on one GPU: every kernel, and the expert layer in every recipe.

    python -m tools.bench kernels [NAME ...]    quantize, permute, transpose, swiglu, gemm
    python -m tools.bench layer [SPEC ...]      bf16, naive, flow and the steps between them

What is compared is timed in turns, with the L2 cache flushed before each turn, so that all of it
sees the same clock and reads its inputs from memory. The layer is also timed back to back: one
recipe for a while, so that the power limit shows, and what fits into L2 stays there.
"""
import argparse
import contextlib
import csv
import gc
import itertools
import math
import statistics
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.nn.functional import grouped_mm

import fp8flow
import kernels
from kernels import BLOCK, FP8
from train import LADDER


def say(text: str) -> None:
    """A line, at once: whoever waits for minutes sees how far it has come."""
    print(text, flush=True)


# ---- the sizes -----------------------------------------------------------------------------------

class Size(NamedTuple):
    T: int                      # tokens
    D: int                      # model width
    F: int                      # expert width
    E: int                      # experts
    k: int                      # experts of a token

    def __str__(self):
        return ", ".join(f"{name} {length}" for name, length in self._asdict().items())


LAYERS = (
    Size(T=16384, D=2048, F=2048, E=8, k=2),
    Size(T=32768, D=2048, F=1024, E=32, k=4),
    Size(T=16384, D=4096, F=2048, E=16, k=4),
)
PAPER = (
    Size(T=4096, D=1280, F=1024, E=64, k=7),
    Size(T=4096, D=2048, F=1408, E=64, k=6),
    Size(T=4096, D=5120, F=1536, E=160, k=6),
    Size(T=4096, D=7168, F=2048, E=256, k=8),
)
# The layer of train.py's preset h100. Its master weights are fp32, and so are their gradients.
TRAINING = (
    Size(T=16384, D=2048, F=2048, E=16, k=4),
)
# Mixtral's experts: the widest SwiGLU that is in use. For the kernels alone.
WIDE = (
    Size(T=8192, D=4096, F=14336, E=8, k=2),
)


def name_of(size: Size) -> str:
    for name, sizes in (("layer", LAYERS), ("paper", PAPER), ("training", TRAINING),
                        ("wide", WIDE)):
        if size in sizes:
            return f"{name} {sizes.index(size) + 1}"
    raise ValueError(f"{size} is none of the sizes above")


# ---- the clock -----------------------------------------------------------------------------------

KINDS = {"GEMM": ("gemm", "cutlass", "Gemm"), "transpose": ("transpose", "requantize"),
         "SwiGLU": ("swiglu",),
         "cast": ("quantize",), "permute": ("gather_rows", "sum_rows")}    # parts of kernels' names
SHARES = (*KINDS, "other")


class Machine:
    """The GPU, and all that can be asked of nothing else."""
    device = "cuda"
    back_to_back_ms = 800       # for so long a recipe runs alone

    def __init__(self):
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")   # larger than L2
        self.memory = torch.cuda.get_device_properties("cuda").total_memory

    def in_turns(self, functions: list, rounds: int) -> list[float]:
        """Median ms of each function. All of it is queued before anything is waited for, and L2 is
        flushed before each call. Three more rounds, which do not count, warm up."""
        turns = []              # of each round, and in it of each function: begin and end
        for _ in range(rounds + 3):
            turns.append([])
            for function in functions:
                begin = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                self.flush.zero_()
                begin.record()
                function()
                end.record()
                turns[-1].append((begin, end))
        torch.cuda.synchronize()
        medians = []
        for turns_of_one in zip(*turns[3:]):
            times = [begin.elapsed_time(end) for begin, end in turns_of_one]
            medians.append(statistics.median(times))
        return medians

    def back_to_back(self, function, expected_ms: float) -> float:
        """Median ms of the function, called again and again. The first half does not count: the
        chip needs a while to reach its power limit."""
        calls = 10 + math.ceil(self.back_to_back_ms / expected_ms)
        marks = []
        for _ in range(calls + 1):
            marks.append(torch.cuda.Event(enable_timing=True))
        marks[0].record()
        for mark in marks[1:]:
            function()
            mark.record()
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)]
        return statistics.median(times[calls // 2:])

    def as_graphs(self, steps: list) -> list:
        """For each step a function that does the same without the host: Python would be slower than
        some of the kernels. The graphs share their memory, since no two of them run at the same
        time and nobody reads what they return."""
        pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()
        replays = []
        for step in steps:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):       # Compiles, and makes the workspaces of libraries.
                step()
                step()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                step()
            replays.append(graph.replay)
        return replays

    def ms_by_kind(self, step, steps: int = 4) -> dict[str, float]:
        """GPU time of one step by kind of kernel, from the profiler."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(steps):
                step()
            torch.cuda.synchronize()
        shares = dict.fromkeys(SHARES, 0.0)
        for event in profiler.key_averages():
            shares[kind_of(event.key)] += event.self_device_time_total / 1e3 / steps
        return shares

    def megabytes_held(self, forward) -> float:
        """What a forward pass leaves in memory for its backward, besides its inputs and output."""
        before = torch.cuda.memory_allocated()
        y = forward()
        return (torch.cuda.memory_allocated() - before - y.nbytes) / 1e6

    def free(self) -> None:
        """Gives back what nobody holds any more, so that the next size finds it in one piece."""
        gc.collect()
        torch.cuda.empty_cache()


def kind_of(kernel: str) -> str:
    for kind, parts in KINDS.items():
        if any(part in kernel for part in parts):
            return kind
    return "other"


# ---- routing -------------------------------------------------------------------------------------

def route(size: Size, routing: str, device: str) -> Tensor:
    """top_k_index [T, k].

    random    every token chooses any k experts
    balanced  every expert has the same share of the pairs, to within one
    skewed    expert 0 has four times its share (or all tokens, if they are fewer), the others what
              is left
    """
    torch.manual_seed(1)
    if routing == "balanced":
        pair = torch.arange(size.T * size.k, device=device).view(size.T, size.k)
        return (pair % size.E)[torch.randperm(size.T, device=device)]
    scores = torch.rand(size.T, size.E, device=device)
    if routing == "skewed":
        crowd = min(size.T, 4 * size.T * size.k // size.E)
        scores[:, 0] = -1                       # below, then above, whatever the others have
        scores[torch.randperm(size.T, device=device)[:crowd], 0] = 2
    return scores.topk(size.k, dim=-1).indices


# ---- bench kernels -------------------------------------------------------------------------------

class Bench:
    """Prints a line a kernel: us, GB/s or TFLOPS, the share of the ceiling that was measured in the
    same run, and the speed-up over what does the same otherwise."""
    rounds = 100

    def __init__(self, machine: Machine, repeat: int, write):
        self.machine = machine
        self.repeat = repeat
        self.write = write                      # takes a row of the csv file
        self.ceiling = {}

    def measure_ceilings(self) -> None:
        x = torch.empty(1 << 30, dtype=torch.uint8, device=self.machine.device)
        y = torch.empty_like(x)
        a = torch.randn(8192, 8192, device=self.machine.device, dtype=torch.bfloat16)
        q = a.to(FP8)
        one = torch.ones((), device=self.machine.device)

        def copy():
            y.copy_(x)

        def bf16():
            a @ a

        def fp8():
            torch._scaled_mm(q, q.t(), one, one, out_dtype=a.dtype, use_fast_accum=False)

        copy_ms, bf16_ms, fp8_ms = self.machine.in_turns([copy, bf16, fp8], self.rounds)
        operations = 2 * 8192 ** 3
        self.ceiling["GB/s"] = 2 * x.nbytes / copy_ms / 1e6
        self.ceiling["TFLOPS"] = operations / fp8_ms / 1e9
        say(f"ceilings: copy {self.ceiling['GB/s']:.0f} GB/s; 8192^3 in FP8 "
            f"{self.ceiling['TFLOPS']:.0f} TFLOPS (torch._scaled_mm, one scale, fast accumulation "
            f"off), in bf16 {operations / bf16_ms / 1e9:.0f} TFLOPS")

    def start(self, size: Size) -> None:
        self.size = size
        say(f"\n{name_of(size)}: {size}")

    def line(self, name: str, function, work: int, unit: str = "GB/s", over: str = "",
             baseline=None) -> None:
        """work: bytes that must move (GB/s) or operations (TFLOPS). The function and the baseline
        take turns; `over` is the baseline's name."""
        functions = [function]
        if baseline is not None:
            functions.append(baseline)
        for run in range(1, self.repeat + 1):
            ms, *others = self.machine.in_turns(functions, self.rounds)
            rate = work / ms / (1e6 if unit == "GB/s" else 1e9)
            share = rate / self.ceiling[unit]
            text = f"  {name:32} {1e3 * ms:9.1f} us {rate:7.0f} {unit:6} "
            text += f"{share:5.2f} of the ceiling"
            speedup = ""
            if others:
                speedup = f"{others[0] / ms:.3f}"
                text += f"   {others[0] / ms:5.2f}x {over}"
            say(text)
            self.write({
                "size": name_of(self.size), **self.size._asdict(), "kernel": name.strip(),
                "run": run, "us": f"{1e3 * ms:.2f}", "rate": f"{rate:.5g}", "unit": unit,
                "of_ceiling": f"{share:.3f}", "speedup": speedup, "over": over})


KERNEL_COLUMNS = ["size", *Size._fields, "kernel", "run", "us", "rate", "unit", "of_ceiling",
                  "speedup", "over"]


def balanced_plan(size: Size, device: str) -> fp8flow.Plan:
    """A plan without its unused tiles, of which the kernels here would have nothing to do."""
    plan = fp8flow.make_plan(route(size, "balanced", device), size.E)
    used = int(plan.ends[-1])
    unpadded = plan.unpadded._replace(row_of_slot=plan.unpadded.row_of_slot[:used])
    return plan._replace(token=plan.token[:used], pair=plan.pair[:used],
                         tile_expert=plan.tile_expert[:used // BLOCK], unpadded=unpadded)


def bench_quantize(bench: Bench, size: Size) -> None:
    x = torch.randn(size.T, size.D, device=bench.machine.device, dtype=torch.bfloat16)
    w = torch.randn(min(size.E, 8), 2 * size.F, size.D, device=bench.machine.device)
    bench.line("quantize", lambda: kernels.quantize(x), 3 * x.numel())
    bench.line("quantize_weight", lambda: kernels.quantize_weight(w), 6 * w.numel())


def bench_permute(bench: Bench, size: Size) -> None:
    plan = balanced_plan(size, bench.machine.device)
    unpadded = plan.unpadded
    x = torch.randn(size.T, size.D, device=bench.machine.device, dtype=torch.bfloat16)
    elements = (size.T + len(plan.token)) * size.D
    bench_one_permute(bench, "permute+pad FP8", kernels.quantize(x), plan, elements)
    bench_one_permute(bench, "permute+pad bf16", x, plan, 2 * elements)

    y = kernels.gather_rows(x, plan.token)

    def unfused():
        return kernels.sum_rows(kernels.gather_rows(y, unpadded.slot), unpadded.row_of_pair)

    bench.line("unpermute+unpad bf16", lambda: kernels.sum_rows(y, plan.slot),
               2 * (size.T * size.k + size.T) * size.D, over="unfused", baseline=unfused)


def bench_one_permute(bench: Bench, name: str, x, plan: fp8flow.Plan, work: int) -> None:
    def unfused():
        rows = kernels.gather_rows(x, plan.unpadded.token)
        return kernels.gather_rows(rows, plan.unpadded.row_of_slot)

    bench.line(name, lambda: kernels.gather_rows(x, plan.token), work,
               over="unfused", baseline=unfused)


def bench_transpose(bench: Bench, size: Size) -> None:
    rows = balanced_plan(size, bench.machine.device).token
    x = torch.randn(size.T, size.D, device=bench.machine.device, dtype=torch.bfloat16)
    q = kernels.quantize(x)
    permuted = kernels.gather_rows(q, rows)

    def three_launches():
        wide = kernels.dequantize(permuted, torch.bfloat16)
        return kernels.quantize(kernels.transpose(wide))

    def requantizing():
        return kernels.requantize(permuted)

    def apart():
        return kernels.scaling_aware_transpose(kernels.gather_rows(q, rows))

    bench.line("scaling-aware transpose", lambda: kernels.scaling_aware_transpose(permuted),
               2 * len(rows) * size.D, over="three launches", baseline=three_launches)
    bench.line("requantizing transpose", requantizing, 2 * len(rows) * size.D,
               over="three launches", baseline=three_launches)
    bench.line("  with the permute inside", lambda: kernels.scaling_aware_transpose(q, rows),
               (size.T + len(rows)) * size.D, over="apart", baseline=apart)


def bench_swiglu(bench: Bench, size: Size) -> None:
    M = len(balanced_plan(size, bench.machine.device).token)
    h = torch.randn(M, 2 * size.F, device=bench.machine.device, dtype=torch.bfloat16)
    da = torch.randn(M, size.F, device=bench.machine.device, dtype=torch.bfloat16)
    prob = torch.rand(M, device=bench.machine.device)

    def forward_unfused():
        return kernels.quantize(kernels.swiglu(h, prob))

    def backward_unfused():                     # which has kept A
        dh, _ = kernels.swiglu_backward(da, h, prob)
        return kernels.quantize(dh)

    bench.line("SwiGLU+quantize", lambda: kernels.swiglu_quantize(h, prob), 5 * M * size.F,
               over="unfused", baseline=forward_unfused)
    bench.line("SwiGLU backward+quantize, A again",
               lambda: kernels.swiglu_backward_quantize(da, h, prob), 9 * M * size.F,
               over="unfused", baseline=backward_unfused)


def bench_gemm(bench: Bench, size: Size) -> None:
    bench_one_gemm(bench, "fc1", size, 2 * size.F, size.D)
    bench.machine.free()                        # the weights of fc1
    bench_one_gemm(bench, "fc2", size, size.D, size.F)


def bench_one_gemm(bench: Bench, name: str, size: Size, N: int, K: int) -> None:
    """fprop and dgrad read W and W^T; wgrad reads both operands transposed."""
    device = bench.machine.device
    plan = balanced_plan(size, device)
    ends = plan.ends
    M = len(plan.token)
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    dy = torch.randn(M, N, device=device, dtype=torch.bfloat16)
    w = torch.randn(size.E, N, K, device=device, dtype=torch.bfloat16)
    w *= K ** -0.5
    w_fp8, w_fp8_t = kernels.quantize_weight(w)
    x_fp8 = kernels.quantize(x)
    dy_fp8 = kernels.quantize(dy)
    x_direct = kernels.scaling_aware_transpose(x_fp8)
    dy_direct = kernels.scaling_aware_transpose(dy_fp8)
    x_again = kernels.quantize(kernels.transpose(x))
    dy_again = kernels.quantize(kernels.transpose(dy))

    def fprop():
        return kernels.grouped_gemm(x_fp8, w_fp8, plan.tile_expert, ends)

    def loop():                                 # which the Hopper kernel replaces otherwise
        with mock.patch.object(kernels, "use_hopper_gemm", return_value=False):
            return fprop()

    def dgrad():
        return kernels.grouped_gemm(dy_fp8, w_fp8_t, plan.tile_expert, ends)

    def wgrad_bf16():
        return kernels.grouped_wgrad(dy_direct, x_direct, ends, torch.bfloat16)

    def wgrad_fp32():
        return kernels.grouped_wgrad(dy_direct, x_direct, ends)

    def wgrad_again():
        return kernels.grouped_wgrad(dy_again, x_again, ends, torch.bfloat16)

    def torch_fprop():
        return grouped_mm(x, w.mT, offs=ends)

    def torch_dgrad():
        return grouped_mm(dy, w, offs=ends)

    def torch_wgrad():
        return grouped_mm(dy.t(), x, offs=ends)

    operations = 2 * size.T * size.k * N * K    # those for padding are no use to anybody
    for label, fp8, bf16 in (
            ("fprop", fprop, torch_fprop),
            ("fprop by the loop", loop, torch_fprop),
            ("dgrad", dgrad, torch_dgrad),
            ("wgrad to bf16", wgrad_bf16, torch_wgrad),
            ("wgrad to fp32", wgrad_fp32, torch_wgrad),
            ("wgrad to bf16, requantized", wgrad_again, torch_wgrad)):
        bench.line(f"{name} {label}", fp8, operations, "TFLOPS", over="bf16", baseline=bf16)


BENCHES = {"quantize": bench_quantize, "permute": bench_permute, "transpose": bench_transpose,
           "swiglu": bench_swiglu, "gemm": bench_gemm}


def bench_kernels(bench: Bench, names: list[str]) -> None:
    bench.measure_ceilings()
    for size in (*LAYERS, *PAPER, *WIDE):
        bench.start(size)
        for name in names:
            BENCHES[name](bench, size)
            bench.machine.free()


# ---- bench layer ---------------------------------------------------------------------------------

SPECS = tuple(dict.fromkeys([*LADDER, "flow,transpose=fused", "flow,swiglu=unfused"]))
RESULTS = ("y", "dx", "dprobs", "dw1", "dw2")           # of Layer.step()
LAYER_COLUMNS = ["size", *Size._fields, "routing", "weights", "spec", "method", "ms", "speedup",
                 "held_mb", *(f"sqnr_{name}" for name in RESULTS),
                 *(f"ms_{kind}" for kind in SHARES)]
LAYER_ROUNDS = 30
SAMPLE = 1 << 28                # of larger gradients, copies in fp64 would not fit
FOR_WEIGHTS = 0.8               # of the memory; the rest is for activations


class CastingLayer:
    """A layer that casts its weights in every call."""

    def __init__(self, spec: str, *inputs):
        self.spec = spec
        self.inputs = inputs

    def forward(self) -> Tensor:
        return fp8flow.Layer(self.spec, *self.inputs).forward()

    def step(self) -> tuple[Tensor, ...]:
        return fp8flow.Layer(self.spec, *self.inputs).step()


class FrozenLayer:
    """A layer whose weights learn nothing, as where LoRA trains other weights: gradients for x and
    the router's probabilities only."""

    def __init__(self, spec: str, x, probs, plan, w1, w2, dy):
        self.layer = fp8flow.Layer(spec, x, probs, plan, w1.detach(), w2.detach(), dy)

    def forward(self) -> Tensor:
        return self.layer.forward()

    def step(self) -> tuple[Tensor, ...]:
        y = self.forward()
        wanted = self.layer.inputs[:2]
        return y.detach(), *torch.autograd.grad(y, wanted, self.layer.dy)


LAYER_CLASSES = {"cast before": fp8flow.Layer, "cast within": CastingLayer,
                 "frozen": FrozenLayer, "fp32, cast before": fp8flow.Layer}


class Setting(NamedTuple):
    """What is compared in turns."""
    routing: str
    weights: str                # one of LAYER_CLASSES
    specs: list[str]


def settings_of(size: Size, specs: list[str], quick: bool) -> list[Setting]:
    """All specs with random routing; the rest is for the recipes alone, to end in minutes."""
    recipes = [spec for spec in specs if spec in fp8flow.RECIPES]
    if size in PAPER:
        return [Setting("random", "cast before", recipes)]
    if size in TRAINING:
        return [Setting("random", "fp32, cast before", specs)]
    settings = [Setting("random", "cast before", specs)]
    if not quick:
        settings.append(Setting("balanced", "cast before", recipes))
        settings.append(Setting("skewed", "cast before", recipes))
        settings.append(Setting("random", "cast within", recipes))
        settings.append(Setting("random", "frozen", recipes))
    return settings


def bytes_of_weights(size: Size, specs: list[str]) -> int:
    """Weights and gradients in bf16 (in TRAINING they are fp32, and fit), and for each FP8 recipe
    its copies W and W^T."""
    weights = 3 * size.E * size.D * size.F
    in_fp8 = [spec for spec in specs if fp8flow.parse_spec(spec).precision == "fp8"]
    return weights * (2 + 2 + 2 * len(in_fp8))


def quality(results: tuple, reference: tuple) -> dict[str, float]:
    """dB of each result against bf16's; of a very large one, evenly spaced elements."""
    decibels = {}
    for name, got, want in zip(RESULTS, results, reference):
        stride = math.ceil(got.numel() / SAMPLE)
        decibels[name] = fp8flow.sqnr(got.flatten()[::stride], want.flatten()[::stride])
    return decibels


class Measurement(NamedTuple):
    """Of one spec. Its speed-ups are those over bf16 in the same setting."""
    spec: str
    in_turns: float             # ms
    back_to_back: float         # ms, nan where it was not asked for
    held_mb: float
    decibels: dict[str, float]
    ms_by_kind: dict[str, float]


def measure(machine: Machine, setting: Setting, inputs: tuple, quick: bool) -> list[Measurement]:
    layers = []
    for spec in setting.specs:
        layers.append(LAYER_CLASSES[setting.weights](spec, *inputs))
    reference = fp8flow.Layer("bf16", *inputs).step()
    decibels = [quality(layer.step(), reference) for layer in layers]
    del reference                               # Its gradients may be as large as the weights.
    held = [machine.megabytes_held(layer.forward) for layer in layers]
    by_kind = [machine.ms_by_kind(layer.step) for layer in layers]
    machine.free()
    graphs = machine.as_graphs([layer.step for layer in layers])
    in_turns = machine.in_turns(graphs, LAYER_ROUNDS)
    back_to_back = [math.nan] * len(graphs)
    if not quick:
        back_to_back = []
        for graph, ms in zip(graphs, in_turns):
            back_to_back.append(machine.back_to_back(graph, ms))
    columns = zip(setting.specs, in_turns, back_to_back, held, decibels, by_kind)
    return [Measurement(*values) for values in columns]


def print_layer(setting: Setting, measured: list[Measurement]) -> None:
    """Two tables, so that neither is wider than a terminal."""
    width = max(len(spec) for spec in SPECS)
    base = measured[0]
    say(f"  {setting.routing} routing, weights {setting.weights}")
    say(f"    {'':{width}}{'in turns':>18}{'back to back':>18}{'held':>9}  SQNR against bf16, dB")
    say(f"    {'':{width}}{'ms':>10}{'x bf16':>8}{'ms':>10}{'x bf16':>8}{'MB':>9}"
        + "".join(f"{name:>7}" for name in RESULTS))
    for one in measured:
        line = f"    {one.spec:{width}}{one.in_turns:10.3f}{base.in_turns / one.in_turns:8.3f}"
        if math.isnan(one.back_to_back):
            line += " " * 18
        else:
            line += f"{one.back_to_back:10.3f}{base.back_to_back / one.back_to_back:8.3f}"
        line += f"{one.held_mb:9.1f}"
        if one.spec != "bf16":
            line += "".join(f"{decibels:7.1f}" for decibels in one.decibels.values())
        say(line)
    say(f"    {'ms by kind of kernel':{width}}" + "".join(f"{kind:>10}" for kind in SHARES))
    for one in measured:
        line = f"    {one.spec:{width}}"
        say(line + "".join(f"{ms:10.3f}" for ms in one.ms_by_kind.values()))


def write_layer(write, size: Size, setting: Setting, measured: list[Measurement]) -> None:
    """A row for each time that was measured."""
    base = measured[0]
    for one in measured:
        row = {"size": name_of(size), **size._asdict(), "routing": setting.routing,
               "weights": setting.weights, "spec": one.spec, "held_mb": f"{one.held_mb:.2f}"}
        for name, decibels in one.decibels.items():
            row[f"sqnr_{name}"] = "" if one.spec == "bf16" else f"{decibels:.2f}"
        for kind, ms in one.ms_by_kind.items():
            row[f"ms_{kind}"] = f"{ms:.4f}"
        write({**row, "method": "in turns", "ms": f"{one.in_turns:.4f}",
               "speedup": f"{base.in_turns / one.in_turns:.4f}"})
        if not math.isnan(one.back_to_back):
            write({**row, "method": "back to back", "ms": f"{one.back_to_back:.4f}",
                   "speedup": f"{base.back_to_back / one.back_to_back:.4f}"})


def bench_layer(machine: Machine, specs: list[str], quick: bool, write) -> None:
    say("the layer, forward and backward, as CUDA graphs: median ms in turns, L2 flushed before "
        "each, and\nback to back, each recipe alone; bf16 masters, so that bf16 has nothing to "
        "cast (training: fp32); held:\nwhat forward keeps for backward besides its inputs")
    specs = list(dict.fromkeys(["bf16", *specs]))       # bf16 comes first: the others refer to it
    for size in LAYERS if quick else (*LAYERS, *TRAINING, *PAPER):
        say(f"\n{name_of(size)}: {size}")
        settings = settings_of(size, specs, quick)
        needed = bytes_of_weights(size, settings[0].specs)
        if needed > FOR_WEIGHTS * machine.memory:
            say(f"  not measured: weights, gradients and FP8 copies take {needed / 1e9:.0f} GB, "
                f"the GPU has {machine.memory / 1e9:.0f}")
            continue
        measure_size(machine, size, settings, quick, write)
        machine.free()


def measure_size(machine: Machine, size: Size, settings: list[Setting], quick: bool, write) -> None:
    dtype = torch.float32 if size in TRAINING else torch.bfloat16
    x, probs, _, w1, w2, dy = fp8flow.random_layer(*size, machine.device, dtype)
    for setting in settings:
        plan = fp8flow.make_plan(route(size, setting.routing, machine.device), size.E)
        measured = measure(machine, setting, (x, probs, plan, w1, w2, dy), quick)
        print_layer(setting, measured)
        write_layer(write, size, setting, measured)


# ---- main ----------------------------------------------------------------------------------------

@contextlib.contextmanager
def rows_into(path: str | None, columns: list[str]):
    """Gives a function that writes a row, at once: what was measured survives a failure. Without a
    path it does nothing."""
    if path is None:
        yield lambda row: None
        return
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()

        def write(row: dict) -> None:
            writer.writerow(row)
            file.flush()

        yield write


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="kernels | layer")
    of_kernels = commands.add_parser("kernels", allow_abbrev=False)
    of_kernels.add_argument("names", nargs="*", metavar="NAME",
                            help=f"some of {', '.join(BENCHES)} (default: all)")
    of_kernels.add_argument("--repeat", type=int, default=1, metavar="N",
                            help="measure every line N times")
    of_layer = commands.add_parser("layer", allow_abbrev=False)
    of_layer.add_argument("specs", nargs="*", metavar="SPEC",
                          help=f"recipes and switches (default: {' '.join(SPECS)})")
    of_layer.add_argument("--quick", action="store_true",
                          help="the first three sizes, random routing, in turns")
    for command in (of_kernels, of_layer):
        command.add_argument("--csv", metavar="FILE", help="write the measurements there")
    return parser


def check_arguments(args) -> None:
    """Raises ValueError, with a sentence."""
    if args.command == "kernels":
        for name in args.names:
            kernels.check_choice("NAME", name, BENCHES)
        if args.repeat < 1:
            raise ValueError(f"--repeat {args.repeat}: give 1 or more")
    else:
        for spec in args.specs:
            try:
                fp8flow.parse_spec(spec)
            except ValueError as error:
                raise ValueError(f"SPEC {spec}: {error}")
    if not torch.cuda.is_available() or not kernels.use_kernels(torch.empty(0, device="cuda")):
        raise ValueError("there is no GPU of compute capability 8.9 or later here: timings need "
                         "one")


def main(argv=None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    columns = KERNEL_COLUMNS if args.command == "kernels" else LAYER_COLUMNS
    with contextlib.ExitStack() as stack:
        try:
            check_arguments(args)
            write = stack.enter_context(rows_into(args.csv, columns))
        except ValueError as error:
            parser.error(str(error))
        except OSError as error:
            parser.error(f"--csv {args.csv!r} cannot be written ({error.strerror}): name another "
                         "file")
        say(f"torch {torch.__version__}, triton {triton.__version__}, "
            f"{torch.cuda.get_device_name()}")
        if args.command == "kernels":
            bench_kernels(Bench(Machine(), args.repeat, write), args.names or list(BENCHES))
        else:
            bench_layer(Machine(), args.specs or SPECS, args.quick, write)


if __name__ == "__main__":
    main()
