"""How a command ends that cannot go on: one line on stderr, and an exit status."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bupo.config import ConfigError, RunError, first_line
from bupo.terminal import TERMINAL

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def ended(
    program: str, act: Callable[[], int], kept: Callable[[], str], stopped: Callable[[], str]
) -> int:
    """What act() returns; 1 where it cannot go on, or a disk is full or broken (the line ends in
    kept()); 2 for a configuration that cannot be run; 130 after Ctrl-C (the line is stopped())."""
    try:
        return act()
    except ConfigError as error:
        status, line = 2, str(error)
    except RunError as error:
        status, line = 1, str(error)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        status, line = 1, f"{error}; {kept()}"
    except KeyboardInterrupt:
        print(f"\n{stopped()}", file=TERMINAL)
        return 130
    # Data and names are a stranger's: no line breaks, no codes that a terminal obeys.
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    print(f"{program}: {shown}", file=TERMINAL)
    return status


@contextmanager
def allowed() -> Iterator[None]:
    """Around what uses the user's places before work begins: what the system refuses there is a
    ConfigError; a full disk stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK:
            raise
        reason = f"{error.filename}: {error.strerror}" if error.filename else first_line(error)
        raise ConfigError(f"{reason}; change that, or name another place") from None
