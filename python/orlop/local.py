"""Private servers for one process (group): ``orlop.local()``."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import weakref
from pathlib import Path

from .errors import Unavailable
from .job.job import Workers

STOP_SECONDS = 120.0  # how long servers whose state is dropped may take to end before they are killed
QUIET_SECONDS = 2.0  # after this long a line says that servers are still writing their state


def find_binary(name: str) -> str:
    """Path of ``orlopd`` or ``orlop``, searched in ``$ORLOP_BIN_DIR``, then beside this Python, then in ``$PATH``.

    Raises
    ------
    FileNotFoundError
        It is in none of these places.
    """
    places = [os.environ.get("ORLOP_BIN_DIR"), sysconfig.get_path("scripts")]
    path = os.pathsep.join([place for place in places if place] + [os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise FileNotFoundError(f"{name} is neither in $ORLOP_BIN_DIR, nor beside this Python ({places[1]}), nor in $PATH: "
                                "pip install . puts it beside Python, make puts it in build/release/bin")
    return found


class LocalServers:
    """``orlopd`` children on Unix sockets. They write their state and end when :meth:`stop` is called or this process ends.

    Parameters
    ----------
    directory : str or Path or None
        Where their state is kept; None: a temporary directory, removed by :meth:`stop`.
    servers : int
        How many servers; for one directory always the same number.
    memory : str
        Budget of each, e.g. ``"4GiB"``.
    start_seconds : float
        How long servers of an earlier run may take to leave the directory, and then the new ones to become ready, which includes
        reading back the job.

    Raises
    ------
    orlop.Unavailable
        A server ended, or is not ready in time. The message has the end of its log.
    ValueError
        The directory was written by another number of servers.
    """

    def __init__(self, directory: str | Path | None, servers: int, memory: str, start_seconds: float) -> None:
        if servers < 1:
            raise ValueError(f"servers={servers}; at least 1")
        self._process = os.getpid()
        self._sockets = tempfile.mkdtemp(prefix="orlop-")  # a socket's path has 107 bytes at most
        self._remove_sockets = weakref.finalize(self, _remove, self._sockets, self._process)
        self._data = Path(directory).resolve() if directory is not None else Path(self._sockets) / "data"
        self._data.mkdir(parents=True, exist_ok=True)
        self._keeps = directory is not None
        self._children: list[subprocess.Popen[bytes]] = []
        self._check_count(servers)
        self.addresses = [f"unix:{self._sockets}/{index}.sock" for index in range(servers)]
        peers = ",".join(f"s{index}={address}" for index, address in enumerate(self.addresses))
        deadline = time.monotonic() + start_seconds
        try:
            for index in range(servers):
                self._wait_unlocked(index, deadline)
            for index, address in enumerate(self.addresses):
                self._children.append(self._start(index, address, peers, memory))
            self._wait_ready(time.monotonic() + start_seconds)
        except BaseException:
            self.stop()
            raise

    @property
    def running(self) -> bool:
        """Whether all servers run."""
        return all(child.poll() is None for child in self._children)

    def stop(self) -> None:
        """Ends the servers. It waits until the state is in the directory that was given, however long that takes; after Ctrl-C the servers
        go on writing alone. In a process that was forked from the one that started them it does nothing."""
        if os.getpid() != self._process:
            return
        for child in self._children:
            child.terminate()
        for index, child in enumerate(self._children):
            try:
                child.wait(QUIET_SECONDS if self._keeps else STOP_SECONDS)
            except subprocess.TimeoutExpired:
                if self._keeps:
                    print(f"orlop: server s{index} (process {child.pid}) is writing its state to {self._data / f's{index}'}; "
                          "waiting until it has", file=sys.stderr, flush=True)
                else:
                    child.kill()
                child.wait()
        self._children = []
        self._remove_sockets()

    def _check_count(self, servers: int) -> None:
        there = len(list(self._data.glob("s[0-9]*/")))
        if there not in (0, servers):
            raise ValueError(f"{self._data} was written by {there} servers; servers={servers} cannot read it")

    def _wait_unlocked(self, index: int, deadline: float) -> None:
        """Waits until a server of an earlier run, which may still be writing its state, unlocks its directory. After `deadline` the new
        server is started anyway, and its error names the process that has the directory."""
        lock = self._data / f"s{index}" / "LOCK"
        if not lock.exists():
            return
        quiet_until = time.monotonic() + QUIET_SECONDS
        with open(lock) as file:
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return  # closing it unlocks
                except BlockingIOError:
                    if time.monotonic() > quiet_until:
                        print(f"orlop: waiting for process {lock.read_text().strip()}, which still has {lock.parent} (a server that is "
                              "writing its state, or another run)", file=sys.stderr, flush=True)
                        quiet_until = deadline
                    time.sleep(0.02)

    def _start(self, index: int, address: str, peers: str, memory: str) -> subprocess.Popen[bytes]:
        data = self._data / f"s{index}"
        data.mkdir(exist_ok=True)
        command = [find_binary("orlopd"), "--listen", address, "--name", f"s{index}", "--peers", peers, "--memory", memory,
                   "--data-dir", str(data), "--ready-file", f"{self._sockets}/{index}.ready",
                   "--parent-pid", str(os.getpid()), "--log-level", "warning",
                   "--rollback", "auto", *([] if self._keeps else ["--flush-every", "never"])]
        with open(self._log(index), "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    def _log(self, index: int) -> Path:
        return self._data / f"s{index}.log"  # not in the server's directory, where only the server may write

    def _wait_ready(self, deadline: float) -> None:
        for index, child in enumerate(self._children):
            ready = Path(self._sockets) / f"{index}.ready"
            while not ready.exists():
                if child.poll() is not None or time.monotonic() > deadline:
                    log = self._log(index).read_text(errors="replace")[-2000:]
                    how = "is not ready in time" if child.poll() is None else f"ended with status {child.returncode}"
                    raise Unavailable(f"server s{index} {how}; the end of its log:\n{log}")
                time.sleep(0.01)


def _remove(directory: str, process: int) -> None:
    """Removes a directory of `process`: its forked children run the same finalizers at their end."""
    if os.getpid() == process:
        shutil.rmtree(directory, ignore_errors=True)


def start_for_group(directory: str | Path | None, servers: int, memory: str,
                    start_seconds: float) -> tuple[LocalServers | None, str]:
    """Starts the servers on rank 0. Returns them (None on other ranks) and the first one's address.

    Raises
    ------
    RuntimeError
        ``torchrun`` started several processes, and their process group does not exist yet.
    """
    workers = Workers()
    if workers.alone and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError("call torch.distributed.init_process_group() before orlop.local(): every process would start its own servers")
    running: list[LocalServers] = []

    def start() -> str:
        running.append(LocalServers(directory, servers, memory, start_seconds))
        return running[0].addresses[0]

    address = workers.run_first(start)
    return (running[0] if running else None), address
