"""bupo.data.prompt_order: an order that is a function of seed and place."""

import random
from collections import Counter
from itertools import islice

import pytest
from rl_samples import prompt

from bupo.config import ConfigError
from bupo.data.prompt_order import PromptOrder
from bupo.types import Prompt


def of_step(order, step):
    """The prompts of step 1, 2, ... where no step takes more than its own."""
    return order.take((step - 1) * order.per_step, order.per_step)


def prompts_of(count):
    return [prompt([1], index=n) for n in range(count)]


def stream(order, steps):
    return [p.index for step in range(1, steps + 1) for p in of_step(order, step)]


@pytest.mark.parametrize(("count", "per_step"), [(12, 4), (10, 4), (7, 7), (5, 3), (1, 1)])
def test_every_epoch_is_a_permutation(count, per_step):
    # Where count is no multiple of per_step, the remainder of an epoch starts the next step.
    steps = count * 3
    seen = iter(stream(PromptOrder(prompts_of(count), per_step, seed=1), steps))
    epochs = [list(islice(seen, count)) for _ in range(steps * per_step // count)]
    assert len(epochs) == 3 * per_step
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count == 1 or len(Counter(map(tuple, epochs))) > 1, "epochs are shuffled differently"


def test_order_is_a_function_of_seed_and_step():
    steps = list(range(1, 40))
    order = PromptOrder(prompts_of(10), 4, seed=3)
    expected = {step: [p.index for p in of_step(order, step)] for step in steps}
    random.Random(0).shuffle(steps)
    again = PromptOrder(prompts_of(10), 4, seed=3)
    random.seed(99)  # the global generator has no say, and no change
    state = random.getstate()
    for step in steps + steps[:5]:
        assert [p.index for p in of_step(again, step)] == expected[step], f"step {step}"
    assert random.getstate() == state
    fresh = PromptOrder(prompts_of(10), 4, seed=3)
    assert [p.index for p in of_step(fresh, 17)] == expected[17], "as after a resume at step 16"
    other = PromptOrder(prompts_of(10), 4, seed=4)
    assert [[p.index for p in of_step(other, s)] for s in (1, 2)] != [expected[1], expected[2]]


def test_more_prompts_a_step_than_there_are():
    PromptOrder(prompts_of(5), 5, seed=0)
    with pytest.raises(ConfigError, match=r"rollout\.prompts \(6\) .*\(5\)"):
        PromptOrder(prompts_of(5), 6, seed=0)


def of_files(*counts):
    return [
        Prompt(0, "", f"{file}/{n}", [1], "", file)
        for file, count in enumerate(counts)
        for n in range(count)
    ]


WEIGHTS = [(3, 1), (1, 1), (0.7, 0.2, 0.1), (5,)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weights_are_shares_of_every_stretch_of_prompts(weights):
    prompts = of_files(*[40] * len(weights))
    order = PromptOrder(prompts, 8, 0, weights)
    seen = Counter()
    for step in range(1, 60):
        seen.update(p.file for p in of_step(order, step))
        for file, weight in enumerate(weights):
            expected = 8 * step * weight / sum(weights)
            assert abs(seen[file] - expected) <= 1, (step, file)


def test_weighted_files_are_each_an_endless_row_of_shuffled_epochs():
    order = PromptOrder(of_files(7, 30), 6, 1, (2, 1))
    texts = [p.text for step in range(1, 40) for p in sorted_by_file(order, step)]
    for file, count in enumerate((7, 30)):
        mine = [t for t in texts if t.startswith(f"{file}/")]
        epochs = [mine[i : i + count] for i in range(0, len(mine) - count, count)]
        assert len(epochs) >= 2 and epochs[0] != epochs[1]
        # Within a step the order is mixed, so an epoch's end may change places with the next.
        assert abs(Counter(mine)[f"{file}/0"] - len(mine) / count) <= 1


def sorted_by_file(order, step):
    return sorted(of_step(order, step), key=lambda p: p.file)


def test_weighted_order_is_a_function_of_seed_and_step():
    arguments = (of_files(9, 12, 10), 4, 3, (0.5, 0.3, 0.2))
    steps = list(range(1, 30))
    expected = {step: [p.text for p in of_step(PromptOrder(*arguments), step)] for step in steps}
    random.Random(0).shuffle(steps)
    again = PromptOrder(*arguments)
    for step in steps + steps[:5]:
        assert [p.text for p in of_step(again, step)] == expected[step], f"step {step}"
    other = PromptOrder(of_files(9, 12, 10), 4, 4, (0.5, 0.3, 0.2))
    assert [[p.text for p in of_step(other, s)] for s in (1, 2)] != [expected[1], expected[2]]


def test_mini_batches_are_of_every_file():
    """Updates take every k-th group of a step: at 3 to 1 and k = 4 one of them would be all of one
    file if files took turns."""
    order = PromptOrder(of_files(200, 200), 32, 0, (3, 1))
    shares = [Counter(p.file for p in of_step(order, step)[3::4])[1] for step in range(1, 20)]
    assert max(shares) < 8 and len(set(shares)) > 1


def test_a_file_too_small_for_its_share():
    PromptOrder(of_files(6, 2), 8, 0, (3, 1))
    message = r"takes 6 of rollout\.prompts=8 from data\.train\[0\], which has only 5 prompts"
    with pytest.raises(ConfigError, match=message):
        PromptOrder(of_files(5, 9), 8, 0, (3, 1))
