"""A small Mixture-of-Experts GPT over bytes. Nothing here knows about FP8: the experts come from fp8flow.

Activations are bf16, master weights fp32, the router computes in fp32. Attention and the router stay what they are in
every recipe; only `Experts` changes.

Shapes: B sequences, S positions, D model width, T = B*S tokens, E experts, k experts per token.
"""
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fp8flow import Experts, Recipe, make_plan


@dataclass(frozen=True)
class GPTConfig:
    """Raises ValueError where the sizes cannot work together."""
    n_layers: int
    d_model: int
    n_heads: int
    d_expert: int
    n_experts: int
    top_k: int
    seq_len: int
    vocab: int = 256            # bytes

    def __post_init__(self):
        for field in fields(self):
            if field.type is int and not 1 <= getattr(self, field.name) < 2 ** 31:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must lie between 1 and 2^31")
        for name in ("d_model", "d_expert"):
            if getattr(self, name) % 128:
                raise ValueError(f"{name}={getattr(self, name)} must be a multiple of 128, the FP8 block")
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k={self.top_k} must not exceed n_experts={self.n_experts}")
        if self.d_model % (8 * self.n_heads):
            raise ValueError(f"n_heads={self.n_heads} must divide d_model={self.d_model} into heads of 8, 16, 24, ...")


def wide(x: Tensor) -> Tensor:
    """What is multiplied: few CPUs multiply bf16 at the speed of fp32."""
    return x.float() if x.is_cpu else x


class Linear(nn.Linear):
    """fp32 master weight, rounded to the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(wide(x), wide(self.weight.to(x.dtype))).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """fp32 master weight, computed in the dtype of the input: PyTorch's fused kernel wants one dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


@lru_cache
def rotation(S: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos [S, 1, 1, d], for both elements of a pair, and sin [S, 1, 1, d/2] of the angles by which position s turns the
    pairs i of a head of width d: s * 10000^(-2i/d)."""
    with torch.inference_mode(False):                                   # made in evaluation, they serve training too
        frequencies = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
        angles = torch.arange(S, device=device)[:, None, None, None] * frequencies
        return torch.cat([angles, angles], dim=-1).cos().to(dtype), angles.sin().to(dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
    """x [B, S, ., H, d] -> the same, of which elements i and d/2 + i, a pair (a, b), have become
    (a cos - b sin, b cos + a sin). sign=-1: back."""
    y, half = x * cos, sin.shape[-1]
    y[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    y[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return y


class Rotary(torch.autograd.Function):
    """Turns each pair by its position's angle, so that q @ k sees distances alone; backward turns back. Autograd's own
    backward would read and write half as much again."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return turn(dy, *ctx.saved_tensors, sign=-1), None, None


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_heads, D = config.n_heads, config.d_model
        self.qk, self.v, self.out = (Linear(D, width, bias=False) for width in (2 * D, D, D))

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, S, D] bf16, angles: what `rotation` returns, in bf16 -> [B, S, D]."""
        qk = rearrange(self.qk(x), "b s (two h d) -> b s two h d", two=2, h=self.n_heads)
        qk = Rotary.apply(F.rms_norm(qk, qk.shape[-1:]), *angles)           # normalised: no logit can run away
        v = rearrange(self.v(x), "b s (h d) -> b s h d", h=self.n_heads)
        q, k, v = (wide(rearrange(t, "b s h d -> b h s d")) for t in (*qk.unbind(2), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(y, "b h s d -> b s (h d)").to(x.dtype))


class MoE(nn.Module):
    """Router and experts. `load` [E] is each expert's share of the last batch."""

    def __init__(self, config: GPTConfig, recipe: Recipe):
        super().__init__()
        self.top_k, self.n_experts = config.top_k, config.n_experts
        self.router = nn.Linear(config.d_model, config.n_experts, bias=False)
        self.experts = Experts(config.n_experts, config.d_model, config.d_expert, recipe)
        self.load = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, D] bf16 -> the same, and the load-balancing loss: 1 when the load is even (Switch, eq. 4)."""
        tokens = rearrange(x, "b s d -> (b s) d")
        scores = self.router(tokens.float()).softmax(-1)                    # [T, E] fp32
        probs, chosen = scores.topk(self.top_k, dim=-1)                     # [T, k]
        plan = make_plan(chosen, self.n_experts)
        self.load = plan.counts / chosen.numel()
        if self.top_k > 1:                                                  # with one choice it would always be 1,
            probs = probs / probs.sum(-1, keepdim=True)                     # and the router would learn nothing
        y = self.experts(tokens, probs, plan)
        return y.view_as(x), self.n_experts * (self.load * scores.mean(0)).sum()


class Block(nn.Module):
    def __init__(self, config: GPTConfig, recipe: Recipe):
        super().__init__()
        self.norm1, self.attention = RMSNorm(config.d_model, eps=1e-6), Attention(config)
        self.norm2, self.moe = RMSNorm(config.d_model, eps=1e-6), MoE(config, recipe)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.norm1(x), angles)
        y, balance = self.moe(self.norm2(x))
        return x + y, balance


class GPT(nn.Module):
    def __init__(self, config: GPTConfig, recipe: Recipe):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.d_model)
        self.blocks = nn.ModuleList(Block(config, recipe) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, eps=1e-6)
        self.head = Linear(config.d_model, config.vocab, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:                                           # residual branches start small (GPT-2)
            for weight in (block.attention.out.weight, block.moe.experts.w2):
                nn.init.normal_(weight, std=0.02 / (2 * config.n_layers) ** 0.5)
            nn.init.normal_(block.moe.experts.w1, std=0.02)

    @property
    def moes(self) -> list[MoE]:
        return [block.moe for block in self.blocks]

    def forward(self, tokens: Tensor, targets: Tensor | None = None):
        """tokens [B, S] int64 -> logits [B, S, vocab] bf16; with targets, the mean cross-entropy in nats and the mean
        load-balancing loss over the layers (both fp32)."""
        x, balances = self.embed(tokens).bfloat16(), []
        angles = rotation(tokens.shape[1], self.config.d_model // self.config.n_heads, x.device, x.dtype)
        for block in self.blocks:
            x, balance = block(x, angles)
            balances.append(balance)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), torch.stack(balances).mean()

    def parameter_counts(self) -> tuple[int, int]:
        """(all, active for one token)."""
        total = sum(p.numel() for p in self.parameters())
        experts = sum(p.numel() for moe in self.moes for p in moe.experts.parameters())
        return total, total - experts + experts * self.config.top_k // self.config.n_experts

    @torch.no_grad()
    def generate(self, prompt: bytes, n: int, seed: int = 0, temperature: float = 0.8) -> bytes:
        """Continue `prompt` by n sampled bytes. Runs the whole window each step: simple, and short enough here."""
        device = self.embed.weight.device
        rng = torch.Generator().manual_seed(seed)
        text = list(prompt)
        for _ in range(n):
            window = torch.tensor([text[-self.config.seq_len:]], device=device)
            scores = self(window)[0, -1].float().cpu() / temperature
            text.append(int(torch.multinomial(scores.softmax(-1), 1, generator=rng)))
        return bytes(text)
