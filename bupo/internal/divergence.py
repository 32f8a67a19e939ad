"""How far two policies of one model are apart.

    KL(pi^l || pi^m) = sum_j pi^l_j (log pi^l_j - log pi^m_j)      in nats, of each measured token

pi^l = softmax(H^l E_u^T) (arXiv 2512.19673); with the final norm, softmax(LN(H^l) E_u^T).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bupo.internal.log_probs import CHUNK, evaluating, kl_rows, log_probs
from bupo.internal.texts import Text, batches_of
from bupo.policy import hidden_states, internal_policy, unembedding


def kl_between(
    model: nn.Module,
    texts: Sequence[Text],
    l: int | None,
    m: int | None,
    final_norm: bool = False,
    temperature: float = 1.0,
    batch_tokens: int = 1024,
) -> NDArray[np.float32]:
    """KL(pi^l || pi^m) of every measured token, [token], in the order of texts and places.

    l, m: layers 1..L; None is the final policy, which has its norm in any case. Two forwards, of
    l and of m layers; memory is that of the measured tokens' H^l and H^m, [tokens, D], and of CHUNK
    rows of logits. Errors: ValueError for no text; else as bupo.policy.internal_policy.
    """
    if not texts:
        raise ValueError("kl_between: texts: expected at least one, came none")
    head = unembedding(model)
    found: list[Tensor] = []
    text, position = [], []
    with evaluating(model):
        for batch in batches_of(texts, batch_tokens, head.weight.device):
            streams = []
            for layer in (l, m):
                with internal_policy(model, layer, final_norm):
                    streams.append(batch.pick(hidden_states(model, batch.ids)))
            for pair in zip(*(s.split(CHUNK) for s in streams)):
                ours, theirs = (log_probs(head, x, temperature) for x in pair)
                found.append(kl_rows(ours, theirs).cpu())
            text.append(batch.text)
            position.append(batch.position)
    order = np.lexsort((np.concatenate(position), np.concatenate(text)))
    return np.asarray(torch.cat(found).numpy()[order], dtype=np.float32)
