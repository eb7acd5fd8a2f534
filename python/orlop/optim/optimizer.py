# One push, 1 of 8 (ARCHITECTURE.md); next: client/lanes/grpc_push.cc
"""``torch.optim`` optimizers whose state and arithmetic are on the servers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch

from .. import tensors
from ..errors import Superseded
from ..job.job import GRADIENT_WIRES, Part, TrainingJob, Workers, digests
from ..names import kept_here, step_count
from ..state import checkpoint
from ..state.checkpoint import Connection, View
from .connection import default_session
from .groups import Members, Params, check_numbers, check_options, entries_of, is_averaged_by_ddp, numbers
from .overlap import BackwardPusher

_SUPERSEDED = ("a newer optimizer took over this session's job; a session trains one optimizer, give each its own: "
               "orlop.connect(session.address, job='another name')")


class Optimizer(torch.optim.Optimizer):
    """The base of all optimizers: a step is push, commit, pull.

    Attributes
    ----------
    grad_norm : float
        Global norm of the last step's gradient, averaged and unscaled, before clipping. NaN before the first step.
    skipped : bool
        Whether the last step was skipped, on every server and rank, because a gradient was not finite.
    timings : dict of str to float
        Seconds of the last step: ``between`` (since the step before: forward and backward), ``reduce``, ``push``, ``commit``,
        ``pull`` (which waits for the apply), ``gather``, ``total``.
    needs_whole_tensors : bool
        Of the class: whether a step makes a pass over a whole tensor before it updates any element. A job that is created for such an
        optimizer has each of its parameters on one server (``TensorSpec.whole``).
    """

    needs_whole_tensors: bool = False

    slots: tuple[str, ...] = ()  # names of the optimizer states, as in torch
    _kernel: str  # name of the servers' optimizer
    _numbers: tuple[str, ...] = ()  # options of a group that the servers read at every step
    _betas = 2  # how many values the option betas has
    _given_to: str | None = None  # the optimizer that this one is a part of
    _steps_here = False  # this process steps the parameters and the servers store them: nothing is pulled after a step
    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves unscaling and the check for infinities to this class
    _grad_scale: torch.Tensor | float | None = 1.0  # a GradScaler's, also after a step that raised; None: it has unscaled the gradients
    _stale_weights = False  # the gradients in hand were computed with weights that the servers' have just replaced

    def __init__(self, params: Params, defaults: dict[str, Any], *, session: Connection | None = None, state: str = "8bit",
                 rounding: str = "no_zero", master: str = "exact", max_norm: float | None = None, overlap: str | None = None,
                 accumulation_steps: int | None = None, gradient_wire: str | None = None) -> None:
        if gradient_wire not in GRADIENT_WIRES:
            raise ValueError(f"gradient_wire={gradient_wire!r}; one of {', '.join(map(repr, GRADIENT_WIRES))}")
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
        self._members = Members([], None)
        self._reduced = False  # another library averages the gradients over the ranks
        self._pending_state: dict[str, Any] | None = None
        self._loaded_name = False  # a state_dict that names the job's tensors was loaded before the join
        self._counts: dict[int, int] = {}  # updates that the servers have made, by manifest index
        self._last_end = time.perf_counter()
        self.grad_norm = math.nan
        self.skipped = False
        self.timings: dict[str, float] = {}
        super().__init__(params, defaults | {"state": state, "rounding": rounding, "master": master})
        if self._session is None:
            with suppress(RuntimeError):  # a session may be opened later, before the first step
                self._session = default_session()
        if self._session is not None:
            self._session.claim(self)

    # What users call.

    @property
    def grad_scale(self) -> torch.Tensor | None:
        """Set and deleted by a GradScaler around a step. It has no value to read: torch's leaves it after a step that raised, and would
        multiply the scale of the next by it."""
        raise AttributeError("grad_scale is for a GradScaler to set")

    @grad_scale.setter
    def grad_scale(self, scale: torch.Tensor | None) -> None:
        self._grad_scale = scale

    @grad_scale.deleter
    def grad_scale(self) -> None:
        vars(self).pop("_grad_scale", None)

    @property
    def attached(self) -> bool:
        """Whether the job is joined."""
        return self._job is not None

    @property
    def session(self) -> Connection:
        """The session given, or the default one."""
        self._check_own()
        if self._session is None:
            self._session = default_session()
            self._session.claim(self)
        return self._session

    @torch._disable_dynamo  # as torch's zero_grad: what is remote has no place in a compiled graph
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Pushes the gradients, commits the step, and returns when the new weights are in the parameters.

        A `closure` computes the loss and the gradients, and step() returns its value. It runs once, with gradients enabled, after the job
        is joined and before the gradients are read. If it raises, on any rank, no rank makes a step.

        Parameters without a gradient keep their values, as in torch. If a gradient is not finite, the whole job skips the step. A step of
        which a GradScaler has found that on any rank is not sent at all: the job's step stays, too. Edits of ``param_groups`` are read at
        every step: values, and parameters that move between groups.

        After an exception, call step() again, in a distributed run on every rank. Not after Ctrl-C, which can leave ranks out of step.
        The call first brings the weights of the last committed step. If the step that raised was committed after all and the gradients
        are unchanged, it does no more; otherwise it makes a step with the present gradients. So a repeated step counts once, and new
        gradients always count. The forward of a bound model brings the weights, too (with several processes: one that records
        gradients).

        Raises
        ------
        orlop.EditedWeights
            Something else changed a parameter, by whatever route; ``session.store(model)`` keeps the edit, ``session.load(model)`` undoes
            it. Nothing has been sent then.
        orlop.Superseded
            A newer optimizer has the session's job.
        RuntimeError
            A GradScaler calls step() with a closure.
        ValueError
            A group asks for what the servers cannot do, or an option has changed that was fixed when the job was joined (``state``,
            ``rounding``, ``master``, ``decoupled_weight_decay``). Nothing has been sent then.
        """
        self._check_own()
        loss = self._evaluate(closure) if closure is not None else None
        begin = time.perf_counter()
        if not self.attached:
            self.attach()
            if self._stale_weights:
                return None
        self.apply_loaded()
        job = self._job
        gradients, groups = job.workers.together(self._checked)
        seconds = dict.fromkeys(("reduce", "push", "commit", "pull", "gather"), 0.0) | {"between": begin - self._last_end}
        job.traffic.seconds = seconds
        loss_scale = self._loss_scale_of_step()
        configuration = self._configuration(groups)
        present, stopped, changed, moved, overflowed = job.survey(gradients, configuration, self._found_inf())
        if stopped and self._catch_up(job) and not changed:
            job.attempt.finish()
            return loss
        if overflowed:
            self.take_back("a gradient was not finite")
            self.grad_norm, self.skipped = math.nan, True
        else:
            if moved:
                job.configure(configuration)
            job.attempt.begin(gradients, pulls=not self._steps_here)
            self._note(self._commit(job, gradients, [self._values(group) for group, _ in groups], present, loss_scale))
        if not self.skipped:
            for index in present:
                self.state[self._members.trained[index]]["step"] += 1
                self._counts[index] += 1
            if not self._steps_here:
                job.traffic.pull_tracked()
        job.attempt.finish()
        self._last_end = time.perf_counter()
        self.timings = job.traffic.seconds | {"total": self._last_end - begin}
        return loss

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. Gradients that were pushed during backward and not committed are taken back."""
        self.take_back("zero_grad")
        if self._job is not None:
            self._job.attempt.forget_gradients()
        super().zero_grad(set_to_none)

    def take_back(self, reason: str) -> None:
        """Drops gradients that were pushed during backward and not committed. `reason` is for the servers' logs."""
        if self._pusher is not None and self._job is not None and self._job.attempt.is_open:
            self._pusher.drop()  # the attempt ends anyway
        elif self._pusher is not None:
            self._pusher.abort(reason)

    def before_forward(self) -> None:
        """Joins the job, or brings the weights that a step which raised did not."""
        if not self.attached:
            self.attach()
        elif not self._job.attempt.is_behind and self._pending_state is None:
            return
        elif self._job.workers.alone or torch.is_grad_enabled():  # one rank may evaluate alone
            if self._job.attempt.is_behind:
                self._catch_up(self._job)
            self.apply_loaded()

    def apply_loaded(self) -> None:
        """Has the servers take a state that :meth:`load_state_dict` was given, with the weights that are in the model now.

        It waits for the next forward of a bound model or the next step, so that a model's and an optimizer's state_dict can be loaded one
        after the other, in any order, and become one version on the servers. All ranks call it.
        """
        job = self._job
        if self._pending_state is None or job is None:
            return
        edited = job.changed_anywhere([job.entries[index] for index in job.traffic.tracked])
        self._load_pending(lambda: [job.edited_part(index) for index in edited], are_some=bool(edited))
        job.traffic.pull([job.entries[index] for index in (edited if job.workers.alone else job.traffic.tracked)])

    def last_backward(self) -> AbstractContextManager[None]:
        """A context for the last backward of a step: with ``overlap="backward"`` its gradients are pushed as they arrive."""
        return self._pusher.last_backward() if self._pusher is not None else nullcontext()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, before the first step. RuntimeError after it."""
        self._check_own()
        if getattr(self, "_job", None) is not None:
            raise RuntimeError(f"job {self._job.name!r} has its parameters fixed: add_param_group comes before the first step")
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except BaseException:
            del self.param_groups[-1]
            raise
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter]["step"] = step_count(0)

    def state_dict(self, full: bool = False, format: str = "torch") -> dict[str, Any]:
        """The optimizer's state, with what users and hooks have put into ``optimizer.state`` beside it.

        Parameters
        ----------
        full : bool
            False: plain values only (job, step, arithmetic version, groups). The tensors stay on the servers, where the next run finds
            them. True: torch's own format with the tensors, which are read from the servers one after another. ``torch.optim`` can load
            it. Loaded here, with the same weights in the model, training goes on bit for bit, in 8 bit and half precision too
            (stochastic rounding depends on job and step, so in another job it draws other numbers).
        format : str
            With `full`: ``"torch"``, ``"bitsandbytes"`` or ``"torchao"`` (Adam and AdamW). In the last two 8-bit states are the servers'
            codes and scales, bit for bit, which those libraries' optimizers load and go on with.

        Returns
        -------
        dict

        Raises
        ------
        ValueError
            The library lacks something that this optimizer does, e.g. Nesterov momentum; the message names it.
        """
        if self._pending_state is not None or full and self._loaded_name:  # the servers have the tensors
            self.attach()
            self.apply_loaded()
        with self._without_hooks("_optimizer_state_dict_post_hooks") as hooks:  # they see the whole, as torch's do
            state_dict = checkpoint.save(self._view(), super().state_dict(), full, format)
        for hook in hooks:
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    @torch.inference_mode(False)  # as attach
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the groups of a state_dict, and its tensors if it has them.

        It may come from :meth:`state_dict`, from an optimizer of torch, bitsandbytes (8 or 32 bit) or torchao. Quantised states keep their
        codes bit for bit where the servers hold the same format (8 bit; the library's code book within 2 ulp of the closed form).
        Elsewhere they are decoded with the stored code book, which is exact, and requantised if need be.

        Raises
        ------
        ValueError
            A plain state_dict is of another job or step than the servers hold; the message says what they hold. Or something in a state
            is not understood; the message names tensor, value and limit. Nothing has changed then.
        """
        self._check_own()
        with self._without_hooks("_optimizer_load_state_dict_pre_hooks") as hooks:
            for hook in hooks:
                changed = hook(self, state_dict)
                state_dict = state_dict if changed is None else changed
            view, joined = self._view(), self._job is not None
            checkpoint.check_sizes(view, state_dict)
            state_dict = checkpoint.to_torch(view, state_dict)
            checkpoint.check_available(view, state_dict)
            kept = checkpoint.without_tensors(view, state_dict)
            kept["param_groups"] = [self._loaded(group) for group in kept["param_groups"]]
            if joined:
                self._members.groups([group | {"params": own["params"]} for group, own in zip(kept["param_groups"], self.param_groups)])
            for group in kept["param_groups"]:
                self._check_group(group)
            super().load_state_dict(kept)
        waits = checkpoint.replaces_states(view, state_dict)
        self._pending_state = checkpoint.copied(state_dict) if waits else None
        self._loaded_name = not joined and not waits and bool(state_dict.get(checkpoint.KEY, {}).get("step"))
        if waits:
            checkpoint.set_counts(self._view(), state_dict)
            self._note_counts()
        elif joined:
            self._read_counts(self._job)

    @contextmanager
    def _without_hooks(self, kind: str) -> Iterator[list[Callable[..., Any]]]:
        """The user's hooks of one kind. Inside the context torch's own method does not call them."""
        hooks, empty = getattr(self, kind), type(getattr(self, kind))()
        setattr(self, kind, empty)
        try:
            yield list(hooks.values())
        finally:
            setattr(self, kind, hooks)

    @torch.inference_mode(False)  # the first forward may be in inference mode, and steps write to the tensors that are made here
    @torch.no_grad()
    def attach(self, keep_weights: bool = False) -> None:
        """Joins the job now. Otherwise the first forward of a bound model or the first step does.

        A new job takes rank 0's weights. The weights of an existing job are written into the parameters, unless `keep_weights` says that
        they are about to be replaced.
        """
        if self.attached:
            return
        session = self.session
        if session.optimizer is not self:
            raise Superseded(_SUPERSEDED)
        self._settle()
        for group in self.param_groups:
            self._check_group(group)
        job = session.training_job(Workers().together(
            lambda: entries_of(session.model, self.param_groups, self._needs_whole, session.store_frozen)))
        self._members = Members(self.param_groups, job)
        job.workers.check_same([(job.entries[index].name, "trained") for index in self._members.trained])
        job.configure(self._configuration(self._members.groups(self.param_groups)))
        job.join(self._layout(job))
        job.traffic.track(list(self._members.trained), self._gradient_wire, self._steps_here)
        self._job = job
        self._stale_weights = False
        try:
            if job.loading:
                self._tell_differing(job)
                self._load_all(job)
            else:
                self._resume(job, keep_weights)
        except BaseException:
            self._job = None  # so that the next forward or step joins again
            job.leave()
            raise
        self._note_counts()
        self._tell_kept(job)
        if self._pusher is not None:
            self._pusher.attach(job, self._members.trained, lambda: session.loss_scale)

    def detach(self) -> None:
        """Pushes no more, since a newer optimizer has the job."""
        if self._pusher is not None:
            self._pusher.detach()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled: its state is on the servers; use state_dict()")

    # Attaching.

    def _load_all(self, job: TrainingJob) -> None:
        """Sets all tensors of the job to their values here, and the state that load_state_dict was given."""
        stay = job.staying(self._members.trained)
        self._load_pending(lambda: [job.weight_part(entry) for index, entry in enumerate(job.entries) if index not in stay])
        job.traffic.unset = stay
        if job.workers.alone:
            job.traffic.held.note(range(len(job.entries)))
        else:
            job.traffic.pull(job.entries)
            job.traffic.held.note(stay)

    def _resume(self, job: TrainingJob, keep_weights: bool) -> None:
        job.set_trained(self._members.trained)
        job.traffic.held.note(index for index in job.traffic.unset if index not in job.traffic.held)
        loaded_over = not keep_weights and job.workers.run_first(lambda: self._replaces_weights(job))
        if loaded_over:
            if job.workers.rank == 0:
                print(f"orlop: job {job.name} exists: its weights of step {job.step} are replaced by the model's, to which the loaded "
                      "optimizer state belongs", flush=True)
            self._load_all(job)
            return
        if not keep_weights:
            self._bring(job)
            if job.workers.rank == 0:
                print(f"orlop: job {job.name} exists: its weights of step {job.step} are in the model now"
                      + ("; this first gradient belongs to other weights and is dropped (session.bind(model) avoids that)"
                         if self._stale_weights else ""), flush=True)
        self._read_counts(job)
        self.apply_loaded()

    def _bring(self, job: TrainingJob) -> None:
        """Writes the servers' weights into the model, and the other tensors with them if these weights are others than the model had.

        If they are the same, the model is of this step already, and its buffers and frozen tensors may be newer than the servers'.
        """
        trained = list(self._members.trained.values())
        entries = [job.entries[index] for index in job.traffic.tracked]
        job.workers.together(lambda: self._check_handed_over(job))
        before = digests(trained)
        job.traffic.pull(entries)
        changed = digests(trained) != before
        replaced, self._stale_weights = job.workers.any_of([changed, changed and any(p.grad is not None for p in trained)])
        if replaced:
            job.traffic.pull([entry for index, entry in enumerate(job.entries) if index not in self._members.trained])

    @staticmethod
    def _check_handed_over(job: TrainingJob) -> None:
        """Raises EditedWeights if another optimizer of this session trained the parameters and something else has changed them since."""
        if any(index in job.traffic.held for index in job.traffic.tracked):
            job.traffic.check_unedited()

    def _replaces_weights(self, job: TrainingJob) -> bool:
        """Whether the model's weights go to an existing job with the loaded state, because the state belongs to them.

        Raises
        ------
        orlop.EditedWeights
            The state belongs neither to the model's weights nor to the job's, and the model's are an edit of the job's.
        ValueError
            The state belongs neither to the model's weights nor to the job's.
        """
        if self._pending_state is None or checkpoint.fits(self._view(), self._pending_state, lambda index: job.entries[index].tensor):
            return self._pending_state is not None
        if checkpoint.fits(self._view(), self._pending_state, job.traffic.stored):
            return False
        self._check_handed_over(job)
        raise ValueError(f"the optimizer state that was loaded belongs to other weights than those of the model and of job {job.name!r} at "
                         f"step {job.step}: load the model's state_dict of the same checkpoint, too, before the first step; nothing has "
                         "changed on the servers")

    def _tell_differing(self, job: TrainingJob) -> None:
        differing = job.differing()
        if job.workers.rank == 0 and differing is not None:
            print(f"orlop: job {job.name}: the ranks began with different weights (first in {differing!r}); all have those of rank 0 now",
                  flush=True)

    def _tell_kept(self, job: TrainingJob) -> None:
        kept = kept_here(self.session.model) if self.session.model is not None and job.workers.rank == 0 else {}
        if kept:
            (name, reason), more = next(iter(kept.items())), f" and {len(kept) - 1} more" if len(kept) > 1 else ""
            print(f"orlop: job {job.name} leaves {name!r}{more} in this process, since the servers cannot hold it: {name!r} is {reason}",
                  flush=True)

    def _read_counts(self, job: TrainingJob) -> None:
        counts = {t["index"]: t["applied_count"] for t in self.session.client.list_tensors(job.name)}
        for index, parameter in self._members.trained.items():
            self.state[parameter]["step"] = step_count(counts.get(index, 0))
        self._note_counts()

    def _note_counts(self) -> None:
        """Remembers the update counts that are in ``state``, which nobody else may change."""
        if self._job is not None:
            self._counts = {index: int(self.state.get(parameter, {}).get("step", 0)) for index, parameter in self._members.trained.items()}

    def _layout(self, job: TrainingJob) -> dict[str, Any]:
        """What each rank pushes (``ContributionLayout``)."""
        alone = job.workers.alone
        self._reduced = is_averaged_by_ddp(self.session.model, self.param_groups) and not alone
        if self._pusher is not None and self._reduced:
            raise ValueError("overlap='backward' would read gradients before DDP has averaged them: use it without DDP (the servers "
                             "average then), or leave overlap out")
        distributed = [index for index in self._members.trained if index in job.traffic.boxes]
        if distributed and self._pusher is not None:
            raise ValueError("overlap='backward' pushes whole gradients from every rank, and no rank has a whole one of parameter "
                             f"{job.entries[distributed[0]].name!r}, a DTensor: leave overlap out")
        for index in distributed if self._gradient_wire == "int8" else ():
            if any(box is not None and isinstance(box[0], tuple) for box in job.traffic.boxes[index]):
                raise ValueError(f"gradient_wire='int8' sends ranges of flat tensors; parameter {job.entries[index].name!r} has placements "
                                 f"{job.entries[index].tensor.placements}: use 'bf16'")
        if distributed:
            return job.traffic.layout(list(self._members.trained))
        if alone:
            return {"mode": "EXACTLY_ONCE", "preset": "WHOLE"}
        if self._pusher is not None:
            return {"mode": "SUM", "preset": "WHOLE"}
        return {"mode": "EXACTLY_ONCE", "preset": "FLAT_SLICES", "reduced_from": job.workers.world_size}

    @torch.inference_mode(False)
    @torch.no_grad()
    def _load_pending(self, weights: Callable[[], list[Part]], are_some: bool = True) -> None:
        """Makes a LOAD step of weights and of the optimizer state that load_state_dict was given, unless there is nothing to set."""
        view, pending = self._view(), self._pending_state
        loaded = checkpoint.parts(view, pending) if pending is not None else []
        masters = {index for index, slot, *_ in loaded if slot == "master"}
        if loaded or are_some:
            self._job.load(lambda: [part for part in weights() if part[0] not in masters] + loaded)
        if pending is not None:
            checkpoint.set_counts(view, pending)
            checkpoint.keep_untrained(view, pending)
            self._pending_state = None

    def _view(self) -> View:
        model = self._session.model if self._session is not None else None
        return View(kind=type(self).__name__, slots=self.slots, groups=self.param_groups, state=self.state,
                    names={id(p): name for name, p in model.named_parameters()} if model is not None else {},
                    job=self._job, find_session=lambda: self.session, slots_of=self.slots_of,
                    state_before_first_update=self._state_before_first_update)

    # Stepping.

    @torch.enable_grad()
    def _evaluate(self, closure: Callable[[], float]) -> float:
        """Calls a closure at the servers' weights. If it raises on one rank, every rank raises."""
        if "_grad_scale" in vars(self):
            del self.grad_scale  # torch's GradScaler would leave both to later steps
            vars(self).pop("found_inf", None)
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        joined = self.attached
        self.before_forward()
        self._job.workers.together(self._job.traffic.check_unedited)  # an edit is refused before the closure counts as run
        if not joined and self._stale_weights:
            self.zero_grad()  # else the closure may add to gradients of other weights
        try:
            return self._job.workers.together(closure)
        except BaseException:
            self.take_back("the closure raised")
            raise

    def _checked(self) -> tuple[dict[int, torch.Tensor], list[tuple[dict[str, Any], list[int]]]]:
        """What this rank pushes, by manifest index, and the groups of :meth:`Members.groups`.

        It raises if this rank must not make a step.
        """
        if self.session.optimizer is not self:
            raise Superseded(_SUPERSEDED)
        self._job.traffic.check_unedited()
        groups = self._members.groups(self.param_groups)
        for group in self.param_groups:
            self._check_group(group)
        gradients, slots = self._gradients(), self.slots
        for group, indexes in groups:
            for index in indexes:
                name, parameter = self._job.entries[index].name, self._members.trained[index]
                self._check_state(name, self.state.get(parameter, {}), slots, self._counts[index])
                if index in gradients:
                    self._check_update(group, parameter, name)
        return gradients, groups

    @staticmethod
    def _check_state(name: str, state: dict[str, Any], slots: tuple[str, ...], count: int) -> None:
        """Raises if the state of a parameter was edited here, where the servers do not see it."""
        if "step" not in state:
            raise RuntimeError(f"the state of parameter {name!r} was removed from optimizer.state, but the servers have it: "
                               "load_state_dict with a state of before the first step makes it new")
        if state["step"] != count:
            raise RuntimeError(f"step of parameter {name!r} was set to {float(state['step']):g} in optimizer.state, but the servers have "
                               f"made {count} updates: use load_state_dict")
        for slot in slots:
            if slot in state:
                raise RuntimeError(f"{slot} of parameter {name!r} was set in optimizer.state, but the servers have it: use load_state_dict")

    def _configuration(self, groups: list[tuple[dict[str, Any], list[int]]]) -> dict[str, Any]:
        return {"groups": self._members.configuration(groups, self._algorithm), "max_norm": self._max_norm or 0.0, "reduce": "mean"}

    @torch.no_grad()
    @torch.inference_mode(False)  # as attach
    def _catch_up(self, job: TrainingJob) -> bool:
        """Ends what a call that raised left half made. Whether that was a step, and is committed."""
        if job.attempt.is_behind:
            self.take_back("a call before raised")
        decision = job.attempt.catch_up()
        if decision is not None:
            self._note(decision)
            self._read_counts(job)
        return decision is not None

    def _note(self, decision: dict[str, Any]) -> None:
        self.grad_norm = decision["gradient_norm"]
        self.skipped = decision["outcome"] == "SKIP"

    def _loss_scale_of_step(self) -> float:
        return 1.0 if self._grad_scale is None else float(self._grad_scale)

    def _found_inf(self) -> bool:
        """Whether a GradScaler found a gradient of this step not to be finite. Gradients may have been made finite since."""
        return float(getattr(self, "found_inf", 0.0)) != 0.0

    def _gradients(self) -> dict[int, torch.Tensor]:
        return self._members.gradients()

    def _commit(self, job: TrainingJob, gradients: dict[int, torch.Tensor], groups: list[dict[str, float]], present: set[int],
                loss_scale: float) -> dict[str, Any]:
        flat = {index: tensors.like(gradient, self._members.trained[index]) for index, gradient in gradients.items()}
        if self._pusher is None:
            parts, absent = job.traffic.reduce(flat, present, self._reduced, loss_scale)
            return job.make_step(parts, None, groups, absent, loss_scale)
        parts: list[Part] = []

        def pushes() -> list[Any]:
            sent, under_way = self._pusher.finish(gradients, loss_scale, unscaled=self._grad_scale is None)
            others = [job.traffic.wire.part(index, gradient, loss_scale) for index, gradient in flat.items() if index not in sent]
            parts[:] = [*sent.values(), *others]
            return [*under_way, job.traffic.push(others, loss_scale)]
        absent = [index for index in self._members.trained if index not in gradients]
        return job.make_step(parts, pushes, groups, absent, loss_scale)

    def _check_own(self) -> None:
        if self._given_to is not None:
            raise RuntimeError(f"this {type(self).__name__} is a part of an orlop.{self._given_to}, which steps it: use that one")

    # What a class adds.

    def _settle(self) -> None:
        """Chooses what the servers hold, before the job is joined."""

    def _loaded(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group of a state_dict, as this class takes it."""
        return group

    def _check_group(self, group: dict[str, Any]) -> None:
        check_options(group, type(self).__name__)
        self._check_values(self._values(group))

    def _check_update(self, group: dict[str, Any], parameter: torch.Tensor, name: str) -> None:
        """Raises if the servers' next update of a parameter would not be torch's."""

    def _algorithm(self, group: dict[str, Any]) -> str:
        """The servers' optimizer for a group (``ConfigureOptimizer``)."""
        return self._kernel

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        """The hyper-parameters of a group, which every step sends."""
        return numbers(group, self._numbers, self._betas)

    def _check_values(self, values: dict[str, float]) -> None:
        check_numbers(values)

    def _needs_whole(self, group: dict[str, Any]) -> bool:
        """Whether each tensor of a group must be on one server."""
        return self.needs_whole_tensors

    def slots_of(self, parameter: torch.Tensor) -> tuple[str, ...]:
        """Names of the states that the servers keep of one parameter."""
        return self.slots

    def _state_before_first_update(self, parameter: torch.Tensor) -> dict[str, Any]:
        """The state that torch's constructor makes: none, except for Adagrad."""
        return {}
