"""Which sessions are open. A session registers itself; optimizers take the one opened last unless they are given one."""

from __future__ import annotations

from ..state.checkpoint import Connection

opened: list[Connection] = []  # the last one is the default


def default_session() -> Connection:
    """The session opened last and not closed yet. RuntimeError if there is none."""
    if not opened:
        raise RuntimeError("no session is open: use `with orlop.local() as session:` or orlop.connect('host:port', job='name')")
    return opened[-1]
