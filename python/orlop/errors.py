"""The errors of the servers and of the client. The class of an error tells the caller what to do next.

Every class derives from :class:`Error`. A program branches on the class and on ``detail``, never on the message.
"""

from __future__ import annotations

from typing import Any


class Error(Exception):
    """A call that failed. Errors with other codes than those of the classes below are of this class itself.

    Attributes
    ----------
    code : str
        The name of the gRPC status code, e.g. ``"NOT_FOUND"``.
    message : str
        What failed, for people. It names the server, the tensor, the value and the limit, where they are known.
    detail : dict
        The fields of ``ErrorDetail`` (``proto/orlop/v1/types.proto``): ``reason`` (e.g. ``"WRONG_STEP"``), ``server``, ``job``,
        ``tensor``, ``field`` (the request's field that is wrong), ``actual`` (its value), ``limit`` (the expected value or the limit),
        ``epoch``, ``generation`` and ``attempt``, and where known ``shard`` and ``version``. An unknown text is empty, an unknown number 0.
        Errors that Python code raises have only the fields that it sets.

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
        """``detail["reason"]``. Without a reason it is ``"REASON_UNSPECIFIED"``, or empty if Python code raised the error."""
        return self.detail.get("reason", "")


class InvalidArgument(Error, ValueError):
    """The call is malformed: correct it."""

    code = "INVALID_ARGUMENT"


class NotFound(Error, KeyError):
    """The job, tensor or slot does not exist: create it, or correct the name."""

    code = "NOT_FOUND"


class AlreadyExists(Error):
    """The name or key exists with other content, and a repeated call will not change that: stop."""

    code = "ALREADY_EXISTS"


class OutOfRange(Error, IndexError):
    """A later step has overwritten the version asked for: read ``detail["version"]``, which is the current one."""

    code = "OUT_OF_RANGE"


class Aborted(Error):
    """The servers dropped this attempt of the step: compute the gradients and push them again."""

    code = "ABORTED"


class FailedPrecondition(Error):
    """The job is not in the state that the call needs, and ``reason`` says why.

    ``"WRONG_STEP"`` and ``"STALE_EPOCH"``: read the state of the job and step again. ``"STALE_GENERATION"``: other workers have taken the
    job over; join again. ``"LOADING"``: the job has no weights yet; load them first.
    """

    code = "FAILED_PRECONDITION"


class Unavailable(Error, ConnectionError):
    """A server does not answer, and the retries are used up. A commit may still have happened: call again later to find out."""

    code = "UNAVAILABLE"


class DeadlineExceeded(Error, TimeoutError):
    """The call's time limit has passed. A commit may still have happened: call again to find out."""

    code = "DEADLINE_EXCEEDED"


class ResourceExhausted(Error):
    """A memory or disk budget is full: make room, then call again.

    ``detail["limit"]`` is the budget in bytes or, if the call reserves memory for a job, the smallest budget that would do.
    """

    code = "RESOURCE_EXHAUSTED"


class DataLoss(Error):
    """State of the job is lost or damaged: stop, and load a checkpoint or accept a rollback (``orlop rollback``)."""

    code = "DATA_LOSS"


class PermissionDenied(Error, PermissionError):
    """The caller may not make this call: ask an operator. No server answers this today."""

    code = "PERMISSION_DENIED"


class Unimplemented(Error, NotImplementedError):
    """These servers do not offer the call, or the durability level that it asks for: use newer servers."""

    code = "UNIMPLEMENTED"


class EditedWeights(Error, RuntimeError):
    """A parameter was changed outside the optimizer: call ``session.store(model)`` to write the change to the servers, or
    ``session.load(model)`` to undo it.

    A change is found by the parameter's value, by whatever route it was made. A value that was changed and changed back is no change.
    """

    code = "FAILED_PRECONDITION"


class Superseded(Error, RuntimeError):
    """A newer optimizer has taken over this session's job: call ``step()`` of the newer one."""

    code = "FAILED_PRECONDITION"


_CLASSES = {cls.code: cls for cls in (
    InvalidArgument, NotFound, AlreadyExists, OutOfRange, Aborted, FailedPrecondition, Unavailable, DeadlineExceeded,
    ResourceExhausted, DataLoss, PermissionDenied, Unimplemented)}


def from_status(code: str, message: str, detail: dict[str, Any] | None = None) -> Error:
    """Return the exception for a gRPC status code; the C++ extension ``_core`` raises it.

    Parameters
    ----------
    code : str
        The name of the status code, e.g. ``"NOT_FOUND"``. A code without a class gives an :class:`Error` with that code.
    message : str
    detail : dict, optional
        As :attr:`Error.detail`.
    """
    error = _CLASSES.get(code, Error)(message, detail)
    error.code = code
    return error
