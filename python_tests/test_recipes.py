"""The recipes for the paper's models, by --dry_run: sizes from a local config.json, no download."""

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from rl_samples import data_file, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from bupo import config
from bupo.commands import sizes
from bupo.config import shipped
from bupo.policy import hidden_states
from bupo.run import main

QWEN3 = dict(
    vocab_size=151936, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, max_position_embeddings=40960, rope_theta=1e6,
)  # fmt: skip
LLAMA3 = dict(
    vocab_size=128256, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072
)
MODELS: dict[str, tuple[PretrainedConfig, int, str]] = {
    # recipe: its model's public config.json, its number of parameters, its phases
    "qwen3_4b": (
        Qwen3Config(**QWEN3, hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True),
        4_022_468_096,
        "steps 1-30 train layer 6 of 36, then the final policy to step 300",
    ),
    "qwen3_8b": (
        Qwen3Config(**QWEN3, hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False),
        8_190_735_360,
        "steps 1-20 train layer 6 of 36, then the final policy to step 300",
    ),
    "octothinker_3b": (
        LlamaConfig(
            **LLAMA3, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
            num_attention_heads=24, tie_word_embeddings=True,
        ),
        3_212_749_824,
        "steps 1-20 train layer 27 of 28, then the final policy to step 300",
    ),
    "octothinker_8b": (
        LlamaConfig(
            **LLAMA3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, tie_word_embeddings=False,
        ),
        8_030_261_248,
        "steps 1-20 train layer 31 of 32, then the final policy to step 300",
    ),
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    sources = {
        "deepmath-5k": "math_dapo",
        "math500": "qwen_math500",
        "aime_2024": "qwen_aime_2024",
        "aime_2025": "qwen_aime_2025",
        "amc2023": "qwen_amc2023",
    }
    for name, source in sources.items():
        found = data_file(name, folder, source)
        if found.parent != folder:
            (folder / found.name).symlink_to(found)
    monkeypatch.setenv("BUPO_DATA", str(folder))
    return folder


def folder_of(model: PretrainedConfig, tmp_path: Path) -> Path:
    """config.json of the real sizes, and a tokenizer: what a dry run reads of a model."""
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tiny_tokenizer(tmp_path).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_dry_run_of_the_papers_models(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, parameters, phases = MODELS[name]
    folder = folder_of(model, tmp_path)
    assert not list(folder.glob("*.safetensors"))
    command = ["--config", str(shipped(f"{name}.yaml")), f"model.path={folder}", "--dry_run"]
    command += ["--for", "H100-80GB"]
    # Every byte is a token of this tokenizer, so a few prompts are long.
    command += [f"out={tmp_path / 'run'}", "data.limit=200", "eval.limit=20", "data.overlong=drop"]
    if not (data / "deepmath-5k.parquet").is_symlink():  # the few rows made in place of the real
        command += ["rollout.prompts=16"]
    assert main(command) == 0
    text = capsys.readouterr().err
    assert phases in text, text
    assert "4 updates of 256 responses (32 prompts)" in text or "rollout.prompts=16" in command
    assert "for evaluation x 16 or 32," in text and "warning" not in text
    loaded = config.load(shipped(f"{name}.yaml"), [])
    measured = sizes.measure(loaded, str(folder), 1024)
    assert measured.parameters == parameters
    assert f"{parameters / 1e9:.3g} B parameters" in text
    in_half = loaded.model.parameter_dtype == "bfloat16"
    assert f"weights {(2 if in_half else 4) * parameters / 2**30:.1f} GiB" in text
    assert "card     fits: of 79.1 GiB, an update takes about" in text
    assert "of all responses are for evaluations" in text
    assert not (tmp_path / "run").exists()


def test_what_the_recipes_share_is_the_papers_setting() -> None:
    for name in MODELS:
        loaded = config.load(shipped(f"{name}.yaml"), [])
        rollout, loss, optimizer = loaded.rollout, loaded.loss, loaded.optimizer
        assert (rollout.prompts, rollout.samples, loaded.steps) == (128, 8, 300)
        assert (rollout.temperature, rollout.top_p, loaded.data.max_prompt_tokens) == (1, 1, 1024)
        assert (loss.clip_low, loss.clip_high, loss.entropy_coef) == (0.2, 0.2, 0)
        assert (loss.aggregation, loss.dual_clip) == ("seq_mean", None)
        assert (optimizer.lr, optimizer.weight_decay, optimizer.grad_clip) == (1e-6, 0.01, 1)
        assert (optimizer.updates_per_step, optimizer.epochs) == (4, 1)
        assert optimizer.schedule == "constant"
        sets = ["qwen_aime_2024", "qwen_aime_2025", "qwen_amc2023", "qwen_math500"]
        assert [loaded.eval.samples_of(each) for each in sets] == [32, 32, 16, 16]
        assert [Path(file).stem for file in loaded.eval.files] == [
            "math500", "aime_2024", "aime_2025", "amc2023"
        ]  # fmt: skip
        assert (loaded.reward.function, loaded.advantage) == ("strict", "grpo")


def test_a_missing_data_file_says_where_it_belongs(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "amc2023.parquet").unlink()
    folder = folder_of(MODELS["qwen3_4b"][0], tmp_path)
    command = ["--config", str(shipped("qwen3_4b.yaml")), f"model.path={folder}", "--dry_run"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert f"data file not found: {data / 'amc2023.parquet'}; put it there, or leave" in message
    assert "BUPO_DATA" in message and len(message.splitlines()) == 1


def test_octothinker_is_asked_as_in_the_paper(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are Long-Base; a template without the BOS that the tokenizer has is a warning."""
    for size in ("3b", "8b"):
        path = config.load(shipped(f"octothinker_{size}.yaml"), []).model.path
        assert path == f"OctoThinker/OctoThinker-{size.upper()}-Long-Base"
    folder = folder_of(MODELS["octothinker_3b"][0], tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.bos_token = "<|im_start|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    tokenizer.save_pretrained(folder)
    plain = tmp_path / "plain.jinja"
    plain.write_text("{{ messages[-1]['content'] }}")
    command = ["--config", str(shipped("octothinker_3b.yaml")), f"model.path={folder}", "--dry_run"]
    command += ["data.limit=200", "eval.limit=20", "rollout.prompts=16"]
    assert main(command) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([*command, f"data.chat_template={plain}"]) == 0
    assert "prompts do not begin with <|im_start|>, which this" in capsys.readouterr().err


def measured(
    tmp_path: Path, *settings: str, layer: int | None = None, **changes: Any
) -> sizes.Sizes:
    shape = dict(
        vocab_size=1000, hidden_size=64, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3Config(**shape | changes).save_pretrained(tmp_path / "model")
    sizes._shapes.cache_clear()  # the folder has held another model
    return sizes.measure(config.load(None, list(settings)), str(tmp_path / "model"), 100, layer)


def test_phase_1_trains_embedding_layers_and_head(tmp_path: Path) -> None:
    tied = measured(tmp_path, layer=1)
    two = measured(tmp_path, layer=2)
    all_of_them = measured(tmp_path, layer=4)
    layer = two.internal - tied.internal
    assert tied.internal - layer == 1000 * 64 + 64, (
        "the embedding; the final norm is not told apart"
    )
    assert all_of_them.internal == all_of_them.parameters
    untied = measured(tmp_path, layer=1, tie_word_embeddings=False)
    assert untied.internal - tied.internal == untied.parameters - tied.parameters == 1000 * 64
    assert tied.tied and not untied.tied
    assert measured(tmp_path).internal == 0


def test_memory_follows_the_settings(tmp_path: Path) -> None:
    plain = measured(tmp_path)
    assert plain.memory["weights"] == plain.memory["gradients"] == 4 * plain.parameters
    assert (
        plain.memory["AdamW"] == 8 * plain.parameters and plain.checkpoint == 12 * plain.parameters
    )
    recomputed = measured(tmp_path, "model.gradient_checkpointing=true")
    assert recomputed.memory["activations"] < plain.memory["activations"] / 2
    half = measured(tmp_path, "model.compute_dtype=bfloat16")
    assert 0.6 < half.memory["activations"] / plain.memory["activations"] < 0.75, (
        "products in bfloat16, norms and residuals in float32"
    )
    assert half.memory["bfloat16 weights"] == 2 * plain.parameters
    fewer = measured(tmp_path, "optimizer.micro_batch_tokens=4096")
    assert fewer.memory["activations"] == plain.memory["activations"] / 4
    # keys and values of 2 heads of 16, in 4 layers, float32, for 256 sequences
    assert plain.engine == 256 * (100 + 1024) * 2 * 4 * 32 * 4


@pytest.mark.parametrize(
    ("recipe", "gib"),
    [("qwen3_4b", 8.9), ("qwen3_8b", 13.2), ("octothinker_3b", 7.9), ("octothinker_8b", 12.0)],
)
def test_activations_of_the_papers_models(recipe: str, gib: float, tmp_path: Path) -> None:
    """Against a count of the tensors that autograd saved of such models, made elsewhere."""
    MODELS[recipe][0].save_pretrained(tmp_path)
    loaded = config.load(shipped(f"{recipe}.yaml"), [])
    found = sizes.measure(loaded, str(tmp_path), 1024).memory["activations"] / 2**30
    assert found == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_autograd_saves(tmp_path: Path, half: bool, recompute: bool) -> None:
    """Counted in a real forward of real tensors; with checkpointing, that and a layer more."""
    settings = [f"model.compute_dtype={'bfloat16' if half else 'float32'}"]
    expected = saved_by_autograd(tmp_path, half, False)
    if recompute:
        expected = saved_by_autograd(tmp_path, half, True) + expected / 4
        settings.append("model.gradient_checkpointing=true")
    found = measured(tmp_path, *settings).memory["activations"]
    assert found == pytest.approx(expected * 16384 / (4 * 1124), rel=0.02)


def saved_by_autograd(tmp_path: Path, half: bool, recompute: bool) -> int:
    """Bytes in a forward of the model of `measured`, on a padded batch of its longest texts."""
    measured(tmp_path)
    model = AutoModelForCausalLM.from_config(Qwen3Config.from_pretrained(tmp_path / "model"))
    if recompute:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            seen[x.untyped_storage().data_ptr()] = x
        return x

    ids, mask = torch.zeros(4, 1124, dtype=torch.long), torch.ones(4, 1124, dtype=torch.long)
    mask[0, -1] = 0
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        hidden_states(model, ids, mask)
    return sum(x.untyped_storage().nbytes() for x in seen.values())


def test_a_family_that_cannot_be_run_without_data_says_so(tmp_path: Path) -> None:
    families.build("opt").config.save_pretrained(tmp_path / "opt")
    families.build("mixtral").config.save_pretrained(tmp_path / "mixtral")
    opt, mixtral = (
        sizes.measure(config.load(None, []), str(tmp_path / name), 10)
        for name in ("opt", "mixtral")
    )
    assert "activations not known for this family" in opt.memory_line()
    assert mixtral.memory["activations"] > 1 << 20
