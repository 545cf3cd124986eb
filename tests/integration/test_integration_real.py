"""Real CT and MR through the commands: checked, asked about, and trained on.

A data set's paths stay inside its folder, so the scans are copied into one.
"""

import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mllm3d.cli import main
from tests.integration import tiny
from tests.integration.launching import PYTHON, assert_same, deepspeed, launch, read_metrics
from tests.integration.many_runs import interrupt

TOTAL, SARCOMA = "totalsegmentator", "sts_001"
# scan, modality, label map
SCANS = [
    (f"{TOTAL}/example_ct.nii.gz", "CT", f"{TOTAL}/example_seg_fast_force_split.nii.gz"),
    (f"{TOTAL}/example_ct_dicom", "CT", f"{TOTAL}/example_seg_dicom.nii.gz"),
    (f"{TOTAL}/example_mr_sm.nii.gz", "MR", f"{TOTAL}/example_seg_mr.nii.gz"),
    (f"{SARCOMA}/STS_001_CT_image.nii.gz", "CT", f"{SARCOMA}/STS_001_CT_mask.nii.gz"),
    (f"{SARCOMA}/STS_001_CT_dicom", "CT", f"{SARCOMA}/STS_001_CT_mask.nii.gz"),
    (f"{SARCOMA}/STS_001_MR_T1_image.nii.gz", "MR", f"{SARCOMA}/STS_001_MR_T1_mask.nii.gz"),
]
CT, _, ORGANS = SCANS[0]


def write_rows(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def scans(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    for name in (TOTAL, SARCOMA):
        shutil.copytree(real_data / name, folder / name)
    return folder


def test_every_volume_loads_through_data_check(scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {path.relative_to(scans).as_posix() for path in scans.glob("*/*") if "image" in path.name}
    found |= {path.relative_to(scans).as_posix() for path in scans.glob("*/example_*") if "seg" not in path.name}
    found |= {path.relative_to(scans).as_posix() for path in scans.glob("*/*_dicom")}
    assert found == {name for name, _, _ in SCANS}, "a scan that this test does not know"
    row = {"split": "train", "task": "existence", "question": "Is there a tumour?", "answer": "yes"}
    rows = [
        {**row, "id": name, "case": name, "volume": name, "modality": modality, "labels": labels}
        for name, modality, labels in SCANS
    ]
    manifest = write_rows(scans / "all.jsonl", rows)
    assert main(["data", "check", str(manifest)]) == 0
    assert capsys.readouterr().out == f"{manifest}: no problems\n"


@pytest.mark.parametrize(("name", "modality"), [(name, modality) for name, modality, _ in SCANS])
def test_predict_answers_on_each(
    scans: Path, photon_folder: Path, capsys: pytest.CaptureFixture[str], name: str, modality: str
) -> None:
    scan = ["--volume", str(scans / name), "--modality", modality.lower(), "--question", "Is there a tumour?"]
    assert main(["predict", "--checkpoint", str(photon_folder), *scan, "--json", "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert isinstance(answer["answer"], str) and printed.err == ""
    assert answer["tokens_before"] == 64 and answer["keep_rate"] == round(answer["tokens_after"] / 64, 4) > 0


# --- questions about the organs of a CT ---------------------------------------------------------------------


def organ_rows(scans: Path) -> list[dict[str, str]]:
    """Of each structure that the label map could hold: is it there, its volume, its mean HU."""
    names = json.loads((scans / TOTAL / "labels_total_v2.json").read_text())
    image, labels = nib.load(scans / CT), nib.load(scans / ORGANS)
    hu, organs = np.asarray(image.dataobj), np.asarray(labels.dataobj)
    ml = float(np.prod(labels.header.get_zooms())) / 1000
    rows = []

    def ask(organ: str, task: str, question: str, answer: str) -> None:
        fixed = {"case": "example_ct", "split": "train", "volume": CT, "labels": ORGANS}
        rows.append({**fixed, "id": f"{organ}-{task}", "task": task, "question": question, "answer": answer})

    for value, name in names.items():
        inside, organ = organs == int(value), name.replace("_", " ")
        ask(organ, "existence", f"Is the {organ} in this scan?", "yes" if inside.any() else "no")
        if inside.any():
            ask(organ, "volume", f"How large is the {organ}?", f"{inside.sum() * ml:.0f} ml")
            ask(organ, "hu", f"What is the mean density of the {organ}?", f"{hu[inside].mean():.0f} HU")
    return rows


@pytest.fixture(scope="module")
def organs(scans: Path) -> Path:
    return write_rows(scans / "organs.jsonl", organ_rows(scans))


def test_the_questions_say_what_is_in_the_scan(organs: Path) -> None:
    """Volumes as the data's own README has them; densities as textbooks have them, without contrast."""
    answers = {row["id"]: row["answer"] for row in map(json.loads, organs.read_text().splitlines())}
    volumes = {"liver": "1126 ml", "kidney right": "193 ml", "kidney left": "137 ml", "spleen": "261 ml"}
    assert {organ: answers[f"{organ}-volume"] for organ in volumes} == volumes
    assert answers["brain-existence"] == "no" and answers["liver-existence"] == "yes"
    assert 40 <= int(re.sub(" HU", "", answers["liver-hu"])) <= 75
    assert sum(key.endswith("-volume") for key in answers) == 61


def test_training_on_a_real_ct_lowers_the_loss_and_resumes(organs: Path, photon_folder: Path, tmp_path: Path) -> None:
    config = tiny.phase2(organs, photon_folder, tmp_path / "run", max_steps=20, accumulation=1, save_every=10)
    config["data"]["questions_per_volume"] = 8
    config["model"]["scheduling"] |= {"soft_from": 4.0, "hard_from": 8.0}
    file = tiny.write_config(tmp_path / "run.yaml", config)
    launch(deepspeed(), "--config", file)
    losses = [line["loss/ce"] for line in read_metrics(tmp_path / "run")]
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    interrupt(tmp_path / "run", 10, tmp_path / "continued")
    launch(PYTHON, "--config", file, "--resume", f"run.output={tmp_path / 'continued'}")
    assert_same(tmp_path / "run", tmp_path / "continued")
