"""Several processes, started by torchrun, equal one."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import run_samples
import torch
from rank_cases import CASES
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from bupo import config
from bupo.commands import run_lock
from bupo.commands.sources import check_engine
from bupo.rl.schedule import Schedule
from bupo.rollouts.vllm_options import ENVIRONMENT
from bupo.rollouts.vllm_serving import DEVELOPER, Server

HERE = Path(__file__).parent


LAUNCHER = ["-m", "torch.distributed.run"]


def started(world: int, *program: str, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A program with so many ranks; prefix: a command that runs it elsewhere."""
    launcher = [*LAUNCHER, "--standalone", f"--nproc_per_node={world}"]
    command = [*prefix, sys.executable, *(launcher if world > 1 else []), *program]
    environment = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run_of(world: int, out: Path, *overrides: str) -> subprocess.Popen[str]:
    return started(world, "-m", "bupo.run", *run_samples.arguments(out, *overrides))


def finish(process: subprocess.Popen[str]) -> None:
    said, _ = process.communicate()
    assert process.returncode == 0, said[-4000:]


def rows(out: Path) -> list[dict[str, float]]:
    return run_samples.rows(out / "metrics.jsonl")


def assert_equal(one: Path, several: Path) -> None:
    """Same responses and rewards; losses and parameters but for the order of sums."""
    assert_near(one, several, 1e-5)
    for a, b in zip(rows(one), rows(several), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if isinstance(value, float):
                assert b[key] == pytest.approx(value, abs=1e-6, rel=1e-6), (a["step"], key)
            else:
                assert b[key] == value, (a["step"], key)
    for file in sorted((one / "rollouts").iterdir()):
        texts = [
            [json.loads(line)["response"] for line in (x / "rollouts" / file.name).open()]
            for x in (one, several)
        ]
        assert texts[0] == texts[1], file.name


def assert_near(one: Path, several: Path, limit: float) -> None:
    """The newest checkpoints have the same files, tensors and, up to the limit, values."""
    newest = [sorted((x / "checkpoints").iterdir())[-1] for x in (one, several)]
    folders = [{x.parent.relative_to(n) for x in n.rglob("*.safetensors")} for n in newest]
    assert folders[0] == folders[1]
    for folder in folders[0]:
        a, b = (tensors(x / folder) for x in newest)
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert (value - b[name]).abs().max() <= limit, (folder, name)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder, whole, whatever ranks have written them."""
    reader = HuggingFaceStorageReader(str(folder))
    found = reader.read_metadata().state_dict_metadata
    whole = {name: torch.zeros(x.size, dtype=x.properties.dtype) for name, x in found.items()}
    torch.distributed.checkpoint.load(whole, storage_reader=reader, no_dist=True)
    return whole


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the cases in one process."""
    folder = tmp_path_factory.mktemp("one")
    finish(started(1, f"{HERE}/rank_cases.py", str(folder), *CASES))
    return folder


@pytest.mark.parametrize(
    ("world", "parts", "names"),
    [
        (2, "null", [*CASES][::2]),
        (2, "null", [*CASES][1::2]),
        (2, "1", ["bupo", "ppo", "gspo", "adapters", "bfloat16"]),
        (4, "2", ["bupo", "ppo"]),
        (4, "null", ["bupo"]),
    ],
)
def test_ranks_equal_one_process(
    world: int, parts: str, names: list[str], one: Path, tmp_path: Path
) -> None:
    """Of four ranks, some have no rollouts of an update, and rows are divided unevenly."""
    program = [f"{HERE}/rank_cases.py", str(tmp_path), *names, f"model.shard_ranks={parts}"]
    finish(started(world, *program))
    for name in names:
        if name == "bfloat16":  # micro-batches of other sizes are rounded differently
            assert_near(one / name, tmp_path / name, 0.02)
        else:
            assert_equal(one / name, tmp_path / name)


VLLM = ["rollout.engine=vllm", "task_options={layers: 2, width: 128, warm_steps: 4}"]


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, ["lora.rank=4"]),
        (4, ["rollout.vllm={tensor_parallel_size: 2}"]),
    ],
)
def test_each_rank_or_pair_of_ranks_has_its_vllm(
    world: int, options: list[str], tmp_path: Path
) -> None:
    few = [*VLLM, *options, "eval.every=0", "steps=3", "bupo.steps=1"]
    finish(run_of(world, tmp_path / "ranks", *few))
    found = rows(tmp_path / "ranks")
    assert len(found) == 3
    assert all(r["sync/logprob_gap"] < 1e-5 and r["rollout/logprob_gap"] < 1e-5 for r in found)
    lines = (tmp_path / "ranks/rollouts/step_000001.jsonl").read_text().splitlines()
    assert len(lines) == 16, "4 prompts with 4 responses each"


BY_SERVER = [
    "rollout.engine=vllm_server", "task_options={layers: 2, width: 128, warm_steps: 4}",
    "eval.every=0", "steps=3", "bupo.steps=1",
]  # fmt: skip


def test_ranks_start_no_server(tmp_path: Path) -> None:
    said = run_of(2, tmp_path, *BY_SERVER).communicate()[0]
    assert "list them in rollout.servers" in said


def test_ranks_share_a_server(tmp_path: Path) -> None:
    """One after the other, with and without adapters, each with all weights of its own."""
    nobody = "rollout.servers=[http://127.0.0.1:9]"
    said = run_of(1, tmp_path / "none", *BY_SERVER, nobody).communicate()[0]
    typed = re.search(r"start it with: .* python (-m .*--port 9.*)", said)
    assert typed, said
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(port) if word == "9" else word for word in shlex.split(typed[1])]
    words += ["--load-format", "dummy"]  # the run sends all weights
    environment = os.environ | ENVIRONMENT | DEVELOPER | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen([sys.executable, *words], env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        while server.poll() is None and not answers(url):
            time.sleep(0.5)
        for lora in ("lora.rank=4", "lora.rank=null"):
            out = tmp_path / lora
            finish(run_of(2, out, *BY_SERVER, lora, f"rollout.servers=[{url}]"))
            assert len(rows(out)) == 3
            for row in rows(out):
                assert row["sync/logprob_gap"] < 1e-5 and row["rollout/logprob_gap"] < 1e-5
    finally:
        server.terminate()
        server.wait()


def answers(url: str) -> bool:
    try:
        return bool(Server(url).call("version"))
    except config.RunError:
        return False


def rank_of(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process ID of a rank."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], **TEXT)
    for pid in children.stdout.split():
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return int(pid)
    raise AssertionError(children)


TEXT: dict[str, Any] = {"capture_output": True, "text": True}


def wait_for(file: Path, launcher: subprocess.Popen[str]) -> None:
    while not file.exists():
        assert launcher.poll() is None, launcher.communicate()[0][-4000:]
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_a_rank_that_ends_ends_the_run(number: signal.Signals, tmp_path: Path) -> None:
    """One message; and the resumed run equals one that was not disturbed, bit for bit."""
    disturbed, whole = tmp_path / "disturbed", tmp_path / "whole"
    plain = ["eval.every=0", "diagnostics.every=0", "optimizer.schedule=constant"]
    watched = ["watchdog.seconds=5", "watchdog.kill=true"]
    launcher = run_of(2, disturbed, "steps=400", *plain, *watched)
    wait_for(disturbed / "checkpoints/step_000004", launcher)
    began, pid = time.monotonic(), rank_of(launcher, 1)
    os.kill(pid, number)
    said = launcher.communicate()[0]
    assert launcher.returncode != 0 and time.monotonic() - began < 60
    lines = [line for line in said.splitlines() if "bupo.run: rank " in line]
    if number == signal.SIGKILL:
        assert len(lines) == 1 and "another rank has ended" in lines[0], said[-3000:]
        assert "rank 0: step " in lines[0] and "resume=auto" in lines[0]
    elif number == signal.SIGTERM:
        assert "stopped; continue with" in said
    else:
        assert "has made no progress for 5 s" in said
    done = len(rows(disturbed)) + 1
    settings = [*plain, f"steps={done}"]
    finish(run_of(2, disturbed, *settings, "resume=auto"))
    finish(run_of(2, whole, *settings))
    assert rows(disturbed) == rows(whole)
    assert run_samples.state(disturbed) == run_samples.state(whole)


def test_another_number_of_ranks_continues(tmp_path: Path) -> None:
    settings = ["eval.every=0", "diagnostics.every=0", "optimizer.schedule=constant"]
    finish(run_of(2, tmp_path / "parts", *settings, "steps=4"))
    finish(run_of(3, tmp_path / "parts", *settings, "resume=auto"))
    finish(run_of(1, tmp_path / "whole", *settings))
    assert_equal(tmp_path / "whole", tmp_path / "parts")


def test_ranks_measure_the_layer(tmp_path: Path) -> None:
    """In a model that has just been made, there is none to find."""
    measured = ["bupo.auto_layer=0.1", "bupo.layer=null"]
    found = []
    for world in (1, 2):
        said = run_of(world, tmp_path / f"{world}", *measured).communicate()[0]
        assert said.count("no clear boundary in 6 responses") == 1
        found.append(json.loads((tmp_path / f"{world}/auto_layer.failed.json").read_text()))
    assert found[0].pop("curve") == pytest.approx(found[1].pop("curve"), abs=1e-5)
    assert found[0].pop("tolerance") == pytest.approx(found[1].pop("tolerance"), abs=1e-5)
    assert found[0] == found[1]


def test_what_all_ranks_refuse_is_said_once(tmp_path: Path) -> None:
    launcher = run_of(2, tmp_path / "run", "bupo.layer=7")
    said = launcher.communicate()[0]
    assert launcher.returncode != 0 and said.count("bupo.layer=7 is out of range") == 1


def test_ranks_that_do_not_make_up_all() -> None:
    given = ["task=bupo.tasks.arithmetic", "rollout.engine=vllm", "model.shard_ranks=2"]
    loaded = config.load(None, [*given, "rollout.vllm={tensor_parallel_size: 2}"])
    check_engine(loaded, 4)
    with pytest.raises(config.ConfigError, match=r"expected a divisor of the .* ranks, 3, got 2"):
        check_engine(loaded, 3)
    with pytest.raises(config.ConfigError, match=r"model.shard_ranks=2: expected a divisor .* 3"):
        loaded.model.parts(3)
    loaded.rollout.vllm["distributed_executor_backend"] = "mp"
    with pytest.raises(config.ConfigError, match="expected none, as several ranks set it"):
        check_engine(loaded, 4)


def test_several_ranks_do_not_train_the_head_alone() -> None:
    given = ["task=bupo.tasks.arithmetic", "policy=custom", "phases=[{lr: {others: 0, head: 1}}]"]
    schedule = Schedule(config.load(None, given))
    schedule.check(6, "a/model")
    with pytest.raises(config.ConfigError, match="but the head, which several ranks cannot train"):
        schedule.check(6, "a/model", several=True)


def test_a_directory_in_use_is_said_once(tmp_path: Path) -> None:
    with run_lock.locked(tmp_path):
        said = run_of(2, tmp_path).communicate()[0]
    assert said.count("is in use by process") == 1


@pytest.fixture
def two_machines() -> Iterator[list[list[str]]]:
    """Prefixes of commands that run them on two machines: here, and in a network of its own."""
    ip, there = shutil.which("ip"), f"bupo{os.getpid()}"
    if ip is None or os.geteuid():
        pytest.skip("needs root and iproute2")
    inside, near, far = [ip, "netns", "exec", there], f"n{os.getpid()}", f"f{os.getpid()}"
    if subprocess.run([ip, "netns", "add", there], capture_output=True).returncode:
        pytest.skip("network namespaces are not allowed here")
    try:
        for command in (
            [ip, "link", "add", near, "type", "veth", "peer", "name", far, "netns", there],
            [ip, "addr", "add", "10.77.0.1/24", "dev", near],
            [ip, "link", "set", near, "up"],
            [*inside, ip, "addr", "add", "10.77.0.2/24", "dev", far],
            [*inside, ip, "link", "set", far, "up"],
            [*inside, ip, "link", "set", "lo", "up"],
        ):
            subprocess.run(command, check=True)
        yield [[], inside, [ip, "link", "set", near, "down"]]
    finally:
        subprocess.run([ip, "netns", "delete", there], check=True)


def test_two_machines_until_their_link_is_cut(
    two_machines: list[list[str]], tmp_path: Path
) -> None:
    """In the middle of a step; both end, and one of them has saved what can be resumed."""
    *prefixes, cut = two_machines
    settings = ["optimizer.schedule=constant", "eval.every=0", "diagnostics.every=0"]
    watched = ["steps=400", "watchdog.seconds=20", "watchdog.kill=true"]
    program = ["-m", "bupo.run", *run_samples.arguments(tmp_path, *settings, *watched)]
    nodes = [
        started(0, *_node(number), *program, prefix=prefix)
        for number, prefix in enumerate(prefixes)
    ]
    wait_for(tmp_path / "checkpoints/step_000004", nodes[0])
    subprocess.run(cut, check=True)
    began = time.monotonic()
    said = [node.communicate()[0] for node in nodes]
    assert time.monotonic() - began < 60 and all(node.returncode for node in nodes), said
    done = len(rows(tmp_path))
    finish(run_of(1, tmp_path, *settings, f"steps={done + 1}", "resume=auto"))


def _node(number: int) -> list[str]:
    where = ["--master_addr=10.77.0.1", "--master_port=29571"]
    return [*LAUNCHER, "--nnodes=2", f"--node_rank={number}", "--nproc_per_node=1", *where]
