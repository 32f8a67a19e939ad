"""The benchmark's peers: one small adapter each, all behind one signature.

A peer that gives log-probs is a function (hidden, weight, targets) -> (logprobs, entropy or None)
that is differentiable; the ratio loss on top is the same torch code for all. One that gives a loss
only is a function of the batch that returns the scalar. What cannot be imported is reported with
its reason, by the caller; APIs were read in the sources of the versions named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from batch import Batch
from implementations import Implementation, Outputs, ratio_loss
from torch import Tensor

LogProbs = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
RESERVED: dict[str, float] = {}
"""MiB that a peer holds outside of torch, by its name"""
EAGER, COMPILED = "eager", "torch.compile of eager"
CROSS_ENTROPY = "F.linear_cross_entropy"


def hollow(package: str) -> None:
    """Makes `import package.module` work without running the __init__ of the packages on the way:
    those of trl and verl import all of the trainer, and with it ray, datasets and more, which have
    nothing to do with the kernel."""
    name, *inner = package.split(".")
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named '{name}'")
        _hollow(name, list(spec.submodule_search_locations or []))
    for part in inner:
        folders = [f"{folder}/{part}" for folder in sys.modules[name].__path__]
        name = f"{name}.{part}"
        if name not in sys.modules:
            _hollow(name, folders)


def _hollow(name: str, folders: list[str]) -> None:
    module = types.ModuleType(name)
    module.__path__ = folders
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    sys.modules[name] = module


# ---- torch -------------------------------------------------------------------------------------


def eager_loss(batch: Batch) -> tuple[Tensor, Outputs]:
    """What a training loop does: log_softmax, gather, entropy for the log, clipped ratio."""
    logp = F.linear(batch.hidden, batch.weight).float().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(-1, batch.targets[:, None]).squeeze(-1)
    ratio = (chosen - batch.old_logprobs).exp()
    gain = torch.minimum(ratio * batch.advantages, ratio.clamp(0, 1e9) * batch.advantages)
    loss = -(batch.token_weights * gain).sum()
    return loss, {"logprobs": chosen.detach(), "entropy": entropy.detach()}


def load_eager() -> Callable[[Batch], Outputs]:
    return _with_backward(eager_loss)


def load_compiled() -> Callable[[Batch], Outputs]:
    return _with_backward(torch.compile(eager_loss, dynamic=False))


def _with_backward(loss_of: Callable[[Batch], Any]) -> Callable[[Batch], Outputs]:
    def run(batch: Batch) -> Outputs:
        loss, outputs = loss_of(batch)
        loss.backward()
        return outputs

    return run


def load_cross_entropy() -> Callable[[Batch], Outputs]:
    options = torch.nn.LinearCrossEntropyOptions()  # torch 2.13
    return _with_backward(
        lambda batch: (F.linear_cross_entropy(*batch.head(), options=options), {})
    )


# ---- liger-kernel 0.8.5 ------------------------------------------------------------------------


def load_liger_cross_entropy() -> Callable[[Batch], Outputs]:
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss()
    return _with_backward(lambda b: (loss(b.weight, b.hidden, b.targets), {}))


def load_liger_grpo() -> Callable[[Batch], Outputs]:
    """Sequences of one token, 1024 to a chunk: its advantages are per sequence, ours per token. The
    work is that of sequences of 1024 tokens at its default chunk of one sequence. Not compiled: it
    would compile its loss, a small share of the work, anew in each call."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        chunk_size=1024,
        epsilon_low=1.0,
        epsilon_high=1e9,
        compiled=False,
    )

    def loss_of(batch: Batch) -> tuple[Tensor, Outputs]:
        value, _ = loss(
            batch.hidden[:, None],
            batch.weight,
            batch.targets[:, None],
            torch.ones_like(batch.old_logprobs)[:, None],
            batch.advantages,
            old_per_token_logps=batch.old_logprobs[:, None],
        )
        return value, {}

    return _with_backward(loss_of)


def load_liger_scaled() -> LogProbs:
    """CuTe kernels on Hopper (they need nvidia-cutlass-dsl), torch elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        importlib.import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = Function.apply(hidden, weight, targets, 1.0, -100, 1, True)
        return -nll, entropy

    return logprobs


# ---- liger-cute-kernels 0.8.5 ------------------------------------------------------------------


def load_liger_native() -> LogProbs:
    """Its C++ kernels, through liger-kernel 0.8.5. They reserve their memory up front, outside of
    torch: what the card has less of afterwards is counted as theirs (RESERVED)."""
    import torch.distributed as dist

    importlib.import_module("liger_cute_kernels")
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyTPFunction as Function
    from liger_kernel.ops.configure import FusedLinearCrossEntropyConfig, configure

    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    ready: set[tuple[int, int, int]] = set()

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(hidden), hidden.shape[1], len(weight))
        if shape not in ready:
            free = torch.cuda.mem_get_info()[0]
            config = FusedLinearCrossEntropyConfig(
                max_tokens=shape[0], hidden_size=shape[1], local_vocab_size=shape[2], group="tp"
            )
            configure(
                process_groups={"tp": group},
                bootstrap_group=group,
                device=torch.device("cuda", torch.cuda.current_device()),
                flsce=config,
            )
            ready.add(shape)
            RESERVED["liger-cute-kernels"] = (free - torch.cuda.mem_get_info()[0]) / 2**20
        nll, entropy = Function.apply(hidden, weight, targets, group, 1.0, -100, 1, True)
        return -nll, entropy

    return logprobs


# ---- quack-kernels 0.6.5 -----------------------------------------------------------------------


def load_quack() -> Callable[[Batch], Outputs]:
    """Cross-entropy by exponentials in bfloat16 and three products, as policy_loss does it."""
    from quack.linear_cross_entropy import scaled_exp_linear_cross_entropy

    return _with_backward(lambda batch: (scaled_exp_linear_cross_entropy(*batch.head()), {}))


# ---- cut-cross-entropy 25.1.1 ------------------------------------------------------------------


def load_cce(filter_eps: str | None) -> Callable[[], LogProbs]:
    """`cce` leaves out small entries of the gradient, `cce_exact` none: random data look free."""

    def load() -> LogProbs:
        from cut_cross_entropy import linear_cross_entropy

        def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None]:
            options = {"reduction": "none", "filter_eps": filter_eps, "impl": "cce"}
            return -linear_cross_entropy(hidden, weight, targets, **options), None

        return logprobs

    return load


# ---- trl 1.16.0 --------------------------------------------------------------------------------


def load_trl() -> LogProbs:
    hollow("trl.trainer")
    # Its backward asks the trainer whether DeepSpeed has sharded the head: here never.
    utils = types.ModuleType("trl.trainer.utils")
    utils.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()  # type: ignore[attr-defined]
    sys.modules.setdefault(utils.__name__, utils)
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        chunk = 32768  # of the vocabulary, as in its trainer
        found = function.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("entropy",))
        return found[0], found[1]

    return logprobs


# ---- verl 0.9.1 --------------------------------------------------------------------------------


def load_verl_triton() -> LogProbs:
    hollow("verl.utils")
    module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    importlib.import_module("verl.utils.kernel.kernels")

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return module.linear_cross_entropy(hidden, weight, targets, 1.0, "none", None)

    return logprobs


def load_verl_torch() -> LogProbs:
    hollow("verl.utils")
    return importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO()


# ---- all of them -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    gives: str
    """"logprobs" (per token, differentiable), "policy" or "cross entropy" (a loss and no more)"""
    load: Callable[[], Any]
    entropy: bool = False
    """whether its entropy has a gradient"""
    package: str = ""
    """what to install; "" for torch itself"""
    gpu_only: bool = False

    def implementations(self) -> list[Implementation]:
        """Raises what importing it raises."""
        call = self.load()
        name = f"{self.name} fwd+bwd"
        if self.gives != "logprobs":
            return [Implementation(name, call, 3, peer=True, loss=self.gives)]

        def forward(batch: Batch) -> Outputs:
            with torch.no_grad():
                return _outputs(call(*batch.head()))

        def both(batch: Batch) -> Outputs:
            logprobs, entropy = call(*batch.head())
            ratio_loss(batch, logprobs).backward()
            return _outputs((logprobs, entropy))

        return [
            Implementation(f"{self.name} fwd", forward, 1, peer=True),
            Implementation(name, both, 3, peer=True),
        ]


def _outputs(found: tuple[Tensor, Tensor | None]) -> Outputs:
    named = zip(("logprobs", "entropy"), found, strict=True)
    return {name: x.detach() for name, x in named if x is not None}


LIGER, CCE = "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"
TRL, VERL = "trl==1.16.0", "verl==0.9.1"
NATIVE, QUACK = "liger-cute-kernels==0.8.5", "quack-kernels==0.6.5"
PEERS = (
    Peer(EAGER, "policy", load_eager, entropy=True),
    Peer(COMPILED, "policy", load_compiled, entropy=True),
    Peer(CROSS_ENTROPY, "cross entropy", load_cross_entropy),
    Peer("liger fused linear CE", "cross entropy", load_liger_cross_entropy, False, LIGER, True),
    Peer("liger fused linear GRPO", "policy", load_liger_grpo, False, LIGER),
    Peer("liger scaled CE", "logprobs", load_liger_scaled, True, LIGER),
    Peer("liger-cute-kernels", "logprobs", load_liger_native, True, NATIVE, True),
    Peer("quack scaled-exp CE", "cross entropy", load_quack, False, QUACK, True),
    Peer("cce", "logprobs", load_cce("auto"), False, CCE, True),
    Peer("cce_exact", "logprobs", load_cce(None), False, CCE, True),
    Peer("trl ChunkedLogProb", "logprobs", load_trl, True, TRL),
    Peer("verl linear_cross_entropy", "logprobs", load_verl_triton, True, VERL, True),
    Peer("verl FusedLinearForPPO", "logprobs", load_verl_torch, True, VERL),
)


def load(names: list[str], device: str) -> tuple[list[Implementation], dict[str, str]]:
    """The implementations of these peers, and of those that are missing why."""
    found: list[Implementation] = []
    missing = {}
    for peer in PEERS:
        if peer.name not in names:
            continue
        if peer.gpu_only and device == "cpu":
            missing[peer.name] = "runs on a GPU only"
            continue
        try:
            found += peer.implementations()
        except Exception as error:  # a broken installation raises anything
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            missing[peer.name] = reason + (f" (package {peer.package})" if peer.package else "")
    return found, missing
