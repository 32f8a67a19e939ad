"""The plan's memory against what updates really take, and whether a run fits a card."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from bupo import config
from bupo.commands import sizes
from bupo.commands.fit import memory_of_card, verdict
from bupo.config import ConfigError

HERE = Path(__file__).parent
BASE = ["bupo.layer=1", "algorithm=grpo", "rollout.prompts=4", "rollout.samples=4"]
BASE += ["rollout.max_new_tokens=224", "optimizer.updates_per_step=1"]
BASE += ["optimizer.micro_batch_tokens=1024"]
SHAPE = {
    "num_hidden_layers": 6,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "vocab_size": 16000,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
}

UPDATE = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
from measure import Peak
from rl_samples import prompt, response
from transformers import AutoConfig, AutoModelForCausalLM
from bupo import adapters, config
from bupo.rl.update import Trainer
from bupo.types import Policy

settings = config.load(None, sys.argv[4:])
shape = AutoConfig.from_pretrained(sys.argv[3])
generator = torch.Generator().manual_seed(0)
rollouts = []
for n in range(16):
    ids = torch.randint(shape.vocab_size, (256,), generator=generator).tolist()
    made = response(prompt(ids[:32]), ids[32:], n // 4)
    made = made.with_stream("advantage", torch.randn(224, generator=generator))
    rollouts.append(made.with_stream("old", torch.full((224,), -9.0)))
with Peak(torch.device("cpu")) as peak:
    dtype = getattr(torch, settings.model.parameter_dtype)
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype).train()
    if settings.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.lora.rank:
        adapters.add(model, settings.lora, "a/model", 0)
    trainer = Trainer(model, settings, 0)
    for step in (1, 2):
        trainer.update(rollouts, Policy(None), step)
print(peak.mib)
"""


@pytest.mark.parametrize(
    ("family", "changes", "settings"),
    [
        ("qwen3", {}, []),
        ("llama", {"tie_word_embeddings": True}, ["model.gradient_checkpointing=true"]),
        ("gemma2", {"num_hidden_layers": 4, "vocab_size": 32000}, []),
        ("mistral", {"hidden_size": 768}, ["lora.rank=16"]),
    ],
    ids=["qwen3", "llama, recomputed", "gemma2", "mistral, adapters"],
)
def test_peak_of_an_update(
    family: str, changes: dict[str, object], settings: list[str], tmp_path: Path
) -> None:
    """Within a tenth. malloc gives every larger block back at once, as it does not by default."""
    AutoConfig.for_model(family, **SHAPE | changes).save_pretrained(tmp_path)
    options = [*BASE, *settings]
    predicted = sizes.measure(config.load(None, options), str(tmp_path), 32)
    paths = [str(HERE.parent / "bench"), str(HERE)]
    done = subprocess.run(
        [sys.executable, "-c", UPDATE, *paths, str(tmp_path), *options],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measured = float(done.stdout.split()[-1])
    assert sum(predicted.memory.values()) / 2**20 == pytest.approx(measured, rel=0.1)


def small(tmp_path: Path, *options: str, world: int = 1) -> tuple[config.Config, sizes.Sizes]:
    AutoConfig.for_model("qwen3", **SHAPE).save_pretrained(tmp_path)
    loaded = config.load(None, [*BASE, *options])
    return loaded, sizes.measure(loaded, str(tmp_path), 32, gpu=True, world=world)


def test_each_setting_takes_what_it_says(tmp_path: Path) -> None:
    _, plain = small(tmp_path)
    n = plain.parameters
    assert plain.memory["weights"] == plain.memory["gradients"] == 4 * n
    assert plain.memory["AdamW"] == 8 * n and plain.host == 0 and plain.checkpoint == 12 * n
    _, host = small(tmp_path, "optimizer.place=host")
    assert host.memory["AdamW"] == 0 and 12 * n <= host.host < 16 * n, "moments and a copy"
    half = ("model.compute_dtype=bf16", "model.parameter_dtype=bf16")
    _, in_half = small(tmp_path, *half)
    assert in_half.memory["weights"] == in_half.memory["gradients"] == 2 * n
    assert in_half.memory["AdamW"] == 12 * n and "bfloat16 weights" not in in_half.memory
    _, both = small(tmp_path, *half, "optimizer.place=host", "loss.kl_coef=0.1")
    assert both.host == host.host and both.memory["reference"] == 2 * n
    _, ppo = small(tmp_path, *half, "advantage=ppo", "rollout.engine=vllm")
    assert ppo.memory["critic"] == 14 * n and ppo.memory["critic's gradients"] == 2 * n
    assert ppo.host == 2 * n, "the weights of a sleeping vLLM"
    assert ppo.resident == (2 + 12 + 14) * n
    _, lora = small(tmp_path, "lora.rank=8", "loss.kl_coef=0.1")
    # q, k, v, o of 512x512, 512x256, 512x256, 512x512 and three matrices of 512x1536, in 6 layers
    adapters = 6 * 8 * (2 * 1024 + 2 * 768 + 3 * 2048)
    assert lora.memory["gradients"] == 4 * adapters and lora.memory["AdamW"] == 8 * adapters
    assert "reference" not in lora.memory and lora.checkpoint == 12 * adapters
    _, some = small(tmp_path, "lora.rank=8", "lora.targets=[q_proj]")
    assert some.memory["gradients"] == 4 * 6 * 8 * 1024
    with pytest.raises(ConfigError, match=r"lora.targets: expected linear layers.*q_proj.*got w1"):
        small(tmp_path, "lora.rank=8", "lora.targets=[w1]")
    AutoConfig.for_model("gpt2", n_layer=1, n_embd=64, n_head=2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"lora.rank: expected a model with linear layers, got g"):
        sizes.measure(config.load(None, [*BASE, "lora.rank=8"]), str(tmp_path / "gpt2"), 32)


def test_what_several_ranks_take(tmp_path: Path) -> None:
    _, alone = small(tmp_path)
    n = alone.parameters
    _, copies = small(tmp_path, "model.shard_ranks=1", world=8)
    assert copies.memory == alone.memory and copies.ranks == "8, each with a copy of the model"
    _, parts = small(tmp_path, "model.shard_ranks=4", "checkpoint.in_background=true", world=8)
    assert parts.memory["weights"] == n and parts.memory["AdamW"] == 2 * n
    assert parts.host == 4 * n + 8 * n // 4, "rank 0: the model, and its part of the moments"
    assert "8, of which 4 divide the model, with 2 copies. The head is gathered" in parts.ranks
    # 2 x 4 bytes of 16000 x 512 entries; 6 x 512 bytes of 16 x 256 tokens, half of them in a copy
    assert "moves 62.5 MiB an update" in parts.ranks and "would move 6.0 MiB" in parts.ranks
    assert parts.ranks.endswith("so gathering moves more")
    _, lora = small(tmp_path, "lora.rank=8", world=8)
    assert "moves 31.2 MiB an update" in lora.ranks, "a head that is not trained has no gradient"
    asleep = ("rollout.engine=vllm", "model.shard_ranks=1")
    _, vllm = small(tmp_path, *asleep, "rollout.vllm={tensor_parallel_size: 4}", world=8)
    assert vllm.host == n, "a quarter of the weights of a sleeping vLLM"


def test_what_does_not_fit_names_the_fewest_settings_that_make_it_fit(tmp_path: Path) -> None:
    loaded, plain = small(tmp_path, "optimizer.micro_batch_tokens=512")

    def measure(changed: config.Config) -> sizes.Sizes:
        return sizes.measure(changed, str(tmp_path), 32, gpu=True)

    needed = sum(plain.memory.values()) + (2 << 30)
    assert verdict(loaded, needed, measure).startswith("fits: of ")
    moments = plain.memory["AdamW"]
    activations = plain.memory["activations"]
    assert moments > activations, "so that recomputing them is not enough"
    text = verdict(loaded, needed - moments + 1, measure)
    assert text.endswith("; it fits with optimizer.place=host"), text
    text = verdict(loaded, needed - activations // 3, measure)
    assert text.endswith("; it fits with model.gradient_checkpointing=true"), text
    assert verdict(loaded, 1 << 30, measure).endswith("no setting makes it fit")


def test_vllm_needs_room_for_its_weights_and_a_sequence(tmp_path: Path) -> None:
    loaded, plain = small(tmp_path, "rollout.engine=vllm")
    cache = 2 * 6 * 4 * 64 * 4 * 256
    assert plain.cache_of_sequence == cache and plain.engine_weights == 4 * plain.parameters
    for sequences in (0, 3):
        card = int((plain.engine_weights + (1 << 30) + (sequences + 0.5) * cache) / 0.4)
        text = verdict(loaded, card, lambda _: plain)
        assert f"with room for {sequences} sequences of full length at once" in text
    alone = dataclasses.replace(plain, memory=dict.fromkeys(plain.memory, 0))
    assert verdict(loaded, 8 << 30, lambda _: alone).startswith("fits")


def test_names_of_cards() -> None:
    assert memory_of_card("H100-80GB") < memory_of_card("80GiB") == 80 << 30
    with pytest.raises(ConfigError, match=r"--for H100: expected A100-40GB, .* a size such as"):
        memory_of_card("H100")
