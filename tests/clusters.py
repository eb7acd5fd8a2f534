"""orlopd processes that tests start, stop and kill, and a small job for them."""
import pathlib
import shutil
import signal
import socket
import subprocess
import threading
import time

from plain_client import PlainJob, Tensor

START_SECONDS = 60
STOP_SECONDS = 120


class Server:
    """One orlopd process. Its log survives restarts."""

    def __init__(self, binary, address, data_dir, flags, peer_address=None):
        self.binary, self.address, self.data_dir, self.flags = binary, address, pathlib.Path(data_dir), flags
        self.peer_address = peer_address  # of its door for the other servers, which a server alone has not
        self.log_path = pathlib.Path(f"{data_dir}.log")
        self.process = None

    def launch(self):
        """Start the process without waiting until it is ready."""
        command = [self.binary, "--listen", self.address, "--data-dir", self.data_dir, *self.flags]
        with open(self.log_path, "a") as log:
            self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True)

    def wait_until_ready(self):
        """Read up to the line `ready ADDRESS`."""
        watchdog = threading.Timer(START_SECONDS, self.process.kill)
        watchdog.start()
        try:
            for line in self.process.stdout:
                if line.startswith("ready "):
                    threading.Thread(target=self.process.stdout.read, daemon=True).start()
                    return
        finally:
            watchdog.cancel()
        raise AssertionError(f"orlopd on {self.address} ended with {self.process.wait()} before it was ready:\n{self.log()}")

    def start(self):
        self.launch()
        self.wait_until_ready()

    def stop(self):
        """Stop cleanly; the exit status must be 0."""
        self.terminate()
        status = self.process.wait(STOP_SECONDS)
        assert status == 0, f"orlopd on {self.address} stopped with {status}:\n{self.log()}"

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def running(self):
        return self.process is not None and self.process.poll() is None

    def log(self):
        return self.log_path.read_text()

    def memory_bytes(self):
        """Return anonymous and shared resident bytes, from smaps_rollup."""
        fields = {}
        for line in pathlib.Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, value = line.split(":")
            fields[name] = int(value.split()[0]) * 1024
        return fields["Pss_Anon"] + fields["Pss_Shmem"]


class Cluster:
    """Servers that share a --peers list."""

    def __init__(self, binary, directory, count=1, memory="2GiB", tcp=False, flags=()):
        self.directory = pathlib.Path(directory)
        self.names = [f"server-{i}" for i in range(count)]
        addresses = [free_address() if tcp else f"unix:{self.directory}/{i}.sock" for i in range(count)]
        peer_addresses = [free_address() if tcp else f"{address}.peer" for address in addresses]
        peers = ",".join(map("{}={}@{}".format, self.names, addresses, peer_addresses))
        self.servers = [
            Server(binary, address, self.directory / name, ["--memory", memory, "--peers", peers, "--name", name, *flags], peer_address)
            for name, address, peer_address in zip(self.names, addresses, peer_addresses)]
        self.jobs = []

    @property
    def address(self):
        return self.servers[0].address

    def start(self):
        for server in self.servers:
            server.launch()
        for server in self.servers:
            server.wait_until_ready()
        return self

    def stop(self):
        for server in self.servers:
            server.terminate()
        for server in self.servers:
            status = server.process.wait(STOP_SECONDS)
            assert status == 0, f"orlopd on {server.address} stopped with {status}:\n{server.log()}"

    def restart(self):
        """Stop all servers cleanly, one by one, then start them on the same directories."""
        for server in self.servers:
            server.stop()
        self.start()

    def job(self, name, tensors, **options):
        """Return a PlainJob that is closed with the cluster."""
        self.jobs.append(PlainJob(self.address, name, tensors, **options))
        return self.jobs[-1]

    def close(self):
        for job in self.jobs:
            job.connections.close()
        for server in self.servers:
            if server.running():
                server.kill()
            if server.process is not None:
                server.process.stdout.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def wait_until(condition):
    """Poll until `condition()` is true; for states that no call waits for."""
    end = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < end, f"not so within {START_SECONDS} s"


def free_address():
    """Return a loopback address whose port was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def fill(directory):
    """Fill the file system to the last byte."""
    with open(pathlib.Path(directory) / "filler", "wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


# A small job with every kind of shard: three shards of one tensor, a piece of two chunks, 8-bit and fp32 state, bf16 and a buffer.
SMALL_SHARD_ELEMENTS = 1 << 19
SMALL_TENSORS = (Tensor("layers.0.weight", (1100, 1000)), Tensor("layers.0.bias", (300,)),
                 Tensor("head.weight", (96, 64), "BF16", tied_names=("wte.weight",)), Tensor("scale", ()),
                 Tensor("mask", (10, 3), "I64", "BUFFER"))
