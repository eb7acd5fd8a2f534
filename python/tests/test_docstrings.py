"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["orlop", "orlop.optim.amp", "orlop.errors", "orlop.names", "orlop.kernels", "orlop.optim.adam", "orlop.session",
                                  "orlop.job.workers"])
def test_examples_in_docstrings_run_as_printed(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0
