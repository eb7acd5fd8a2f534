"""What can go wrong, by what the caller does next.

Every error of a server or of the client is an :class:`Error`. Programs branch on its class and ``detail``, never on its text.
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
        What the server said: ``reason`` (e.g. ``"WRONG_STEP"``), ``server``, ``tensor``, ``field``, ``actual``, ``limit``, and where
        known ``epoch``, ``attempt`` and ``version``. Empty for errors found in this process.

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
    """The same name or key stands for other content: stop."""

    code = "ALREADY_EXISTS"


class OutOfRange(Error, IndexError):
    """The version asked for was applied over; ``detail["version"]`` is current."""

    code = "OUT_OF_RANGE"


class Aborted(Error):
    """The attempt was given up: compute and push the step again."""

    code = "ABORTED"


class FailedPrecondition(Error):
    """Not now: another step, generation or epoch, or no weights yet."""

    code = "FAILED_PRECONDITION"


class Unavailable(Error, ConnectionError):
    """A server does not answer; retries are used up."""

    code = "UNAVAILABLE"


class DeadlineExceeded(Error, TimeoutError):
    """Time is up. A commit may still have happened."""

    code = "DEADLINE_EXCEEDED"


class ResourceExhausted(Error):
    """A budget is full; ``detail["limit"]`` tells which."""

    code = "RESOURCE_EXHAUSTED"


class DataLoss(Error):
    """Bytes are gone or damaged: stop, and restore or accept a rollback."""

    code = "DATA_LOSS"


class PermissionDenied(Error, PermissionError):
    """The role or the wall around a job forbids it: ask an operator."""

    code = "PERMISSION_DENIED"


class Unimplemented(Error, NotImplementedError):
    """These servers do not offer that."""

    code = "UNIMPLEMENTED"


class EditedWeights(Error, RuntimeError):
    """A parameter was changed outside the optimizer; ``session.store(model)`` makes the servers follow.

    Found by torch's version counter, which does not see edits through ``parameter.data``.
    """

    code = "FAILED_PRECONDITION"


class Superseded(Error, RuntimeError):
    """A newer optimizer took over this session's job."""

    code = "FAILED_PRECONDITION"


_CLASSES = {cls.code: cls for cls in (
    InvalidArgument, NotFound, AlreadyExists, OutOfRange, Aborted, FailedPrecondition, Unavailable, DeadlineExceeded,
    ResourceExhausted, DataLoss, PermissionDenied, Unimplemented)}


def from_status(code: str, message: str, detail: dict[str, Any] | None = None) -> Error:
    """The exception for a status code (used by the extension)."""
    error = _CLASSES.get(code, Error)(message, detail)
    error.code = code
    return error
