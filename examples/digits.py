"""Trains on scikit-learn's handwritten digits in one process: two state servers, a schedule, clipping, and the test accuracy.

    python examples/digits.py [--epochs 10]
"""

import argparse

import torch
from sklearn.datasets import load_digits

import orlop


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1,797 images of 64 pixels in [0, 1] and their digits, shuffled."""
    images, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(digits)[order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs

    images, digits = data()
    train, test = slice(0, 1500), slice(1500, None)
    torch.manual_seed(0)
    with orlop.local(servers=2, memory="256MiB") as session:
        model = session.bind(torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)))
        optimizer = orlop.AdamW(model.parameters(), lr=3e-3, max_norm=1.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
        for epoch in range(epochs):
            for x, y in zip(images[train].split(50), digits[train].split(50)):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
            schedule.step()
            correct = (model(images[test]).argmax(1) == digits[test]).float().mean().item()
            print(f"epoch {epoch + 1:2}: loss {loss.item():.4f}, test accuracy {correct:.1%}, gradient norm {optimizer.grad_norm:.3f}")
        for server in session.status()["servers"]:
            print(f"server {server['name']}: {server['memory_bytes'] / 2**20:.1f} MiB of {server['memory_budget_bytes'] / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
