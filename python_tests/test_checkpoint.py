"""bupo.rl.checkpoint.Writer, of a small model: what a run as a whole does not show."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_samples import small_model
from safetensors.torch import load_file
from test_ranks import finish, started
from update_samples import make_trainer

from bupo.rl import checkpoint
from bupo.runlog.run_directory import checkpoints


class NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        pass


def save(writer: checkpoint.Writer, trainer: Any, step: int, keep: set[int]) -> None:
    state = {"step": step, "drawn": 0}
    writer.save(state, trainer.model, NoTokenizer(), trainer.optimizer, None, 1, keep)


@pytest.mark.parametrize("in_background", [False, True])
def test_what_is_no_longer_kept_is_removed(tmp_path: Path, in_background: bool) -> None:
    """Also when the checkpoint itself is there already."""
    writer, trainer = checkpoint.Writer(tmp_path, in_background), make_trainer(small_model())
    save(writer, trainer, 1, {1})
    save(writer, trainer, 2, {1})
    writer.finish()
    assert [x.name for x in checkpoints(tmp_path)] == ["step_000001", "step_000002"]
    save(writer, trainer, 2, {2})
    assert [x.name for x in checkpoints(tmp_path)] == ["step_000002"]
    assert writer.close() == ""


def test_training_goes_on_while_a_copy_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state at the time of save(), in its own data type."""
    model = small_model().bfloat16()
    writer, trainer = checkpoint.Writer(tmp_path, in_background=True), make_trainer(model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    moments = {name: x.clone() for name, x in trainer.optimizer.divided_state().items()}
    original = checkpoint._write

    def after_an_update(*given: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
                parameter.data = parameter.data.float()
            for value in trainer.optimizer.divided_state().values():
                value += 1
        original(*given)

    monkeypatch.setattr(checkpoint, "_write", after_an_update)
    save(writer, trainer, 1, set())
    writer.finish()
    (folder,) = checkpoints(tmp_path)
    saved = load_file(folder / "model.safetensors")
    assert saved and all(torch.equal(x, before[name]) for name, x in saved.items())
    (file,) = (folder / "optimizer").iterdir()
    saved = load_file(file)
    assert saved.keys() == moments.keys()
    assert all(torch.equal(x, moments[name]) for name, x in saved.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_ranks_fail_together() -> None:
    """See exchange_samples.py."""
    finish(started(2, str(Path(__file__).with_name("exchange_samples.py"))))
