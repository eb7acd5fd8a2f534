"""Trains a model through a private state server. If you run it again, it resumes."""

import torch

import orlop

with orlop.local(directory="state") as session:
    model = session.bind(torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 10)))
    opt = orlop.AdamW(model.parameters(), lr=1e-3)
    for step in range(100):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(model(x), x[:, :10].argmax(1))
        loss.backward()
        opt.step()
        opt.zero_grad()
    print(f"step {session.step}: loss {loss.item():.3f}, gradient norm {opt.grad_norm:.3f}")
