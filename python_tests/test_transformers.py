"""bupo.integrations.transformers: a model's own loss and its gradient, by bupo's op."""

import copy
import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from analyze_samples import tiny_model
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    Trainer,
    TrainingArguments,
)

from bupo.integrations import transformers
from bupo.integrations.transformers import use_bupo_loss
from bupo.policy import internal_policy

pytestmark = pytest.mark.usefixtures("one_thread")


def batch() -> dict[str, Any]:
    """With ignored labels at both ends and within."""
    torch.manual_seed(0)
    ids = torch.randint(3, families.VOCAB, (2, 9))
    labels = ids.masked_fill(torch.rand(2, 9) < 0.3, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("items", [None, torch.tensor(7)])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_loss_and_gradient_are_those_of_the_model(family: str, items: Any) -> None:
    own = families.build(family)
    mine = use_bupo_loss(copy.deepcopy(own))
    options = {} if items is None else {"num_items_in_batch": items}
    results = [model(**batch(), **options).loss for model in (own, mine)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    for loss in results:
        loss.backward()
    for one, other in zip(own.parameters(), mine.parameters()):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            off, largest = (one.grad - other.grad).abs().max(), one.grad.abs().max()
            assert off <= 1e-5 * largest + 1e-6
    assert mine(input_ids=batch()["input_ids"]).logits.shape[-1] == families.VOCAB
    shifted = batch()["labels"].roll(-1, 1).index_fill(1, torch.tensor([8]), -100)
    given = {"input_ids": batch()["input_ids"], "shift_labels": shifted}
    torch.testing.assert_close(mine(**given, **options).loss, results[0], rtol=1e-5, atol=1e-6)


def test_a_trainer_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over accumulated micro-batches, where the Trainer passes num_items_in_batch."""
    folder, rows = tiny_model(tmp_path), []
    for n in range(16):
        ids = [(7 * n + k) % 250 + 1 for k in range(6)]
        rows.append({"input_ids": ids, "labels": [-100] * (n % 4) + ids[n % 4 :]})
    calls, original = [], transformers.ops.lm_head_logprobs

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return original(*args, **options)

    monkeypatch.setattr(transformers.ops, "lm_head_logprobs", counted)
    ended = []
    for change in (lambda model: model, use_bupo_loss):
        args = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=3, use_cpu=True,
            gradient_accumulation_steps=2, learning_rate=1e-3, report_to=[], logging_steps=1,
            save_strategy="no", eval_strategy="steps", eval_steps=3,
        )  # fmt: skip
        model = change(AutoModelForCausalLM.from_pretrained(folder))
        trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        log = trainer.state.log_history
        ended.append([row.get("loss", row.get("eval_loss")) for row in log[:4]])
    assert ended[0] == pytest.approx(ended[1], rel=1e-4) and None not in ended[0]
    assert len(calls) == 1 + 3 * 2 + 2, "a check, micro-batches, evaluation"


def test_adapters_and_what_is_refused() -> None:
    model = use_bupo_loss(families.build("llama"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted(**batch()).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained and all("lora" in name for name in trained)
    on_head = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="expected a plain Linear head, got one of peft"):
        on_head(**batch())
    for name in transformers.LEFT_OUT:
        with pytest.raises(ValueError, match=f"without router loss, .*, got {name}"):
            model(**batch(), **{name: True})
    for wrong in ({"ignore_index": 0}, {"return_dict": False}):
        with pytest.raises(ValueError, match="use_bupo_loss: with labels, expected a text-only"):
            model(**batch(), **wrong)
    with pytest.raises(AttributeError, match="computes no logits; call it without labels"):
        _ = model(**batch()).logits
    with pytest.raises(ValueError, match="call it before get_peft_model"):
        use_bupo_loss(adapted)


def test_a_model_with_another_loss_is_refused() -> None:
    """A transform between backbone and head, a router loss, a loss function of the user."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=50, intermediate_size=32, is_decoder=True, **sizes)
    with pytest.raises(ValueError, match="family 'bert': not supported: its own loss"):
        use_bupo_loss(BertLMHeadModel(config))
    moe = families.build("mixtral")
    moe.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"(config.output_router_logits|'mixtral': not supported)"):
        use_bupo_loss(moe)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=50, d_model=16, encoder_attention_heads=2, **layers)
    with pytest.raises(ValueError, match="expected a decoder-only model"):
        use_bupo_loss(BartForConditionalGeneration(config))


def test_copies_and_positional_labels() -> None:
    model = use_bupo_loss(families.build("llama"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(input_ids=batch()["input_ids"]).logits.any()
        ids, labels = batch()["input_ids"], batch()["labels"]
        assert model(ids, None, None, None, None, labels).loss == model(ids, labels=labels).loss


def test_the_examples_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs/integrations.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text.partition("## TRL")[0], flags=re.DOTALL)
    ids = torch.arange(1, 7)[None]
    names: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path)), "input_ids": ids,
        "rows": [{"input_ids": ids[0].tolist(), "labels": ids[0].tolist()}] * 4,
        "args": TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[]),
    }  # fmt: skip
    assert len(blocks) == 2
    for code in blocks:
        exec(code, names)
    assert names["trainer"].state.global_step == 1
    with torch.no_grad(), internal_policy(names["model"], 1):
        logp = names["model"](input_ids=ids).logits.log_softmax(-1)
    wanted = logp[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(names["out"].logprobs, wanted, rtol=1e-5, atol=1e-6)
