"""Tensors whose raw memory is not their value: they train as with torch, stay in this process, or are refused by name."""

import mmap

import numpy as np
import pytest
import torch

import orlop
from orlop import names, tensors


class Wrapper(torch.Tensor):
    """Has its values in another tensor, as the quantised tensors of torchao have."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map(lambda x: x.inner if isinstance(x, Wrapper) else x, (args, kwargs or {}))
        result = function(*args, **kwargs)
        return cls(result) if isinstance(result, torch.Tensor) else result


class Plain(torch.Tensor):
    """A subclass with memory of its own."""


def negative(*shape):
    """A real tensor whose negative bit is set: it is a view of conjugate values."""
    value = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert value.is_neg()
    return value


def in_inference_mode(make):
    with torch.inference_mode():
        return make()


def mapped(*shape):
    count = torch.Size(shape).numel()
    return torch.frombuffer(mmap.mmap(-1, 4 * count), dtype=torch.float32, count=count).view(shape).copy_(torch.randn(shape))


def fake(*shape):
    with torch._subclasses.FakeTensorMode():
        return torch.randn(shape)


def quantised():
    return torch.quantize_per_tensor(torch.randn(4, 6), 0.1, 0, torch.qint8)


TRAINED = {
    "transposed": lambda: torch.randn(6, 4).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "strided": lambda: torch.randn(4, 12)[:, ::2],
    "view": lambda: torch.randn(100)[7:31].view(4, 6),
    "negative": lambda: negative(4, 6),
    "0-d": lambda: torch.tensor(2.5),
    "one element": lambda: torch.randn(1, 1, 1),
    "shared": lambda: torch.randn(4, 6).share_memory_(),
    "mapped": lambda: mapped(4, 6),
    "subclass": lambda: torch.randn(4, 6).as_subclass(Plain),
    "bf16 negative": lambda: torch._neg_view(torch.randn(4, 6, dtype=torch.bfloat16)),
}
GRADIENTS = {
    "expanded": lambda p: torch.randn(()).expand(p.shape),
    "transposed": lambda p: torch.randn(p.shape[::-1]).permute(tuple(range(p.dim() - 1, -1, -1))),
    "negative": lambda p: torch._neg_view(torch.randn(p.shape)),
    "subclass": lambda p: torch.randn(p.shape).as_subclass(Plain),
}


@pytest.mark.parametrize("overlap", [None, "backward"])
def test_memory_of_every_form_trains_as_with_torch(job, overlap):
    torch.manual_seed(0)
    made = {name.replace(" ", "_"): make() for name, make in TRAINED.items()}
    ours = {name: torch.nn.Parameter(value) for name, value in made.items()}
    theirs = {name: torch.nn.Parameter(value.detach().clone().as_subclass(torch.Tensor).resolve_neg()) for name, value in made.items()}
    strides = {name: parameter.stride() for name, parameter in ours.items()}
    options = {"overlap": overlap, "accumulation_steps": 1} if overlap else {}
    optimizer = orlop.AdamW(list(ours.items()), lr=0.01, state="fp32", session=job, **options)
    reference = torch.optim.AdamW([parameter for name, parameter in theirs.items() if "bf16" not in name], lr=0.01)
    optimizer.attach()
    for make in GRADIENTS.values():
        optimizer.zero_grad()
        gradients = {name: make(parameter).to(parameter.dtype) for name, parameter in theirs.items()}
        for name, gradient in gradients.items():
            theirs[name].grad = gradient.clone().as_subclass(torch.Tensor).resolve_neg()
            if not overlap:
                ours[name].grad = gradient
        if overlap:
            sum((ours[name] * gradient).float().sum() for name, gradient in gradients.items()).backward()
        optimizer.step()
        reference.step()
    for name, parameter in ours.items():
        if "bf16" not in name:
            assert torch.allclose(parameter.detach(), theirs[name], rtol=1e-5, atol=1e-6), name
        assert parameter.stride() == strides[name], name
        assert torch.equal(job.get(name), parameter.detach().resolve_neg()), name


@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_gradient_of_any_form_is_sent_as_its_values(job, kind):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 6))
    other = torch.nn.Parameter(parameter.detach().clone())
    optimizer, reference = orlop.SGD([("w", parameter)], lr=0.1, session=job), torch.optim.SGD([other], lr=0.1)
    parameter.grad = GRADIENTS[kind](parameter)
    other.grad = torch.tensor(parameter.grad.tolist())
    optimizer.step()
    reference.step()
    torch.testing.assert_close(parameter, other)


def test_a_flat_partition_is_refused_with_the_way_out(job):
    model = job.bind(torch.nn.Linear(3, 2))
    flat = torch.nn.Parameter(torch.zeros(8))
    for parameters in (model.parameters(), model.named_parameters()):
        optimizer = orlop.AdamW(parameters, session=job)
        optimizer.param_groups[0]["params"] = [flat]  # as DeepSpeed's ZeRO does
        with pytest.raises(ValueError, match="fully_shard"):
            optimizer.attach()
        job._model = None  # the second optimizer has names alone
    assert job.status()["job"] is None


REFUSED = {
    "float64": (lambda: torch.randn(3, dtype=torch.float64), "torch.float64"),
    "complex": (lambda: torch.randn(3, dtype=torch.complex64), "torch.complex64"),
    "float8": (lambda: torch.randn(3).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "expanded": (lambda: torch.randn(1).expand(3), "clone"),
    "overlapping": (lambda: torch.randn(9).as_strided((4, 3), (2, 1)), "clone"),
    "meta": (lambda: torch.empty(3, device="meta"), "meta"),
    "COO": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "CSR": (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
    "wrapper": (lambda: Wrapper(torch.randn(3)), "test_odd_tensors.Wrapper"),
    "fake": (lambda: fake(3), "FakeTensor"),
    "inference": (lambda: in_inference_mode(lambda: torch.nn.Parameter(torch.randn(3))), "inference"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_trained_parameter_that_servers_cannot_hold_is_refused_by_name(job, kind, bound):
    make, word = REFUSED[kind]
    model = torch.nn.Linear(2, 2)
    model.odd = made if isinstance(made := make(), torch.nn.Parameter) else torch.nn.Parameter(made)
    if bound:
        job.bind(model)
    optimizer = orlop.AdamW(model.named_parameters(), session=job)
    with pytest.raises(ValueError, match=f"'odd' is .*{word}"):
        optimizer.attach()
    assert job.status()["job"] is None


@pytest.mark.filterwarnings("ignore:The given (buffer|NumPy array) is not writable")
@pytest.mark.parametrize("kind", ["mmap", "numpy", "torch"])
def test_a_parameter_in_read_only_memory_is_refused_before_a_write_would_end_the_process(job, tmp_path, kind):
    path = tmp_path / "weights"
    path.write_bytes(torch.arange(2048.0).numpy().tobytes())
    with path.open("rb") as file:
        value = {"mmap": lambda: torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.float32),
                 "numpy": lambda: torch.from_numpy(np.memmap(path, "<f4", mode="r")),
                 "torch": lambda: torch.from_file(str(path), shared=False, size=2048)}[kind]()
    model = torch.nn.Linear(3, 2)
    model.base = torch.nn.Parameter(value)
    optimizer = orlop.AdamW(job.bind(model).parameters())
    if kind == "torch":  # a private mapping can be written
        optimizer.attach()
        return
    with pytest.raises(ValueError, match="'base' is in memory that cannot be written.* clone"):
        optimizer.attach()
    model.base.requires_grad_(False)
    optimizer = orlop.AdamW([p for p in model.parameters() if p.requires_grad], session=job)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert job.step == 1 and torch.equal(model.base, torch.arange(2048.0))


def test_lazy_parameters_are_refused_until_they_have_values(job):
    model = job.bind(torch.nn.LazyLinear(2))
    with pytest.raises(ValueError, match="'weight' is not initialised .* run a forward"):
        orlop.AdamW(model.parameters(), session=job).attach()
    job._hook.remove()  # as if the model had been bound after the forward
    model(torch.ones(1, 3))
    orlop.AdamW(job.bind(model).parameters(), session=job).attach()


def test_two_parameters_in_the_same_memory_are_refused_and_neighbours_are_not(job):
    whole = torch.randn(4, 6)
    model = torch.nn.Module()
    model.left, model.right = (torch.nn.Parameter(whole[:, begin::2]) for begin in (0, 1))
    assert [entry.name for entry in names.of_model(model)] == ["left", "right"]
    model.row = torch.nn.Parameter(whole[1:2])
    with pytest.raises(ValueError, match="'left' and 'row' are two tensors with memory in common"):
        orlop.AdamW(job.bind(model).parameters(), session=job).attach()


KEPT = {
    "rotary": lambda: torch.randn(5, dtype=torch.complex64),
    "float8": lambda: torch.randn(5).to(torch.float8_e4m3fn),
    "uint16": lambda: torch.arange(5).to(torch.uint16),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "expanded": lambda: torch.ones(1).expand(5),
    "quantised": quantised,
    "wrapper": lambda: Wrapper(torch.randn(5)),
    "inference": lambda: in_inference_mode(lambda: torch.randn(5)),
    "meta": lambda: torch.empty(5, device="meta"),
}


def test_frozen_tensors_that_servers_cannot_hold_stay_here_and_one_line_says_so(job, capsys):
    model = torch.nn.Linear(3, 2)
    for name, make in KEPT.items():
        model.register_buffer(name, make())
    model.base = torch.nn.Parameter(Wrapper(torch.randn(300)), requires_grad=False)
    model.wide = torch.nn.Parameter(torch.randn(4, dtype=torch.float64), requires_grad=False)
    model.codes = torch.nn.Parameter(torch.ones(4, dtype=torch.uint16), requires_grad=False)
    model.narrow = torch.nn.Parameter(torch.ones(4, dtype=torch.float16), requires_grad=False)
    model.register_buffer("held", torch.ones(4, dtype=torch.int8))
    model.register_buffer("negative", negative(4))
    model.register_buffer("view", model.weight.detach()[0])
    other = torch.nn.Linear(3, 2)
    other.load_state_dict({name: value for name, value in model.state_dict().items() if name in ("weight", "bias")})
    kept = [*KEPT, "base", "wide", "codes", "view"]
    assert sorted(names.kept_here(model)) == sorted(kept)
    optimizer, reference = orlop.AdamW(job.bind(model).parameters(), session=job), torch.optim.AdamW(other.parameters())
    for _ in range(2):
        for net, stepped in ((model, optimizer), (other, reference)):
            net(torch.ones(2, 3)).square().sum().backward()
            stepped.step()
    torch.testing.assert_close(model.weight, other.weight)
    assert torch.equal(model.view, model.weight[0])
    told = [line for line in capsys.readouterr().out.splitlines() if "in this process" in line]
    assert len(told) == 1 and "'base' and 12 more" in told[0]
    assert torch.equal(job.get("held"), model.held) and torch.equal(job.get("narrow"), model.narrow)
    assert torch.equal(job.get("negative"), model.negative.resolve_neg())
    with pytest.raises(orlop.NotFound, match="'rotary', which is torch.complex64"):
        job.get("rotary")
    with torch.no_grad():
        model.negative.fill_(3)
    job.store(model)
    assert job.get("negative").eq(3).all()
    assert optimizer.state_dict(full=True)["state"].keys() == {0, 1}


def test_a_view_of_a_parameter_does_not_bring_old_weights_back(session):
    """Before, the buffer's bytes of the first step were written over the newer weights when another process joined."""
    def made():
        model = torch.nn.Linear(3, 2)
        model.register_buffer("view", model.weight.detach()[0])
        return model
    model = session.bind(made())
    optimizer = orlop.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    with orlop.connect(session.address) as later:
        resumed = later.bind(made())
        orlop.SGD(resumed.parameters(), lr=0.1).attach()
        assert torch.equal(resumed.weight, model.weight)


BAD_GRADIENTS = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "wrapper": (lambda: Wrapper(torch.ones(3, 3)), "Wrapper"),
    "inference": (lambda: in_inference_mode(lambda: torch.ones(3, 3)), "inference"),
}


@pytest.mark.parametrize("kind", BAD_GRADIENTS)
def test_a_gradient_that_cannot_be_sent_is_refused_by_name(job, kind):
    make, word = BAD_GRADIENTS[kind]
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = orlop.SGD([("w", weight)], lr=1.0, session=job)
    optimizer.attach()
    weight.grad = make()
    with pytest.raises(ValueError, match=f"the gradient of 'w' is .*{word}"):
        optimizer.step()
    assert job.step == 0 and weight.eq(1).all()
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    assert weight.eq(0).all()


def test_no_array_without_memory_reaches_the_client(job):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = orlop.SGD([("w", weight)], lr=1.0, session=job)
    optimizer.attach()
    handle = job._training.handle
    for odd in (torch.empty(3, device="meta"), Wrapper(torch.ones(3)), fake(3), [1.0], None, torch.eye(3).to_sparse()):
        for call in (handle.push_async, handle.set_state, handle.pull):
            with pytest.raises((TypeError, RuntimeError, BufferError)):
                call([(0, "weight", "F32", None, odd, None)])
    for box in ((), (0,), (0, 1, 2), ((), ())):
        with pytest.raises((TypeError, orlop.Error)):
            handle.pull([(0, "weight", "F32", box, torch.ones(3), None)])
    assert torch.equal(job.get("w"), torch.ones(3))


def test_a_box_of_a_whole_tensor():
    values = torch.arange(12.0).view(3, 4)
    assert tensors.inside(values, (4, 8)).tolist() == values[1:].reshape(-1).tolist()
    assert torch.equal(tensors.inside(values, ((0, 1), (3, 2))), values[:, 1:3])
    assert tensors.inside(values, None) is values
