"""The door for peers: workers cannot use it, and no message that comes through it breaks a server or changes a job."""
import random
import subprocess

import grpc
import numpy as np
import pytest

from clusters import wait_until
from plain_client import DEADLINE_SECONDS, Tensor, manifest_digest, stubs
from test_bad_input import refused

TENSORS = [Tensor("a.weight", (256, 256)), Tensor("b.weight", (256, 256)), Tensor("mask", (7,), "I64", "BUFFER")]
EXTREMES = (0, -1, 1, 1 << 30, (1 << 31) - 1, -(1 << 31), (1 << 62) + 1, (1 << 63) - 1, -(1 << 63))


def gradients(step):
    return {tensor.name: np.full(tensor.shape, step + 1, "<f4") for tensor in TENSORS if tensor.kind == "PARAMETER"}


def start_job(cluster, name="j"):
    job = cluster.job(name, TENSORS, shard_elements=16384)
    job.create()
    job.configure()
    job.join()
    job.load({tensor.name: np.ones(tensor.shape, "<i8" if tensor.kind == "BUFFER" else "<f4") for tensor in TENSORS})
    return job


def make_step(job):
    group = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    return job.step(gradients(job.committed_step), [group])


def weights(job):
    return {tensor.name: job.pull(tensor.name).tobytes() for tensor in TENSORS}


def peer(cluster, to):
    return stubs().peer_grpc.PeerStub(grpc.insecure_channel(cluster.servers[to].peer_address))


def message(job, sender, **body):
    """A StepMessage of server `sender`."""
    return stubs().peer.StepMessage(job=job.name, **{"from": sender}, **body)


def epoch_of(job):
    return job.status().epoch


def bad_messages(job):
    """(name, receiver, StepMessage, what the answer says)"""
    pb, epoch, largest = stubs().peer, epoch_of(job), (1 << 63) - 1
    digest = job.create().manifest_digest
    open_attempt = {"epoch": epoch, "generation": job.generation, "step": job.committed_step + 1, "attempt": job.attempt}
    stage = {**open_attempt, "has_scale": True, "scale": 1}
    decision = pb.DecisionBody(generation=1, step=job.committed_step + 1, attempt=1, applied_count=[1], untouched=b"\0")
    whole = pb.DecisionBody(generation=1, step=job.committed_step + 1, attempt=1, applied_count=[1] * 3, untouched=b"\0" * 3)
    opened = {"epoch": epoch, "generation": job.generation, "committed_step": job.committed_step, "attempt": 9, "manifest_digest": digest}
    copies = [pb.CopiesBody(server=[0], incarnation=[1])] * 9
    lost = stubs().types.Digest(high=1, low=2)
    layout = pb.LayoutBody(ranks=[pb.ContributionsBody(tensors=[pb.ContributionBody(tensor=99)])])
    return [
        ("shard beyond all", 0, message(job, 1, stage_report=pb.StageReportBody(**stage, shards=[{"shard": 1 << 30}])), "1073741824"),
        ("shard below zero", 0, message(job, 1, stage_report=pb.StageReportBody(**stage, shards=[{"shard": -1}])), "shard -1"),
        ("shards that repeat", 0, message(job, 1, stage_report=pb.StageReportBody(**stage, shards=[{"shard": 1}] * 2)), "shard"),
        ("count beyond all", 0, message(job, 1, stage_report=pb.StageReportBody(
            **stage, shards=[{"shard": job_shard_of(job, 1), "loaded_applied_count": largest}])), "applied_count"),
        ("report of a shard beyond all", 0, message(job, 1, recover_report=pb.RecoverReportBody(
            epoch=epoch, incarnation=1, shards=[{"shard": 1 << 20}])), "shard 1048576"),
        ("epoch at the end", 1, message(job, 0, recover=pb.KeyBody(epoch=largest, decision=digest)), str(largest)),
        ("epoch far ahead", 1, message(job, 0, recover=pb.KeyBody(epoch=epoch + (1 << 33), decision=digest)), "epoch"),
        ("epoch below zero", 1, message(job, 0, recover=pb.KeyBody(epoch=-1, decision=digest)), "epoch -1"),
        ("registration at the end", 0, message(job, 1, register=pb.RegisterBody(incarnation=7, epoch=largest)), "epoch"),
        ("recover of no leader", 0, message(job, 1, recover=pb.KeyBody(epoch=epoch + 1, decision=digest)), "step leader"),
        ("report to no leader", 1, message(job, 0, stage_report=pb.StageReportBody(**stage)), "step leader"),
        ("sender is the receiver", 1, message(job, 1, register=pb.RegisterBody(epoch=epoch)), "sender"),
        ("sender of no cluster", 1, message(job, 1 << 31, register=pb.RegisterBody(epoch=epoch)), "2147483648"),
        ("no placement", 1, message(job, 0, open_job=pb.OpenJobBody(**opened)), "placement"),
        ("placement on a third server", 1, message(job, 0, open_job=pb.OpenJobBody(
            **opened, placement={"shards": [pb.CopiesBody(server=[9], incarnation=[1])] * 9})), "server 9"),
        ("placement of too few shards", 1, message(job, 0, open_job=pb.OpenJobBody(**opened, placement={"shards": copies[:2]})), "2"),
        ("layout of a tensor beyond all", 1, message(job, 0, open_job=pb.OpenJobBody(
            **opened, layout=layout, placement={"shards": placement_of(job)})), "tensor 99"),
        ("decision of too few tensors", 1, message(job, 0, prepare=pb.PrepareBody(epoch=epoch, decision=decision)), "applied_count"),
        ("decision of another identity", 1, message(job, 0, prepare=pb.PrepareBody(epoch=epoch, decision=whole)), "identity"),
        ("no decision", 1, message(job, 0, prepare=pb.PrepareBody(epoch=epoch)), "applied_count"),
        ("absent tensor beyond all", 1, message(job, 0, absent=pb.AbsentBody(**open_attempt, rank=0, tensors=[1 << 30])), "1073741824"),
        ("no absent tensor", 1, message(job, 0, absent=pb.AbsentBody(**open_attempt, rank=0)), "number of tensors 0"),
        ("step at the end", 1, message(job, 0, discard=pb.KeyBody(epoch=epoch, step=largest, attempt=1)), "step"),
        ("attempt below zero", 1, message(job, 0, discard=pb.KeyBody(epoch=epoch, step=1, attempt=-5)), "attempt -5"),
        ("no body", 1, message(job, 0), "body"),
        ("state that nobody has", 1, message(job, 0, restore=pb.KeyBody(epoch=epoch, step=0, decision=lost)), None),
    ]


def placement_of(job):
    """CopiesBody of every shard, as the job is placed."""
    servers = sorted(set(job.owners.values()) | {job.leader})
    return [stubs().peer.CopiesBody(server=[servers.index(job.owners[key])], incarnation=[1]) for key in sorted(job.owners)]


def job_shard_of(job, server):
    """The first shard, counted over all tensors, that lies on a server."""
    keys = sorted(job.owners)
    return next(number for number, key in enumerate(keys) if job.owners[key].endswith(f"/{server}.sock"))


def check_unharmed(cluster, job, held):
    """The job has the weights it had, steps, stops cleanly and comes back with the same bits."""
    assert weights(job) == held
    assert make_step(job).outcome
    after = weights(job)
    cluster.restart()
    job.connections.reconnect()
    assert weights(job) == after


def test_workers_cannot_reach_the_peer_service(make_cluster):
    cluster = make_cluster(2)
    for server in cluster.servers:
        at_workers_door = stubs().peer_grpc.PeerStub(grpc.insecure_channel(server.address))
        with pytest.raises(grpc.RpcError) as error:
            at_workers_door.Identify(stubs().peer.IdentifyRequest(), timeout=DEADLINE_SECONDS)
        assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
        at_peers_door = stubs().job_grpc.JobStub(grpc.insecure_channel(server.peer_address))
        with pytest.raises(grpc.RpcError) as error:
            at_peers_door.JobStatus(stubs().job.JobStatusRequest(job="j"), timeout=DEADLINE_SECONDS)
        assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_server_alone_has_no_door_for_peers(make_cluster):
    cluster = make_cluster(1)
    assert not list(cluster.directory.glob("*.peer"))
    with pytest.raises(grpc.RpcError) as error:
        stubs().peer_grpc.PeerStub(grpc.insecure_channel(cluster.address)).Identify(stubs().peer.IdentifyRequest(), timeout=5)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_messages_that_fit_no_job_are_refused(make_cluster):
    cluster = make_cluster(2)
    job = start_job(cluster)
    make_step(job)
    held = weights(job)
    for name, to, bad, says in bad_messages(job):
        if says is None:  # a message that fits, but asks for what is not there
            peer(cluster, to).Step(bad, timeout=DEADLINE_SECONDS)
        else:
            with refused("INVALID_ARGUMENT", "BAD_REQUEST", says):
                peer(cluster, to).Step(bad, timeout=DEADLINE_SECONDS)
        assert all(server.running() for server in cluster.servers), name
        assert weights(job) == held, name
    check_unharmed(cluster, job, held)


def test_definitions_that_fit_no_cluster_are_refused(make_cluster):
    cluster = make_cluster(2)
    job = start_job(cluster)
    held = weights(job)
    request = job.create_request()
    request.job, request.durability = "evil", 1
    good = stubs().peer.JobDefinition(server_count=2, revision=1, manifest=request)
    for index, shards in enumerate((4, 4, 1)):
        good.runs.add(tensor=index, first_shard=0, shard_count=shards, servers=[0])

    def bad(change):
        definition = stubs().peer.JobDefinition()
        definition.CopyFrom(good)
        change(definition)
        return definition

    def far(definition):
        definition.runs[0].first_shard, definition.runs[0].shard_count = (1 << 64) - 1, 2

    def incomplete(definition, field, value):
        """A leader completes a manifest before it sends it. The digest is that of the complete one."""
        setattr(definition.manifest, field, value)
        definition.manifest_digest.CopyFrom(manifest_digest(definition.manifest))

    definitions = {
        "servers": bad(lambda d: setattr(d, "server_count", 7)),
        "digest": good,
        "name": bad(lambda d: setattr(d.manifest, "job", "../evil")),
        "no name": bad(lambda d: setattr(d.manifest, "job", "")),
        "nothing": stubs().peer.JobDefinition(server_count=2),
        "shard_elements": bad(lambda d: setattr(d.manifest, "shard_elements", 3)),
        "far run": bad(far),
        "no shard size": bad(lambda d: incomplete(d, "shard_elements", 0)),
        "page": bad(lambda d: incomplete(d, "more", True)),
    }
    for name, definition in definitions.items():
        for to in (0, 1):
            with refused("INVALID_ARGUMENT", "BAD_REQUEST"):
                peer(cluster, to).PutJob(definition, timeout=DEADLINE_SECONDS)
            assert all(server.running() for server in cluster.servers), name
    assert [each.job for each in job.admin().ListJobs(stubs().admin.ListJobsRequest()).jobs] == ["j"]
    check_unharmed(cluster, job, held)


def test_definition_that_places_a_job_elsewhere_is_refused(make_cluster):
    """A server that took it, or kept it from a CreateJob that failed, would serve other shards than the leader expects."""
    cluster = make_cluster(2)
    job = start_job(cluster)
    held = weights(job)
    other = stubs().peer.JobDefinition(server_count=2, revision=1, manifest=job.create_request())
    other.manifest.durability = 1
    other.manifest_digest.CopyFrom(manifest_digest(other.manifest))
    for index, shards in enumerate((4, 4, 1)):
        other.runs.add(tensor=index, first_shard=0, shard_count=shards, servers=[1])
    for to in (0, 1):
        with refused("ALREADY_EXISTS", "CONFLICT", "delete it"):
            peer(cluster, to).PutJob(other, timeout=DEADLINE_SECONDS)
    check_unharmed(cluster, job, held)



def mutated(rng, template):
    """A copy of a message with some of its numbers and lists changed."""
    changed = type(template)()
    changed.CopyFrom(template)
    stack = [changed]
    while stack:
        at = stack.pop()
        for field, value in list(at.ListFields()):
            is_list = field.is_repeated
            if field.type == field.TYPE_MESSAGE:
                stack += list(value) if is_list else [value]
                if is_list and rng.random() < 0.2:
                    del value[rng.randrange(len(value)):]
            elif field.name in ("job", "from") or rng.random() > 0.3:
                continue
            elif field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64, field.CPPTYPE_UINT32, field.CPPTYPE_UINT64):
                bits = 32 if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 64
                is_signed = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
                number = rng.choice(EXTREMES) & ((1 << bits) - 1)
                number -= (1 << bits) if is_signed and number >> (bits - 1) else 0
                if is_list:
                    value[rng.randrange(len(value))] = number
                else:
                    setattr(at, field.name, number)
    return changed


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_no_mutated_message_ends_a_server_or_changes_what_is_committed(make_cluster, seed, count):
    """What a peer may say can stop a job until its servers start again, for peers lead it; its bytes and the servers stay."""
    rng = random.Random(seed)
    cluster = make_cluster(2)
    job = start_job(cluster)
    make_step(job)
    held = weights(job)
    templates = [(to, bad) for _, to, bad, _ in bad_messages(job)]
    peers, answers = [peer(cluster, to) for to in (0, 1)], {}
    for _ in range(count):
        to, template = rng.choice(templates)
        try:
            peers[to].Step(mutated(rng, template), timeout=DEADLINE_SECONDS)
            answer = grpc.StatusCode.OK
        except grpc.RpcError as error:
            answer = error.code()
        answers[answer] = answers.get(answer, 0) + 1
        is_of_another_manifest = template.WhichOneof("body") == "recover" and answer == grpc.StatusCode.FAILED_PRECONDITION
        assert answer in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT) or is_of_another_manifest, answer
    assert all(server.running() for server in cluster.servers)
    assert answers[grpc.StatusCode.INVALID_ARGUMENT] > count / 10
    cluster.restart()
    job.connections.reconnect()
    wait_until(lambda: job.status().state == stubs().job.JobStatusResponse.READY)
    assert weights(job) == held
    job.join(generation=0)
    assert make_step(job).outcome


def test_job_that_cannot_be_opened_is_quarantined_by_name(make_cluster, bin_dir):
    """A server whose --peers changed keeps what it cannot open, says why, and serves the rest."""
    cluster = make_cluster(1)
    job = start_job(cluster, "lone")
    held = weights(job)
    server = cluster.servers[0]
    server.stop()
    flags = list(server.flags)
    grown = flags.copy()
    grown[grown.index("--peers") + 1] += f",z=unix:{cluster.directory}/z.sock"
    server.flags = grown
    server.launch()
    job.connections.reconnect()
    wait_until(lambda: job.admin().ListJobs(stubs().admin.ListJobsRequest()).jobs)
    listed = job.admin().ListJobs(stubs().admin.ListJobsRequest()).jobs[0]
    assert (listed.job, listed.state) == ("lone", stubs().job.JobStatusResponse.QUARANTINED)
    assert "1 servers" in listed.explanation and "2" in listed.explanation
    assert job.status().state == stubs().job.JobStatusResponse.QUARANTINED
    with refused("FAILED_PRECONDITION", "QUARANTINED", "'lone'", "stay on disk"):
        job.create()
    shown = subprocess.run([bin_dir / "orlop", "--server", server.address, "jobs"], capture_output=True, text=True, timeout=60)
    assert "lone" in shown.stdout and "QUARANTINED" in shown.stdout, shown
    server.terminate()
    assert server.process.wait(60) == 0
    server.flags = flags
    server.start()
    job.connections.reconnect()
    assert weights(job) == held


@pytest.mark.parametrize("changed", [0, 1])
def test_server_that_a_peer_gave_another_manifest_is_named_and_holds_nobody_up(make_cluster, bin_dir, changed):
    """A peer may put another job under a name, on one server. Both say so, restarted servers are ready, and a deletion helps."""
    cluster = make_cluster(2)
    job, healthy = start_job(cluster), start_job(cluster, "healthy")
    held = weights(healthy)
    other = job.create_request(seed=3, durability=1)
    definition = stubs().peer.JobDefinition(server_count=2, revision=1, manifest=other, manifest_digest=manifest_digest(other))
    for index, tensor in enumerate(TENSORS):
        definition.runs.add(tensor=index, shard_count=-(-tensor.element_count // job.shard_elements), servers=[index % 2])
    peer(cluster, changed).DropJob(stubs().peer.DropJobRequest(job=job.name), timeout=DEADLINE_SECONDS)
    peer(cluster, changed).PutJob(definition, timeout=DEADLINE_SECONDS)
    cluster.restart()  # ends once every server is ready
    job.connections.reconnect()
    assert weights(healthy) == held
    wait_until(lambda: job.status().state == stubs().job.JobStatusResponse.QUARANTINED)
    name = cluster.names[1]  # the step leader is server 0, so the refusal is the other one's
    assert f"server {name} has a job 'j' with another manifest" in job.status().explanation
    shown = subprocess.run([bin_dir / "orlop", "--server", cluster.servers[0].address, "jobs"], capture_output=True, text=True,
                           timeout=60)
    assert "QUARANTINED" in shown.stdout and "another manifest" in shown.stdout, shown
    if changed == 1:
        with refused("FAILED_PRECONDITION", "QUARANTINED", "'j'", "another manifest", "create it anew"):
            job.create()
    job.delete()
    make_step(start_job(cluster))
    healthy.join(generation=0)
    assert make_step(healthy).outcome
