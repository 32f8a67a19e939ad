"""The parts that all commands share: arguments, plan, --dry_run, execution and exit status."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from bupo import config as configuration
from bupo import ranks
from bupo.commands.run_lock import check_one_process
from bupo.config import ConfigError, RunError, first_line
from bupo.terminal import TERMINAL, printable


class Plan(Protocol):
    """The result of every check that does not need the weights."""

    out: Path
    """The directory that the command writes"""

    def describe(self) -> str:
        """Returns the summary that --dry_run shows and that every execution prints first."""
        ...


AnyPlan = TypeVar("AnyPlan", bound=Plan)


@dataclass(frozen=True)
class Command(Generic[AnyPlan]):
    """One command: how its settings are read, planned and executed."""

    program: str
    """The module name after `python -m`"""
    description: str
    epilog: str
    settings: Callable[[argparse.Namespace], Any]
    """Turns arguments into settings"""
    make_plan: Callable[[Any], AnyPlan]
    """Turns settings into a plan. Writes only a task's cached files; raises ConfigError"""
    execute: Callable[[AnyPlan], int]
    """Executes the plan and returns the exit status"""
    kept: Callable[[Path | None], str]
    """Says what is left in the directory (None: no plan yet) after a full disk, and how to go on"""
    stopped: Callable[[Path | None], str]
    """Says the same after Ctrl-C"""
    config_help: str
    out_help: str
    several: bool = False
    """Whether it can be started by torchrun"""
    add_arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    """Adds options that only this command has"""

    def arguments(self, argv: list[str] | None) -> argparse.Namespace:
        """Parses the command line. Options may stand between key=value arguments."""
        parser = argparse.ArgumentParser(
            prog=f"python -m {self.program}",
            description=self.description,
            epilog=self.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_arguments(parser)
        parser.add_argument("--config", type=Path, help=self.config_help)
        parser.add_argument("--out", help=self.out_help)
        dry_run = "check everything and print the plan, without loading weights"
        parser.add_argument("--dry_run", action="store_true", help=dry_run)
        quotes = configuration.QUOTES
        parser.add_argument("overrides", nargs="*", metavar="key=value", help=quotes)
        return parser.parse_intermixed_args(argv)

    def main(self, argv: list[str] | None = None) -> int:
        """Makes the plan and executes it. Returns the exit status: that of execute(); 1 if the work
        cannot go on (nan, a full disk, a violated identity); 2 for unusable settings; 130 after
        Ctrl-C."""
        arguments = self.arguments(argv)
        try:
            if not self.several:
                check_one_process(self.program)
            with ranks.joined(MINUTES):
                TERMINAL.muted = not ranks.is_first()
                return self._executed(arguments)
        except ConfigError as error:  # of torchrun's variables
            return self._failed(2, str(error))

    def _executed(self, arguments: argparse.Namespace) -> int:
        out: Path | None = None
        try:
            with user_paths():
                plan = self.make_plan(self.settings(arguments))
            out = plan.out
            print(plan.describe(), file=TERMINAL)
            return 0 if arguments.dry_run else self.execute(plan)
        except ConfigError as error:
            status, line = 2, str(error)
        except RunError as error:
            status, line = 1, _with_stage(error)
        except OSError as error:
            if error.errno not in _DISK:
                raise
            status, line = 1, f"{error}; {self.kept(out)}"
        except KeyboardInterrupt:
            print(f"\n{self.stopped(out)}", file=TERMINAL)
            return 130
        except Exception as error:
            if ranks.world() == 1:
                raise
            status, line, why = 1, _with_stage(error), ""
            if not (isinstance(error, RuntimeError) and _LOST.search(str(error))):
                traceback.print_exc()
            elif ranks.someone_spoke("failures"):
                _end_rank(status)
            else:
                why = " (another rank has ended or hangs)"
            line = f"{line}{why}; {self.kept(out)}"
        return self._failed(status, line)

    def _failed(self, status: int, line: str) -> int:
        """Prints why the command has failed, on one rank if all fail alike."""
        ranks.speaks_first("failures")
        if ranks.speaks_first(line):
            TERMINAL.muted = False
            rank = f"rank {ranks.rank()}: " if ranks.world() > 1 else ""
            print(f"{self.program}: {rank}{printable(line)}", file=TERMINAL)
        if ranks.world() > 1:
            _end_rank(status)
        return status


MINUTES = 60
"""For which ranks wait for each other"""
_LOST = re.compile("closed by peer|reset by peer|Broken pipe|[Tt]imed out|NCCL")
"""Part of what torch says if a rank has ended"""
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def _end_rank(status: int) -> None:
    """Ends this process at once: at an orderly end, gloo and NCCL would wait for ranks that are no
    longer there."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _with_stage(error: Exception) -> str:
    """Returns the first line of an error and, with several ranks, the stage in which it came."""
    stages = getattr(error, "__notes__", ())[:1] if ranks.world() > 1 else ()
    return ": ".join([*stages, first_line(error)])


def keys_and_defaults(schema: type) -> str:
    """Returns the list of all keys for --help, each with its default and its description."""
    rows = configuration.describe(schema)
    return "keys and defaults:\n" + "\n".join(f"  {k} = {d}\n      {text}" for k, d, text in rows)


@contextmanager
def user_paths() -> Iterator[None]:
    """Inside, an OSError from one of the user's paths becomes a ConfigError, except for a disk
    error such as a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK:
            raise
        reason = f"{error.filename}: {error.strerror}" if error.filename else first_line(error)
        raise ConfigError(f"{reason}; fix that, or choose another path") from None
