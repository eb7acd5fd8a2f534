"""The optimizers, the loss scaling that goes with them, and the sessions that are open.

This is the door of the folder: other folders import from here only.
"""

from .adam import Adam, AdamW, AdEMAMix
from .adaptive import Adagrad, RMSprop
from .amp import GradScaler
from .connection import default_session, opened
from .momentum import SGD, Lion
from .optimizer import Optimizer
from .store import Store
from .together import Together
from .whole import LAMB, Adafactor, Muon

__all__ = [
    "LAMB", "SGD", "AdEMAMix", "Adafactor", "Adagrad", "Adam", "AdamW", "GradScaler", "Lion", "Muon", "Optimizer", "RMSprop", "Store",
    "Together", "default_session", "opened",
]
