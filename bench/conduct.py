"""Runs stages one after another, each with a time cap and live output, all with one log and a
summary. gpu_check.py defines what the stages do.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

Command = list[str]
GRACE = 10.0  # seconds between the interrupt and the kill of a stage that is over its time


class NotRun(Exception):
    """A stage cannot say anything on this machine; the message says why."""


class Failed(Exception):
    """A stage found something wrong; the message says what."""


@dataclasses.dataclass
class Job:
    """What a stage gets: its log, its deadline, and a way to run commands."""

    name: str
    log: TextIO
    deadline: float  # of time.monotonic()
    environment: dict[str, str]  # of commands; what a stage adds holds for later ones too
    folder: Path  # where commands run
    dry_run: bool = False

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        line = f"[{self.name}] {text}"
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def run(
        self, command: Command, *, seconds: float = float("inf"), **environment: str
    ) -> tuple[int, str]:
        """Returns exit status and output. A command that exceeds its time is interrupted, so that
        it can say what it has found, and killed with all its children ten seconds later. Then the
        stage fails, and what the command printed is in the log."""
        self.say("$ " + shlex.join([*(f"{k}={v}" for k, v in environment.items()), *command]))
        if self.dry_run:
            return 0, ""
        seconds = max(min(seconds, self.left()), 0)
        lines: list[str] = []
        try:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**self.environment, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a group of its own, to kill it whole
            )
        except OSError as error:
            raise Failed(f"{command[0]}: {error.strerror}") from None

        def copy() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                self.say(line.rstrip("\n"))

        reader = threading.Thread(target=copy, daemon=True)
        reader.start()
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            raise Failed(f"over its {seconds:.0f} s: {shlex.join(command)}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # its children may have outlived it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(5)
        return status, "".join(lines)

    def check(self, command: Command, **environment: str) -> str:
        """Returns the output. Fails the stage if the command fails."""
        status, output = self.run(command, **environment)
        if status:
            raise Failed(f"exit status {status}: {shlex.join(command)}")
        return output


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    seconds: float  # its cap
    run: Callable[[Job], str | None]  # returns a remark for the summary; raises Failed or NotRun
    needed: bool = False  # whether later stages make no sense if it fails
    minimum: float = 0.0  # seconds that the stages before it leave for it


@dataclasses.dataclass(frozen=True)
class Verdict:
    stage: str
    verdict: str  # ok, FAILED, not run; planned in a dry run
    seconds: float
    why: str
    bad: bool  # whether it failed, came too late, or came after a failed stage that it needs


def _verdict_of(stage: Stage, job: Job, broken: str) -> tuple[str, str, bool]:
    """The verdict, why, and whether it is bad."""
    if broken:
        return "not run", f"because {broken} failed", True
    if job.left() < 1:
        return "not run", "because no time was left", True
    try:
        why = stage.run(job) or ""
        return ("planned", "", False) if job.dry_run else ("ok", why, False)
    except NotRun as error:
        return "not run", f"because {error}", False
    except Failed as error:
        return "FAILED", str(error), True
    except Exception as error:  # a stage that breaks is a failed stage, not a lost summary
        return "FAILED", f"{type(error).__name__}: {error}", True


def conduct(
    stages: list[Stage],
    out: Path,
    minutes: float,
    folder: Path,
    environment: dict[str, str],
    dry_run: bool = False,
) -> list[Verdict]:
    """Runs all stages within `minutes` together. One that fails does not stop the others, unless
    they need it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # the shell's, for a job with &
        signal.signal(signal.SIGINT, signal.default_int_handler)  # else no command can be told
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    verdicts: list[Verdict] = []
    broken = ""
    print(f"{minutes:g} minutes: " + ", ".join(f"{s.name} {s.seconds:.0f} s" for s in stages))
    with (Path(os.devnull) if dry_run else out / "log.txt").open("a") as log:
        for number, stage in enumerate(stages, start=1):
            began = time.monotonic()
            reserve = sum(later.minimum for later in stages[number:])
            cap = min(stage.seconds, max(end - began - reserve, 0))
            job = Job(stage.name, log, began + cap, environment, folder, dry_run)
            job.say(f"at most {cap:.0f} s")
            verdict, why, bad = _verdict_of(stage, job, broken)
            if verdict == "FAILED" and stage.needed:
                broken = stage.name
            seconds = time.monotonic() - began
            verdicts.append(Verdict(stage.name, verdict, seconds, why, bad))
            job.say(f"{verdict}, {seconds:.0f} s {why}")
    return verdicts


def print_summary(verdicts: list[Verdict]) -> None:
    print("\n| stage    | verdict | seconds | remarks |")
    print("| -------- | ------- | ------: | ------- |")
    for v in verdicts:
        print(f"| {v.stage:8} | {v.verdict:7} | {v.seconds:7.0f} | {v.why} |")
