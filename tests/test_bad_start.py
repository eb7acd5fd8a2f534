"""Servers that must not start, or must not accept a job: directories, files, budgets, disks. The error names the cause; nothing is damaged.
"""
import shutil
import subprocess

import grpc
import numpy as np
import pytest

from clusters import fill, free_address
from plain_client import ADAMW, Tensor, detail_of, stubs
from test_bad_input import refused
from test_restart import random_arrays, recovered, start_job, step_all

ADDRESS = "127.0.0.1:0"


def refuses_to_start(bin_dir, *flags, fragments):
    """orlopd with these flags must end with an error that has every fragment, and never print a ready line."""
    ended = subprocess.run([bin_dir / "orlopd", *map(str, flags)], capture_output=True, text=True, timeout=60)
    assert ended.returncode > 0, f"ended with {ended.returncode}: {ended.stdout}{ended.stderr}"
    assert "ready " not in ended.stdout
    for fragment in fragments:
        assert str(fragment) in ended.stderr, f"'{fragment}' is not in: {ended.stderr}"


# Directories.

def test_data_directory_in_use_is_refused(make_cluster, bin_dir):
    cluster = make_cluster(1)
    job = start_job(cluster)
    before = job.snapshot()
    directory = cluster.servers[0].data_dir
    refuses_to_start(bin_dir, "--listen", ADDRESS, "--data-dir", directory, fragments=[directory, "in use"])
    assert job.snapshot() == before
    step_all(job, 1)


def test_data_directory_of_another_server_is_refused(make_cluster):
    cluster = make_cluster(2)
    job = start_job(cluster)
    before = job.snapshot()
    cluster.stop()
    first, second = cluster.servers
    first.data_dir, second.data_dir = second.data_dir, first.data_dir
    for server in cluster.servers:
        server.launch()
        assert server.process.wait(60) > 0
        assert str(server.data_dir) in server.log()
        assert cluster.names[0] in server.log() and cluster.names[1] in server.log()
    first.data_dir, second.data_dir = second.data_dir, first.data_dir
    cluster.start()
    recovered(job)
    job.join()
    assert job.snapshot() == before
    step_all(job, 1)


def test_data_directory_of_another_cluster_is_refused(make_cluster, bin_dir):
    cluster = make_cluster(1)
    job = start_job(cluster)
    before = job.snapshot()
    cluster.stop()
    directory = cluster.servers[0].data_dir
    flags = ["--listen", ADDRESS, "--data-dir", directory, "--name", "stranger", "--peers", f"stranger={free_address()}"]
    refuses_to_start(bin_dir, *flags, fragments=[directory, "stranger", cluster.names[0]])
    cluster.start()
    recovered(job)
    job.join()
    assert job.snapshot() == before
    step_all(job, 1)


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.symlink_to("/proc/version")],
                         ids=["file", "link to a file"])
def test_data_directory_that_is_no_directory_is_refused(bin_dir, tmp_path, make):
    make(tmp_path / "data")
    refuses_to_start(bin_dir, "--listen", ADDRESS, "--data-dir", tmp_path / "data", fragments=[tmp_path / "data"])


def test_damaged_flush_is_data_loss_and_never_served(make_cluster):
    """Every large file of a stopped server is damaged in the middle: the server does not start, or the job answers DataLoss."""
    cluster = make_cluster(1)
    job = start_job(cluster)
    step_all(job, 1)
    cluster.stop()
    server = cluster.servers[0]
    for path in server.data_dir.rglob("*"):
        if path.is_file() and path.stat().st_size > 50_000:
            damaged = bytearray(path.read_bytes())
            for position in range(len(damaged) // 4, len(damaged), len(damaged) // 8):
                damaged[position] ^= 0x40
            path.write_bytes(damaged)
    server.launch()
    try:
        server.wait_until_ready()
    except AssertionError:
        assert str(server.data_dir) in server.log()
        return
    with pytest.raises(grpc.RpcError) as caught:
        job.snapshot()
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS, caught.value


# Flags and files.

@pytest.mark.parametrize("text, fragments", [
    pytest.param('[server]\nlisten = "127.0.0.1:0"\n[storage]\ndata_dir = "da', (":4", "TOML"), id="torn"),
    pytest.param("", ("empty",), id="empty"),
    pytest.param("\0" * 512, (":1",), id="zeros"),
    pytest.param("[server]\nlissten = 'a'\n", (":2", "lissten", "listen"), id="unknown key"),
    pytest.param("[sever]\nlisten = 'a'\n", ("sever", "server"), id="unknown section"),
    pytest.param("[storage]\nmemory = 'much'\n", (":2", "memory", "much"), id="value"),
    pytest.param("[storage]\nmemory = '1MiB'\n", ("1048576", "64MiB"), id="too small"),
])
def test_torn_or_wrong_configuration_file_is_refused(bin_dir, tmp_path, text, fragments):
    path = tmp_path / "orlopd.toml"
    path.write_text(text)
    flags = ["--config", path, "--listen", ADDRESS, "--data-dir", tmp_path / "data"]
    refuses_to_start(bin_dir, *flags, fragments=fragments)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("flags, fragments", [
    (["--listen", "0.0.0.0:0"], ("0.0.0.0", "--tls-cert")), (["--listen", "nonsense"], ("nonsense", "HOST:PORT")),
    (["--listen", "127.0.0.1:70000"], ("70000", "65535")), (["--listen", ADDRESS, "--tls-cert", "a"], ("--tls-key",)),
    (["--listen", ADDRESS, "--memory", "4XB"], ("--memory", "4XB")),
    (["--listen", ADDRESS, "--peers", "a=127.0.0.1:1,a=127.0.0.1:2"], ("'a'", "twice"))],
    ids=["plaintext off loopback", "address", "port", "half of TLS", "memory", "peers"])
def test_wrong_flags_are_refused(bin_dir, tmp_path, flags, fragments):
    refuses_to_start(bin_dir, *flags, "--data-dir", tmp_path / "data", fragments=fragments)


def test_address_in_use_is_refused(make_cluster, bin_dir, tmp_path):
    address = make_cluster(1, tcp=True).address
    refuses_to_start(bin_dir, "--listen", address, "--data-dir", tmp_path / "data", fragments=[address])


# Budgets and disks.

@pytest.mark.parametrize("servers, whole", [(1, False), (2, True)])
def test_budget_smaller_than_the_largest_shard_is_refused(make_cluster, servers, whole):
    cluster = make_cluster(servers, memory="64MiB")
    job = cluster.job("large", [Tensor("embedding", (1 << 13, 1 << 13), "BF16", whole=whole)], shard_elements=1 << 26)
    with refused("RESOURCE_EXHAUSTED", "BUDGET", "large", 64 << 20) as caught:
        job.create()
        job.configure(job.groups(state="8bit"))
        job.join()
    assert int(detail_of(caught.value).limit) > 64 << 20, "the smallest budget that would do"
    small = start_job(cluster, "small")
    step_all(small, 1)


LARGE = [Tensor(f"layers.{i}.weight", (1024, 1024), "BF16") for i in range(28)]  # 28 M parameters: 169 MiB at rest
SMALL_BUDGET = "120MiB"


def large_arrays(seed):
    generator = np.random.default_rng(seed)
    return {tensor.name: (generator.integers(0x3C00, 0x3E00, tensor.shape) | (generator.integers(2, size=tensor.shape) << 15)
                          ).astype("<u2") for tensor in LARGE}


def large_job(cluster):
    job = cluster.job("large", LARGE, shard_elements=1 << 20)
    job.create()
    job.configure(job.groups(state="8bit"))
    job.join()
    return job


def test_cold_slots_spill_over_a_small_budget_and_come_back(make_cluster):
    small, roomy = make_cluster(1, memory=SMALL_BUDGET), make_cluster(1)
    jobs = [large_job(small), large_job(roomy)]
    for job in jobs:
        job.load(large_arrays(0))
        for seed in (1, 2):
            job.step(large_arrays(seed), [ADAMW])
    spilled, kept = (job.snapshot() for job in jobs)
    assert spilled == kept
    status = jobs[0].admin().ServerStatus(stubs().admin.ServerStatusRequest(), timeout=60)
    assert sum(use.peak_bytes for use in status.uses if use.tier == "NVME") > 0, "this budget cannot hold all in memory"
    assert status.memory_peak_bytes <= 120 << 20


def test_full_disk_refuses_and_leaves_the_attempt_open(make_cluster, small_disk):
    """Budget and disk are full: ResourceExhausted. When there is room again, the same attempt continues."""
    cluster = make_cluster(1, memory=SMALL_BUDGET, start=False)
    server = cluster.servers[0]
    server.data_dir = small_disk("1G")
    cluster.start()
    job, twin = large_job(cluster), large_job(make_cluster(1))
    for each in (job, twin):
        each.load(large_arrays(0))
    fill(server.data_dir)
    attempt = job.attempt
    with pytest.raises(grpc.RpcError) as caught:
        job.step(large_arrays(1), [ADAMW])
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, caught.value
    assert detail_of(caught.value).reason == stubs().types.ErrorDetail.BUDGET
    assert server.running()
    assert (job.status().committed_step, job.status().attempt) == (0, attempt)
    (server.data_dir / "filler").unlink()
    for each in (job, twin):
        each.step(large_arrays(1), [ADAMW])
    assert job.snapshot() == twin.snapshot()


def test_full_disk_at_a_stop_is_reported_and_keeps_the_last_flush(make_cluster, small_disk):
    cluster = make_cluster(1, start=False)
    server = cluster.servers[0]
    server.data_dir = small_disk("64M")
    cluster.start()
    job = start_job(cluster)
    step_all(job, 1)
    cluster.restart()
    recovered(job)
    job.join()
    at_flush = job.snapshot()
    step_all(job, 2)
    fill(server.data_dir)
    server.terminate()
    assert server.process.wait(60) > 0, "a stop that could not flush must not look clean"
    assert "space" in server.log().lower()
    (server.data_dir / "filler").unlink()
    server.start()
    status = recovered(job)
    assert stubs().job.JobStatusResponse.State.Name(status.state) == "ROLLBACK_OFFERED" and status.rollback_step == 1
    job.roll_back(1)
    recovered(job)
    job.join()
    assert job.snapshot() == at_flush


def test_data_directory_that_disappears_at_a_stop_is_reported(make_cluster):
    cluster = make_cluster(1)
    server = cluster.servers[0]
    job = start_job(cluster)
    job.push(random_arrays(1))
    shutil.rmtree(server.data_dir)
    server.terminate()
    assert server.process.wait(60) > 0
    assert str(server.data_dir) in server.log()
