"""Who may call which RPC: every role and every RPC over mutual TLS, against a table written by hand."""
import json
import time

import grpc
import numpy as np
import pytest

from clusters import wait_until
from plain_client import ADAMW, DEADLINE_SECONDS, Tensor, stubs
from test_bad_input import detail_of
from test_tls import Authority, credentials

ROLES = ("worker", "reader", "saver", "operator", "auditor", "peer")
LOOK = {"worker", "reader", "saver", "operator", "auditor"}
WORK = {"worker", "operator"}
# Roles that may call each RPC at the workers' door. A peer's certificate means nothing there, and the service Peer does not exist.
MAY_CALL = {
    "Job/CreateJob": WORK, "Job/GetManifest": LOOK, "Job/GetPlacement": LOOK, "Job/ConfigureOptimizer": WORK, "Job/Join": WORK,
    "Job/CommitStep": WORK, "Job/AbortStep": WORK, "Job/Hold": {"saver", "operator"}, "Job/JobStatus": LOOK, "Job/DeleteJob": {"operator"},
    "Data/Push": WORK, "Data/SetState": WORK, "Data/QueryPush": WORK, "Data/Pull": {"worker", "reader", "saver", "operator"},
    "Admin/ListServers": LOOK, "Admin/ListJobs": LOOK, "Admin/ListTensors": LOOK, "Admin/DescribeTensor": LOOK,
    "Admin/ServerStatus": {"operator", "auditor"}, "Admin/AcceptRollback": {"operator"}, "Admin/FlushJob": WORK,
    "Peer/PutJob": set(), "Peer/DropJob": set(), "Peer/Step": set(), "Peer/Identify": set(), "Peer/DescribeShards": set(),
}
JOBS = ("team-a/one", "team-a/two", "team-b/one")
TENSORS = (Tensor("w", (4,)),)


class Door:
    """A server with TLS, three jobs, and a certificate for each of two teams in each role."""

    def __init__(self, make_cluster, directory):
        self.authority = Authority(directory, "cluster")
        certificate, key = self.authority.issue("server")
        self.file = directory / "roles.toml"
        self.grant()
        self.cluster = make_cluster(1, tcp=True, flags=("--tls-cert", certificate, "--tls-key", key, "--tls-ca",
                                                        self.authority.certificate, "--roles", self.file))
        self.known = {}
        for name in JOBS:
            job = self.cluster.job(name, TENSORS, credentials=self.credentials("root"))
            job.create()
            job.configure()
            job.join()
            job.load({"w": np.ones(4, "f4")})

    def grant(self, revoked=()):
        names = {"root": (["operator"], ["*"])}
        names |= {f"{team}-{role}": ([role], [f"team-{team}/*"]) for team in "ab" for role in ROLES}
        text = "".join(f'[[grant]]\nname = "{name}"\nroles = {json.dumps(roles)}\njobs = {json.dumps(jobs)}\n'
                       for name, (roles, jobs) in names.items())
        self.file.write_text(text + "".join(f'[[revoked]]\nname = "{name}"\n' for name in revoked))

    def credentials(self, name):
        return credentials(self.authority, self.authority.issue(name))

    def channel(self, name):
        if name not in self.known:
            self.known[name] = grpc.secure_channel(self.cluster.address, self.credentials(name))
        return self.known[name]


@pytest.fixture(scope="module")
def door(make_module_cluster, tmp_path_factory):
    return Door(make_module_cluster, tmp_path_factory.mktemp("roles"))


def request_of(method, job):
    """The type of an RPC's request with nothing but the job, which is no valid request of most."""
    service, name = method.split("/")
    modules = {"Job": stubs().job, "Data": stubs().data, "Admin": stubs().admin, "Peer": stubs().peer}
    described = modules[service].DESCRIPTOR.services_by_name[service].methods_by_name[name].input_type
    if described.name == "Chunk":
        return stubs().types.Chunk(key=stubs().types.StreamKey(job=job))
    if described.name == "QueryPushRequest":
        return stubs().data.QueryPushRequest(key=stubs().types.StreamKey(job=job))
    message = next(getattr(module, described.name) for module in (*modules.values(), stubs().types) if hasattr(module, described.name))
    return message(job=job) if "job" in described.fields_by_name else message()


def outcome(channel, method, job):
    """Code and reason of a call; OK if it was answered."""
    def ask(kind):
        return getattr(channel, kind)(f"/orlop.v1.{method}", request_serializer=lambda sent: sent.SerializeToString(),
                                      response_deserializer=bytes)
    request = request_of(method, job)
    try:
        if method in ("Data/Push", "Data/SetState"):
            ask("stream_unary")(iter([request]), timeout=DEADLINE_SECONDS)
        elif method == "Data/Pull":
            list(ask("unary_stream")(request, timeout=DEADLINE_SECONDS))
        else:
            ask("unary_unary")(request, timeout=DEADLINE_SECONDS)
    except grpc.RpcError as error:
        return error.code().name, stubs().types.ErrorDetail.Reason.Name(detail_of(error).reason)
    return "OK", ""


def test_table_has_every_rpc():
    described = {"Job": stubs().job, "Data": stubs().data, "Admin": stubs().admin, "Peer": stubs().peer}
    assert set(MAY_CALL) == {f"{name}/{method.name}" for name, module in described.items()
                             for method in module.DESCRIPTOR.services_by_name[name].methods}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("team", "ab")
def test_each_role_may_call_what_the_table_says_for_its_jobs_alone(door, team, role):
    channel = door.channel(f"{team}-{role}")
    for method, allowed in MAY_CALL.items():
        for job in JOBS:
            code, reason = outcome(channel, method, job)
            if not allowed:
                assert code == "UNIMPLEMENTED", (method, job, code)
                continue
            names_job = request_of(method, job).SerializeToString() != b""
            may = role in allowed and (job.startswith(f"team-{team}/") or not names_job)
            assert (code == "PERMISSION_DENIED") != may, (method, job, code, reason)
            assert code not in ("UNIMPLEMENTED", "INTERNAL", "UNKNOWN"), (method, job, code)
            if not may:
                assert reason == "DENIED"


def test_rank_commit_and_abort_are_of_the_caller_who_joined(door):
    """Two workers of one team: what the first has joined, the second can neither commit, abort nor take."""
    door.file.write_text(door.file.read_text() + '[[grant]]\nname = "a-second"\nroles = ["worker"]\njobs = ["team-a/*"]\n')
    wait_until(lambda: outcome(door.channel("a-second"), "Job/JobStatus", JOBS[0])[0] == "OK")
    job = door.cluster.job("team-a/ranks", TENSORS, credentials=door.credentials("a-worker"))
    job.create()
    job.configure()
    job.join()
    job.load({"w": np.ones(4, "f4")})
    second = stubs().job_grpc.JobStub(door.channel("a-second"))
    place = {"job": job.name, "generation": job.generation, "rank": 0}
    position = {**place, "step": job.committed_step + 1, "attempt": job.attempt}
    attempts = [(second.CommitStep, job.commit_request(0, [ADAMW])),
                (second.AbortStep, stubs().job.AbortStepRequest(**position)),
                (second.Join, stubs().job.JoinRequest(**place, world_size=1, client_id="x",
                                                      layout=stubs().job.ContributionLayout(mode="SUM", preset="WHOLE")))]
    for call, request in attempts:
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=DEADLINE_SECONDS)
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED and "a-worker" in caught.value.details(), caught.value
    assert job.step({"w": np.ones(4, "f4")}, [ADAMW]).step == position["step"], "the one who joined goes on"
    root = stubs().job_grpc.JobStub(door.channel("root"))
    job.push({"w": np.ones(4, "f4")})
    position["step"] += 1
    position["attempt"] = job.attempt
    assert root.AbortStep(stubs().job.AbortStepRequest(**position), timeout=DEADLINE_SECONDS).attempt == job.attempt + 1, "an operator may"
    root.DeleteJob(stubs().job.DeleteJobRequest(job=job.name, confirm=job.name), timeout=DEADLINE_SECONDS)


def test_lists_show_no_job_of_another_team(door):
    for team, names in (("a", JOBS[:2]), ("b", JOBS[2:])):
        admin = stubs().admin_grpc.AdminStub(door.channel(f"{team}-auditor"))
        assert {job.job for job in admin.ListJobs(stubs().admin.ListJobsRequest(), timeout=60).jobs} == set(names)
        uses = admin.ServerStatus(stubs().admin.ServerStatusRequest(), timeout=60).uses
        assert {use.job for use in uses} - {""} == set(names)


def test_certificate_without_a_grant_may_do_nothing(door):
    channel = door.channel("stranger")
    for method, allowed in MAY_CALL.items():
        assert outcome(channel, method, JOBS[0])[0] == ("PERMISSION_DENIED" if allowed else "UNIMPLEMENTED"), method


def test_file_that_changes_is_read_again_and_a_wrong_one_is_not(door):
    channel = door.channel("a-reader")
    assert outcome(channel, "Job/JobStatus", JOBS[0])[0] == "OK"
    door.grant(revoked=["a-reader"])
    wait_until(lambda: outcome(channel, "Job/JobStatus", JOBS[0])[0] == "PERMISSION_DENIED")
    assert outcome(door.channel("a-worker"), "Job/JobStatus", JOBS[0])[0] == "OK"
    door.file.write_text("[[grant]]\nname = 3\n")
    wait_until(lambda: "is not used" in door.cluster.servers[0].log())
    assert outcome(channel, "Job/JobStatus", JOBS[0])[0] == "PERMISSION_DENIED"
    door.grant()
    wait_until(lambda: outcome(channel, "Job/JobStatus", JOBS[0])[0] == "OK")


def test_certificates_that_change_are_used_for_new_connections(door):
    """The server's certificate is replaced by one of another authority, whose clients it then knows."""
    flags = door.cluster.servers[0].flags
    certificate, key, authority = (flags[flags.index(flag) + 1] for flag in ("--tls-cert", "--tls-key", "--tls-ca"))
    kept = [path.read_bytes() for path in (certificate, key, authority)]
    other = Authority(door.file.parent, "other")
    fresh = other.issue("server")

    def knows(who):
        channel = grpc.secure_channel(door.cluster.address, credentials(who, who.issue("a-reader")),
                                      options=[("grpc.use_local_subchannel_pool", 1)])
        answered = outcome(channel, "Job/JobStatus", JOBS[0])[0]
        channel.close()
        return answered == "OK"

    assert knows(door.authority) and not knows(other)
    for path, content in zip((certificate, key, authority), (fresh[0].read_bytes(), fresh[1].read_bytes(), other.certificate.read_bytes())):
        path.write_bytes(content)
    wait_until(lambda: knows(other))
    assert outcome(door.channel("a-reader"), "Job/JobStatus", JOBS[0])[0] == "OK", "an old connection goes on"
    for path, content in zip((certificate, key, authority), kept):
        path.write_bytes(content)
    wait_until(lambda: time.sleep(0.5) or not knows(other))
