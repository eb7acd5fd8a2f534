"""The shapes, dtypes and tolerances that other libraries ask of their own optimizers.

bitsandbytes: tests/test_optim.py, ``test_optimizer32bit`` and ``test_optimizer8bit`` (https://github.com/bitsandbytes-foundation/bitsandbytes).
DeepSpeed: tests/unit/ops/adam, adagrad and lion (https://github.com/microsoft/DeepSpeed), whose tolerance is 1 % of the weights' norm.
The references are float64 models of the papers' rules. With --slow the large shapes have all of their rows.
"""

import numpy as np
import pytest
import torch

from orlop import kernels
from test_kernels_reference import ADAM as ADAM_FORM
from test_kernels_reference import MIX, RMS, SGD, SGD_FORM, TOLERANCES, Adagrad, AdamW, AdEMAMix, Lion, RMSprop
from test_kernels_reference import Adam as AdamModel

# Kernel, model, hyper-parameters as bitsandbytes' tests give them, and the model's attribute of each state.
NONE = {"weight_decay": 0.0}
CASES = {
    "adam": ("adam", AdamModel, ADAM_FORM | NONE, {"m": "exp_avg", "v": "exp_avg_sq"}),
    "adamw": ("adamw", AdamW, ADAM_FORM | {"weight_decay": 0.01}, {"m": "exp_avg", "v": "exp_avg_sq"}),
    "momentum": ("sgd", SGD, SGD_FORM | NONE | {"lr": 0.01, "momentum": 0.9}, {"b": "momentum_buffer"}),
    "rmsprop": ("rmsprop", RMSprop, RMS | NONE | {"lr": 0.01, "alpha": 0.9}, {"v": "square_avg"}),
    "lion": ("lion", Lion, {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0}, {"m": "exp_avg"}),
    "ademamix": ("ademamix", AdEMAMix, MIX | NONE, {"m": "exp_avg", "slow": "exp_avg_slow", "v": "exp_avg_sq"}),
    "ademamix-scheduled": ("ademamix", AdEMAMix, MIX | NONE | {"warmup": 20}, {"m": "exp_avg", "slow": "exp_avg_slow", "v": "exp_avg_sq"}),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUANTISED = [32, 1024, 4097]
SEED = 31


@pytest.fixture
def rows(request, columns):
    is_small = columns > 32 and not request.config.getoption("--slow", False)
    return 16 if is_small else 1024


def numbers(tensor):
    return tensor.double().numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, *QUANTISED])
@pytest.mark.parametrize("case", CASES)
def test_fp32_states_of_bitsandbytes_shapes(case, rows, columns, dtype):
    name, model, values, states = CASES[case]
    generator = torch.Generator().manual_seed(SEED)
    start = (0.1 * torch.randn(rows, columns, generator=generator)).to(dtype).float()
    shard, reference, expected = kernels.Shard(name, start, state="fp32"), model(), numbers(start)
    atol, rtol = TOLERANCES[dtype]
    for step in range(1, 21):
        gradient = (0.01 * torch.randn(rows, columns, generator=generator)).to(dtype)
        shard.step(gradient, values)
        expected = reference.step(expected, numbers(gradient), step, **values)
        far = int((~np.isclose(numbers(shard.master()), expected, atol=atol, rtol=rtol)).sum())
        assert far <= (15 if case == "lion" else 0), f"step {step}: {far} weights, seed {SEED}"  # signs at the border
        for attribute, slot in states.items():
            np.testing.assert_allclose(numbers(shard.state(slot)).reshape(expected.shape), getattr(reference, attribute), atol=atol,
                                       rtol=rtol, err_msg=f"step {step}, {slot}, seed {SEED}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", QUANTISED)
@pytest.mark.parametrize("case", CASES)
def test_8_bit_states_of_bitsandbytes_shapes(case, rows, columns, dtype):
    """After each comparison the reference takes the 8-bit run's states, and the weights as the parameter's dtype has them."""
    name, model, values, states = CASES[case]
    values = values | ({"warmup": 100} if values.get("warmup") else {})
    mean, relative = (1.7e-4, 1.6e-3) if dtype == torch.bfloat16 else (6e-5, 6e-4)
    generator = torch.Generator().manual_seed(SEED)
    start = (0.1 * torch.randn(rows, columns, generator=generator)).to(dtype).float()
    shard, reference, expected = kernels.Shard(name, start), model(), numbers(start)
    errors, relative_errors = [], []
    for step in range(1, 51):
        gradient = (0.01 * torch.randn(rows, columns, generator=generator)).to(dtype)
        shard.step(gradient, values)
        expected = reference.step(expected, numbers(gradient), step, **values)
        error = np.abs(numbers(shard.master().to(dtype)) - expected)
        errors.append(error.mean())
        relative_errors.append((error / (np.abs(expected) + 1e-9)).mean())
        for attribute, slot in states.items():
            mine = numbers(shard.state(slot)).reshape(expected.shape)
            far = int((~np.isclose(getattr(reference, attribute), mine, atol=3e-3, rtol=1e-3)).sum())
            assert far < 20, f"step {step}, {slot}: {far} far, seed {SEED}"
            setattr(reference, attribute, mine)
        expected = numbers(shard.master())
    print(f"{case}, {columns} columns, {dtype}: mean |dp| {np.mean(errors):.2e}, relative {np.mean(relative_errors):.2e}")
    assert np.mean(errors) < mean and np.mean(relative_errors) < relative, f"seed {SEED}"


DEEPSPEED = {
    "adamw": ("adamw", AdamW, ADAM_FORM | {"weight_decay": 0.01}),
    "adagrad": ("adagrad", Adagrad, {"lr": 1e-2, "lr_decay": 0.0, "weight_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-10}),
    "lion": ("lion", Lion, {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 22, 55, 127, 128, 1024, 1048576])
@pytest.mark.parametrize("case", DEEPSPEED)
def test_deepspeed_sizes(case, size, dtype):
    name, model, values = DEEPSPEED[case]
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(size, generator=generator).to(dtype).float()
    shard, reference, expected = kernels.Shard(name, start, state="fp32"), model(), numbers(start)
    for step in range(1, 11):
        gradient = torch.randn(size, generator=generator).to(dtype)
        shard.step(gradient, values)
        expected = reference.step(expected, numbers(gradient), step, **values)
    norm = np.linalg.norm(expected)
    assert np.linalg.norm(numbers(shard.master().to(dtype)) - expected) <= 0.01 * norm, f"seed {SEED}"
