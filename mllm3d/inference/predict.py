"""`mllm3d predict`: one question about one scan, as text or JSON, with the evidence if asked for."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mllm3d.data.volumes import Volume, read_volume
from mllm3d.errors import UserError
from mllm3d.inference.adapter import Mode
from mllm3d.inference.evidence import boxes_to_mask, draw, write_nifti
from mllm3d.inference.predictor import Answer, Predictor

DRAWABLE, NIFTI = (".png",), (".nii", ".nii.gz")


def predict_command(args: argparse.Namespace) -> int:
    """Print what `predict` returns. Reads from args: checkpoint, volume, question, prior, modality, mode,
    max_new_tokens, device, json, evidence, evidence_nifti."""
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
    print(json.dumps(output, ensure_ascii=False, indent=2) if args.json else output["answer"])
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
) -> dict[str, object]:
    """Answer one question and write the evidence files that were asked for.

    prior: an earlier scan of the same patient, shown to the model before `volume`. modality: `ct` or `mr`.
    Returns what `--json` prints: answer, keep_rate, tokens before and after, seconds, checkpoint, volume.
    """
    if not question.strip():
        raise UserError("--question: empty; ask something")
    for path, suffixes, key in (
        (evidence, DRAWABLE, "--evidence"),
        (evidence_nifti, NIFTI, "--evidence-nifti"),
    ):
        _check_output(path, suffixes, key)
    scans = [read_volume(path) for path in (prior, volume) if path is not None]
    predictor = Predictor.load(checkpoint, device)
    prepared = [predictor.prepare(scan, modality.upper()) for scan in scans]
    answer = predictor.answer(prepared, [question], mode, max_new_tokens)[0]
    if evidence or evidence_nifti:
        shapes: list[tuple[int, int, int]] = [item.array.shape for item in prepared]
        mask = boxes_to_mask(predictor.kept_boxes(answer, shapes), shapes[-1])
        if evidence_nifti:
            write_nifti(mask, prepared[-1], evidence_nifti)
        if evidence:
            draw(scans[-1], prepared[-1], mask, _title(question, answer), evidence)
    return _report(answer, predictor, scans)


def _report(answer: Answer, predictor: Predictor, scans: Sequence[Volume]) -> dict[str, object]:
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


def _title(question: str, answer: Answer) -> str:
    kept = f"{answer.tokens_after} of {answer.tokens_before} tokens kept"
    return f"{question}\n{answer.text}   ({kept})".replace("$", r"\$")  # no mathtext


def _check_output(path: Path | None, suffixes: tuple[str, ...], key: str) -> None:
    """Say so before the model runs, not after."""
    if path is None:
        return
    if not path.name.endswith(suffixes):
        raise UserError(f"{key} {path}: must end in {' or '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{key} {path}: its folder does not exist; create it first")
