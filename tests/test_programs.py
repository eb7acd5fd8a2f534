"""Random training scripts (programs.py), run with Orlop and with torch.optim: what Orlop does not refuse is equal."""
import itertools
import logging
import os

import pytest
import torch

from orlop.job.job import TrainingJob
from orlop.job.traffic import Traffic
from orlop.optim.optimizer import Optimizer
from orlop.session import Session
from orlop.state import checkpoint
from programs import Servers, constructs, generate, outcome_of, report, run, table

REPORTED = 2  # faults that are shrunk
LONG = 1000
COVERED = 50  # programs of the long form that have a construct and ran to their end
REFUSED = 0.05  # of the long form, at most
SEARCHED = 50  # programs within which a planted fault must be found


@pytest.fixture(scope="module")
def servers(bin_dir):
    shared = Servers()
    yield shared
    shared.close()


@pytest.fixture(autouse=True)
def no_traces(caplog):
    """torch.compile logs hundreds of debug lines for each program, which pytest would print with a failure."""
    caplog.set_level(logging.WARNING, "torch.__trace")


def outcomes_of(programs, servers):
    """Runs programs and returns their outcomes; AssertionError with the faults, if there are any."""
    outcomes = [outcome_of(program, servers) for program in programs]
    faults = [(program, outcome) for program, outcome in zip(programs, outcomes) if outcome.kind in ("different", "crashed")]
    print(table(programs, outcomes)[0])
    if faults:
        texts = [report(program, outcome, lambda one: outcome_of(one, servers)) for program, outcome in faults[:REPORTED]]
        seeds = " ".join(str(program.seed) for program, _ in faults)
        pytest.fail(f"{len(faults)} of {len(programs)} programs fail (`python tests/programs.py SEED` repeats one): {seeds}\n"
                    + "\n".join(texts), pytrace=False)
    return outcomes


@pytest.mark.timeout(1200)
def test_50_random_programs_are_equal_to_torch_or_refused(servers):
    """The same in every run. ORLOP_TEST_SEED chooses others, and the long form draws them."""
    first = int(os.environ.get("ORLOP_TEST_SEED", 1))
    outcomes_of([generate(first + number) for number in range(50)], servers)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_1000_random_programs_have_every_construct_and_few_are_refused(seed, servers):
    programs = [generate(seed + number) for number in range(LONG)]
    outcomes = outcomes_of(programs, servers)
    text, counts = table(programs, outcomes)
    print(text)
    assert sum(outcome.kind == "refused" for outcome in outcomes) <= REFUSED * LONG, text
    wanted = set().union(*map(constructs, programs))
    assert not {name: counts["equal"][name] for name in sorted(wanted) if counts["equal"][name] < COVERED}


# The programs can fail: each of these faults is planted into the package and must be found.


def stores_rounded(original):
    def weight_part(self, entry):
        index, slot, dtype, box, values, count = original(self, entry)
        return index, slot, dtype, box, values.bfloat16().to(values.dtype) if values.is_floating_point() else values, count
    return weight_part


def decays_nothing(original):
    return lambda self, group: original(self, group) | {"weight_decay": 0.0}


def reads_groups_once(original):
    read = {}
    return lambda self, group: read.setdefault(id(group), (group, original(self, group)))[1]


def notices_no_skip(original):
    def note(self, decision):
        original(self, decision)
        self.skipped = False
    return note


def sends_zeros_for_absent_gradients(original):
    def gradients(self):
        trained = self._members.trained
        return {index: torch.zeros_like(p) for index, p in trained.items()} | original(self)
    return gradients


def stores_every_copy(_):
    def store(self, entries):
        self.load(lambda: [self.weight_part(entry) for entry in self.matching(entries)])
        self.traffic.pull(entries)
        return self.step
    return store


def loads_a_state_alone(_):
    def apply_loaded(self):
        if self._pending_state is not None and self._job is not None:
            self._load_pending(lambda: [], are_some=False)
            self._job.traffic.pull_tracked()
    return apply_loaded


def runs_twice(original):
    return lambda self, closure: (original(self, closure), original(self, closure))[1]


PLANTED = {  # the function that has the fault, and what a program must have to meet it: constructs, or parts of its text
    "weights are stored rounded": (TrainingJob, "weight_part", stores_rounded, {"edit, then store"}),
    "weight decay is ignored": (Optimizer, "_values", decays_nothing, {"optimizer AdamW"}),
    "options are read once": (Optimizer, "_values", reads_groups_once, {"scheduler Lambda"}),
    "an edit is not noticed": (Traffic, "check_unedited", lambda _: lambda self: None, {"edit no_grad"}),
    "an overflow is not noticed": (Optimizer, "_note", notices_no_skip, {"train inf"}),
    "gradients stay scaled": (Optimizer, "_loss_scale_of_step", lambda _: lambda self: 1.0, {"scaler orlop"}),
    "absent gradients are zeros": (Optimizer, "_gradients", sends_zeros_for_absent_gradients, {"train absent", "optimizer AdamW"}),
    "a loaded state is dropped": (checkpoint, "parts", lambda _: lambda view, state_dict: [], {"load from theirs"}),
    "buffers are not stored at the end": (Session, "_store_changes", lambda _: lambda self: None, {"directory", "model norm"}),
    "a changed frozen tensor stays here": (Session, "_untrained", lambda _: lambda self: [], {"directory", "model teacher"}),
    "a store sends 16-bit copies": (TrainingJob, "store", stores_every_copy, {"dtype bfloat16", "store=True"}),
    "weights are not brought back": (Session, "load", lambda _: lambda self, model: 0, {"swap back by load"}),
    "a closure runs twice": (Optimizer, "_evaluate", runs_twice, {"train closure", "model norm"}),
    "found_inf is not read": (Optimizer, "_found_inf", lambda _: lambda self: False, {"train unscale", "inf=True"}),
    "a group that maximises goes down": (Optimizer, "_check_group", lambda _: lambda self, group: None, {"key='maximize'"}),
    "a state is loaded beside other weights": (Optimizer, "apply_loaded", loads_a_state_alone, {"load model, optimizer"}),
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fault", PLANTED)
def test_random_programs_find_a_planted_fault(fault, servers, monkeypatch, capsys):
    """In one of the first programs that have the constructs and are equal, or refused, without the fault."""
    owner, name, plant, wanted = PLANTED[fault]
    having = (program for program in map(generate, itertools.count(1))
              if all(word in constructs(program) or word in str(program) for word in wanted)
              and "fork" not in constructs(program))  # which runs in another process
    for program in itertools.islice(having, SEARCHED):
        with monkeypatch.context() as planted:
            planted.setattr(owner, name, plant(getattr(owner, name)))
            outcome = run(program, servers)
        if outcome.kind in ("different", "crashed") and run(program, servers).kind in ("equal", "refused"):
            with capsys.disabled():
                print(f"\n  {fault}: seed {program.seed}, {outcome.text[:100]}", end="")
            return
    pytest.fail(f"none of {SEARCHED} programs with {sorted(wanted)} is different with the fault alone")
