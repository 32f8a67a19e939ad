"""Built-in tasks: the model directory that they make is what anybody's is."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from bupo.tasks import tiny

OPTIONS = {"layers": 2, "width": 32}


def test_the_configuration_names_the_architecture(tmp_path: Path) -> None:
    """As save_pretrained writes it; without it vLLM takes the model for one that embeds."""
    files = tiny.prepare(OPTIONS, tmp_path)
    tiny.build(OPTIONS, files)
    written = json.loads((files.model / "config.json").read_text())
    assert written["architectures"] == ["Qwen3ForCausalLM"]
    ends = GenerationConfig.from_pretrained(files.model).eos_token_id
    assert ends == written["eos_token_id"]
    assert [path.name for path in tmp_path.iterdir()] == [files.model.name]


def test_a_build_that_was_cut_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tiny.prepare(OPTIONS, tmp_path)

    def cut(self: Path, target: Path) -> Path:
        if self.suffix == ".safetensors":
            raise KeyboardInterrupt
        return rename(self, target)

    rename = Path.replace
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", cut)
        tiny.build(OPTIONS, files)
    assert not (files.model / "model.safetensors").exists()
    tiny.build(OPTIONS, files)
    assert AutoModelForCausalLM.from_pretrained(files.model).num_parameters() > 0
