"""What is edited in ``param_groups`` and ``state`` after construction: followed as torch does, or refused by name with nothing changed."""

import collections
import copy
import math

import pytest
import torch

import orlop


class Pair:
    """The same parameters under an optimizer of this package and under torch's."""

    def __init__(self, session, kind, groups=1, **options):
        self.session = session
        generator = torch.Generator().manual_seed(5)
        self.ours = [torch.nn.Parameter(torch.randn(20, 30, generator=generator)) for _ in range(3)]
        self.theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in self.ours]
        named = [(f"p{place}", parameter) for place, parameter in enumerate(self.ours)]
        self.optimizer = getattr(orlop, kind)([{"params": named[place::groups]} for place in range(groups)], session=session, state="fp32",
                                              **options)
        self.torch = getattr(torch.optim, kind)([{"params": self.theirs[place::groups]} for place in range(groups)], **options)
        self.steps = 0

    def give_gradients(self):
        generator = torch.Generator().manual_seed(100 + self.steps)
        for a, b in zip(self.ours, self.theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()

    def step(self, count=1):
        for _ in range(count):
            self.give_gradients()
            self.optimizer.step()
            self.torch.step()
            self.steps += 1
        for number, (a, b) in enumerate(zip(self.ours, self.theirs)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text: f"step {self.steps}, parameter {number}: {text}")

    def edit(self, place=0, **values):
        for optimizer in (self.optimizer, self.torch):
            optimizer.param_groups[place].update(values)

    def refused(self, error, words):
        """The next step is refused, changes nothing, and is the reason that the edit must be taken back."""
        self.give_gradients()
        before, committed = [parameter.detach().clone() for parameter in self.ours], self.session.step
        with pytest.raises(error, match=words):
            self.optimizer.step()
        assert self.session.step == committed
        assert all(torch.equal(a, b) for a, b in zip(before, self.ours))


@pytest.mark.parametrize("kind, options, edits", [
    ("SGD", dict(lr=0.1, momentum=0.9), [dict(momentum=0), dict(momentum=0.9), dict(momentum=0.5, dampening=0.3)]),
    ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True), [dict(momentum=0), dict(momentum=0.8), dict(nesterov=False), dict(nesterov=True)]),
    ("SGD", dict(lr=0.1), [dict(momentum=0.9), dict(momentum=0.0), dict(momentum=0.9, nesterov=True, weight_decay=0.1)]),
    ("RMSprop", dict(lr=0.01, momentum=0.9), [dict(momentum=0), dict(momentum=0.9), dict(centered=False, alpha=0.9)]),
    ("RMSprop", dict(lr=0.01, centered=True, momentum=0.5), [dict(centered=False), dict(momentum=0), dict(centered=True, momentum=0.5)]),
    ("Adam", dict(lr=0.01), [dict(betas=(0.5, 0.9)), dict(lr=torch.tensor(0.002)), dict(eps=1e-3, weight_decay=0.1), dict(lr=0)]),
    ("AdamW", dict(lr=0.01), [dict(betas=[0.5, 0.9]), dict(lr=torch.tensor([0.002])), dict(weight_decay=0.5), dict(lr=0.01, foreach=True)]),
    ("Adagrad", dict(lr=0.1, initial_accumulator_value=0.1), [dict(lr_decay=0.1), dict(eps=1e-3)]),
    ("Adafactor", dict(lr=0.1), [dict(beta2_decay=-0.5), dict(d=2.0), dict(eps=(1e-6, 1e-2))]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_edits_are_followed_at_the_next_step(job, kind, options, edits):
    pair = Pair(job, kind, **options)
    pair.step(3)
    for edit in edits:
        pair.edit(**edit)
        pair.step(2)


@pytest.mark.parametrize("kind", ["SGD", "RMSprop"])
def test_a_scheduler_that_cycles_momentum_to_0_is_followed(job, kind):
    pair = Pair(job, kind, groups=2, lr=0.01, momentum=0.9)
    schedulers = [torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.001, max_lr=0.02, step_size_up=3, base_momentum=0.0,
                                                    max_momentum=0.9) for optimizer in (pair.optimizer, pair.torch)]
    for _ in range(14):
        pair.step()
        for scheduler in schedulers:
            scheduler.step()
    assert any(group["momentum"] != 0.9 for group in pair.optimizer.param_groups)


@pytest.mark.parametrize("kind, options", [("SGD", dict(momentum=0.9)), ("AdamW", {}), ("RMSprop", dict(centered=True))],
                         ids=lambda value: value if isinstance(value, str) else "")
def test_parameters_move_between_groups(job, kind, options):
    pair = Pair(job, kind, groups=2, lr=0.01, **options)
    pair.edit(1, lr=0.1, weight_decay=0.2)
    pair.step(2)
    for optimizer in (pair.optimizer, pair.torch):
        first, second = optimizer.param_groups
        second["params"].append(first["params"].pop())
    pair.step(2)
    for optimizer in (pair.optimizer, pair.torch):
        optimizer.param_groups.reverse()
    pair.step(2)
    for optimizer in (pair.optimizer, pair.torch):
        first, second = optimizer.param_groups
        second["params"] += first["params"]
        first["params"] = []
    pair.step(2)
    for optimizer in (pair.optimizer, pair.torch):
        last = optimizer.param_groups[1]
        optimizer.param_groups.append(last | {"params": [last["params"].pop()], "lr": 0.03})
    pair.step(2)


def test_parameters_that_move_after_an_overlapped_push_are_pushed_again(job):
    """The servers drop what was pushed for the groups of before."""
    torch.manual_seed(0)
    net = job.bind(torch.nn.Linear(30, 40))
    twin = copy.deepcopy(net)

    def make(optimizer, module, **options):
        return optimizer([{"params": [module.weight], "lr": 0.1}, {"params": [module.bias], "lr": 0.01}], momentum=0.9, **options)
    optimizers = make(orlop.SGD, net, overlap="backward", accumulation_steps=1), make(torch.optim.SGD, twin)
    for number in range(4):
        for module, optimizer in zip((net, twin), optimizers):
            optimizer.zero_grad()
            module(torch.ones(2, 30)).square().sum().backward()
            if number == 2:
                first, second = optimizer.param_groups
                first["params"], second["params"] = second["params"], first["params"]
            optimizer.step()
        torch.testing.assert_close(list(net.parameters()), list(twin.parameters()), rtol=1e-5, atol=1e-5)


def test_what_a_step_cannot_do_is_refused_by_name_and_changes_nothing(job):
    pair = Pair(job, "AdamW", groups=2, lr=0.01)
    pair.step(2)
    for option, value in [("maximize", True), ("amsgrad", True), ("capturable", True), ("differentiable", True), ("state", "8bit"),
                          ("state", "none"), ("rounding", "stochastic"), ("master", "bf16"), ("decoupled_weight_decay", False),
                          ("lr", -0.1), ("lr", math.nan), ("lr", math.inf), ("lr", torch.tensor([0.1, 0.2])), ("eps", -1.0),
                          ("eps", math.inf), ("weight_decay", -1), ("weight_decay", math.nan), ("betas", (0.9,)),
                          ("betas", (0.9, 0.9, 0.9)), ("betas", (0.9, 1.0))]:
        kept = pair.optimizer.param_groups[1][option]
        pair.optimizer.param_groups[1][option] = value
        word = {"lr": "lr|learning rate", "eps": "epsilon", "betas": "beta"}.get(option, option)
        pair.refused(ValueError, word)
        pair.optimizer.param_groups[1][option] = kept
    pair.optimizer.param_groups[1]["lr"] = "1e-3"
    pair.refused(TypeError, "lr='1e-3' is of type str")
    pair.optimizer.param_groups[1]["lr"] = 0.01
    pair.step()


def test_members_that_come_or_go_are_refused_by_name(job):
    pair = Pair(job, "SGD", groups=2, lr=0.01)
    pair.step()
    pair.optimizer.param_groups[1]["params"].append(torch.nn.Parameter(torch.zeros(3)))
    pair.refused(RuntimeError, r"parameter 1 of group 1 \(shape \[3\]\) came to the groups after")
    pair.optimizer.param_groups[1]["params"].pop()
    gone = pair.optimizer.param_groups.pop()
    pair.refused(RuntimeError, "parameter 'p1' is in no group any more")
    pair.optimizer.param_groups.append(gone)
    pair.step()


def test_states_that_the_job_lacks_are_refused_by_name(job):
    pair = Pair(job, "RMSprop", lr=0.01)
    pair.step()
    pair.optimizer.param_groups[0]["momentum"] = 0.9
    pair.refused(ValueError, "momentum=0.9, centered=False: the job was joined by an RMSprop with neither")
    pair.optimizer.param_groups[0]["momentum"] = 0
    pair.optimizer.param_groups[0]["centered"] = True
    pair.refused(ValueError, "centered=True")
    pair.optimizer.param_groups[0]["centered"] = False
    pair.step()


def test_dampened_momentum_that_begins_late_is_refused(job):
    """torch begins the momentum_buffer with the undampened gradient, in whatever step momentum begins."""
    pair = Pair(job, "SGD", lr=0.01)
    pair.step(2)
    pair.edit(momentum=0.9, dampening=0.5)
    pair.refused(NotImplementedError, "momentum=0.9 with dampening=0.5: parameter 'p0' was updated without momentum before")
    pair.edit(dampening=0)
    pair.step()
    pair.edit(dampening=0.5)
    pair.step(2)


def test_moved_parameters_stay_moved_in_the_next_run(tmp_path):
    def run(groups, start):
        with orlop.local(directory=tmp_path, servers=2, memory="256MiB") as session:
            parameters = session.bind(torch.nn.ParameterDict({name: torch.ones(300) for name in "abc"}))
            optimizer = orlop.SGD([{"params": [parameters[name] for name in names], "lr": lr} for names, lr in groups], momentum=0.5)
            optimizer.attach()
            for parameter, value in zip(parameters.values(), start):
                assert parameter[0].item() == value
                parameter.grad = torch.ones(300)
            optimizer.step()
            first, second = optimizer.param_groups
            second["params"].append(first["params"].pop())
            optimizer.step()
            return [parameter[0].item() for parameter in parameters.values()]

    values = run([("ab", 1.0), ("c", 0.25)], [1, 1, 1])
    assert values == [1 - 1 - 1.5, 1 - 1 - 0.375, 1 - 0.25 - 0.375]
    run([("ac", 1.0), ("b", 0.25)], values)


def test_a_new_process_may_group_anew_but_not_choose_other_formats(job, servers):
    pair = Pair(job, "SGD", groups=2, lr=0.01, momentum=0.9)
    pair.step(2)
    with orlop.connect(servers.address, job=job.job) as again:
        named = [(f"p{place}", torch.nn.Parameter(torch.zeros(20, 30))) for place in (0, 2, 1)]  # the order of the manifest
        with pytest.raises(orlop.FailedPrecondition, match="has stepped to 2 with another optimizer configuration"):
            orlop.SGD(named, momentum=0.9, rounding="stochastic", session=again).attach()
    with orlop.connect(servers.address, job=job.job) as again:
        optimizer = orlop.SGD(named, lr=0.01, momentum=0.9, state="fp32", session=again)
        optimizer.attach()
        pair.give_gradients()
        for (_, parameter), place in zip(named, (0, 2, 1)):
            parameter.grad = pair.ours[place].grad
        optimizer.step()
        pair.torch.step()
        for (_, parameter), place in zip(named, (0, 2, 1)):
            torch.testing.assert_close(parameter, pair.theirs[place], rtol=1e-5, atol=1e-6)


def test_an_edit_before_the_join_is_checked_before_anything_is_sent(job):
    pair = Pair(job, "SGD", lr=0.01)
    pair.optimizer.param_groups[0]["maximize"] = True
    pair.refused(ValueError, "maximize=True")
    assert job.status()["job"] is None
    pair.optimizer.param_groups[0]["maximize"] = False
    pair.step()


def test_parts_of_together_follow_edits(job):
    """RMSprop, which knows its states since the join, and Muon beside it."""
    torch.manual_seed(0)
    net = job.bind(torch.nn.Linear(6, 5))
    twin = copy.deepcopy(net)
    optimizer = orlop.Together(orlop.RMSprop([net.weight], lr=0.01, momentum=0.9, state="fp32"), orlop.SGD([net.bias], lr=0.1))
    references = [torch.optim.RMSprop([twin.weight], lr=0.01, momentum=0.9), torch.optim.SGD([twin.bias], lr=0.1)]

    def step():
        for module in (net, twin):
            module.zero_grad()
            module(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        for reference in references:
            reference.step()
        torch.testing.assert_close(list(net.parameters()), list(twin.parameters()), rtol=1e-5, atol=1e-6)

    for momentum in (0.9, 0, 0.9):
        optimizer.param_groups[0]["momentum"] = references[0].param_groups[0]["momentum"] = momentum
        step()
        step()
    optimizer.param_groups[1]["part"] = 0
    with pytest.raises(ValueError, match="part=0 of parameter 'bias': .* was joined with 1"):
        optimizer.step()


@pytest.mark.parametrize("kind, option, value", [
    ("SGD", "momentum", -1.0), ("SGD", "momentum", math.nan), ("SGD", "dampening", math.nan), ("SGD", "lr", math.inf),
    ("SGD", "lr", math.nan), ("SGD", "lr", torch.tensor([0.1, 0.2])), ("SGD", "weight_decay", math.inf), ("RMSprop", "momentum", -1.0),
    ("RMSprop", "alpha", math.nan), ("RMSprop", "momentum", math.nan), ("AdamW", "betas", (0.9,)), ("AdamW", "betas", (0.9, 0.99, 0.999)),
    ("AdamW", "eps", math.nan), ("Lion", "betas", (0.9,)), ("AdEMAMix", "betas", (0.9, 0.99)), ("AdEMAMix", "T", -1),
    ("Adafactor", "eps", (1e-3,)), ("Adagrad", "initial_accumulator_value", -1), ("LAMB", "eps", math.inf),
    ("Muon", "ns_coefficients", (math.nan, 1, 1)), ("Muon", "momentum", math.nan)], ids=str)
def test_values_are_checked_where_they_are_given(kind, option, value):
    def parameters(name):
        return [(name, torch.nn.Parameter(torch.ones(2, 2)))]

    make = getattr(orlop, kind)
    with pytest.raises(ValueError):
        make(parameters("w"), **{option: value})
    with pytest.raises(ValueError):
        make([{"params": parameters("w"), option: value}])
    optimizer = make(parameters("w"))
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": parameters("v"), option: value})
    assert len(optimizer.param_groups) == 1
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= {option: value, "lr": value if option == "lr" else 0.5}
    before = copy.deepcopy([group | {"params": None} for group in optimizer.param_groups])
    with pytest.raises(ValueError):
        optimizer.load_state_dict(saved)
    assert [group | {"params": None} for group in optimizer.param_groups] == before


def test_text_is_no_number():
    for make in (lambda lr: orlop.SGD([("w", torch.nn.Parameter(torch.ones(2)))], lr=lr),
                 lambda lr: torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=lr)):
        with pytest.raises(TypeError, match="str"):
            make("1e-3")


def test_a_refused_load_changes_nothing(job):
    pair = Pair(job, "SGD", groups=2, lr=0.01, momentum=0.9)
    pair.step(2)

    def everything():
        return ([group | {"params": None} for group in pair.optimizer.param_groups], job.step,
                [float(state["step"]) for state in pair.optimizer.state.values()], [job.get(f"p{i}", "momentum_buffer") for i in range(3)])

    saved = pair.optimizer.state_dict(full=True)
    pair.step()
    before = copy.deepcopy(everything())
    for spoil, words in [
            (lambda state: state["state"][0].update(momentum_buffer=torch.zeros(2, 2)), r"momentum_buffer of 'p0' has shape \[2, 2\]"),
            (lambda state: state["param_groups"][1].update(lr=-1), "learning rate"),
            (lambda state: state["param_groups"][1].update(state="8bit", lr=0.3), "state='8bit' of parameter 'p1'"),
            (lambda state: state["param_groups"][1].update(maximize=True, lr=0.3), "maximize=True"),
            (lambda state: state["param_groups"].pop(), "loaded state dict has 1 parameter groups"),
            (lambda state: state["param_groups"][0]["params"].pop(), r"2 parameter groups of \[1, 1\] parameters; this optimizer has 2")]:
        spoiled = copy.deepcopy(saved)
        spoiled["param_groups"][0]["lr"] = 0.7
        spoil(spoiled)
        with pytest.raises(ValueError, match=words):
            pair.optimizer.load_state_dict(spoiled)
        after = everything()
        assert after[:3] == before[:3]
        assert all(torch.equal(a, b) for a, b in zip(after[3], before[3]))
    pair.step()


def test_a_load_replaces_all_of_the_state(job):
    """What torch's state lacks is gone after the load: the state before the first step resets a job that has stepped."""
    pair = Pair(job, "Adam", lr=0.01)
    plain, theirs = (copy.deepcopy(optimizer.state_dict()) for optimizer in (pair.optimizer, pair.torch))
    pair.optimizer.attach()
    for start in (plain, pair.optimizer.state_dict(full=True), theirs):
        pair.step(3)
        pair.optimizer.load_state_dict(start)
        pair.torch.load_state_dict(theirs)
        assert [float(state["step"]) for state in pair.optimizer.state.values()] == [0, 0, 0]
    pair.step(3)


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_entries_beside_the_states_survive(job, full):
    pair = Pair(job, "AdamW", lr=0.01)
    pair.step()
    for optimizer, parameters in ((pair.optimizer, pair.ours), (pair.torch, pair.theirs)):
        optimizer.state[parameters[0]]["ema"] = torch.full((20, 30), 2.0)
        optimizer.state[parameters[1]]["seen"] = [1, 2]
        optimizer.state["calls"] = 7
        optimizer.state["mask"] = {"p0": torch.ones(2)}
    pair.step()
    saved, theirs = pair.optimizer.state_dict(full=True) if full else pair.optimizer.state_dict(), pair.torch.state_dict()
    for state in (saved, theirs):
        assert torch.equal(state["state"][0]["ema"], torch.full((20, 30), 2.0)) and state["state"][1]["seen"] == [1, 2]
        assert state["state"]["calls"] == 7 and torch.equal(state["state"]["mask"]["p0"], torch.ones(2))
    pair.optimizer.state[pair.ours[0]]["ema"] = None
    del pair.optimizer.state["calls"]
    pair.optimizer.load_state_dict(saved)
    assert torch.equal(pair.optimizer.state[pair.ours[0]]["ema"], torch.full((20, 30), 2.0))
    assert pair.optimizer.state[pair.ours[1]]["seen"] == [1, 2]
    assert pair.optimizer.state["calls"] == 7 and torch.equal(pair.optimizer.state["mask"]["p0"], torch.ones(2))
    pair.step()


def test_a_state_of_torch_with_entries_beside_it_is_taken(job):
    pair = Pair(job, "SGD", lr=0.01)
    for optimizer, parameters in ((pair.optimizer, pair.ours), (pair.torch, pair.theirs)):
        optimizer.state[parameters[0]]["ema"] = torch.ones(2)
    pair.optimizer.load_state_dict(pair.torch.state_dict())
    assert torch.equal(pair.optimizer.state[pair.ours[0]]["ema"], torch.ones(2))
    pair.step()


def test_a_state_that_was_cleared_or_set_here_is_refused(job):
    pair = Pair(job, "SGD", lr=0.01, momentum=0.9)
    pair.step()
    pair.optimizer.state[pair.ours[1]]["momentum_buffer"] = torch.zeros(20, 30)
    pair.refused(RuntimeError, "momentum_buffer of parameter 'p1'")
    del pair.optimizer.state[pair.ours[1]]["momentum_buffer"]
    saved, pair.optimizer.state = pair.optimizer.state_dict(), collections.defaultdict(dict)
    pair.refused(RuntimeError, "state of parameter 'p0'")
    pair.optimizer.load_state_dict(saved)
    assert [float(state["step"]) for state in pair.optimizer.state.values()] == [1, 1, 1]
    pair.step()


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_an_update_count_that_was_set_here_is_refused(job, kind):
    """torch's Adam would go on from it; the servers count themselves."""
    pair = Pair(job, kind, lr=0.01)
    pair.step(2)
    state = pair.optimizer.state[pair.ours[1]]
    state["step"].fill_(100)
    pair.refused(RuntimeError, "step of parameter 'p1' was set to 100 .* 2 updates")
    state["step"] = 2  # a number is as good as a tensor
    pair.step()
    saved = pair.optimizer.state_dict(full=True)
    for _, entries in sorted(saved["state"].items()):
        entries["step"] = torch.tensor(100.0)
    pair.optimizer.load_state_dict(saved)
    for entries in pair.torch.state.values():
        if kind == "AdamW":
            entries["step"].fill_(100)
    pair.step(2)


def test_adagrad_begins_all_groups_with_the_constructor_s_sum():
    """torch ignores a group's initial_accumulator_value in silence."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    group = {"params": parameters[1:], "initial_accumulator_value": 0.5}
    reference = torch.optim.Adagrad([{"params": parameters[:1]}, group], initial_accumulator_value=0.1)
    assert torch.equal(reference.state[parameters[1]]["sum"], torch.full((3,), 0.1))
    with pytest.raises(ValueError, match="initial_accumulator_value=0.5 of a group.*which is 0.1"):
        orlop.Adagrad([{"params": parameters[:1]}, group], initial_accumulator_value=0.1)
    assert len(orlop.Adagrad([{"params": parameters[:1]}, group], initial_accumulator_value=0.5).param_groups) == 2
