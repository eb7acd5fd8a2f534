"""Optimizer states of bitsandbytes and torchao are imported and exported.

The first tests use states that were recorded with the real libraries (data/make_foreign_states.py); they run without the libraries. The
last ones run the libraries themselves, and are skipped where a library is not installed.
"""

import copy
import doctest
import hashlib
import importlib
import json
import pathlib

import numpy as np
import pytest
import safetensors
import torch

import orlop
from orlop import kernels
from orlop.state import bitsandbytes, foreign, quantised

DATA = pathlib.Path(__file__).parent / "data" / "foreign_states.safetensors"
KEPT = 1024  # the recording has so many leading elements of each weight after one more step
# One for each parameter. The state of the first has 17 blocks of 256; the other two are so small that every library keeps fp32.
SHAPES = ((64, 68), (48,), (16, 8))
BITSANDBYTES = {
    "Adam8bit": (orlop.Adam, {"lr": 0.01}), "AdamW8bit": (orlop.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "Lion8bit": (orlop.Lion, {"lr": 0.01, "weight_decay": 0.1}), "SGD8bit": (orlop.SGD, {"lr": 0.01, "momentum": 0.9}),
    "RMSprop8bit": (orlop.RMSprop, {"lr": 0.01}), "Adagrad8bit": (orlop.Adagrad, {"lr": 0.01}),
    "AdEMAMix8bit": (orlop.AdEMAMix, {"lr": 0.01}),
}
TORCHAO = {"AdamW8bit": (orlop.AdamW, {"lr": 0.01, "weight_decay": 0.1}), "Adam4bit": (orlop.Adam, {"lr": 0.01}),
           "AdamWFp8": (orlop.AdamW, {"lr": 0.01})}
FIXTURES = [*(("bitsandbytes", kind, arguments) for kind, (_, arguments) in BITSANDBYTES.items()),
            *(("torchao", kind, arguments) for kind, (_, arguments) in TORCHAO.items())]
NAMES = [f"{library}.{kind}" for library, kind, _ in FIXTURES]


def start(place):
    """The initial weight of a parameter: fp32 of its shape. Every element is a multiple of 1/8, so it is exact."""
    count = int(np.prod(SHAPES[place]))
    return (((torch.arange(count) * 37 + 11 * place) % 61 - 30) / 8.0).view(SHAPES[place])


def gradient(place, step):
    """The gradient of a parameter in a step: fp32 of its shape. The elements are exact; their scales are 2^0 to 2^-12."""
    index = torch.arange(int(np.prod(SHAPES[place]))) + 1000 * place
    values = ((index * 7919 + step * 104729) % 2003 - 1001) / 1024.0
    return (values * 0.5 ** (index * 31 % 13)).view(SHAPES[place])


def parameters():
    return [torch.nn.Parameter(start(place).clone()) for place in range(len(SHAPES))]


# SHA-256 of the values in fp32, as hexadecimal digits.
def digest(tensor):
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()


def recorded(name):
    """The recording of one optimizer after three steps: its state_dict, in which mappings replace torchao's tensors; the digests of the
    values as the library decodes them, by "parameter.state"; and the first KEPT elements of the weights after one more step.
    """
    state, after = {}, {}
    with safetensors.safe_open(DATA, "pt") as file:
        about = json.loads(file.metadata()[name])
        for key in file.keys():  # noqa: SIM118 (a file of safetensors is no dictionary)
            if not key.startswith(name + "."):
                continue
            number, *path = key[len(name) + 1:].split(".")
            if number == "after":
                after[int(path[0])] = file.get_tensor(key)
                continue
            place = state.setdefault(int(number), {})
            for word in path[:-1]:
                place = place.setdefault(word, {})
            value = file.get_tensor(key)
            place[path[-1]] = int(value) if path[-1] == "step" else value
    return {"state": state, "param_groups": about["groups"]}, about["decoded"], after


# The orlop optimizer that corresponds to the library's optimizer `name`. `state` is its state format; no session, no servers.
def ours(session, name, state="8bit", weights=None):
    library, kind = name.split(".")
    made, arguments = (BITSANDBYTES if library == "bitsandbytes" else TORCHAO)[kind]
    named = [(f"p{place}", weight) for place, weight in enumerate(weights or parameters())]
    return made(named, session=session, state=state, **arguments)


# Makes the steps with these numbers, each with its gradients.
def steps(optimizer, numbers):
    for step in numbers:
        for group in optimizer.param_groups:
            for place, parameter in enumerate(group["params"]):
                parameter.grad = gradient(place, step)
        optimizer.step()


def raw(optimizer, slot, place=0):
    """A state of one parameter as the servers store it: a Quantised with codes, scales and book, or an fp32 tensor."""
    stored = next(t for t in optimizer.session.client.list_tensors(optimizer.session.job) if t["index"] == place)
    return quantised.read(optimizer._view(), stored, slot)


# The largest distance in ulp between two code books of fp32.
def within(book, closed):
    return int((book.view(torch.int32).long() - closed.view(torch.int32).long()).abs().max())


def slots_of(optimizer, name):
    """A list of (the library's name of a state, row, orlop's name of it). The row is None unless the library stacks several states."""
    if name.startswith("torchao"):
        return [(slot, None, slot) for slot in optimizer.slots]
    return [(f"state{number}", row if len(names) > 1 else None, slot)
            for number, names in enumerate(bitsandbytes.slots_in(optimizer._view()), start=1) for row, slot in enumerate(names)]


def theirs(saved, name, state, row):
    """Codes (one in each byte), scales and book of a state of the first parameter, as recorded."""
    values = saved["state"][0]
    if name.startswith("torchao"):
        codes, scales, book = (values[state][key] for key in ("codes", "scale", "qmap"))
        return (torch.stack([codes >> 4, codes & 15], 1).view(SHAPES[0]) if len(book) == 16 else codes), scales, book
    values = values.get("__bnb_optimizer_quant_state__", values)
    codes, scales, book = (values[key + state[-1]] for key in ("state", "absmax", "qmap"))
    return (codes, scales, book) if row is None else (codes[row], scales[row], book)


def same_form(name, slot):
    """Whether the servers store this state with the library's codes and book. They do not if the library uses another book: bitsandbytes
    keeps square_avg (RMSprop) and sum (Adagrad) in the signed book, and torchao's fp8 is a format of its own.
    """
    return slot not in ("square_avg", "sum") and name != "torchao.AdamWFp8"


# The names of the states of the corresponding orlop optimizer.
def slots_here(name):
    return ours(None, name).slots


# The state format with as many bits as the library's.
def bits_of(name):
    return "4bit" if "4bit" in name else "8bit"


def test_examples_in_docstrings_run_as_printed():
    result = doctest.testmod(quantised)
    assert result.attempted > 0 and result.failed == 0


# Recorded states: these run without the libraries.

@pytest.mark.parametrize("name", NAMES)
def test_values_are_decoded_as_the_library_decodes_them(name):
    saved, decoded, _ = recorded(name)
    optimizer = ours(None, name)
    read = foreign.to_torch(optimizer._view(), saved)["state"]
    rows = {}
    for state, _, slot in slots_of(optimizer, name):
        for place in range(len(SHAPES)):
            rows.setdefault(f"{place}.{state}", []).append(read[place][slot].float())
    assert rows.keys() == decoded.keys()
    for key, states in rows.items():
        assert digest(states[0] if len(states) == 1 else torch.stack(states)) == decoded[key], key


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_scales_stay_as_they_are(job, name):
    saved, _, _ = recorded(name)
    optimizer = ours(job, name, bits_of(name))
    read = foreign.to_torch(optimizer._view(), saved)["state"]
    optimizer.load_state_dict(saved)
    optimizer.attach()
    for state, row, slot in slots_of(optimizer, name):
        held = raw(optimizer, slot)
        if same_form(name, slot):
            codes, scales, book = theirs(saved, name, state, row)
            assert torch.equal(held.codes, codes) and torch.equal(held.absmax, scales), slot
            assert within(book, held.book) <= 2
        else:  # the values were requantised: the error is at most half of the widest gap of the book
            values = read[0][slot].float().flatten()
            gaps = held.book.diff().max() / 2
            error = (held.float().flatten() - values).abs() / held.absmax.repeat_interleave(256)
            assert float(error.max()) <= float(gaps) * 1.001
        for place in (1, 2):
            assert torch.equal(job.get(f"p{place}", slot), read[place][slot])
    assert all(float(optimizer.state[p]["step"]) == 3 for p in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("name", ["bitsandbytes.AdamW8bit", "torchao.AdamW8bit"])
def test_the_quantised_state_of_a_frozen_parameter_is_saved_again(job, name):
    """The servers train two of three parameters. A full state_dict has what was loaded of the third, as its values."""
    state_dict, decoded, _ = recorded(name)
    weights = parameters()
    weights[0].requires_grad_(False)
    optimizer = ours(job, name, "fp32", weights)
    optimizer.load_state_dict(state_dict)
    for place in (1, 2):
        weights[place].grad = gradient(place, 3)
    optimizer.step()
    saved = optimizer.state_dict(full=True)["state"][0]
    assert saved["step"] == 3
    for state, row, slot in slots_of(optimizer, name):
        assert row is None and digest(saved[slot]) == decoded[f"0.{state}"]


@pytest.mark.parametrize("name, state", [(name, "fp32") for name in NAMES] + [
    (name, bits_of(name)) for name in NAMES if all(same_form(name, slot) for slot in slots_here(name))])
def test_the_next_step_is_the_library_s(job, name, state):
    """The step reads the loaded moments before it quantises anything, so both do the same arithmetic: only rounding differs."""
    saved, _, after = recorded(name)
    optimizer = ours(job, name, state)
    optimizer.load_state_dict(saved)
    steps(optimizer, [3])
    for place, parameter in enumerate(optimizer.param_groups[0]["params"]):
        torch.testing.assert_close(parameter.detach().flatten()[:KEPT], after[place], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("bits")])
def test_an_export_is_what_bitsandbytes_wrote(job, name):
    saved, _, _ = recorded(name)
    optimizer = ours(job, name)
    optimizer.load_state_dict(saved)
    optimizer.attach()
    written = optimizer.state_dict(full=True, format="bitsandbytes")
    assert written.keys() == saved.keys()
    for mine, group in zip(written["param_groups"], saved["param_groups"]):
        own = {key: value for key, value in mine.items() if key != "param_names"}
        assert {**own, "betas": list(own["betas"])} == group
    for place, values in saved["state"].items():
        values = {"step": values["step"], **values["__bnb_optimizer_quant_state__"]}
        assert written["state"][place].keys() == values.keys()
        for key, value in values.items():
            mine = written["state"][place][key]
            if not isinstance(value, torch.Tensor):
                assert type(mine) is type(value) and mine == value
            elif key.startswith("qmap"):
                is_signed = key == "qmap1" and not {"square_avg", "sum"} & set(optimizer.slots)
                assert torch.equal(mine, kernels.code_book("8bit", is_signed))
            else:
                assert mine.dtype == value.dtype and mine.shape == value.shape
                assert not same_form(name, optimizer.slots[0]) and place == 0 or torch.equal(mine, value), key


@pytest.mark.parametrize("state", ["8bit", "4bit", "fp32"])
def test_an_export_for_bitsandbytes_comes_back_with_the_same_values(servers, state):
    with orlop.connect(servers.address, job=f"out-{state}") as first, orlop.connect(servers.address, job=f"in-{state}") as second:
        optimizer, other = ours(first, "bitsandbytes.AdamW8bit", state), ours(second, "bitsandbytes.AdamW8bit", state)
        steps(optimizer, range(4))
        other.load_state_dict(optimizer.state_dict(full=True, format="bitsandbytes"))
        other.attach()
        for place in range(len(SHAPES)):
            for slot in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(first.get(f"p{place}", slot), second.get(f"p{place}", slot)), (place, slot)


def altered(change):
    """The recorded state_dict of AdamW8bit, after `change` has changed the states of its first parameter in place."""
    saved, _, _ = recorded("bitsandbytes.AdamW8bit")
    change(saved["state"][0]["__bnb_optimizer_quant_state__"])
    return saved


def in_numpy(values, number):
    """The values of state `number` of the first parameter, decoded independently of the package."""
    codes, absmax, book = (values[key + number].numpy() for key in ("state", "absmax", "qmap"))
    block = 2048 if len(absmax) == 3 else 256
    return torch.from_numpy(book[codes.ravel()] * np.repeat(absmax, block)[:codes.size]).view(SHAPES[0])


@pytest.mark.parametrize("state", ["8bit", "fp32"])
def test_blocks_of_2048_of_old_versions(job, state):
    saved = altered(lambda values: values.update(absmax1=torch.tensor([0.5, 3.0, 0.25]), absmax2=torch.tensor([2.0, 1e-8, 7.0])))
    values = saved["state"][0]["__bnb_optimizer_quant_state__"]
    optimizer = ours(job, "bitsandbytes.AdamW8bit", state)
    optimizer.load_state_dict(saved)
    optimizer.attach()
    for number, slot in (("1", "exp_avg"), ("2", "exp_avg_sq")):
        if state == "8bit":
            held = raw(optimizer, slot)
            assert torch.equal(held.codes, values["state" + number])
            assert torch.equal(held.absmax, values["absmax" + number].repeat_interleave(8)[:17])
        else:
            assert torch.equal(job.get("p0", slot), in_numpy(values, number))


def test_a_book_unlike_ours_is_honoured_bit_for_bit(servers):
    """bitsandbytes 0.36 to 0.41.0 wrote such a book: it has fewer values, and the missing ones are zeros at the start."""
    book = torch.cat([torch.zeros(100), torch.linspace(1 / 156, 1, 156) ** 2])
    saved = altered(lambda values: values.update(qmap2=book))
    wanted = in_numpy(saved["state"][0]["__bnb_optimizer_quant_state__"], "2")
    with orlop.connect(servers.address, job="book-fp32") as exact, orlop.connect(servers.address, job="book-8bit") as coded:
        optimizer = ours(exact, "bitsandbytes.AdamW8bit", "fp32")
        optimizer.load_state_dict(saved)
        optimizer.attach()
        assert torch.equal(exact.get("p0", "exp_avg_sq"), wanted)
        optimizer = ours(coded, "bitsandbytes.AdamW8bit")
        optimizer.load_state_dict(saved)
        optimizer.attach()
        got = coded.get("p0", "exp_avg_sq")
        assert not torch.equal(got, wanted)  # the values were requantised
        scale = saved["state"][0]["__bnb_optimizer_quant_state__"]["absmax2"].repeat_interleave(256).view(SHAPES[0])
        assert float(((got - wanted).abs() / scale).max()) < 0.0036  # half of the widest gap of orlop's book
        held = saved["state"][0]["__bnb_optimizer_quant_state__"]
        assert torch.equal(raw(optimizer, "exp_avg").codes, held["state1"])  # its book is orlop's, so the codes stay


# A copy of a code book with entries 7 and 8 exchanged.
def unsorted(book):
    book = book.clone()
    book[[7, 8]] = book[[8, 7]]
    return book


# Faults: a change of the states of the first parameter (see `altered`), and a pattern of the message that refuses them.
REFUSED = {
    "short table": (lambda v: v.update(qmap1=v["qmap1"][:255]), r"code book of state1 of 'p0' is torch.float32 \[255\].*256"),
    "table of 16": (lambda v: v.update(qmap2=v["qmap2"][:16]), r"code book of state2 of 'p0'.*\[16\].*256"),
    "unsorted table": (lambda v: v.update(qmap2=unsorted(v["qmap2"])), r"state2 of 'p0' is not ascending: entry 7"),
    "table in double": (lambda v: v.update(qmap1=v["qmap1"].double()), r"code book of state1 of 'p0' is torch.float64"),
    "NaN in a table": (lambda v: v.update(qmap1=v["qmap1"] * float("nan")), r"code book of state1 of 'p0' has an entry that is not finite"),
    "no table": (lambda v: v.pop("qmap1"), r"state1 of 'p0' has codes but no qmap1"),
    "no scales": (lambda v: v.pop("absmax2"), r"state2 of 'p0' has codes but no absmax2"),
    "too few scales": (lambda v: v.update(absmax1=v["absmax1"][:16]), r"state1 of 'p0' have shape \[16\]; 4352 elements have 17 .* or 3"),
    "infinite scale": (lambda v: v["absmax1"].__setitem__(5, float("inf")), r"scale 5 of state1 of 'p0' is inf; finite"),
    "negative scale": (lambda v: v["absmax2"].__setitem__(2, -1.0), r"scale 2 of state2 of 'p0' is -1.0; .* at least 0"),
    "unknown key": (lambda v: v.update(state3=v["state2"]), r"unknown in the bitsandbytes state of 'p0': state3; known: step, state1"),
    "scaled by tensors": (lambda v: v.update(max1=torch.ones(1), new_max1=torch.ones(1)), r"max1, new_max1 of 'p0': .* before 0.50"),
    "other shape": (lambda v: v.update(state1=v["state1"].view(68, 64)), r"exp_avg of 'p0' has shape \[68, 64\]; expected \[64, 68\]"),
    "other dtype": (lambda v: v.update(state1=v["state1"].char()), r"state1 of 'p0' is torch.int8; float32, or uint8"),
    "missing state": (lambda v: v.pop("state2"), r"state2 of 'p0' is missing"),
    "fraction of a step": (lambda v: v.update(step=2.5), r"step of 'p0' is 2.5; a whole number"),
    "negative step": (lambda v: v.update(step=-1), r"step of 'p0' is -1"),
}


@pytest.mark.parametrize("what", REFUSED, ids=lambda what: what.replace(" ", "_"))
def test_what_is_not_understood_is_refused_and_changes_nothing(job, what):
    change, message = REFUSED[what]
    saved = altered(change)
    saved["param_groups"][0]["lr"] = 0.5
    optimizer = ours(job, "bitsandbytes.AdamW8bit")
    steps(optimizer, [0, 1])
    before = [job.get(f"p{place}", slot) for place in range(3) for slot in ("master", "exp_avg", "exp_avg_sq")]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert job.step == 2 and optimizer.param_groups[0]["lr"] == 0.01
    assert all(torch.equal(job.get(f"p{place}", slot), before.pop(0)) for place in range(3) for slot in ("master", "exp_avg", "exp_avg_sq"))
    steps(optimizer, [2])
    assert job.step == 3


@pytest.mark.parametrize("change, message", [
    (lambda v: v["exp_avg"].update(qmap=v["exp_avg"]["qmap"][:200]), r"code book of exp_avg of 'p0' .*\[200\]; float32 with 256 or 16"),
    (lambda v: v["exp_avg_sq"].update(qmap=unsorted(v["exp_avg_sq"]["qmap"])), r"exp_avg_sq of 'p0' is not ascending"),
    (lambda v: v["exp_avg"].update(scale=torch.ones(5)), r"scales of exp_avg of 'p0' have shape \[5\]; a number that divides 4352"),
    (lambda v: v["exp_avg"].update(codes=v["exp_avg"]["codes"].char()), r"exp_avg of 'p0' has codes of torch.int8"),
    (lambda v: v.update(max_exp_avg_sq=v["exp_avg_sq"]), r"'p0': max_exp_avg_sq \(amsgrad\)"),
    (lambda v: v.update(exp_avg_fast=v["exp_avg_sq"]), r"'p0': exp_avg_fast; step, exp_avg and exp_avg_sq are"),
    (lambda v: v["exp_avg"].update(codes=v["exp_avg"]["codes"][:32]), r"exp_avg of 'p0' has shape \[32, 68\]|divides"),
])
def test_torchao_states_that_are_not_understood_are_refused(change, message):
    saved, _, _ = recorded("torchao.AdamW8bit")
    change(saved["state"][0])
    with pytest.raises(ValueError, match=message):
        ours(None, "torchao.AdamW8bit").load_state_dict(saved)


@pytest.mark.parametrize("make, name, message", [
    (lambda p: orlop.Lion(p), "bitsandbytes.AdamW8bit", "'p0' has state2; orlop.Lion has one state, exp_avg"),
    (lambda p: orlop.AdamW(p), "bitsandbytes.Lion8bit", "state2 of 'p0' is missing"),
    (lambda p: orlop.RMSprop(p, momentum=0.9), "bitsandbytes.RMSprop8bit", "neither momentum nor a mean gradient"),
    (lambda p: orlop.SGD(p), "torchao.AdamW8bit", "orlop.SGD has momentum_buffer"),
])
def test_states_of_another_optimizer_are_refused(make, name, message):
    saved, _, _ = recorded(name)
    with pytest.raises(ValueError, match=message):
        make([(f"p{place}", weight) for place, weight in enumerate(parameters())]).load_state_dict(saved)


def test_coupled_and_decoupled_decay_are_not_taken_for_each_other():
    saved, _, _ = recorded("bitsandbytes.Adam8bit")
    saved["param_groups"][0]["weight_decay"] = 0.1
    named = [(f"p{place}", weight) for place, weight in enumerate(parameters())]
    with pytest.raises(ValueError, match="decoupled_weight_decay=True"):
        orlop.Adam(named).load_state_dict(saved)
    decoupled = orlop.Adam(named, decoupled_weight_decay=True)
    decoupled.load_state_dict(saved)
    assert decoupled.param_groups[0]["weight_decay"] == 0.1
    with pytest.raises(ValueError, match="decays decoupled"):
        orlop.Adam(named, weight_decay=0.1).state_dict(full=True, format="bitsandbytes")


@pytest.mark.parametrize("optimizer, format, message", [
    (lambda p: orlop.SGD(p, momentum=0.9, nesterov=True), "bitsandbytes", "nesterov=True"),
    (lambda p: orlop.SGD(p, momentum=0.9, dampening=0.5), "bitsandbytes", "dampening=0.5"),
    (lambda p: orlop.Adagrad(p, lr_decay=0.1), "bitsandbytes", "lr_decay=0.1"),
    (lambda p: orlop.RMSprop(p, centered=True), "bitsandbytes", "neither momentum nor a mean gradient"),
    (lambda p: orlop.Lion(p), "torchao", "torchao has Adam and AdamW; not Lion"),
    (lambda p: orlop.AdamW(p), "deepspeed", "'torch' or 'bitsandbytes' or 'torchao'"),
])
def test_what_a_library_has_not_is_not_exported(optimizer, format, message):
    made = optimizer([(f"p{place}", weight) for place, weight in enumerate(parameters())])
    with pytest.raises(ValueError, match=message):
        made.state_dict(full=True, format=format)


def test_an_export_is_asked_for_in_full():
    with pytest.raises(ValueError, match="full=True"):
        orlop.AdamW([("p0", parameters()[0])]).state_dict(format="bitsandbytes")


def test_a_state_dict_before_the_first_step_brings_its_groups():
    # bitsandbytes' SGD has its momentum in betas[0].
    optimizer = orlop.SGD([("p0", parameters()[0])])
    optimizer.load_state_dict({"state": {}, "param_groups": [
        {"lr": 0.5, "betas": (0.7, 0.0), "eps": 0.0, "weight_decay": 0.25, "params": [0]}]})
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], "betas" in group) == (0.5, 0.7, 0.25, False)


# The libraries themselves, where installed.

# The imported library. Skips the test if it cannot be imported.
def library(name):
    try:
        return importlib.import_module(name)
    except Exception as error:  # an installed library may fail to load with any exception
        pytest.skip(f"{name} cannot be imported: {error}")


# The library's own optimizer `name` over these weights.
def their_optimizer(name, weights):
    package, kind = name.split(".")
    module = library(package).optim
    return getattr(module, kind)(weights, **(BITSANDBYTES if package == "bitsandbytes" else TORCHAO)[kind][1])


# Makes the steps with these numbers with a library's optimizer.
def step_theirs(optimizer, numbers):
    for step in numbers:
        for group in optimizer.param_groups:
            for place, parameter in enumerate(group["params"]):
                parameter.grad = gradient(place, step)
        optimizer.step()


@pytest.mark.timeout(600)  # torchao compiles its step
@pytest.mark.parametrize("name", NAMES)
def test_a_live_optimizer_s_state_goes_on_here(job, name):
    weights = parameters()
    optimizer = their_optimizer(name, weights)
    step_theirs(optimizer, range(5))
    exact = all(same_form(name, slot) for slot in slots_here(name))  # if not, fp32 state is used, which needs no requantising
    mine = ours(job, name, bits_of(name) if exact else "fp32", [torch.nn.Parameter(weight.detach().clone()) for weight in weights])
    mine.load_state_dict(optimizer.state_dict())
    step_theirs(optimizer, [5])
    steps(mine, [5])
    for weight, parameter in zip(weights, mine.param_groups[0]["params"]):
        torch.testing.assert_close(parameter.detach(), weight.detach(), rtol=1e-5, atol=2e-6)


@pytest.mark.timeout(600)  # torchao compiles its step
@pytest.mark.parametrize("state", ["8bit", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_the_library_loads_an_export_and_goes_on(job, name, state):
    state = bits_of(name) if state == "8bit" else state
    mine = ours(job, name, state)
    package = name.split(".")[0]
    library(package)
    steps(mine, range(5))
    written = mine.state_dict(full=True, format=package)
    weights = [torch.nn.Parameter(parameter.detach().clone()) for parameter in mine.param_groups[0]["params"]]
    optimizer = their_optimizer(name, weights)
    optimizer.load_state_dict(copy.deepcopy(written) if package == "bitsandbytes" else written)
    for state_name, row, slot in slots_of(mine, name):
        if state != "fp32" and package == "bitsandbytes":
            loaded = optimizer.state[weights[0]]
            held = raw(mine, slot)
            codes = loaded[state_name] if row is None else loaded[state_name][row]
            assert torch.equal(codes, held.codes)
    step_theirs(optimizer, [5])
    steps(mine, [5])
    for weight, parameter in zip(weights, mine.param_groups[0]["params"]):
        torch.testing.assert_close(weight.detach(), parameter.detach(), rtol=1e-5, atol=2e-6)
    step_theirs(optimizer, range(6, 9))
    assert all(weight.isfinite().all() for weight in weights)
