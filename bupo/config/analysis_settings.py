"""What python -m bupo.analyze measures, on which texts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from bupo.config.errors import one_of, require
from bupo.config.inputs import DataConfig, ModelConfig
from bupo.config.sampling import RolloutConfig
from bupo.config.settings import Config


@dataclass
class AnalysisConfig:
    """Settings of an analysis; data.train names what is measured."""

    compare: str | None = None
    """A second model (folder, hub name or run directory), measured on the same texts."""
    prompts: int = 64
    """Texts, one a prompt, drawn by `seed` from all rows: the unit of every standard error."""
    responses: str = "auto"
    """What is measured. generate: a response of the model to each prompt, by rollout.*. column: the
    column `response` of the data, as in a run's rollouts/step_*.jsonl. none: the prompt itself.
    auto: none for .txt files, column where the rows have it, else generate."""
    response: str = "response"
    """Name of that column."""
    whole_files: bool = False
    """A .txt file is one text instead of one a line."""
    max_tokens: int | None = None
    """Cut every text after so many tokens; null: none is cut."""
    temperature: float = 1.0
    """Of every policy that is measured."""
    tolerance: float = 0.1
    """Of the boundary layer: share of the largest rise of entropy by an FFN below which a layer no
    longer explores."""
    stride: int = 1
    """Ranks, KL, agreement and top tokens at every so many-th layer and the last one."""
    top_k: int = 5
    """Likeliest tokens that are kept of each layer of the heat maps' texts."""
    heat_maps: int = 3
    """Texts that the report shows layer by token."""
    heat_map_tokens: int = 192
    """Tokens of each of them: the first ones that are measured."""
    batch_tokens: int = 1024
    """Tokens of a forward (or one text); does not change the result."""
    seed: int = 0
    """Of the choice of prompts, of sampling and of resampling."""
    task: str | None = None
    """Python module that makes a model, and perhaps data (bupo.tasks.arithmetic, tiny)."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Passed to the task."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    def __post_init__(self) -> None:
        one_of("responses", self.responses, ("auto", "generate", "column", "none"))
        counts = ("prompts", "stride", "top_k", "heat_maps", "heat_map_tokens", "batch_tokens")
        for key in counts:
            require(getattr(self, key) > 0, f"{key} must be positive, got {getattr(self, key)}")
        require(self.temperature > 0, f"temperature must be > 0, got {self.temperature}")
        require(0 <= self.tolerance < 1, f"tolerance must be in [0, 1), got {self.tolerance}")
        require(
            self.max_tokens is None or self.max_tokens > 1,
            f"max_tokens must be at least 2 or null, got {self.max_tokens}",
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
