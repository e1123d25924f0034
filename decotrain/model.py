"""The example model: a decoder-only transformer over bytes, in the spirit of MobileLLM.

Deep and thin: RMSNorm before each block, rotary positions, grouped-query attention with
normalised queries and keys, SwiGLU, one matrix for embedding and output. A token is a byte: the
vocabulary is 256.

It knows nothing of training, peers or data; any other `torch.nn.Module` can take its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


@dataclass(frozen=True)
class ModelConfig:
    """Shapes. `hidden` is the inner width of SwiGLU; `context` the longest input in bytes."""

    layers: int = 6
    width: int = 96
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 256
    context: int = 128

    def __post_init__(self) -> None:
        assert self.width % self.heads == 0, f"width {self.width} is not heads {self.heads} x n"
        assert self.heads % self.kv_heads == 0, f"{self.heads} heads, {self.kv_heads} kv_heads"
        assert (self.width // self.heads) % 2 == 0, "rotary positions need an even head width"


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-5)


def rotary_table(context: int, head_width: int, base: float = 10_000.0) -> Tensor:
    """(2, context, head_width / 2): cosines and sines of position x frequency."""
    frequency = base ** (-torch.arange(0, head_width, 2).float() / head_width)
    angle = torch.outer(torch.arange(context).float(), frequency)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + half]) by its angle. x: (batch, heads, time, width)."""
    cos, sin = table[0], table[1]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Causal attention; groups of query heads share one key and value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_width = config.width // config.heads
        kv_width = self.kv_heads * self.head_width
        self.qkv = nn.Linear(config.width, config.width + 2 * kv_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.query_norm = RMSNorm(self.head_width)
        self.key_norm = RMSNorm(self.head_width)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        batch, time, width = x.shape
        heads = self.qkv(x).view(batch, time, self.heads + 2 * self.kv_heads, self.head_width)
        q, k, v = heads.transpose(1, 2).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(self.query_norm(q), table), rotate(self.key_norm(k), table)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, time, width))
        return out


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.width), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.width), SwiGLU(config)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Transformer(nn.Module):
    """Bytes in, scores for the next byte out."""

    rotary: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        table = rotary_table(config.context, config.width // config.heads)
        self.register_buffer("rotary", table, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights; what writes to the residual stream starts small, as depth grows."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not name.startswith("embedding"):
                std: float = parameter.shape[1] ** -0.5
                if name.endswith(("out.weight", "down.weight")):
                    std /= (2 * self.config.layers) ** 0.5
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (batch, time) integers below 256. Returns scores: (batch, time, 256)."""
        return F.linear(self.features(tokens), self.embedding.weight)

    def features(self, tokens: Tensor) -> Tensor:
        """What the scores are made from: (batch, time, width)."""
        time = tokens.shape[1]
        assert time <= self.config.context, f"{time} bytes, context {self.config.context}"
        table = self.rotary[:, :time]
        x = F.embedding(tokens, self.embedding.weight)
        for block in self.blocks:
            x = block(x, table)
        out: Tensor = self.norm(x)
        return out


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats for each byte. windows: (batch, context + 1) integers."""
    scores = model(windows[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def generate(
    model: Transformer, prompt: bytes, length: int, temperature: float = 0.7, seed: int = 0
) -> bytes:
    """`length` more bytes after the prompt, sampled one by one."""
    assert prompt, "generation starts from at least one byte"
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    for _ in range(length):
        window = torch.tensor([text[-model.config.context :]])
        scores = model(window)[0, -1].float() / temperature
        text.append(int(torch.multinomial(scores.softmax(-1), 1, generator=generator)))
    return bytes(text[len(prompt) :])
