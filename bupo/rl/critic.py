"""The value function of PPO: a backbone and a head of its own, and its updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bupo.config import Config
from bupo.finite import first_bad
from bupo.policy import parameter_layers, unembedding
from bupo.rl.forward import Forward, MicroBatch, mini_batches
from bupo.rl.optimizer import AdamW, clip_gradients, learning_rate
from bupo.types import Policy, Rollout

_FINAL = Policy(None)


class Critic:
    """V(s_t) = v . h_t + b, where h_t [D] is the final hidden state that also predicts token t: the
    state before the action. v and b begin at zero, so the first values are 0.

    Which policy a step trains does not matter to it: V is of the final policy, which samples.
    """

    def __init__(self, model: nn.Module, config: Config, pad: int) -> None:
        """model: a causal LM of its own; its unembedding is not used."""
        self.forward = Forward(model, config, pad)
        self._config = config
        weight = unembedding(model).weight
        self.head = nn.Linear(weight.shape[1], 1).to(weight)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        self.skipped: list[str] = []
        """Why: of each update of the last step that was skipped"""
        self.optimizer = AdamW(self.parameters(), {}, config.optimizer, config.critic.lr)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: all but the unembedding, unless that is the embedding."""
        backbone = self.forward.model
        head_only = {n for n, place in parameter_layers(backbone).items() if place is None}
        named = [(f"backbone.{n}", p) for n, p in backbone.named_parameters() if n not in head_only]
        return dict(named) | {f"head.{n}": p for n, p in self.head.named_parameters()}

    @torch.no_grad()
    def evaluate(self, rollouts: Sequence[Rollout]) -> None:
        """Sets rollout.values, of each token."""
        for batch in self.forward.batches(rollouts, range(len(rollouts))):
            parts = batch.split(self._values(batch).cpu(), rollouts)
            for i, part in zip(batch.members, parts):
                rollouts[i].values = part

    def update(self, rollouts: Sequence[Rollout], step: int) -> dict[str, float]:
        """Optimiser updates over the mini-batches that the policy has; V_old = rollout.values::

            mean over tokens of 1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)

        Source: 1707.06347 as its implementations have it (2005.12729). An update whose loss or
        gradient is not finite is skipped and counted. Metrics are means over tokens.
        """
        settings = self._config.optimizer
        rate = learning_rate(self._config, step, self._config.critic.lr)
        self.optimizer.set_rates(rate, lambda place: 1.0)
        parts = mini_batches(rollouts, settings.updates_per_step) * settings.epochs
        losses: list[float] = []
        norms: list[float] = []
        clipped = tokens = 0
        self.skipped = []
        for number, indices in enumerate(parts, start=1):
            count = max(sum(len(rollouts[i].token_ids) for i in indices), 1)
            loss = 0.0
            for batch in self.forward.batches(rollouts, indices, number - 1, len(parts)):
                part, cut = self._loss(batch, rollouts)
                part = part / count
                loss += float(part.detach())
                if math.isfinite(float(part.detach())):
                    part.backward()
                clipped, tokens = clipped + cut, tokens + len(batch.targets)
            norm = clip_gradients(self.parameters().values(), settings.grad_clip)
            if math.isfinite(loss) and math.isfinite(norm):
                self.optimizer.step()
                losses.append(loss)
                norms.append(norm)
            else:
                bad = self._bad(rollouts) or f"loss {loss:g}, gradient norm {norm:g}"
                self.skipped.append(f"critic update {number} of {len(parts)}: {bad}")
            self.optimizer.zero_grad(set_to_none=True)
        return {
            "critic/loss": fmean(losses) if losses else math.nan,
            "critic/clip_fraction": clipped / max(tokens, 1),
            "critic/explained_variance": explained_variance(rollouts),
            "critic/grad_norm": fmean(norms) if norms else math.nan,
            "critic/skipped_updates": len(parts) - len(losses),
        }

    def _bad(self, rollouts: Sequence[Rollout]) -> str | None:
        """Where a loss or gradient that is not finite comes from."""
        targets = ((name, [getattr(r, name) for r in rollouts]) for name in ("returns", "values"))
        inputs = [(name, torch.cat(found)) for name, found in targets if None not in found]
        named = [(f"critic {n}", p) for n, p in self.parameters().items()]
        return first_bad([*inputs, *named, *((f"gradient of {n}", p.grad) for n, p in named)])

    def _values(self, batch: MicroBatch) -> Tensor:
        """[T], float32 at least."""
        hidden = self.forward.hidden(batch, _FINAL)
        values: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return values

    def _loss(self, batch: MicroBatch, rollouts: Sequence[Rollout]) -> tuple[Tensor, int]:
        """Sum over tokens; how many have their clipped value in it."""
        members = [rollouts[i] for i in batch.members]
        values, eps = self._values(batch), self._config.critic.clip
        old = torch.cat([r.values for r in members if r.values is not None]).to(values)
        returns = torch.cat([r.returns for r in members if r.returns is not None]).to(values)
        free = (values - returns).square()
        bounded = (values.clamp(old - eps, old + eps) - returns).square()
        return torch.maximum(free, bounded).sum() / 2, int((bounded > free).sum())

    def save(self, folder: Path) -> None:
        """Parameters and moments, in two files of one folder."""
        folder.mkdir()
        named = {n: p.detach().contiguous() for n, p in self.parameters().items()}
        save_file(named, folder / "critic.safetensors")
        save_file(self.optimizer.flat_state(self.parameters()), folder / "moments.safetensors")

    def load(self, folder: Path) -> None:
        """What save() wrote. Raises ValueError if something is missing or left over."""
        saved, parameters = load_file(folder / "critic.safetensors"), self.parameters()
        if wrong := sorted(saved.keys() ^ parameters.keys()):
            raise ValueError(f"{folder}: parameters are missing or of no module: {wrong}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
        self.optimizer.load_flat_state(parameters, load_file(folder / "moments.safetensors"))


def explained_variance(rollouts: Sequence[Rollout]) -> float:
    """1 - Var(R - V) / Var(R) over the tokens that have a part; 0 where R does not vary."""
    kept = [r for r in rollouts if not r.dropped]
    returns = [r.returns.double() for r in kept if r.returns is not None]
    values = [r.values.double() for r in kept if r.values is not None]
    if not sum(map(len, returns)):
        return 0.0
    target, value = torch.cat(returns), torch.cat(values)
    spread = float(target.var(correction=0))
    return 1 - float((target - value).var(correction=0)) / spread if spread > 1e-12 else 0.0
