"""Rounding "nearest" against recorded vectors of bitsandbytes' CUDA rule (bnb_cuda_rule.py), bit for bit."""

import numpy as np
import pytest
import torch

import bnb_cuda_rule as rule
from orlop import kernels


def same_bits(actual, expected):
    return actual.dtype == expected.dtype and actual.tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def recorded():
    with np.load(rule.RECORDED) as file:
        return dict(file)


def test_the_script_gives_the_recorded_vectors(recorded):
    made = rule.record()
    assert made.keys() == recorded.keys()
    for name, values in made.items():
        assert same_bits(values, recorded[name]), name


def test_the_vectors_hold_what_the_rule_decides(recorded):
    """Ties to even from both sides, tiny negatives at 126, tiny positives and zeros at 127, second moments lost to 0, a block of zeros."""
    m, gradient = recorded["ties.m.codes"][0], recorded["ties.gradients"][0]
    tied = gradient.astype(np.float64)
    middles = (rule.SIGNED[1:].astype(np.float64) + rule.SIGNED[:-1]) / 2
    places = np.isin(tied, middles) & (np.abs(tied) > 1e-6)
    assert places.sum() >= 20 and (m[places] % 2 == 0).all()
    below = tied[places] > rule.SIGNED[m[places]]
    assert below.any() and (~below).any()
    middles = (rule.UNSIGNED[1:].astype(np.float64) + rule.UNSIGNED[:-1]) / 2
    squares = (gradient * gradient).astype(np.float64)
    places = np.isin(squares, middles)
    assert places.sum() >= 20 and (recorded["ties.v.codes"][0][places] % 2 == 0).all()
    codes = recorded["wide.m.codes"]
    assert (codes == 126).any() and (codes == 127).any()
    assert ((recorded["wide.v.codes"] == 0) & (recorded["wide.gradients"] != 0)).any()
    assert (recorded["wide.m.absmax"][:, 2] == 0).all()


@pytest.mark.parametrize("target", kernels.targets())
@pytest.mark.parametrize("name", rule.HYPER_PARAMETERS)
def test_nearest_8_bit_equals_the_recorded_rule_bit_for_bit(recorded, name, target):
    values = dict(zip(("lr", "beta1", "beta2", "eps", "weight_decay"), rule.HYPER_PARAMETERS[name]))
    shard = kernels.Shard("adamw_bnb", torch.from_numpy(recorded[f"{name}.start"]), state="8bit", rounding="nearest")
    kernels.use_target(target)
    try:
        for t, gradient in enumerate(recorded[f"{name}.gradients"]):
            shard.step(torch.from_numpy(gradient), values)
            weights = recorded[f"{name}.weights"][t]
            actual = {"weights": shard.master(), "m.codes": shard.codes["exp_avg"], "m.absmax": shard.absmax["exp_avg"],
                      "v.codes": shard.codes["exp_avg_sq"], "v.absmax": shard.absmax["exp_avg_sq"]}
            for what, tensor in actual.items():
                expected = recorded[f"{name}.{what}"][t]
                other = np.flatnonzero(tensor.numpy() != expected)
                assert same_bits(tensor.numpy(), expected), f"step {t + 1}, {what}: {other.size} differ, the first at {other[:1]}"
            bf16 = ((weights.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
            assert same_bits(shard.weight.view(torch.int16).numpy().view(np.uint16), bf16), f"step {t + 1}, bf16 weights"
    finally:
        kernels.use_target()
