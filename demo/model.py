"""A byte-level decoder-only GPT: pre-norm blocks, learned positions, head tied to the embedding."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn
from torch.nn import functional

BYTE_VALUES = 256


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the model.

    Parameters
    ----------
    depth : int
        Number of blocks.
    width : int
        Elements of the residual stream, a multiple of `head_width`.
    head_width : int
        Elements of one attention head.
    context : int
        Longest sequence, in bytes.
    """

    depth: int = 3
    width: int = 512
    head_width: int = 64
    context: int = 128

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"model {field.name} is {getattr(self, field.name)}; it must be at least 1")
        if self.width % self.head_width:
            raise ValueError(f"model width is {self.width}; it must be a multiple of head_width, {self.head_width}")

    def parameter_count(self) -> int:
        """Return the number of elements of all parameters; a tied one counts once."""
        block = 12 * self.width**2 + 4 * self.width  # four matrices, two norms
        return (BYTE_VALUES + self.context) * self.width + self.depth * block + 2 * self.width


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron, each added to its input of shape [batch, time, width]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.head_width = config.head_width
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.perceptron_norm = nn.LayerNorm(width)
        self.perceptron_in = nn.Linear(width, 4 * width, bias=False)
        self.perceptron_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        batch, time, width = stream.shape
        heads = self.query_key_value(self.attention_norm(stream)).view(batch, time, 3, -1, self.head_width)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        return stream + self.perceptron_out(functional.gelu(self.perceptron_in(self.perceptron_norm(stream))))


class GPT(nn.Module):
    """Predicts the next byte.

    Examples
    --------
    >>> model = GPT(ModelConfig(depth=1, width=64, context=16))
    >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
    torch.Size([2, 16, 256])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(BYTE_VALUES, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, BYTE_VALUES, bias=False)
        self.head.weight = self.embedding.weight
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        # GPT-2's scheme: 0.02, and less where a block adds to the residual stream, so that its variance does not grow with depth.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Block):
            for out in (module.attention_out, module.perceptron_out):
                nn.init.normal_(out.weight, std=0.02 / math.sqrt(2 * self.config.depth))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Return the logits [batch, time, 256] of the byte after each byte of `text`, int64 [batch, time]."""
        place = torch.arange(text.shape[1], device=text.device)
        stream = self.embedding(text) + self.position(place)
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.final_norm(stream))

    def loss(self, text: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy, in nats per byte, of `text`, int64 [batch, time + 1]: each byte given those before it."""
        logits = self(text[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())

    @torch.no_grad()
    def continue_text(self, prompt: bytes, count: int, *, seed: int, temperature: float = 0.7) -> bytes:
        """Return `count` bytes after `prompt` (not empty), drawn with a generator of that seed."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.tensor([list(prompt)])
        for _ in range(count):
            logits = self(text[:, -self.config.context:])[:, -1]
            following = torch.multinomial(functional.softmax(logits / temperature, -1), 1, generator=generator)
            text = torch.cat([text, following], 1)
        return bytes(text[0, len(prompt):].tolist())


def seeded_model(config: ModelConfig, seed: int) -> GPT:
    """Return the model with the same initial weights in every process. The caller's random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT(config)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return two groups in torch's form: matrices, which decay, and norms, which do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
