"""Models of ``fully_shard`` and ``parallelize_module``, on one and two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import orlop

HERE = Path(__file__).parent


def torchrun(servers, workers, *cases):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}",
               str(HERE / "dtensor_script.py"), servers.address, *cases]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("workers", [1, 2])
def test_models_of_dtensors_train_as_with_torch(servers, workers):
    out = torchrun(servers, workers, *(f"{case}:{case}-{workers}" for case in ("shard", "parallel", "differ", "refuse")))
    told = [line for line in out.splitlines() if "the ranks began with different weights" in line]
    assert len(told) == workers - 1 and all("first in 'norm.bias'" in line for line in told)


def test_a_job_goes_on_with_another_number_of_processes_and_with_a_plain_model(servers):
    torchrun(servers, 2, "resume-sharded:resumed")
    torchrun(servers, 1, "resume-plain:resumed", "resume-sharded:resumed")
    torchrun(servers, 2, "resume-plain:resumed", "resume-sharded:resumed", "compare:resumed")
    with orlop.connect(servers.address, job="resumed") as session:
        assert session.step == 15
