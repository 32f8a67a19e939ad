"""Settings, with one class per group, read from YAML and `key=value` and strict about names."""

# The imports below are the public names of the package.
# ruff: noqa: F401
# mypy: implicit-reexport

from __future__ import annotations

from pathlib import Path

from bupo.config.analysis_settings import AnalysisConfig
from bupo.config.errors import (
    AgreedError,
    BrokenError,
    ConfigError,
    RunError,
    first_line,
    readable,
)
from bupo.config.inputs import DataConfig, LoraConfig, ModelConfig
from bupo.config.objective import (
    ADVANTAGES,
    BupoConfig,
    CriticConfig,
    LossConfig,
    OptimizerConfig,
    PhaseConfig,
)
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
from bupo.config.settings import GPU_WORKSPACE, MAY_CHANGE, Config


def load(file: Path | None, overrides: list[str]) -> Config:
    """Reads the settings of a training run; see read."""
    return read(file, overrides, Config)
