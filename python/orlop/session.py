"""A connection to the servers and one job on them."""

from __future__ import annotations

import atexit
import os
import subprocess
import threading
import time
import warnings
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from . import _core, names, tensors
from .errors import EditedWeights, NotFound
from .job.job import TrainingJob, Workers
from .local import LocalServers, find_binary, start_for_group
from .optim import opened

_DTYPE_OF_SLOT = {"remainder": torch.int16}


class Trainer(Protocol):
    """What a session needs of the optimizer that trains its job."""

    def attach(self, keep_weights: bool = False) -> None:
        """Joins the job."""

    def detach(self) -> None:
        """Pushes no more, since a newer optimizer has the job."""

    def take_back(self, reason: str) -> None:
        """Drops what was pushed and not committed."""

    def before_forward(self) -> None:
        """Joins the job, or brings the weights that a step which raised did not."""

    def apply_loaded(self) -> None:
        """Has the servers take a state that load_state_dict was given."""


@atexit.register
def _expect_daemon_threads() -> None:
    """Turns nanobind's leak messages off if a daemon thread is still running.

    Python stops such a thread wherever it is and never releases what its frames refer to, e.g. the client of a call that has not returned.
    That is no fault of the extension. The sessions are not closed here: the thread would raise, and its traceback would be printed
    instead. If no other thread is running, everything is released, and a message would show a fault of the bindings.
    """
    if threading.active_count() > 1:
        _core.set_leak_warnings(False)


# A forked child ends with frames of threads that it does not have. What they refer to is never released.
os.register_at_fork(after_in_child=lambda: _core.set_leak_warnings(False))


class _ForwardHook:
    """The hook in a bound model. Copies and pickles of the model get a hook that does nothing."""

    def __init__(self, session: Session | None) -> None:
        self._session = session

    @torch._disable_dynamo  # torch.compiler.disable, which would import the compiler with this package
    def __call__(self, module: torch.nn.Module, inputs: Any) -> None:
        if self._session is not None:
            self._session._before_forward()

    def __reduce__(self) -> tuple[Any, ...]:
        return _ForwardHook, (None,)


class Session:
    """A job on a cluster of servers, as one worker sees it. Made by :func:`orlop.local` and :func:`orlop.connect`.

    Attributes
    ----------
    job : str
        Name of the job.
    address : str
        Server connected to; ``orlop --server ADDRESS`` takes it too.

    Examples
    --------
    >>> import torch, orlop
    >>> with orlop.local() as session:
    ...     model = session.bind(torch.nn.Linear(2, 1))
    ...     optimizer = orlop.AdamW(model.parameters())
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    ...     session.step
    1
    """

    def __init__(self, client: _core.Client, address: str, job: str, servers: LocalServers | None = None,
                 tls: tuple[str, str, str] = ("", "", "")) -> None:
        self.job = job
        self.address = address
        self.loss_scale = 1.0  # the factor that orlop.GradScaler last multiplied a loss by
        self._process = os.getpid()
        self._client: _core.Client | None = client
        self._servers = servers
        self._tls = tls  # certificate, key, authority
        self._model: torch.nn.Module | None = None
        self.store_frozen = False  # whether bind() asked for frozen parameters on the servers
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._owner: weakref.ref[Trainer] | None = None
        self._training: TrainingJob | None = None
        opened.append(self)

    # What users call.

    def bind(self, model: torch.nn.Module, store_frozen: bool = False) -> torch.nn.Module:
        """Names the tensors of a job after a model's, and lets the model's first forward join the job.

        Nothing remote happens here. Wrapped models (DDP, ``torch.compile``) may be bound: the wrappers' prefixes are removed from names.
        Bind the DDP wrapper itself, so that its averaging of the gradients is not repeated, and a model of ``fully_shard`` or
        ``parallelize_module`` as it is.

        Buffers and frozen parameters that the servers cannot hold (complex, float8, sparse, quantised, tensor subclasses) stay in this
        process; a line names one when the job is joined.

        Frozen parameters that no optimizer has stay in this process as well, until they change: then :meth:`store`, :meth:`export` and
        :meth:`close` store them. A later run must bring the same ones (a pretrained base does), and is refused if it does not.

        Parameters
        ----------
        model : torch.nn.Module
        store_frozen : bool
            Whether a new job stores frozen parameters with the others, so that a later run, a reader and ``orlop export`` get them.

        Returns
        -------
        torch.nn.Module
            The same model.

        Raises
        ------
        RuntimeError
            The job is joined already.
        """
        if self._training is not None:
            raise RuntimeError(f"job {self.job!r} is joined already: bind the model before the first step")
        self._model, self.store_frozen = model, store_frozen
        self._put_hook()
        return model

    def store(self, model: torch.nn.Module) -> int:
        """Writes this model's weights and buffers to the servers, as a step of its own. Optimizer states keep their values.

        Call it after every edit of weights (``load_state_dict``, clamping). The next ``optimizer.step()`` raises if it was forgotten.
        Only tensors that differ from the servers' are sent, and no step is made if none does. In a 16-bit parameter the elements that do
        not differ keep their exact fp32 masters.

        With several processes all of them call it; rank 0's values are stored.

        Returns
        -------
        int
            The step made, or the last one.

        Raises
        ------
        ValueError
            The job has no tensor of such a name, or one of another shape.
        """
        if self._model is None and self._training is None:
            self.bind(model)
        optimizer = self.optimizer
        if optimizer is not None:
            optimizer.attach(keep_weights=True)
            optimizer.take_back("store")
            optimizer.apply_loaded()
        entries = names.of_model(model)
        job = self._training if self._training is not None else self.training_job(names.of_model(self._model))
        if not job.joined:
            job.join_frozen()
        if self._model is None:  # an optimizer of named parameters has the job, which lacks the model's other tensors
            entries = [entry for entry in entries if entry.name in job.known_of(entries)]
        return job.store(job.matching(entries))

    def load(self, model: torch.nn.Module) -> int:
        """Writes the servers' weights into this model, bit for bit: it undoes edits that were not stored, e.g. averaged weights that were
        swapped in for an evaluation.

        Of the model that is trained it writes the parameters that the optimizer trains. Its buffers and frozen parameters, which this
        process changes itself, keep their values. Of another model, or before this process has joined the job, it writes all tensors that
        the servers have; frozen parameters that stayed with their worker keep their values.

        Returns
        -------
        int
            The step whose weights these are.

        Raises
        ------
        orlop.NotFound
            There is no such job, or it has no tensor of such a name.
        ValueError
            The job has a tensor in another shape or dtype.
        """
        entries = names.of_model(model)
        if self._training is not None:
            known = self._training.known_of(entries)
            own = [entry for entry in entries if entry.name in known and known[entry.name].tensor is entry.tensor]
            self._training.traffic.pull([entry for entry in own if self._training.traffic.trains(self._training.index_of(entry.tensor))])
            entries = [] if own else entries
        for entry in entries:
            try:
                value = self._stored(entry.name, "weight")
            except NotFound as error:
                if error.reason != "UNSET":
                    raise
                continue
            if value.shape != entry.tensor.shape or value.dtype != entry.tensor.dtype:
                raise ValueError(f"tensor {entry.name!r} is {entry.tensor.dtype} of shape {list(entry.tensor.shape)}; job "
                                 f"{self.job!r} has it as {value.dtype} of shape {list(value.shape)}")
            tensors.copy(entry.tensor, value)
        return self.step

    def get(self, name: str, slot: str = "weight") -> torch.Tensor:
        """Reads one tensor or one of its states from the servers, as of the step committed now.

        If the job makes steps faster than the bytes arrive, the version is held until they have. Otherwise the job is not disturbed.

        Parameters
        ----------
        name : str
            Tensor, by any of its names.
        slot : str
            ``"weight"`` (the manifest's dtype), ``"master"``, ``"exp_avg"``, ``"exp_avg_sq"``, ``"momentum_buffer"``, ... (all fp32), or
            ``"remainder"`` (int16). ``"row_var"`` and ``"col_var"`` have torch's shapes: 1 in the last dimension, or in the one before it.

        Returns
        -------
        torch.Tensor
            On the CPU, of the slot's shape.

        Raises
        ------
        orlop.NotFound
            No such job or tensor.
        orlop.InvalidArgument
            The tensor has no such slot.
        """
        if self.optimizer is not None and self._training is not None and self._training.workers.alone:
            self.optimizer.apply_loaded()
        own = self._changed_here(name) if slot in ("weight", "master") else None
        if own is not None:
            return own.detach().cpu().clone() if slot == "weight" else own.detach().cpu().float()
        return self._stored(name, slot)

    @property
    def step(self) -> int:
        """The job's committed step; 0 before there is a job. Stored weights and edits count as steps too."""
        if self._training is not None:
            return max(self._training.step, 0)
        try:
            return max(self.client.job_status(self.job)["committed_step"], 0)
        except NotFound:
            return 0

    def recovered(self, timeout_seconds: float) -> int | None:
        """Waits until servers that were just started agree on the job's committed step; None if there is no job or no weights.

        After `timeout_seconds` it returns the step that the servers report then.
        """
        deadline = time.monotonic() + timeout_seconds
        while (status := self.status()["job"]) is not None:
            if status["state"] not in ("RECOVERING", "WAITING") or time.monotonic() > deadline:
                return status["committed_step"] if status["committed_step"] >= 0 else None
            time.sleep(0.02)
        return None

    def status(self) -> dict[str, Any]:
        """The state of the job and of every server.

        Returns
        -------
        dict
            ``"job"``: None before there is one. ``"servers"``: for each its budget, bytes by use and the times of the last step.
        """
        try:
            job = self.client.job_status(self.job)
        except NotFound:
            job = None
        servers = [self.client.server_status(server["name"]) for server in self.client.list_servers()]
        return {"job": job, "servers": servers}

    def checkpoint(self) -> int:
        """Has the servers write the job's committed step to their disks, and waits until it is there.

        If a server is killed later, the job can go back to this step. The servers also do it by themselves (``orlopd --flush-every``),
        and when they are stopped. Any process may call it, and several may at once.

        Returns
        -------
        int
            The step that is on disk.

        Raises
        ------
        orlop.ResourceExhausted
            A disk is full. The job goes on.
        orlop.Unavailable
            The job is recovering: nothing was written.
        """
        return self.client.flush_job(self.job)["step"]

    def export(self, path: str | Path, dtype: str = "fp32") -> None:
        """Writes the job's weights and buffers as a safetensors file.

        Buffers and frozen parameters of the bound model that have changed are stored first.

        With several processes all of them call it; rank 0 writes.

        Parameters
        ----------
        path : str or Path
        dtype : str
            ``"fp32"`` (the exact masters) or ``"bf16"``.

        Raises
        ------
        orlop.EditedWeights
            A trained parameter was changed outside the optimizer. ``session.store(model)`` keeps the change, ``session.load(model)`` undoes
            it.
        subprocess.CalledProcessError
            ``orlop export`` failed; its message is on stderr.
        """
        _core.check_process(self._process)
        job = self._training
        if job is not None and job.joined:
            job.workers.together(job.traffic.check_unedited)
            if self._model is not None:
                job.store(self._untrained())
        tls = [word for flag, path in zip(("--tls-cert", "--tls-key", "--tls-ca"), self._tls) if path for word in (flag, path)]
        Workers().run_first(lambda: subprocess.run(
            [find_binary("orlop"), "--server", self.address, *tls, "export", self.job, "--to", str(path), "--dtype", dtype],
            check=True, stdout=subprocess.DEVNULL))

    def close(self) -> None:
        """Ends the session. Servers that :func:`orlop.local` started write the job to disk and end, too.

        What differs from the servers' tensors is stored before, from rank 0, as a step of its own, so that the next run gets it with the
        weights: buffers (BatchNorm's statistics) and frozen parameters (a moving average) of the bound model, and, with a warning, edits
        of trained parameters that :meth:`store` has not stored. Nothing is stored if an exception leaves the ``with`` block or the process
        is killed: the next run then gets what the last step, close, :meth:`store` or :meth:`export` left.
        """
        try:
            self._store_changes()
        except Exception as error:  # the weights are safe, and closing goes on
            warnings.warn(f"changes of the model's tensors could not be stored: {error}", stacklevel=2)
        finally:
            self._end()

    def _store_changes(self) -> None:
        job = self._training
        if os.getpid() != self._process or job is None or not job.joined or job.loading:
            return
        if self._servers is not None and not self._servers.running:
            return
        if self.optimizer is not None and job.workers.alone:
            self.optimizer.apply_loaded()
        if job.workers.rank != 0:
            return
        boxes, edited = job.traffic.boxes, job.traffic.edited()
        changed = edited + (job.changed(self._untrained()) if self._model is not None else [])
        plain = [index for index in edited if index not in boxes]
        if plain:
            warnings.warn(f"parameter {job.entries[plain[0]].name!r} was changed outside the optimizer after step {job.step}, "
                          f"with {len(plain) - 1} others; the change is stored with the job", stacklevel=4)
        job.store_alone([index for index in changed if index not in boxes])
        for index in changed:
            if index in boxes:
                raise EditedWeights(f"{job.entries[index].name!r} is a DTensor, of which other ranks have parts: session.store(model) on "
                                    "all of them keeps its change")

    def _end(self) -> None:
        if self in opened:
            opened.remove(self)
        if self._hook is not None:
            self._hook.remove()
        self._training = None
        self._client = None
        if self._servers is not None:
            self._servers.stop()
            self._servers = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._end()

    def _stored(self, name: str, slot: str) -> torch.Tensor:
        handle = self._training.handle if self._training is not None else self.client.attach_job(self.job)
        named = ((index, spec) for index, spec in enumerate(handle.tensors) if name in (spec["name"], *spec["tied_names"]))
        index, spec = next(named, (None, None))
        if spec is None and self._model is not None and (reason := names.kept_here(self._model).get(name)) is not None:
            raise NotFound(f"job {self.job!r} has no tensor {name!r}, which is {reason}: it is in this process alone",
                           {"reason": "UNKNOWN_TENSOR", "tensor": name})
        if spec is None:
            raise NotFound(f"job {self.job!r} has no tensor {name!r}", {"reason": "UNKNOWN_TENSOR", "tensor": name})
        stored = names.TORCH_DTYPES[spec["dtype"].removeprefix("DTYPE_")]
        dtype = stored if slot == "weight" else _DTYPE_OF_SLOT.get(slot, torch.float32)
        out = torch.empty(names.shape_of(slot, spec["shape"]), dtype=dtype, device="cpu")
        handle.pull([(index, slot, names.DTYPE_NAMES[dtype], names.box_of(slot, spec["shape"]), out.view(-1), None)], latest=True)
        return out

    def _changed_here(self, name: str) -> torch.Tensor | None:
        """The bound model's tensor of a name, if this process changes it itself and the servers do not have its value yet."""
        job = self._training
        if job is None or not job.joined or self._model is None:
            return None
        entry = next((entry for entry in self._untrained() if name in (entry.name, *entry.tied_names)), None)
        if entry is None or tensors.is_distributed(entry.tensor):
            return None
        return entry.tensor if job.index_of(entry.tensor) in job.traffic.unset or job.changed([entry]) else None

    def _untrained(self) -> list[names.Entry]:
        """The job's entries of the bound model that no optimizer trains, with the model's values of now."""
        job = self._training
        assert job is not None and self._model is not None
        entries = names.of_model(self._model)
        known = job.known_of(entries)
        tracked = {job.entries[index].name for index in job.traffic.tracked}
        return job.matching([entry for entry in entries if entry.name in known and known[entry.name].name not in tracked])

    # What optimizers call.

    @property
    def client(self) -> _core.Client:
        if self._client is None:
            raise RuntimeError("this session is closed")
        _core.check_process(self._process)
        return self._client

    @property
    def model(self) -> torch.nn.Module | None:
        return self._model

    @property
    def optimizer(self) -> Trainer | None:
        """The optimizer made last for this session, if it still exists."""
        return self._owner() if self._owner is not None else None

    def claim(self, optimizer: Trainer) -> None:
        """Gives the job to the newest optimizer. The one before it raises Superseded at its next step."""
        before = self.optimizer
        if before is not None and before is not optimizer:
            before.detach()
        self._owner = weakref.ref(optimizer)
        if self._model is not None and self._client is not None:
            self._put_hook()

    def training_job(self, entries: list[names.Entry]) -> TrainingJob:
        """The job, created from these tensors on the first call."""
        if self._training is None:
            self._training = TrainingJob(self.client, self.job, entries)
        return self._training

    def _put_hook(self) -> None:
        """Puts the hook of the bound model before the others: a hook of ``fully_shard`` replaces the parameters for a forward."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._model.register_forward_pre_hook(_ForwardHook(self), prepend=True)

    def _before_forward(self) -> None:
        if os.getpid() != self._process:  # a forked child evaluates with the weights that it was given
            return
        optimizer = self.optimizer
        if optimizer is not None:
            optimizer.before_forward()


def connect(address: str, *, job: str = "default", tls_cert: str = "", tls_key: str = "", tls_ca: str = "",
            timeout_seconds: float = 60.0) -> Session:
    """Opens a session with running servers.

    Parameters
    ----------
    address : str
        ``"host:port"`` or ``"unix:/path"`` of any server of the cluster.
    job : str
        Name of the training run.
    tls_cert, tls_key, tls_ca : str
        PEM files for mutual TLS; all or none.
    timeout_seconds : float
        How long one call may take, retries included, without the time that its bytes need.

    Returns
    -------
    Session
        Also a context manager; the default session of optimizers made afterwards.

    Raises
    ------
    orlop.Unavailable, orlop.DeadlineExceeded
        No server answers at `address`.

    Examples
    --------
    >>> import orlop
    >>> with orlop.local() as mine, orlop.connect(mine.address, job="other") as session:
    ...     session.step
    0
    """
    client = _core.Client.connect(address, certificate=tls_cert, key=tls_key, authority=tls_ca, timeout_seconds=timeout_seconds)
    return Session(client, address, job, tls=(tls_cert, tls_key, tls_ca))


def local(directory: str | Path | None = None, servers: int = 1, memory: str = "4GiB", *, job: str = "default",
          timeout_seconds: float = 60.0, start_seconds: float = 120.0) -> Session:
    """Starts private servers for this process (or this ``torchrun`` group) and opens a session with them.

    Parameters
    ----------
    directory : str or Path, optional
        Where the state is kept. The next run with the same directory resumes, and a line says so. None: the state is dropped at the end.
    servers : int
        How many servers.
    memory : str
        Budget of each, e.g. ``"4GiB"``.
    job : str
        Name of the training run.
    timeout_seconds, start_seconds : float
        How long one call, and the start of the servers, may take.

    Returns
    -------
    Session
        Also a context manager. Servers end with the session or, whatever happens to it, with this process.

    Examples
    --------
    >>> import orlop
    >>> with orlop.local() as session:
    ...     session.status()["servers"][0]["ready"]
    True
    """
    children, address = start_for_group(directory, servers, memory, start_seconds)
    try:
        client = _core.Client.connect(address, timeout_seconds=timeout_seconds)
        session = Session(client, address, job, children)
    except BaseException:
        if children is not None:
            children.stop()
        raise
    if children is not None and directory is not None:
        step = session.recovered(start_seconds)
        if step is not None:
            print(f"resuming job {job} at step {step}", flush=True)
    return session
