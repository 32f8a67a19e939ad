"""The LM-head ops in a model that DDP or FSDP2 wraps, against one process: torchrun starts it as
`wrapped_samples.py`, and a rank that finds a difference ends with an error."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import bupo.ops as ops

N, D, V = 12, 6, 37


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(D, D).double(), nn.Linear(D, V).double()

    def forward(self, x: Tensor, targets: Tensor, old: Tensor) -> Tensor:
        head = (self.body(x).tanh(), self.head.weight, targets)
        found = ops.lm_head_logprobs(*head, bias=self.head.bias)
        weights = torch.full_like(old, 1 / len(x))
        loss = ops.policy_loss(*head, old, old.cos(), weights, bias=self.head.bias).loss
        return loss + found.entropy.mean()


def batch() -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.randn(N, D).double(), torch.randint(V, (N,)), -3 + torch.rand(N).double()


def gradients(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    model(*inputs).backward()
    found: dict[str, Any] = {
        name.removeprefix("module."): p.grad for name, p in model.named_parameters()
    }
    return {k: g.full_tensor() if hasattr(g, "full_tensor") else g for k, g in found.items()}


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    expected = gradients(Model(), *batch())
    mine = [x.chunk(world)[rank] for x in batch()]  # equal shares, whose losses are averaged
    for wrapped in (DistributedDataParallel(Model()), fully_shard(Model())):
        found = gradients(wrapped, *mine)
        assert found.keys() == expected.keys()
        for name, slope in found.items():
            torch.testing.assert_close(slope, expected[name], msg=f"{type(wrapped)}: {name}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
