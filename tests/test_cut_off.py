"""Servers and connections that are silently cut off: packets vanish, and nothing tells."""
import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time

import grpc
import pytest
import torch

import orlop
from clusters import Cluster, wait_until
from plain_client import stubs
from test_tls import Authority, credentials, grants

KNOWN_SECONDS = 10
ON_AGAIN_SECONDS = 15
NEAR, FAR = "10.98.7.1", "10.98.7.2"
SPACE, NEAR_LINK, FAR_LINK = "orlop-far", "orlop-near0", "orlop-far0"


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def far():
    """A network namespace behind a pair of links; it is called SPACE."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root, and the command ip of iproute2")
    steps = [("netns", "add", SPACE), ("link", "add", NEAR_LINK, "type", "veth", "peer", "name", FAR_LINK, "netns", SPACE),
             ("addr", "add", f"{NEAR}/24", "dev", NEAR_LINK), ("link", "set", NEAR_LINK, "up"),
             ("-n", SPACE, "addr", "add", f"{FAR}/24", "dev", FAR_LINK), ("-n", SPACE, "link", "set", FAR_LINK, "up"),
             ("-n", SPACE, "link", "set", "lo", "up")]
    try:
        for step in steps:
            done = ip(*step)
            if done.returncode != 0:
                pytest.skip(f"no network namespace here: `ip {' '.join(step)}`: {done.stderr.strip()}")
        yield SPACE
    finally:
        ip("netns", "del", SPACE)
        ip("link", "del", NEAR_LINK)


class FarCluster(Cluster):
    """Eight servers, the last of which is far."""

    def __init__(self, bin_dir, directory, authority):
        super().__init__(bin_dir / "orlopd", directory, count=8, memory="64MiB")
        certificate, key = authority.issue("server", [NEAR, FAR])
        roles = grants(authority.directory / "roles.toml", server=["peer"], trainer=["operator"])
        tls = ["--tls-cert", certificate, "--tls-key", key, "--tls-ca", authority.certificate, "--roles", roles]
        hosts = [NEAR] * 7 + [FAR]
        doors = [(f"{host}:{17000 + 2 * number}", f"{host}:{17001 + 2 * number}") for number, host in enumerate(hosts)]
        peers = ",".join(f"{name}={door}@{peer}" for name, (door, peer) in zip(self.names, doors))
        for server, (door, peer) in zip(self.servers, doors):
            server.address, server.peer_address = door, peer
            server.flags = ["--memory", "64MiB", "--peers", peers, "--name", self.names[self.servers.index(server)], *tls]
        self.servers[-1].binary = "ip"
        self.servers[-1].flags = ["netns", "exec", SPACE, bin_dir / "orlopd", "--listen", FAR + ":17014", "--data-dir",
                                  self.directory / self.names[-1], *self.servers[-1].flags]
        self.servers[-1].launch = lambda: launch_far(self.servers[-1])


def launch_far(server):
    with open(server.log_path, "a") as log:
        server.process = subprocess.Popen(list(map(str, [server.binary, *server.flags])), stdout=subprocess.PIPE, stderr=log, text=True)


def silent_servers(cluster, known, server):
    admin = stubs().admin_grpc.AdminStub(grpc.secure_channel(server.address, known))
    servers = admin.ListServers(stubs().admin.ListServersRequest(), timeout=30).placement.servers
    return [each.name for each in servers if each.silent_ms > 0]


def test_others_know_soon(far, bin_dir, tmp_path):
    authority = Authority(tmp_path, "cluster")
    cluster = FarCluster(bin_dir, tmp_path / "servers", authority)
    try:
        cluster.directory.mkdir()
        cluster.start()
        known = credentials(authority, authority.issue("trainer"))
        assert not silent_servers(cluster, known, cluster.servers[0])
        assert ip("-n", SPACE, "link", "set", FAR_LINK, "down").returncode == 0
        cut = time.monotonic()
        for server in cluster.servers[:-1]:
            wait_until(lambda: silent_servers(cluster, known, server) == [cluster.names[-1]])
        assert time.monotonic() - cut < KNOWN_SECONDS
    finally:
        cluster.close()


class Proxy:
    """Passes connections on to a server, until it freezes those that it has: they stay open, and carry nothing."""

    def __init__(self, target):
        self.target, self.frozen, self.pairs = target, [], []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                host, port = self.target.rsplit(":", 1)
                far = socket.create_connection((host, int(port)))
                stop = threading.Event()
                self.pairs.append((near, far, stop))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self.pump, args=(source, sink, stop), daemon=True).start()

    def pump(self, source, sink, stop):
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                if stop.is_set():
                    return
                sink.sendall(content)
        if not stop.is_set():
            sink.close()

    def freeze(self):
        for *_, stop in self.pairs:
            stop.set()
        self.frozen += self.pairs
        self.pairs = []

    def close(self):
        self.listener.close()
        for near, far, _ in self.pairs + self.frozen:
            near.close()
            far.close()


def test_client_goes_on_over_a_new_connection(bin_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ORLOP_BIN_DIR", str(bin_dir))
    cluster = Cluster(bin_dir / "orlopd", tmp_path / "servers", count=2, tcp=True)
    cluster.directory.mkdir()
    proxies = [Proxy(server.address) for server in cluster.servers]
    peers = ",".join(f"{name}={proxy.address}@{server.peer_address}"
                     for name, proxy, server in zip(cluster.names, proxies, cluster.servers))
    for server in cluster.servers:
        server.flags[server.flags.index("--peers") + 1] = peers
    try:
        cluster.start()
        with orlop.connect(proxies[0].address, job="j") as session:
            net = session.bind(torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8))))
            optimizer = orlop.AdamW(net.parameters(), session=session)

            def step():
                net(torch.ones(1, 256)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()

            step()
            for cut in (proxies[:1], proxies[1:], proxies):
                for proxy in cut:
                    proxy.freeze()
                begun = time.monotonic()
                step()
                assert time.monotonic() - begun < ON_AGAIN_SECONDS
            assert session.step == 4
    finally:
        cluster.close()
        for proxy in proxies:
            proxy.close()
