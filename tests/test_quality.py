"""Quality of training with 8-bit state, beside torch.optim.AdamW in fp32: the demo's model, text and 300 steps.

The ordinary run uses one seed; `-k three_seeds` uses three and judges their mean.
"""
import concurrent.futures
import time

import pytest
import torch

orlop = pytest.importorskip("orlop", reason="the Python package orlop is not built: run `make test`")

from demo import data, model, train  # noqa: E402
from demo.run import parse_arguments  # noqa: E402

MOST_LOSS_ABOVE = 0.005     # of the mean validation loss, relative
MOST_WEIGHT_ERROR = 0.1     # relative L2 of the weight change
MOST_SECONDS = 1800  # of one seed, on a machine that is also used for other work


class Training:
    """A copy of the demo's model, its optimizer and the demo's schedule."""

    def __init__(self, options, make_optimizer):
        self.options = options
        self.model = model.seeded_model(model.ModelConfig(options.depth, options.width, context=options.context), options.seed)
        self.optimizer = make_optimizer(self.model, model.parameter_groups(self.model, train.WEIGHT_DECAY))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: train.learning_rate_factor(step, options.steps))
        self.start = self.weights()

    def weights(self):
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    def backward(self, text, step):
        options = self.options
        self.optimizer.zero_grad()
        self.model.loss(data.batch(text, seed=options.seed, step=step, count=options.batch, context=options.context)).backward()

    def take_gradients(self, other):
        for mine, theirs in zip(self.model.parameters(), other.model.parameters()):
            mine.grad = theirs.grad.clone()

    def step(self):
        self.optimizer.step()
        self.schedule.step()

    def weight_error(self, reference):
        """Return the L2 norm of the difference of two weight changes, relative to the reference's."""
        change = (reference.weights() - reference.start).double()
        return (((self.weights() - self.start).double() - change).norm() / change.norm()).item()


def in_8bit(session, settings):
    """Return a function that makes the optimizer for a model in the session's job."""
    def make_optimizer(gpt, groups):
        session.bind(gpt)
        return orlop.AdamW(groups, **settings, session=session, state="8bit", max_norm=train.MAX_NORM)
    return make_optimizer


def measure(seed):
    """Train three copies side by side. Return (validation loss in 8 bit, in fp32, {step: weight error given fp32's gradients}).

    One copy uses plain torch, one 8-bit state on its own gradients, and one 8-bit state on the gradients of the first.
    """
    options = parse_arguments(["--seed", str(seed)])
    settings = {"lr": options.lr, "betas": train.BETAS}
    text = data.load_text()
    began = time.monotonic()
    with orlop.local(servers=2, memory="512MiB", job="own") as own, orlop.connect(own.address, job="given") as given, \
            concurrent.futures.ThreadPoolExecutor(1) as other_core:
        plain = Training(options, lambda _, groups: torch.optim.AdamW(groups, **settings))
        ours, replay = (Training(options, in_8bit(session, settings)) for session in (own, given))
        untrained, errors = train.validation_loss(plain.model, text.validation, options), {}

        def step_of_ours(step):
            ours.backward(text.train, step)
            ours.step()

        for step in range(options.steps):
            stepped = other_core.submit(step_of_ours, step)
            plain.backward(text.train, step)
            replay.take_gradients(plain)
            torch.nn.utils.clip_grad_norm_(plain.model.parameters(), train.MAX_NORM)
            plain.step()
            replay.step()
            stepped.result()
            if (step + 1) % (options.steps // 4) == 0:
                errors[step + 1] = replay.weight_error(plain)
        losses = [train.validation_loss(each.model, text.validation, options) for each in (ours, plain)]
    assert losses[1] < 0.6 * untrained, f"torch did not learn: validation loss {untrained:.3f}, then {losses[1]:.3f}"
    print(f"\nseed {seed}, {options.steps} steps, {time.monotonic() - began:.0f} s: validation loss 8-bit {losses[0]:.4f}, fp32 "
          f"{losses[1]:.4f} ({(losses[0] / losses[1] - 1) * 100:+.3f} %); weight error given fp32's gradients "
          + ", ".join(f"{error:.4f} at {step}" for step, error in errors.items()))
    return *losses, errors


@pytest.fixture(autouse=True)
def one_thread(bin_dir, monkeypatch):
    """Two trainings run at once, each on one core."""
    monkeypatch.setenv("ORLOP_BIN_DIR", str(bin_dir))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(seeds, capsys):
    with capsys.disabled():
        results = [measure(seed) for seed in seeds]
    ours, plain = (sum(losses) / len(seeds) for losses in list(zip(*results))[:2])
    assert ours <= plain * (1 + MOST_LOSS_ABOVE)
    for *_, errors in results:
        assert errors[max(errors)] <= MOST_WEIGHT_ERROR
        assert min(errors.values()) > 0, "8-bit state cannot give the bits of fp32 state: the servers kept fp32"


@pytest.mark.timeout(MOST_SECONDS)
def test_8bit_state_trains_the_demo_as_well_as_fp32(capsys):
    check([0], capsys)


@pytest.mark.slow
@pytest.mark.timeout(3 * MOST_SECONDS)
def test_8bit_state_trains_the_demo_as_well_as_fp32_over_three_seeds(capsys):
    check([0, 1, 2], capsys)
