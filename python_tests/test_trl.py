"""bupo.integrations.trl: the trainers of TRL learn the same with bupo's op, and BuPO in their loop
is that of bupo.run."""

import copy
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from analyze_samples import tiny_model
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from bupo.config import LossConfig
from bupo.integrations import transformers
from bupo.integrations import trl as ours
from bupo.integrations.trl import BuPOMixin, BuPOTrainer, use_bupo_ops
from bupo.ops import reference
from bupo.policy import hidden_states, internal_policy, parameter_layers, unembedding
from bupo.rl.losses import policy_loss
from bupo.samples import Sample, micro_batches

pytestmark = pytest.mark.usefixtures("one_thread")
CHATS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"What is {n} plus {n + 1}?"}]} for n in range(8)]
)
TEXTS = Dataset.from_list([{"text": "a" * (8 + n)} for n in range(8)])
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 2, "logging_steps": 1,
    "report_to": [], "use_cpu": True, "save_strategy": "no", "seed": 3, "bf16": False,
}  # fmt: skip
SAMPLED: dict[str, Any] = {
    "num_generations": 4, "max_completion_length": 6, "beta": 0.05, "temperature": 0.7,
    "gradient_accumulation_steps": 2, "entropy_coef": 0.01,
}  # fmt: skip


class Rloo(BuPOMixin, RLOOTrainer):
    pass


class Sft(BuPOMixin, SFTTrainer):
    pass


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Differs within a group, whatever the model writes."""
    texts = [x[0]["content"] for x in completions]
    return [sum(map(ord, text)) % 7 + 0.1 * n for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("models"))


def trainer(folder: str, out: Path, kind: Any = GRPOTrainer, more: Any = (), **options: Any) -> Any:
    """A trainer of that class; more: its arguments beside the configuration, which has options."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given: dict[str, Any] = {"model": model, "processing_class": tokenizer}
    if issubclass(kind, SFTTrainer):
        args = SFTConfig(output_dir=str(out), **COMMON | options)
        return kind(**given, args=args, train_dataset=TEXTS, **dict(more))
    config = GRPOConfig if issubclass(kind, GRPOTrainer) else RLOOConfig
    settings = COMMON | SAMPLED | options
    if config is RLOOConfig:
        del settings["entropy_coef"]
    args = config(output_dir=str(out), **settings)
    return kind(**given, args=args, train_dataset=CHATS, reward_funcs=reward, **dict(more))


def losses(of: Any) -> list[dict[str, float]]:
    return [row for row in of.state.log_history if "loss" in row]


def check_head(op: Any, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> None:
    """A call that a trainer makes is exact, gradients included, whatever the trainer's precision:
    with cast_lm_head_to_fp32 it is float32 under autocast as well."""
    found = []
    for module, dtype in ((op, hidden.dtype), (reference.lm_head_logprobs, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        out = module(*leaves, targets, **options)
        (out.logprobs + out.entropy).sum().backward()
        found.append([out.logprobs, out.entropy, *(leaf.grad for leaf in leaves)])
    for mine, exact in zip(*found, strict=True):
        assert (mine - exact).norm() <= 1e-5 * exact.norm()


ADAPTERS = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
HALF = {"bf16": True, "cast_lm_head_to_fp32": True}


@pytest.mark.parametrize(
    ("kind", "calls_of_op", "more", "options"),
    [
        # Two micro-batches in each of 2 updates, as many for the reference, and in RLOO for the old
        # log-probs.
        (GRPOTrainer, 2 * (2 + 2), {}, {}),
        (RLOOTrainer, 2 * (2 + 2 + 2), {}, {}),
        (GRPOTrainer, 2 * (2 + 2), ADAPTERS, {}),
        (GRPOTrainer, 2 * (2 + 2), {}, HALF),
        (SFTTrainer, 2, {}, {}),
    ],
)
def test_a_trainer_learns_the_same_with_the_op(
    folder: str, tmp_path: Path, kind: Any, calls_of_op: int, more: Any, options: dict[str, Any]
) -> None:
    plain = {
        "optim": "sgd",
        "learning_rate": 0.3,
    }  # AdamW would blow up rounding of small gradients
    own, with_op = (trainer(folder, tmp_path, kind, more, **plain, **options) for _ in range(2))
    use_bupo_ops(with_op)
    if options is HALF:  # layers in bfloat16 would turn a last bit into one of 2^8, on some CPUs
        for name, parameter in (*own.model.named_parameters(), *with_op.model.named_parameters()):
            parameter.requires_grad_(name == "model.norm.weight")
    start = [parameter.detach().clone() for parameter in own.model.parameters()]
    calls = 0
    original = transformers.ops.lm_head_logprobs

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if torch.is_grad_enabled():
            check_head(original, *args, **options)
        return original(*args, **options)

    set_seed(5)
    own.train()
    set_seed(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.ops, "lm_head_logprobs", counted)
        with_op.train()
    assert calls == calls_of_op
    supervised = kind is SFTTrainer
    keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy" if supervised else "kl")
    for theirs, mine in zip(losses(own), losses(with_op), strict=True):
        for key in keys:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=2e-5), key
    assert not supervised or losses(own)[-1]["mean_token_accuracy"] > 0.1
    moves = [
        torch.cat([(p.detach() - x).flatten() for p, x in zip(of.model.parameters(), start)])
        for of in (own, with_op)
    ]
    assert (moves[0] - moves[1]).norm() <= 1e-4 * moves[0].norm()


@pytest.mark.parametrize("kind", [BuPOTrainer, Rloo])
def test_phases(folder: str, tmp_path: Path, kind: Any) -> None:
    """Layers above the trained one stay as they are until the final policy's turn."""
    start = AutoModelForCausalLM.from_pretrained(folder)
    more = {"layer": 2, "internal_steps": 2}
    made = trainer(folder, tmp_path, kind, more, max_steps=2)
    made.train()
    places = parameter_layers(start)
    moved = {
        places[name]
        for (name, before), after in zip(start.named_parameters(), made.model.parameters())
        if not torch.equal(before, after)
    }
    assert moved == {0, 1, 2}, "embedding, which is the head, and layers 1 and 2 of 3"
    assert [row["bupo/layer"] for row in losses(made)] == [2, 2]
    both = trainer(folder, tmp_path, kind, more, max_steps=4)
    both.train()
    assert [row["bupo/layer"] for row in losses(both)] == [2, 2, 0, 0]
    last = dict(both.model.named_parameters())
    top = [name for name, place in places.items() if place in (3, 4)]
    assert top and all(not torch.equal(last[n], start.get_parameter(n)) for n in top)


@pytest.mark.parametrize("final_norm", [False, True])
def test_loss_and_gradient_are_those_of_bupo(folder: str, tmp_path: Path, final_norm: bool) -> None:
    """On the responses of a generation of TRL, with clipped ratios and a reference model."""
    more = {"layer": 2, "internal_steps": 2, "final_norm": final_norm}
    made = trainer(
        folder, tmp_path, BuPOTrainer, more, loss_type="dapo", epsilon=1e-4, entropy_coef=0.0
    )
    rows = [CHATS[n // 4] for n in range(8)]
    inputs = made._generate_and_score_completions(rows)
    count = inputs["completion_ids"].shape
    inputs["old_per_token_logps"] = inputs["ref_per_token_logps"] + 0.05 * torch.randn(count)
    made.current_gradient_accumulation_steps = made.args.steps_per_generation = 1
    theirs = made._compute_loss(made.model, inputs)
    theirs.backward()

    model = AutoModelForCausalLM.from_pretrained(folder)
    mask, samples = inputs["completion_mask"].bool(), []
    for n, counted in enumerate(mask):
        prompt = inputs["prompt_ids"][n][inputs["prompt_mask"][n].bool()].tolist()
        response = inputs["completion_ids"][n][counted].tolist()
        streams = {
            "old": inputs["old_per_token_logps"][n][counted],
            "reference": inputs["ref_per_token_logps"][n][counted],
            "advantage": inputs["advantages"][n].expand(len(response)),
            "weight": torch.full((len(response),), 1 / int(mask.sum())),
        }
        ids = [False] * len(prompt) + [True] * len(response)
        samples.append(Sample(prompt + response, ids, streams=streams))
    (batch,) = micro_batches(samples, 10**6, torch.device("cpu"), pad=0)
    with internal_policy(model, 2, final_norm):
        hidden = batch.pick(hidden_states(model, batch.input_ids, batch.attention_mask))
    head = unembedding(model)
    given = {"weight": head.weight, "bias": None, "softcap": None, "temperature": 0.7}
    settings = LossConfig(clip_low=1e-4, clip_high=1e-4, kl_coef=0.05)
    mine = policy_loss(hidden, given, batch, settings).loss
    mine.backward()
    assert float(theirs) == pytest.approx(float(mine), rel=1e-5, abs=1e-7)
    for name, parameter in model.named_parameters():
        other = made.model.get_parameter(name).grad
        assert (parameter.grad is None) == (other is None), name
        if other is not None:
            torch.testing.assert_close(other, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(folder: str, tmp_path: Path) -> None:
    """It was stopped in phase 1, and is resumed across the switch."""
    more, saves = {"layer": 1, "internal_steps": 2}, {"save_strategy": "steps", "save_steps": 1}
    whole = trainer(folder, tmp_path / "whole", BuPOTrainer, more, max_steps=3, **saves)
    whole.train()
    again = trainer(folder, tmp_path / "again", BuPOTrainer, more, max_steps=3, **saves)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    assert [row["bupo/layer"] for row in losses(again)] == [1, 1, 0]
    for one, other in zip(whole.model.parameters(), again.model.parameters()):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_responses_of_a_phase_are_not_used_in_the_next(folder: str, tmp_path: Path) -> None:
    """After a resume within a generation, TRL would use the new responses past the switch."""
    more, saves = {"layer": 1, "internal_steps": 2}, {"save_strategy": "steps", "save_steps": 1}
    settings = {"max_steps": 4, "num_iterations": 2, **saves}
    trainer(folder, tmp_path / "whole", BuPOTrainer, more, **settings).train()
    again = trainer(folder, tmp_path / "again", BuPOTrainer, more, **settings)
    made_at: list[int] = []
    original = again._generate_and_score_completions

    def noted(rows: Any) -> Any:
        made_at.append(again.state.global_step)
        return original(rows)

    again._generate_and_score_completions = noted
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    assert made_at == [1, 2, 3], "after step 2, which ends the phase, they are made anew"


def test_generation_is_what_it_was(tmp_path: Path) -> None:
    """It reads the signature: positions of a left-padded batch come from the mask."""
    model = families.build("gpt2")
    trl_utils.add_fused_lm_head(model)
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long(), "max_new_tokens": 4}
    before = model.generate(**given, do_sample=False)
    signature = inspect.signature(model.forward)
    ours._give_head("test", model, {}, False, lambda: ours.FINAL)
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model.generate(**given, do_sample=False), before)


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ({"layer": 9, "internal_steps": 2}, {}, "layer: expected an int in 1..3, got 9"),
        ({"layer": 1}, {}, "expected a layer and at least one step, .* got layer=1 and internal_"),
        ({}, {}, "or a schedule, got layer=None and internal_steps=0"),
        ({"schedule": [(1, 2)]}, {}, "expected None as its last layer"),
        ({"schedule": [(1, 0), (None, 1)]}, {}, "expected at least one step each"),
        ({"layer": 1, "internal_steps": 3}, {"num_iterations": 2}, "a multiple of 2"),
        ({"layer": 1, "internal_steps": 1}, {"steps_per_generation": 3}, "a multiple of 3"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    folder: str, tmp_path: Path, more: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(folder, tmp_path, BuPOTrainer, more, **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_fsdp_enabled": True}, "BuPOMixin: FSDP cannot be combined"),
        (
            {"off_policy_mask_threshold": 1.0, "rollout_func": print},
            "off_policy_mask_threshold with vLLM or rollout_func cannot be combined",
        ),
        ({"accelerator": SimpleNamespace(num_processes=2)}, "DDP without ddp_find_unused_param"),
        ({"aux_loss_enabled": True}, "a router loss is not supported: set router_aux_loss_coef"),
        ({"is_deepspeed_enabled": True}, "DeepSpeed is not supported"),
    ],
)
def test_settings_that_are_refused(
    folder: str, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    made = trainer(folder, tmp_path)
    for name, value in settings.items():
        setattr(made, name, value)
    with pytest.raises(ValueError, match=message):
        ours._check_options(made, [2])
        ours._install("test", made, lambda: ours.FINAL)


def test_a_schedule_and_the_correction_for_vllm(folder: str, tmp_path: Path) -> None:
    more = {"schedule": [(1, 2), (2, 2), (None, 1)]}
    made = trainer(folder, tmp_path, BuPOTrainer, more)
    seen = []
    for step in range(6):
        made.state.global_step = step
        seen.append((made.internal_layer(), made.vllm_importance_sampling_correction))
    assert seen == [(1, False), (1, False), (2, False), (2, False), (None, True), (None, True)]


def test_another_version_of_trl_is_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(folder, tmp_path)
    monkeypatch.setattr(ours.trl, "__version__", "2.0.0")
    with pytest.raises(RuntimeError, match=r"expected TRL 1.16.x, which is tested, got 2.0.0"):
        use_bupo_ops(made)
    monkeypatch.undo()
    bare = copy.copy(made)
    bare.model, bare.ref_model = AutoModelForCausalLM.from_pretrained(folder), None
    with pytest.raises(TypeError, match="expected one whose model has TRL's fused head"):
        use_bupo_ops(bare)
    with pytest.raises(TypeError, match="expected a GRPOTrainer, RLOOTrainer or SFTTrainer"):
        use_bupo_ops(object())
    with pytest.raises(TypeError, match="BuPOMixin: expected a GRPOTrainer or RLOOTrainer"):
        trainer(folder, tmp_path, Sft, {"layer": 1, "internal_steps": 1})


def test_likeliest_tokens() -> None:
    head = torch.nn.Linear(4, 5, bias=False)
    hidden = torch.randn(2, 3, 4)
    best: Tensor = head(hidden).argmax(-1)
    targets = best.clone()
    targets[0, 1], targets[1, 0] = (best[0, 1] + 1) % 5, -100
    wanted = [[True, False, True], [False, True, True]]
    assert ours._is_likeliest(hidden, head, targets).tolist() == wanted


def test_the_examples_of_the_documentation(folder: str, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs/integrations.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text.partition("## TRL")[2], flags=re.DOTALL)
    assert len(blocks) == 3
    for code in blocks:
        args = GRPOConfig(output_dir=str(tmp_path), **COMMON, **SAMPLED)
        names: dict[str, Any] = {
            "model": AutoModelForCausalLM.from_pretrained(folder), "args": args, "data": CHATS,
            "tokenizer": AutoTokenizer.from_pretrained(folder), "reward": reward,
        }  # fmt: skip
        exec(code, names)
        if "trainer" in names:
            assert names["trainer"].state.global_step == 2
    made = trainer(folder, tmp_path, names["BottomUpRLOO"], {"layer": 1, "internal_steps": 1})
    assert made.internal_layer() == 1
