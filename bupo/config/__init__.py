"""Settings: one class per group, read from YAML and `key=value`, strict about names."""

from __future__ import annotations

from pathlib import Path

from bupo.config.analysis_settings import AnalysisConfig as AnalysisConfig
from bupo.config.errors import BrokenError as BrokenError
from bupo.config.errors import ConfigError as ConfigError
from bupo.config.errors import RunError as RunError
from bupo.config.errors import first_line as first_line
from bupo.config.errors import readable as readable
from bupo.config.inputs import DataConfig as DataConfig
from bupo.config.inputs import ModelConfig as ModelConfig
from bupo.config.objective import ADVANTAGES as ADVANTAGES
from bupo.config.objective import CriticConfig as CriticConfig
from bupo.config.objective import LossConfig as LossConfig
from bupo.config.objective import OptimizerConfig as OptimizerConfig
from bupo.config.phases import BupoConfig as BupoConfig
from bupo.config.phases import PhaseConfig as PhaseConfig
from bupo.config.reading import QUOTES as QUOTES
from bupo.config.reading import changes_since as changes_since
from bupo.config.reading import dump as dump
from bupo.config.reading import read as read
from bupo.config.reading import shipped as shipped
from bupo.config.sampling import EvalConfig as EvalConfig
from bupo.config.sampling import RewardConfig as RewardConfig
from bupo.config.sampling import RolloutConfig as RolloutConfig
from bupo.config.schema import all_keys as all_keys
from bupo.config.schema import describe as describe
from bupo.config.schema import values as values
from bupo.config.settings import GPU_WORKSPACE as GPU_WORKSPACE
from bupo.config.settings import MAY_CHANGE as MAY_CHANGE
from bupo.config.settings import Config as Config


def load(file: Path | None, overrides: list[str]) -> Config:
    """The settings of a training run; see read."""
    return read(file, overrides, Config)
