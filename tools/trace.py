"""What the expert layer launches, counted as it runs, and what quantization loses.

    python -m tools.trace               the casts of every recipe and of every switch flipped alone,
                                        and what each way to quantize does to four kinds of data
    python -m tools.trace SPEC          every launch of one layer, forward and backward, with bytes

A SPEC is a recipe (bf16, naive, flow) and the switches that differ from it: flow,swiglu=unfused.
"""
import argparse
import contextlib
import linecache
import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fp8flow
import kernels
from kernels import BLOCK, FP8, QTensor
from tools.bench import LAYERS, Layer, Size, random_inputs, sqnr

ON_A_CPU = Size(T=2048, D=512, F=512, E=8, k=2)
SHORT = {FP8: "fp8", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "int64",
         torch.int32: "int32"}


# ---- where in the layer --------------------------------------------------------------------------

class Place(NamedTuple):
    """A line of the layer, FP8Experts or BF16Experts."""
    direction: str              # "forward" or "backward"
    line: int                   # in fp8flow.py
    tensor: str                 # what the line makes: "X", "dH"
    column_wise: bool           # inside the switch of that name


def place_in_layer() -> Place | None:
    """The line of the layer that is running now, None outside: found by walking up the calls. What
    it makes stands left of `=` there."""
    inside_column_wise = False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is vars(fp8flow):            # a function of that file
            name = frame.f_code.co_name
            if name == "column_wise":
                inside_column_wise = True
            if name in ("forward", "backward"):         # the layer's: Experts.forward is above it
                source = linecache.getline(fp8flow.__file__, frame.f_lineno)
                tensor = tensor_name(source.partition("=")[0])
                return Place(name, frame.f_lineno, tensor, inside_column_wise)
        frame = frame.f_back
    return None


def tensor_name(targets: str) -> str:
    """What an assignment makes, as the table in fp8flow.py writes it: "dh, dprob, a" -> "dH"."""
    variable = targets.split(",")[0].strip().partition("_")[0]
    if variable.startswith("d"):
        return "d" + variable[1:].upper()
    return variable.upper()


# ---- the launches, recorded as they happen -------------------------------------------------------

class Operand(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Launch:
    op: str                     # the operation's name
    place: Place | None         # the line of the layer; None outside
    cast: str                   # "Q" quantizes, "DQ" dequantizes, "Q'" quantizes column-wise, "RQ"
                                # requantizes: DQ, transpose and Q' in one; "" for no cast
    reads: list[Operand]
    writes: list[Operand]
    tile_expert: Tensor | None  # the plan's: the expert of each tile of slots, -1 for unused ones

    def bytes(self) -> int:
        """What must move: each input and output once. Of every axis that is as long as there are
        slots, those of unused tiles are left out. Reading the tiles waits for a GPU."""
        slots = used = 0
        if self.tile_expert is not None:
            slots = BLOCK * len(self.tile_expert)
            used = BLOCK * int((self.tile_expert >= 0).sum())
        total = 0
        for operand in self.reads + self.writes:
            shape = [used if length == slots else length for length in operand.shape]
            total += math.prod(shape) * operand.dtype.itemsize
        return total


def operands_in(values) -> list[Operand]:
    """The tensors among `values`; a QTensor is two of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(Operand(tuple(value.shape), value.dtype))
        elif isinstance(value, (tuple, list)):
            found += operands_in(value)
    return found


def cast_of(op: str, place: Place | None) -> str:
    """Of an activation, that is. (quantize_weight is another operation.)"""
    if op == "quantize":
        return "Q'" if place and place.column_wise else "Q"
    return {"dequantize": "DQ", "requantize": "RQ"}.get(op, "")


class TorchOperations(TorchDispatchMode):
    """Notes the two of PyTorch that the plan needs."""
    NAMES = ("sort", "searchsorted")

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in self.NAMES:
            self.note(f"torch.{name}", args, result)
        return result


@contextlib.contextmanager
def record_launches():
    """`with record_launches() as launches:` a list of Launch, in the order in which they ran."""
    launches = []
    plans = []                  # their tile_experts

    def note(op, arguments, result):
        place = place_in_layer()
        if op == "plan_slots":
            plans.append(result[3])
        launches.append(Launch(op, place, cast_of(op, place), operands_in(arguments),
                               operands_in([result]), plans[-1] if plans else None))

    grouped_mm = fp8flow.torch_grouped_mm

    def noted_grouped_mm(*arguments):
        result = grouped_mm(*arguments)
        note("torch_grouped_mm", arguments, result)
        return result

    kernels.hooks.append(note)
    fp8flow.torch_grouped_mm = noted_grouped_mm         # no operation of kernels.py
    try:
        with TorchOperations(note):
            yield launches
    finally:
        fp8flow.torch_grouped_mm = grouped_mm
        kernels.hooks.remove(note)


def launches_of(spec: str, size: Size, device: str) -> list[Launch]:
    """Those of one forward and backward, plan and weight casts inside."""
    layer = Layer(spec, random_inputs(size, device))
    with record_launches() as launches:
        layer.step()
    return launches


def print_launches(spec: str, size: Size, device: str) -> None:
    launches = launches_of(spec, size, device)
    moved = [launch.bytes() for launch in launches]
    print(f"\n{spec}: {size}; MB: each input and output once, slots in use; torch.sort "
          "is several launches")
    print(f"  {'':3}{'cast':>6}  {'operation':26}{'tensor':8}{'direction':11}{'shape':18}"
          f"{'in -> out':14}{'MB':>9}{'share':>8}")
    casts = 0
    for number, (launch, size_in_bytes) in enumerate(zip(launches, moved), 1):
        count = ""
        if launch.cast:
            casts += 1
            count = casts
        place = launch.place or Place("plan", 0, "", False)
        shape = " x ".join(map(str, launch.writes[0].shape))
        dtypes = f"{SHORT[launch.reads[0].dtype]} -> {SHORT[launch.writes[0].dtype]}"
        print(f"  {number:3}{count:>6}  {launch.op:26}{place.tensor:8}{place.direction:11}"
              f"{shape:18}{dtypes:14}{size_in_bytes / 1e6:9.1f}"
              f"{100 * size_in_bytes / sum(moved):7.1f}%")
    print(f"  {len(launches):3}{casts:6}  {'launches, casts, MB in all':77}{sum(moved) / 1e6:9.1f}")


# ---- the casts -----------------------------------------------------------------------------------

def single_switches() -> list[str]:
    """The recipes, then naive and flow with each switch flipped alone, where that has a meaning."""
    specs = list(fp8flow.RECIPES)
    for name in ("naive", "flow"):
        for switch, values in fp8flow.SWITCHES.items():
            for value in values:
                spec = f"{name},{switch}={value}"
                if value == getattr(fp8flow.RECIPES[name], switch):
                    continue
                with contextlib.suppress(ValueError):
                    fp8flow.parse_spec(spec)
                    specs.append(spec)
    return specs


def print_casts(device: str) -> None:
    print("\nExplicit casts in one forward and backward of the layer (weights apart)")
    specs = single_switches()
    width = max(map(len, specs))
    for spec in specs:
        launches = launches_of(spec, Size(T=64, D=128, F=128, E=4, k=2), device)
        casts = [launch for launch in launches if launch.cast]
        names = " ".join(f"{launch.cast}({launch.place.tensor})" for launch in casts)
        print(f"  {spec:{width}} {len(casts):3}  {names}")


# ---- what is lost on the way ---------------------------------------------------------------------

def samples(R: int, C: int, device: str) -> dict[str, Tensor]:
    """[R, C] fp32 tensors that look like what a layer quantizes."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(R, C, generator=rng)
    chi = torch.randn(3, R, C, generator=rng).square().mean(0).sqrt()
    binade = torch.randint(-12, 13, (R, 1), generator=rng)
    is_live = torch.arange(R)[:, None] % 7 > 0          # A seventh of the rows is zero.
    is_outlier = torch.arange(C) % 64 == 0
    kinds = {
        "Gaussian": x,
        "heavy-tailed": x / chi,                        # Student's t, 3 degrees of freedom
        "outlier channels": torch.where(is_outlier, 64 * x, x),
        "rows over 24 binades": x * 2.0 ** binade * is_live,
    }
    return {kind: sample.to(device) for kind, sample in kinds.items()}


def requantized(q: QTensor) -> Tensor:
    """What is left after q was dequantized and quantized again along the other axis."""
    again = kernels.quantize(kernels.dequantize(q).t(), q.policy)
    return kernels.dequantize(again).t()


def quantized_in_each_way(x: Tensor) -> dict[str, Tensor]:
    """x as its consumers see it."""
    fp32 = kernels.quantize(x, "fp32")
    pow2 = kernels.quantize(x, "pow2")
    tiles, _ = kernels.quantize_weight(x[None], "pow2")     # straight from x: rounded once
    return {
        "row-wise, fp32 scales": kernels.dequantize(fp32),
        "requantized, fp32 scales": requantized(fp32),
        "row-wise, pow2 scales": kernels.dequantize(pow2),
        "requantized, pow2 scales": requantized(pow2),
        "direct transpose, pow2": kernels.dequantize(kernels.scaling_aware_transpose(pow2)).t(),
        "a scale for 128x128, pow2": kernels.dequantize.twin(tiles)[0],
    }


class Loss(NamedTuple):
    db: float                   # the signal to noise ratio of all elements
    zeros: float                # percent of the non-zero elements that become zero
    rows: float                 # percent of the rows, zero ones apart, with an error above a tenth

    @property
    def rms(self) -> float:
        """The error in percent of the signal: 20 dB are a factor of ten."""
        return 100 * 10 ** (-self.db / 20)


def loss_of(y: Tensor, x: Tensor) -> Loss:
    """In the decibels of a matrix its large rows hide the small ones, so rows are counted, too."""
    is_live = x != 0
    zeros = (y == 0) & is_live
    row_size = x.double().norm(dim=1)
    row_error = (y.double() - x).norm(dim=1)
    wrong = row_error > 0.1 * row_size
    return Loss(
        db=sqnr(y, x),
        zeros=100 * zeros.sum().item() / is_live.sum().item(),
        rows=100 * wrong.sum().item() / (row_size > 0).sum().item())


def print_double_quantization(device: str) -> None:
    print("\nWhat is lost when [1024, 2048] is quantized: signal to noise ratio, rms error; "
          "non-zero elements\nthat become zero; non-zero rows whose own error, |error| / |row|, "
          "exceeds 10%. fprop and dgrad read\nthe row-wise form, wgrad the requantized one or the "
          "direct transpose; with one scale for 128x128 all\nread the same.")
    print(f"  {'data':22}{'way':28}{'dB':>8}{'rms':>8}{'zeros':>10}{'rows':>9}")
    for kind, x in samples(1024, 2048, device).items():
        for way, y in quantized_in_each_way(x).items():
            loss = loss_of(y, x)
            print(f"  {kind:22}{way:28}{loss.db:8.2f}{loss.rms:7.2f}%{loss.zeros:9.3f}%"
                  f"{loss.rows:8.1f}%")


# ---- main ----------------------------------------------------------------------------------------

def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.trace", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", nargs="?", metavar="SPEC", help="flow, or flow,swiglu=unfused")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    if args.spec is None:
        print(f"torch {torch.__version__}, {machine}")
        print_casts(device)
        print_double_quantization(device)
        return
    try:
        fp8flow.parse_spec(args.spec)
    except ValueError as error:
        parser.error(f"SPEC {args.spec}: {error}")
    print(f"torch {torch.__version__}, {machine}")
    print_launches(args.spec, LAYERS["layer 1"] if device == "cuda" else ON_A_CPU, device)


if __name__ == "__main__":
    main()
