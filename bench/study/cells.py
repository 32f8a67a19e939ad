"""What the study runs: cells, each of which is a way to train, in editions of different sizes."""

from dataclasses import dataclass, field

BASELINE = "GRPO"
"""The cell that all others of an edition are compared with"""


@dataclass(frozen=True)
class Edition:
    """Cells that differ in nothing but their own settings."""

    recipe: str
    seeds: tuple[int, ...]
    common: tuple[str, ...]
    """Settings of all cells; {seed} is replaced"""
    cells: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The settings of each cell, by its name"""


def bottom_up(layer: int, steps: int, *more: str) -> tuple[str, ...]:
    return "algorithm=bupo", f"bupo.layer={layer}", f"bupo.steps={steps}", *more


LAYERS = 6  # of the small models


def at_equal_cost(layer: int, steps: int, of: int) -> tuple[str, ...]:
    """As many more steps as phase 1 saves: its update runs `layer` of the LAYERS layers."""
    return bottom_up(layer, steps, f"steps={of + round(steps * (1 - layer / LAYERS))}")


def one_layer(layer: int) -> tuple[str, ...]:
    """That layer alone is trained, for the final objective, as in arXiv 2607.01232."""
    return "algorithm=custom", f"phases=[{{lr: {{{layer}: 1, others: 0}}}}]"


def lower_layers(up_to: int, steps: int) -> tuple[str, ...]:
    """The control for phase 1: the same layers, trained for the objective of the final policy."""
    frozen = f"{{steps: {steps}, lr: {{{up_to + 1}-: 0}}}}"
    return "algorithm=custom", f"phases=[{frozen}, {{}}]"


ARITHMETIC = {
    BASELINE: ("algorithm=grpo",),
    "RLOO": ("algorithm=rloo",),
    "REINFORCE++": ("algorithm=reinforce_pp",),
    "BuPO, layer 3 for 8 steps": bottom_up(3, 8),
    "layers 1-3 under the final objective for 8 steps": lower_layers(3, 8),
    "BuPO, layer 1 for 8 steps": bottom_up(1, 8),
    "BuPO, layer 5 for 8 steps": bottom_up(5, 8),
    "BuPO, layer 3 for 2 steps": bottom_up(3, 2),
    "BuPO, layer 3 for 20 steps": bottom_up(3, 20),
    "BuPO, layer 3 for 8 steps, normed": bottom_up(3, 8, "bupo.final_norm=true"),
    "BuPO, layer 3 for 8 steps, on RLOO": bottom_up(3, 8, "advantage=rloo"),
    "PPO": ("algorithm=ppo",),
}


def harder_cells(steps: int) -> dict[str, tuple[str, ...]]:
    return {
        BASELINE: ("algorithm=grpo",),
        "BuPO, layer 3 for 8 steps": bottom_up(3, 8),
        "layers 1-3 under the final objective for 8 steps": lower_layers(3, 8),
        "BuPO, layer 5 for 8 steps": bottom_up(5, 8),
        "BuPO, layer 3 for 2 steps": bottom_up(3, 2),
        "BuPO, layer 3 for 20 steps": bottom_up(3, 20),
        "BuPO, layer 3 for 8 steps, normed": bottom_up(3, 8, "bupo.final_norm=true"),
        "BuPO, layer 3 for 8 steps, with the cost of GRPO": at_equal_cost(3, 8, steps),
        "BuPO, auto_layer for 8 steps": ("algorithm=bupo", "bupo.auto_layer=0.1", "bupo.steps=8"),
        "BuPO, layer 3 for 20 steps or until auto_stop": bottom_up(
            3, 20, "bupo.auto_stop=0.1", "diagnostics.every=1"
        ),
        "RLOO": ("algorithm=rloo",),
        "BuPO, layer 3 for 8 steps, on RLOO": bottom_up(3, 8, "advantage=rloo"),
        "REINFORCE++": ("algorithm=reinforce_pp",),
        "BuPO, layer 3 for 8 steps, on REINFORCE++": bottom_up(3, 8, "advantage=reinforce_pp"),
        "PPO": ("algorithm=ppo",),
        **{f"layer {layer} alone": one_layer(layer) for layer in range(1, 7)},
    }


EIGHT = ("eval.samples=8", "eval.pass_k=[1,8]")
SIXTEEN = ("eval.samples=16", "eval.pass_k=[1,2,4,8,16]")
SEEDED = ("seed={seed}", "diagnostics.every=0", "checkpoint.keep=[]", "checkpoint.keep_last=1")
TINY = "task_options={layers: 2, width: 32, warm_steps: 4, eval_problems: 4, seed: {seed}}"


def harder(task: str, steps: int, tokens: int) -> Edition:
    own = (f"task=bupo.tasks.{task}", "task_options={seed: {seed}}", f"steps={steps}")
    common = (*SEEDED, *own, f"rollout.max_new_tokens={tokens}", "eval.every=20", *SIXTEEN)
    return Edition("arithmetic.yaml", (1, 2, 3, 4, 5), common, harder_cells(steps))


EDITIONS = {
    "minutes": Edition(
        "arithmetic.yaml",
        (1,),
        (*SEEDED, TINY, "steps=4", "eval.samples=2", "eval.pass_k=[1,2]", "eval.every=2"),
        {BASELINE: ("algorithm=grpo",), "BuPO": bottom_up(1, 2)},
    ),
    "arithmetic": Edition(
        "arithmetic.yaml",
        (1, 2, 3, 4, 5),
        (*SEEDED, "task_options={seed: {seed}}", "eval.every=10", *SIXTEEN),
        ARITHMETIC,
    ),
    "countdown": harder("countdown", 120, 64),
    "modular": harder("modular", 60, 48),
    "smollm2": Edition(
        "smollm2.yaml",
        (1, 2),
        (*SEEDED, "task_options={seed: {seed}}", "eval.every=10", *EIGHT),
        {
            BASELINE: ("algorithm=grpo",),
            "BuPO, layer 29 for 10 steps": bottom_up(29, 10, "bupo.final_norm=false"),
            "BuPO, layer 29 for 10 steps, normed": bottom_up(29, 10, "bupo.final_norm=true"),
            "BuPO, layer 12 for 10 steps, normed": bottom_up(12, 10, "bupo.final_norm=true"),
            "layers 1-12 under the final objective for 10 steps": lower_layers(12, 10),
        },
    ),
}
PUBLISHED = [name for name in EDITIONS if name != "minutes"]
"""Those with a table in docs/study.md"""
