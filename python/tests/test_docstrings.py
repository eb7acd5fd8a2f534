"""The examples in the docstrings of MODULES run and print what they show."""

import doctest
import importlib

import pytest

# The modules that have examples, but for orlop.state.quantised, whose example test_foreign_states.py runs. An example of a module that is
# missing here does not run.
MODULES = ("orlop", "orlop.errors", "orlop.kernels", "orlop.names", "orlop.job.workers", "orlop.optim.adam",
           "orlop.optim.adaptive", "orlop.optim.amp", "orlop.optim.groups", "orlop.optim.momentum", "orlop.optim.store",
           "orlop.optim.together", "orlop.optim.whole", "orlop.session")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run_as_printed(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0
