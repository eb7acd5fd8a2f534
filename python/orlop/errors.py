"""The errors of servers and client. A class stands for what the caller should do next.

Every one is an :class:`Error`. Programs branch on its class and ``detail``, never on its text.
"""

from __future__ import annotations

from typing import Any


class Error(Exception):
    """An operation that did not happen.

    Attributes
    ----------
    code : str
        The status code, e.g. ``"NOT_FOUND"``.
    detail : dict
        The details of the server's answer: ``reason`` (e.g. ``"WRONG_STEP"``), ``server``, ``tensor``, ``field``, ``actual``, ``limit``,
        and where known ``epoch``, ``attempt`` and ``version``. Empty for errors found in this process.

    Examples
    --------
    >>> import orlop
    >>> orlop.errors.from_status("NOT_FOUND", "tensor w is unknown", {"tensor": "w"}).detail["tensor"]
    'w'
    """

    code = "UNKNOWN"

    def __init__(self, message: str, detail: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail or {}

    def __str__(self) -> str:
        return self.message

    @property
    def reason(self) -> str:
        """``detail["reason"]``, or an empty string."""
        return self.detail.get("reason", "")


class InvalidArgument(Error, ValueError):
    """The call is malformed: fix it."""

    code = "INVALID_ARGUMENT"


class NotFound(Error, KeyError):
    """No such job, tensor or slot."""

    code = "NOT_FOUND"


class AlreadyExists(Error):
    """The same name or key exists with other content: stop."""

    code = "ALREADY_EXISTS"


class OutOfRange(Error, IndexError):
    """The version asked for has been overwritten; ``detail["version"]`` is the current one: read that."""

    code = "OUT_OF_RANGE"


class Aborted(Error):
    """The servers gave the attempt up: compute and push the step again."""

    code = "ABORTED"


class FailedPrecondition(Error):
    """The job is at another step, generation or epoch, or has no weights yet: join or step again."""

    code = "FAILED_PRECONDITION"


class Unavailable(Error, ConnectionError):
    """A server does not answer, and the retries are used up: try later."""

    code = "UNAVAILABLE"


class DeadlineExceeded(Error, TimeoutError):
    """The time limit has passed. A commit may still have happened: call again to find out."""

    code = "DEADLINE_EXCEEDED"


class ResourceExhausted(Error):
    """A budget is full; ``detail["limit"]`` names it: make room, then call again."""

    code = "RESOURCE_EXHAUSTED"


class DataLoss(Error):
    """Bytes are lost or damaged: stop, and restore or accept a rollback."""

    code = "DATA_LOSS"


class PermissionDenied(Error, PermissionError):
    """The role or the wall around a job forbids it: ask an operator."""

    code = "PERMISSION_DENIED"


class Unimplemented(Error, NotImplementedError):
    """These servers do not offer the call: use newer servers."""

    code = "UNIMPLEMENTED"


class EditedWeights(Error, RuntimeError):
    """A parameter was changed outside the optimizer: call ``session.store(model)`` to write the change to the servers.

    torch's version counter shows the change, except one that was made through ``parameter.data``.
    """

    code = "FAILED_PRECONDITION"


class Superseded(Error, RuntimeError):
    """A newer optimizer has this session's job: step that one."""

    code = "FAILED_PRECONDITION"


_CLASSES = {cls.code: cls for cls in (
    InvalidArgument, NotFound, AlreadyExists, OutOfRange, Aborted, FailedPrecondition, Unavailable, DeadlineExceeded,
    ResourceExhausted, DataLoss, PermissionDenied, Unimplemented)}


def from_status(code: str, message: str, detail: dict[str, Any] | None = None) -> Error:
    """The exception for a status code. The extension calls it."""
    error = _CLASSES.get(code, Error)(message, detail)
    error.code = code
    return error
