"""bupo's engine in an installed verl, on the CPU: tools/test_verl.sh runs it in an environment that
has verl and no vLLM. Rank 0 of 1, gloo, FSDP2, a random Qwen3."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda"}
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

from bupo.ops import reference
from bupo.policy import hidden_states, internal_policy

LENGTHS = (7, 4, 9)
V = 37
HAS_TARGET = torch.ones(sum(LENGTHS), dtype=torch.bool)
HAS_TARGET[torch.tensor(LENGTHS).cumsum(0) - 1] = False  # what verl masks: a text's last token
UPSTREAM = torch.arange(sum(LENGTHS)).cos() * HAS_TARGET


@PlatformRegistry.register("cpu")
class Cpu(PlatformCUDA):
    """verl's interface for accelerators of others, here for none."""

    device_name, device_module = "cpu", torch.cpu

    def current_device(self) -> str:
        return "cpu"

    def synchronize(self, device_index: int | None = None) -> None: ...

    def empty_cache(self) -> None: ...


import verl.workers.engine.fsdp.transformer_impl as engines  # noqa: E402 - asks for the platform
from verl.workers.engine import EngineRegistry  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _ranks() -> Any:
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, head_dim=16)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, vocab_size=V)
    config = Qwen3Config(**sizes, **heads, tie_word_embeddings=request.param, pad_token_id=0)
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def engine_of(folder: Path, *, head: bool = False, forward_only: bool = False,
              strategy: str = "fsdp2", **options: Any) -> Any:  # fmt: skip
    model = HFModelConfig(
        path=str(folder),
        load_tokenizer=False,
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "eager", **options},
        use_fused_kernels=head,
        fused_kernel_options={"impl_backend": "bupo"} if head else {},
    )
    plain = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    backend = FSDPEngineConfig(
        strategy=strategy, mixed_precision=plain, use_torch_compile=False, forward_only=forward_only
    )
    optimizer = FSDPOptimizerConfig(lr=1e-3, total_training_steps=10)
    found = EngineRegistry.get_engine_cls("language_model", strategy)(
        model, backend, optimizer, CheckpointConfig()
    )
    found.initialize()
    return found


def batch(head: bool) -> tuple[TensorDict, list[Tensor]]:
    torch.manual_seed(1)
    ids = [torch.randint(1, V, (n,)) for n in LENGTHS]
    given = TensorDict(
        {
            "input_ids": torch.nested.as_nested_tensor(ids, layout=torch.jagged),
            "position_ids": torch.nested.as_nested_tensor(
                [torch.arange(n) for n in LENGTHS], layout=torch.jagged
            ),
            "loss_mask": torch.nested.as_nested_tensor(
                [torch.ones(n) for n in LENGTHS], layout=torch.jagged
            ),
        },
        batch_size=[len(LENGTHS)],
    )
    settings = dict(use_remove_padding=False, use_fused_kernels=head, calculate_entropy=True)
    tensordict_utils.assign_non_tensor(given, temperature=0.7, **settings)
    return given, ids


def loss_of(model_output: Any, data: Any, dp_group: Any) -> tuple[Tensor, dict[str, Any]]:
    logp, entropy = (model_output[name].values() for name in ("log_probs", "entropy"))
    return (UPSTREAM * logp).sum() + entropy.mean(), {}


def expected(
    folder: Path, ids: list[Tensor], layer: int | None
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    rolled = torch.cat(ids).roll(-1).split(LENGTHS)
    found = []
    for row, targets in zip(ids, rolled, strict=True):
        with internal_policy(model, layer):
            hidden = hidden_states(model, row[None])[0]
        weight = model.get_output_embeddings().weight
        found.append(reference.lm_head_logprobs(hidden, weight, targets, temperature=0.7))
    logp, entropy = (torch.cat([getattr(x, k) for x in found]) for k in ("logprobs", "entropy"))
    ((UPSTREAM * logp).sum() + entropy.mean()).backward()
    return logp, entropy, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("head", [False, True], ids=["logits", "bupo.ops"])
def test_both_phases(folder: Path, head: bool) -> None:
    """Log-probs, entropies and gradients of pi^2 for two training steps, then of the final policy;
    layers above have none."""
    engine = engine_of(folder, head=head, bupo_layer=2, bupo_steps=2)
    assert type(engine).__name__ == "BuPOEngine"
    for step in range(3):
        layer = 2 if step < 2 else None
        assert engine.internal_layer() == layer
        given, ids = batch(head)
        loss, output = engine.forward_step(given, loss_of, forward_only=False)
        loss.backward()
        logp, entropy, slopes = expected(folder, ids, layer)
        found = output["model_output"]["log_probs"].values()
        torch.testing.assert_close(found[HAS_TARGET], logp.detach()[HAS_TARGET])
        torch.testing.assert_close(output["model_output"]["entropy"].values(), entropy.detach())
        assert output["metrics"].get("bupo/layer") == layer
        for name, p in engine.module.named_parameters():
            if slopes[name] is None:
                assert p.grad is None, name
            else:
                torch.testing.assert_close(p.grad.full_tensor(), slopes[name], msg=name)
        engine.optimizer_zero_grad()
        engine.optimizer.zero_grad(set_to_none=True)
        engine.lr_scheduler_step()


def test_the_phase_is_that_of_a_resumed_schedule(folder: Path, tmp_path: Path) -> None:
    first = engine_of(folder, bupo_layer=2, bupo_steps=2)
    for _ in range(2):
        first.lr_scheduler_step()
    later = engine_of(folder, bupo_layer=2, bupo_steps=2)
    assert later.internal_layer() == 2
    later.lr_scheduler.load_state_dict(first.lr_scheduler.state_dict())
    assert later.internal_layer() is None


def test_without_options_it_is_verls_engine(folder: Path) -> None:
    found = []
    for kind in (EngineRegistry.get_engine_cls("language_model", "fsdp2"),
                 engines.FSDPEngineWithLMHead):  # fmt: skip
        engine = engine_of(folder)
        engine.__class__ = kind
        loss, _ = engine.forward_step(batch(False)[0], loss_of, forward_only=False)
        found.append(loss.item())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bupo_layer": 2}, "at least one step, got bupo_layer=2 and bupo_steps=0"),
        ({"bupo_layer": "2", "bupo_steps": 1}, "bupo_layer: expected int, got '2'"),
        ({"bupo_layers": 2}, "expected bupo_layer, bupo_steps, bupo_final_norm, got bupo_layers"),
        ({"bupo_layer": 5, "bupo_steps": 1}, "layer: expected an int in 1..4, got 5"),
        ({"bupo_layer": 2, "bupo_steps": 1, "strategy": "fsdp"}, "expected fsdp2, got fsdp"),
        ({"bupo_layer": 2, "bupo_steps": 1, "forward_only": True}, "no reference model in verl"),
        ({"head": True, "strategy": "fsdp"}, "expected fsdp2, got fsdp"),
    ],
)
def test_refused(folder: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        engine_of(folder, **given)


def test_another_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["verl"], "__version__", "0.10.0")
    with pytest.raises(RuntimeError, match=r"expected verl 0\.9\.x, which is tested, got 0\.10\.0"):
        engine_of(folder, bupo_layer=2, bupo_steps=1)
    engine_of(folder)  # which asks for nothing of bupo


def test_a_correction_of_the_mismatch_is_refused_in_phase_1(folder: Path) -> None:
    engine = engine_of(folder, bupo_layer=2, bupo_steps=1)
    given, _ = batch(False)
    given["rollout_is_weights"] = given["loss_mask"]
    with pytest.raises(ValueError, match=r"rollout_correction\.rollout_is=null"):
        engine.forward_step(given, loss_of, forward_only=False)
    engine.lr_scheduler_step()
    engine.forward_step(given, loss_of, forward_only=False)


def test_the_script_for_a_gpu_node_has_options_that_verl_knows() -> None:
    """Hydra composes the whole configuration and prints it."""
    script = Path(__file__).parent.parent / "recipes/verl_qwen3_4b.sh"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VERL_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [script, "--cfg", "job"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bupo_layer: 6" in done.stdout and "impl_backend: bupo" in done.stdout
