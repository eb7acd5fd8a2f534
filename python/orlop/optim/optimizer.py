# One push, 1 of 8 (ARCHITECTURE.md); next: python/core/job_handle.cc
"""``torch.optim`` optimizers whose state and arithmetic live on the servers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .. import names
from ..errors import Superseded
from ..job.job import TrainingJob
from ..job.wire import KINDS, GradientWire, Part
from ..options import OPTIONS
from ..session import Session, default_session
from ..state import checkpoint, foreign
from .overlap import BackwardPusher

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


class Optimizer(torch.optim.Optimizer):
    """What all optimizers share: a step is push, commit, pull.

    Attributes
    ----------
    grad_norm : float
        Global norm of the last step's gradient: averaged and unscaled, before clipping. NaN before the first step.
    skipped : bool
        Whether the last step was skipped, on every server and rank, because a gradient was not finite.
    timings : dict of str to float
        Seconds of the last step: ``between`` (since the step before: forward and backward), ``reduce``, ``push``, ``commit``,
        ``pull`` (it waits for the apply), ``gather``, ``total``.
    needs_whole_tensors : bool
        Of the class: whether a step looks at all of a tensor before it updates any element. A job that is created for such an optimizer
        has each of its parameters on one server (``TensorSpec.whole``).
    """

    needs_whole_tensors: bool = False

    slots: tuple[str, ...] = ()  # of the optimizer state, as torch names them
    _given_to: str | None = None  # the optimizer whose part this one is now
    _steps_here = False  # the parameters are stepped in this process, and the servers take them: nothing is pulled after a step
    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves unscaling and the verdict to us

    def __init__(self, params: Params, defaults: dict[str, Any], *, session: Session | None = None, state: str = "8bit",
                 rounding: str = "no_zero", master: str = "exact", max_norm: float | None = None, overlap: str | None = None,
                 accumulation_steps: int | None = None, gradient_wire: str | None = None) -> None:
        if gradient_wire not in KINDS:
            raise ValueError(f"gradient_wire={gradient_wire!r}; one of {', '.join(map(repr, KINDS))}")
        if overlap not in (None, "backward"):
            raise ValueError(f"overlap={overlap!r}; None or 'backward'")
        if max_norm is not None and not (max_norm > 0 and math.isfinite(max_norm)):
            raise ValueError(f"max_norm={max_norm}; positive and finite, or None for no clipping")
        if accumulation_steps is not None and overlap is None:
            raise ValueError("accumulation_steps tells overlap='backward' when to push; without overlap step() reads what has accumulated")
        self._session = session
        self._job: TrainingJob | None = None
        self._max_norm = max_norm
        self._gradient_wire = gradient_wire
        self._pusher = BackwardPusher(accumulation_steps) if overlap == "backward" else None
        self._trained: dict[int, torch.Tensor] = {}     # by manifest index
        self._group_order: list[int] = []               # param_groups that the servers know
        self._frozen: dict[int, str] = {}               # id of a parameter -> name
        self._reduced = False
        self._pending_state: dict[str, Any] | None = None
        self._last_end = time.perf_counter()
        self.grad_norm = math.nan
        self.skipped = False
        self.timings: dict[str, float] = {}
        super().__init__(params, defaults | {"state": state, "rounding": rounding, "master": master})
        if self._session is None:
            try:
                self._session = default_session()
            except RuntimeError:
                pass  # one may be opened before the first step
        if self._session is not None:
            self._session.claim(self)

    # What users call.

    @property
    def attached(self) -> bool:
        """Whether the job is joined."""
        return self._job is not None

    @property
    def session(self) -> Session:
        """The session given, or the default one."""
        self._check_own()
        if self._session is None:
            self._session = default_session()
            self._session.claim(self)
        return self._session

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Pushes the gradients, commits the step, and returns with the new weights in the parameters.

        Parameters without gradient are left alone, as in torch. A gradient that is not finite makes the whole job skip the step.

        It can be called again after it raised, with several processes on all of them (Ctrl-C excepted: it can part the processes). The
        call first brings the weights of the last committed step. If the step that raised was committed after all and the gradients are
        the same still, it is done; otherwise a step with the gradients of now is made. So a step that is repeated counts once, and new
        gradients always count. A bound model's forward brings the weights, too (with several processes: one that records gradients).

        Raises
        ------
        orlop.EditedWeights
            A parameter was changed by something else; ``session.store(model)`` keeps the edit. Edits through ``parameter.data`` are
            hidden from torch's version counter, and so from this: the pull overwrites them unless they are stored.
        """
        if closure is not None:
            raise NotImplementedError(f"{type(self).__name__}.step() takes no closure: the servers make one update per push; compute "
                                      "the loss and call backward() before step()")
        self._check_own()
        begin = time.perf_counter()
        if not self.attached:
            self.attach()
            if self._stale_weights:
                return
        job = self._job
        gradients = job.workers.together(self._checked_gradients)
        job.seconds = dict.fromkeys(("reduce", "push", "commit", "pull", "gather"), 0.0) | {"between": begin - self._last_end}
        loss_scale = self._loss_scale_of_step()
        present, stopped, changed = job.survey(gradients)
        if stopped and self._catch_up(job) and not changed:
            job.finish()
            return
        job.begin(gradients, pulls=not self._steps_here)
        self._note(self._commit(job, gradients, present, loss_scale))
        if not self.skipped:
            for index in present:
                self.state[self._trained[index]]["step"] += 1
            if not self._steps_here:
                job.pull_tracked()
        job.finish()
        self._last_end = time.perf_counter()
        self.timings = job.seconds | {"total": self._last_end - begin}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; gradients pushed during backward and not committed are taken back."""
        self.take_back("zero_grad")
        if self._job is not None:
            self._job.forget_gradients()
        super().zero_grad(set_to_none)

    def take_back(self, reason: str) -> None:
        """Drops what was pushed during backward and not committed, if anything was. `reason` is for the servers' logs."""
        if self._pusher is not None and self._job is not None and self._job.is_open:
            self._pusher.drop()  # the attempt ends anyway
        elif self._pusher is not None:
            self._pusher.abort(reason)

    def before_forward(self) -> None:
        """Joins, or brings the weights that a step which raised did not."""
        if not self.attached:
            self.attach()
        elif self._job.behind and (self._job.workers.alone or torch.is_grad_enabled()):  # one rank may evaluate by itself
            self._catch_up(self._job)

    def last_backward(self) -> AbstractContextManager[None]:
        """Around the last backward of a step: with ``overlap="backward"`` its gradients are pushed as they arrive."""
        return self._pusher.last_backward() if self._pusher is not None else nullcontext()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, before the first step."""
        self._check_own()
        if getattr(self, "_job", None) is not None:
            raise RuntimeError(f"job {self._job.core.job!r} has its parameters fixed: add_param_group comes before the first step")
        super().add_param_group(param_group)
        self._check_group(self.param_groups[-1])
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter]["step"] = torch.tensor(0.0)

    def state_dict(self, full: bool = False, format: str = "torch") -> dict[str, Any]:
        """The optimizer's state.

        Parameters
        ----------
        full : bool
            False: plain values only (job, step, arithmetic version, groups): the tensors stay on the servers, where the next run finds
            them. True: torch's own format with the tensors, read from the servers one after another; ``torch.optim`` can load it,
            and loaded here, with the same weights in the model, training goes on bit for bit, in 8 bit and half precision too (stochastic rounding draws
            by job and step, and goes on with other draws elsewhere).
        format : str
            With `full`: ``"torch"``, ``"bitsandbytes"`` or ``"torchao"`` (Adam and AdamW). In the last two 8-bit states are the servers'
            codes and scales, bit for bit, which those libraries' optimizers load and go on with.

        Returns
        -------
        dict

        Raises
        ------
        ValueError
            The library has not what this optimizer does, e.g. Nesterov momentum; the message says what.
        """
        return checkpoint.save(self, super().state_dict(), full, format)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes groups from a state_dict, and the tensors if it has them: :meth:`state_dict` in full, or that of an optimizer of torch,
        bitsandbytes (8 or 32 bit) or torchao.

        Quantised states keep their codes bit for bit where the servers hold the same format (8 bit; the library's code book within 2 ulp
        of the closed form); elsewhere they are decoded with the stored code book, which is exact, and requantised if need be.

        Raises
        ------
        ValueError
            A plain state_dict of another job or step than the servers hold; the message tells what they hold. Or something in a state
            that is not understood: the message names tensor, value and limit. Nothing has changed then.
        """
        self._check_own()
        state_dict = foreign.to_torch(self, state_dict)
        checkpoint.check_available(self, state_dict)
        kept = checkpoint.without_tensors(self, state_dict)
        if len(kept["param_groups"]) == len(self.param_groups):  # else torch says what is wrong
            for group in kept["param_groups"]:
                self._check_group(group)
        super().load_state_dict(kept)
        if checkpoint.has_tensors(state_dict):
            self._pending_state = checkpoint.copied(state_dict)
            if self._job is not None:
                self._load_pending([])

    @torch.inference_mode(False)  # the first forward may be under it, and what is made here is written to at every step
    @torch.no_grad()
    def attach(self, keep_weights: bool = False) -> None:
        """Joins the job now, which the first forward of a bound model or the first step otherwise does.

        A new job takes rank 0's weights. Of an existing job the servers' weights win and are put into the parameters, unless
        `keep_weights` says that they are about to be replaced.
        """
        if self.attached:
            return
        session = self.session
        if session.optimizer is not self:
            raise Superseded(_SUPERSEDED)
        entries = names.of_model(session.model) if session.model is not None else names.of_groups(self.param_groups)
        self._check_named(entries)
        whole = {id(p) for group in self.param_groups if self._needs_whole(group) for p in group["params"] if p.requires_grad}
        for entry in entries:
            entry.is_whole = id(entry.tensor) in whole
        job = session.training_job(entries)
        self._match(job)
        job.configure(self._configuration(job))
        job.join(self._layout(job))
        job.track(list(self._trained))
        job.wire = GradientWire(self._gradient_wire, job.core.shard_elements)
        self._job = job
        self._stale_weights = False
        try:
            if job.loading:
                self._load_pending([job._weight_part(entry) for entry in job.entries])
                if not job.workers.alone:
                    job.pull(job.entries)
            else:
                self._resume(job, keep_weights)
        except BaseException:
            self._job = None  # so that the next forward or step joins again
            raise
        if self._pusher is not None:
            self._pusher.attach(job, self._trained, lambda: session.loss_scale)

    def detach(self) -> None:
        """A newer optimizer took over: nothing is pushed any more."""
        if self._pusher is not None:
            self._pusher.detach()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled: its state is on the servers; use state_dict()")

    # Attaching.

    _stale_weights = False  # the gradients in hand were computed with weights that the servers' have just replaced

    def _resume(self, job: TrainingJob, keep_weights: bool) -> None:
        if not keep_weights:
            gradients_in_hand = any(p.grad is not None for p in self._trained.values())
            before = [p.detach().clone() for p in self._trained.values()] if gradients_in_hand else []
            job.pull(job.entries)
            self._stale_weights = any(not torch.equal(old, new) for old, new in zip(before, self._trained.values()))
            if job.workers.rank == 0:
                print(f"orlop: job {job.core.job} exists: its weights of step {job.step} are in the model now"
                      + ("; this first gradient belongs to other weights and is dropped (session.bind(model) avoids that)"
                         if self._stale_weights else ""), flush=True)
        self._read_counts(job)
        if self._pending_state is not None:
            self._load_pending([])

    def _read_counts(self, job: TrainingJob) -> None:
        counts = {t["index"]: t["applied_count"] for t in self.session.client.list_tensors(job.core.job)}
        for index, parameter in self._trained.items():
            self.state[parameter]["step"] = torch.tensor(float(counts.get(index, 0)))

    def _check_named(self, entries: list[names.Entry]) -> None:
        known = {id(entry.tensor) for entry in entries}
        for number, group in enumerate(self.param_groups):
            for position, parameter in enumerate(group["params"]):
                if parameter.numel() and id(parameter) not in known:
                    raise ValueError(
                        f"parameter {position} of group {number} (shape {list(parameter.shape)}) has no name: call session.bind(model) "
                        "with the model it belongs to, or give the optimizer model.named_parameters()")

    def _match(self, job: TrainingJob) -> None:
        """Finds this optimizer's parameters among the job's tensors."""
        self._trained, self._group_order, self._frozen = {}, [], {}  # of an attach that failed
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.numel() == 0:
                    continue
                index = job.index_of[id(parameter)]
                if parameter.requires_grad:
                    self._trained[index] = parameter
                else:
                    self._frozen[id(parameter)] = job.entries[index].name
            if any(p.requires_grad and p.numel() for p in group["params"]):
                self._group_order.append(number)
        self._trained = dict(sorted(self._trained.items()))

    def _configuration(self, job: TrainingJob) -> dict[str, Any]:
        groups = []
        for number in self._group_order:
            group = self.param_groups[number]
            indexes = [job.index_of[id(p)] for p in group["params"] if p.requires_grad and p.numel()]
            groups.append({"optimizer": self._algorithm(group), "state": group["state"], "rounding": group["rounding"],
                           "master": group["master"], "tensors": indexes,
                           "fp32_tensors": [index for index in indexes if job.entries[index].is_embedding]})
        return {"groups": groups, "max_norm": self._max_norm or 0.0, "reduce": "mean"}

    def _layout(self, job: TrainingJob) -> dict[str, Any]:
        workers = job.workers
        model = self.session.model
        wrapped = (isinstance(model, torch.nn.parallel.DistributedDataParallel)
                   or model is None and self.param_groups[0].get("param_names", [""])[0].startswith("module."))
        self._reduced = wrapped and not workers.alone
        if self._pusher is not None and self._reduced:
            raise ValueError("overlap='backward' would read gradients before DDP has averaged them: use it without DDP (the servers "
                             "average then), or leave overlap out")
        if workers.alone:
            return {"mode": "EXACTLY_ONCE", "preset": "WHOLE"}
        if self._pusher is not None:
            return {"mode": "SUM", "preset": "WHOLE"}
        return {"mode": "EXACTLY_ONCE", "preset": "FLAT_SLICES", "reduced_from": workers.world_size}

    @torch.inference_mode(False)
    @torch.no_grad()
    def _load_pending(self, parts: list[Any]) -> None:
        """A LOAD step of `parts` and of the optimizer state that load_state_dict was given."""
        if self._pending_state is not None:
            loaded = checkpoint.parts(self, self._job, self._pending_state)
            masters = {index for index, slot, *_ in loaded if slot == "master"}
            parts = [part for part in parts if part[0] not in masters] + loaded
        self._job.load(parts)
        if self._pending_state is not None:
            checkpoint.set_counts(self, self._pending_state)
            self._pending_state = None

    # Stepping.

    def _checked_gradients(self) -> dict[int, torch.Tensor]:
        """What this rank has to push, unless something here forbids a step."""
        if self.session.optimizer is not self:
            raise Superseded(_SUPERSEDED)
        if not self._steps_here:
            self._job.check_unedited()
        return self._gradients()

    @torch.no_grad()
    @torch.inference_mode(False)  # as _load_pending
    def _catch_up(self, job: TrainingJob) -> bool:
        """Ends what a call that raised left half made; whether that was a step which is committed."""
        if job.behind:
            self.take_back("a call before raised")
        decision = job.catch_up()
        if decision is not None:
            self._note(decision)
            self._read_counts(job)
        return decision is not None

    def _note(self, decision: dict[str, Any]) -> None:
        self.grad_norm = decision["gradient_norm"]
        self.skipped = decision["outcome"] == "SKIP"

    def _loss_scale_of_step(self) -> float:
        scale = getattr(self, "grad_scale", None)
        return 1.0 if scale is None else float(scale)

    def _gradients(self) -> dict[int, torch.Tensor]:
        """Flat gradients by manifest index."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) in self._frozen:
                    raise RuntimeError(f"parameter {self._frozen[id(parameter)]!r} was frozen when the job was joined, so the servers hold "
                                       "no optimizer state for it; unfreeze before the first step")
        gradients = {}
        for index, parameter in self._trained.items():
            if parameter.grad is not None:
                if parameter.grad.is_sparse:
                    raise ValueError(f"the gradient of {self._job.entries[index].name!r} is sparse; use sparse=False in the embedding")
                gradients[index] = parameter.grad.detach()
        return gradients

    def _commit(self, job: TrainingJob, gradients: dict[int, torch.Tensor], present: set[int], loss_scale: float) -> dict[str, Any]:
        flat = {index: gradient.reshape(-1) for index, gradient in gradients.items()}
        groups = [self._values(self.param_groups[number]) for number in self._group_order]
        if self._pusher is None:
            parts, absent = job.reduce(flat, present, self._reduced, loss_scale)
            return job.make_step(parts, None, groups, absent, loss_scale)
        parts: list[Part] = []

        def pushes() -> list[Any]:
            sent, under_way = self._pusher.finish(gradients, loss_scale, unscaled=getattr(self, "grad_scale", loss_scale) is None)
            others = [job.wire.part(index, gradient, loss_scale) for index, gradient in flat.items() if index not in sent]
            parts[:] = [*sent.values(), *others]
            return [*under_way, job.push(others, loss_scale)]
        absent = [index for index in self._trained if index not in gradients]
        return job.make_step(parts, pushes, groups, absent, loss_scale)

    def _check_own(self) -> None:
        if self._given_to is not None:
            raise RuntimeError(f"this {type(self).__name__} is a part of an orlop.{self._given_to}, which steps it: use that one")

    # What an algorithm adds.

    def _check_group(self, group: dict[str, Any]) -> None:
        for flag in ("amsgrad", "maximize", "differentiable", "capturable"):
            if group.get(flag):
                raise ValueError(f"{flag}=True is not offered by orlop.{type(self).__name__}")
        for option, words in OPTIONS.items():
            if group[option] not in words:
                raise ValueError(f"{option}={group[option]!r}; {' or '.join(map(repr, words))}")
        self._check_values(self._values(group))

    def _algorithm(self, group: dict[str, Any]) -> str:
        """As ConfigureOptimizer names it."""
        raise NotImplementedError

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        raise NotImplementedError

    def _needs_whole(self, group: dict[str, Any]) -> bool:
        """Whether each of its tensors must lie on one server."""
        return self.needs_whole_tensors

    def slots_of(self, parameter: torch.Tensor) -> tuple[str, ...]:
        """Of the state of one parameter on the servers."""
        return self.slots

    def _state_before_first_update(self, parameter: torch.Tensor) -> dict[str, Any]:
        """As torch's constructor makes it: nothing, but for Adagrad."""
        return {}

    def _check_values(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Invalid {_WORDS.get(name, name)}: {value}; finite and at least 0")
            if name in _BETAS and value >= 1:
                raise ValueError(f"Invalid {_BETAS[name]}: {value}; below 1")


_BETAS = {f"beta{place + 1}": f"beta parameter at index {place}" for place in range(3)} | {"alpha": "alpha value"}
_WORDS = {"lr": "learning rate", "eps": "epsilon value", "weight_decay": "weight_decay value", "momentum": "momentum value"}
_SUPERSEDED = ("a newer optimizer took over this session's job; a session trains one optimizer, give each its own: "
               "orlop.connect(session.address, job='another name')")
