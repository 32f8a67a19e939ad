"""The mode that runs the CPU operators' tests on a GPU, tried on the device without data."""

import pytest
import torch
from on_device import NOT_ON_CUDA, OnDevice


def test_tensors_are_made_on_the_device() -> None:
    generator = torch.Generator().manual_seed(0)
    with OnDevice("meta"):
        made = [
            torch.tensor([1.0]),
            torch.full((2,), 1.0),
            torch.arange(3),
            torch.randn(3, generator=generator, requires_grad=True),
            torch.randint(4, (2,), generator=generator),
            torch.zeros(3, requires_grad=True),
            torch.nn.Linear(2, 3).weight,  # which asks for device=None
        ]
        assert torch.ones(1, device="cpu").device.type == "cpu"
    assert [x.device.type for x in made] == ["meta"] * len(made)
    assert made[3].requires_grad and made[3].is_leaf and made[5].requires_grad


def test_random_numbers_are_those_of_the_cpu() -> None:
    with OnDevice("cpu"):
        moved = torch.rand(5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(moved, torch.rand(5, generator=torch.Generator().manual_seed(3)))


def test_what_is_left_out_on_a_gpu_exists(pytestconfig: pytest.Config) -> None:
    """A test that was renamed would run there, and fail, after its name is forgotten here."""
    folder = pytestconfig.rootpath / "python_tests"
    names = ("lm_head", "policy_loss", "ops_tensors", "ops_autograd", "ops_errors")
    text = "".join((folder / f"test_{name}.py").read_text() for name in names)
    for name in NOT_ON_CUDA:
        assert f"def {name.split('[')[0]}(" in text, name
        for part in name.partition("[")[2].rstrip("]").split("-", 1)[1:]:
            assert f'"{part}": ' in text, name
