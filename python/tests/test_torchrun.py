"""Two workers under torchrun: as one worker with the whole batch, and as if nobody had been killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import orlop

HERE = Path(__file__).parent


def torchrun(servers, job, out, *options, workers=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}",
               str(HERE / "torchrun_script.py"), servers.address, job, str(out), *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "--kill-at" in options:
        assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr
        return None
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.fixture(scope="module")
def alone(servers, tmp_path_factory):
    """One worker with the whole batch."""
    return torchrun(servers, "alone", tmp_path_factory.mktemp("alone") / "w.pt", workers=1)


@pytest.mark.parametrize("options", [(), ("--ddp",), ("--overlap",), ("--overlap", "--second-thoughts")],
                         ids=["averaged here", "ddp", "averaged by servers", "taken back by one"])
def test_two_workers_are_one_with_the_whole_batch(servers, tmp_path, alone, options):
    weights = torchrun(servers, "two" + "".join(options), tmp_path / "w.pt", *options)
    for name, value in weights.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


def test_frozen_parameters_stay_with_their_workers_unless_the_ranks_differ(servers, tmp_path):
    expected = torchrun(servers, "freeze-alone", tmp_path / "a.pt", "--freeze", workers=1)
    for name, value in torchrun(servers, "freeze-two", tmp_path / "b.pt", "--freeze").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


def test_parameters_that_move_between_groups_move_on_all_ranks(servers, tmp_path):
    """While they have moved on one rank only, the step is refused on all."""
    expected = torchrun(servers, "move-alone", tmp_path / "a.pt", "--move", workers=1)
    for name, value in torchrun(servers, "move-two", tmp_path / "b.pt", "--move").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


def test_replicas_that_step_themselves_are_stored(servers, tmp_path):
    """Three, whose average is not always exact. Each compares after every step."""
    replicas = torchrun(servers, "stored", tmp_path / "w.pt", "--store", "--ddp", workers=3)
    with orlop.connect(servers.address, job="stored") as session:
        assert session.step == 6
        for name, value in replicas.items():
            assert torch.equal(session.get(name), value), name


@pytest.mark.parametrize("fault", ["push", "commit", "answer", "pull", "edit"])
def test_a_step_that_fails_on_one_rank_raises_on_all_and_can_be_repeated(servers, tmp_path, fault):
    undisturbed = torchrun(servers, "calm-" + fault, tmp_path / "a.pt")
    repeated = torchrun(servers, "fault-" + fault, tmp_path / "b.pt", "--fault", fault)
    assert all(torch.equal(undisturbed[name], repeated[name]) for name in undisturbed)


def test_an_abort_that_fails_on_one_rank_raises_on_all_and_the_step_can_be_repeated(servers, tmp_path):
    undisturbed = torchrun(servers, "calm-overlap", tmp_path / "a.pt", "--overlap")
    repeated = torchrun(servers, "fault-overlap", tmp_path / "b.pt", "--overlap", "--fault", "abort")
    assert all(torch.equal(undisturbed[name], repeated[name]) for name in undisturbed)


@pytest.mark.parametrize("calm, disturbances", [((), [("--fault", "answer")]),
                                                (("--overlap",), [("--fault", "abort"), ("--second-thoughts",)])],
                         ids=["averaged here", "averaged by servers"])
def test_what_is_sent_again_as_int8_has_the_same_residuals(servers, tmp_path, calm, disturbances):
    options = ("--wire", "int8", *calm)
    undisturbed = torchrun(servers, "calm" + "".join(options), tmp_path / "a.pt", *options)
    for disturbance in disturbances:
        repeated = torchrun(servers, "again" + "".join(options + disturbance), tmp_path / "b.pt", *options, *disturbance)
        assert all(torch.equal(undisturbed[name], repeated[name]) for name in undisturbed)


def test_a_checkpoint_of_an_earlier_step_is_loaded_on_all_ranks(servers, tmp_path):
    undisturbed = torchrun(servers, "straight", tmp_path / "a.pt", "--ddp")
    rewound = torchrun(servers, "rewound", tmp_path / "b.pt", "--ddp", "--rewind")
    assert all(torch.equal(undisturbed[name], rewound[name]) for name in undisturbed)


def test_killing_a_worker_in_mid_push_changes_no_bit(servers, tmp_path):
    undisturbed = torchrun(servers, "undisturbed", tmp_path / "a.pt")
    torchrun(servers, "disturbed", tmp_path / "b.pt", "--kill-at", "3")
    with orlop.connect(servers.address, job="disturbed") as session:
        assert session.step == 3
    disturbed = torchrun(servers, "disturbed", tmp_path / "b.pt")  # rejoins and goes on
    assert all(torch.equal(undisturbed[name], disturbed[name]) for name in undisturbed)
