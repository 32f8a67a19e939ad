"""The recipes for real data, run: real Hugging Face loading, chat template, Math-Verify, parquet.

With ../shared/data beside the checkout the data are DeepMath and MATH-500, otherwise a few problems
in the same format.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_samples import rows

from bupo.config import shipped
from bupo.rewards.boxed import strict
from bupo.rewards.mathematics import grade
from bupo.run import main

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


def problems(source: str) -> list[dict[str, object]]:
    questions = {"What is $1/4+1/4$?": "\\frac{1}{2}", "Is $7$ prime?": "Yes", "Solve $2x=6$.": "3"}
    return [
        {
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": q}],
            "data_source": source,
            "reward_model": {"ground_truth": answer},
            "extra_info": {"index": n},
        }
        for n, (q, answer) in enumerate(list(questions.items()) * 4)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    if (SHARED / "deepmath-5k.parquet").exists():
        return SHARED
    for name in ("deepmath-5k", "math500"):
        pq.write_table(pa.Table.from_pylist(problems(name)), tmp_path / f"{name}.parquet")
    return tmp_path


def rewarded_by_length(responses: list[str], answers: list[str]) -> list[float]:
    """A random model never boxes the answer; this gives its group a spread to learn from."""
    return [len(r) + grade(r, a) for r, a in zip(responses, answers)]


def test_strict_accepts_every_answer_of_the_data_as_it_is(data: Path) -> None:
    for file in data.glob("*.parquet"):
        rewards = pq.read_table(file)["reward_model"].to_pylist()
        answers = [str(row["ground_truth"]) for row in rewards]
        responses = [f"\\boxed{{no}}, so it is $\\boxed{{{answer}}}$." for answer in answers]
        assert set(strict(responses, answers)) == {1.0}
        # In front: behind a unit ("5.4 \\text{ cents}") everything is dropped.
        assert set(strict(responses, [f"1 + {a}" for a in answers])) == {0.0}


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_two_steps_on_real_data(
    family: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUPO_DATA", str(data))
    out = tmp_path / "run"
    command = [
        "--config", str(shipped(f"tiny_{family}_deepmath.yaml")), "--out", str(out),
        "steps=2", "bupo.steps=1", "rollout.max_new_tokens=8", "data.limit=12", "eval.limit=4",
    ]  # fmt: skip
    assert main(command) == 0
    metrics = rows(out / "metrics.jsonl")
    assert [m["layer"] for m in metrics] == [2, None]
    assert all(m["reward/errors"] == m["reward/timeouts"] == 0 for m in metrics)
    assert all(0 <= m["sync/logprob_gap"] < 1e-4 for m in metrics)
    assert {e["when"] for e in rows(out / "eval.jsonl")} == {"before", "phase_switch", "after"}
    rollouts = rows(out / "rollouts" / "step_000001.jsonl")
    assert len(rollouts) == 16
    assert all("<|im_start|>assistant" in r["prompt"] and "boxed" in r["prompt"] for r in rollouts)


def test_it_trains_on_real_prompts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a reward that has a spread, both phases move the weights of a tied model."""
    monkeypatch.setenv("BUPO_DATA", str(data))
    out = tmp_path / "run"
    command = [
        "--config", str(shipped("tiny_qwen3_deepmath.yaml")), "--out", str(out),
        "steps=2", "bupo.steps=1", "rollout.max_new_tokens=8", "data.limit=12", "eval.files=[]",
        "reward.function=test_real_data:rewarded_by_length",
    ]  # fmt: skip
    assert main(command) == 0
    for row in rows(out / "metrics.jsonl"):
        assert row["policy/grad_norm"] > 0
        assert row["policy/ratio_max"] > 1
