"""Typed settings of a run: the sections, and how they are read from YAML files and the command line.

`sections` holds the models, `loading` reads files (`extends:`, overrides, presets), `messages` turns what is
wrong into lines that name file, line and key, and `show` prints the result.
"""

from mllm3d.config.loading import Loaded, config_to_yaml, load, load_with_origins, read_values
from mllm3d.config.sections import (
    PRESETS,
    Config,
    DataConfig,
    EstimateConfig,
    EvaluatedSettings,
    EvaluationConfig,
    EvaluationMode,
    ExpectedSize,
    OptimizerConfig,
    RunConfig,
    Settings,
    TrainingConfig,
    VolumeConfig,
)

__all__ = [
    "PRESETS",
    "Config",
    "DataConfig",
    "EstimateConfig",
    "EvaluatedSettings",
    "EvaluationConfig",
    "EvaluationMode",
    "ExpectedSize",
    "Loaded",
    "OptimizerConfig",
    "RunConfig",
    "Settings",
    "TrainingConfig",
    "VolumeConfig",
    "config_to_yaml",
    "load",
    "load_with_origins",
    "read_values",
]
