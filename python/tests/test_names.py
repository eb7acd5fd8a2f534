import pytest
import torch

from orlop import names


# A model with one parameter under two names, the persistent buffers of BatchNorm, and a buffer that state_dict() leaves out.
class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def test_parameters_come_first_then_persistent_buffers():
    entries = names.of_model(Tied())
    assert [e.name for e in entries] == ["embed.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
                                         "norm.num_batches_tracked"]
    assert [e.is_buffer for e in entries] == [False] * 3 + [True] * 3


def test_tied_parameters_are_one_tensor_and_embeddings_are_known():
    entry = names.of_model(Tied())[0]
    assert entry.tied_names == ["head.weight"]
    assert entry.is_embedding


def test_wrapper_prefixes_are_stripped_and_a_layer_called_module_is_not():
    # torch.compile wraps a model and prefixes its names with "_orig_mod.".
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    compiled = torch.compile(model)
    assert [e.name for e in names.of_model(compiled)] == ["0.weight", "0.bias"]
    assert names.clean("module._orig_mod.a._checkpoint_wrapped_module.w") == "a.w"
    # DDP prefixes "module." at the front, so the same word further back is a layer.
    assert names.clean("encoder.module.w") == "encoder.module.w"


def test_names_that_collide_once_stripped_are_refused():
    # Two parameters whose names are equal without the prefix of DDP.
    group = {"param_names": ["module.w", "w"], "params": [torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))]}
    with pytest.raises(ValueError, match="'w'"):
        names.of_groups([group])


def test_a_dtype_that_servers_do_not_hold_is_refused_by_name():
    with pytest.raises(ValueError, match="'weight' is torch.float64"):
        names.of_model(torch.nn.Linear(2, 2, dtype=torch.float64))


def test_specs_tell_shape_dtype_and_kind():
    spec = names.of_model(torch.nn.Linear(3, 2, dtype=torch.bfloat16))[0].spec()
    assert spec == {"name": "weight", "kind": "TENSOR_KIND_PARAMETER", "shape": [2, 3], "dtype": "DTYPE_BF16", "tied_names": [],
                    "whole": False, "may_be_unset": False, "value_digest": ""}
