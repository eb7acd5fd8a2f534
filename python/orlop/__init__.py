"""Orlop keeps training state on servers: weights, gradients and 8-bit optimizer states.

Examples
--------
>>> import torch, orlop
>>> with orlop.local() as session:
...     model = session.bind(torch.nn.Linear(4, 2))
...     optimizer = orlop.AdamW(model.parameters(), lr=1e-3)
...     model(torch.randn(8, 4)).square().mean().backward()
...     optimizer.step()
...     session.get("weight").equal(model.weight)
True
"""

from . import errors, kernels
from .errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    EditedWeights,
    Error,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Superseded,
    Unavailable,
    Unimplemented,
)
from .optim import LAMB, SGD, Adafactor, Adagrad, Adam, AdamW, AdEMAMix, GradScaler, Lion, Muon, Optimizer, RMSprop, Store, Together
from .session import Session, connect, local

__version__ = "0.1.0"
__all__ = [
    "LAMB", "SGD", "Aborted", "AdEMAMix", "Adafactor", "Adagrad", "Adam", "AdamW", "AlreadyExists", "DataLoss", "DeadlineExceeded",
    "EditedWeights", "Error", "FailedPrecondition", "GradScaler", "InvalidArgument", "Lion", "Muon", "NotFound", "Optimizer", "OutOfRange",
    "PermissionDenied", "RMSprop", "ResourceExhausted", "Session", "Store", "Superseded", "Together", "Unavailable", "Unimplemented",
    "connect", "errors", "kernels", "local",
]
