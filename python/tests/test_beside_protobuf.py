"""Another protobuf in the same process: grpc_tools' compiler exports its own."""

import os
import subprocess
import sys

import pytest

import orlop

ORDERS = {"compiler first": "import grpc_tools._protoc_compiler; load()", "extension first": "load(); import grpc_tools._protoc_compiler"}


@pytest.mark.parametrize("order", ORDERS)
def test_no_protobuf_is_bound_to_the_others_statics(tmp_path, order):
    """What the dynamic linker binds, as it tells: merged statics of two versions are damaged memory, which need not crash at once."""
    script = ("import importlib.util, sys\n"
              "def load():\n"
              "    spec = importlib.util.spec_from_file_location('_core', sys.argv[1])\n"
              "    spec.loader.exec_module(importlib.util.module_from_spec(spec))\n" + ORDERS[order])
    environment = os.environ | {"LD_DEBUG": "bindings", "LD_DEBUG_OUTPUT": str(tmp_path / "bindings")}
    subprocess.run([sys.executable, "-c", script, orlop._core.__file__], env=environment, check=True)
    bindings = [line for log in tmp_path.iterdir() for line in log.read_text(errors="replace").splitlines() if "google8protobuf" in line]
    assert any("_core" in line for line in bindings) and any("_protoc_compiler" in line for line in bindings)
    assert [line for line in bindings if "_protoc_compiler" in line and ("/libprotobuf" in line or "_core" in line)] == []
