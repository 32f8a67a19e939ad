"""vLLM servers as processes: how they are started, checked and talked to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
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
from bupo.rollouts.vllm_options import ENVIRONMENT, SHAPE, check_version

RETRY_AFTER = (1, 2, 4, 8, 16)
"""Seconds between attempts to reach a server that does not answer"""
START = 900
"""Seconds that a server has to start; reading and compiling a large model takes minutes"""
DEVELOPER = {"VLLM_SERVER_DEV_MODE": "1"}
"""What opens vLLM's interface for the transfer of weights, to everybody who reaches the server"""
GLOO, NCCL = "bupo_gloo", "nccl"
"""The transfer engine of servers on CPUs (vllm_transfer.py), and that of servers on GPUs"""
_END_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
os.execv(sys.argv[1], sys.argv[1:])
"""


class Server:
    """One vLLM server. It has the methods of vLLM's VLLMWeightSyncClient, which send weights."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._weights: str | None = None

    @staticmethod
    def session() -> Any:
        """Returns a client session without a limit on the number or length of requests."""
        import aiohttp

        key = os.environ.get("VLLM_API_KEY")
        return aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            connector=aiohttp.TCPConnector(limit=0),
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
                    raise RunError(f"{ended}; resume the run") from None
                if wait is None:
                    tried = f"; tried for {time.monotonic() - began:.0f} s" if retry else ""
                    raise RunError(
                        f"the vLLM server {self.url} does not answer ({first_line(error)}{tried})"
                    ) from None
                await asyncio.sleep(wait)
            else:
                if status < 300:
                    return json.loads(text) if text else None
                raise RunError(f"the vLLM server {self.url}/{path} says {status}: {_reason(text)}")
        raise AssertionError("the last attempt returns or raises")

    def call(self, path: str, body: Any = None, retry: bool = False) -> Any:
        """Does what ask() does, in a session of its own."""

        async def once() -> Any:
            async with self.session() as session:
                return await self.ask(session, path, body, retry)

        return asyncio.run(once())

    def ended(self) -> str:
        """Returns how the server has ended, or an empty text if it may answer later."""
        return ""

    def close(self) -> None:
        """Ends the server if the run has started it."""

    def check_weights(self, answer: dict[str, Any]) -> None:
        """Raises RunError unless an answer was generated with the weights that were sent last."""
        versions = answer["choices"][0]["weight_versions"]
        if any(part["version"] != self._weights for part in versions):
            raise RunError(
                f"the vLLM server {self.url} does not hold the weights of this run: it was started "
                "again, or another run uses it; resume the run"
            )

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.call("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.call("start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        self.call("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._weights = weight_version or secrets.token_hex(8)
        self.call("finish_weight_update", {"weight_version": self._weights})
        self.call("reset_prefix_cache", {})


def _reason(text: str) -> str:
    """Returns the first line of the reason in an answer that reports an error."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return (text.strip().splitlines() or ["no reason"])[0]


def check_server(server: Server, arguments: dict[str, Any]) -> str:
    """Returns the name of the server's transfer engine. arguments: those of vLLM's engine that the
    run needs. Raises ConfigError, with the line that starts a right one, if the server cannot be
    reached or was started with others. Warns of a version of vLLM that was not tested."""
    start = f"; start it by: {typed(arguments, server.url)}"
    try:
        check_version(server.call("version")["version"])
        found: dict[str, Any] = server.call("server_info?config_format=json")["vllm_config"]
    except RunError as error:
        raise ConfigError(f"rollout.servers: {error}{start}") from None
    model, facts = found["model_config"], found["additional_config"]
    needed = arguments["additional_config"]
    if not isinstance(facts, dict) or facts != needed:
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
    if backend not in (GLOO, NCCL):
        raise ConfigError(f"rollout.servers: {server.url} takes weights by {backend}{start}")
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
                env=environment | _gpus(int(arguments.get("tensor_parallel_size", 1))),
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
            if self.ended() or time.monotonic() > deadline:
                raise ConfigError(
                    f"rollout.engine=vllm_server: {self.ended() or 'the server does not start'}"
                )
            time.sleep(1)

    def ended(self) -> str:
        where = f"; its output is in {self._log}" if self._log else ""
        return "" if self._process.poll() is None else f"the vLLM server has ended{where}"

    def close(self) -> None:
        """Ends the server and the processes that it has started."""
        for number, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
                return


def _gpus(number: int) -> dict[str, str]:
    """Returns the variable that gives a server the GPUs that follow the first one, which the
    trainer uses. Raises ConfigError if there are too few."""
    if not torch.cuda.is_available():
        return {}
    there = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if there == [""]:
        there = [str(n) for n in range(torch.cuda.device_count())]
    if len(there) <= number:
        raise ConfigError(
            f"rollout.engine=vllm_server needs {number} GPUs beside that of the trainer, found "
            f"{len(there) - 1}; use rollout.engine=vllm, which shares one, or name rollout.servers"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(there[1 : 1 + number])}
