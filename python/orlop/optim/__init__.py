"""The optimizers, and the loss scaling that goes with them."""

from .adam import LAMB, SGD, Adafactor, Adagrad, Adam, AdamW, AdEMAMix, Lion, Muon, RMSprop, Store, Together
from .amp import GradScaler
from .optimizer import Optimizer

__all__ = [
    "AdEMAMix", "Adafactor", "Adagrad", "Adam", "AdamW", "GradScaler", "LAMB", "Lion", "Muon", "Optimizer", "RMSprop", "SGD", "Store", "Together",
]
