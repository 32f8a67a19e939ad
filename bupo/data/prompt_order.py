"""The order in which training takes its prompts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from bupo.config import ConfigError
from bupo.types import Prompt


class _Epochs:
    """Prompts in shuffled epochs, which follow one another without end."""

    def __init__(self, prompts: Sequence[Prompt], seed: str) -> None:
        self._prompts, self._seed = prompts, seed
        self._epoch, self._order = -1, list(range(len(prompts)))

    def __getitem__(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._prompts)))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
        return self._prompts[self._order[place]]


class PromptOrder:
    """Shuffled epochs. The order depends only on the seed and on the number of prompts taken
    before, so these two are enough to resume exactly.

    With weights, each file has separate epochs, and its share of the first n prompts is n * weight,
    to within one prompt; within a step the files are mixed.
    """

    def __init__(
        self, prompts: Sequence[Prompt], per_step: int, seed: int, weights: Sequence[float] = ()
    ) -> None:
        if per_step > len(prompts):
            raise ConfigError(
                f"rollout.prompts ({per_step}) exceeds the number of training prompts "
                f"({len(prompts)})"
            )
        self.per_step, self._seed = per_step, seed
        self._shares = [w / sum(weights) for w in weights] or [1.0]
        if weights:
            files = [[p for p in prompts if p.file == n] for n in range(len(weights))]
            self._files = [_Epochs(f, f"{seed}/file{n}") for n, f in enumerate(files)]
            for n, (share, file) in enumerate(zip(self._shares, files)):
                if math.ceil(share * per_step) > len(file):
                    raise ConfigError(
                        f"data.weights takes {share * per_step:g} of rollout.prompts={per_step} "
                        f"from data.train[{n}], which has only {len(file)} prompts"
                    )
        else:
            self._files = [_Epochs(prompts, f"{seed}")]
        self._step, self._taken = 1, [0] * len(self._files)

    def take(self, first: int, count: int) -> list[Prompt]:
        """Returns `count` prompts, beginning with number `first` of the order, which has no end.
        Without refills, those of step n begin with number (n - 1) * per_step."""
        found: list[Prompt] = []
        while len(found) < count:
            chunk, place = divmod(first + len(found), self.per_step)
            found += self._of_step(chunk + 1)[place : place + count - len(found)]
        return found

    def _of_step(self, step: int) -> list[Prompt]:
        """Returns the prompts of step 1, 2, ...; a step may begin with the rest of an epoch."""
        if step < self._step:
            self._step, self._taken = 1, [0] * len(self._files)
        while self._step < step:
            self._places()
        places = self._places()
        if len(self._files) > 1:  # else a mini-batch, every k-th prompt, could be of one file
            random.Random(f"{self._seed}/mix/{step}").shuffle(places)
        return [self._files[file][position] for file, position in places]

    def _places(self) -> list[tuple[int, int]]:
        """Returns, for each prompt of the next step, the file and the position in it. Each prompt
        comes from the file that is furthest behind its share."""
        places = []
        for _ in range(self.per_step):
            total = sum(self._taken) + 1
            behind = [share * total - taken for share, taken in zip(self._shares, self._taken)]
            file = behind.index(max(behind))
            places.append((file, self._taken[file]))
            self._taken[file] += 1
        self._step += 1
        return places
