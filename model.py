"""A small Mixture-of-Experts GPT over bytes. Nothing here knows about FP8: the experts come from
fp8flow.

Activations are bf16 (on a CPU fp32: few multiply bf16 as fast), master weights fp32, and the router
computes in fp32. Attention and the router stay what they are in every recipe; only `Experts`
changes, inside which activations are bf16 or FP8 everywhere.

Shapes: B sequences, S positions, D model width, H heads, E experts, k experts per token.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

if __package__:
    from .fp8flow import Experts, Recipe, require
else:
    from fp8flow import Experts, Recipe, require


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

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            require(value > 0 and math.isfinite(value), f"{field.name} must be positive", value)
        require(self.d_model % 128 == 0, "d_model must be a multiple of 128", self.d_model)
        require(self.d_expert % 128 == 0, "d_expert must be a multiple of 128", self.d_expert)
        require(self.top_k <= self.n_experts, "top_k must not exceed n_experts", self.top_k)
        require(self.d_model % (8 * self.n_heads) == 0,
                "n_heads must divide d_model into heads of 8, 16, 24, ...", self.n_heads)


class Linear(nn.Linear):
    """fp32 master weight, rounded to the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """fp32 master weight, rounded to the dtype of the input: PyTorch's fused kernel wants one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rotation(S: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [S, 1, 1, width/2] of the angles by which position s turns the pairs i of a head:
    s * 10000^(-2i/width)."""
    pair = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    position = torch.arange(S, device=device, dtype=torch.float32)
    angles = position[:, None] * 10000.0 ** (-pair / width)
    angles = angles[:, None, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [B, S, 2, H, d] -> the same, each pair (a, b) of elements i and d/2 + i
    turned by its position's angle, so that q @ k sees distances alone."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        D = config.d_model
        self.n_heads = config.n_heads
        self.qk = Linear(D, 2 * D, bias=False)
        self.v = Linear(D, D, bias=False)
        self.out = Linear(D, D, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, S, D], angles: what `rotation` returns, in x's dtype -> [B, S, D]."""
        qk = rearrange(self.qk(x), "b s (two h d) -> b s two h d", two=2, h=self.n_heads)
        qk = F.rms_norm(qk, qk.shape[-1:])  # Normalised, no logit of attention can run away.
        q, k = turn(qk, *angles).unbind(2)
        q = rearrange(q, "b s h d -> b h s d")
        k = rearrange(k, "b s h d -> b h s d")
        v = rearrange(self.v(x), "b s (h d) -> b h s d", h=self.n_heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(y, "b h s d -> b s (h d)"))


class Router(nn.Linear):
    """Scores in fp32 whatever surrounds it, autocast or a model in bf16: close choices depend on
    the last bits."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float()).softmax(-1)


class MoE(nn.Module):
    """Router and experts."""

    def __init__(self, config: GPTConfig, recipe: Recipe):
        super().__init__()
        self.top_k = config.top_k
        self.router = Router(config.d_model, config.n_experts, bias=False)
        self.experts = Experts(config.n_experts, config.d_model, config.d_expert, recipe)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, D] -> the same, and the load-balancing loss: 1 when the load is even
        (Switch Transformers, equation 4)."""
        probs = self.router(x)                                          # [B, S, E] fp32
        top_k_weights, top_k_index = probs.topk(self.top_k, dim=-1)     # [B, S, k]
        # Divided by itself, the weight of a single choice would be 1, whatever the router learns.
        if self.top_k > 1:
            top_k_weights = top_k_weights / top_k_weights.sum(-1, keepdim=True)
        y = self.experts(x, top_k_index, top_k_weights)

        E = probs.shape[-1]
        expert = torch.arange(E, device=x.device)
        chosen = top_k_index[..., None] == expert                       # [B, S, k, E]
        load = chosen.float().mean((0, 1, 2))                           # each expert's share
        return y, E * (load * probs.mean((0, 1))).sum()


class Block(nn.Module):
    def __init__(self, config: GPTConfig, recipe: Recipe):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, eps=1e-6)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.d_model, eps=1e-6)
        self.moe = MoE(config, recipe)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.norm1(x), angles)
        y, balance = self.moe(self.norm2(x))
        return x + y, balance


class GPT(nn.Module):
    def __init__(self, config: GPTConfig, recipe: Recipe):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(256, config.d_model)          # a vector for each byte
        self.blocks = nn.ModuleList(Block(config, recipe) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, eps=1e-6)
        self.head = Linear(config.d_model, 256, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's: everything small, what ends a residual branch smaller with depth."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        residual_std = 0.02 / (2 * self.config.n_layers) ** 0.5
        for block in self.blocks:
            nn.init.normal_(block.attention.out.weight, std=residual_std)
            nn.init.normal_(block.moe.experts.w2, std=residual_std)
            nn.init.normal_(block.moe.experts.w1, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None):
        """tokens [B, S] int64 -> logits [B, S, 256]; with targets, the mean cross-entropy in nats
        and the mean load-balancing loss over the layers (both fp32)."""
        x = self.embed(tokens)
        if x.is_cuda:
            x = x.bfloat16()
        head_width = self.config.d_model // self.config.n_heads
        angles = rotation(tokens.shape[1], head_width, x.device, x.dtype)
        balances = []
        for block in self.blocks:
            x, balance = block(x, angles)
            balances.append(balance)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return loss, torch.stack(balances).mean()

    def parameter_counts(self) -> tuple[int, int]:
        """(all, active for one token)."""
        total = sum(p.numel() for p in self.parameters())
        experts = sum(p.numel() for name, p in self.named_parameters() if ".experts." in name)
        active_experts = experts * self.config.top_k // self.config.n_experts
        return total, total - experts + active_experts

    @torch.no_grad()
    def generate(self, prompt: bytes, n: int, seed: int = 0, temperature: float = 0.8) -> bytes:
        """Continues `prompt`, at least one byte, by n sampled bytes. Runs the whole window for each
        of them: simple, and short enough here."""
        require(len(prompt) > 0, "prompt is what the model continues: give a byte or more", prompt)
        S = self.config.seq_len
        device = self.embed.weight.device
        rng = torch.Generator().manual_seed(seed)
        text = list(prompt)
        for _ in range(n):
            seen = text[-S:]
            # A byte does not see those after it. All windows have one length, since cuDNN prepares
            # attention anew for each length, which takes longer than the model.
            window = torch.tensor([seen + [0] * (S - len(seen))], device=device)
            scores = self(window)[0, len(seen) - 1].float().cpu() / temperature
            text.append(int(torch.multinomial(scores.softmax(-1), 1, generator=rng)))
        return bytes(text)
