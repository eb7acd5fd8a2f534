"""Text of the demo: the source of Python's standard library, as bytes. Every machine that runs the demo has it."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import sysconfig
import zlib

import torch

# Tests and installed packages differ from distribution to distribution; the rest is the library as released.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT_SHARE = 20  # one file in this many is never trained on


@dataclasses.dataclass(frozen=True)
class Text:
    """Training and validation text, uint8, with the digest of both."""

    train: torch.Tensor
    validation: torch.Tensor
    digest: str
    train_files: int
    validation_files: int


def load_text(root: str | None = None) -> Text:
    """Read every `.py` file under `root` (the standard library if None) in the order of paths.

    A file is held out depending only on its relative path, so adding or removing files moves no other file between the two parts.

    Raises
    ------
    FileNotFoundError
        `root` has too few sources to train and validate on.
    """
    folder = pathlib.Path(root or sysconfig.get_paths()["stdlib"])
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            held_out = zlib.crc32(relative.as_posix().encode()) % HELD_OUT_SHARE == 0
            parts[held_out].append(path.read_bytes())
    train, validation = b"\n".join(parts[False]), b"\n".join(parts[True])
    if min(len(train), len(validation)) < 1 << 16:
        raise FileNotFoundError(
            f"{folder} holds {len(train)} bytes of Python to train on and {len(validation)} to validate on;"
            f" at least {1 << 16} of each are needed")
    digest = hashlib.sha256(train + b"\0" + validation).hexdigest()[:16]
    return Text(_tensor(train), _tensor(validation), digest, len(parts[False]), len(parts[True]))


def _tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def batch(text: torch.Tensor, *, seed: int, step: int, count: int, context: int) -> torch.Tensor:
    """Return the sequences of one step, int64 [count, context + 1]. They are a function of (seed, step).

    A worker uses its rows of the whole batch, so the number of workers does not change the training data.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - context, (count, 1), generator=generator)
    return text[starts + torch.arange(context + 1)].long()


def validation_batches(text: torch.Tensor, *, count: int, batch_size: int, context: int):
    """Yield `count` evenly spread sequences, int64 [at most batch_size, context + 1], the same in every run."""
    starts = torch.linspace(0, len(text) - context - 1, count).long()[:, None]
    for some in starts.split(batch_size):
        yield text[some + torch.arange(context + 1)].long()
