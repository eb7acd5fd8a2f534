"""The two sides of a random program (programs.py): the same script's objects with Orlop and with torch.optim.

Every construct of a script is a method of `Side`, with the record's arguments. The subclasses have what differs.
"""
import contextlib
import copy
import os
import shutil
import signal
import sys
import tempfile

import torch

import orlop

CHILD_SECONDS = 300  # of a program that runs in a process of its own; a forked child may take a fifth
TRAIN = dict(batch=0, accumulate=1, clip=None, unscale=False, inf=False, absent=None, closure=False)

OPTIMIZERS = {  # name in both packages, options, and what a script may set in a group later
    "SGD": ("SGD", {"lr": 0.05}, ("lr", "weight_decay", "momentum")),
    "SGD momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.05}, ("lr", "weight_decay", "momentum")),
    "SGD nesterov": ("SGD", {"lr": 0.05, "momentum": 0.8, "nesterov": True}, ("lr", "weight_decay", "momentum")),
    "SGD dampening": ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}, ("lr", "weight_decay", "momentum", "dampening")),
    "Adam": ("Adam", {"lr": 0.01, "weight_decay": 0.05}, ("lr", "weight_decay", "betas", "betas", "betas", "eps")),
    "AdamW": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}, ("lr", "weight_decay", "betas", "betas", "betas", "eps")),
    "Adagrad": ("Adagrad", {"lr": 0.05, "lr_decay": 0.1, "weight_decay": 0.05, "initial_accumulator_value": 0.1},
                ("lr", "weight_decay", "lr_decay")),
    "RMSprop": ("RMSprop", {"lr": 0.005, "weight_decay": 0.05}, ("lr", "weight_decay", "alpha")),  # torch's KeyError if momentum is set
    "RMSprop momentum": ("RMSprop", {"lr": 0.005, "momentum": 0.8}, ("lr", "weight_decay", "alpha", "momentum")),
    "RMSprop centered": ("RMSprop", {"lr": 0.005, "centered": True}, ("lr", "weight_decay", "alpha")),
    "Adafactor": ("Adafactor", {"lr": 0.01, "weight_decay": 0.1}, ("lr", "weight_decay", "d")),
}


class Different(Exception):
    """The two sides are not equal."""

    def __init__(self, what, ours, theirs):
        difference = (ours.double() - theirs.double()).abs().max().item() if ours.shape == theirs.shape and ours.numel() else float("nan")
        super().__init__(f"{what} differs by {difference:.3g}: {_short(ours)}; torch has {_short(theirs)}")


class Crashed(Exception):
    """Something ended that must not."""


def _short(tensor):
    values = [f"{value:.6g}" for value in tensor.flatten()[:3].tolist()]
    return f"[{', '.join(values)}{', ...' if tensor.numel() > 3 else ''}] of shape {list(tensor.shape)}"


class Net(torch.nn.Module):
    """A small network from 12 to 5 numbers. No gradient is a rounding error, which Adam would make a step of full length."""

    def __init__(self, kind, seed, inputs=12, outputs=5):
        super().__init__()
        torch.manual_seed(seed)
        self.kind = kind
        linear = torch.nn.Linear
        layers = {"single": [linear(inputs, outputs, bias=False)], "few": [linear(inputs, outputs)],
                  "norm": [linear(inputs, 24, bias=False), torch.nn.BatchNorm1d(24), torch.nn.Tanh(), linear(24, outputs)],
                  "tied": [linear(inputs, inputs), torch.nn.Tanh(), linear(inputs, inputs), torch.nn.Tanh(), linear(inputs, outputs)]}
        self.layers = torch.nn.Sequential(*layers.get(kind, [linear(inputs, 24), torch.nn.Tanh(), linear(24, outputs)]))
        if kind == "tied":
            self.layers[2].weight = self.layers[0].weight
        if kind == "codebook":
            self.register_buffer("codes", torch.randn(6, outputs))
            self.register_buffer("used", torch.zeros(6))
        if kind == "teacher":
            self.teacher = copy.deepcopy(self.layers).requires_grad_(False)
        if kind == "odd":
            self.turned = torch.nn.Parameter(torch.randn(outputs, inputs).t())
            self.scale = torch.nn.Parameter(torch.tensor(0.7))
            self.empty = torch.nn.Parameter(torch.empty(0, 3))

    def forward(self, x):
        out = self.layers(x)
        if self.kind == "codebook" and self.training:
            with torch.no_grad():
                share = torch.softmax(out @ self.codes.t(), 1)
                self.codes.mul_(0.9).add_(share.t() @ out, alpha=0.1)
                self.used = self.used * 0.5 + share.sum(0)
        if self.kind == "teacher":
            out = out - 0.5 * self.teacher(x)
        if self.kind == "odd":
            out = out * self.scale + x @ self.turned + self.empty.sum()
        return out

    @torch.no_grad()
    def move_teacher(self):
        for teacher, student in zip(self.teacher.parameters(), self.layers.parameters()):
            teacher.mul_(0.5).add_(student, alpha=0.5)


def make_net(setup, seed):
    with factory_defaults():
        return Net(setup["model"], seed).to(getattr(torch, setup["dtype"]))


def batch_of(number):
    with factory_defaults():
        generator = torch.Generator().manual_seed(number)
        return torch.randn(8, 12, generator=generator), torch.randn(8, 5, generator=generator)


@contextlib.contextmanager
def factory_defaults():
    """torch's default dtype and device, whatever the program has set."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    set_defaults()
    try:
        yield
    finally:
        set_defaults(dtype, device if device.type == "meta" else None)


def set_defaults(dtype=torch.float32, device=None):
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)


# The two sides.


class Side:
    """A script's objects, and what each record does with them. Subclasses have what differs between Orlop and torch."""

    package = torch.optim

    def __init__(self, program):
        self.setup = program.setup
        self.seed = program.seed
        self.half = self.setup["dtype"] != "float32"
        self.saved = {}
        self.trained = 0
        self.frozen = None
        self.model = make_net(self.setup, self.seed)
        self.critic, self.critic_steps = None, 0
        self.average = {name: value.clone() for name, value in self.named().items()}
        self.scaler = self.make_scaler()
        self.begin()
        self.make_optimizer()
        if self.setup["second"]:
            with factory_defaults():
                self.critic = Net("few", self.seed + 1, inputs=5, outputs=1)
            self.critic_optimizer = self.make_critic_optimizer()

    def begin(self):
        """What a script does before it makes an optimizer."""
        self.call = self.model

    def named(self):
        """All parameters by name, detached."""
        critic = () if self.critic is None else self.critic.named_parameters()
        return {name: p.detach() for name, p in self.model.named_parameters()} | {f"critic.{name}": p.detach() for name, p in critic}

    def parameters(self):
        """The parameters that were given to the optimizer, of the model."""
        return [p for name, p in self.model.named_parameters() if not name.startswith("teacher.")]

    def optimized(self):
        """(name, tensor) as the optimizer gets them."""
        return [(name, p) for name, p in self.model.named_parameters()
                if not name.startswith("teacher.") and not (name == "empty" and self.setup["optimizer"] == "Adafactor")]

    def make_optimizer(self):
        named = self.optimized()
        count = min(self.setup["groups"], len(named))
        pick = (lambda pair: pair) if self.setup["names"] == "named" else (lambda pair: pair[1])
        options = {key: torch.tensor(value["tensor"], device="cpu") if isinstance(value, dict) else value
                   for key, value in self.setup["options"].items()}
        lr = float(options["lr"])
        groups = [{"params": [pick(pair) for pair in named[number::count]], **({"lr": lr / 2, "weight_decay": 0.02} if number == 1 else {})}
                  for number in range(count)]
        self.optimizer = self.new_optimizer(getattr(self.package, OPTIMIZERS[self.setup["optimizer"]][0]), groups, options)
        self.scheduler = self.make_scheduler()

    def new_optimizer(self, kind, groups, options):
        return kind(groups, **options)

    def make_scheduler(self):
        schedulers = torch.optim.lr_scheduler
        cycles = "momentum" in self.optimizer.defaults or "betas" in self.optimizer.defaults
        lr = float(self.optimizer.defaults["lr"])
        make = {None: lambda o: None,
                "OneCycle": lambda o: schedulers.OneCycleLR(o, max_lr=2 * lr, total_steps=200, cycle_momentum=cycles),
                "CosineWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3),
                "Lambda": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
                "Cyclic": lambda o: schedulers.CyclicLR(o, base_lr=lr / 4, max_lr=lr, step_size_up=2, cycle_momentum=cycles)}
        return make[self.setup["scheduler"]](self.optimizer)

    def make_scaler(self):
        return torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) if self.setup["scaler"] else None

    def make_critic_optimizer(self):
        return torch.optim.RMSprop(self.critic.parameters(), lr=0.005)

    # Steps.

    def train(self, **given):
        given = TRAIN | given
        if self.critic is not None:
            self.train_critic(given["batch"])
        if given["closure"]:
            losses = []

            def closure():
                losses.append(self.gradients(given))
                return losses[-1]
            returned = self.step_closure(closure)
            results = [losses[-1], torch.as_tensor(returned, device="cpu"), torch.tensor(len(losses), device="cpu")]
        else:
            results = [self.gradients(given)]
            self.step(self.step_scaled if self.scaler else self.optimizer.step, self.model)
        if self.scaler:
            self.scaler.update()
        self.after_step()
        return results

    def after_step(self):
        if self.scheduler:
            self.scheduler.step()
        if self.setup["model"] == "teacher":
            self.model.move_teacher()
        for name, value in self.named().items():
            if name in self.average:
                self.average[name].mul_(0.5).add_(value, alpha=0.5)
        self.trained += 1

    def step_scaled(self):
        self.scaler.step(self.optimizer)

    def step_closure(self, closure):
        return self.step(lambda: self.optimizer.step(closure), self.model)

    def step(self, call, model):
        return call()

    def loss(self, number):
        x, y = batch_of(number)
        out = self.forward(x.to(self.parameters()[0].dtype)).float()
        loss = torch.nn.functional.mse_loss(out, y)
        return loss if self.critic is None else loss + 0.1 * self.critic(out).mean()

    @torch.enable_grad()
    def gradients(self, given):
        """zero_grad, the backwards, and what a script does to gradients. Returns the loss."""
        self.optimizer.zero_grad()
        total = 0.0
        for part in range(given["accumulate"]):
            loss = self.loss(given["batch"] + 1000 * part) / given["accumulate"]
            (self.scaler.scale(loss) if self.scaler else loss).backward()
            total = total + loss.detach()
        self.change_gradients(given)
        return total

    def change_gradients(self, given):
        there = [p for p in self.parameters() if p.grad is not None and p.numel()]
        if given["absent"] is not None and len(there) > 1:
            there.pop(given["absent"] % len(there)).grad = None
        if given["inf"]:
            there[0].grad[(0,) * there[0].dim()] = float("inf")
        if given["unscale"] and self.scaler:
            self.scaler.unscale_(self.optimizer)
        if given["clip"] == "norm":
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)
        elif given["clip"] == "value":
            torch.nn.utils.clip_grad_value_(self.parameters(), 0.02)

    def train_critic(self, number):
        x, _ = batch_of(number + 500)
        self.critic_optimizer.zero_grad()
        with torch.no_grad():
            out = self.forward(x)
        (self.critic(out) - 1).square().mean().backward()
        self.step(self.critic_optimizer.step, self.critic)
        self.critic_steps += 1
        for p in self.critic.parameters():
            if self.setup["second"] == "data.clamp_":
                p.data.clamp_(-0.3, 0.3)
            else:
                with torch.no_grad():
                    p.clamp_(-0.3, 0.3)

    # What a script does between steps.

    def edit(self, route, operation, parameter, store):
        named = [(name, p) for name, p in self.model.named_parameters() if p.numel() and not name.startswith("teacher.")]
        name, p = named[parameter % len(named)]
        write(self.model, name, p, route, self.edited(p, operation, parameter))
        if store or self.half:  # masters are compared, which only the servers have
            self.store()

    def edited(self, p, operation, seed):
        value = p.detach().clone()
        if operation == "clamp":
            return value.clamp(-0.1, 0.1)
        if operation == "scale":
            return value * 0.75
        with factory_defaults():
            drawn = torch.rand(value.shape, generator=torch.Generator().manual_seed(seed)).mul(0.2).add(0.1).to(value.dtype)
        new = torch.where(value > 0, -drawn, drawn) if self.half else drawn  # in half precision, every element is another one
        return torch.empty_like(value).copy_(new)

    def store(self):
        """Tells the servers, where there are some, of an edit."""

    def save(self, slot):
        saved = {"model": self.model.state_dict(), "optimizer": self.full_state()}
        self.saved[slot] = copy.deepcopy(saved) | {"masters": self.masters()}

    def full_state(self):
        return self.optimizer.state_dict()

    def masters(self):
        """fp32 copies of half-precision parameters, where this side keeps them."""
        return None

    def load(self, saved, order, store):
        for part in order.split(", "):
            getattr(self, part).load_state_dict(copy.deepcopy(saved[part]))
        if store:
            self.store()

    def freeze(self, on, parameter=0):
        """Freezes one parameter, or unfreezes the one that was frozen last."""
        if on and self.frozen is None:
            free = [p for p in self.parameters() if p.numel()]
            if len(free) > 1:
                self.frozen = free[parameter % len(free)].requires_grad_(False)
        elif not on and self.frozen is not None:
            self.frozen.requires_grad_(True)
            self.frozen = None

    def group(self, number, key, value):
        groups = self.optimizer.param_groups
        groups[number % len(groups)][key] = value

    def swap(self, route, back):
        """Evaluates with the averaged weights, and has the others again afterwards. session.load() brings those that are trained.

        In half precision a state that was just loaded goes to the servers before: a load takes effect at the next forward, with the
        weights of then, and the exact masters of other weights would be lost.
        """
        if back == "load" or self.half:
            self.store()
        kept = {name: p.detach().clone() for name, p in self.model.named_parameters() if back != "load" or p.requires_grad}
        for name, p in self.model.named_parameters():
            if name in kept:
                write(self.model, name, p, route, self.average[name].clone())
        results = self.evaluate()
        self.swap_back(route, back, kept)
        return results

    def swap_back(self, route, back, kept):
        for name, p in self.model.named_parameters():
            if name in kept:
                write(self.model, name, p, "no_grad" if back == "load" else route, kept[name].clone())

    def forward(self, x):
        return self.call(x)

    def evaluate(self):
        self.model.eval()
        with torch.no_grad():
            out = self.forward(batch_of(7)[0].to(self.parameters()[0].dtype))
        self.model.train()
        return [out.float().clone()]

    def renew(self, full, job):
        """Goes on with a new optimizer, in the same job or in another."""
        full = full or job == "other" or self.frozen is not None  # servers lack states of parameters that were frozen at the join
        state = copy.deepcopy(self.full_state() if full else self.optimizer.state_dict())
        self.remake(state, lambda: self.leave_job(job))

    def remake(self, state, between):
        scheduler = self.scheduler and self.scheduler.state_dict()
        between()
        self.make_optimizer()
        self.optimizer.load_state_dict(state)
        if scheduler:
            self.scheduler.load_state_dict(scheduler)

    def leave_job(self, job):
        pass

    def reopen(self):
        """Ends and starts again with a new process's objects: another model, whose weights come from the checkpoint."""
        if self.trained and self.setup["directory"]:
            state = copy.deepcopy(self.optimizer.state_dict())
            self.remake(state, self.restart)
            self.join()
            if self.frozen is not None:
                self.frozen = dict(self.model.named_parameters())[self.frozen_name].requires_grad_(False)
            self.average = {name: value.clone() for name, value in self.named().items()}

    def join(self):
        """What brings the weights of a job that exists."""

    def fresh_model(self):
        self.frozen_name = next((name for name, p in self.model.named_parameters() if p is self.frozen), None)
        self.model = make_net(self.setup, self.seed + 1)

    def restart(self):
        weights = copy.deepcopy(self.model.state_dict())
        self.fresh_model()
        self.model.load_state_dict(weights)
        self.call = self.model

    def defaults(self, dtype="float32", device=None):
        set_defaults(getattr(torch, dtype), device)

    def fork(self):
        """A child process calls sys.exit, and this one goes on."""

    def look(self):
        """The runner compares the optimizers' full states, which this must be able to read."""
        self.full_state()

    def buffers(self):
        return dict(self.model.named_buffers())

    def close(self):
        pass


class TorchSide(Side):
    """torch.optim. A model in half precision has fp32 masters, which the optimizer steps with the gradients of the other side."""

    def __init__(self, program, other):
        self.other = other
        self.master_of = None
        super().__init__(program)

    def optimized(self):
        named = super().optimized()
        if not self.half:
            return named
        if self.master_of is None:
            self.master_of = {name: torch.nn.Parameter(p.detach().float()) for name, p in named}
        return [(name, self.master_of[name]) for name, _ in named]

    @factory_defaults()  # torch.optim makes counts of updates on the default device, and meta has no numbers
    def step(self, call, model):
        if not self.half or model is self.critic:
            return call()
        self.take_edits()
        for name, master in self.master_of.items():
            gradient = self.other.stepped[name]
            master.grad = None if gradient is None else gradient.float()
        returned = call()
        self.write_weights()
        return returned

    def step_closure(self, closure):
        if not self.half:
            return super().step_closure(closure)
        loss = closure()  # its gradients are not those of the masters
        self.step(self.optimizer.step, self.model)
        return loss

    def change_gradients(self, given):
        """In half precision the other side has changed the gradients already."""
        if not self.half:
            super().change_gradients(given)

    def step_scaled(self):
        if self.half and self.other.unscaled:
            for master in self.master_of.values():
                if master.grad is not None:
                    master.grad *= self.scaler.get_scale()
                    if self.other.has_inf:
                        master.grad += float("inf")  # clipping has made the one that unscale_() found on the other side finite
            self.scaler.unscale_(self.optimizer)
        super().step_scaled()

    @torch.no_grad()
    def take_edits(self):
        """Elements of the model that something has set become the masters'."""
        for name, p in self.model.named_parameters():
            master = self.master_of[name]
            master.copy_(torch.where(master.to(p.dtype) != p, p.float(), master))

    def store(self):
        """What another edit sets back is no longer what the master was before."""
        if self.half:
            self.take_edits()

    @torch.no_grad()
    def write_weights(self):
        for name, p in self.model.named_parameters():
            p.copy_(self.master_of[name])

    def masters(self):
        if not self.half:
            return None
        self.take_edits()
        return {name: master.detach().clone() for name, master in self.master_of.items()}

    @torch.no_grad()
    def load(self, saved, order, store):
        super().load(saved, order, store)
        for name, master in (saved["masters"] or {}).items():
            self.master_of[name].copy_(master)

    def freeze(self, on, parameter=0):
        super().freeze(on, parameter)
        for name, p in self.model.named_parameters() if self.half else ():
            self.master_of[name].requires_grad_(p.requires_grad)


class OrlopSide(Side):
    package = orlop

    def __init__(self, program, servers):
        self.servers = servers
        self.sessions = []
        self.directory = tempfile.mkdtemp(prefix="orlop-test-") if program.setup["directory"] else None
        self.stepped, self.unscaled, self.has_inf = {}, False, False
        super().__init__(program)

    def open(self):
        if self.directory is not None:
            session = orlop.local(self.directory, servers=self.setup["servers"], memory="256MiB")
        else:
            session = self.servers.connect(self.setup["servers"])
        self.sessions.append(session)
        return session

    def begin(self):
        self.session = self.open()
        compiled = self.setup["compile"] is not None
        self.call = torch.compile(self.model, backend="eager") if self.setup["compile"] == "before" else self.model
        if self.setup["names"] == "bound":
            self.session.bind(self.call)
        if compiled and self.setup["compile"] == "after":
            self.call = torch.compile(self.model, backend="eager")

    def new_optimizer(self, kind, groups, options):
        fp32 = {} if kind is orlop.Adafactor else {"state": "fp32"}
        return kind(groups, **options, **fp32, **({"session": self.session} if self.setup["second"] else {}))

    def make_scaler(self):
        if self.setup["scaler"] != "orlop":
            return super().make_scaler()
        return orlop.GradScaler("cpu", init_scale=256.0, growth_interval=2)

    def make_critic_optimizer(self):
        session = self.open()
        session.bind(self.critic)
        self.critic_session = session
        return orlop.RMSprop(self.critic.parameters(), lr=0.005, state="fp32", session=session)

    def change_gradients(self, given):
        super().change_gradients(given)
        self.unscaled, self.has_inf = given["unscale"], given["inf"]
        self.stepped = {name: None if p.grad is None else p.grad.detach().clone() for name, p in self.model.named_parameters()}

    def step(self, call, model):
        try:
            return call()
        except orlop.EditedWeights:
            (self.session if model is self.model else self.critic_session).store(model)
        return call()

    def forward(self, x):
        try:
            return super().forward(x)
        except orlop.EditedWeights:  # a new optimizer joins with the first forward
            self.store()
        return super().forward(x)

    def store(self):
        self.session.store(self.model)

    def full_state(self):
        return self.optimizer.state_dict(full=True)

    def swap_back(self, route, back, kept):
        if back == "load":
            self.session.load(self.model)
        else:
            super().swap_back(route, back, kept)

    def leave_job(self, job):
        if job == "other" and self.directory is None:
            self.session.close()
            self.begin()

    def restart(self):
        self.before = copy.deepcopy(self.model.state_dict())
        self.session.close()
        self.fresh_model()
        self.begin()

    def join(self):
        self.evaluate()  # the first forward joins the job
        for name, value in self.model.state_dict().items():
            if not torch.equal(value, self.before[name]):
                raise Different(f"{name} after the servers were closed and opened again", value, self.before[name])

    def renew(self, full, job):
        super().renew(full, job)
        if self.half:
            self.evaluate()  # an edit before the first forward would be rounded with the new job's weights

    def fork(self):
        child = os.fork()
        if child == 0:
            signal.alarm(CHILD_SECONDS // 5)
            for session in (*self.sessions, *self.servers.owners.values()):
                session.__exit__(SystemExit, None, None)  # as leaving the `with` blocks of a script does
            self.sessions.clear()
            self.servers.owners.clear()
            self.directory = None  # of the parent, which goes on with it
            sys.exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 0:
            raise Crashed(f"the forked child ended with {status}")

    def close(self):
        for session in self.sessions:
            with contextlib.suppress(Exception):
                session.close()
        if self.directory is not None:
            shutil.rmtree(self.directory)


@torch.no_grad()
def write(model, name, p, route, value):
    """Gives a parameter a value by one of the ways that scripts use."""
    if route == "data":
        p.data.copy_(value)
    elif route == "data =":
        p.data = value
    elif route == "detach":
        p.detach().copy_(value)
    elif route == "numpy":
        p.detach().numpy()[...] = value.numpy()
    elif route == "load_state_dict":
        model.load_state_dict(model.state_dict() | {name: value})
    elif route == "vector_to_parameters" and all(q.is_contiguous() for q in model.parameters()):  # else torch refuses it
        values = [value if q is p else q for q in model.parameters()]
        torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(values), model.parameters())
    elif route == "set_":
        p.set_(value)
    elif route == "storage":
        other = torch.empty(0, dtype=p.dtype, device="cpu")
        other.set_(p.untyped_storage(), p.storage_offset(), p.size(), p.stride()).copy_(value)
    elif route == "init":
        torch.manual_seed(3)
        torch.nn.init.uniform_(p, -0.2, 0.2)
    elif route == "requires_grad_":
        flag = p.requires_grad
        p.requires_grad_(False).copy_(value).requires_grad_(flag)
    else:
        p.copy_(value)
