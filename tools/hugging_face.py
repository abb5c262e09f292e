"""The experts of Hugging Face models, through fp8flow.

    python -m tools.hugging_face            a tiny random Qwen3-MoE: SQNR against eager, 30 steps
    python -m tools.hugging_face --layer    on a GPU, the time of Qwen3-30B-A3B's expert layer

transformers 5 lets a model's experts be computed by a function that is registered by name:

    register()
    model.set_experts_implementation("fp8flow-flow")        or "fp8flow-naive", "fp8flow-bf16"

The weights are cast in every call.
"""
import argparse
import statistics
import sys
import types
from pathlib import Path

import torch

# A package of PyPI is called `kernels`, as a file of this project is, and transformers imports that
# package where it is installed. So the project is imported as a package here, and its folder, which
# `python -m` puts on the path, is taken off.
ROOT = Path(__file__).resolve().parents[1]
sys.path = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
package = types.ModuleType("fp8_flow_moe")
package.__path__ = [str(ROOT)]
sys.modules["fp8_flow_moe"] = package

from fp8_flow_moe.fp8flow import RECIPES, cast_weights, experts, sqnr

try:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.integrations import moe
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
except ImportError as error:
    sys.exit(f"tools.hugging_face needs transformers 5 ({error}): pip install transformers")

STEPS = 30
# In dB, at step 0: logits, and gradients of the experts' weights.
FLOORS = {"bf16": (40, 30), "naive": (28, 18), "flow": (30, 20)}


def check_plain_swiglu(module) -> None:
    """Raises ValueError for experts that compute something else than fp8flow does."""
    name = type(module).__name__
    remedy = "use another experts implementation"
    activation = type(getattr(module, "act_fn", None)).__name__
    plain_gate = type(module)._apply_gate is moe._default_apply_gate
    if not has(module, "has_gate", default=True) or not plain_gate:
        raise ValueError(f"{name} has a gate of its own (_apply_gate), not SwiGLU: {remedy}")
    if module.has_bias or has(module, "has_post_expert_norm"):
        raise ValueError(f"{name} has a bias or a norm after each expert: {remedy}")
    if module.is_transposed or not has(module, "is_concatenated", default=True):
        raise ValueError(f"{name} stores gate_up_proj transposed or interleaved: {remedy}")
    if activation not in ("SiLU", "SiLUActivation"):
        raise ValueError(f"{name} has the activation {activation}, not SiLU: {remedy}")
    if has(module, "_is_expert_parallel"):
        raise ValueError(f"{name} is spread over several GPUs by expert: {remedy}")


def has(module, attribute: str, default: bool = False) -> bool:
    """For what came to transformers after 5.0."""
    return getattr(module, attribute, default)


def register() -> None:
    """Adds fp8flow-bf16, fp8flow-naive and fp8flow-flow to transformers' implementations."""
    for recipe in RECIPES:
        moe.ALL_EXPERTS_FUNCTIONS.register(f"fp8flow-{recipe}", experts_forward(recipe))


def experts_forward(recipe, operands=None):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        check_plain_swiglu(self)
        return experts(hidden_states, top_k_index, top_k_weights, self.gate_up_proj,
                       self.down_proj, recipe, operands=operands)
    return forward


# ---- a tiny model: how close, and does it learn --------------------------------------------------

def tiny_model(implementation: str, device) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, moe_intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_experts=8, num_experts_per_tok=2, max_position_embeddings=128)
    model = Qwen3MoeForCausalLM(config).to(device)
    model.set_experts_implementation(implementation)
    return model


def gradients(model, tokens) -> dict:
    """Logits, and the gradients of all experts and of all routers, each as one vector."""
    out = model(tokens, labels=tokens)
    out.loss.backward()
    found = {"logits": [out.logits.detach().flatten()], "experts": [], "router": []}
    for name, weight in model.named_parameters():
        if ".experts." in name:
            found["experts"].append(weight.grad.flatten())
        if ".mlp.gate." in name:
            found["router"].append(weight.grad.flatten())
    model.zero_grad()
    return {name: torch.cat(tensors) for name, tensors in found.items()}


def losses(model, text) -> list[float]:
    """Of the first and of the last of 30 steps on windows of one text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for step in range(STEPS):
        begin = 37 * step % (len(text) - 4 * 128)
        tokens = text[begin:begin + 4 * 128].view(4, 128)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return [seen[0], seen[-1]]


def compare_with_eager(device) -> bool:
    """Prints a line for each implementation; True if all are as close as FLOORS says."""
    source = Path(__file__).read_bytes()
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8).long().to(device)
    tokens = text[:4 * 128].view(4, 128)
    exact = gradients(tiny_model("eager", device), tokens)
    first, last = losses(tiny_model("eager", device), text)
    print("a tiny random Qwen3-MoE; SQNR in dB against eager in fp32, before training; loss of the "
          f"first and of the last of {STEPS} steps")
    print(f"  {'':16}{'logits':>10}{'experts dW':>12}{'router dW':>12}{'first':>9}{'last':>9}")
    print(f"  {'eager':16}{'':34}{first:9.3f}{last:9.3f}")
    all_close = True
    for recipe in RECIPES:
        name = f"fp8flow-{recipe}"
        got = gradients(tiny_model(name, device), tokens)
        db = {key: sqnr(got[key], exact[key]) for key in exact}
        first, last = losses(tiny_model(name, device), text)
        print(f"  {name:16}{db['logits']:10.1f}{db['experts']:12.1f}{db['router']:12.1f}"
              f"{first:9.3f}{last:9.3f}", flush=True)
        logits_floor, experts_floor = FLOORS[recipe]
        close = db["logits"] >= logits_floor and db["experts"] >= experts_floor
        if not close or last > 0.8 * first:
            print(f"  {name}: below {FLOORS[recipe]} dB, or it does not learn", file=sys.stderr)
            all_close = False
    print("  The router's gradient is the weakest in FP8: it is a sum whose terms cancel.")
    return all_close


# ---- a real layer: how fast ----------------------------------------------------------------------

def time_layer() -> None:
    """Qwen3-30B-A3B's expert layer, forward and backward of 16384 tokens with bf16 weights: median
    ms of 20 rounds in which the implementations take turns."""
    T = 16384
    D = 2048
    F = 768
    E = 128
    k = 8
    config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=F, num_experts=E)
    module = Qwen3MoeExperts(config).to("cuda", torch.bfloat16)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn_like(x)
    weights, index = torch.rand(T, E, device="cuda").softmax(-1).topk(k, dim=-1)
    weights = (weights / weights.sum(-1, keepdim=True)).bfloat16()
    operands = cast_weights(module.gate_up_proj, module.down_proj, "flow")
    moe.ALL_EXPERTS_FUNCTIONS.register("flow, cast before", experts_forward("flow", operands))
    names = ["grouped_mm", "fp8flow-bf16", "fp8flow-flow", "flow, cast before"]
    times = {name: [] for name in names}
    for _ in range(23):
        for name in names:
            module.config._experts_implementation = name
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            module(x, index, weights).backward(dy)
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end))
            module.zero_grad()
            x.grad = None
    print(f"Qwen3-30B-A3B's expert layer: T {T}, D {D}, F {F}, E {E}, k {k}; "
          f"{torch.cuda.get_device_name()}")
    base = statistics.median(times["grouped_mm"][3:])
    for name in names:
        ms = statistics.median(times[name][3:])
        print(f"  {name:20}{ms:8.2f} ms{base / ms:7.2f}x of transformers' grouped_mm")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.hugging_face", allow_abbrev=False,
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--layer", action="store_true",
                        help="time the expert layer of Qwen3-30B-A3B on a GPU instead")
    args = parser.parse_args()
    if args.layer and not torch.cuda.is_available():
        parser.error("--layer: PyTorch sees no GPU here, leave it out")
    register()
    if args.layer:
        time_layer()
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    all_close = compare_with_eager(device)
    return 0 if all_close else 1


if __name__ == "__main__":
    sys.exit(main())
