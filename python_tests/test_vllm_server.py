"""vLLM in another process: the same policy as the trainer's, weights over TCP, and what happens
when the server is lost. One server for the file, which holds the model's weights between tests."""

import contextlib
import copy
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_vllm import (
    CONFIG,
    NEAR,
    TEXTS,
    assert_sampled_from,
    command,
    never,
    perturb,
    run,
    sync_of,
    trainer_of,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from bupo import adapters, progress
from bupo.config import ConfigError, LoraConfig, RunError
from bupo.rl.weight_sync import gap
from bupo.rollouts import vllm_options as options
from bupo.rollouts import vllm_serving
from bupo.rollouts.vllm_server import VllmServerEngine
from bupo.rollouts.vllm_serving import Server
from bupo.tasks import tiny
from bupo.types import Policy, Prompt

SERVER = dataclasses.replace(CONFIG, engine="vllm_server")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Engine with a server of its own, model and tokenizer of a tied Qwen3 with padded rows."""
    options, folder = {"layers": 3, "width": 128}, tmp_path_factory.mktemp("tiny")
    files = tiny.prepare(options, folder)
    tiny.build(options, files.model)
    tokenizer = AutoTokenizer.from_pretrained(files.model)
    model = AutoModelForCausalLM.from_pretrained(files.model, dtype=torch.float32)
    given = (str(files.model), tokenizer, SERVER, 400, "float32", 0)
    engine = VllmServerEngine(*given, folder / "engine.log")
    yield engine, model, tokenizer, given
    engine.close()


@pytest.fixture
def model(parts):
    return parts[1]


@pytest.fixture
def engine(parts):
    engine, model = parts[:2]
    before = copy.deepcopy(model.state_dict())
    engine.load(adapters.all_weights(model).items())
    yield engine
    model.load_state_dict(before)


@pytest.fixture
def prompts(parts):
    return [Prompt(n, "test", t, parts[2](t)["input_ids"], "") for n, t in enumerate(TEXTS)]


def test_log_probs_are_those_of_the_trainer(engine, model, prompts, parts):
    told = []
    with progress.watched_by(told.append):
        rollouts = engine.generate(prompts, 8, "seed", never)
    assert [r.group for r in rollouts] == [n for n in range(3) for _ in range(8)]
    assert_sampled_from(model, rollouts, len(parts[2]))
    assert told == sorted(told) and told[-1] == 1
    assert len({tuple(r.response_ids) for r in rollouts[:8]}) > 1, "responses of a group differ"
    truth = trainer_of(model).forward.token_stats(rollouts, Policy(None), temperature=1.0).logprobs
    assert gap(engine.score(rollouts), truth) < NEAR


def test_new_weights_arrive(engine, model, prompts):
    sync, log_probs = sync_of(engine, model, prompts)
    rollouts = engine.generate(prompts, 2, "seed", never)
    stale = engine.score(rollouts)
    moved = perturb(model, ("layers.2", "model.norm"))
    assert gap(stale, log_probs(rollouts)) > 0.1, "the change can be seen"
    assert sync(moved) < NEAR
    assert gap(engine.score(rollouts), log_probs(rollouts)) < NEAR


def test_all_weights_of_a_model_with_adapters(engine, model, prompts):
    changed = copy.deepcopy(model)
    adapters.add(changed, LoraConfig(rank=4, targets=["q_proj", "up_proj"]), "a/model", seed=0)
    for name, parameter in adapters.parameters(changed).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    perturb(model)  # as if another run had used the server
    engine.load(adapters.all_weights(model).items())
    weights = adapters.all_weights(changed)
    assert weights.keys() == adapters.all_weights(model).keys()
    engine.load(weights.items())
    rollouts = engine.generate(prompts, 2, "seed", never)
    theirs = trainer_of(changed).forward.token_stats(rollouts, Policy(None), temperature=1.0)
    assert gap(engine.score(rollouts), theirs.logprobs) < NEAR


def test_a_stop_request_is_heard(engine, prompts):
    whole = engine.generate(prompts, 64, "seed", never)
    some = engine.generate(prompts, 64, "seed", lambda: True)
    assert len(some) < len(whole) == 3 * 64
    of_group = {(r.group, tuple(r.response_ids)) for r in whole}
    assert all((r.group, tuple(r.response_ids)) in of_group for r in some)


def test_a_server_for_another_run_is_refused(parts):
    """One line that tells what differs and how to start a right one."""
    engine, _, tokenizer, (model, *_) = parts
    url = engine._servers[0].url

    def arguments(longest=400, dtype="float32"):
        return options.arguments(model, len(tokenizer), SERVER, longest, dtype, 0, False)

    right = arguments()
    assert vllm_serving.check_server(Server(url), right) == vllm_serving.GLOO
    other = right | {"additional_config": {options.SHAPE: "llama with 2 layers"}}
    for changed, message in (
        (
            other,
            "serves qwen3 with 3 layers of width 128 and 259 of .*, but the run needs llama with 2",
        ),
        (arguments(longest=401), "takes 412 tokens, but prompt and response have up to 413; start"),
        (
            arguments(dtype="bfloat16"),
            "has dtype=float32, but the run needs bfloat16; start it with",
        ),
    ):
        with pytest.raises(ConfigError, match=rf"^rollout.servers: {url} {message}"):
            vllm_serving.check_server(Server(url), changed)
    with pytest.raises(
        ConfigError, match=r"does not answer .* start it with: VLLM_SERVER_DEV_MODE"
    ):
        vllm_serving.check_server(Server("http://127.0.0.1:9"), right)


def free_url():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_two_servers_of_which_one_is_lost(parts, prompts, monkeypatch, tmp_path):
    """They are started as the message tells; one is killed, and started again with other weights;
    the next run gives both its weights."""
    _, model, tokenizer, (folder, *given) = parts
    urls = [free_url(), free_url()]
    monkeypatch.setattr(vllm_serving, "RETRY_AFTER", (0.1, 0.1))
    config = dataclasses.replace(SERVER, servers=urls)

    def start(url):
        alone = dataclasses.replace(SERVER, servers=[url])
        with pytest.raises(ConfigError) as refused:
            VllmServerEngine(folder, tokenizer, alone, *given[2:])
        line = str(refused.value).partition("start it with: ")[2]
        line = line.replace("python", sys.executable, 1).replace("0.0.0.0", "127.0.0.1")
        with open(tmp_path / "log", "a") as log:
            return subprocess.Popen(
                line, shell=True, start_new_session=True, stdout=log, stderr=log,
                env=os.environ | options.ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            )  # fmt: skip

    def wait(url, started):
        while True:
            try:
                return Server(url).call("health")
            except RunError:
                assert started.poll() is None, (tmp_path / "log").read_text()[-2000:]
                time.sleep(1)

    servers = {url: start(url) for url in urls}
    try:
        for url, server in servers.items():
            wait(url, server)
        perturb(model)
        engine = VllmServerEngine(folder, tokenizer, config, *given[2:])
        engine.load(adapters.all_weights(model).items())
        rollouts = engine.generate(prompts, 2, "seed", never)  # groups 0 and 2 are for the first
        assert [r.group for r in rollouts] == [0, 0, 1, 1, 2, 2]
        assert_sampled_from(model, rollouts, len(tokenizer))
        killed = threading.Timer(1, os.killpg, (servers[urls[1]].pid, signal.SIGKILL))
        killed.start()
        with pytest.raises(
            RunError,
            match=rf"server {urls[1]} does not answer .* for \d+ s; start it again, then resume",
        ):
            while True:
                engine.generate(prompts, 64, "seed", never)
        servers[urls[1]].wait()
        servers[urls[1]] = start(urls[1])
        wait(urls[1], servers[urls[1]])
        with pytest.raises(RunError, match="does not hold the weights of this run: it was started"):
            engine.generate(prompts, 1, "seed", never)
        again = VllmServerEngine(folder, tokenizer, config, *given[2:])
        again.load(adapters.all_weights(model).items())
        assert_sampled_from(model, again.generate(prompts, 1, "seed", never), len(tokenizer))
        again.close()
    finally:
        for server in servers.values():
            os.killpg(server.pid, signal.SIGKILL)


def test_a_server_gets_the_gpus_after_the_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert vllm_serving.gpus({}) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,6")
    assert vllm_serving.gpus({"tensor_parallel_size": 2}) == {"CUDA_VISIBLE_DEVICES": "7,6"}
    with pytest.raises(ConfigError, match="needs 4 more GPUs than the trainer's, found 2"):
        vllm_serving.gpus({"tensor_parallel_size": 2, "pipeline_parallel_size": 2})


def test_an_answer_that_is_no_response_of_this_run(parts):
    """Aborted by somebody, or without or with other weights."""
    server = Server("http://there:1")
    server.weights = "mine"
    whole = {"finish_reason": "stop", "weight_versions": [{"version": "mine"}]}
    server.check({"choices": [whole]})
    for wrong, message in (
        ({"finish_reason": "abort"}, "another program has made the vLLM server http://there:1 end"),
        ({"weight_versions": [{"version": "mine"}, {"version": "theirs"}]}, "does not hold"),
        ({"weight_versions": None}, "does not hold the weights of this run"),
    ):
        with pytest.raises(RunError, match=message):
            server.check({"choices": [whole | wrong]})


def test_a_run_starts_a_server_and_resumes_without_it(tmp_path):
    """The server is killed in the middle."""
    out, engine = tmp_path / "run", "rollout.engine=vllm_server"
    with subprocess.Popen(**command(out, engine, "steps=300"), stderr=subprocess.PIPE) as started:
        while not (out / "checkpoints/step_000002").is_dir():
            assert started.poll() is None, started.stderr.read()
            time.sleep(0.1)
        os.killpg(os.getpgid(servers_in(out)[0]), signal.SIGKILL)
        said = started.communicate()[1]
    assert started.returncode == 1 and "the vLLM server has ended; its output is in" in said
    steps = len((out / "metrics.jsonl").read_text().splitlines()) + 1
    rows = run(out, engine, f"steps={steps}", "resume=auto")
    assert [r["step"] for r in rows] == list(range(1, steps + 1))
    assert all(r["sync/logprob_gap"] < NEAR and r["rollout/logprob_gap"] < NEAR for r in rows)
    assert none_is_left_in(tmp_path)


def test_a_server_ends_with_a_killed_run(tmp_path):
    """The run is killed while its server starts."""
    arguments = command(tmp_path, "rollout.engine=vllm_server")
    with subprocess.Popen(**arguments, stderr=subprocess.PIPE) as killed:
        while not servers_in(tmp_path):
            assert killed.poll() is None, killed.stderr.read()
            time.sleep(0.1)
        killed.kill()
    assert none_is_left_in(tmp_path)


def none_is_left_in(folder):
    deadline = time.monotonic() + 60
    while (left := servers_in(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left == []


def servers_in(folder):
    """Numbers of the processes whose output goes to a file below a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):
            if entry.readlink().is_relative_to(folder):
                found.append(int(entry.parts[2]))
    return found
