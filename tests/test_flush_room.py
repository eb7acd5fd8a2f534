"""Room on disk for flushes: it is reserved when a job is configured, shown, refused by name, and enough for any number of clean stops."""
import numpy as np
import pytest

from clusters import fill, wait_until
from plain_client import ADAMW, Tensor, detail_of, stubs
from test_bad_input import refused
from test_flush import flush, step_all_to_the_end
from test_restart import recovered, rejoin_at, start_job, state_of, step_all

MIB = 1 << 20
# 4 M parameters: 25 MB of state with 8-bit optimizer states, and as much for a flush.
LARGE = [Tensor(f"layers.{i}.weight", (1024, 1024), "BF16") for i in range(4)]


def large_arrays(seed):
    generator = np.random.default_rng(seed)
    return {tensor.name: (generator.integers(0x3C00, 0x3E00, tensor.shape) | (generator.integers(2, size=tensor.shape) << 15)
                          ).astype("<u2") for tensor in LARGE}


def start_large_job(cluster, name):
    job = cluster.job(name, LARGE, shard_elements=1 << 20)
    job.create()
    job.configure(job.groups(state="8bit"))
    job.join()
    job.load(large_arrays(0))
    return job


def cluster_on(make_cluster, disks):
    """Start one server on each of these file systems."""
    cluster = make_cluster(len(disks), start=False)
    for server, disk in zip(cluster.servers, disks):
        server.data_dir = disk / "data"
    return cluster.start()


def room_of(job):
    """Return what ServerStatus shows of the job's flushes; None: nothing."""
    status = job.admin().ServerStatus(stubs().admin.ServerStatusRequest(), timeout=60)
    return next((use for use in status.uses if (use.tier, use.job, use.slot) == ("NVME", job.name, "flush")), None)


def expected_snapshots(cluster, steps):
    job = start_large_job(cluster, "undisturbed")
    made = [job.snapshot()]
    for seed in range(1, steps + 1):
        job.step(large_arrays(seed), [ADAMW])
        made.append(job.snapshot())
    return made


@pytest.mark.parametrize("jobs, size", [(1, "78M"), (2, "132M")], ids=["one job", "two jobs"])
def test_any_number_of_clean_stops_succeeds_where_two_flushes_find_room(make_cluster, small_disk, jobs, size):
    """Before the third stop the disk holds two flushes and has no room for one more. The older one is erased first."""
    stops = 4
    expected = expected_snapshots(make_cluster(1), stops)
    cluster = cluster_on(make_cluster, [small_disk(size)])
    started = [start_large_job(cluster, f"large-{number}") for number in range(jobs)]
    for step in range(1, stops + 1):
        for job in started:
            job.step(large_arrays(step), [ADAMW])
            wait_until(lambda job=job: job.status().applied_step == step)
        cluster.restart()
        for job in started:
            assert recovered(job).committed_step == step and state_of(job) == "READY"
            assert job.snapshot() == expected[step]
            rejoin_at(job, step)
    cluster.servers[0].kill()
    cluster.start()
    for job in started:
        assert recovered(job).rollback_step == stops, "the newest flush is whole"
        job.roll_back(stops)
        rejoin_at(job, stops)
        assert job.snapshot() == expected[stops]


def test_flushes_of_a_running_job_go_on_where_two_find_room(make_cluster, small_disk):
    cluster = cluster_on(make_cluster, [small_disk("78M"), small_disk("78M")])
    job = start_large_job(cluster, "large")
    for step in range(1, 6):
        job.step(large_arrays(step), [ADAMW])
        assert flush(job).step == step
    made = job.snapshot()
    for server in cluster.servers:
        server.kill()
    cluster.start()
    assert recovered(job).rollback_step == 5
    job.roll_back(5)
    rejoin_at(job, 5)
    assert job.snapshot() == made


def test_job_without_room_for_its_flushes_is_refused_naming_the_bytes(make_cluster, small_disk):
    cluster = cluster_on(make_cluster, [small_disk("100M")])
    first = start_large_job(cluster, "large-1")
    use = room_of(first)
    assert 50 * MIB > use.reserved_bytes > 2 * 6 * len(LARGE) * MIB and use.bytes == 0 and use.missing_bytes == 0
    second = cluster.job("large-2", LARGE, shard_elements=1 << 20)
    second.create()
    with refused("RESOURCE_EXHAUSTED", "BUDGET", "large-2", use.reserved_bytes, "larger disk") as caught:
        second.configure(second.groups(state="8bit"))
    detail = detail_of(caught.value)
    assert int(detail.actual) == use.reserved_bytes > int(detail.limit) > 0
    assert detail.limit in caught.value.details()
    assert second.status().state != stubs().job.JobStatusResponse.LOST
    small = start_job(cluster, "small")
    step_all(small, 1)
    assert first.delete().existed
    wait_until(lambda: room_of(first) is None)
    second.configure(second.groups(state="8bit"))
    assert room_of(second).reserved_bytes == use.reserved_bytes


def fill_up_to(directory, left_bytes):
    fill(directory)
    with open(directory / "filler", "r+b") as filler:
        filler.truncate((directory / "filler").stat().st_size - left_bytes)


def test_full_disk_fails_a_flush_by_name_and_the_job_goes_on(make_cluster, small_disk):
    cluster = cluster_on(make_cluster, [small_disk("96M")])
    disk = cluster.servers[0].data_dir
    job = start_large_job(cluster, "large")
    job.step(large_arrays(1), [ADAMW])
    assert flush(job).step == 1
    assert 2 * room_of(job).bytes == room_of(job).reserved_bytes
    fill_up_to(disk, 2 * MIB)
    job.step(large_arrays(2), [ADAMW])
    with refused("RESOURCE_EXHAUSTED", "BUDGET", "large", "no space left", "larger disk"):
        flush(job)
    job.step(large_arrays(3), [ADAMW])
    (disk / "filler").unlink()
    assert flush(job).step == 3
    fill_up_to(disk, 2 * MIB)
    job.step(large_arrays(4), [ADAMW])
    assert flush(job).step == 4, "the flush of step 1 makes room"
    made = job.snapshot()
    (disk / "filler").unlink()
    cluster.servers[0].kill()
    cluster.start()
    assert recovered(job).rollback_step == 4
    job.roll_back(4)
    rejoin_at(job, 4)
    assert job.snapshot() == made


def test_start_on_a_disk_that_has_become_too_small_says_so(make_cluster, small_disk):
    cluster = cluster_on(make_cluster, [small_disk("96M")])
    server = cluster.servers[0]
    job = start_job(cluster)
    step_all_to_the_end(job, 1)
    made = job.snapshot()
    assert room_of(job).missing_bytes == 0
    cluster.stop()
    fill_up_to(server.data_dir, 12 * MIB)
    cluster.start()
    assert recovered(job).committed_step == 1 and state_of(job) == "READY"
    assert job.snapshot() == made
    assert room_of(job).missing_bytes > 0
    assert "a flush may find no room" in server.log()
    (server.data_dir / "filler").unlink()
    cluster.restart()
    assert recovered(job).committed_step == 1
    assert room_of(job).missing_bytes == 0
