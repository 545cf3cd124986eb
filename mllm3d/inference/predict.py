"""`mllm3d predict`: one question about a scan, images or a video, as text or JSON, with evidence if asked for."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm3d.config import read_values
from mllm3d.data.images import read_image, read_video
from mllm3d.data.preprocess import Prepared
from mllm3d.data.volumes import Volume, read_volume
from mllm3d.errors import UserError
from mllm3d.inference.adapter import Mode
from mllm3d.inference.evidence import Part, boxes_to_mask, draw, draw_pixels, write_nifti
from mllm3d.inference.evidence_slices import draw_slices
from mllm3d.inference.predictor import Answer, Predictor

Tokens = tuple[np.ndarray, np.ndarray]
"""Boxes of all tokens of a volume, image or video, and of those that stayed."""

DRAWABLE, NIFTI = (".png",), (".nii", ".nii.gz")


def predict_command(args: argparse.Namespace) -> int:
    """Print what `predict` returns: as JSON, or the answer on stdout and the files written on stderr.

    Reads from args: checkpoint, volume, question, prior, image, video, modality, mode, pruner, pruner_set,
    max_new_tokens, device, json, evidence, evidence_slices, evidence_nifti.
    """
    output = predict(
        args.checkpoint,
        args.volume,
        args.question,
        prior=args.prior,
        images=args.image or (),
        video=args.video,
        modality=args.modality,
        mode=args.mode,
        pruner=_pruner(args.pruner, args.pruner_set or ()),
        max_new_tokens=args.max_new_tokens,
        device=args.device,
        evidence=args.evidence,
        evidence_slices=args.evidence_slices,
        evidence_nifti=args.evidence_nifti,
    )
    if args.json:
        print(json.dumps(output, ensure_ascii=False, indent=2))
        return 0
    print(output["answer"])
    for path in output["evidence"]:
        print(f"wrote {path}", file=sys.stderr)
    return 0


def predict(
    checkpoint: Path,
    volume: Path | None,
    question: str,
    *,
    prior: Path | None = None,
    images: Sequence[Path] = (),
    video: Path | None = None,
    modality: str = "ct",
    mode: Mode = "scheduled",
    pruner: Mapping[str, Any] | None = None,
    max_new_tokens: int = 512,
    device: str | None = None,
    evidence: Path | None = None,
    evidence_slices: Path | None = None,
    evidence_nifti: Path | None = None,
) -> dict[str, Any]:
    """Answer one question and write the evidence files that were asked for.

    prior: an earlier scan of the same patient, shown to the model before `volume`. images, video: image files and a
    folder of frames, shown after it. modality: `ct` or `mr`, of volumes.
    pruner: see `Predictor.load`.
    evidence, evidence_slices, evidence_nifti: three planes and all slices as PNG, and NIfTI, of the tokens of `volume`
    that stayed; those of a prior scan are written beside them, with `_prior` before the suffix. Images and video have
    one PNG: the name of `evidence`, or with `_pixels` before the suffix where there is a volume.
    Returns what `--json` prints: answer, keep_rate, tokens before and after, seconds, checkpoint, volume, evidence,
    and for images and videos the keep rate of each.
    """
    if not question.strip():
        raise UserError("--question: empty; ask something")
    paths, pixel_paths = _inputs(volume, prior, images, video)
    pictures = _outputs(evidence, DRAWABLE, "--evidence", paths, pixel_paths)
    sheets = _outputs(evidence_slices, DRAWABLE, "--evidence-slices", paths, pixel_paths)
    if {file.resolve() for file in sheets} & {file.resolve() for file in pictures}:
        raise UserError(f"--evidence-slices {evidence_slices}: --evidence has this name; choose another one")
    masks = _outputs(evidence_nifti, NIFTI, "--evidence-nifti", paths, pixel_paths)
    scans = [read_volume(path) for path in paths]
    frames = [read_image(path) for path in images], [] if video is None else [read_video(video)]
    predictor = Predictor.load(checkpoint, device, pruner=pruner)
    prepared = [predictor.prepare(scan, modality.upper()) for scan in scans]
    asked = [predictor.wording(question)]
    answer = predictor.answer(prepared, asked, mode, max_new_tokens, images=frames[0], videos=frames[1])[0]
    if answer.kept is None and (pictures or sheets or masks):
        option = "--evidence" if pictures else "--evidence-slices" if sheets else "--evidence-nifti"
        raise UserError(
            f"{option}: {predictor.checkpoint.name}: a model of type "
            f"{predictor.checkpoint.model_type} does not say which tokens it kept; leave it out"
        )
    tokens: list[Tokens] = []
    if pictures or sheets or masks or (pixel_paths and answer.kept is not None):
        boxes = predictor.boxes([item.array.shape for item in prepared], *frames)
        tokens = list(zip(boxes, predictor.kept_of(answer, boxes), strict=True))
    if scans and (pictures or sheets or masks):
        _write_evidence(question, answer, scans, prepared, tokens, pictures, sheets, masks)
    output = _report(answer, predictor, scans)
    if pixel_paths:
        arrays = [*(image[None] for image in frames[0]), *frames[1]]
        parts = [Part(array, *item) for array, item in zip(arrays, tokens[len(scans) :], strict=False)]
        output |= {"images": [str(path) for path in images], "video": None if video is None else str(video)}
        output["keep_rates"] = {
            str(path): round(len(part.kept) / len(part.boxes), 4)
            for path, part in zip(pixel_paths, parts, strict=False)  # none where the model cannot say
        }
        if pictures:
            _draw_parts(question, answer, pixel_paths, parts, pictures[-1])
    return {**output, "evidence": [str(file) for file in (*pictures, *sheets, *masks)]}


def _pruner(name: str | None, settings: Sequence[str]) -> dict[str, Any] | None:
    """What `Predictor.load` takes, from `--pruner NAME` and `--pruner-set KEY=VALUE`."""
    if name is None and settings:
        raise UserError(f"--pruner-set {settings[0]}: of which method? give --pruner NAME too")
    return None if name is None else {**read_values(settings, "--pruner-set"), "name": name}


def _inputs(
    volume: Path | None, prior: Path | None, images: Sequence[Path], video: Path | None
) -> tuple[list[Path], list[Path]]:
    """Scans, and images with the video, in the order in which they are shown."""
    pixels = [*images, *([] if video is None else [video])]
    if volume is None and prior is not None:
        raise UserError(f"--prior {prior}: needs a --volume, the current scan")
    if volume is None and not pixels:
        raise UserError("--volume, --image or --video: nothing to ask about; give at least one of them")
    return [path for path in (prior, volume) if path is not None], pixels


def _outputs(
    path: Path | None, suffixes: tuple[str, ...], key: str, scans: Sequence[Path], pixels: Sequence[Path]
) -> list[Path]:
    """A file for each scan and a picture of all pixels, none if none was asked for; what is wrong with one is said
    before the model runs."""
    if path is None:
        return []
    if not path.name.endswith(suffixes):
        raise UserError(f"{key} {path}: must end in {' or '.join(suffixes)}")
    if key != "--evidence" and not scans:
        what = "a mask on its grid" if suffixes == NIFTI else "slices"
        raise UserError(f"{key} {path}: only a --volume has {what}; use --evidence")
    files = [of_prior(path), path][-len(scans) :] if scans else []
    if pixels and key == "--evidence":
        files.append(_beside(path, "_pixels") if scans else path)
    for file in files:
        if not file.absolute().parent.is_dir():
            raise UserError(f"{key} {file}: its folder does not exist; create it first")
        if any(file.resolve() == given.resolve() for given in scans):
            raise UserError(f"{key} {file}: would be written over a scan; choose another name")
        if any(given.resolve() in (file.resolve(), file.resolve().parent) for given in pixels):
            raise UserError(f"{key} {file}: would be written over an image or into the video; choose another name")
    return files


def of_prior(path: Path) -> Path:
    """Where a prior scan's evidence goes: `kept.png` -> `kept_prior.png`, `kept.nii.gz` -> `kept_prior.nii.gz`."""
    return _beside(path, "_prior")


def _beside(path: Path, name: str) -> Path:
    suffix = next(suffix for suffix in (*DRAWABLE, *NIFTI) if path.name.endswith(suffix))
    return path.with_name(f"{path.name.removesuffix(suffix)}{name}{suffix}")


def _draw_parts(question: str, answer: Answer, paths: Sequence[Path], parts: Sequence[Part], file: Path) -> None:
    kept, tokens = (sum(map(len, items)) for items in ([p.kept for p in parts], [p.boxes for p in parts]))
    title = _title(question, answer, f"{kept} of {tokens} tokens kept")
    draw_pixels([path.name for path in paths], parts, title, file)


def _write_evidence(
    question: str,
    answer: Answer,
    scans: Sequence[Volume],
    prepared: Sequence[Prepared],
    tokens: Sequence[Tokens],
    pictures: Sequence[Path],
    sheets: Sequence[Path],
    masks: Sequence[Path],
) -> None:
    """Each scan's own files, with its own count of tokens."""
    names = [""] if len(scans) == 1 else ["prior scan: ", "current scan: "]
    for index, (scan, item) in enumerate(zip(scans, prepared, strict=True)):
        boxes, kept = tokens[index]
        mask = boxes_to_mask(kept, item.array.shape)
        if masks:
            write_nifti(mask, item, masks[index])
        title = _title(question, answer, f"{names[index]}{len(kept)} of {len(boxes)} tokens kept")
        if pictures:
            draw(scan, item, mask, title, pictures[index])
        if sheets:
            draw_slices(scan, item, boxes, kept, title, sheets[index])


def _report(answer: Answer, predictor: Predictor, scans: Sequence[Volume]) -> dict[str, Any]:
    further = answer.seconds_per_further_token
    return {
        "answer": answer.text,
        "keep_rate": round(answer.keep_rate, 4),
        "tokens_before": answer.tokens_before,
        "tokens_after": answer.tokens_after,
        "seconds_to_first_token": round(answer.seconds_first, 4),
        "seconds_per_further_token": None if further is None else round(further, 4),
        "device": predictor.device,
        "checkpoint": predictor.checkpoint.name,
        "volume": str(scans[-1].path) if scans else None,
        "prior": str(scans[0].path) if len(scans) > 1 else None,
        **{
            name: {key: round(value, 4) for key, value in found.items()}
            for name, found in (("retention", answer.retention), ("seconds", answer.phases))
            if found is not None
        },
    }


def _title(question: str, answer: Answer, count: str) -> str:
    return f"{question}\n{answer.text}   ({count})".replace("$", r"\$")  # no mathtext
