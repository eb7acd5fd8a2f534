"""Mutual TLS: servers and clients with a certificate of the cluster's authority can connect; others cannot."""
import json
import subprocess

import grpc
import numpy as np
import pytest
import safetensors.torch
import torch

import orlop
from clusters import SMALL_SHARD_ELEMENTS, SMALL_TENSORS
from plain_client import ADAMW, Connections, stubs

TENSORS = [tensor for tensor in SMALL_TENSORS if tensor.dtype == "F32"]


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


class Authority:
    """A certificate authority of its own, in a directory."""

    def __init__(self, directory, name):
        self.directory, self.name = directory, name
        self.certificate, self.key = directory / f"{name}.pem", directory / f"{name}.key"
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", self.key,
                "-out", self.certificate)

    def issue(self, name, addresses=("127.0.0.1",)):
        """Return (certificate, key) of a process at these addresses, which is also called `name`."""
        certificate, key, request, extension = (self.directory / f"{self.name}-{name}.{end}" for end in ("pem", "key", "csr", "ext"))
        names = [*(f"IP:{address}" for address in addresses), "DNS:localhost", f"DNS:{name}"]
        extension.write_text(f"subjectAltName={','.join(names)}\n")
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        openssl("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self.key, "-CAcreateserial", "-days", "2",
                "-extfile", extension, "-out", certificate)
        return certificate, key


def grants(path, /, **roles):
    """Write a file of --roles that grants each name its roles, for all jobs; return its path."""
    path.write_text("".join(f'[[grant]]\nname = "{name}"\nroles = {json.dumps(granted)}\n' for name, granted in roles.items()))
    return path


def credentials(authority, identity=None):
    certificate, key = (path.read_bytes() for path in identity) if identity else (None, None)
    return grpc.ssl_channel_credentials(authority.certificate.read_bytes(), key, certificate)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"), "cluster")


@pytest.fixture(scope="module")
def cluster(make_module_cluster, authority):
    certificate, key = authority.issue("server")
    roles = grants(authority.directory / "roles.toml", server=["peer"], worker=["worker"], trainer=["worker", "operator"])
    return make_module_cluster(2, tcp=True, flags=("--tls-cert", certificate, "--tls-key", key, "--tls-ca", authority.certificate,
                                                   "--roles", roles))


def test_client_with_a_certificate_steps_through_servers_that_trust_each_other(cluster, authority):
    known = credentials(authority, authority.issue("worker"))
    job = cluster.job("trusted", TENSORS, shard_elements=SMALL_SHARD_ELEMENTS, credentials=known)
    job.create()
    job.configure()
    job.join()
    assert len(job.addresses()) == 2, "both servers must take part"
    weights = {tensor.name: np.ones(tensor.shape, "<f4") for tensor in TENSORS}
    job.load(weights)
    assert job.step(weights, [ADAMW]).step == 1
    assert all((array < 1).all() for array in job.pull_all().values())


@pytest.mark.parametrize("who", ["without a certificate", "of another authority", "in plaintext"])
def test_client_that_the_authority_does_not_know_stays_outside(cluster, authority, tmp_path, who):
    others = {"without a certificate": lambda: credentials(authority),
              "of another authority": lambda: credentials(authority, Authority(tmp_path, "other").issue("worker")),
              "in plaintext": lambda: None}
    connections = Connections(credentials=others[who]())
    for server in cluster.servers:
        for call, request in ((connections.admin(server.address).ListJobs, stubs().admin.ListJobsRequest()),
                              (connections.job(server.address).JobStatus, stubs().job.JobStatusRequest(job="trusted"))):
            with pytest.raises(grpc.RpcError) as caught:
                call(request, timeout=60)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE, caught.value
        assert server.running()
    connections.close()


def test_python_session_exports(cluster, authority, tmp_path, monkeypatch, bin_dir):
    monkeypatch.setenv("ORLOP_BIN_DIR", str(bin_dir))
    certificate, key = authority.issue("trainer")
    with orlop.connect(cluster.servers[0].address, job="exported", tls_cert=str(certificate), tls_key=str(key),
                       tls_ca=str(authority.certificate)) as session:
        net = session.bind(torch.nn.Linear(3, 2))
        orlop.AdamW(net.parameters(), session=session).attach()
        session.export(tmp_path / "model.safetensors")
    exported = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert exported.keys() == net.state_dict().keys() and torch.equal(exported["weight"], net.weight)
