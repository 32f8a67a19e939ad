"""Damaged and hostile input: one line, exit status 2, never a traceback, and nothing executed."""

import json
import os
import random
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import browser as chrome
import pyarrow.parquet as pq
import pytest
import torch
from analyze_samples import tiny_model
from report_samples import write_run
from rl_samples import data_file, tiny_tokenizer, verl_row, write_parquet
from run_samples import arguments, run

from bupo import analyze, config, report
from bupo.commands.models import load_model
from bupo.config import ConfigError, DataConfig, RewardConfig
from bupo.data.prompts import load_prompts
from bupo.rewards.choice import make_reward
from bupo.rl import checkpoint
from bupo.run import main
from bupo.runlog import run_directory

VALUES = [
    "null", "true", "-1", "0", "1e309", ".nan", "-.inf", "''", "[]", "{}", "[[]]", "{a: {b: 1}}",
    "999999999999999999999", "0x1F", "1:30", "2026-01-01", "'\\ud800'", '"\\0"', "!!python/none x",
    "!!binary aGk=", "&a [*a]", "${steps}", "${oc.env:NOTHING_SUCH}", "${", "%", "@", "\t", "- a",
]  # fmt: skip
BASE = {
    "steps": "6", "seed": "0", "algorithm": "bupo", "advantage": "grpo",
    "bupo": "{layer: 1, steps: 3}", "rollout": "{prompts: 4, samples: 4, max_new_tokens: 12}",
    "task": "bupo.tasks.arithmetic", "data": "{limit: 6}", "eval": "{samples: 2, pass_k: [1, 2]}",
    "reward": "{function: 'bupo.tasks.arithmetic:reward'}", "optimizer": "{lr: 1.0e-3}",
    "task_options": "{layers: 2, width: 32, warm_steps: 4, eval_problems: 4}",
}  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_mutated_configurations(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    """A value, a key or a character of a valid file replaced: it runs, or is one line."""
    rng, file = random.Random(seed), tmp_path / "config.yaml"
    for _ in range(25):
        settings = dict(BASE)
        how = rng.choice(["value", "key", "character", "character"])
        if how == "value":
            settings[rng.choice(list(settings))] = rng.choice(VALUES)
        elif how == "key":
            settings[rng.choice([*VALUES, "__class__", "_target_", "é"])] = rng.choice(VALUES)
        text = "".join(f"{key}: {value}\n" for key, value in settings.items())
        if how == "character":
            place = rng.randrange(len(text))
            text = (
                text[:place]
                + rng.choice("{}[]:,&*!|>'\"%@`#\0\x07\ufeff\u2028 \n\t$")
                + (text[place + rng.randrange(3) :])
            )
        file.write_text(text)
        out = tmp_path / "run"
        status = main(["--config", str(file), f"out={out}", "--dry_run"])
        errors = capsys.readouterr().err
        assert status in (0, 2) and not out.exists(), text
        if status == 2:
            assert errors.splitlines()[-1].startswith("bupo.run: "), (text, errors)
            assert "Traceback" not in errors and errors.count("\n") == 1, (text, errors)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_mutated_data(kind: str, tmp_path: Path) -> None:
    """Bytes, and structures, that a download or a script can leave: prompts, or one line."""
    tokenizer, rng = tiny_tokenizer(tmp_path), random.Random(kind)
    rows = pq.read_table(data_file("math500", tmp_path)).slice(0, 4).to_pylist()
    file = tmp_path / f"data.{kind}"
    if kind == "parquet":
        write_parquet(file, rows)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = file.read_bytes()
    read = refused = 0
    for n in range(200):
        data = bytearray(whole)
        if n % 2:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == "jsonl" and n % 4:
            row = json.loads(json.dumps(rows[0]))
            row[rng.choice(list(row))] = rng.choice(
                [None, [], {}, "", "\ud800", "\0", 7, [None], [{"role": 1}], {"ground_truth": [1]},
                 [{"role": "user", "content": None}], [{"role": "user", "content": [1]}]]
            )  # fmt: skip
            data = bytearray((json.dumps(row) + "\n").encode())
        else:
            del data[rng.randrange(len(data)) :]
        file.write_bytes(data)
        try:
            prompts, _ = load_prompts([str(file)], tokenizer, DataConfig(overlong="drop"))
        except ConfigError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and str(error), error
        else:
            read += 1
            assert all(p.token_ids and isinstance(p.answer, str) for p in prompts)
    assert refused > 50, (read, refused)


def test_every_file_of_a_checkpoint_is_guarded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bit turned, the end cut off, the file gone: found before anything of it is used."""
    out = tmp_path / "run"
    few = ["steps=2", "bupo.steps=1", "eval.every=0", "advantage=ppo", "checkpoint.every=0"]
    few.append("optimizer.schedule=constant")
    assert run(out, *few) == 0
    (folder,) = run_directory.checkpoints(out)[-1:]
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) >= 8
    checkpoint.verify(folder)
    for file in files:
        content = file.read_bytes()
        turned = bytearray(content)
        turned[len(turned) // 2] ^= 1
        for damaged in (bytes(turned), content[:-3], None):
            if damaged is None and file.name in ("trainer.json", checkpoint.CHECKSUMS):
                continue  # no checkpoint then, or one of before there were checksums
            file.unlink() if damaged is None else file.write_bytes(damaged)
            try:
                with pytest.raises(ConfigError, match=r"is damaged: .*resume=auto continues from"):
                    checkpoint.verify(folder)
            finally:
                file.write_bytes(content)
    model = folder / "model.safetensors"
    turned = bytearray(model.read_bytes())
    turned[-3] ^= 1
    model.write_bytes(turned)
    capsys.readouterr()
    assert run(out, *few, "resume=auto", "steps=3") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "is damaged: model.safetensors has changed since it was written; remove that" in last


HOSTILE = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>'
    '</script><svg onload=window.hacked=3>\'"\u2028\u2029\0]]>--!><a href="javascript:hacked">'
    "{{ 7 * 7 }}{% raw %}\\u003cscript\\u003e"
)


def test_hostile_text_in_a_browser(tmp_path: Path) -> None:
    """Through every way into both pages: prompts, responses, names of models, sets and runs."""
    name = "<img src=x onerror=window.hacked=4>"
    evals = [
        {"step": step, "when": "before", "dataset": HOSTILE, "n": 4, "k_samples": 8, "avg": 0.5,
         "avg_se": 0.1, "pass@1": 0.5, "pass@1_se": 0.1}
        for step in (0, 40)
    ]  # fmt: skip
    training = write_run(tmp_path / name, response=HOSTILE, evals=evals)
    (training / "config.yaml").write_text(f"name: {json.dumps(HOSTILE)}\n")
    pages = [report.write_report(training)]
    model = Path(tiny_model(tmp_path, layers=2))
    model = model.rename(tmp_path / f"model{name}")
    texts = tmp_path / "texts.jsonl"
    rows = [{"prompt": HOSTILE, "response": HOSTILE, "data_source": HOSTILE} for _ in range(2)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "analysis"
    command = ["--model", str(model), "--data", str(texts), "--out", str(out), "responses=column"]
    assert analyze.main(command) == 0
    pages.append(out / "report.html")
    with chrome.chromium(tmp_path / "profile") as driver:
        for page in pages:
            chrome.opened(driver, page)
            time.sleep(0.2)
            assert driver.execute_script("return window.hacked") is None, page
            assert "49" not in driver.title
            found = driver.execute_script(
                "return [...document.querySelectorAll('img, svg, a')].filter("
                "x => x.onerror || x.onload || (x.href || '').toString().startsWith('javascript'))"
            )
            assert found == [], page


def test_hostile_answers_are_neither_run_nor_waited_for(tmp_path: Path) -> None:
    """Nothing is evaluated as Python, no worker grows beyond its bound, all of them are graded."""
    file = tmp_path / "made"
    code = f"__import__('os').system('touch {file}')"
    hostile = [
        code,
        f"\\text{{{code}}}",
        f"\\operatorname{{{code}}}",
        f"lambda: {code}",
        f"().__class__.__bases__[0].__subclasses__() or {code}",
        f'exec("{code}")',
        *("9^{9^{9^{9}}}", "\\frac{1}{0}", "10!!!!!!!!!", "2^{2^{40}}", "x^{10^{10}}-1"),
        *("(" * 5000, "{" * 5000 + "}" * 5000, "\\sqrt" * 3000, "x" * 200_000),
        *("1+" * 20_000 + "1", "1" * 100_000, "\\binom{10^9}{10^8}", "matrix(10**9)"),
        *("\\int_0^1 x^x^x dx", "\\sum_{n=1}^{\\infty} n", "\\lim_{x\\to 0} \\frac{\\tan x}{x^2}"),
        *("\ud800", "\0", "\\input{/etc/passwd}", "\\write18{ls}", "factor(2**4096+1)"),
    ]
    pairs = [(f"\\boxed{{{text}}}", "1") for text in hostile]
    pairs += [("\\boxed{1}", text) for text in hostile] + [("\\boxed{2}", "2")] * 3
    reward = make_reward(RewardConfig(timeout=3, workers=2))
    begin = time.monotonic()
    try:
        grades = reward.grade(pairs)
        peak = max(
            int(line.split()[1])
            for worker in reward._workers
            for line in Path(f"/proc/{worker.process.pid}/status").read_text().splitlines()
            if line.startswith("VmPeak")
        )
    finally:
        reward.close()
    assert not file.exists()
    assert grades.rewards[-3:] == [1.0] * 3
    right = [text[:60] for text, r in zip(hostile, grades.rewards) if r == 1]
    assert not right, "nothing of this equals 1"
    assert time.monotonic() - begin < 3 * len(pairs) and grades.timeouts < len(pairs)
    assert peak <= 4 << 20, "kB: the workers' address space"


ABUSE = """
import math, threading, torch
from bupo import ops

torch.manual_seed(0)
x, w, t = torch.randn(6, 8), torch.randn(30, 8), torch.randint(30, (6,))
one = torch.ones(6)

def attempt(call):
    try:
        call()
    except (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError, OverflowError):
        pass

big = torch.randn(64)
overlapping = big.as_strided((6, 8), (1, 1))
heads = [w, w.t().contiguous().t(), w[::2], w.expand(30, 8), torch.zeros(30, 8)[:, ::1],
         big.as_strided((30, 8), (1, 1)), torch.empty(0, 8), torch.empty(30, 0), w.half(),
         w.to(torch.complex64), w.to_sparse(), torch.full((30, 8), math.inf), w.double(),
         torch.empty(30, 8, device="meta"), None, 3, w[0]]
hiddens = [x, overlapping, x.t().contiguous().t(), x[:0], torch.full((6, 8), math.nan), x[None],
           x.bfloat16(), x.int(), torch.empty(6, 8, device="meta"), x[:, :4], "x", x * 1e38]
targets = [t, t.int(), t - 100, t + 2**40, t.float(), t[:3], torch.full((6,), -2**63), t * 0 - 100]
for head in heads:
    for hidden in hiddens:
        for target in targets:
            attempt(lambda: ops.lm_head_logprobs(hidden, head, target))
            attempt(lambda: ops.policy_loss(hidden, head, target, one, one, one))
for value in (0.0, -1.0, math.nan, math.inf, 1e-300, 1e300, True, None, "1", torch.zeros(6)):
    for name in ("temperature", "softcap", "clip_low", "dual_clip", "kl_coef", "entropy_coef",
                 "max_log_ratio"):
        attempt(lambda: ops.policy_loss(x, w, t, one, one, one, **{name: value}))
threads = [
    threading.Thread(
        target=lambda: [
            ops.policy_loss(x.clone().requires_grad_(), w, t, one, one, one).loss.backward()
            for _ in range(50)
        ]
    )
    for _ in range(8)
]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("alive")
"""


def test_no_abuse_of_the_operators_ends_the_process() -> None:
    """Errors of Python at most: no crash, under a bound of memory, from eight threads."""

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ABUSE)],
        capture_output=True, text=True, preexec_fn=bounded, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "alive", done.stderr[-3000:]


@pytest.mark.parametrize(
    "environment",
    [{"LC_ALL": "C", "LANG": "C"}, {"TERM": "dumb"}, {"HOME": "/nonexistent"}],
    ids=lambda e: next(iter(e)),
)
def test_odd_surroundings(environment: dict[str, str], tmp_path: Path) -> None:
    """A run in a folder with spaces and letters, whatever the terminal is."""
    out = tmp_path / "a run é 中"
    few = ["steps=1", "bupo.steps=0", "eval.every=0", "diagnostics.every=0"]
    command = [sys.executable, "-m", "bupo.run", *arguments(out, *few)]
    surroundings: dict[str, Any] = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=surroundings | environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert (out / "report.html").is_file()


def test_nobody_listens_any_more(tmp_path: Path) -> None:
    """Standard error that was closed, as by a shell that is gone, does not stop training."""
    out = tmp_path / "run"
    few = ["steps=2", "bupo.steps=1", "eval.every=0", "diagnostics.every=0"]
    command = [sys.executable, "-m", "bupo.run", *arguments(out, *few)]
    surroundings = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(command, env=surroundings, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_prompts_with_a_half_of_a_character(tmp_path: Path) -> None:
    """A lone surrogate, which no UTF-8 holds, is one line."""
    row = verl_row("What is \ud800?", "1")
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=r"row 0 of .*: the prompt is not valid text"):
        load_prompts([str(file)], tiny_tokenizer(tmp_path), DataConfig())


TEMPLATES = [
    "{% for i in range(999999999) %}x{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ 1 / 0 }}",
    "{% if %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_is_a_hostile_program(template: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = template
    file = write_parquet(tmp_path / "data.parquet", [verl_row("2+2?", "4")])
    with pytest.raises(ConfigError, match=r"row 0 of .*: the tokenizer's chat template failed: "):
        load_prompts([str(file)], tokenizer, DataConfig())


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**7}, {"hidden_size": -1}, {"hidden_size": "x"}, {"head_dim": 7},
        {"num_attention_heads": 0}, {"vocab_size": 0}, {"rope_parameters": {"rope_type": "nope"}},
        {"max_position_embeddings": -5}, {"dtype": "float99"},
        {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "e"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_model_folder_that_is_hostile(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Absurd numbers, and code of its own, which is not run."""
    folder = Path(tiny_model(tmp_path, layers=2))
    settings = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    file = write_parquet(tmp_path / "data.parquet", [verl_row(f"{n}+2?", "4") for n in range(4)])
    command = [
        f"model.path={folder}", f"data.train=[{file}]", "task=null", "eval.every=0", "--dry_run",
        "bupo.layer=1", "rollout.prompts=4", "rollout.max_new_tokens=4", "data.overlong=drop",
    ]  # fmt: skip
    assert main(command) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("bupo.run: ") and errors.count("\n") == 1, errors
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_obeyed(tmp_path: Path) -> None:
    folder, ran = Path(tiny_model(tmp_path, layers=2)), tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {ran}",)

    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({"weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded: Weights only load failed"):
        load_model(config.load(None, []), str(folder))
    assert not ran.exists()
