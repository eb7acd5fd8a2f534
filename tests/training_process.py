"""A worker for tests that kill it. It trains a small network through the orlop package; each step depends only on its number."""
import contextlib

import torch

import orlop

WIDTH, LAYERS = 768, 3
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "max_norm": 1.0}


class Interrupted(Exception):
    """The exception that a test raises during a backward pass."""


def network():
    torch.manual_seed(0)
    layers = [module for _ in range(LAYERS) for module in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())]
    return torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 3))


def loss_of_step(model, step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, WIDTH, generator=generator)
    return torch.nn.functional.cross_entropy(model(inputs), torch.randint(3, (16,), generator=generator))


def run(connection, address, job, step_count, overlap=None, disturb=None):
    """Train up to job step `step_count`. Send `connection` the number of each step before it begins, then None.

    disturb: (name of a disturbance, the steps it happens at).
    """
    torch.set_num_threads(1)
    model = network()
    kind, steps = disturb or ("", ())
    with orlop.connect(address, job=job) as session:
        session.bind(model)
        optimizer = orlop.AdamW(model.parameters(), overlap=overlap, **OPTIMIZER)
        optimizer.attach()
        for step in range(session.step + 1, step_count + 1):
            connection.send(step)
            if step in steps:
                DISTURBANCES[kind](model, optimizer, step)
            optimizer.zero_grad()
            with optimizer.last_backward():
                loss_of_step(model, step).backward()
            optimizer.step()
            assert session.step == step
    connection.send(None)


def _exception_in_backward(model, optimizer, step):
    """Raise when the gradient reaches a middle layer; the gradients of later layers have been pushed by then."""
    def interrupt(gradient):
        raise Interrupted

    output = []
    hook = model[2 * (step % LAYERS)].register_forward_hook(lambda module, inputs, result: output.append(result))
    loss = loss_of_step(model, step)
    hook.remove()
    output[0].register_hook(interrupt)
    with contextlib.suppress(Interrupted), optimizer.last_backward():
        loss.backward()


def _zero_grad_after_push(model, optimizer, step):
    """Push the gradients of another batch, of the last layers only, and then discard them."""
    for parameter in model[:2].parameters():
        parameter.requires_grad_(False)
    with optimizer.last_backward():
        loss_of_step(model, -step).backward()
    for parameter in model[:2].parameters():
        parameter.requires_grad_(True)
    optimizer.zero_grad()


def _exception_before_step(model, optimizer, step):
    """Without overlap nothing is pushed before step(), so nothing has to be taken back."""
    with contextlib.suppress(Interrupted):
        loss_of_step(model, -step).backward()
        raise Interrupted


DISTURBANCES = {"exception in backward": _exception_in_backward, "zero_grad after push": _zero_grad_after_push,
                "exception before step": _exception_before_step}


def report_lost_server(connection, address, job, timeout_seconds):
    """Join, report it, wait for the message that a server was killed, and send what each call then answers."""
    model = network()
    with orlop.connect(address, job=job, timeout_seconds=timeout_seconds) as session:
        session.bind(model)
        optimizer = orlop.AdamW(model.parameters())
        optimizer.attach()
        loss_of_step(model, 1).backward()
        connection.send("joined")
        connection.recv()
        for name, call in (("step", optimizer.step), ("get", lambda: [session.get(key) for key, _ in model.named_parameters()])):
            try:
                call()
                connection.send((name, "no error", "", {}))
            except orlop.Error as error:
                connection.send((name, type(error).__name__, str(error), error.detail))
