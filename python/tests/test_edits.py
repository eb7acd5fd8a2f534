"""Tensors that change without the optimizer: whatever torch sees of them is stored, found and named, or brought back."""

import copy

import pytest
import safetensors.torch
import torch
import torch.multiprocessing

import orlop
from conftest import loss_of, train_step


def assert_same(net, other, **tolerance):
    for (name, ours), theirs in zip(net.named_parameters(), other.parameters()):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def data_copy(net):
    for p in net.parameters():
        p.data.copy_(torch.full_like(p, 0.005))


def new_data(net):
    for p in net.parameters():
        p.data = p.data.clamp(-0.01, 0.01)


def scale_numpy_view(net):
    for p in net.parameters():
        view = p.detach().numpy()
        view *= 0.5


def write_to_storage(net):
    for p in net.parameters():
        storage = p.untyped_storage()
        storage.copy_(torch.full((p.numel(),), 0.25).untyped_storage())


def other_storage(net):
    for p in net.parameters():
        with torch.no_grad():
            p.set_(p.detach() * 0.5)


def permute(net):
    """Neither sums nor norms of the values change."""
    for p in net.parameters():
        p.data.copy_(p.data.flip(0))


EDITS = {
    "data-clamp": lambda net: [p.data.clamp_(-0.01, 0.01) for p in net.parameters()],
    "data-copy": data_copy,
    "data-assign": new_data,
    "detach-mul": lambda net: [p.detach().mul_(0.5) for p in net.parameters()],
    "numpy-view": scale_numpy_view,
    "storage": write_to_storage,
    "set": other_storage,
    "permute": permute,
    "one-bit": lambda net: net.first.weight.data.view(torch.int32)[0, 0].bitwise_xor_(1),
    "negative-zero": lambda net: net.second.bias.data.copy_(torch.full_like(net.second.bias, -0.0)),
    "load-state-dict": lambda net: net.load_state_dict({name: value * 0.5 for name, value in net.state_dict().items()}),
    "vector-to-parameters": lambda net: torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(net.parameters()).detach() * 0.5, net.parameters()),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_by_any_route_is_found_and_counts_as_in_torch(job, make_net, batches, edit):
    mine, theirs = make_net(), make_net()
    job.bind(mine)
    ours, reference = orlop.SGD(mine.parameters(), lr=0.05), torch.optim.SGD(theirs.parameters(), lr=0.05)
    found = 0
    for batch in batches[:4]:
        train_step(theirs, reference, batch)
        EDITS[edit](theirs)
        try:
            train_step(mine, ours, batch)
        except orlop.EditedWeights:
            found += 1
            job.store(mine)
            ours.step()
        EDITS[edit](mine)
    assert found == 3
    job.store(mine)
    assert_same(mine, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool], ids=str)
def test_a_digest_on_a_device_sees_every_bit_and_place(dtype):
    """Its arithmetic is torch's, so that a host shows what a device computes."""
    values = (torch.randn(2, (1 << 21) + 3, generator=torch.Generator().manual_seed(1)) > 0).to(dtype)
    values[0, :2] = torch.tensor([0, 1])
    digest = orlop.job.held.digest_on_device(values)
    assert digest == orlop.job.held.digest_on_device(values.clone()) and len(digest.split()) == 2
    for change in (lambda v: v[0, :2].copy_(v[0, :2].flip(0)), lambda v: v[1, -1].copy_(~v[1, -1].bool()), lambda v: v.copy_(v.flip(0))):
        change(changed := values.clone())
        assert orlop.job.held.digest_on_device(changed) != digest
    assert orlop.job.held.digest_on_device(values[:0]) != digest


def swap(net, averaged):
    for p, q in zip(net.parameters(), averaged.parameters()):
        p.data, q.data = q.data.clone(), p.data.clone()


@pytest.mark.parametrize("swap_out", ["swap", "copy-back", "load"])
def test_averaged_weights_are_swapped_in_and_out(job, make_net, batches, swap_out):
    mine, theirs = make_net(), make_net()
    job.bind(mine)
    ours, reference = orlop.AdamW(mine.parameters(), state="fp32"), torch.optim.AdamW(theirs.parameters())
    averages = [torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
                for net in (mine, theirs)]
    for batch in batches[:5]:
        for net, optimizer, average in zip((mine, theirs), (ours, reference), averages):
            train_step(net, optimizer, batch)
            average.update_parameters(net)
            kept = copy.deepcopy(net.state_dict())
            if net is mine and swap_out == "load":
                with torch.no_grad():
                    for p, q in zip(net.parameters(), average.module.parameters()):
                        p.copy_(q)
                job.load(net)
            elif swap_out == "copy-back":
                net.load_state_dict(average.module.state_dict())
                net.load_state_dict(kept)
            else:
                swap(net, average.module)
                swap(net, average.module)
    assert job.step == 5
    assert_same(mine, theirs, rtol=1e-5, atol=2e-6)


def test_a_load_into_another_model_brings_all_tensors(job):
    def net():
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    mine, other = net(), net()
    job.bind(mine)
    optimizer = orlop.SGD(mine.parameters(), lr=0.1)
    mine(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    step = job.store(mine)  # the buffers
    assert job.load(other) == step == 2
    for name, value in mine.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    with orlop.connect(job.address, job=job.job) as reader:
        reader.load(third := net())
        assert torch.equal(third[1].running_mean, mine[1].running_mean)
        with pytest.raises(ValueError, match=r"'0.weight' is torch.float32 of shape \[3, 4\]; job .* of shape \[4, 4\]"):
            reader.load(torch.nn.Sequential(torch.nn.Linear(4, 3)))
        with pytest.raises(orlop.NotFound, match="extra"):
            reader.load(torch.nn.ModuleDict({"extra": torch.nn.Linear(1, 1)}))


def spawned(net, queue):
    queue.put(float(net.first.weight.detach().sum()))


@pytest.mark.parametrize("how", ["share_memory", "spawn"])
def test_storage_that_moves_is_no_edit(job, make_net, batches, how):
    net = make_net()
    job.bind(net)
    optimizer = orlop.AdamW(net.parameters())
    train_step(net, optimizer, batches[0])
    if how == "share_memory":
        net.share_memory()
    else:
        context = torch.multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=spawned, args=(net, queue))
        process.start()
        assert queue.get(timeout=120) == float(net.first.weight.detach().sum())
        process.join()
    train_step(net, optimizer, batches[1])
    assert job.step == 2


class Half(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 8)
        self.to(dtype)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_store_keeps_the_exact_masters_of_what_was_not_edited(job, dtype):
    net = Half(dtype)
    job.bind(net)
    optimizer = orlop.SGD(net.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(16, 64).to(dtype)).float().square().mean().backward()
        optimizer.step()
    before = {name: job.get(name, "master") for name, _ in net.named_parameters()}
    with torch.no_grad():
        net.last.weight[3, 5:9] = 0.75
    step = job.store(net)
    for name, parameter in net.named_parameters():
        edited = torch.zeros_like(parameter, dtype=torch.bool)
        if name == "last.weight":
            edited[3, 5:9] = True
        expected = torch.where(edited, torch.tensor(0.75), before[name])
        assert torch.equal(job.get(name, "master"), expected), name
    assert job.store(net) == step, "nothing differs, so nothing is stored"


def test_small_steps_go_on_over_stores(job):
    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
            self.register_buffer("count", torch.tensor(0))

        def forward(self):
            self.count += 1
            return self.w.float().sum()
    net = One()
    job.bind(net)
    optimizer = orlop.SGD(net.parameters(), lr=1e-4)
    for _ in range(100):
        optimizer.zero_grad()
        net().backward()
        optimizer.step()
        job.store(net)
    assert job.step == 200 and job.get("count") == 100
    torch.testing.assert_close(job.get("w", "master"), torch.full((300,), 0.99), rtol=0, atol=1e-5)


class Teacher(torch.nn.Module):
    """A student and its moving average, which no optimizer trains."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.student, self.teacher = torch.nn.Linear(8, 300), torch.nn.Linear(8, 300)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    def forward(self, x):
        return self.student(x) - self.teacher(x).detach() + 1

    @torch.no_grad()
    def move(self, replace):
        for theirs, ours in zip(self.teacher.parameters(), self.student.parameters()):
            if replace:
                theirs.data = theirs * 0.5 + ours * 0.5
            else:
                theirs.mul_(0.5).add_(ours, alpha=0.5)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("is_bf16", [False, True])
def test_a_teacher_that_the_optimizer_does_not_train_is_of_now(tmp_path, replace, is_bf16):
    def make(seed=0):
        net = Teacher(seed)
        return (net.to(torch.bfloat16) if is_bf16 else net), torch.ones(4, 8, dtype=torch.bfloat16 if is_bf16 else torch.float32)

    def step(net, optimizer, x):
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()
        net.move(replace)

    net, x = make()
    with orlop.local(tmp_path / "kept", servers=2, memory="256MiB") as session:
        session.bind(net)
        optimizer = orlop.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            step(net, optimizer, x)
        assert torch.equal(session.get("teacher.weight"), net.teacher.weight)
        session.export(tmp_path / "now.safetensors")
        exported = safetensors.torch.load_file(tmp_path / "now.safetensors")
        assert torch.equal(exported["teacher.bias"], net.teacher.bias.float())
        for _ in range(2):
            step(net, optimizer, x)
    again, x = make(seed=3)
    with orlop.local(tmp_path / "kept", servers=2, memory="256MiB") as session:
        session.bind(again)
        optimizer = orlop.AdamW([p for p in again.parameters() if p.requires_grad], lr=0.05)
        again(x)
        for (name, here), there in zip(again.state_dict().items(), net.state_dict().values()):
            assert torch.equal(here, there), name


def test_an_edit_that_is_not_stored_is_named_at_an_export_and_stored_at_the_end(servers, make_net, batches, tmp_path):
    with pytest.warns(UserWarning, match=r"first.weight.*after step 1"), orlop.connect(servers.address, job="edited-at-the-end") as session:
        net = session.bind(make_net(dtype=torch.bfloat16))
        train_step(net, orlop.SGD(net.parameters(), session=session), batches[0])
        trained = net.first.weight.detach().clone()
        net.first.weight.data.mul_(0.5)
        with pytest.raises(orlop.EditedWeights, match=r"first.weight.*session.store\(model\).*session.load\(model\)"):
            session.export(tmp_path / "x")
        session.load(net)
        assert torch.equal(net.first.weight, trained) and session.step == 1
        master = session.get("first.weight", "master")
        net.first.weight.data[0].mul_(0.5)
    with orlop.connect(servers.address, job="edited-at-the-end") as session:
        assert session.step == 2
        assert torch.equal(session.get("first.weight"), net.first.weight)
        assert torch.equal(session.get("first.weight", "master")[1:], master[1:])


def test_a_job_of_buffers_alone_is_stored_again(tmp_path):
    def net(value):
        model = torch.nn.Module()
        for index in range(3):
            model.register_buffer(f"b{index}", torch.full((300,), float(value)))
        return model
    with orlop.local(tmp_path, servers=2, memory="256MiB") as session:
        model = net(0)
        session.store(model)
        model.b1.fill_(2)
        assert session.store(model) == 1
        model.b2 = torch.full((300,), 5.0)  # another tensor under the name
    with orlop.local(tmp_path, servers=2, memory="256MiB") as session:
        assert [float(session.get(f"b{index}")[0]) for index in range(3)] == [0.0, 2.0, 5.0]


def test_losses_go_on_while_nothing_is_edited(job, make_net, batches):
    """No false alarm: parameters that are read, viewed, pickled or moved in a graph are not edited."""
    net = make_net()
    job.bind(net)
    optimizer = orlop.AdamW(net.parameters())
    for batch in batches[:3]:
        train_step(net, optimizer, batch)
        net.first.weight.detach().numpy().sum()
        copy.deepcopy(net)
        torch.nn.utils.parameters_to_vector(net.parameters()).sum()
        torch.autograd.graph.increment_version(net.first.weight)
        net.train(not net.training)
        net.to(torch.float32)
        float(loss_of(net, batch).detach())
    assert job.step == 3


def test_an_edit_before_a_new_optimizer_is_found(job, make_net, batches):
    net = job.bind(make_net())
    train_step(net, orlop.SGD(net.parameters(), lr=0.1), batches[0])
    net.first.weight.data.mul_(0.5)
    wanted = net.first.weight.detach().clone()
    optimizer = orlop.SGD(net.parameters(), lr=0.1)
    with pytest.raises(orlop.EditedWeights, match=r"first.weight"):
        net(batches[1][0])
    job.store(net)
    assert torch.equal(job.get("first.weight"), wanted)
    train_step(net, optimizer, batches[1])
    assert job.step == 3


@pytest.mark.parametrize("edits_before", [False, True])
def test_an_edit_before_a_new_optimizer_is_stored_with_the_state_that_it_has_loaded(job, make_net, batches, edits_before):
    """The weights are neither those that the state was saved beside nor the servers'."""
    mine, theirs = make_net(), make_net()
    job.bind(mine)
    ours, reference = orlop.SGD(mine.parameters(), lr=0.05, momentum=0.9, state="fp32"), torch.optim.SGD(theirs.parameters(), 0.05, 0.9)
    for net, optimizer in ((mine, ours), (theirs, reference)):
        train_step(net, optimizer, batches[0])
        net.first.bias.data.mul_(0.75 if edits_before else 1.0)
    saved, expected = ours.state_dict(full=True), copy.deepcopy(reference.state_dict())
    ours, reference = orlop.SGD(mine.parameters(), lr=0.05, momentum=0.9, state="fp32"), torch.optim.SGD(theirs.parameters(), 0.05, 0.9)
    for net, optimizer, state in ((mine, ours, saved), (theirs, reference, expected)):
        optimizer.load_state_dict(state)
        net.first.weight.data.mul_(0.5)
    with pytest.raises(orlop.EditedWeights, match=r"first.weight"):
        mine(batches[1][0])
    job.store(mine)
    for batch in batches[1:4]:
        train_step(mine, ours, batch)
        train_step(theirs, reference, batch)
    assert_same(mine, theirs, rtol=1e-5, atol=1e-6)


def test_an_edit_of_named_parameters_can_be_stored_and_undone(job, make_net, batches):
    """Nothing is bound, and the optimizer has some of the model's parameters."""
    net = make_net()
    optimizer = orlop.SGD(net.first.named_parameters(), lr=0.1, session=job)
    train_step(net, optimizer, batches[0])
    net.first.weight.data.mul_(0.5)
    with pytest.raises(orlop.EditedWeights):
        train_step(net, optimizer, batches[1])
    assert job.store(net.first) == 2
    train_step(net, optimizer, batches[1])
    kept = net.first.weight.detach().clone()
    net.first.weight.data.mul_(0.5)
    job.load(net.first)
    assert torch.equal(net.first.weight, kept) and job.step == 3
