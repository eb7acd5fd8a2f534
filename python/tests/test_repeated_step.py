"""step() again after it raised: a gradient that was committed counts once, a new one always, and nothing is stuck."""

import pytest
import torch

import orlop
from conftest import loss_of, train_step


class Faulty:
    """A core whose next call of one method fails once; afterwards all is as before."""

    def __init__(self, core, method, fault):
        self._core, self._method, self._fault = core, method, fault

    def __getattr__(self, name):
        if name != self._method or self._fault is None:
            return getattr(self._core, name)
        fault, self._fault = self._fault, None
        return lambda *args, **kwargs: fault(self._core, *args, **kwargs)


def before_commit(core, **kwargs):
    raise KeyboardInterrupt


class Refused:
    """A push that the servers refuse."""

    def wait(self):
        raise orlop.FailedPrecondition("another step is being made", {"reason": "WRONG_STEP"})

    def cancel(self):
        pass


class Unaware:
    """A core that learns nothing of a commit before refresh(), and until then is refused what names a step."""

    def __init__(self, core, state):
        self._core, self.state = core, state

    def __getattr__(self, name):
        if name == "push_async":
            return lambda *args, **kwargs: Refused()
        if name in ("set_state", "commit", "abort"):
            raise orlop.FailedPrecondition("another step is being made", {"reason": "WRONG_STEP"})
        return getattr(self._core, name)


def unseen_commit(training):
    def fault(core, **kwargs):
        unaware = Unaware(core, core.state)
        core.commit(**kwargs)

        def refresh():
            core.refresh()
            training.traffic.handle = core
        unaware.refresh = refresh
        training.traffic.handle = unaware
        raise orlop.DeadlineExceeded("time is up")
    return fault


def after_commit(core, **kwargs):
    core.commit(**kwargs)
    raise KeyboardInterrupt


def half_a_push(core, parts, **kwargs):
    core.push_async(parts[:1], **kwargs).wait()
    raise orlop.ResourceExhausted("no room")


def no_pull(core, parts, **kwargs):
    raise orlop.Unavailable("the server is away")


def half_a_pull(core, parts, **kwargs):
    core.pull(parts[:1])
    raise orlop.Unavailable("the server is away")


# method, fault, whether the step is committed in spite of it
FAULTS = {
    "interrupted-before-commit": ("commit", before_commit, False),
    "interrupted-after-commit": ("commit", after_commit, True),
    "unseen-commit": ("commit", unseen_commit, True),
    "half-a-push": ("push_async", half_a_push, False),
    "no-pull": ("pull", no_pull, True),
    "half-a-pull": ("pull", half_a_pull, True),
}

CASES = pytest.mark.parametrize(("fault", "overlap"), [
    pytest.param(fault, overlap, id=f"{fault}-{'overlap' if overlap else 'plain'}") for fault in FAULTS for overlap in (False, True)
    if not (overlap and fault == "half-a-push")])  # there step() has nothing left to push


def inject(optimizer, name):
    method, fault, committed = FAULTS[name]
    training = optimizer._job
    if fault is unseen_commit:
        fault = unseen_commit(training)
    training.traffic.handle = Faulty(training.handle, method, fault)
    return committed


def failing_step(net, optimizer, batch, name):
    optimizer.zero_grad()
    loss_of(net, batch).backward()
    committed = inject(optimizer, name)
    with pytest.raises((orlop.Error, KeyboardInterrupt), match="^$|no room|the server is away|time is up"):
        optimizer.step()
    return committed


def train(servers, name, make_net, batches, **options):
    """Weights after these batches, undisturbed."""
    with orlop.connect(servers.address, job=name) as job:
        net = make_net()
        job.bind(net)
        optimizer = orlop.AdamW(net.parameters(), session=job, **options)
        for batch in batches:
            train_step(net, optimizer, batch)
        return [p.detach().clone() for p in net.parameters()]


@pytest.fixture
def expected(servers, make_net, request):
    name = request.node.name.replace("[", "-").replace("]", "")
    return lambda batches: train(servers, f"expected-{len(batches)}-{name}", make_net, batches)


def assert_equal(net, expected):
    for ours, theirs in zip(net.parameters(), expected):
        assert torch.equal(ours, theirs)


def start(job, make_net, overlap, bind=True):
    net = make_net()
    if bind:
        job.bind(net)
    options = {"overlap": "backward", "accumulation_steps": 1} if overlap else {}
    return net, orlop.AdamW(net.named_parameters(), session=job, **options)


@CASES
def test_a_repeated_step_counts_once(job, make_net, batches, expected, fault, overlap):
    net, optimizer = start(job, make_net, overlap)
    train_step(net, optimizer, batches[0])
    failing_step(net, optimizer, batches[1], fault)
    optimizer.step()
    assert job.step == 2
    assert_equal(net, expected(batches[:2]))
    assert float(optimizer.state[net.first.weight]["step"]) == 2 and optimizer.grad_norm > 0 and not optimizer.skipped
    train_step(net, optimizer, batches[2])
    assert job.step == 3
    assert_equal(net, expected(batches[:3]))


@CASES
def test_a_new_batch_after_a_step_that_raised_counts(job, make_net, batches, expected, fault, overlap):
    net, optimizer = start(job, make_net, overlap)
    train_step(net, optimizer, batches[0])
    committed = failing_step(net, optimizer, batches[1], fault)
    train_step(net, optimizer, batches[2])  # its forward brings the weights
    kept = batches[:3] if committed else [batches[0], batches[2]]
    assert job.step == len(kept)
    assert_equal(net, expected(kept))
    assert float(optimizer.state[net.first.weight]["step"]) == len(kept)


@CASES
def test_a_forward_between_does_not_make_a_repeated_step_count_twice(job, make_net, batches, expected, fault, overlap):
    net, optimizer = start(job, make_net, overlap)
    train_step(net, optimizer, batches[0])
    failing_step(net, optimizer, batches[1], fault)
    with torch.no_grad():
        loss_of(net, batches[5])
    optimizer.step()
    assert job.step == 2
    assert_equal(net, expected(batches[:2]))


@CASES
def test_without_a_bound_model_the_next_step_brings_the_weights(job, make_net, batches, fault, overlap):
    net, optimizer = start(job, make_net, overlap, bind=False)
    train_step(net, optimizer, batches[0])
    committed = failing_step(net, optimizer, batches[1], fault)
    train_step(net, optimizer, batches[2])
    assert job.step == 2 + committed
    for name, parameter in net.named_parameters():
        assert torch.equal(job.get(name), parameter)
    train_step(net, optimizer, batches[3])
    assert job.step == 3 + committed


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_after_a_step_that_raised_keeps_what_it_stores(job, make_net, batches, fault):
    net, optimizer = start(job, make_net, overlap=False)
    train_step(net, optimizer, batches[0])
    committed = failing_step(net, optimizer, batches[1], fault)
    wanted = make_net(seed=9)
    net.load_state_dict(wanted.state_dict())
    job.store(net)
    assert job.step == 2 + committed
    assert_equal(net, wanted.parameters())
    assert torch.equal(job.get("first.weight"), wanted.first.weight)
    train_step(net, optimizer, batches[2])
    assert job.step == 3 + committed


@pytest.mark.parametrize("method", ["set_state", "commit"])
def test_an_interrupted_store_leaves_nothing(job, make_net, batches, expected, method):
    net, optimizer = start(job, make_net, overlap=False)
    train_step(net, optimizer, batches[0])
    net.load_state_dict(make_net(seed=9).state_dict())

    def interrupted(core, *args, **kwargs):
        if method == "set_state":
            core.set_state(*args)
        raise KeyboardInterrupt
    optimizer._job.traffic.handle = Faulty(optimizer._job.handle, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.store(net)
    job.load(net)
    train_step(net, optimizer, batches[1])
    assert job.step == 2
    assert_equal(net, expected(batches[:2]))


def test_the_same_gradient_counts_again_in_a_step_after_the_repeated_one(job, make_net, batches):
    net, optimizer = start(job, make_net, overlap=False)
    train_step(net, optimizer, batches[0])
    failing_step(net, optimizer, batches[1], "no-pull")
    optimizer.step()
    assert job.step == 2
    optimizer.step()  # as in torch
    assert job.step == 3
