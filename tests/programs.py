"""Random training scripts, each run with Orlop and with torch.optim and compared after every line.

A program is a list of plain records: a setup (model, optimizer, servers, ...) and what the script does then. Each record is carried out on
two sides that have the same model and data. A seed repeats a program; its text can be edited and run again:

    .venv/bin/python tests/programs.py 17                    # the program of seed 17; a fault is shrunk
    .venv/bin/python tests/programs.py --text < program.txt  # a program as it was printed

Outcomes: `equal`; `refused` by an error that tells the user why, after which nothing had changed; `different` and `crashed` are faults.
"""
import argparse
import ast
import atexit
import contextlib
import io
import itertools
import linecache
import pathlib
import random
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace

import torch

import orlop
from program_sides import CHILD_SECONDS, OPTIMIZERS, TRAIN, Different, OrlopSide, TorchSide, set_defaults

# How far the two sides may be apart. The servers' fp32 arithmetic has other roundings than torch's, and errors grow over a few steps.
WEIGHT = dict(rtol=1e-4, atol=1e-5)
LOSS = dict(rtol=1e-4, atol=1e-5)
STATE = dict(rtol=1e-3, atol=1e-4)  # atol: of the tensor's largest element
# In half precision a master may be rounded to the weight's neighbour, so the sides share gradients, and masters are compared as WEIGHT.
HALF = {torch.bfloat16: dict(rtol=2**-7, atol=1e-5), torch.float16: dict(rtol=2**-10, atol=1e-5)}
HALF_FORWARD = dict(rtol=0.05, atol=0.02)

# Errors by which Orlop refuses a construct, if they are raised in its own code. Servers' errors with another reason are faults.
REFUSALS = (orlop.InvalidArgument, orlop.FailedPrecondition, orlop.Unimplemented, NotImplementedError, ValueError, RuntimeError)
NO_REFUSALS = (orlop.EditedWeights, orlop.Superseded, orlop.Unavailable, orlop.DeadlineExceeded)
NO_REASONS = ("STALE_EPOCH", "STALE_GENERATION", "STALE_ATTEMPT", "WRONG_STEP", "LOADING", "CHECKSUM")


# Programs.


@dataclass(frozen=True)
class Record:
    """One construct of a script and its arguments, which are literals."""

    name: str
    arguments: dict = field(default_factory=dict)

    def __str__(self):
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.arguments.items())})"


@dataclass(frozen=True)
class Program:
    seed: int
    setup: dict
    records: tuple

    def __str__(self):
        return "\n".join([f"seed({self.seed})", str(Record("setup", self.setup)), *map(str, self.records)])


def parse(text):
    """The program that str(program) printed."""
    calls = [statement.value for statement in ast.parse(text).body]
    read = [Record(call.func.id, {word.arg: ast.literal_eval(word.value) for word in call.keywords}) for call in calls[1:]]
    return Program(ast.literal_eval(calls[0].args[0]), PLAIN | read[0].arguments, tuple(read[1:]))


PLAIN = dict(model="layers", dtype="float32", optimizer="SGD", options={"lr": 0.05}, groups=1, servers=1, directory=False, scaler=None,
             scheduler=None, compile=None, names="bound", second=None)
VALUES = {"lr": (0.0, 0.002, 0.02), "weight_decay": (0.0, 0.2), "momentum": (0.0, 0.5, 0.9), "dampening": (0.0, 0.5),
          "betas": ((0.8, 0.9), (0.0, 0.99)), "eps": (1e-6, 1e-4), "lr_decay": (0.0, 0.5), "alpha": (0.9, 0.95), "d": (1.0, 2.0),
          "maximize": (True,)}
MODELS = ("single", "few", "layers", "norm", "codebook", "tied", "teacher", "odd")
SCHEDULERS = ("OneCycle", "CosineWarmRestarts", "Lambda", "Cyclic")
ROUTES = ("no_grad", "data", "data =", "detach", "numpy", "load_state_dict", "vector_to_parameters", "set_", "storage", "init",
          "requires_grad_")
OPERATIONS = ("clamp", "scale", "redraw")
ORDERS = ("model, optimizer", "optimizer, model", "model", "optimizer")


def generate(seed):
    """The program of a seed."""
    rng = random.Random(seed)
    setup = _setup(rng)
    numbers, slots = itertools.count(), []
    records = []
    for _ in range(rng.randint(3, 7)):
        records.append(_train(rng, setup, next(numbers)))
        for _ in range(rng.choice((0, 1, 1, 2))):
            records += _event(rng, setup, slots)
    if rng.random() < 0.09:
        records.insert(rng.randint(1, len(records)), Record("fork"))
    if setup["directory"]:
        records.insert(rng.randint(len(records) // 2, len(records)), Record("reopen"))
    records.append(_train(rng, setup, next(numbers)))
    if rng.random() < 0.3:
        begin = rng.randint(1, len(records) - 1)
        word = rng.choice(("float64", "bfloat16", "meta"))
        records.insert(begin, Record("defaults", {"device": "meta"} if word == "meta" else {"dtype": word}))
        records.insert(rng.randint(begin + 2, len(records)), Record("defaults"))
    return Program(seed, setup, tuple(records))


def _setup(rng):
    setup = dict(PLAIN)
    setup["dtype"] = rng.choices(("float32", "bfloat16", "float16"), (76, 12, 12))[0]
    half = setup["dtype"] != "float32"
    setup["optimizer"] = rng.choices(tuple(OPTIMIZERS), [2 if name.startswith("Adam") else 1 for name in OPTIMIZERS])[0]
    setup["options"] = dict(OPTIMIZERS[setup["optimizer"]][1])
    setup["model"] = rng.choice(MODELS[:4] if half else MODELS)
    setup["groups"] = rng.choice((1, 1, 2, 3))
    setup["servers"] = rng.choice((1, 2, 3))
    setup["scheduler"] = rng.choice((None, None, *SCHEDULERS))
    setup["scaler"] = rng.choices((None, "torch", "orlop"), (50, 25, 25))[0]
    if setup["optimizer"] == "Adafactor" and half:
        setup["options"]["eps"] = (1e-7, 1e-3)  # torch's default depends on the dtype, and the other side's is fp32
    kind = rng.choices((None, "directory", "before", "after", "named", "second", "tensor"), (26, 12, 11, 11, 11, 14, 15))[0]
    if kind == "directory":
        setup["directory"] = True
    elif kind in ("before", "after"):
        setup["compile"] = kind
    elif kind == "named":
        setup["names"] = "named"
    elif kind == "second" and not half:
        setup["second"] = rng.choice(("data.clamp_", "clamp_"))
    elif kind == "tensor" and OPTIMIZERS[setup["optimizer"]][0] in ("SGD", "Adam", "AdamW"):
        setup["options"]["lr"] = {"tensor": setup["options"]["lr"]}
    return setup


def _train(rng, setup, number):
    arguments = {"batch": number}
    if rng.random() < 0.15:
        arguments["accumulate"] = 2
    if rng.random() < 0.3:
        arguments["clip"] = rng.choice(("norm", "value"))
    if setup["scaler"] and setup["dtype"] != "float16":
        arguments["unscale"] = rng.random() < 0.4
    if setup["scaler"]:
        arguments["inf"] = rng.random() < 0.15
    elif rng.random() < 0.15:
        arguments["closure"] = True
    if rng.random() < 0.12:
        arguments["absent"] = rng.randrange(8)
    return Record("train", arguments)


def _event(rng, setup, slots):
    """What a script does between two steps. `slots` are those that the program has saved to."""
    half = setup["dtype"] != "float32"
    name = rng.choices(("edit", "save", "load", "freeze", "group", "swap", "renew", "store", "look", "evaluate"),
                       (10, 3 if slots else 8, 12 * bool(slots), 2, 6, 2.5, 2, 1, 2, 1))[0]
    if name == "edit":
        routes = [route for route in ROUTES if not (half and route in ("init", "numpy"))]
        return [Record("edit", dict(route=rng.choice(routes), operation="redraw" if half else rng.choice(OPERATIONS),
                                    parameter=rng.randrange(8), store=rng.random() < 0.3))]
    if name == "save":
        slots.append(rng.randrange(2))
        return [Record("save", {"slot": slots[-1]})]
    if name == "load":
        order = rng.choice(ORDERS[:2] if half else ORDERS)
        return [Record("load", dict(slot=rng.choice(slots), order=order, source="own" if half else rng.choice(("own", "ours", "theirs")),
                                    store=rng.random() < 0.3))]
    if name == "freeze":
        return [Record("freeze", dict(parameter=rng.randrange(8), on=True)), _train(rng, setup, rng.randrange(100, 120)),
                *[Record("freeze", dict(on=False))] * (rng.random() < 0.7)]
    if name == "group":
        key = rng.choice((*OPTIMIZERS[setup["optimizer"]][2], *["maximize"] * (rng.random() < 0.05)))
        return [Record("group", dict(number=rng.randrange(3), key=key, value=rng.choice(VALUES[key])))]
    if name == "swap":
        return [Record("swap", dict(route=rng.choice(("data =", "data", "no_grad")), back=rng.choice(("swap", "load"))))]
    if name == "renew":
        return [Record("renew", dict(full=rng.random() < 0.6, job=rng.choice(("same", "other")[:1 + (not setup["directory"])])))]
    return [Record(name)]


def constructs(program):
    """What a program has, for the table of coverage."""
    setup = program.setup
    found = {f"model {setup['model']}", f"dtype {setup['dtype']}", f"optimizer {setup['optimizer']}", f"groups {setup['groups']}",
             f"servers {setup['servers']}", f"scaler {setup['scaler']}", f"scheduler {setup['scheduler']}"}
    found |= {text for text, there in {
        "compile before bind": setup["compile"] == "before", "compile after bind": setup["compile"] == "after",
        "names from named_parameters": setup["names"] == "named", "two jobs": setup["second"], "directory": setup["directory"],
        "tensor lr": isinstance(setup["options"]["lr"], dict)}.items() if there}
    for record in program.records:
        found |= _constructs_of(record)
    return found


def _constructs_of(record):
    given = record.arguments
    if record.name == "train":
        words = {key for key in ("unscale", "inf", "closure") if given.get(key)} | {key for key in ("accumulate", "absent") if key in given}
        return {f"train {word}" for word in words} | ({f"clip {given['clip']}"} if given.get("clip") else set())
    if record.name == "edit":
        return {f"edit {given['route']}", f"edit {given['operation']}"} | ({"edit, then store"} if given["store"] else set())
    if record.name == "load":
        return {f"load {given['order']}", f"load from {given['source']}"}
    if record.name == "freeze":
        return {"freeze" if given["on"] else "unfreeze"}
    if record.name == "group":
        return {f"group {given['key']}"} if given["key"] in ("lr", "weight_decay", "betas", "momentum") else set()
    if record.name == "swap":
        return {f"swap by {given['route']}", f"swap back by {given['back']}"}
    if record.name == "renew":
        return {f"new optimizer, {given['job']} job", f"new optimizer, {'full' if given['full'] else 'plain'} state"}
    if record.name == "defaults":
        return {f"default {word}" for word in given.values()}
    return {record.name}


# Running.


@dataclass(frozen=True)
class Outcome:
    kind: str  # equal, refused, different, crashed
    text: str = ""
    number: int = -1  # of the record

    @property
    def reason(self):
        """The text without names and numbers, so that outcomes can be counted by it."""
        words = self.text.split(";")[0].split()
        return " ".join(word for word in words if not any(letter.isdigit() for letter in word))[:110]


class Servers:
    """Clusters of one to three servers that programs share, each with jobs of its own."""

    def __init__(self):
        self.owners = {}
        self.numbers = itertools.count()

    def connect(self, count):
        if count not in self.owners:
            self.owners[count] = orlop.local(servers=count, memory="256MiB", job="owner")
        return orlop.connect(self.owners[count].address, job=f"program-{next(self.numbers)}")

    def delete(self, sessions):
        """Deletes the jobs of closed sessions."""
        for owner in self.owners.values():
            for session in sessions:
                if session.address == owner.address:
                    owner.client.delete_job(session.job)

    def close(self):
        for owner in self.owners.values():
            owner.close()
        self.owners = {}


def run(program, servers):
    """Runs a program in this process and returns its outcome."""
    sides = []
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return _run(program, servers, sides)
        finally:
            set_defaults()
            for side in sides:
                side.close()
            servers.delete(sides[0].sessions if sides else [])
            if program.setup["compile"]:
                torch.compiler.reset()


def _run(program, servers, sides):
    number = -1
    try:
        ours = OrlopSide(program, servers)
        sides.append(ours)
        theirs = TorchSide(program, ours)
        for number, record in enumerate((*program.records, Record("look"))):
            refused = _carry_out(record, ours, theirs)
            if refused is not None:
                return Outcome("refused", refused, number)
            if record.name == "look":
                compare_states(ours, theirs)
    except Different as error:
        return Outcome("different", str(error), number)
    except Exception as error:
        file, line = _raised_at(error)
        if file.name == "rmsprop.py" and isinstance(error, KeyError):  # torch makes no buffer if momentum is 0 at the first step
            return Outcome("refused", f"torch's RMSprop: {type(error).__name__} {error}, when momentum rises from 0", number)
        return Outcome("crashed", f"{type(error).__name__}: {error} ({file.name}:{line})", number)
    return Outcome("equal")


def _carry_out(record, ours, theirs):
    """Carries a record out on both sides and compares them. Returns the text of a refusal."""
    given = dict(record.arguments)
    sources = {"own": (ours, theirs), "ours": (ours, ours), "theirs": (theirs, theirs)}[given.pop("source", "own")]
    if record.name == "load":
        slot = given.pop("slot")
        if slot not in ours.saved:
            return None
        loaded = [side.saved[slot] for side in sources]
    results = []
    for place, side in enumerate((ours, theirs)):
        more = {"saved": loaded[place]} if record.name == "load" else {}
        try:
            results.append(getattr(side, record.name)(**given, **more))
        except REFUSALS as error:
            if side is theirs or not _is_refusal(error):
                raise
            if record.name == "train":
                if ours.critic_steps > theirs.critic_steps:  # the critic's optimizer steps first
                    theirs.train_critic(given["batch"])
                compare_weights(ours, theirs)
                with contextlib.suppress(*REFUSALS):  # what was refused may be the slots of the state
                    compare_states(ours, theirs)
            return f"{type(error).__name__}: {error}"
    forward = HALF_FORWARD if ours.half else LOSS
    for mine, other in zip(*(result or () for result in results)):
        check(f"a result of {record.name}", mine, other, **forward)
    compare_weights(ours, theirs)
    for name, value in theirs.buffers().items():
        check(name, ours.buffers()[name], value, **(HALF_FORWARD if ours.half else WEIGHT))
    return None


def _is_refusal(error):
    """Whether servers refused a request, or a line of the package raised the error."""
    if isinstance(error, orlop.Error):
        return not isinstance(error, NO_REFUSALS) and error.reason not in NO_REASONS
    file, line = _raised_at(error)
    return file.is_relative_to(pathlib.Path(orlop.__file__).parent) and linecache.getline(str(file), line).lstrip().startswith("raise ")


def _raised_at(error):
    """The file and line that raised an error."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return pathlib.Path(trace.tb_frame.f_code.co_filename), trace.tb_lineno


def check(what, ours, theirs, rtol, atol):
    ours, theirs = ours.detach(), theirs.detach()
    if ours.shape != theirs.shape or not torch.allclose(ours.double(), theirs.double(), rtol=rtol, atol=atol):
        raise Different(what, ours, theirs)


def compare_weights(ours, theirs):
    tolerance = HALF[getattr(torch, ours.setup["dtype"])] if ours.half else WEIGHT
    mine = ours.named()
    for name, value in theirs.named().items():
        check(name, mine[name], value, **tolerance)
    if ours.scaler is not None:
        check("the scale", torch.tensor(ours.scaler.get_scale(), device="cpu"), torch.tensor(theirs.scaler.get_scale(), device="cpu"), 0, 0)


def compare_states(ours, theirs):
    """The full optimizer states: whatever torch holds, and the masters of half precision."""
    mine, other = ours.full_state()["state"], theirs.full_state()["state"]
    for (number, state), (name, parameter) in zip(sorted(other.items()), _with_state(theirs, other)):
        for slot, value in state.items():
            counts = slot == "step" and isinstance(theirs.optimizer, torch.optim.SGD)  # torch's SGD leaves a count that it has loaded
            if counts or not isinstance(value, torch.Tensor) or not parameter.numel():
                continue
            if slot not in mine.get(number, {}):
                raise Different(f"{slot} of {name}, which is missing,", torch.empty(0, device="cpu"), value)
            scale = value.abs().max().item()
            check(f"{slot} of {name}", torch.as_tensor(mine[number][slot], device="cpu"), value, STATE["rtol"], STATE["atol"] * scale)
    for name, master in (theirs.masters() or {}).items():
        if ours.trained:
            check(f"master of {name}", ours.session.get(name, "master"), master, **WEIGHT)


def _with_state(side, states):
    """(name, parameter) of each numbered state, in order."""
    names = {id(p): name for name, p in side.optimized()}
    parameters = [p for group in side.optimizer.param_groups for p in group["params"]]
    return [(names[id(parameters[number])], parameters[number]) for number in sorted(states)]


def outcome_of(program, servers):
    """Runs a program here, or in a process of its own if it forks."""
    if any(record.name == "fork" for record in program.records):
        return run_alone(program)
    return run(program, servers)


def run_alone(program):
    """Runs a program in a process of its own, which may crash."""
    try:
        child = subprocess.run([sys.executable, __file__, "--text"], input=str(program), capture_output=True, text=True,
                               timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return Outcome("crashed", f"it took more than {CHILD_SECONDS} s")
    lines = [line for line in child.stdout.splitlines() if line.startswith("outcome ")]
    if not lines:
        return Outcome("crashed", f"the process ended with {child.returncode}: {child.stderr.strip()[-500:]}")
    return Outcome(*ast.literal_eval(lines[0].removeprefix("outcome ")))


# Shrinking.

SHRINK_RUNS = 80


def shrink(program, outcome, run_one):
    """Removes records, then what the setup has beyond the plainest, as long as the program fails in the same way."""
    left = [SHRINK_RUNS]

    def fails(candidate):
        left[0] -= 1
        found = run_one(candidate)
        same = found.kind == outcome.kind and (found.kind != "crashed" or found.reason == outcome.reason)
        return found if same and left[0] >= 0 else None

    if outcome.number >= 0:
        program = replace(program, records=program.records[:outcome.number + 1])
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(program):
            found = fails(candidate)
            if found:
                program, outcome, smaller = candidate, found, True
                break
            if left[0] <= 0:
                return program, outcome
    return program, outcome


def _smaller(program):
    for number in reversed(range(len(program.records))):
        yield replace(program, records=program.records[:number] + program.records[number + 1:])
    for number, record in enumerate(program.records):
        for key in record.arguments if record.name == "train" else ():
            if record.arguments[key] != TRAIN[key] and key != "batch":
                fewer = {word: value for word, value in record.arguments.items() if word != key}
                yield replace(program, records=(*program.records[:number], Record("train", fewer), *program.records[number + 1:]))
    for key, value in PLAIN.items():
        if program.setup[key] != value and key != "options":
            options = {"options": PLAIN["options"]} if key == "optimizer" else {}
            yield replace(program, setup=program.setup | {key: value} | options)


def report(program, outcome, run_one):
    """The text of a fault: seed, shrunk program, first difference."""
    small, shrunk = shrink(program, outcome, run_one)
    kept = {key: value for key, value in small.setup.items() if value != PLAIN[key]}
    return (f"seed {program.seed} is {outcome.kind}: {outcome.text}\nThe shortest program, {shrunk.kind} at record {shrunk.number}: "
            f"{shrunk.text}\n{replace(small, setup=kept)}\n")


def table(programs, outcomes):
    """The coverage: for each construct, how many programs with it ran to their end equal, were refused, and failed."""
    counts = {kind: Counter() for kind in ("equal", "refused", "different", "crashed")}
    for program, outcome in zip(programs, outcomes):
        counts[outcome.kind].update(constructs(program))
    names = sorted(set().union(*counts.values()))
    rows = [f"{name:32}" + "".join(f"{counts[kind][name]:10}" for kind in counts) for name in names]
    reasons = Counter(f"{outcome.kind}: {outcome.reason}" for outcome in outcomes if outcome.kind != "equal")
    return "\n".join([f"{'construct':32}" + "".join(f"{kind:>10}" for kind in counts), *rows,
                      *(f"{count:5} {reason}" for reason, count in reasons.most_common())]), counts


def main():
    parser = argparse.ArgumentParser(description="Runs random training scripts with Orlop and with torch.")
    parser.add_argument("seeds", type=int, nargs="*")
    parser.add_argument("--text", action="store_true", help="read a program from stdin")
    parser.add_argument("--count", type=int, default=1, help="programs from the (one) seed on; prints a table")
    options = parser.parse_args()
    servers = Servers()
    atexit.register(servers.close)
    if options.text:
        outcome = run(parse(sys.stdin.read()), servers)
        print("outcome", (outcome.kind, outcome.text, outcome.number), flush=True)
        return
    seeds = [seed + number for seed in options.seeds for number in range(options.count)]
    programs, outcomes = [generate(seed) for seed in seeds], []
    for program in programs:
        outcomes.append(outcome_of(program, servers))
        if options.count == 1:
            print(program)
            if outcomes[-1].kind in ("different", "crashed"):
                print(report(program, outcomes[-1], lambda one: outcome_of(one, servers)))
        print(program.seed, outcomes[-1].kind, outcomes[-1].text[:300], flush=True)
    if options.count > 1:
        print(table(programs, outcomes)[0])


if __name__ == "__main__":
    main()
