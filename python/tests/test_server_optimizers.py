"""Every optimizer, state format and master through servers: against torch, over one and two servers, and round trips of the state."""

import pytest
import torch

import orlop
from conftest import train_step

SLOTS = {"Adam": ("exp_avg", "exp_avg_sq"), "AdamW": ("exp_avg", "exp_avg_sq"), "Lion": ("exp_avg",), "Adagrad": ("sum",),
         "SGD": ("momentum_buffer",), "LAMB": ("exp_avg", "exp_avg_sq"), "AdEMAMix": ("exp_avg", "exp_avg_slow", "exp_avg_sq")}
FULL = ("square_avg", "momentum_buffer", "grad_avg")
UNUSED = {"RMSprop-momentum": "grad_avg", "RMSprop-centered": "momentum_buffer"}  # stored, but left at 0
CASES = {
    "Adam": dict(lr=1e-3, weight_decay=0.1),
    "Lion": dict(weight_decay=0.1),
    "Adagrad": dict(lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.1),
    "RMSprop": dict(lr=1e-3, weight_decay=0.1),
    "RMSprop-momentum": dict(lr=1e-3, weight_decay=0.1, momentum=0.9),
    "RMSprop-centered": dict(lr=1e-3, weight_decay=0.1, centered=True),
    "AdEMAMix": dict(weight_decay=0.1, T=10),
    "LAMB": dict(lr=1e-2, weight_decay=0.1),
    "Adafactor": dict(lr=1e-2, weight_decay=0.1),
    "AdamW-4bit": dict(state="4bit"),
    "AdamW-4bit-nearest": dict(state="4bit", rounding="nearest"),
    "AdamW-24bit": dict(master="24bit"),
    "AdamW-bf16": dict(master="bf16"),
    "AdamW-nearest": dict(rounding="nearest"),
    "AdamW-stochastic": dict(rounding="stochastic"),
    "Adam-4bit-24bit-stochastic": dict(state="4bit", master="24bit", rounding="stochastic"),
    "AdEMAMix-4bit-bf16": dict(state="4bit", master="bf16"),
    "SGD-4bit-bf16": dict(lr=0.05, momentum=0.9, state="4bit", master="bf16"),
}


class Net(torch.nn.Module):
    """Weights of 75,000 elements (no multiple of a block) and 16,384; small ones, which stay fp32."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(75, 1000)
        self.second = torch.nn.Linear(1000, 8)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(16, 75, generator=generator), torch.randn(16, 8, generator=generator)) for _ in range(12)]


@pytest.fixture(scope="module")
def one_server():
    with orlop.local(memory="256MiB", job="owner") as opened:
        yield opened


def make_net(dtype=torch.float32):
    torch.manual_seed(3)
    return Net().to(dtype)


def made(case, parameters, session, **options):
    return getattr(orlop, case.partition("-")[0])(parameters, session=session, **CASES[case] | options)


def slots_of(case, parameter):
    name = case.partition("-")[0]
    if name == "Adafactor":
        return ("row_var", "col_var") if parameter.dim() > 1 else ("variance",)
    return SLOTS[name] if name != "RMSprop" else FULL if case != "RMSprop" else FULL[:1]


def trained(session, case, batches, dtype=torch.float32, **options):
    net = make_net(dtype)
    session.bind(net)
    optimizer = made(case, net.parameters(), session, **options)
    for batch in batches:
        train_step(net, optimizer, batch)
    return net, optimizer


def stored(session, net, case):
    return {(name, slot): session.get(name, slot) for name, parameter in net.named_parameters()
            for slot in ("weight", "master", *slots_of(case, parameter))}


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, values in expected.items():
        assert torch.equal(actual[key], values), f"{key}: {int((actual[key] != values).sum())} of {values.numel()} differ"


@pytest.mark.parametrize("case", CASES)
def test_one_and_two_servers_give_the_same_bits(one_server, servers, case, batches):
    results = []
    for opened in (one_server, servers):
        with orlop.connect(opened.address, job=f"same-{case}") as session:
            net, _ = trained(session, case, batches[:5])
            results.append(stored(session, net, case))
            for name, value in net.named_parameters():
                assert torch.equal(value, results[-1][name, "master"]), name
    same(results[1], results[0])
    for (name, slot), values in results[0].items():
        assert values.isfinite().all() and (values != 0).any() == (slot != UNUSED.get(case)), (name, slot)


TORCH = {"Adam": torch.optim.Adam, "Adagrad": torch.optim.Adagrad, "Adafactor": torch.optim.Adafactor, "RMSprop": torch.optim.RMSprop,
         "RMSprop-momentum": torch.optim.RMSprop, "RMSprop-centered": torch.optim.RMSprop}


@pytest.mark.parametrize("case", TORCH)
def test_torchs_state_dict_steps_on_here_and_back_there(servers, case, batches):
    with orlop.connect(servers.address, job=f"torch-{case}") as session:
        theirs = make_net()
        optimizer = TORCH[case](theirs.parameters(), **CASES[case])
        for batch in batches[:4]:
            train_step(theirs, optimizer, batch)
        net = make_net()
        net.load_state_dict(theirs.state_dict())
        session.bind(net)
        ours = made(case, net.parameters(), session, state="fp32")
        ours.load_state_dict(optimizer.state_dict())
        for batch in batches[4:8]:
            train_step(theirs, optimizer, batch)
            train_step(net, ours, batch)
        for a, b in zip(theirs.parameters(), net.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
        back = make_net()
        back.load_state_dict(net.state_dict())
        again = TORCH[case](back.parameters(), **CASES[case])
        again.load_state_dict(ours.state_dict(full=True))
        for batch in batches[8:]:
            train_step(theirs, optimizer, batch)
            train_step(back, again, batch)
        for a, b in zip(theirs.parameters(), back.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-6)


def test_muons_state_dict_steps_on_here_and_back_there(servers, batches):
    """torch orthogonalises in bf16: the weights differ by its rounding, the momentum does not."""
    def make():
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Linear(75, 200, bias=False), torch.nn.Tanh(), torch.nn.Linear(200, 8, bias=False))

    def steps(net, optimizer, some):
        for batch in some:
            train_step(net, optimizer, batch)

    with orlop.connect(servers.address, job="muon") as session:
        theirs, net, back = make(), make(), make()
        optimizer = torch.optim.Muon(theirs.parameters(), lr=0.01)
        steps(theirs, optimizer, batches[:4])
        net.load_state_dict(theirs.state_dict())
        session.bind(net)
        ours = orlop.Muon(net.parameters(), lr=0.01, session=session, state="fp32")
        ours.load_state_dict(optimizer.state_dict())
        ours.attach()
        for (name, _), state in zip(net.named_parameters(), optimizer.state_dict()["state"].values()):
            assert torch.equal(session.get(name, "momentum_buffer"), state["momentum_buffer"])
        before = [p.clone() for p in theirs.parameters()]
        steps(theirs, optimizer, batches[4:8])
        steps(net, ours, batches[4:8])
        for a, b, start in zip(theirs.parameters(), net.parameters(), before):
            assert (a - b).abs().mean() <= 0.05 * (a - start).abs().mean()
        back.load_state_dict(net.state_dict())
        again = torch.optim.Muon(back.parameters(), lr=0.01)
        again.load_state_dict(ours.state_dict(full=True))
        steps(net, ours, batches[8:])
        steps(back, again, batches[8:])
        for a, b in zip(net.parameters(), back.parameters()):
            assert (a - b).abs().max() <= 2e-3


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="2D parameters"):
        orlop.Muon(torch.nn.Linear(3, 2).parameters())


@pytest.mark.parametrize("case", TORCH)
def test_a_state_dict_from_before_the_first_step_is_the_start(servers, case, batches):
    """torch's Adagrad has its state, begun with the initial accumulator, from its constructor on."""
    with orlop.connect(servers.address, job=f"start-{case}") as session:
        theirs, net, back = make_net(), make_net(), make_net()
        optimizer = TORCH[case](theirs.parameters(), **CASES[case])
        session.bind(net)
        ours = made(case, net.parameters(), session, state="fp32")
        again = TORCH[case](back.parameters(), **CASES[case])
        again.load_state_dict(ours.state_dict(full=True))
        ours.load_state_dict(optimizer.state_dict())
        for batch in batches[:2]:
            for model, which in ((theirs, optimizer), (net, ours), (back, again)):
                train_step(model, which, batch)
        for a, b, c in zip(theirs.parameters(), net.parameters(), back.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert torch.equal(a, c)


@pytest.mark.parametrize("case, dtype", [(case, torch.float32) for case in CASES] + [
    (case, torch.bfloat16) for case in ("Adagrad", "AdamW-4bit", "AdamW-24bit", "AdamW-bf16")], ids=str)
def test_a_full_state_dict_steps_on_in_another_job_bit_for_bit(servers, case, dtype, batches):
    with orlop.connect(servers.address, job=f"from-{case}-{dtype}"[:60]) as first, \
            orlop.connect(servers.address, job=f"to-{case}-{dtype}"[:60]) as second:
        net, optimizer = trained(first, case, batches[:4], dtype)
        copy = make_net(dtype)
        copy.load_state_dict(net.state_dict())
        second.bind(copy)
        other = made(case, copy.parameters(), second)
        other.load_state_dict(optimizer.state_dict(full=True))
        other.attach()
        same(stored(second, copy, case), stored(first, net, case))
        if "stochastic" in case or "bf16" in case or "24bit" in case or "AdEMAMix" in case or case == "AdamW-4bit":
            return  # rounded by numbers of the job and its step
        for batch in batches[4:7]:
            train_step(net, optimizer, batch)
            train_step(copy, other, batch)
        same(stored(second, copy, case), stored(first, net, case))


def test_a_directory_resumes_bit_for_bit(servers, tmp_path, batches):
    """Jobs of all formats that servers write to disk when they stop and read when they start, beside jobs that never stopped."""
    cases = ["Adam-4bit-24bit-stochastic", "AdEMAMix-4bit-bf16", "RMSprop-centered", "AdamW-24bit", "Adagrad"]
    expected, before = {}, {}
    for case in cases:
        with orlop.connect(servers.address, job=f"resumes-{case}") as session:
            net, _ = trained(session, case, batches[:6])
            expected[case] = stored(session, net, case)
    with orlop.local(directory=tmp_path, servers=2, memory="256MiB", job="owner") as opened:
        for case in cases:
            with orlop.connect(opened.address, job=f"resumes-{case}") as session:
                net, _ = trained(session, case, batches[:3])
                before[case] = stored(session, net, case)
    with orlop.local(directory=tmp_path, servers=2, memory="256MiB", job="owner") as opened:
        for case in cases:
            with orlop.connect(opened.address, job=f"resumes-{case}") as session:
                assert session.recovered(30) == 3
                net = make_net()
                session.bind(net)
                optimizer = made(case, net.parameters(), session)
                optimizer.attach()
                same(stored(session, net, case), before[case])
                for batch in batches[3:6]:
                    train_step(net, optimizer, batch)
                same(stored(session, net, case), expected[case])
