"""The sections of a config: strict, frozen pydantic models, every field described.

Unknown keys are errors, and nothing is converted on the way in but a list to a tuple and a string to a path:
`"3"` is not an integer and `1` is not a boolean. Relative paths start at the directory the command runs in.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, Strict, field_validator, model_validator

Axis = Literal["D", "H", "W"]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
# Containers and paths take their JSON forms (list, string), also where a section is built from a dictionary;
# what they hold stays strict.
FilePath = Annotated[Path, Strict(False)]
Shape = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], Strict(False)]
Spacing = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], Strict(False)]
Interval = Annotated[tuple[float, float], Strict(False)]
Percentiles = Annotated[
    tuple[Annotated[float, Field(ge=0, le=100)], Annotated[float, Field(ge=0, le=100)]], Strict(False)
]


class Settings(BaseModel):
    """Base of every section, and of what a recipe declares for `model:`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )


PRESETS: dict[str, dict[str, Any]] = {
    # Photon's published preprocessing: 1 mm, a cube of 364 mm, [-1000, 1000] HU, last axis flipped at load.
    # A 14x14x14 patch then gives 10x20x20, merged 2x2 in plane to 10x10x10 = 1,000 visual tokens.
    "photon": {
        "spacing_mm": (1.0, 1.0, 1.0),
        "crop": (364, 364, 364),
        "window_hu": (-1000.0, 1000.0),
        "shape": (140, 280, 280),
        "flip": ("W",),
    },
    # Photon Max sees the same volume through Qwen2.5-VL's own 2x14x14 patch embedding: 7,000 visual tokens.
    "photon_max": {
        "spacing_mm": (1.0, 1.0, 1.0),
        "crop": (364, 364, 364),
        "window_hu": (-1000.0, 1000.0),
        "shape": (140, 280, 280),
        "flip": ("W",),
    },
    # Med3DVLM scales each volume from its own minimum and maximum (percentiles 0 and 100) to [0, 1].
    "med3dvlm": {"window_percentile": (0.0, 100.0), "shape": (128, 256, 256)},
    # The generated phantoms of data/phantom: small, with a soft-tissue window, scaled to [-1, 1].
    "phantom": {"window_hu": (-200.0, 300.0), "shape": (56, 112, 112), "mean": 0.5, "std": 0.5},
}
"""Preprocessing by name: values for the fields of `VolumeConfig` that a config does not give."""


H100_TFLOPS = 989.0
"""Dense BF16 peak of an H100 SXM: the GPU that is meant where a config names none."""


class RunConfig(Settings):
    """Where a run is kept, and what makes it repeatable."""

    output: FilePath = Field(description="Run folder. Default: runs/<name of the config file>.")
    seed: int = Field(default=0, ge=0, description="Seed of initial weights, sampling order and dropout.")
    threads: PositiveInt | None = Field(
        default=None, description="CPU threads per rank. Default: the machine's cores shared by its ranks."
    )


class VolumeConfig(Settings):
    """From a stored scan to the array that a model sees; saved with the checkpoint as preprocessing.json.

    In this order: canonical orientation, `spacing_mm`, window to [0, 1], `crop`, `shape`, `flip`,
    `(x - mean) / std`. Axes are (D, H, W), see `mllm3d.data.orientation`.
    """

    preset: Literal["photon", "photon_max", "med3dvlm", "phantom"] | None = Field(
        default=None, description="Preprocessing by name; fields that are given win over it."
    )
    spacing_mm: Spacing | None = Field(default=None, description="Resample to this (d, h, w) spacing. None: keep.")
    crop: Shape | None = Field(default=None, description="Centre crop or pad to these voxels (D, H, W). None: keep.")
    window_hu: Interval = Field(default=(-1000.0, 1000.0), description="Clip to this range of HU, then to [0, 1].")
    window_percentile: Percentiles | None = Field(
        default=None,
        description="Clip at these percentiles of the volume instead of window_hu (MR has no HU).",
    )
    shape: Shape | None = Field(default=None, description="Final trilinear resize to (D, H, W). None: keep.")
    mean: float = Field(default=0.0, description="Subtracted after the window has become [0, 1].")
    std: PositiveFloat = Field(default=1.0, description="Divides after the mean is subtracted.")
    flip: Annotated[tuple[Axis, ...], Strict(False)] = Field(
        default=(), description="Axes to reverse, as published Photon does with W."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") in PRESETS:
            return PRESETS[data["preset"]] | data
        return data

    @field_validator("window_hu", "window_percentile")
    @classmethod
    def _is_rising(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] >= value[1]:
            raise ValueError("the lower end must lie below the upper end")
        return value

    @field_validator("flip")
    @classmethod
    def _names_each_axis_once(cls, value: tuple[Axis, ...]) -> tuple[Axis, ...]:
        if len(set(value)) != len(value):
            raise ValueError("an axis is named twice")
        return value


class ExpectedSize(Settings):
    """Size of a data set that is not there yet, so that `--dry-run` can count steps."""

    volumes: PositiveInt = Field(description="Volumes in the training split; or sets of images, or videos.")
    questions: PositiveInt = Field(description="Questions in the training split.")


class DataConfig(Settings):
    """Which questions about which volumes; a row's set of images or its video counts as one volume too."""

    manifest: FilePath = Field(description="JSON Lines file, one question a line; files relative to its folder.")
    train_split: str = Field(default="train", description="Value of `split` to train on.")
    eval_split: str = Field(default="test", description="Value of `split` to evaluate on.")
    validation_split: str | None = Field(
        default=None, description="Value of `split` whose loss decides which checkpoint is the best and kept."
    )
    validation_volumes: PositiveInt | None = Field(
        default=None, description="Use only the first so many volumes of the validation split."
    )
    where: dict[str, list[str]] = Field(
        default_factory=dict, description="Row filter: field or meta key -> allowed values. null: every row."
    )
    questions_per_volume: PositiveInt = Field(default=1, description="Questions that share one encoding of a volume.")
    cache: FilePath | None = Field(
        default=None, description="Folder of preprocessed volumes. Default: .cache beside the manifest."
    )
    workers: int = Field(default=0, ge=0, description="Loader processes per rank; 0 loads in the training process.")
    limit_volumes: PositiveInt | None = Field(default=None, description="Use only the first so many volumes.")
    expected: ExpectedSize | None = Field(
        default=None, description="Sizes that --dry-run assumes while the manifest is not there."
    )

    @field_validator("where", mode="before")
    @classmethod
    def _null_clears_a_parents_filter(cls, value: Any) -> Any:
        return {} if value is None else value


class OptimizerConfig(Settings):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: Muon for hidden matrices, AdamW for the rest; needs zero_stage 0."
    )
    lr: PositiveFloat = Field(description="Peak learning rate of parameters without a rate of their own.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled decay of matrices; vectors have none.")
    betas: Annotated[tuple[float, float], Strict(False)] = Field(default=(0.9, 0.999), description="AdamW's betas.")
    eps: PositiveFloat = Field(default=1e-8, description="AdamW's epsilon.")
    clip_norm: float = Field(default=1.0, ge=0, description="Global gradient norm to clip at; 0: no clipping.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Shape of the decay after the warm-up."
    )
    warmup: float = Field(default=0.0, ge=0, description="Linear warm-up: below 1 a share of all steps, else steps.")
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="Rate at the end as a share of the peak.")


class TrainingConfig(Settings):
    """Steps, batch, precision and what is kept."""

    epochs: PositiveFloat | None = Field(default=None, description="Passes over the training questions.")
    max_steps: PositiveInt | None = Field(
        default=None, description="Optimizer steps; beside epochs the smaller number counts."
    )
    volumes_per_batch: PositiveInt = Field(default=1, description="Volumes per rank and micro-batch.")
    accumulation: PositiveInt = Field(default=1, description="Micro-batches per optimizer step.")
    optimizer: OptimizerConfig = Field(description="Optimizer and learning-rate schedule.")
    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="Precision of weights and activations.")
    zero_stage: int = Field(default=2, ge=0, le=3, description="DeepSpeed ZeRO stage.")
    offload: Literal["none", "cpu"] = Field(default="none", description="Where ZeRO keeps the optimizer state.")
    activation_checkpointing: bool = Field(default=False, description="Recompute activations in the backward pass.")
    log_every: PositiveInt = Field(default=10, description="Steps between two lines of metrics.")
    save_every: PositiveInt | None = Field(default=None, description="Steps between checkpoints. None: at the end.")
    keep_last: PositiveInt = Field(default=2, description="Newest checkpoints that are kept.")
    keep_best: PositiveInt = Field(
        default=1, description="Best checkpoints that are kept as well, where data.validation_split is given."
    )

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("epochs or max_steps is needed")
        if self.optimizer.name == "muon" and self.zero_stage != 0:
            raise ValueError("optimizer.name muon needs zero_stage 0, because ZeRO cuts matrices into flat shards")
        if self.offload == "cpu" and self.zero_stage == 0:
            raise ValueError("offload cpu needs zero_stage 1, 2 or 3")
        return self


EvaluationMode = Literal["scheduled", "none", "random", "noisy", "evicted", "zeroed"]


class EvaluationConfig(Settings):
    """What is asked of a checkpoint, and how."""

    modes: Annotated[tuple[EvaluationMode, ...], Strict(False)] = Field(
        default=("scheduled",),
        min_length=1,
        description="scheduled: tokens dropped as trained; none: all kept; random: as many, drawn; noisy: thresholds "
        "off by up to 10 %; evicted: dropped tokens leave the lower layers' caches; zeroed: the volume emptied.",
    )
    where: dict[str, list[str]] | None = Field(
        default=None, description="Row filter instead of data.where, for example to ask what was not trained on."
    )
    pruner: dict[str, Any] | None = Field(
        default=None,
        description="Of slice-wise models: name of a medpruner method and its settings, what scheduled then means. "
        "None: all tokens stay.",
    )
    max_new_tokens: PositiveInt = Field(default=512, description="Longest answer, in tokens.")
    limit_volumes: PositiveInt | None = Field(default=None, description="Use only the first so many volumes.")
    batch_questions: PositiveInt = Field(default=8, description="Questions of one volume that are answered at once.")
    keep_masks: bool = Field(
        default=True, description="Note in the predictions which tokens stayed (168 bytes for 1,000 tokens)."
    )
    organ_key: str = Field(
        default="organ", description="Key of a row's meta that names the organ; KEY_labels has its label ids."
    )
    finding_key: str = Field(
        default="finding", description="Key of a row's meta that names the finding; KEY_labels has its label ids."
    )
    block_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of a token's voxels that an organ or finding must fill to be in it; 0: any voxel.",
    )
    zero_shot: dict[str, dict[Literal["present", "absent"], list[str]]] = Field(
        default_factory=dict,
        description="Of contrastive models: finding -> present and absent, prompts that say it is there or not.",
    )

    @field_validator("pruner")
    @classmethod
    def _names_a_method(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not isinstance(value.get("name"), str):
            raise ValueError("name: which method? give it beside its settings, for example name: medpruner")
        return value

    @field_validator("zero_shot")
    @classmethod
    def _has_both_prompts(cls, value: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, list[str]]]:
        for finding, prompts in value.items():
            for side in ("present", "absent"):
                given = prompts.get(side)
                if not given or not all(text.strip() for text in given):
                    raise ValueError(f"{finding}: {side}: one prompt or several are needed, none of them empty")
        return value


class EstimateConfig(Settings):
    """The machine that `--dry-run` estimates memory and hours for, and whose peak MFU is measured against."""

    gpus: PositiveInt = Field(default=8, description="GPUs that the run would use.")
    peak_tflops: PositiveFloat | None = Field(
        default=None, description="Dense BF16 peak of one device. None: 989 (H100 SXM); on a CPU no MFU."
    )
    mfu: float = Field(default=0.35, gt=0, le=1, description="Share of the peak that training reaches.")
    memory_gib: PositiveFloat = Field(default=80.0, description="Memory of one GPU.")

    @property
    def peak_flops(self) -> float:
        """Peak of one GPU in FLOPs per second."""
        return (H100_TFLOPS if self.peak_tflops is None else self.peak_tflops) * 1e12


class EvaluatedSettings(Settings):
    """`model` of a recipe that is evaluated and never trained; such a config needs no `training`."""

    checkpoint: FilePath = Field(description="Folder of the model that is asked.")


class Config(Settings):
    """Everything about one run. `model` is an instance of the recipe's own `Settings`."""

    recipe: str = Field(description="Which recipe trains, see mllm3d.registry.")
    run: RunConfig = Field(description="Run folder and seed.")
    volume: VolumeConfig = Field(
        default=VolumeConfig(), description="Preprocessing of volumes; needed where rows have them."
    )
    data: DataConfig = Field(description="Manifest and sampling.")
    model: SerializeAsAny[Settings] = Field(description="Settings of the recipe.")
    training: TrainingConfig = Field(description="Optimization.")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="Evaluation after training.")
    estimate: EstimateConfig = Field(default=EstimateConfig(), description="Machine assumed by --dry-run.")

    @property
    def asked(self) -> Path:
        """What is evaluated unless a checkpoint is named: the run, or the model where nothing is trained."""
        return self.model.checkpoint if isinstance(self.model, EvaluatedSettings) else self.run.output

    @property
    def prepares_volumes(self) -> bool:
        """Whether it says how: without `volume:`, or with `volume: null`, a run is on images and videos only."""
        return "volume" in self.model_fields_set
