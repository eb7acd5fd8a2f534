"""What the modules of this folder see of an optimizer and of its session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .. import _core
from ..job.job import TrainingJob
from ..names import Entry, step_count


class Connection(Protocol):
    """What an optimizer and its states need of a session (:class:`orlop.Session`)."""

    job: str
    loss_scale: float

    @property
    def client(self) -> _core.Client:
        """RuntimeError if the session is closed."""

    @property
    def model(self) -> torch.nn.Module | None:
        """The bound model."""

    @property
    def optimizer(self) -> Any:
        """The optimizer that has the job."""

    def get(self, name: str, slot: str = "weight") -> torch.Tensor:
        """Reads a slot of a tensor."""

    def claim(self, optimizer: Any) -> None:
        """Gives the job to an optimizer."""

    def training_job(self, entries: list[Entry]) -> TrainingJob:
        """The job, created from these tensors on the first call."""


@dataclass(frozen=True)
class View:
    """An optimizer as those see it who save and load its state.

    Attributes
    ----------
    kind : str
        Name of the optimizer's class.
    slots : tuple of str
        Names of its states.
    groups : list of dict
        Its ``param_groups``, not copied.
    state : dict
        Its ``state``, not copied: by parameter, ``"step"`` is the number of updates, a tensor.
    names : dict of int to str
        Names of the bound model's parameters by their ``id``; empty without a bound model.
    job : TrainingJob or None
        None before the optimizer has joined.
    find_session : callable
        Returns the session. RuntimeError if none is open.
    slots_of : callable
        Names of the states of one parameter.
    state_before_first_update : callable
        The state of one parameter that torch's constructor makes.
    """

    kind: str
    slots: tuple[str, ...]
    groups: list[dict[str, Any]]
    state: dict[torch.Tensor, Any]
    names: dict[int, str]
    job: TrainingJob | None
    find_session: Callable[[], Connection]
    slots_of: Callable[[torch.Tensor], tuple[str, ...]]
    state_before_first_update: Callable[[torch.Tensor], dict[str, Any]]

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameters of all groups, in the order of torch's state_dict."""
        return [parameter for group in self.groups for parameter in group["params"]]

    def updates(self, parameter: torch.Tensor) -> torch.Tensor:
        """How often the servers have updated a parameter, as torch keeps it."""
        count = self.state.get(parameter, {}).get("step", 0)  # none if a user has cleared the state
        return count if isinstance(count, torch.Tensor) else step_count(count)

    def trains(self, parameter: torch.Tensor) -> bool:
        """Whether the servers hold states of a parameter, which may have been frozen since the job was joined."""
        return self.job is not None and self.job.trains(parameter)

    def name_in_job(self, parameter: torch.Tensor) -> str:
        """The tensor's name in the job that the optimizer has joined."""
        return self.job.entries[self.job.index_of(parameter)].name

    def tensors(self) -> dict[int, dict[str, Any]]:
        """The job's tensors as the servers list them (``TensorSummary``), by manifest index."""
        return {tensor["index"]: tensor for tensor in self.find_session().client.list_tensors(self.job.name)}
