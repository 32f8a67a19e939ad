"""vLLM servers as processes: how they are started, checked and talked to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import resource
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from bupo.config import ConfigError, RunError, first_line
from bupo.rollouts.vllm_options import (
    ENVIRONMENT,
    SHAPE,
    check_version,
    refuse_experts,
    shape_of,
)

RETRY_AFTER = (1, 2, 4, 8, 16)
"""Seconds between attempts to reach a server that does not answer"""
START = 900
"""Seconds that a server has to start; reading and compiling a large model takes minutes"""
TRANSFER = 900
"""Seconds for a step of a transfer of weights"""
DEVELOPER = {"VLLM_SERVER_DEV_MODE": "1"}
"""Enables vLLM's API for the transfer of weights, for anyone who can reach the server"""
GLOO, NCCL = "bupo_gloo", "nccl"
"""The transfer engine of servers on CPUs (vllm_transfer.py), and that of servers on GPUs"""
PARALLEL = ("tensor", "pipeline", "data")
_END_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
os.execv(sys.argv[1], sys.argv[1:])
"""


class Server:
    """One vLLM server. It has the methods of vLLM's VLLMWeightSyncClient, which send weights."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.weights: str | None = None
        """The version of the weights that were sent last"""

    @staticmethod
    def session(at_once: int = 1, seconds: float | None = None) -> Any:
        """Returns a client session. at_once: number of requests that a server gets at once; the
        others wait here. seconds: time limit for an answer."""
        import aiohttp

        key, files = os.environ.get("VLLM_API_KEY"), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=seconds, sock_connect=10),
            connector=aiohttp.TCPConnector(
                limit=files // 2, limit_per_host=at_once, socket_factory=_socket
            ),
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )

    async def ask(self, session: Any, path: str, body: Any = None, retry: bool = True) -> Any:
        """Posts a body to a path of the server or, without a body, gets the path. Returns the
        answer. retry: whether a server that does not answer is asked again. Raises RunError."""
        import aiohttp

        began, method = time.monotonic(), "GET" if body is None else "POST"
        for wait in [*RETRY_AFTER, None] if retry else [None]:
            try:
                async with session.request(method, f"{self.url}/{path}", json=body) as response:
                    status, text = response.status, await response.text()
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                if ended := self.ended():
                    raise RunError(f"{ended}{self._where()}; resume the run") from None
                if wait is None:
                    why, seconds = first_line(error), time.monotonic() - began
                    way = f" for {seconds:.0f} s; start it again, then resume the run"
                    raise RunError(
                        f"the vLLM server {self.url} does not answer ({why}){way * retry}"
                    ) from None
                await asyncio.sleep(wait)
            else:
                if status < 300:
                    return json.loads(text) if text else None
                raise RunError(f"the vLLM server {self.url}/{path} says {status}: {_reason(text)}")
        raise AssertionError("the last attempt returns or raises")

    def call(self, path: str, body: Any = None, seconds: float = 60) -> Any:
        """Does what ask() does, once and in a session of its own."""

        async def once() -> Any:
            async with self.session(seconds=seconds) as session:
                return await self.ask(session, path, body, retry=False)

        return asyncio.run(once())

    def ended(self) -> str:
        """Returns how the server has ended, or an empty text if it may answer later."""
        return ""

    def _where(self) -> str:
        """Returns where the output of the server is, if it is known."""
        return ""

    def close(self) -> None:
        """Ends the server if the run has started it."""

    def check(self, answer: dict[str, Any]) -> None:
        """Raises RunError unless an answer is whole and was generated with the weights that were
        sent last."""
        made = answer["choices"][0]
        if made["finish_reason"] not in ("stop", "length"):
            raise RunError(
                f"another program has made the vLLM server {self.url} end a response early; give "
                "each run its own servers, then resume the run"
            )
        if {part["version"] for part in made["weight_versions"] or ()} != {self.weights}:
            self._raise_other_weights()

    def _raise_other_weights(self) -> None:
        raise RunError(
            f"the vLLM server {self.url} does not hold the weights of this run: it was started "
            "again, or another run uses it; give each run its own servers, then resume the run"
        )

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        # A run that was killed may have left an update, which would be continued.
        for path in ("start_weight_update", "finish_weight_update"):
            with contextlib.suppress(RunError):
                self.call(path, {}, TRANSFER)
        self.disconnect()
        self.call("init_weight_transfer_engine", {"init_info": init_info}, TRANSFER)

    def disconnect(self) -> None:
        """Makes the server forget the process that has sent weights to it."""
        with contextlib.suppress(RunError):
            self.call("shutdown_weight_transfer_engine", {})

    def start_weight_update(self) -> None:
        if self.weights not in (None, self.call("weight_info")["weight_version"]):
            self._raise_other_weights()
        self.call("start_weight_update", {}, TRANSFER)

    def update_weights(self, update_info: Any) -> None:
        self.call("update_weights", {"update_info": update_info}, TRANSFER)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.weights = weight_version or secrets.token_hex(8)
        self.call("finish_weight_update", {"weight_version": self.weights}, TRANSFER)
        if not self.call("reset_prefix_cache?reset_running_requests=true", {})["success"]:
            raise RunError(f"the vLLM server {self.url} cannot empty its prefix cache; restart it")


def _socket(address: Any) -> socket.socket:
    """Returns a socket on which a host that has vanished is noticed after two minutes."""
    made = socket.socket(*address[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return made


def _reason(text: str) -> str:
    """Returns the first line of the reason in an answer that reports an error."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return (text.strip().splitlines() or ["no reason"])[0]


def check_server(server: Server, arguments: dict[str, Any]) -> str:
    """Returns the name of the server's transfer engine. arguments: those of vLLM's engine that the
    run needs. Raises ConfigError, with the command that starts a suitable server, if this one does
    not answer or was started with others. Warns of a version of vLLM that was not tested."""
    start = f"; start it with: {typed(arguments, server.url)}"
    try:
        check_version(server.call("version")["version"])
        found: dict[str, Any] = server.call("server_info?config_format=json")["vllm_config"]
    except RunError as error:
        raise ConfigError(f"rollout.servers: {error}{start}") from None
    model, facts = found["model_config"], found["additional_config"]
    needed = arguments["additional_config"]
    if not isinstance(facts, dict) or facts.get(SHAPE) != needed[SHAPE]:
        facts = facts.get(SHAPE) if isinstance(facts, dict) else None
        raise ConfigError(
            f"rollout.servers: {server.url} serves {facts or model['model']}, but the run needs "
            f"{needed[SHAPE]}{start}"
        )
    pairs = {
        "dtype": (str(model["dtype"]).removeprefix("torch."), arguments["dtype"]),
        "logprobs_mode": (model["logprobs_mode"], arguments["logprobs_mode"]),
        "logits_processors": (model["logits_processors"], arguments.get("logits_processors")),
    }
    for key, (has, needs) in pairs.items():
        if has != needs:
            raise ConfigError(
                f"rollout.servers: {server.url} has {key}={has}, but the run needs {needs}{start}"
            )
    if model["max_model_len"] < arguments["max_model_len"]:
        raise ConfigError(
            f"rollout.servers: {server.url} takes {model['max_model_len']} tokens, but prompt and "
            f"response have up to {arguments['max_model_len']}{start}"
        )
    backend = (found["weight_transfer_config"] or {}).get("backend")
    if backend != GLOO and not (backend == NCCL and torch.cuda.is_available()):
        raise ConfigError(
            f"rollout.servers: {server.url} receives weights by {backend}, but this machine can "
            f"send them by {GLOO}{f' or {NCCL}' if torch.cuda.is_available() else ''}{start}"
        )
    if backend == GLOO:
        refuse_experts(shape_of(arguments["model"]))
    return str(backend)


def command(arguments: dict[str, Any], host: str, port: int) -> list[str]:
    """Returns the arguments of vLLM's program that start a server. arguments: those of the
    engine."""
    backend = NCCL if torch.cuda.is_available() else GLOO
    given = {
        **arguments,
        "host": host,
        "port": port,
        "enable_scale_out": True,  # opens the interface that takes and returns tokens
        "weight_transfer_config": {"backend": backend},
    }
    words = ["-m", "vllm.entrypoints.launchers.api_server.entry"]
    for key, value in given.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            words += [f"--{flag}", json.dumps(value)]
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", str(value)]
    return words


def typed(arguments: dict[str, Any], url: str) -> str:
    """Returns the line that starts a server at an address, as it is typed into a shell there."""
    variables = " ".join(f"{key}={value}" for key, value in DEVELOPER.items())
    port = urlsplit(url).port or 80
    return f"{variables} python {shlex.join(command(arguments, '0.0.0.0', port))}"


class LocalServer(Server):
    """A vLLM server on this machine that ends with the run."""

    def __init__(self, arguments: dict[str, Any], log: Path | None) -> None:
        """arguments: those of vLLM's engine. log: the file for the output of the server, which is
        dropped with None. Raises ConfigError if the server does not start."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        super().__init__(f"http://127.0.0.1:{port}")
        self._log = log
        # Unlike in the program of the run, vLLM's engine has a process of its own here.
        environment = os.environ | ENVIRONMENT | DEVELOPER | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        start = [sys.executable, *command(arguments, "127.0.0.1", port)]
        with open(log or os.devnull, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _END_WITH_PARENT, *start],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment | gpus(arguments),
                start_new_session=True,  # Ctrl-C is for the run, which still needs the server
            )
        try:
            self._wait()
        except BaseException:  # also Ctrl-C
            self.close()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + START
        while True:
            with contextlib.suppress(RunError):
                self.call("health")
                return
            late = time.monotonic() > deadline and f"the server is not ready after {START} s"
            if why := self.ended() or late:
                raise ConfigError(f"rollout.engine=vllm_server: {why}{self._where()}")
            time.sleep(1)

    def _where(self) -> str:
        return f"; its output is in {self._log}" if self._log else ""

    def ended(self) -> str:
        return "" if self._process.poll() is None else "the vLLM server has ended"

    def close(self) -> None:
        """Ends the server and the processes that it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):  # the latter for what the first one left
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)


def gpus(arguments: dict[str, Any]) -> dict[str, str]:
    """Returns the variable that gives a server the GPUs that follow the first one, which the
    trainer uses. arguments: those of vLLM's engine. Raises ConfigError if there are too few."""
    if not torch.cuda.is_available():
        return {}
    number = math.prod(int(arguments.get(f"{kind}_parallel_size", 1)) for kind in PARALLEL)
    there = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if there == [""]:
        there = [str(n) for n in range(torch.cuda.device_count())]
    if len(there) <= number:
        raise ConfigError(
            f"rollout.engine=vllm_server needs {number} more GPUs than the trainer's, found "
            f"{len(there) - 1}; use rollout.engine=vllm, which shares one, or name rollout.servers"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(there[1 : 1 + number])}
