"""A contrastive run of a small random model, and a manifest that it reads."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from med3dvlm.processing_med3dclip import Med3DCLIPProcessor
from med3dvlm.recipes.text import word_pieces
from mllm3d.config import VolumeConfig
from tests.med3dvlm.tiny_clip import DISTILBERT, tiny_clip

SIZE = (16, 32, 32)
VOLUME = VolumeConfig(window_hu=(-200.0, 300.0), shape=SIZE)
REPORTS = [
    "A mass in the liver.",
    "No finding.",
    "Pleural effusion on the left side of the chest, about three centimetres wide, without a pneumothorax or a nodule.",
    "A nodule in the lung.",
    "No finding.",
    "Kidney stone.",
]
ENCODER = {"name": "dcformer-nano", "size": list(SIZE), "widths": [4, 4, 6, 8, 10], "layers": [1, 1, 1, 1, 1]}


def save_clip(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A released model."""
    tokenizer = word_pieces(REPORTS, 80, 12)
    settings = {"encoder": ENCODER, "text_config": {**DISTILBERT, "vocab_size": len(tokenizer)}, **settings}
    tiny_clip(seed, **settings).save_pretrained(folder)
    Med3DCLIPProcessor(tokenizer, SIZE, 12).save_pretrained(folder)
    (folder / "preprocessing.json").write_text(VOLUME.model_dump_json())
    return folder


def save_run(run: Path, **settings: Any) -> Path:
    """The same as a run with one checkpoint."""
    step = run / "checkpoints" / "step_4"
    step.mkdir(parents=True)
    model = save_clip(step / "model", **settings)
    (model / "preprocessing.json").rename(run / "preprocessing.json")
    (run / "checkpoints" / "latest").write_text("step_4")
    return run


def row(number: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "id": f"r{number}",
        "case": f"c{number}",
        "split": "test",
        "volume": f"volumes/v{number}.nii.gz",
        "question": "Write a report.",
        "answer": "x",
        "task": "report",
        "report": REPORTS[number],
        "meta": {"mass": number in (0, 3), "Pleural effusion": 1 if number == 2 else 0},
    }
    return {**values, **changes}


def existence(number: int, answer: str, **changes: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "id": f"e{number}",
        "task": "existence",
        "subtask": "nodule",
        "answer": answer,
        "report": None,
        "meta": {},
    }
    return row(number, **{**asked, **changes})


def save_data(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Six volumes unlike one another, and the manifest."""
    (folder / "volumes").mkdir(parents=True)
    for number in range(len(REPORTS)):
        rng = np.random.default_rng(number)
        voxels = rng.normal(-900 + 150 * number, 300, (20, 24, 18)).astype(np.int16)
        voxels[:6] += np.int16(200 * number)
        nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0])), folder / "volumes" / f"v{number}.nii.gz")
    write_rows(folder / "manifest.jsonl", [row(n) for n in range(len(REPORTS))] if rows is None else rows)
    return folder / "manifest.jsonl"


def write_rows(manifest: Path, rows: list[dict[str, Any]]) -> None:
    manifest.write_text("".join(json.dumps(values) + "\n" for values in rows))
