"""What python -m bupo.analyze measures, on which texts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from bupo.config.errors import require
from bupo.config.inputs import DataConfig, ModelConfig
from bupo.config.limits import Group, setting
from bupo.config.sampling import RolloutConfig
from bupo.config.settings import Config


@dataclass
class AnalysisConfig(Group):
    """Settings of an analysis; data.train names what is measured."""

    compare: str | None = None
    """A second model (folder, hub name or run directory) that is measured on the same texts; null:
    none."""
    prompts: int = setting(64, at_least=1)
    """Number of texts, one per prompt, drawn by `seed` from all rows. They are the unit of every
    standard error."""
    responses: str = setting("auto", choices=("auto", "generate", "column", "none"))
    """What is measured. generate: a response of the model to each prompt, sampled by rollout.*.
    column: the column `response` of the data, as in a run's rollouts/step_*.jsonl. none: the prompt
    itself. auto: none for .txt files, column where the rows have it, else generate."""
    response: str = "response"
    """Name of that column."""
    whole_files: bool = False
    """A .txt file is one text instead of one per line."""
    max_tokens: int | None = setting(None, at_least=2)
    """Number of tokens after which every text is cut; null: texts are not cut."""
    temperature: float = setting(1.0, above=0)
    """Temperature of every policy that is measured."""
    tolerance: float = setting(0.1, at_least=0, below=1)
    """Share of the largest rise of entropy by an FFN below which a layer no longer explores; it
    decides the boundary layer."""
    stride: int = setting(1, at_least=1)
    """Ranks, KL, agreement and top tokens are measured at each stride-th layer and the last one."""
    top_k: int = setting(5, at_least=1)
    """Number of likeliest tokens that are kept for each layer for the texts of the heat maps."""
    heat_maps: int = setting(3, at_least=1)
    """Number of texts that the report shows layer by token."""
    heat_map_tokens: int = setting(192, at_least=1)
    """Number of tokens that each of them shows, from the first one that is measured."""
    batch_tokens: int = setting(1024, at_least=1)
    """Number of tokens in one forward pass (at least one text); does not change the result."""
    minutes: float | None = setting(None, above=0)
    """Time limit for measuring, without generation. Texts and tokens are drawn at random to fit;
    null: no limit."""
    tokens: int | None = setting(None, at_least=1)
    """Number of tokens that are measured, drawn from all texts evenly; null: all."""
    seed: int = 0
    """Seed of the choice of prompts, of sampling and of resampling."""
    task: str | None = None
    """Python module that makes a model, and perhaps data, as for bupo.run; null: none."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Options of the task."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.minutes is None or self.tokens is None,
            f"minutes={self.minutes} and tokens={self.tokens} are both set; choose one",
        )

    def as_run(self, generates: bool = True) -> Config:
        """The same model, data and engine as settings of a run, for what commands share; without
        responses to generate, nothing is asked of their length."""
        defaults = RolloutConfig()
        rollout = replace(
            self.rollout,
            prompts=defaults.prompts,
            samples=defaults.samples,
            refills=0,
            max_new_tokens=self.rollout.max_new_tokens if generates else 1,
        )
        return Config(
            seed=self.seed,
            task=self.task,
            task_options=self.task_options,
            model=self.model,
            data=self.data,
            rollout=rollout,
        )
