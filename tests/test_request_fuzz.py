"""Generated requests of every RPC in every phase of a job: none ends a server, is answered Internal or Unknown, or changes another job.

A failure prints the seed and what was sent last. ORLOP_TEST_SEED=N repeats the requests, ORLOP_FUZZ_WALK=N begins at the job walk/N, and
ORLOP_FUZZ_REQUESTS=N is how many the long form sends. Calls are answered when they are, so a repeat may meet another order.
"""
import collections
import os
import types

import grpc
import numpy as np
import pytest

from clusters import wait_until
from plain_client import ADAMW, DEADLINE_SECONDS, Tensor, stubs
from request_fuzz import fields_of, methods
from request_walk import Door, Walk
from test_floods import BESIDE
from test_waiting_calls import FEW_THREADS, thread_count

MIB = 1 << 20
VICTIM = "victim"
VICTIM_TENSORS = (Tensor("layers.0.weight", (80, 64)), Tensor("layers.0.bias", (300,)), Tensor("head.weight", (48, 64)),
                  Tensor("mask.of.it", (10, 3), "I64", "BUFFER"))
CHECK_EVERY = 400  # requests


def victim_arrays(seed, with_buffer=False):
    generator = np.random.default_rng(seed)
    made = {tensor.name: generator.standard_normal(tensor.shape).astype("<f4") for tensor in VICTIM_TENSORS if tensor.kind == "PARAMETER"}
    if with_buffer:
        made["mask.of.it"] = np.arange(30, dtype="<i8").reshape(10, 3)
    return made


def train(cluster, steps, name=VICTIM):
    """Return a job that has loaded its weights and made steps 1 to `steps`, with an unusual generation."""
    job = cluster.job(name, VICTIM_TENSORS, shard_elements=1024)
    job.create(seed=11)
    job.configure(job.groups(state="8bit"), max_norm=1.0)
    for _ in range(4):
        job.join()
    job.load(victim_arrays(0, with_buffer=True))
    for step in range(1, steps + 1):
        job.step(victim_arrays(step), [ADAMW])
    return job


def made_by_a_clean_server(make_cluster, steps):
    """Return all bits after some steps, and after one more, of a server that was sent nothing else."""
    cluster = make_cluster(1)
    job = train(cluster, steps)
    before = job.snapshot()
    job.step(victim_arrays(steps + 1), [ADAMW])
    after = job.snapshot()
    cluster.stop()
    return before, after


def weights(job):
    return {name: array.tobytes() for name, array in job.pull_all().items()}


def uses(server):
    """Return {slot or job: reserved bytes} of a server."""
    channel = grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])
    status = stubs().admin_grpc.AdminStub(channel).ServerStatus(stubs().admin.ServerStatusRequest(), timeout=DEADLINE_SECONDS)
    channel.close()
    summed = collections.Counter()
    for use in status.uses:
        summed[use.job or use.slot] += use.reserved_bytes
    return summed


def lose_memory(cluster, jobs, walk, door):
    """Kill all servers and start them: jobs go back to their flush, with changed requests while that is offered."""
    for job in jobs:
        job.admin().FlushJob(stubs().admin.FlushJobRequest(job=job.name), timeout=DEADLINE_SECONDS)
    door.settle(cancel=True)
    for server in cluster.servers:
        server.kill()
    cluster.start()
    door.close()
    for job in (*jobs, walk.job):
        job.connections.reconnect()
    offered = stubs().job.JobStatusResponse.ROLLBACK_OFFERED
    wait_until(lambda: all(job.status().state == offered for job in jobs))
    for _ in range(5):
        walk.phase("rollback offered")
    door.settle(cancel=True)
    for job in jobs:
        if job.status().state == offered:  # else a changed request has accepted it
            job.roll_back(job.committed_step)
        wait_until(lambda: job.status().state == stubs().job.JobStatusResponse.READY)
        job.join()


def check_unharmed(cluster, door, job, held):
    door.check_alive()
    assert weights(job) == held, f"weights of '{job.name}' have changed\n{door.told()}"


def fuzz(make_cluster, seed, servers, count, memory="96MiB"):
    """Send `count` requests to a cluster with jobs that must stay as they are. Returns the Door, with what was counted."""
    steps = 2
    before, after = made_by_a_clean_server(make_cluster, steps)
    cluster = make_cluster(servers, memory=memory)
    victim, led = train(cluster, steps), train(cluster, steps, "led")
    assert victim.snapshot() == before, "training is not exact"
    held = weights(victim)
    budget = int(memory.removesuffix("MiB")) * MIB
    last = led.status().last_decision
    subject = types.SimpleNamespace(job=led, decision=last.decision, manifest_digest=led.create(seed=11).manifest_digest)
    kept, names = (VICTIM, "led"), [VICTIM, "led", *(tensor.name for tensor in VICTIM_TENSORS)]
    door, most, checked, lost = Door(cluster), [], 0, 0
    number = int(os.environ.get("ORLOP_FUZZ_WALK", 0))
    idle = [uses(server) for server in cluster.servers]
    while door.sent < count:
        walk = Walk(door, seed, number, kept, subject, names)
        walk.run()
        number += 1
        door.check_alive()
        if door.sent // CHECK_EVERY > checked:
            checked = door.sent // CHECK_EVERY
            check_unharmed(cluster, door, victim, held)
            most.append(max(server.memory_bytes() for server in cluster.servers))
            assert most[-1] <= budget + BESIDE, f"{most[-1] / MIB:.0f} MiB\n{door.told()}"
        if (lost + 0.5) * max(count / 4, 1500) < door.sent:
            lost += 1
            walk = Walk(door, seed, f"{number}-lost", kept, subject, names)
            walk.to_open_and_lost(lambda walk=walk: lose_memory(cluster, [victim, led], walk, door))
            check_unharmed(cluster, door, victim, held)
    door.settle(cancel=True)
    walk.delete()  # what requests after the job's end have made
    walk.job.connections.close()
    check_unharmed(cluster, door, victim, held)
    show(door, most, number, lost)
    assert not door.faults, "\n\n".join(door.faults.values())
    for server, before_it in zip(cluster.servers, idle):
        now = uses(server)
        assert set(now) <= set(before_it) | {"lists"}, (now, before_it)
        assert thread_count(server) < FEW_THREADS
    # The victim makes a step, and the job that peers led does so after its servers have started again.
    victim.join()
    victim.step(victim_arrays(steps + 1), [ADAMW])
    assert victim.snapshot() == after, door.told()
    wait_until(lambda: victim.status().applied_step == steps + 1)
    cluster.restart()
    for job in (victim, led):
        job.connections.reconnect()
        wait_until(lambda: job.status().state == stubs().job.JobStatusResponse.READY)
    assert victim.snapshot() == after
    led.join()
    assert led.snapshot() == before
    led.step(victim_arrays(steps + 1), [ADAMW])
    assert led.snapshot() == after
    return door


def show(door, most, walks, lost):
    """Print what was sent and answered."""
    every = sum(len(fields_of(method.request_type.DESCRIPTOR)) for method in methods().values())
    codes = collections.Counter()
    for (method, code, _), times in door.codes.items():
        if method != "honest":
            codes[code] += times
    print(f"\n{door.sent} requests in {walks} jobs, memory lost {lost} times, {door.codes['honest', 'step', '']} honest steps, "
          f"{len(door.changed)} of {every} fields changed, {len(door.met)} pairs of phase and RPC")
    print(", ".join(f"{code} {times}" for code, times in codes.most_common()))
    print("honest:", {key[1:]: times for key, times in door.codes.items() if key[0] == "honest"})
    print(f"memory in MiB: {[round(bytes_ / MIB) for bytes_ in most[:: max(1, len(most) // 12)]]}")


def missing(door, service_count):
    """Return fields of requests that were never changed."""
    return [(name, ".".join(path)) for name, method in methods().items() if service_count > 1 or method.service != "Peer"
            for path in fields_of(method.request_type.DESCRIPTOR) if not door.changed[name, path]]


@pytest.mark.parametrize("servers", [1, 2])
def test_no_changed_request_ends_a_server_or_changes_another_job(make_cluster, seed, servers):
    door = fuzz(make_cluster, seed, servers, 1000)
    assert door.codes["honest", "step", ""] > 0


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("servers, count", [(1, 30_000), (2, 70_000)])
def test_every_field_of_every_request_changed_in_every_phase(make_cluster, seed, servers, count):
    door = fuzz(make_cluster, seed, servers, int(os.environ.get("ORLOP_FUZZ_REQUESTS", count)))
    assert not missing(door, servers)
    methods_in = collections.Counter(phase for phase, _ in door.met)
    assert len(methods_in) >= 17 and min(methods_in.values()) >= 15, methods_in
