"""Settings: a group a class, read from YAML and `key=value`, strict about names."""

from __future__ import annotations

from pathlib import Path

from bupo.config.analysis_settings import AnalysisConfig
from bupo.config.errors import BrokenError, ConfigError, RunError, first_line, readable
from bupo.config.inputs import DataConfig, ModelConfig
from bupo.config.objective import ADVANTAGES, CriticConfig, LossConfig, OptimizerConfig
from bupo.config.phases import BupoConfig, PhaseConfig
from bupo.config.reading import (
    QUOTES,
    all_keys,
    changes_since,
    describe,
    dump,
    read,
    shipped,
    values,
)
from bupo.config.sampling import EvalConfig, RewardConfig, RolloutConfig
from bupo.config.settings import (
    GPU_WORKSPACE,
    MAY_CHANGE,
    CheckpointConfig,
    Config,
    DiagnosticsConfig,
    WatchdogConfig,
)

__all__ = [
    "ADVANTAGES",
    "GPU_WORKSPACE",
    "MAY_CHANGE",
    "QUOTES",
    "AnalysisConfig",
    "BrokenError",
    "BupoConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "CriticConfig",
    "DataConfig",
    "DiagnosticsConfig",
    "EvalConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunError",
    "WatchdogConfig",
    "all_keys",
    "changes_since",
    "describe",
    "dump",
    "first_line",
    "load",
    "read",
    "readable",
    "shipped",
    "values",
]


def load(file: Path | None, overrides: list[str]) -> Config:
    """The settings of a training run; see read."""
    return read(file, overrides, Config)
