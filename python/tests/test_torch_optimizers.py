"""torch's own database of optimizers: every input is stepped beside torch or refused by name, and every error input raises torch's type."""

import collections
import copy
import sys
import types
import unittest

import pytest
import torch

import orlop

sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))  # torch's own tests want it, and nothing here
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db  # noqa: E402

STEPS = 5
INFOS = {info.optim_cls.__name__: info for info in optim_db if hasattr(orlop, info.optim_cls.__name__)}
OUTCOMES = collections.Counter()
REFUSED = ("amsgrad", "maximize", "capturable", "differentiable")


def make_parameters(kind):
    """Muon takes matrices alone."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(20, 30), (7, 5)] + ([] if kind == "Muon" else [(11,), (), (2, 3, 4)])
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def named(parameters):
    return [(f"p{place}", parameter) for place, parameter in enumerate(parameters)]


def give_gradients(step, *lists):
    generator = torch.Generator().manual_seed(100 + step)
    for twins in zip(*lists):
        gradient = torch.randn(twins[0].shape, generator=generator)
        for parameter in twins:
            parameter.grad = gradient.clone()


def assert_equal(kind, ours, theirs, start):
    for number, (a, b, before) in enumerate(zip(ours, theirs, start)):
        if kind == "Muon":  # torch orthogonalises in bf16
            assert (a - b).abs().mean() <= 0.05 * (b - before).abs().mean(), number
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text: f"parameter {number}: {text}")


def inputs(kind):
    return [pytest.param(kind, each, id=f"{kind}-{each.desc}".replace(" ", "_"))
            for each in INFOS[kind].optim_inputs_func(device="cpu", dtype=torch.float32)]


@pytest.mark.parametrize("kind, given", [each for kind in INFOS for each in inputs(kind)])
def test_inputs_step_as_torch_or_are_refused(job, kind, given):
    refused = [flag for flag in REFUSED if given.kwargs.get(flag)]
    ours, theirs = make_parameters(kind), make_parameters(kind)
    if refused:
        with pytest.raises(ValueError, match="|".join(refused)):
            getattr(orlop, kind)(named(ours), state="fp32", session=job, **given.kwargs)
        OUTCOMES["refused by name"] += 1
        return
    OUTCOMES["different"] += 1
    start = [parameter.detach().clone() for parameter in ours]
    optimizer = getattr(orlop, kind)(named(ours), state="fp32", session=job, **copy.deepcopy(given.kwargs))
    reference = INFOS[kind].optim_cls(theirs, **copy.deepcopy(given.kwargs))
    for step in range(STEPS):
        give_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
    assert_equal(kind, ours, theirs, start)
    OUTCOMES["different"] -= 1
    OUTCOMES["equal to torch"] += 1


def error_inputs(kind):
    return [pytest.param(kind, each, id=f"{kind}-{each.optimizer_error_input.desc}".replace(" ", "_"))
            for each in INFOS[kind].optim_error_inputs_func(device="cpu", dtype=torch.float32)]


@pytest.mark.parametrize("kind, error", [each for kind in INFOS for each in error_inputs(kind)])
def test_error_inputs_raise_as_torch(job, kind, error):
    given = error.optimizer_error_input
    params = make_parameters(kind) if given.params is None else given.params
    if error.error_on == OptimizerErrorEnum.STEP_ERROR:  # without a name no parameter gets as far as a step
        params = named(params)
    if error.error_type is UserWarning:
        with pytest.warns(UserWarning, match=error.error_regex):
            getattr(orlop, kind)(params, session=job, **given.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            getattr(orlop, kind)(params, session=job, **given.kwargs).step()
    OUTCOMES["errors as torch's"] += 1


def test_no_input_of_those_above_was_different(capsys):
    with capsys.disabled():
        print("\noptim_db:", ", ".join(f"{count} {outcome}" for outcome, count in sorted(OUTCOMES.items())))
    assert OUTCOMES["different"] == 0


OPTIONS = {"SGD": dict(momentum=0.9), "RMSprop": dict(momentum=0.5, centered=True)}


def pair_of(kind, session, **options):
    """An optimizer of this package and torch's over equal parameters: two groups, of which the second has options of its own."""
    lists = [make_parameters(kind) for _ in range(2)]
    made = []
    for parameters, make in zip(lists, (lambda *args, **more: getattr(orlop, kind)(*args, state="fp32", session=session, **more),
                                        INFOS[kind].optim_cls)):
        pairs = named(parameters)
        groups = [{"params": pairs[:1]}, {"params": pairs[1:], "lr": 0.02, "weight_decay": 0.1}]
        made.append(make(groups, **OPTIONS.get(kind, {}) | options))
    return *made, *lists


def step(number, optimizer, reference, ours, theirs):
    give_gradients(number, ours, theirs)
    optimizer.step()
    reference.step()


@pytest.mark.parametrize("kind", INFOS)
def test_a_state_of_an_older_torch_steps_on(job, kind):
    """Counts are plain numbers there, and groups lack the options that came later. Loading leaves the dictionary as it was."""
    optimizer, reference, ours, theirs = pair_of(kind, job)
    start = [parameter.detach().clone() for parameter in theirs]
    for number in range(2):
        give_gradients(number, theirs)
        reference.step()
    saved = copy.deepcopy(reference.state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    for group in saved["param_groups"]:
        for later in ("maximize", "foreach", "differentiable", "capturable", "fused", "param_names"):
            group.pop(later, None)
    for parameter, value in zip(ours, theirs):
        parameter.data.copy_(value.detach())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    torch.testing.assert_close(saved, kept, rtol=0, atol=0)
    assert optimizer.param_groups[1]["param_names"][0] == "p1"
    for number in range(2, 4):
        step(number, optimizer, reference, ours, theirs)
    assert_equal(kind, ours, theirs, start)


@pytest.mark.parametrize("kind", INFOS)
def test_a_saved_state_is_read_by_torch_with_weights_only(job, kind, tmp_path):
    optimizer, reference, ours, theirs = pair_of(kind, job)
    step(0, optimizer, reference, ours, theirs)
    torch.save(optimizer.state_dict(full=True), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert [group["param_names"] for group in saved["param_groups"]] == [
        ["p0"], [f"p{place}" for place in range(1, len(ours))]]
    assert saved["state"].keys() == reference.state_dict()["state"].keys()
    reference.load_state_dict(saved)
    start = [parameter.detach().clone() for parameter in ours]
    step(1, optimizer, reference, ours, theirs)
    assert_equal(kind, ours, theirs, start)


@pytest.mark.parametrize("kind", INFOS)
def test_gradients_that_are_none_or_zero_and_a_learning_rate_of_0(job, kind):
    optimizer, reference, ours, theirs = pair_of(kind, job)
    step(0, optimizer, reference, ours, theirs)
    start = [parameter.detach().clone() for parameter in ours]
    give_gradients(1, ours, theirs)
    for parameters, one in ((ours, optimizer), (theirs, reference)):
        parameters[0].grad = None
        parameters[1].grad.zero_()
        one.step()
        one.zero_grad()
        assert all(parameter.grad is None for parameter in parameters)
    assert torch.equal(ours[0], start[0])
    assert [float(state["step"]) for state in optimizer.state.values()][:2] == [1, 2]
    assert_equal(kind, ours[1:], theirs[1:], start[1:])
    for one in (optimizer, reference):
        for group in one.param_groups:
            group["lr"] = 0.0
    before = [parameter.detach().clone() for parameter in ours]
    step(2, optimizer, reference, ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, before))


def test_hooks_of_steps_and_states_are_called_as_torchs(job):
    """A hook may replace the dictionary, `prepend` puts it first, and the handle removes it."""
    optimizer, reference, ours, theirs = pair_of("AdamW", job)
    logs = []
    for one in (optimizer, reference):
        log = []
        logs.append(log)
        one.register_step_pre_hook(lambda _, args, kwargs, log=log: log.append("before"))
        one.register_step_post_hook(lambda _, args, kwargs, log=log: log.append("after"))
        one.register_state_dict_pre_hook(lambda _, log=log: log.append("save"))

        def saved(one, state_dict, log=log):
            log.append("saved")
            return state_dict | {"note": [len(state_dict["param_groups"]), sorted(state_dict["state"])]}

        def first(one, state_dict, log=log):
            log.append("first")

        def load(one, state_dict, log=log):
            log.append(("load", state_dict["note"]))
            groups = [group | {"lr": 0.5} for group in state_dict["param_groups"]]
            return state_dict | {"param_groups": groups}
        one.register_state_dict_post_hook(saved)
        removed = one.register_state_dict_post_hook(lambda one, state_dict: state_dict.clear())
        one.register_state_dict_post_hook(first, prepend=True)
        removed.remove()
        one.register_load_state_dict_pre_hook(load)
        one.register_load_state_dict_pre_hook(first, prepend=True)
        one.register_load_state_dict_post_hook(lambda one, log=log: log.append(one.param_groups[0]["lr"]))
    step(0, optimizer, reference, ours, theirs)
    optimizer.load_state_dict(optimizer.state_dict(full=True))
    reference.load_state_dict(reference.state_dict())
    assert logs[0] == logs[1] and logs[0][:2] == ["before", "after"]
    assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"] == 0.5
    step(1, optimizer, reference, ours, theirs)
    assert_equal("AdamW", ours, theirs, ours)


@pytest.mark.parametrize("kind", INFOS)
def test_a_hook_may_change_the_states_that_are_loaded(job, kind):
    """It sees the tensors, whatever the servers hold."""
    optimizer, reference, ours, theirs = pair_of(kind, job)
    step(0, optimizer, reference, ours, theirs)

    def halve(one, state_dict):
        state = {number: {name: value if name == "step" else value / 2 for name, value in values.items()}
                 for number, values in state_dict["state"].items()}
        return state_dict | {"state": state}
    saved = optimizer.state_dict(full=True)
    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(saved)
    after = optimizer.state_dict(full=True)
    for number, values in saved["state"].items():
        for name, value in values.items():
            assert torch.equal(after["state"][number][name], value if name == "step" else value / 2), (number, name)


def test_parameters_that_torch_refuses_are_refused(job):
    one = torch.nn.Parameter(torch.ones(2))
    for make in (lambda params: orlop.SGD(params, session=job), torch.optim.SGD):
        with pytest.raises(ValueError, match="empty parameter list"):
            make([])
        with pytest.raises(TypeError, match="ordered collections"):
            make([{"params": {one}}])
        with pytest.raises(TypeError, match="can only optimize Tensors"):
            make([{"params": [3]}])
        with pytest.raises(ValueError, match="non-leaf"):
            make([one * 2])
        assert repr(make(iter([("one", one)]))).startswith("SGD (\nParameter Group 0\n")


def test_a_parameter_twice_in_a_group_is_refused_before_the_first_step(job):
    """torch warns and updates it twice."""
    net = job.bind(torch.nn.Linear(2, 1, bias=False))
    before = net.weight.detach().clone()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = orlop.SGD([net.weight, net.weight], session=job)
    net.weight.grad = torch.ones(1, 2)
    with pytest.raises(ValueError, match="'weight' is twice"):
        optimizer.step()
    assert torch.equal(net.weight, before)
