"""Frozen parameters stay with their worker until they change, as the frozen base of an adapter does."""

import pytest
import torch
from safetensors.torch import load_file

import orlop


class Adapted(torch.nn.Module):
    """A frozen base, an adapter on it, and a buffer."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.base = torch.nn.Linear(512, 512, bias=False)
        self.base.requires_grad_(False)
        torch.manual_seed(1)
        self.down, self.up = torch.nn.Linear(512, 4, bias=False), torch.nn.Linear(4, 512, bias=False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def run(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(8, 512, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def adamw(model):
    return orlop.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, state="fp32")


def bytes_of(session, name):
    return sum(slot["bytes"] for shard in session.client.describe_tensor(session.job, name)["shards"] for slot in shard["slots"])


def reference(steps):
    model = Adapted()
    run(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3), steps)
    return model


def test_a_frozen_base_takes_no_memory_and_training_is_torchs(servers, tmp_path, capfd):
    with orlop.connect(servers.address, job="frozen-base") as session:
        model = session.bind(Adapted())
        run(model, adamw(model), 3)
        assert bytes_of(session, "base.weight") == 0 < bytes_of(session, "down.weight")
        assert torch.equal(session.get("base.weight"), model.base.weight)
        session.export(tmp_path / "w.safetensors")
        assert "'base.weight'; session.bind(model, store_frozen=True)" in capfd.readouterr().err
        assert set(load_file(tmp_path / "w.safetensors")) == {"down.weight", "up.weight", "count"}
    expected = reference(5)
    with orlop.connect(servers.address, job="frozen-base") as session:  # the next run brings the same base
        model = session.bind(Adapted())
        optimizer = adamw(model)
        optimizer.attach()
        run(model, optimizer, 2, first=3)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-7)
        reader = Adapted(seed=5)
        with orlop.connect(servers.address, job="frozen-base") as other:
            other.load(reader)
            with pytest.raises(orlop.NotFound, match="'base.weight'.*its worker keeps it"):
                other.get("base.weight")
        assert torch.equal(reader.up.weight, model.up.weight) and torch.equal(reader.base.weight, Adapted(seed=5).base.weight)


def test_another_base_is_refused_by_name(servers):
    with orlop.connect(servers.address, job="other-base") as session:
        model = session.bind(Adapted())
        run(model, adamw(model), 1)
    with orlop.connect(servers.address, job="other-base") as session:
        model = session.bind(Adapted(seed=9))
        with pytest.raises(ValueError, match="'base.weight'.*store_frozen=True"):
            adamw(model).attach()


def test_a_store_gives_the_job_another_base(servers):
    with orlop.connect(servers.address, job="replaced-base") as session:
        model = session.bind(Adapted())
        run(model, adamw(model), 1)
    with orlop.connect(servers.address, job="replaced-base") as session:
        other = Adapted(seed=9)
        other.up.weight.data.add_(1)
        session.store(other)
    with orlop.connect(servers.address, job="replaced-base") as session:
        model = session.bind(Adapted())
        adamw(model).attach()
        assert torch.equal(model.base.weight, other.base.weight) and torch.equal(model.up.weight, other.up.weight)


def test_store_frozen_keeps_the_base_on_the_servers(servers, tmp_path):
    with orlop.connect(servers.address, job="stored-base") as session:
        model = session.bind(Adapted(), store_frozen=True)
        run(model, adamw(model), 1)
        assert bytes_of(session, "base.weight") > 0
        session.export(tmp_path / "w.safetensors")
        assert torch.equal(load_file(tmp_path / "w.safetensors")["base.weight"], model.base.weight)
    with orlop.connect(servers.address, job="stored-base") as session:
        model = session.bind(Adapted(seed=9))
        adamw(model).attach()
        assert torch.equal(model.base.weight, Adapted().base.weight)


@pytest.mark.parametrize("way", ["store", "close", "export"])
def test_a_base_that_changed_travels(servers, tmp_path, way):
    job = "changed-base-" + way
    with orlop.connect(servers.address, job=job) as session:
        model = session.bind(Adapted())
        optimizer = adamw(model)
        run(model, optimizer, 1)
        model.base.weight.data.view(-1)[7] = 2.0
        assert session.get("base.weight").view(-1)[7] == 2.0
        if way == "store":
            session.store(model)
        if way == "export":
            session.export(tmp_path / "w.safetensors")
            assert torch.equal(load_file(tmp_path / "w.safetensors")["base.weight"], model.base.weight)
        if way != "close":
            assert bytes_of(session, "base.weight") > 0
        run(model, optimizer, 1, first=1)
        expected = model.base.weight.clone()
    with orlop.connect(servers.address, job=job) as session:
        model = session.bind(Adapted(seed=9))
        adamw(model).attach()
        assert torch.equal(model.base.weight, expected)


def test_a_base_that_is_unfrozen_is_trained(servers):
    model = Adapted()
    with orlop.connect(servers.address, job="unfrozen-base") as session:
        session.bind(model)
        adamw(model).attach()
        assert bytes_of(session, "base.weight") == 0
        model.base.requires_grad_(True)
        run(model, adamw(model), 2)
        assert bytes_of(session, "base.weight") > 0
        assert torch.equal(session.get("base.weight", "master"), model.base.weight)
    expected = Adapted()
    expected.base.requires_grad_(True)
    run(expected, torch.optim.AdamW(expected.parameters(), lr=1e-3), 2)
    torch.testing.assert_close(model.base.weight, expected.base.weight, rtol=1e-5, atol=1e-6)


def test_what_stays_survives_a_restart_of_the_servers(tmp_path):
    for first in (0, 2):
        with orlop.local(directory=tmp_path / "d", job="kept") as session:
            model = session.bind(Adapted())
            optimizer = adamw(model)
            optimizer.attach()
            run(model, optimizer, 2, first=first)
            assert bytes_of(session, "base.weight") == 0
            if first:
                model.base.weight.data.mul_(0.5)
    with orlop.local(directory=tmp_path / "d", job="kept") as session:  # what the last close stored
        model = session.bind(Adapted(seed=3))
        adamw(model).attach()
        assert torch.equal(model.base.weight, Adapted().base.weight * 0.5)
