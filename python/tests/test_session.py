import concurrent.futures
import copy
import os
import subprocess
import sys
import threading

import pytest
import safetensors.torch
import torch

import orlop
from conftest import train_step


def test_any_tensor_and_state_can_be_read(job, make_net, batches):
    net = make_net()
    job.bind(net)
    optimizer = orlop.AdamW(net.parameters(), session=job)
    train_step(net, optimizer, batches[0])
    assert torch.equal(job.get("first.weight"), net.first.weight)
    assert torch.equal(job.get("first.weight", "master"), net.first.weight)
    torch.testing.assert_close(job.get("second.bias", "exp_avg"), 0.1 * net.second.bias.grad)
    with orlop.connect(job.address, job=job.job) as reader:
        assert torch.equal(reader.get("second.bias"), net.second.bias)
    with pytest.raises(KeyError, match="'nobody'"):
        job.get("nobody")
    with pytest.raises(orlop.Error):
        job.get("first.weight", "momentum_buffer")


def test_a_tensor_read_while_the_job_trains_is_of_one_step(job):
    """A step takes 1 from every element, so a version is one value. Each server has four shards, fetched by several calls."""
    parameter = torch.nn.Parameter(torch.zeros(2**12, 2**13, dtype=torch.bfloat16))
    optimizer = orlop.SGD([("w", parameter)], lr=1.0, session=job)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    enough = threading.Event()

    def train():
        while not enough.is_set():
            optimizer.step()
    with concurrent.futures.ThreadPoolExecutor() as pool, orlop.connect(job.address, job=job.job) as reader:
        training = pool.submit(train)
        try:
            seen = [reader.get("w") for _ in range(10)]
        finally:
            enough.set()
        training.result()
    assert all((tensor == tensor[0, 0]).all() for tensor in seen)
    assert seen[-1][0, 0] < seen[0][0, 0], "the job stepped meanwhile"


def test_reading_a_job_that_is_not_there_names_it(servers):
    with orlop.connect(servers.address, job="absent") as session:
        assert session.step == 0 and session.status()["job"] is None
        with pytest.raises(orlop.NotFound, match="absent"):
            session.get("w")


def test_status_tells_job_and_servers(job, make_net, batches):
    net = make_net()
    job.bind(net)
    train_step(net, orlop.AdamW(net.parameters()), batches[0])
    status = job.status()
    assert status["job"]["committed_step"] == 1
    assert len(status["servers"]) == 2 and all(s["memory_bytes"] <= s["memory_budget_bytes"] for s in status["servers"])


def test_buffers_are_stored_and_come_back(job):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    job.bind(net)
    net(torch.randn(8, 4)).sum().backward()
    orlop.SGD(net.parameters()).step()
    net(torch.randn(8, 4))
    job.store(net)
    assert torch.equal(job.get("1.running_mean"), net[1].running_mean)
    assert job.get("1.num_batches_tracked").item() == 2


def test_an_export_holds_exact_weights_and_the_buffers_of_now(job, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).bfloat16()
    job.bind(net)
    optimizer = orlop.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(8, 4, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()
    net(torch.randn(8, 4, dtype=torch.bfloat16))  # only the buffers change
    job.export(tmp_path / "model.safetensors")
    exported = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert exported.keys() == net.state_dict().keys()
    assert torch.equal(exported["0.weight"], job.get("0.weight", "master")) and exported["0.weight"].dtype == torch.float32
    assert exported["1.num_batches_tracked"].item() == 3
    assert torch.equal(exported["1.running_mean"].bfloat16(), net[1].running_mean)


def test_other_threads_run_while_a_call_waits(servers):
    """Two contributors in one process: join and commit of one return only when the other's are made."""
    spec = {"name": "w", "kind": "TENSOR_KIND_PARAMETER", "shape": [512], "dtype": "DTYPE_F32", "tied_names": []}
    ranks = [servers.client.create_job("threads", [spec]) for _ in range(2)]
    ranks[0].configure_optimizer({"groups": [{"optimizer": "sgd", "state": "fp32", "tensors": [0]}], "reduce": "mean"})
    generation = ranks[0].start_generation(2)
    group = {name: 0.0 for name in ("momentum", "dampening", "weight_decay", "nesterov")} | {"lr": 0.5}

    def work(rank):
        session, begin = ranks[rank], 256 * rank
        session.join(generation, rank, 2, {"mode": "EXACTLY_ONCE", "preset": "FLAT_SLICES", "reduced_from": 2})
        if rank == 0:
            session.set_state([(0, "master", "F32", None, torch.ones(512), None)])
        session.commit(load=True)
        weight = torch.zeros(256)
        session.pull([(0, "weight", "F32", (begin, 256), weight, None)])
        session.push_async([(0, "", "F32", (begin, 256), weight, None)]).wait()
        session.commit(groups=[group])
        session.pull([(0, "weight", "F32", (begin, 256), weight, None)])
        return weight

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for weight in threads.map(work, range(2)):
            assert torch.equal(weight, torch.full((256,), 0.5))


def test_the_weights_of_an_existing_job_win_at_the_first_forward(job, make_net, batches, capsys):
    net = make_net()
    job.bind(net)
    train_step(net, orlop.AdamW(net.parameters()), batches[0])
    with orlop.connect(job.address, job=job.job) as again:
        other = make_net(seed=3)
        again.bind(other)
        optimizer = orlop.AdamW(other.parameters())
        other(batches[0][0])
        assert "weights of step 1" in capsys.readouterr().out
        assert torch.equal(other.first.weight, net.first.weight)
        train_step(other, optimizer, batches[1])
        assert again.step == 2


def test_another_model_cannot_take_a_jobs_name(job, make_net, batches):
    net = make_net()
    job.bind(net)
    train_step(net, orlop.AdamW(net.parameters()), batches[0])
    with orlop.connect(job.address, job=job.job) as again:
        wrong = torch.nn.Linear(3, 3)
        again.bind(wrong)
        optimizer = orlop.AdamW(wrong.parameters())
        with pytest.raises(orlop.AlreadyExists, match=job.job):
            wrong(torch.ones(1, 3))
        assert not optimizer.attached


def test_servers_end_with_a_parent_that_is_killed():
    script = ("import orlop, os, sys\n"
              "session = orlop.local(memory='64MiB')\n"
              "print(session._servers._children[0].pid, flush=True)\n"
              "sys.stdin.read()\n")
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
    child = int(parent.stdout.readline())
    descriptor = os.pidfd_open(child)
    parent.kill()
    parent.wait()
    import select
    assert select.select([descriptor], [], [], 30)[0], f"orlopd {child} outlived its parent"
    os.close(descriptor)


def test_a_resume_whose_first_forward_is_under_inference_mode_steps_on(servers, make_net, batches):
    for steps in (1, 2):
        with orlop.connect(servers.address, job="inference") as session:
            net = session.bind(make_net())
            optimizer = orlop.AdamW(net.parameters())
            with torch.inference_mode():
                net(batches[0][0])
            train_step(net, optimizer, batches[0])
            assert session.step == steps and float(optimizer.state[net.first.weight]["step"]) == steps


@pytest.mark.parametrize("method", ["join", "load"])
def test_a_failed_attach_can_be_repeated(job, make_net, batches, monkeypatch, method):
    net = job.bind(make_net())
    optimizer = orlop.AdamW([{"params": net.first.parameters()}, {"params": net.second.parameters(), "lr": 0.1}])

    def fail(*arguments):
        raise orlop.Unavailable("planned")
    with monkeypatch.context() as patch:
        patch.setattr(orlop.job.job.TrainingJob, method, fail)
        with pytest.raises(orlop.Unavailable):
            net(batches[0][0])
    assert not optimizer.attached
    train_step(net, optimizer, batches[0])
    assert job.step == 1 and torch.equal(job.get("first.weight"), net.first.weight)


def test_a_bound_model_can_be_pickled_and_copied(job, make_net, batches, tmp_path):
    net = job.bind(make_net())
    optimizer = orlop.AdamW(net.parameters())
    torch.save(net, tmp_path / "net.pt")
    for other in (torch.load(tmp_path / "net.pt", weights_only=False), copy.deepcopy(net)):
        other(batches[0][0])
        assert not optimizer.attached
    train_step(net, optimizer, batches[0])
    torch.save(net, tmp_path / "net.pt")


def batch_norm_step(net, optimizer):
    optimizer.zero_grad()
    net(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()


def batch_norm_net():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))


def test_buffers_of_a_clean_close_come_back_and_a_plain_state_dict_still_fits(tmp_path):
    net = batch_norm_net()
    with orlop.local(directory=tmp_path, memory="256MiB") as session:
        session.bind(net)
        optimizer = orlop.AdamW(net.parameters())
        for _ in range(3):
            batch_norm_step(net, optimizer)
        saved = optimizer.state_dict()
    for _ in range(2):  # the second time nothing has changed, and no step is made
        with orlop.local(directory=tmp_path, memory="256MiB") as session:
            other = session.bind(batch_norm_net()).eval()
            optimizer = orlop.AdamW(other.parameters())
            optimizer.load_state_dict(saved)
            other(torch.randn(8, 4))
            assert session.step == 4
            for name, value in net.state_dict().items():
                assert torch.equal(other.state_dict()[name], value), name


def test_an_exception_stores_no_buffers(servers):
    with pytest.raises(ArithmeticError), orlop.connect(servers.address, job="left") as session:
        net = session.bind(batch_norm_net())
        batch_norm_step(net, orlop.AdamW(net.parameters()))
        raise ArithmeticError
    with orlop.connect(servers.address, job="left") as session:
        assert session.step == 1 and session.get("1.num_batches_tracked").item() == 0


def test_parameters_of_an_optimizer_that_needs_whole_tensors_are_placed_whole(job):
    class Whole(orlop.AdamW):
        needs_whole_tensors = True

    net = torch.nn.Sequential(torch.nn.Linear(3000, 3000), torch.nn.Linear(3000, 2), torch.nn.BatchNorm1d(2))  # three shards, two servers
    net[1].weight.requires_grad_(False)
    job.bind(net)
    Whole(net.parameters(), session=job).attach()
    manifest = {spec["name"]: spec["whole"] for spec in job.client.attach_job(job.job).tensors}
    assert [name for name, whole in manifest.items() if whole] == ["0.weight", "0.bias", "1.bias", "2.weight", "2.bias"]
    shards = job.client.describe_tensor(job.job, "0.weight")["shards"]
    assert len(shards) == 3 and len({shard["copies"][0] for shard in shards}) == 1
    with orlop.connect(job.address, job=job.job) as again:  # another optimizer takes the job as it lies
        again.bind(net)
        orlop.AdamW(net.parameters(), session=again).attach()
    assert {spec["name"]: spec["whole"] for spec in job.client.attach_job(job.job).tensors} == manifest
