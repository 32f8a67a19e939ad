"""The benchmark's peers, one small adapter each, written for the versions that are named.

A peer that gives log-probs is a differentiable function (hidden, weight, targets) -> (logprobs,
entropy or None); the ratio loss on top is the same torch code for all. A peer that gives only a
loss is a function of the batch that returns the scalar and what else it has computed.
"""

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
from measure import reason
from torch import Tensor

LogProbs = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
Loss = Callable[[Batch], tuple[Tensor, Outputs]]
RESERVED: dict[str, float] = {}  # MiB that a peer holds outside of torch's allocator, by its name
EAGER, COMPILED = "eager", "torch.compile of eager"
CROSS_ENTROPY = "F.linear_cross_entropy"


def import_without_init(package: str) -> None:
    """Makes `import package.module` work without running the __init__ of the packages on the way.
    Those of trl and verl import the whole trainer, and with it ray, datasets and more, none of
    which the kernel needs."""
    names = package.split(".")
    spec = importlib.util.find_spec(names[0])
    if spec is None:
        raise ModuleNotFoundError(f"No module named '{names[0]}'")
    for depth in range(1, len(names) + 1):
        name = ".".join(names[:depth])
        if name not in sys.modules:
            module = types.ModuleType(name)
            folders = spec.submodule_search_locations or []
            module.__path__ = ["/".join((folder, *names[1:depth])) for folder in folders]
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            module.__spec__.submodule_search_locations = module.__path__
            sys.modules[name] = module


def eager_loss(batch: Batch) -> tuple[Tensor, Outputs]:
    """What a training loop does: log_softmax, gather, entropy for the log, clipped ratio."""
    logp = F.linear(batch.hidden, batch.weight).float().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(-1, batch.targets[:, None]).squeeze(-1)
    ratio = (chosen - batch.old_logprobs).exp()
    gain = torch.minimum(ratio * batch.advantages, ratio.clamp(0, 1e9) * batch.advantages)
    loss = -(batch.token_weights * gain).sum()
    return loss, {"logprobs": chosen.detach(), "entropy": entropy.detach()}


def load_eager() -> Loss:
    return eager_loss


def load_compiled() -> Loss:
    return torch.compile(eager_loss, dynamic=False)


def load_cross_entropy() -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()  # torch 2.13
    return lambda batch: (F.linear_cross_entropy(*batch.head(), options=options), {})


def load_liger_cross_entropy() -> Loss:
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda batch: (loss(batch.weight, batch.hidden, batch.targets), {})


def load_liger_grpo() -> Loss:
    """Its advantages are per sequence and ours per token, so it gets sequences of one token, 1024
    to a chunk: the work is that of sequences of 1024 tokens at its default chunk of one sequence.
    Not compiled, because it would compile its loss, a small share of the work, in each call."""
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

    return loss_of


def load_liger_scaled() -> LogProbs:
    """CuTe kernels on Hopper (they need nvidia-cutlass-dsl), torch elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        importlib.import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = Function.apply(hidden, weight, targets, 1.0, -100, 1, True)
        return -nll, entropy

    return logprobs


def load_liger_native() -> LogProbs:
    """Its C++ kernels, through liger-kernel 0.8.5. They reserve their memory up front and outside
    of torch, so what the card has less of afterwards is counted as theirs (RESERVED)."""
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


def load_quack() -> Loss:
    """Cross-entropy by exponentials in bfloat16 and three products, as policy_loss does it."""
    from quack.linear_cross_entropy import scaled_exp_linear_cross_entropy

    return lambda batch: (scaled_exp_linear_cross_entropy(*batch.head()), {})


def load_cce(filter_eps: str | None) -> Callable[[], LogProbs]:
    """`cce` leaves out small entries of the gradient, which makes random data look free;
    `cce_exact` leaves out none."""

    def load() -> LogProbs:
        from cut_cross_entropy import linear_cross_entropy

        def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None]:
            options = {"reduction": "none", "filter_eps": filter_eps, "impl": "cce"}
            return -linear_cross_entropy(hidden, weight, targets, **options), None

        return logprobs

    return load


def load_trl() -> LogProbs:
    import_without_init("trl.trainer")
    # Its backward asks the trainer whether DeepSpeed has sharded the head, which it never has here.
    utils = types.ModuleType("trl.trainer.utils")
    utils.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()  # type: ignore[attr-defined]
    sys.modules.setdefault(utils.__name__, utils)
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        chunk = 32768  # of the vocabulary, as in its trainer
        found = function.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("entropy",))
        return found[0], found[1]

    return logprobs


def load_verl_triton() -> LogProbs:
    import_without_init("verl.utils")
    module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    importlib.import_module("verl.utils.kernel.kernels")

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return module.linear_cross_entropy(hidden, weight, targets, 1.0, "none", None)

    return logprobs


def load_verl_torch() -> LogProbs:
    import_without_init("verl.utils")
    return importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO()


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    gives: str  # "logprobs" (per token, differentiable), "policy" or "cross entropy" (only a loss)
    load: Callable[[], Any]
    package: str = ""  # what to install; "" for torch itself
    gpu_only: bool = False

    def implementations(self) -> list[Implementation]:
        """Raises whatever importing it raises."""
        call = self.load()
        name = f"{self.name} fwd+bwd"

        def loss(batch: Batch) -> Outputs:
            value, outputs = call(batch)
            value.backward()
            return outputs

        def forward(batch: Batch) -> Outputs:
            with torch.no_grad():
                return _outputs(*call(*batch.head()))

        def both(batch: Batch) -> Outputs:
            logprobs, entropy = call(*batch.head())
            ratio_loss(batch, logprobs).backward()
            return _outputs(logprobs, entropy)

        if self.gives != "logprobs":
            return [Implementation(name, loss, 3, peer=True, loss=self.gives)]
        return [
            Implementation(f"{self.name} fwd", forward, 1, peer=True),
            Implementation(name, both, 3, peer=True),
        ]


def _outputs(logprobs: Tensor, entropy: Tensor | None) -> Outputs:
    found = {"logprobs": logprobs.detach()}
    return found if entropy is None else found | {"entropy": entropy.detach()}


LIGER, CCE = "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"
TRL, VERL = "trl==1.16.0", "verl==0.9.1"
NATIVE, QUACK = "liger-cute-kernels==0.8.5", "quack-kernels==0.6.5"
PEERS = (
    Peer(EAGER, "policy", load_eager),
    Peer(COMPILED, "policy", load_compiled),
    Peer(CROSS_ENTROPY, "cross entropy", load_cross_entropy),
    Peer("liger fused linear CE", "cross entropy", load_liger_cross_entropy, LIGER, True),
    Peer("liger fused linear GRPO", "policy", load_liger_grpo, LIGER),
    Peer("liger scaled CE", "logprobs", load_liger_scaled, LIGER),
    Peer("liger-cute-kernels", "logprobs", load_liger_native, NATIVE, True),
    Peer("quack scaled-exp CE", "cross entropy", load_quack, QUACK, True),
    Peer("cce", "logprobs", load_cce("auto"), CCE, True),
    Peer("cce_exact", "logprobs", load_cce(None), CCE, True),
    Peer("trl ChunkedLogProb", "logprobs", load_trl, TRL),
    Peer("verl linear_cross_entropy", "logprobs", load_verl_triton, VERL, True),
    Peer("verl FusedLinearForPPO", "logprobs", load_verl_torch, VERL),
)


def load(names: list[str], device: str) -> tuple[list[Implementation], dict[str, str]]:
    """The implementations of these peers, and by name the reason why a peer is missing."""
    found: list[Implementation] = []
    missing = {}
    for peer in PEERS:
        if peer.name in names and peer.gpu_only and device == "cpu":
            missing[peer.name] = "runs on a GPU only"
        elif peer.name in names:
            try:
                found += peer.implementations()
            except Exception as error:  # a broken installation raises anything
                package = f" (package {peer.package})" if peer.package else ""
                missing[peer.name] = reason(error) + package
    return found, missing
