"""A small GPT learns Python's source text, byte by byte, through two private state servers."""

import os
import pathlib

import torch
from torch import nn

import orlop


class GPT(nn.Module):
    def __init__(self, width=64, context=32):
        super().__init__()
        self.bytes, self.places, self.head = nn.Embedding(256, width), nn.Embedding(context, width), nn.Linear(width, 256)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.blocks(self.bytes(x) + self.places.weight[:x.shape[1]], mask, is_causal=True))


text = b"".join(path.read_bytes() for path in sorted(pathlib.Path(os.__file__).parent.glob("*.py")))
data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
with orlop.local(servers=2) as session:
    gpt = session.bind(GPT())
    optimizer = orlop.AdamW(gpt.parameters(), lr=3e-3, max_norm=1.0)
    for _ in range(60):
        lines = data[torch.randint(len(data) - 33, (16, 1)) + torch.arange(33)]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(gpt(lines[:, :-1]).flatten(0, 1), lines[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    print(f"step {session.step}: loss {loss.item():.2f} where a guess has 5.55, gradient norm {optimizer.grad_norm:.2f}")
