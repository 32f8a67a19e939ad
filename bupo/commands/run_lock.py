"""The lock of a run directory, which lets only one process write there at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bupo import ranks
from bupo.config import ConfigError

FILE = "run.lock"


def check_one_process(program: str) -> None:
    """Raises ConfigError under torchrun, where every process would do the whole work."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world not in ("", "1"):
        raise ConfigError(
            f"WORLD_SIZE={world}: {program} works in a single process; start it with python -m, "
            "without torchrun"
        )


@contextmanager
def locked_by_first(folder: Path) -> Iterator[None]:
    """Inside, rank 0 holds the lock of a directory; raises the ConfigError of locked() on all.
    Waits until all ranks are here, with their plans made."""
    ranks.gathered(None)
    with ExitStack() as held:
        ranks.from_first(lambda: held.enter_context(locked(folder)))
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, this process holds the lock of a directory. Raises ConfigError, naming the owner, if
    another process holds it.

    The system releases the lock when its owner ends, even by SIGKILL, so a stale file never has to
    be removed. On a file system without locks, the process that the file names is looked up.
    """
    file = folder / FILE
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(_taken(folder, descriptor)) from None
        except OSError:  # a file system without locks
            if _alive(descriptor):
                raise ConfigError(_taken(folder, descriptor)) from None
        if _is(file, descriptor):
            break
        os.close(descriptor)  # its owner removed the file in the meantime, so try again
    os.ftruncate(descriptor, 0)
    owner = {"pid": os.getpid(), "host": socket.gethostname()}
    os.pwrite(descriptor, json.dumps(owner).encode() + b"\n", 0)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def waited_for(file: Path) -> Iterator[None]:
    """Waits for a lock file and holds it inside, for work that one process at a time may do."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as opened:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _owner(descriptor: int) -> tuple[int, str] | None:
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        return int(record["pid"]), str(record["host"])
    except (ValueError, KeyError, TypeError):
        return None


def _taken(folder: Path, descriptor: int) -> str:
    pid, host = _owner(descriptor) or ("(ID unknown)", "this host")
    os.close(descriptor)
    return (
        f"out={folder} is in use by process {pid} on {host}; wait for it, end it, or choose "
        f"another out (if you are sure that it is gone, remove {folder / FILE})"
    )


def _alive(descriptor: int) -> bool:
    """Whether the process that the lock file names may still be running."""
    owner = _owner(descriptor)
    if owner is None:
        return False
    pid, host = owner
    return host != socket.gethostname() or Path(f"/proc/{pid}").exists()


def _is(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
