"""Damage on disk: one bit of a file is flipped, or a file is cut, while its server is down. The next start serves the newest state bit for
bit, offers a rollback that passes, or names what is damaged. It never serves another state in silence, and its next clean stop succeeds."""
import collections
import random
import shutil
import threading

import grpc
import pytest

from clusters import wait_until
from test_flush import flush, step_all_to_the_end
from test_restart import recovered, rejoin_at, snapshots_of_undisturbed_run, start_job, state_of, step_all

STEPS = 6
# What a damage may come to. An older or another state without a word is none of them.
HEALED, ROLLBACK, LOST, REFUSED = "served, newest step", "rollback offered and taken", "job refused by name", "start refused by name"


def run_to_the_newest_flush(cluster, job, is_killed):
    """Leave flushes of two steps: of 3 and of STEPS. `is_killed`: of 3 and 5, with the servers killed at STEPS."""
    for seed in (1, 2, 3):
        step_all_to_the_end(job, seed)
    cluster.restart()
    recovered(job)
    rejoin_at(job, 3)
    for seed in (4, 5):
        step_all_to_the_end(job, seed)
    if is_killed:
        assert flush(job).step == 5
    step_all_to_the_end(job, 6)
    if not is_killed:
        return cluster.stop()
    for server in cluster.servers:
        server.kill()


def kind_of(path):
    """Return a name for all files that hold the same."""
    return path.suffix.lstrip(".") or path.name.split("-")[0]


class Damage:
    """One change of one file: a bit flipped, or the end cut off."""

    def __init__(self, chance, path, is_cut):
        self.name, self.kind = str(path.name), kind_of(path)
        self.is_cut, self.at, self.bit = is_cut, chance.randrange(path.stat().st_size), chance.randrange(8)

    def __str__(self):
        return f"{self.name} " + (f"cut to {self.at} bytes" if self.is_cut else f"bit {self.bit} of byte {self.at}")

    def inflict(self, path):
        contents = bytearray(path.read_bytes())
        if self.is_cut:
            del contents[self.at:]
        else:
            contents[self.at] ^= 1 << self.bit
        path.write_bytes(contents)


class Bench:
    """Servers whose directories are put back and damaged again and again."""

    def __init__(self, make_cluster, servers, is_killed, tmp_path):
        self.cluster, self.is_killed = make_cluster(servers), is_killed
        self.expected = snapshots_of_undisturbed_run(self.cluster, STEPS + 1)
        job = self.job = start_job(self.cluster)
        run_to_the_newest_flush(self.cluster, job, is_killed)
        self.newest = 5 if is_killed else STEPS  # that must be served or offered
        self.saved = tmp_path / "saved"
        for server in self.cluster.servers:
            shutil.copytree(server.data_dir, self.saved / server.data_dir.name)

    def files(self):
        """Return every file of the last server's directory that is not empty."""
        directory = self.saved / self.cluster.servers[-1].data_dir.name
        return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file() and path.stat().st_size)

    def damages(self, chance, count):
        """Return for each file as many flips of a bit, and cuts."""
        directory = self.saved / self.cluster.servers[-1].data_dir.name
        return [(path, Damage(chance, directory / path, is_cut))
                for path in self.files() for is_cut in (False, True) for _ in range(count)]

    def try_one(self, path, damage):
        """Put all directories back, inflict the damage, start, and return what it comes to."""
        for server in self.cluster.servers:
            shutil.rmtree(server.data_dir, ignore_errors=True)
            shutil.copytree(self.saved / server.data_dir.name, server.data_dir)
            server.log_path.write_text("")
        damage.inflict(self.cluster.servers[-1].data_dir / path)
        try:
            if not self.start():
                return REFUSED
            outcome = self.judge()
            self.cluster.stop()
            return outcome
        finally:
            for server in self.cluster.servers:
                if server.running():
                    server.kill()

    def start(self):
        """Start all servers. Return False if the damaged one ends with status 1 and says why."""
        for server in self.cluster.servers:
            server.launch()
        damaged, *others = reversed(self.cluster.servers)
        if not is_ready(damaged):
            assert damaged.process.wait(60) == 1, damaged.log()
            assert str(damaged.data_dir) in damaged.log(), f"the reason names no file: {damaged.log()}"
            return False
        for server in others:
            assert is_ready(server), server.log()
        return True

    def judge(self):
        job = self.job
        try:
            job.connections.reconnect()
            status = recovered(job)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND, error
            assert "has lost its newest writes" in self.cluster.servers[-1].log()
            return LOST
        state = state_of(job)
        if state == "ROLLBACK_OFFERED":
            step = status.rollback_step
            assert step in (3, self.newest), status
            if step < self.newest:
                log = self.cluster.servers[-1].log()
                assert "has lost its newest writes" in log or "is not offered" in log or "cannot be read" in log, log
            job.roll_back(step)
            rejoin_at(job, step)
        elif state == "READY":
            step = status.committed_step
            assert not self.is_killed and step == STEPS, f"step {step} is served, without a word"
            rejoin_at(job, step)
        else:
            assert state in ("LOST", "QUARANTINED") and status.explanation, status
            return LOST
        assert job.snapshot() == self.expected[step], f"other bits are served as step {step}"
        step_all(job, step + 1)
        wait_until(lambda: job.status().applied_step == step + 1)
        assert job.snapshot() == self.expected[step + 1], f"other bits follow step {step}"
        return HEALED if state == "READY" else ROLLBACK


def is_ready(server):
    """Read up to the line `ready ADDRESS`; return False if the process ends before."""
    watchdog = threading.Timer(60, server.process.kill)
    watchdog.start()
    try:
        for line in server.process.stdout:
            if line.startswith("ready "):
                threading.Thread(target=server.process.stdout.read, daemon=True).start()
                return True
        return False
    finally:
        watchdog.cancel()


CASES = [(1, False), (1, True), (2, False), (2, True)]


@pytest.mark.parametrize("servers, is_killed, count", [(1, False, 0), (1, True, 0)]
                         + [pytest.param(*case, 3, marks=pytest.mark.slow) for case in CASES], ids=str)
def test_damage_of_any_file_is_healed_or_named(make_cluster, tmp_path, seed, servers, is_killed, count):
    """With a count of 0, one damage of each kind of file is drawn, and a cut of the manifest and of the newest log."""
    chance = random.Random(seed)
    bench = Bench(make_cluster, servers, is_killed, tmp_path)
    drawn = bench.damages(chance, count or 1)
    if not count:
        chance.shuffle(drawn)
        chosen = {damage.kind: (path, damage) for path, damage in drawn}
        chosen |= {("cut", damage.kind): (path, damage) for path, damage in drawn if damage.is_cut and damage.kind in ("MANIFEST", "log")}
        drawn = list(chosen.values())
    outcomes = collections.Counter()
    for path, damage in drawn:
        try:
            outcomes[damage.kind, "cut" if damage.is_cut else "bit", bench.try_one(path, damage)] += 1
        except (AssertionError, grpc.RpcError) as error:
            logs = "\n".join(server.log()[-2000:] for server in bench.cluster.servers)
            raise AssertionError(f"seed {seed}: {damage}: {error}\n{logs}") from error
    for (kind, how, outcome), times in sorted(outcomes.items()):
        print(f"{kind:10} {how}  {outcome:28} {times}")
