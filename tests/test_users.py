"""Who may call what without TLS: the user of the server everything, root too, others what a file says; by the kernel's word."""
import json
import os
import pathlib
import socket
import stat
import subprocess
import sys

import grpc
import numpy as np
import pytest

from clusters import wait_until
from plain_client import DEADLINE_SECONDS, stubs
from test_roles import JOBS, MAY_CALL, ROLES, TENSORS, outcome, request_of

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
HERE = pathlib.Path(__file__).resolve().parent
FIRST_USER = 61001  # nobody has these numbers
USERS = {(team, role): FIRST_USER + number for number, (team, role) in enumerate((team, role) for team in "ab" for role in ROLES)}
STRANGER = FIRST_USER + len(USERS)


def grant(path):
    path.write_text("".join(f'[[grant]]\nname = "user:{user}"\nroles = ["{role}"]\njobs = ["team-{team}/*"]\n'
                            for (team, role), user in USERS.items()))


def all_outcomes(users, address):
    """User -> (method, job) -> (code, reason) of calls by these users."""
    command = [sys.executable, "-B", HERE / "as_user.py", ",".join(map(str, users)), address]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    return {int(user): {(method, job): (code, reason) for method, job, code, reason in rows}
            for user, rows in json.loads(done.stdout).items()}


def outcomes_of(user, address):
    return all_outcomes([user], address)[user]


def start(make_cluster, tcp, flags=(), count=1):
    cluster = make_cluster(count, start=False, memory="64MiB", tcp=tcp, flags=flags)
    os.chmod(cluster.directory, 0o755)  # another user must come to the socket
    cluster.start()
    for name in JOBS:
        job = cluster.job(name, TENSORS)
        job.create()
        job.configure()
        job.join()
        job.load({"w": np.ones(4, "f4")})
    return cluster


@pytest.fixture(scope="module", params=["unix", "loopback"])
def shared(request, make_module_cluster, tmp_path_factory):
    """A server with a file of roles."""
    roles = tmp_path_factory.mktemp("roles") / "roles.toml"
    grant(roles)
    cluster = start(make_module_cluster, request.param == "loopback", ("--roles", roles))
    cluster.roles = roles
    return cluster


@as_root
def test_each_role_may_call_what_the_table_says_for_its_jobs_alone(shared):
    found = all_outcomes(USERS.values(), shared.address)
    for (team, role), user in USERS.items():
        for (method, job), (code, reason) in found[user].items():
            what = (team, role, method, job, code, reason)
            allowed = MAY_CALL[method]
            if not allowed:
                assert code == "UNIMPLEMENTED", what
                continue
            names_job = request_of(method, job).SerializeToString() != b""
            may = role in allowed and (job.startswith(f"team-{team}/") or not names_job)
            assert (code == "PERMISSION_DENIED") != may, what
            assert code not in ("UNIMPLEMENTED", "INTERNAL", "UNKNOWN", "UNAVAILABLE"), what
            assert may or reason == "DENIED", what


@as_root
def test_user_without_a_grant_may_do_nothing(shared):
    for (method, job), (code, _) in outcomes_of(STRANGER, shared.address).items():
        assert code == ("PERMISSION_DENIED" if MAY_CALL[method] else "UNIMPLEMENTED"), (method, job, code)


@as_root
def test_user_whose_grant_is_taken_back_may_do_nothing(shared):
    user = USERS["a", "reader"]
    assert outcomes_of(user, shared.address)["Job/JobStatus", JOBS[0]][0] == "OK"
    shared.roles.write_text(f'[[revoked]]\nname = "user:{user}"\n[[grant]]\nname = "*"\nroles = ["auditor"]\n')
    wait_until(lambda: outcomes_of(user, shared.address)["Job/JobStatus", JOBS[0]][0] == "PERMISSION_DENIED")
    assert outcomes_of(STRANGER, shared.address)["Job/JobStatus", JOBS[0]][0] == "OK", "every user of the host"
    grant(shared.roles)
    wait_until(lambda: outcomes_of(user, shared.address)["Job/JobStatus", JOBS[0]][0] == "OK")


@as_root
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "loopback"])
def test_without_a_file_other_users_may_do_nothing(make_cluster, tcp):
    cluster = start(make_cluster, tcp, count=2)
    addresses = [cluster.address] if tcp else []
    if not tcp:  # the socket is its user's alone; other users cannot even connect
        assert stat.S_IMODE(os.stat(cluster.address.removeprefix("unix:")).st_mode) == 0o600
        assert {code for code, _ in outcomes_of(STRANGER, cluster.address).values()} == {"UNAVAILABLE"}
    for server in cluster.servers:
        addresses += [server.peer_address] if tcp else []
    for address in addresses:
        codes = {method: code for (method, _), (code, _) in outcomes_of(STRANGER, address).items()}
        assert set(codes.values()) == {"PERMISSION_DENIED", "UNIMPLEMENTED"}
    assert outcome(grpc.insecure_channel(cluster.address), "Job/JobStatus", JOBS[0])[0] == "OK"


@as_root
def test_peers_of_another_user_are_no_peers(make_cluster, tmp_path):
    """A user with every role that the file knows is none at the door of the peers but a peer."""
    roles = tmp_path / "roles.toml"
    roles.write_text(f'[[grant]]\nname = "user:{FIRST_USER}"\nroles = ["worker", "reader", "saver", "operator", "auditor"]\n')
    cluster = start(make_cluster, True, ("--roles", roles), count=2)
    found = outcomes_of(FIRST_USER, cluster.servers[0].peer_address)
    assert {code for (method, _), (code, _) in found.items() if method.startswith("Peer/")} == {"PERMISSION_DENIED"}
    assert {code for code, _ in found.values()} <= {"PERMISSION_DENIED", "UNIMPLEMENTED"}


@as_root
def test_strangers_keep_nobody_out(make_cluster):
    """Another user opens 600 connections; those over a few are closed at once."""
    cluster = start(make_cluster, True)
    host, port = cluster.address.split(":")
    script = (f"import os, socket, encodings.idna; os.setuid({STRANGER}); "
              f"kept = [socket.create_connection(({host!r}, {port})) for _ in range(600)]; print('open', flush=True); input()")
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        fds = pathlib.Path(f"/proc/{cluster.servers[0].process.pid}/fd")
        assert len(list(fds.iterdir())) < 150
        channel = grpc.insecure_channel(cluster.address, options=[("grpc.use_local_subchannel_pool", 1)])
        assert outcome(channel, "Job/JobStatus", JOBS[0])[0] == "OK"
        other.communicate("\n")
    assert "closes new connections" in cluster.servers[0].log()


def test_the_same_user_needs_no_file(make_cluster):
    for tcp in (False, True):
        cluster = start(make_cluster, tcp)
        admin = stubs().admin_grpc.AdminStub(grpc.insecure_channel(cluster.address))
        assert admin.ServerStatus(stubs().admin.ServerStatusRequest(), timeout=DEADLINE_SECONDS).ready


@pytest.mark.parametrize("host", ["localhost", "[::1]"])
def test_every_loopback_address_knows_the_user(make_cluster, host):
    cluster = make_cluster(1, start=False, memory="64MiB")
    server = cluster.servers[0]
    try:
        with socket.create_server((host.strip("[]"), 0), family=socket.AF_INET6 if host[0] == "[" else socket.AF_INET) as probe:
            server.address = f"{host}:{probe.getsockname()[1]}"
    except OSError as error:
        pytest.skip(f"this host has no {host}: {error}")
    server.flags = ["--memory", "64MiB"]
    server.start()
    admin = stubs().admin_grpc.AdminStub(grpc.insecure_channel(server.address))
    assert admin.ServerStatus(stubs().admin.ServerStatusRequest(), timeout=DEADLINE_SECONDS).ready
    server.stop()
