"""Processes of the demo: servers and workers that never outlive it, and the memory they hold."""

from __future__ import annotations

import ctypes
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time

START_SECONDS = 60
STOP_SECONDS = 30
_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


class ProcessFailed(RuntimeError):
    """A process of the demo ended or did not start. The message says which one, and has the end of its log."""


def end_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends in any way (Linux)."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def free_ports(count: int) -> list[int]:
    """Return distinct loopback ports that were free a moment ago."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Child:
    """One process in a session of its own. Ctrl-C therefore reaches only the demo, which then ends its children in order."""

    def __init__(self, name: str, command: list[str], log: pathlib.Path | None = None, **options) -> None:
        self.name, self.log = name, log
        stream = log.open("wb") if log else None
        try:
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream and subprocess.STDOUT,
                                            start_new_session=True, preexec_fn=end_with_parent, **options)
        except OSError as error:
            raise ProcessFailed(f"{name} did not start: {command[0]}: {error.strerror}. Run `make` first.") from error
        finally:
            if stream:
                stream.close()

    def check(self) -> None:
        """Raise ProcessFailed if the process has ended."""
        if self.process.poll() is not None:
            tail = self.log.read_text(errors="replace")[-2000:] if self.log else ""
            raise ProcessFailed(f"{self.name} ended with status {self.process.returncode}\n{tail}".rstrip())

    def stop(self) -> None:
        """Send SIGTERM; if the process takes too long, send SIGKILL to its whole session."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Servers:
    """A cluster of orlopd on loopback ports. `with` waits until it is ready, and stops it at the end."""

    def __init__(self, binary: pathlib.Path, count: int, folder: pathlib.Path, logs: pathlib.Path, memory: str) -> None:
        self._binary, self._folder, self._logs, self._memory = binary, folder, logs, memory
        addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
        self._addresses = {f"server-{index + 1}": address for index, address in enumerate(addresses)}
        self.address = addresses[0]
        self.children: list[Child] = []

    def __enter__(self) -> Servers:
        try:
            for name in self._addresses:
                self._start(name)
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for child in self.children:
            if child.process.poll() is None:
                child.process.terminate()
        for child in self.children:
            child.stop()

    def check(self) -> None:
        for child in self.children:
            child.check()

    def _start(self, name: str) -> None:
        peers = ",".join(f"{peer}={address}" for peer, address in self._addresses.items())
        self.children.append(Child(name, [
            str(self._binary), "--name", name, "--listen", self._addresses[name], "--peers", peers,
            "--data-dir", str(self._folder / name), "--memory", self._memory, "--ready-file", str(self._ready_file(name)),
            "--parent-pid", str(os.getpid())], log=self._logs / f"{name}.log"))

    def _ready_file(self, name: str) -> pathlib.Path:
        return self._folder / f"{name}.ready"

    def _wait_until_ready(self) -> None:
        give_up = time.monotonic() + START_SECONDS
        while waiting := [name for name in self._addresses if not self._ready_file(name).exists()]:
            self.check()
            if time.monotonic() > give_up:
                raise ProcessFailed(f"{', '.join(waiting)} not ready after {START_SECONDS} s; logs are in {self._logs}")
            time.sleep(0.05)


def held_bytes(pid: int) -> int:
    """Return the anonymous and shared memory of a process, shared pages divided among their users; 0 if it has ended."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0
    sizes_kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return (sizes_kib["Pss_Anon"] + sizes_kib["Pss_Shmem"]) * 1024


def child_pids(pid: int) -> list[int]:
    try:
        return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


class MemoryTrace:
    """Bytes held by servers and workers. A thread samples them while `with` runs."""

    def __init__(self, servers: list[Child], launcher: Child, period_seconds: float = 1.0) -> None:
        self.seconds: list[float] = []
        self.server_bytes: list[int] = []
        self.worker_bytes: list[int] = []
        self._servers, self._launcher, self._period_seconds = servers, launcher, period_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryTrace:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        start = time.monotonic()
        while not self._done.wait(self._period_seconds):
            self.seconds.append(time.monotonic() - start)
            self.server_bytes.append(sum(held_bytes(child.process.pid) for child in self._servers))
            self.worker_bytes.append(sum(map(held_bytes, child_pids(self._launcher.process.pid))))
