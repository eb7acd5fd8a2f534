"""What can be said and refused without a server."""

import copy
import math

import pytest
import torch

import orlop


def parameters():
    return [("w", torch.nn.Parameter(torch.ones(4)))]


@pytest.mark.parametrize("flag", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_options_that_servers_do_not_offer_are_refused_by_name(flag):
    with pytest.raises(ValueError, match=flag):
        orlop.AdamW(parameters(), **{flag: True})


def test_a_group_cannot_smuggle_in_a_refused_option():
    with pytest.raises(ValueError, match="amsgrad"):
        orlop.AdamW([{"params": parameters(), "amsgrad": True}])


def test_foreach_and_fused_are_accepted():
    orlop.AdamW(parameters(), foreach=True, fused=True)
    orlop.SGD(parameters(), foreach=True, fused=True)


@pytest.mark.parametrize("arguments, word", [
    ({"lr": -1.0}, "learning rate"), ({"betas": (1.0, 0.9)}, "index 0"), ({"betas": (0.9, -0.1)}, "beta2"), ({"eps": -1e-8}, "epsilon"),
    ({"weight_decay": math.nan}, "weight_decay"), ({"state": "2bit"}, "'2bit'"), ({"rounding": "up"}, "'up'"), ({"master": "fp8"}, "'fp8'"),
    ({"max_norm": 0.0}, "max_norm"),
    ({"overlap": "sideways"}, "'sideways'"), ({"accumulation_steps": 2}, "overlap"),
    ({"overlap": "backward", "accumulation_steps": 0}, "accumulation_steps=0")])
def test_values_out_of_range_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        orlop.AdamW(parameters(), **arguments)


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="Nesterov"):
        orlop.SGD(parameters(), nesterov=True)


def test_defaults_and_order_are_those_of_torch():
    for ours, theirs in ((orlop.AdamW, torch.optim.AdamW), (orlop.SGD, torch.optim.SGD)):
        mine = ours(parameters()).defaults
        for name, value in theirs(parameters()).defaults.items():
            assert mine[name] == value, name
    assert orlop.AdamW(parameters(), 0.1, (0.5, 0.6), 1e-6, 0.2).defaults["weight_decay"] == 0.2


def test_without_a_session_the_first_step_says_what_to_do():
    optimizer = orlop.AdamW(parameters())
    with pytest.raises(RuntimeError, match="orlop.local"):
        optimizer.step()


def test_state_dict_works_before_the_first_step_and_loads_back():
    optimizer = orlop.AdamW(parameters(), lr=0.5)
    saved = optimizer.state_dict()
    assert saved["orlop"] == {"job": None, "step": None, "arithmetic_version": None}
    assert saved["state"] == {0: {"step": 0.0}}
    other = orlop.AdamW(parameters(), lr=0.1)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.5


def test_state_holds_a_step_so_that_nobody_fakes_one():
    optimizer = orlop.AdamW(parameters())
    assert [float(state["step"]) for state in optimizer.state.values()] == [0.0]


def test_schedulers_write_the_learning_rate_of_groups():
    optimizer = orlop.SGD(parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    optimizer._opt_called = True  # the scheduler would warn that no step came first
    scheduler.step()
    assert optimizer._values(optimizer.param_groups[0])["lr"] == 0.5


def test_an_optimizer_cannot_be_copied_and_says_why():
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(orlop.AdamW(parameters()))


def test_errors_are_also_the_natural_python_ones():
    assert issubclass(orlop.NotFound, KeyError) and issubclass(orlop.InvalidArgument, ValueError)
    assert issubclass(orlop.DeadlineExceeded, TimeoutError) and issubclass(orlop.Unavailable, ConnectionError)
    error = orlop.errors.from_status("NOT_FOUND", "no tensor w", {"reason": "UNKNOWN_TENSOR"})
    assert isinstance(error, orlop.NotFound) and str(error) == "no tensor w" and error.reason == "UNKNOWN_TENSOR"


def test_connecting_to_nobody_names_the_address():
    with pytest.raises(orlop.Error, match="127.0.0.1:1"):
        orlop.connect("127.0.0.1:1")
