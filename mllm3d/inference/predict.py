"""`mllm3d predict`: one question about one scan, as text or JSON, with the evidence if asked for."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm3d.data.preprocess import Prepared
from mllm3d.data.volumes import Volume, read_volume
from mllm3d.errors import UserError
from mllm3d.inference.adapter import Mode
from mllm3d.inference.evidence import boxes_to_mask, draw, write_nifti
from mllm3d.inference.predictor import Answer, Predictor

DRAWABLE, NIFTI = (".png",), (".nii", ".nii.gz")


def predict_command(args: argparse.Namespace) -> int:
    """Print what `predict` returns: as JSON, or the answer on stdout and the files written on stderr.

    Reads from args: checkpoint, volume, question, prior, modality, mode, max_new_tokens, device, json, evidence,
    evidence_nifti.
    """
    output = predict(
        args.checkpoint,
        args.volume,
        args.question,
        prior=args.prior,
        modality=args.modality,
        mode=args.mode,
        max_new_tokens=args.max_new_tokens,
        device=args.device,
        evidence=args.evidence,
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
    volume: Path,
    question: str,
    *,
    prior: Path | None = None,
    modality: str = "ct",
    mode: Mode = "scheduled",
    max_new_tokens: int = 512,
    device: str | None = None,
    evidence: Path | None = None,
    evidence_nifti: Path | None = None,
) -> dict[str, Any]:
    """Answer one question and write the evidence files that were asked for.

    prior: an earlier scan of the same patient, shown to the model before `volume`. modality: `ct` or `mr`.
    evidence, evidence_nifti: PNG and NIfTI of the tokens of `volume` that stayed; those of a prior scan are written
    beside them, with `_prior` before the suffix.
    Returns what `--json` prints: answer, keep_rate, tokens before and after, seconds, checkpoint, volume, evidence.
    """
    if not question.strip():
        raise UserError("--question: empty; ask something")
    paths = [volume] if prior is None else [prior, volume]
    pictures = _outputs(evidence, DRAWABLE, "--evidence", paths)
    masks = _outputs(evidence_nifti, NIFTI, "--evidence-nifti", paths)
    scans = [read_volume(path) for path in paths]
    predictor = Predictor.load(checkpoint, device)
    prepared = [predictor.prepare(scan, modality.upper()) for scan in scans]
    answer = predictor.answer(prepared, [question], mode, max_new_tokens)[0]
    if pictures or masks:
        _write_evidence(predictor, question, answer, scans, prepared, pictures, masks)
    return {**_report(answer, predictor, scans), "evidence": [str(file) for file in (*pictures, *masks)]}


def _outputs(path: Path | None, suffixes: tuple[str, ...], key: str, scans: Sequence[Path]) -> list[Path]:
    """A file for each scan, none if none was asked for; what is wrong with one is said before the model runs."""
    if path is None:
        return []
    if not path.name.endswith(suffixes):
        raise UserError(f"{key} {path}: must end in {' or '.join(suffixes)}")
    files = [path] if len(scans) == 1 else [of_prior(path), path]
    for file in files:
        if not file.absolute().parent.is_dir():
            raise UserError(f"{key} {file}: its folder does not exist; create it first")
        if any(file.resolve() == scan.resolve() for scan in scans):
            raise UserError(f"{key} {file}: would be written over a scan; choose another name")
    return files


def of_prior(path: Path) -> Path:
    """Where a prior scan's evidence goes: `kept.png` -> `kept_prior.png`, `kept.nii.gz` -> `kept_prior.nii.gz`."""
    suffix = next(suffix for suffix in (*DRAWABLE, *NIFTI) if path.name.endswith(suffix))
    return path.with_name(f"{path.name.removesuffix(suffix)}_prior{suffix}")


def _write_evidence(
    predictor: Predictor,
    question: str,
    answer: Answer,
    scans: Sequence[Volume],
    prepared: Sequence[Prepared],
    pictures: Sequence[Path],
    masks: Sequence[Path],
) -> None:
    """Each scan's own files, with its own count of tokens."""
    shapes: list[tuple[int, int, int]] = [item.array.shape for item in prepared]
    names = [""] if len(scans) == 1 else ["prior scan: ", "current scan: "]
    for index, (scan, item) in enumerate(zip(scans, prepared, strict=True)):
        boxes = predictor.kept_boxes(answer, shapes, index)
        mask = boxes_to_mask(boxes, shapes[index])
        if masks:
            write_nifti(mask, item, masks[index])
        if pictures:
            tokens = len(predictor.adapter.token_boxes(shapes[index]))
            title = _title(question, answer, f"{names[index]}{len(boxes)} of {tokens} tokens kept")
            draw(scan, item, mask, title, pictures[index])


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
        "volume": str(scans[-1].path),
        "prior": str(scans[0].path) if len(scans) > 1 else None,
    }


def _title(question: str, answer: Answer, count: str) -> str:
    return f"{question}\n{answer.text}   ({count})".replace("$", r"\$")  # no mathtext
