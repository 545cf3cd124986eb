"""`photon.backbone`: a small slice-video model from nothing, so that phase 1 has something to align to."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, Strict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mllm3d.config import Config, Settings
from mllm3d.data.dataset import GroupItem
from mllm3d.data.manifest import read_manifest, select
from mllm3d.data.prompts import question_text, target_text
from mllm3d.errors import UserError
from mllm3d.inference.checkpoint import source_folder
from mllm3d.training.recipe import Batch, StepOutput, Term
from photon.building import empty
from photon.configuration_photon import PhotonConfig
from photon.flops import volume_flops
from photon.geometry import Size3
from photon.heads import AuxiliaryHeads, class_shares, dense_loss, findings_loss
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.recipes.base import PatchSize, PhotonRecipe, on_meta, token_metrics
from photon.tokenization import SPECIAL_TOKENS, special_token_fields, token_fields, train_tokenizer

Ids = Annotated[tuple[int, ...], Strict(False)]
Names = Annotated[tuple[str, ...], Strict(False)]
HEADS_FILE = "auxiliary_heads.safetensors"


class TextShape(Settings):
    """Shape of the decoder."""

    hidden_size: int = Field(default=128, description="Width.")
    layers: int = Field(default=4, description="Decoder layers.")
    heads: int = Field(default=4, description="Attention heads; as many key-value heads.")
    mlp: int = Field(default=384, description="Hidden width of the MLP.")


class VisionShape(Settings):
    """Shape of the vision tower."""

    hidden_size: int = Field(default=128, description="Width.")
    layers: int = Field(default=3, description="Blocks, all with full attention inside a depth slab.")
    heads: int = Field(default=4, description="Attention heads.")
    mlp: int = Field(default=384, description="Hidden width of the MLP.")
    merge: int = Field(default=2, description="Patches along height and width that become one token.")


class BackboneSettings(Settings):
    """A small slice-video model of Qwen2.5-VL's kind, trained from nothing."""

    stage: Literal["vision", "questions"] = Field(description="vision: dense labels only; questions: answers too.")
    checkpoint: str | None = Field(default=None, description="Run folder of the vision stage, for stage questions.")
    vocabulary: int = Field(default=1024, description="Most tokens of the BPE vocabulary.")
    patch_size: PatchSize = Field(default=(2, 14, 14), description="Frames, rows, columns of a patch.")
    slices_per_frame: int = Field(default=7, description="Slices averaged into one frame.")
    temporal_step: float = Field(default=1.0, description="Rotary steps from one depth slab to the next.")
    text: TextShape = Field(default=TextShape(), description="Shape of the decoder.")
    vision: VisionShape = Field(default=VisionShape(), description="Shape of the vision tower.")
    classes: Ids = Field(description="Ids of the label map that the dense head learns.")
    small_classes: Ids = Field(default=(), description="Those of them that are lesions: presence counts.")
    findings: Names = Field(description="Findings that the global head learns, as `meta.finding` names them.")
    dense_weight: float = Field(default=1.0, description="Weight of the dense head's loss.")
    findings_weight: float = Field(default=0.5, description="Weight of the global head's loss.")


class BackboneModel(nn.Module):
    """The model with its auxiliary heads, as one module for the engine."""

    def __init__(self, photon: PhotonForConditionalGeneration, heads: AuxiliaryHeads) -> None:
        super().__init__()
        self.photon = photon
        self.heads = heads

    def forward(self, pixels: Tensor, grids: list[list[int]], volumes: int, answer: bool, **inputs: Any) -> Any:
        """Dense and global logits, and the answer's output where asked."""
        if answer:
            output = self.photon(
                pixel_values_videos=pixels, video_grid_thw=torch.tensor(grids), reduction="none", **inputs
            )
            tokens = output.visual_embeds
        else:
            output, tokens = None, self.photon.model.visual.encode(pixels, torch.tensor(grids))[0]
        return output, self.heads(tokens.unflatten(0, (volumes, -1)))


class Backbone(PhotonRecipe):
    """`photon.backbone`: first the vision tower on dense labels, then questions with the heads as helpers."""

    Settings: ClassVar[type[Settings]] = BackboneSettings
    wants_labels: ClassVar[bool] = True
    takes_pixels: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._known_shares: dict[str, np.ndarray] = {}

    @property
    def settings(self) -> BackboneSettings:
        return self.config.model  # type: ignore[return-value]

    def _shape(self, tokenizer: Any | None) -> PhotonConfig:
        s = self.settings
        ids = dict(zip(SPECIAL_TOKENS, range(len(SPECIAL_TOKENS)), strict=True))
        vocabulary, special = s.vocabulary, special_token_fields(ids)
        if tokenizer is not None:
            special = token_fields(tokenizer)
            ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
            vocabulary = len(tokenizer)
        half = s.text.hidden_size // s.text.heads // 2
        plane = half * 3 // 8
        return PhotonConfig(
            text_config={
                "vocab_size": vocabulary,
                # 0.02 is meant for widths above a thousand; at 128 it leaves attention flat for hundreds of steps.
                "initializer_range": s.text.hidden_size**-0.5,
                "hidden_size": s.text.hidden_size,
                "intermediate_size": s.text.mlp,
                "num_hidden_layers": s.text.layers,
                "num_attention_heads": s.text.heads,
                "num_key_value_heads": s.text.heads,
                "max_position_embeddings": 8192,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e3,
                    "mrope_section": [half - 2 * plane, plane, plane],
                },
                "bos_token_id": None,
                "eos_token_id": ids["<|im_end|>"],
                "pad_token_id": ids["<|endoftext|>"],
            },
            vision_config={
                "depth": s.vision.layers,
                "hidden_size": s.vision.hidden_size,
                "intermediate_size": s.vision.mlp,
                "num_heads": s.vision.heads,
                "out_hidden_size": s.text.hidden_size,
                "initializer_range": s.vision.hidden_size**-0.5,
                "in_channels": 3,
                "temporal_patch_size": s.patch_size[0],
                "patch_size": s.patch_size[1],
                "spatial_merge_size": s.vision.merge,
                "fullatt_block_indexes": list(range(s.vision.layers)),
                "window_size": 8 * s.vision.merge * s.patch_size[1],
            },
            slices_per_frame=s.slices_per_frame,
            temporal_step=s.temporal_step,
            tie_word_embeddings=True,
            **special,
        )

    def initial_config(self) -> PhotonConfig:
        return self._shape(None)

    def build(self, meta: bool = False) -> nn.Module:
        s = self.settings
        if meta:
            photon = on_meta(self.initial_config())
            with torch.device("meta"):
                heads = AuxiliaryHeads(s.text.hidden_size, len(s.classes), len(s.findings))
        else:
            photon, heads = self._start()
        if s.stage == "vision":
            photon.model.language_model.requires_grad_(False)
            photon.lm_head.requires_grad_(False)
        return BackboneModel(photon, heads)

    def _start(self) -> tuple[PhotonForConditionalGeneration, AuxiliaryHeads]:
        s = self.settings
        heads = AuxiliaryHeads(s.text.hidden_size, len(s.classes), len(s.findings))
        if s.checkpoint is not None:
            photon, tokenizer = self._load(s.checkpoint)
            heads.load_state_dict(load_heads(Path(source_folder(s.checkpoint))))
        elif s.stage == "questions":
            raise UserError("model.checkpoint: stage questions starts from a run of stage vision; name its folder")
        else:
            tokenizer = train_tokenizer(self._texts(), s.vocabulary)
            photon = empty(self._shape(tokenizer))
            photon.generation_config.eos_token_id = tokenizer.eos_token_id
            photon.generation_config.pad_token_id = tokenizer.pad_token_id
        self.adopt(photon, tokenizer)
        return photon, heads

    def _texts(self) -> set[str]:
        data = self.config.data
        rows = select(read_manifest(data.manifest), data.train_split, {})
        return {question_text(r) for r in rows} | {target_text(r) for r in rows}

    def collate(self, items: list[GroupItem]) -> Batch:
        return {
            **super().collate(items),
            "shares": torch.from_numpy(np.stack([self._shares(item) for item in items])),
            "findings": torch.tensor([self._known(item) for item in items]),
        }

    def _shares(self, item: GroupItem) -> np.ndarray:
        """Class shares of the current scan's tokens; kept in memory, some 20 kB a volume."""
        assert item.labels is not None
        name = str(item.rows[0].labels)
        if name not in self._known_shares:
            classes = list(self.settings.classes)
            self._known_shares[name] = class_shares(item.labels[-1], self.layout_config.patches, classes)
        return self._known_shares[name]

    def _known(self, item: GroupItem) -> list[float]:
        """1, 0 or -1 (nothing known) for each finding, from the yes/no answers at hand."""
        known = {r.meta.get("finding"): float(r.answer == "yes") for r in item.rows if r.task == "existence"}
        return [known.get(name, -1.0) for name in self.settings.findings]

    def losses(
        self, model: nn.Module, batch: Batch, step: int, total_steps: int, weights: dict[str, float]
    ) -> StepOutput:
        s = self.settings
        answer = s.stage == "questions"
        inputs = {"input_ids": batch["input_ids"], "layout": batch["layout"]} if answer else {}
        output, (dense, whole) = model(batch["pixel_values_videos"], batch["grids"], batch["volumes"], answer, **inputs)
        small = torch.tensor([c in s.small_classes for c in s.classes], device=dense.device)
        terms = {
            "dense": Term(s.dense_weight * dense_loss(dense.float(), batch["shares"], small).sum(), "volumes"),
            "findings": Term(s.findings_weight * findings_loss(whole.float(), batch["findings"]).sum(), "volumes"),
        }
        known = batch["findings"] >= 0
        right = ((whole > 0) == (batch["findings"] > 0.5)) & known
        metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {"finding_accuracy": (right.sum(), known.sum())}
        if output is not None:
            terms["ce"] = Term(output.token_losses.sum(), "label_tokens")
            metrics |= token_metrics(output.token_losses, output.logits, batch["layout"].targets)
        return StepOutput(terms, metrics)

    def step_flops(self, config: PhotonConfig, shape: Size3) -> float:
        """In the vision stage the decoder does not run."""
        if self.settings.stage == "questions":
            return super().step_flops(config, shape)
        return 3 * volume_flops(config, shape)

    def save(self, module: nn.Module, state_dict: dict[str, Tensor] | None, directory: Path) -> None:
        assert isinstance(module, BackboneModel)
        weights = None
        if state_dict is not None:
            weights = {k.removeprefix("photon."): v for k, v in state_dict.items() if k.startswith("photon.")}
        super().save(module.photon, weights, directory)
        save_heads(module.heads, directory)


def save_heads(heads: AuxiliaryHeads, directory: Path) -> None:
    """The auxiliary heads beside the model, for a later stage."""
    save_file(heads.state_dict(), directory / HEADS_FILE)


def load_heads(directory: Path) -> dict[str, Tensor]:
    """Weights of the auxiliary heads of a vision stage."""
    path = directory / HEADS_FILE
    if not path.is_file():
        raise UserError(f"{path}: not there; model.checkpoint must be a run of photon.backbone, stage vision")
    return load_file(path)
