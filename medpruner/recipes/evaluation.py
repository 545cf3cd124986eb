"""`medpruner.slicewise`: a slice-wise model of somebody else, whole and pruned, asked by eval.py."""

from typing import ClassVar, NoReturn

from mllm3d.config import Config, EvaluatedSettings, Settings
from mllm3d.errors import UserError


class Slicewise:
    """Nothing of it is trained; `evaluation.pruner` says what is left out."""

    Settings: ClassVar[type[Settings]] = EvaluatedSettings

    def __init__(self, config: Config) -> None:
        self._refuse(config)

    @staticmethod
    def _refuse(config: Config) -> NoReturn:
        raise UserError(f"recipe: {config.recipe} trains nothing; evaluate it with eval.py, or name another recipe")
