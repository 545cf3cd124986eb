"""MedPruner: slices and tokens of a scan left out at inference, without training; and what it is compared with.

import medpruner

medpruner.attach(model, medpruner.MedPruner(tau=0.9))
model.generate(**inputs)
print(model.medpruner.report.rate)
medpruner.detach(model)
"""

from medpruner.pruner import Pruner, attach, detach
from medpruner.settings import (
    METHODS,
    HiPrune,
    HuluL1,
    MedPruner,
    PruningSettings,
    Random,
    Uniform,
    VisionZip,
    settings_of,
)
from medpruner.slices import Pruned, Report

__all__ = [
    "METHODS",
    "HiPrune",
    "HuluL1",
    "MedPruner",
    "Pruned",
    "Pruner",
    "PruningSettings",
    "Random",
    "Report",
    "Uniform",
    "VisionZip",
    "attach",
    "detach",
    "settings_of",
]
