"""The results of a batch in float64, at sizes whose [tokens, vocab] does not fit into memory.

Log-probs and entropy are of every token, but gradients only of some: dX of `rows` tokens spread
over the batch, and dW, to which every token adds, of `entries` spread over the vocabulary. So a sum
that drifts over many chunks of tokens shows, and the cost is one product in float64.
"""

import dataclasses

import torch
from batch import Batch
from torch import Tensor

CHUNK = 512  # rows of logits, and of the weight, that are held in float64 at once


@dataclasses.dataclass
class Truth:
    logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    rows: Tensor  # the tokens whose row of dX is known, [R]
    entries: Tensor  # the entries of the vocabulary whose row of dW is known, [E]
    row_probabilities: Tensor  # [R, V]
    entry_probabilities: Tensor  # [N, E]

    @staticmethod
    def of(batch: Batch, rows: int, entries: int) -> "Truth":
        x, w, targets = (t.detach() for t in batch.head())
        tokens, _, vocab = batch.shape
        some = evenly_spaced(min(rows, tokens), tokens, x)
        chosen = evenly_spaced(min(entries, vocab), vocab, x)
        chosen = torch.cat([chosen, targets[: entries // 4]]).unique()  # rows with a large gradient
        found: list[tuple[Tensor, ...]] = []
        kept = []
        for first in range(0, tokens, CHUNK):
            part = x[first : first + CHUNK].double()
            z = torch.cat([part @ v.double().T for v in w.split(16 * CHUNK)], 1)
            logp = z.sub_(z.logsumexp(1, keepdim=True))
            picked = logp.gather(1, targets[first : first + CHUNK, None]).squeeze(1)
            p = logp.exp()
            entropy = -torch.linalg.vecdot(p, torch.where(p > 0, logp, 0))
            found.append((picked, entropy, p[:, chosen]))
            kept.append(p[some[(some >= first) & (some < first + CHUNK)] - first])
        logprobs, entropy, at_entries = (torch.cat(x) for x in zip(*found, strict=True))
        return Truth(logprobs, entropy, some, chosen, torch.cat(kept), at_entries)

    def gradients(self, batch: Batch, slope: Tensor) -> tuple[Tensor, Tensor]:
        """dX of the rows and dW of the entries, for slope = dLoss / dlogp [N]."""
        slope = slope.double()
        of_rows = slope[self.rows, None]
        dz = -of_rows * self.row_probabilities
        dz.scatter_add_(1, batch.targets[self.rows, None], of_rows)
        w, x = batch.weight.detach(), batch.hidden.detach()
        rows = 16 * CHUNK
        parts = zip(dz.split(rows, dim=1), w.split(rows), strict=True)
        d_hidden = torch.stack([part @ of_w.double() for part, of_w in parts]).sum(0)
        is_target = batch.targets[:, None] == self.entries
        dz = slope[:, None] * (is_target.double() - self.entry_probabilities)
        parts = zip(dz.split(rows), x.split(rows), strict=True)
        return d_hidden, torch.stack([part.T @ of_x.double() for part, of_x in parts]).sum(0)


def evenly_spaced(count: int, size: int, like: Tensor) -> Tensor:
    """`count` indices below `size`, the first and the last among them."""
    if count == 1:
        return torch.zeros(1, dtype=torch.int64, device=like.device)
    return torch.arange(count, device=like.device) * (size - 1) // (count - 1)


def policy_slope(batch: Batch, logprobs: Tensor, of_sequences: bool = False) -> Tensor:
    """dLoss / dlogp of the ratio loss without clipping."""
    log_ratio, weights = logprobs - batch.old_logprobs, -batch.token_weights * batch.advantages
    if not of_sequences:
        return weights * log_ratio.exp()
    ids = batch.sequence_ids()
    none = log_ratio.new_zeros(len(ids))
    counts = none.index_add(0, ids, torch.ones_like(log_ratio)).clamp(min=1)
    ratio = (none.index_add(0, ids, log_ratio) / counts).exp()
    return (ratio * none.index_add(0, ids, weights.to(none.dtype)) / counts)[ids]


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the error over that of the truth; nan stays nan."""
    return float((got.double() - truth).norm() / truth.norm())
