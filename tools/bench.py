"""Times on one GPU: every kernel, and the expert layer as a user calls it.

    python -m tools.bench kernels [GROUP ...]   each beside what it replaces and what the machine
                                                can do: quantize, permute, transpose, swiglu, gemm
    python -m tools.bench layer [SPEC ...]      `experts`, forward and backward, plan and weight
                                                casts inside: bf16, naive, flow and the steps
                                                between them

Both take --csv FILE. All of it runs as CUDA graphs, since Python launches more slowly than some of
the kernels run. What is compared is timed in turns, with the L2 cache flushed before each turn, so
that all of it sees the same clock and reads its inputs from memory. The layer is also timed back to
back: one recipe for a while, so that the power limit shows, and what fits into L2 stays there.
"""
import argparse
import contextlib
import csv
import gc
import itertools
import math
import statistics
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import grouped_mm

import fp8flow
import kernels
from fp8flow import LADDER
from kernels import BLOCK, FP8


def say(text: str) -> None:
    """A line, at once: a reader who waits for minutes sees how far it has come."""
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


LAYERS = {
    "layer 1": Size(T=16384, D=2048, F=2048, E=8, k=2),
    "layer 2": Size(T=32768, D=2048, F=1024, E=32, k=4),
    "layer 3": Size(T=16384, D=4096, F=2048, E=16, k=4),
}
PAPER = {
    "paper 1": Size(T=4096, D=1280, F=1024, E=64, k=7),
    "paper 2": Size(T=4096, D=2048, F=1408, E=64, k=6),
    "paper 3": Size(T=4096, D=5120, F=1536, E=160, k=6),
    "paper 4": Size(T=4096, D=7168, F=2048, E=256, k=8),
}
# Of train.py's preset h100, whose master weights and their gradients are fp32; one micro-batch of a
# model that many fine-tune; and the widest SwiGLU that is in use, for the kernels alone.
TRAINING = Size(T=32768, D=2048, F=2048, E=16, k=4)
QWEN3 = Size(T=16384, D=2048, F=768, E=128, k=8)
MIXTRAL = Size(T=8192, D=4096, F=14336, E=8, k=2)


# ---- a layer and its inputs ----------------------------------------------------------------------

class Inputs(NamedTuple):
    x: Tensor                   # [T, D] bf16
    top_k_index: Tensor         # [T, k]
    top_k_weights: Tensor       # [T, k] fp32
    w1: Tensor                  # [E, 2F, D]
    w2: Tensor                  # [E, D, F]
    dy: Tensor                  # [T, D] bf16


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


def random_inputs(size: Size, device: str, dtype=torch.float32, routing="random") -> Inputs:
    """dtype: of the master weights. All but the index and dy want gradients."""
    T, D, F, E, k = size
    torch.manual_seed(0)
    x = torch.randn(T, D, device=device, dtype=torch.bfloat16)
    weights = torch.rand(T, k, device=device)
    weights /= weights.sum(-1, keepdim=True)
    w1 = torch.randn(E, 2 * F, D, device=device, dtype=dtype) * D ** -0.5
    w2 = torch.randn(E, D, F, device=device, dtype=dtype) * F ** -0.5
    dy = torch.randn_like(x)
    return Inputs(x.requires_grad_(), route(size, routing, device), weights.requires_grad_(),
                  w1.requires_grad_(), w2.requires_grad_(), dy)


class Layer:
    """`experts` with one recipe on given inputs: call forward() or step() as often as you like.
    Frozen, the weights learn nothing, as where LoRA trains other weights."""

    def __init__(self, spec: str, inputs: Inputs, is_frozen: bool = False):
        self.spec = spec
        self.inputs = inputs
        if is_frozen:
            self.inputs = inputs._replace(w1=inputs.w1.detach(), w2=inputs.w2.detach())

    def forward(self) -> Tensor:
        return fp8flow.experts(*self.inputs[:5], self.spec)

    def step(self) -> tuple[Tensor, ...]:
        """y, and the gradients of what wants one: dx, dprobs, dw1, dw2."""
        y = self.forward()
        wanted = [tensor for tensor in self.inputs if tensor.requires_grad]
        return y.detach(), *torch.autograd.grad(y, wanted, self.inputs.dy)


def sqnr(x: Tensor, ref: Tensor) -> float:
    """Signal to quantization-noise ratio in dB, 10 log10(|ref|^2 / |x - ref|^2): 31.5 dB is an
    error of 2.7%. Where nothing differs it is infinite."""
    noise = (x.double() - ref).square().sum().item()
    signal = ref.double().square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


# ---- the clock -----------------------------------------------------------------------------------

KINDS = {                       # parts of kernels' names; the first that fits
    "weights": ("quantize_weight",), "GEMM": ("gemm", "wgrad", "grouped_mm", "cutlass", "Gemm"),
    "transpose": ("transpose", "requantize"), "SwiGLU": ("swiglu",), "cast": ("quantize",),
    "permute": ("gather_rows", "sum_rows")}
SHARES = (*KINDS, "other")
ROUNDS = 100
BACK_TO_BACK_MS = 800           # for so long a recipe runs alone


def as_graphs(steps: list) -> list:
    """For each step a function that does the same without the host. The graphs share their memory,
    since no two of them run at the same time and what they return is not read."""
    pool = torch.cuda.graph_pool_handle()
    side = torch.cuda.Stream()
    replays = []
    for step in steps:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):           # Compiles, and makes the workspaces of libraries.
            step()
            step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        replays.append(graph.replay)
    return replays


def in_turns(functions: list, rounds: int) -> list[float]:
    """Median ms of each function. All of it is queued before anything is waited for, and L2 is
    flushed before each call. Three more rounds, which do not count, warm up."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")        # larger than L2
    turns = [[] for _ in functions]             # of each function: begin and end, round by round
    for _ in range(rounds + 3):
        for function, mine in zip(functions, turns):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            function()
            end.record()
            mine.append((begin, end))
    torch.cuda.synchronize()
    medians = []
    for mine in turns:
        medians.append(statistics.median(begin.elapsed_time(end) for begin, end in mine[3:]))
    return medians


def back_to_back(function, expected_ms: float) -> float:
    """Median ms of the function, called again and again. The first half does not count: the chip
    needs a while to reach its power limit."""
    calls = 10 + math.ceil(BACK_TO_BACK_MS / expected_ms)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)]
    return statistics.median(times[calls // 2:])


def kind_of(kernel: str) -> str:
    for kind, parts in KINDS.items():
        if any(part in kernel for part in parts):
            return kind
    return "other"


def ms_by_kind(step, steps: int = 4) -> dict[str, float]:
    """GPU time of one step by kind of kernel, from the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    shares = dict.fromkeys(SHARES, 0.0)
    for event in profiler.key_averages():
        shares[kind_of(event.key)] += event.self_device_time_total / 1e3 / steps
    return shares


def megabytes_held(forward) -> float:
    """What a forward pass leaves in memory for its backward, besides its inputs and output."""
    before = torch.cuda.memory_allocated()
    y = forward()
    return (torch.cuda.memory_allocated() - before - y.nbytes) / 1e6


def free() -> None:
    """Gives back what nothing holds any more, so that the next size finds it in one piece."""
    gc.collect()
    torch.cuda.empty_cache()


# ---- bench kernels -------------------------------------------------------------------------------

class Case(NamedTuple):
    name: str
    function: object
    work: int                   # bytes that must move, or operations
    unit: str = "GB/s"          # or "TFLOPS"
    over: str = ""              # what the baseline is
    baseline: object = None


def quantize_cases(size: Size):
    x = torch.randn(size.T, size.D, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(min(size.E, 8), 2 * size.F, size.D, device="cuda")
    yield Case("quantize", lambda: kernels.quantize(x), 3 * x.numel())
    yield Case("quantize_weight", lambda: kernels.quantize_weight(w), 6 * w.numel())


def balanced_plan(size: Size) -> fp8flow.Plan:
    """A plan without its unused tiles, of which the kernels here would have nothing to do."""
    plan = fp8flow.make_plan(route(size, "balanced", "cuda"), size.E)
    used = int(plan.ends[-1])
    return fp8flow.Plan(plan.slot, plan.token[:used], plan.pair[:used],
                        plan.tile_expert[:used // BLOCK], plan.ends)


def permute_cases(size: Size):
    plan = balanced_plan(size)
    pairs = plan.sorted_pairs
    index = route(size, "random", "cuda")
    x = torch.randn(size.T, size.D, device="cuda", dtype=torch.bfloat16)
    y = kernels.gather_rows(x, plan.token)
    elements = (size.T + len(plan.token)) * size.D

    def unfused(x):
        return kernels.gather_rows(kernels.gather_rows(x, pairs.token), pairs.row_of_slot)

    q = kernels.quantize(x)
    yield Case("plan", lambda: fp8flow.make_plan(index, size.E), 8 * (2 * index.numel() + len(y)))
    yield Case("permute+pad FP8", lambda: kernels.gather_rows(q, plan.token), elements,
               over="unfused", baseline=lambda: unfused(q))
    yield Case("permute+pad bf16", lambda: kernels.gather_rows(x, plan.token), 2 * elements,
               over="unfused", baseline=lambda: unfused(x))
    yield Case("unpermute+unpad bf16", lambda: kernels.sum_rows(y, plan.slot),
               2 * (size.T * size.k + size.T) * size.D, over="unfused",
               baseline=lambda: kernels.sum_rows(kernels.gather_rows(y, pairs.slot),
                                                 pairs.row_of_pair))


def transpose_cases(size: Size):
    rows = balanced_plan(size).token
    x = torch.randn(size.T, size.D, device="cuda", dtype=torch.bfloat16)
    q = kernels.quantize(x)
    permuted = kernels.gather_rows(q, rows)
    work = 2 * len(rows) * size.D

    def three_launches():
        wide = kernels.dequantize(permuted, torch.bfloat16)
        return kernels.quantize(kernels.transpose(wide))

    def apart():
        return kernels.scaling_aware_transpose(kernels.gather_rows(q, rows))

    yield Case("scaling-aware transpose", lambda: kernels.scaling_aware_transpose(permuted), work,
               over="three launches", baseline=three_launches)
    yield Case("requantizing transpose", lambda: kernels.requantize(permuted), work,
               over="three launches", baseline=three_launches)
    yield Case("with the permute inside", lambda: kernels.scaling_aware_transpose(q, rows),
               (size.T + len(rows)) * size.D, over="apart", baseline=apart)


def swiglu_cases(size: Size):
    M = len(balanced_plan(size).token)
    F = size.F
    h = torch.randn(M, 2 * F, device="cuda", dtype=torch.bfloat16)
    da = torch.randn(M, F, device="cuda", dtype=torch.bfloat16)
    prob = torch.rand(M, device="cuda")

    def forward_unfused():
        return kernels.quantize(kernels.swiglu(h, prob))

    def backward_unfused():                     # which has kept A
        dh, _, _ = kernels.swiglu_backward(da, h, prob)
        return kernels.quantize(dh)

    yield Case("SwiGLU+quantize", lambda: kernels.swiglu(h, prob, "pow2"), 5 * M * F,
               over="unfused", baseline=forward_unfused)
    yield Case("SwiGLU backward+quantize, A again",
               lambda: kernels.swiglu_backward(da, h, prob, "pow2"), 9 * M * F,
               over="unfused", baseline=backward_unfused)


def gemm_cases(size: Size):
    yield from one_gemm("fc1", size, 2 * size.F, size.D)
    free()                                      # the weights of fc1
    yield from one_gemm("fc2", size, size.D, size.F)


def one_gemm(name: str, size: Size, N: int, K: int):
    """fprop and dgrad read W and W^T; wgrad reads both operands transposed."""
    plan = balanced_plan(size)
    tiles = plan.tile_expert
    ends = plan.ends
    M = len(plan.token)
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(size.E, N, K, device="cuda", dtype=torch.bfloat16)
    w *= K ** -0.5
    w_fp8, w_t = kernels.quantize_weight(w)
    x_fp8 = kernels.quantize(x)
    dy_fp8 = kernels.quantize(dy)
    x_direct = kernels.scaling_aware_transpose(x_fp8)
    dy_direct = kernels.scaling_aware_transpose(dy_fp8)
    x_again = kernels.quantize(kernels.transpose(x))
    dy_again = kernels.quantize(kernels.transpose(dy))
    out = torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
    bf16 = torch.bfloat16

    def fprop_bf16():
        return grouped_mm(x, w.mT, offs=ends)

    def dgrad_bf16():
        return grouped_mm(dy, w, offs=ends)

    def wgrad_bf16():
        return grouped_mm(dy.t(), x, offs=ends)

    work = 2 * size.T * size.k * N * K          # The products of padding are of no use.
    for label, function, baseline in (
            ("fprop", lambda: kernels.grouped_gemm(x_fp8, w_fp8, tiles, ends), fprop_bf16),
            ("fprop by the loop", lambda: kernels.launch_gemm_loop(x_fp8, w_fp8, out, tiles),
             fprop_bf16),
            ("dgrad", lambda: kernels.grouped_gemm(dy_fp8, w_t, tiles, ends), dgrad_bf16),
            ("wgrad to bf16", lambda: kernels.grouped_wgrad(dy_direct, x_direct, ends, bf16),
             wgrad_bf16),
            ("wgrad to fp32", lambda: kernels.grouped_wgrad(dy_direct, x_direct, ends), wgrad_bf16),
            ("wgrad to bf16, requantized",
             lambda: kernels.grouped_wgrad(dy_again, x_again, ends, bf16), wgrad_bf16)):
        yield Case(f"{name} {label}", function, work, "TFLOPS", "bf16", baseline)


def measure_ceilings() -> dict[str, float]:
    """What this GPU reaches in this run. Small results stay in its L2 and can pass the copy."""
    x = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    q = a.to(FP8)
    one = torch.ones((), device="cuda")
    # In a graph, y.copy_(x) is no kernel but a memcpy, which is slower; neg moves the same bytes.
    steps = [
        lambda: torch.neg(x, out=y), lambda: a @ a,
        lambda: torch._scaled_mm(q, q.t(), one, one, out_dtype=a.dtype, use_fast_accum=False)]
    copy_ms, bf16_ms, fp8_ms = in_turns(as_graphs(steps), ROUNDS)
    operations = 2 * 8192 ** 3
    ceilings = {"GB/s": 2 * x.nbytes / copy_ms / 1e6, "TFLOPS": operations / fp8_ms / 1e9}
    say(f"ceilings: copy {ceilings['GB/s']:.0f} GB/s; 8192^3 in FP8 {ceilings['TFLOPS']:.0f} TFLOPS"
        f" (torch._scaled_mm, one scale, fast accumulation off), in bf16 "
        f"{operations / bf16_ms / 1e9:.0f} TFLOPS")
    return ceilings


KERNEL_COLUMNS = ["size", *Size._fields, "kernel", "us", "rate", "unit", "of_ceiling", "speedup",
                  "over"]
GROUPS = {"quantize": quantize_cases, "permute": permute_cases, "transpose": transpose_cases,
          "swiglu": swiglu_cases, "gemm": gemm_cases}


def bench_kernels(groups: list[str], write) -> None:
    """A line a kernel: us, GB/s or TFLOPS, the share of the ceiling that was measured in the same
    run, and the speed-up over what does the same otherwise."""
    ceilings = measure_ceilings()
    free()
    for name, size in {**LAYERS, **PAPER, "Mixtral": MIXTRAL}.items():
        say(f"\n{name}: {size}")
        for group in groups:
            for case in GROUPS[group](size):
                functions = [case.function] + ([case.baseline] if case.baseline else [])
                ms, *others = in_turns(as_graphs(functions), ROUNDS)
                rate = case.work / ms / (1e6 if case.unit == "GB/s" else 1e9)
                share = rate / ceilings[case.unit]
                speedup = f"{others[0] / ms:.3f}" if others else ""
                text = f"  {case.name:34}{1e3 * ms:9.1f} us {rate:7.0f} {case.unit:6}"
                text += f"{share:6.2f} of the ceiling"
                say(text + (f"   {others[0] / ms:5.2f}x {case.over}" if others else ""))
                write({"size": name, **size._asdict(), "kernel": case.name, "us": f"{1e3 * ms:.2f}",
                       "rate": f"{rate:.5g}", "unit": case.unit, "of_ceiling": f"{share:.3f}",
                       "speedup": speedup, "over": case.over})
            free()


# ---- bench layer ---------------------------------------------------------------------------------

FAIR_NAIVE = "naive,transpose=requantize,permute=fused"
SPECS = list(dict.fromkeys([*LADDER, FAIR_NAIVE, "flow,transpose=requantize",
                            "flow,swiglu=unfused"]))
CASES = (       # sizes, routing, dtype of the masters, frozen, and whether all specs are measured
    (LAYERS, "random", torch.bfloat16, False, True),
    (LAYERS, "skewed", torch.bfloat16, False, False),
    (LAYERS, "random", torch.bfloat16, True, False),
    ({"training": TRAINING}, "random", torch.float32, False, True),
    ({"Qwen3-30B-A3B": QWEN3}, "random", torch.bfloat16, False, False),
    (PAPER, "random", torch.bfloat16, False, False),
)
RESULTS = ("y", "dx", "dprobs", "dw1", "dw2")           # of Layer.step()
LAYER_COLUMNS = ["size", *Size._fields, "routing", "weights", "spec", "ms", "speedup",
                 "back_to_back_ms", "back_to_back_speedup", "held_mb",
                 *(f"sqnr_{name}" for name in RESULTS), *(f"ms_{kind}" for kind in SHARES)]
LAYER_ROUNDS = 30
SAMPLE = 1 << 26                # of larger gradients, copies in fp64 would not fit


def decibels(results: tuple, reference: tuple) -> dict[str, float]:
    """dB of each result against bf16's; of a very large one, evenly spaced elements."""
    found = {}
    for name, got, want in zip(RESULTS, results, reference):
        stride = math.ceil(got.numel() / SAMPLE)
        found[f"sqnr_{name}"] = sqnr(got.flatten()[::stride], want.flatten()[::stride])
    return found


def measure(inputs: Inputs, specs: list[str], is_frozen: bool) -> list[dict]:
    """A row for each spec, bf16 first: all speed-ups are over it."""
    layers = [Layer(spec, inputs, is_frozen) for spec in specs]
    reference = layers[0].step()
    rows = []
    for layer in layers:
        rows.append({"spec": layer.spec, **decibels(layer.step(), reference),
                     "held_mb": megabytes_held(layer.forward)})
        rows[-1] |= {f"ms_{kind}": ms for kind, ms in ms_by_kind(layer.step).items()}
    del reference
    free()
    graphs = as_graphs([layer.step for layer in layers])
    for row, graph, ms in zip(rows, graphs, in_turns(graphs, LAYER_ROUNDS)):
        row |= {"ms": ms, "back_to_back_ms": back_to_back(graph, ms)}
        row["speedup"] = rows[0]["ms"] / ms
        row["back_to_back_speedup"] = rows[0]["back_to_back_ms"] / row["back_to_back_ms"]
    return rows


def print_layer(rows: list[dict]) -> None:
    """Two tables, so that neither is wider than a terminal."""
    width = max(len(spec) for spec in SPECS)
    say(f"    {'':{width}}{'in turns':>18}{'back to back':>18}{'held':>9}  SQNR against bf16, dB")
    say(f"    {'':{width}}{'ms':>10}{'x bf16':>8}{'ms':>10}{'x bf16':>8}{'MB':>9}"
        + "".join(f"{name:>7}" for name in RESULTS))
    for row in rows:
        line = f"    {row['spec']:{width}}{row['ms']:10.3f}{row['speedup']:8.3f}" \
               f"{row['back_to_back_ms']:10.3f}{row['back_to_back_speedup']:8.3f}" \
               f"{row['held_mb']:9.1f}"
        if row is not rows[0]:
            line += "".join(f"{row[f'sqnr_{name}']:7.1f}" for name in RESULTS
                            if f"sqnr_{name}" in row)
        say(line)
    say(f"    {'ms by kind of kernel':{width}}" + "".join(f"{kind:>10}" for kind in SHARES))
    for row in rows:
        times = "".join(f"{row[f'ms_{kind}']:10.3f}" for kind in SHARES)
        say(f"    {row['spec']:{width}}{times}")


def bench_layer(specs: list[str], write) -> None:
    say("experts, forward and backward, plan and weight casts inside, as CUDA graphs: median ms in "
        "turns,\nL2 flushed before each, and back to back, each recipe alone; held: what forward "
        "keeps for backward\nbesides its inputs and output")
    for sizes, routing, dtype, is_frozen, has_all in CASES:
        for name, size in sizes.items():
            recipes = [spec for spec in specs if has_all or spec in (*fp8flow.RECIPES, FAIR_NAIVE)]
            weights = f"{str(dtype).removeprefix('torch.')}{', frozen' if is_frozen else ''}"
            say(f"\n{name}: {size}; {routing} routing, weights {weights}")
            try:
                inputs = random_inputs(size, "cuda", dtype, routing)
                rows = measure(inputs, list(dict.fromkeys(["bf16", *recipes])), is_frozen)
            except torch.OutOfMemoryError:
                say("  not measured: the GPU's memory does not suffice")
                rows = []
            if rows:
                print_layer(rows)
            for row in rows:
                numbers = {key: f"{value:.4f}" for key, value in row.items() if key != "spec"}
                write({"size": name, **size._asdict(), "routing": routing, "weights": weights,
                       "spec": row["spec"], **numbers})
            inputs = rows = None
            free()


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


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernels", "layer"))
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"for kernels: groups of them (default: {' '.join(GROUPS)}); for "
                        f"layer: recipes and switches (default: {' '.join(SPECS)})")
    parser.add_argument("--csv", metavar="FILE", help="write the measurements there")
    args = parser.parse_args(argv)
    try:
        for name in args.names:
            if args.what == "layer":
                fp8flow.parse_spec(name)
            else:
                fp8flow.require(name in GROUPS, f"no group {name}: choose from {', '.join(GROUPS)}")
        has_fp8 = torch.cuda.is_available() and kernels.use_kernels(torch.device("cuda:0"))
        fp8flow.require(has_fp8, "there is no GPU of compute capability 8.9 or later here: timings "
                        "need one")
        rows = rows_into(args.csv, KERNEL_COLUMNS if args.what == "kernels" else LAYER_COLUMNS)
        with rows as write:
            say(f"torch {torch.__version__}, triton {triton.__version__}, "
                f"{torch.cuda.get_device_name()}")
            if args.what == "kernels":
                bench_kernels(args.names or list(GROUPS), write)
            else:
                bench_layer(args.names or SPECS, write)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
