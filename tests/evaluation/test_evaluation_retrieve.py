"""`mllm3d embed`, `mllm3d retrieve` and the evaluation of a contrastive model, on a small random one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mllm3d import cli
from mllm3d.config import load
from mllm3d.data.cache import VolumeCache
from mllm3d.data.manifest import Row, read_manifest
from mllm3d.errors import UserError
from mllm3d.evaluation.retrieval import read_index, recalls, zero_shot, zero_shot_scores
from mllm3d.evaluation.retrieval_run import RetrievalResults, evaluate, labels_of
from mllm3d.evaluation.retrieve import embed, one_per_volume, retrieve
from mllm3d.inference import embedding
from mllm3d.inference.embedding import EmbeddingModel
from tests.evaluation.tiny_retrieval import REPORTS, SIZE, existence, row, save_clip, save_data, save_run, write_rows

COUNT = len(REPORTS)
PROMPTS = {"mass": {"present": ["A mass in the liver.", "A mass."], "absent": ["No finding."]}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its data and an index of them; nothing changes them."""
    folder = tmp_path_factory.mktemp("world")
    save_run(folder / "run")
    manifest = save_data(folder / "data")
    embed(folder / "run", manifest, "test", folder / "index", device="cpu")
    return folder


@pytest.fixture(scope="module")
def model(world: Path) -> EmbeddingModel:
    return EmbeddingModel.load(world / "run", "cpu")


def scan(world: Path, number: int) -> Path:
    return world / "data" / "volumes" / f"v{number}.nii.gz"


def run(capsys: Any, *argv: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --- the index ----------------------------------------------------------------------------------------------


def test_the_index_holds_what_the_model_says_of_the_manifest(world: Path, model: EmbeddingModel) -> None:
    index = read_index(world / "index")
    assert [(item.id, item.case, item.volume, item.text) for item in index.items] == [
        (f"r{n}", f"c{n}", f"volumes/v{n}.nii.gz", REPORTS[n]) for n in range(COUNT)
    ]
    cache = VolumeCache(world / "data" / ".cache")
    arrays = [cache.get(scan(world, n), model.volume_config()).array for n in range(COUNT)]
    assert arrays[0].shape == SIZE
    # One by one and together differ by the order of sums in float32; stored are rows divided by their length again.
    np.testing.assert_allclose(index.embeddings["image"], model.embedder.embed_volumes(arrays), atol=1e-5)
    np.testing.assert_allclose(index.embeddings["text"], model.embedder.embed_texts(REPORTS), atol=1e-5)
    assert (index.identity.name, index.identity.checkpoint) == ("step_4", "../run/checkpoints/step_4/model")
    scores = index.embeddings["image"] @ index.embeddings["image"].T
    assert scores[np.triu_indices(COUNT, 1)].max() < 0.99999  # 0.004 apart: otherwise these tests could not fail


def test_equal_reports_have_equal_bits(model: EmbeddingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding to another length would set them apart, and a tie would be decided by chance."""
    monkeypatch.setattr(embedding, "TEXTS", 2)
    found = model.embed_texts([*REPORTS, REPORTS[0], REPORTS[2]])
    assert found[1].tobytes() == found[4].tobytes()
    assert found[6].tobytes() == found[0].tobytes() and found[7].tobytes() == found[2].tobytes()
    assert found[0].tobytes() != found[1].tobytes()
    np.testing.assert_allclose(found[:COUNT], model.embedder.embed_texts(REPORTS), atol=1e-5)  # in their order


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row.model_validate(each) for each in values]


def test_a_volume_has_its_first_row_with_a_report(capsys: Any) -> None:
    given = rows(
        row(1, id="q", report=None), row(0), row(1, id="blank", report=" \n"), row(1, id="w"), row(0, id="same")
    )
    assert [found.id for found in one_per_volume(given)] == ["w", "r0"]
    assert capsys.readouterr().err == ""
    assert [found.id for found in one_per_volume([*given, *rows(row(0, id="other", report="B"))])] == ["w", "r0"]
    assert "1 rows have another report than an earlier row of their volume, which counts (first: other)" in (
        capsys.readouterr().err
    )
    with pytest.raises(UserError, match="row p: has no volume; choose rows that have one"):
        one_per_volume(rows(row(0, id="p", volume=None, images=["a.png"])))


@pytest.mark.parametrize("without", [[2], range(COUNT)])
def test_without_a_report_for_each_there_are_images_only(
    world: Path, tmp_path: Path, capsys: Any, without: list[int]
) -> None:
    manifest = world / "data" / f"{len(without)}.jsonl"
    write_rows(manifest, [row(n, report=None if n in without else REPORTS[n]) for n in range(COUNT)])
    status, out, err = run(
        capsys, "embed", "--checkpoint", world / "run", "--manifest", manifest, "--split", "test", "--out",
        tmp_path / "index", "--device", "cpu",
    )  # fmt: skip
    assert status == 0 and f"6 volumes, {COUNT - len(without)} of them with a report" in out
    assert ("1 of 6 volumes have no report (first: row r2), so that reports cannot be searched" in err) == (
        len(without) == 1
    )
    assert read_index(tmp_path / "index").embeddings.keys() == {"image"}
    status, _, err = run(capsys, "retrieve", "--index", tmp_path / "index", "--text", "mass", "--among", "text")
    assert status == 2 and "no text embeddings; search its image embeddings" in err


def test_rows_can_be_chosen(world: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["embed", "--checkpoint", world / "run", "--manifest", world / "data" / "manifest.jsonl", "--split", "test"]
    given += ["--out", tmp_path / "index", "--cache", tmp_path / "cache"]
    assert run(capsys, *given, "--where", "case=c1,c4,c5", "--where", "id=r4,r5")[0] == 0
    assert [item.id for item in read_index(tmp_path / "index").items] == ["r4", "r5"]
    assert any((tmp_path / "cache").iterdir())
    assert run(capsys, *given, "--where", "case")[2] == "error: --where case: give KEY=VALUE, or KEY=VALUE,VALUE\n"
    assert run(capsys, *given, "--where", "kase=c1")[2].startswith("error: where.kase: neither a field")


# --- searching it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("among", ["image", "text"])
def test_a_text_finds_what_is_nearest(world: Path, model: EmbeddingModel, among: Any) -> None:
    index = read_index(world / "index")
    found = retrieve(world / "index", text="A mass in the liver.", k=3, among=among, device="cpu")
    scores = index.embeddings[among] @ model.embed_texts(["A mass in the liver."])[0]
    order = np.argsort(-scores)[:3]
    assert [result["id"] for result in found["results"]] == [f"r{n}" for n in order]
    assert [result["cosine"] for result in found["results"]] == pytest.approx(scores[order].tolist(), abs=2e-6)
    assert [result["rank"] for result in found["results"]] == [1, 2, 3]
    if among == "text":
        assert found["results"][0]["report"] == "A mass in the liver."


def test_a_scan_finds_itself_first(world: Path) -> None:
    """Prepared and embedded as it was for the index."""
    for number in (0, 3):
        found = retrieve(world / "index", volume=scan(world, number), k=2, device="cpu")["results"]
        assert (found[0]["id"], found[0]["cosine"]) == (f"r{number}", 1.0)
        assert found[1]["cosine"] < 1.0


def test_a_scan_finds_reports(world: Path, model: EmbeddingModel) -> None:
    index = read_index(world / "index")
    found = retrieve(world / "index", volume=scan(world, 2), k=COUNT, among="text", device="cpu")["results"]
    text, image = (index.embeddings[tower].astype(np.float64) for tower in ("text", "image"))
    scores = text @ image[2]
    assert scores[1] == pytest.approx(scores[4], abs=1e-12)  # their reports are equal; the first stands first
    scores[4] = scores[1]
    assert [result["id"] for result in found] == [f"r{n}" for n in np.argsort(-scores, kind="stable")]


def test_what_is_printed(world: Path, capsys: Any) -> None:
    status, out, err = run(capsys, "retrieve", "--index", world / "index", "--text", "no finding", "-k", 6)
    lines = out.splitlines()
    assert status == 0 and len(lines) == 2 * COUNT and "error" not in err
    ranked = [line.split() for line in lines[::2]]
    assert [line[0] for line in ranked] == ["1", "2", "3", "4", "5", "6"]
    assert {(line[2], line[3]) for line in ranked} == {(f"c{n}", f"volumes/v{n}.nii.gz") for n in range(COUNT)}
    cosines = [float(line[1]) for line in ranked]
    assert cosines == sorted(cosines, reverse=True)
    beginnings = {line.strip() for line in lines[1::2]}
    long = next(text for text in beginnings if text.endswith("..."))
    assert len(long) <= 100 and REPORTS[2].startswith(long[:-3])
    assert beginnings - {long} == {text for text in REPORTS if len(text) <= 100}


def test_json_has_everything(world: Path, capsys: Any) -> None:
    _, out, _ = run(capsys, "retrieve", "--index", world / "index", "--volume", scan(world, 2), "-k", 1, "--json")
    found = json.loads(out)
    assert found["results"][0]["report"] == REPORTS[2]
    assert found["query"] == {"volume": str(scan(world, 2))} and found["checkpoint"] == "step_4"
    assert (found["among"], found["index"]) == ("image", str(world / "index"))


def test_the_checkpoint_is_remembered_and_may_move_with_the_index(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "data")
    index = tmp_path / "moved" / "index"
    assert retrieve(index, text="mass", device="cpu")["checkpoint"] == "step_4"
    (tmp_path / "moved" / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"was made with step_4, which is no longer at .*; give --checkpoint"):
        retrieve(index, text="mass", device="cpu")
    given = retrieve(index, text="mass", checkpoint=tmp_path / "elsewhere", device="cpu")
    assert given["results"] == retrieve(world / "index", text="mass", device="cpu")["results"]


def test_an_index_of_another_model_is_one_line(world: Path, tmp_path: Path, capsys: Any) -> None:
    other, wider = save_clip(tmp_path / "other", seed=1), save_clip(tmp_path / "wider", projection_dim=8)
    capsys.readouterr()
    for folder, said in ((other, "not other: the weights or settings differ"), (wider, "have width 6, the model's 8")):
        asked = ["retrieve", "--index", world / "index", "--text", "mass", "--checkpoint", folder]
        status, out, err = run(capsys, *asked)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "an index of another model (step_4, not " in err and said in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--text", " "], "--text: empty; say what to look for"),
        (["--text", "mass", "-k", "0"], "-k 0: give 1 or more"),
        (["--volume", "nowhere.nii.gz"], "nowhere.nii.gz"),
        (["--text", "mass", "--index", "nowhere"], "nowhere: no index in it (index.json is missing)"),
        (["--text", "mass", "--checkpoint", "nowhere"], "nowhere: no such folder; give a released folder, a run"),
    ],
)
def test_mistakes_in_a_search(world: Path, capsys: Any, argv: list[str], said: str) -> None:
    status, out, err = run(capsys, "retrieve", "--index", world / "index", *argv)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["--text", "a", "--volume", "b.nii.gz"], ["--text", "a", "--among", "volumes"]])
def test_one_query_is_needed(world: Path, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["retrieve", "--index", str(world / "index"), *argv])
    assert left.value.code == 2


def test_mistakes_in_making_an_index(world: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    answering = tmp_path / "answering"
    answering.mkdir()
    (answering / "config.json").write_text('{"model_type": "photon"}')
    for name in ("model.safetensors", "preprocessing.json"):
        (answering / name).write_text("{}")
    given = {"checkpoint": world / "run", "manifest": world / "data" / "manifest.jsonl", "split": "test"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"out": tmp_path / "thesis"}, "thesis: exists already and is no index; name another folder"),
        ({"split": "tset"}, "no row has split 'tset'; the manifest's splits are: test"),
        ({"checkpoint": answering}, "a model of type 'photon' puts no volumes and texts into one space; name a"),
        ({"manifest": tmp_path / "no.jsonl"}, "no.jsonl: cannot be read"),
    ]
    for change, said in cases:
        options = {"out": tmp_path / "index", **given, **change}
        argv = [text for name, value in options.items() for text in (f"--{name}", value)]
        status, out, err = run(capsys, "embed", *argv)
        assert (status, out) == (2, "") and said in err and err.count("\n") == 1
    assert not (tmp_path / "index").exists()


# --- the evaluation of a run --------------------------------------------------------------------------------


@pytest.fixture
def config(world: Path, tmp_path: Path) -> Callable[..., Any]:
    """The config of a copy of the run."""
    shutil.copytree(world / "run", tmp_path / "run")

    def read(manifest: Path | None = None, **evaluation: Any) -> Any:
        values = {
            "recipe": "med3dvlm.contrastive",
            "run": {"output": str(tmp_path / "run")},
            "volume": {"window_hu": [-200.0, 300.0], "shape": list(SIZE)},
            "data": {"manifest": str(manifest or world / "data" / "manifest.jsonl"), "where": {"task": ["report"]}},
            "model": {"text_encoder": "nowhere"},
            "training": {"max_steps": 4, "optimizer": {"lr": 1e-3}},
            "evaluation": evaluation,
        }
        (tmp_path / "contrastive.yaml").write_text(yaml.safe_dump(values))
        return load(str(tmp_path / "contrastive.yaml"), [])

    return read


def test_recall_and_findings_of_a_run(world: Path, model: EmbeddingModel, config: Any, capsys: Any) -> None:
    settings = config(zero_shot=PROMPTS)
    results = evaluate(settings, device="cpu")
    index = read_index(world / "index")
    image, text = index.embeddings["image"], index.embeddings["text"]
    assert results.recall == recalls(image, text) and [each.items for each in results.recall] == [COUNT]
    present, absent = (model.embed_texts(PROMPTS["mass"][side]) for side in ("present", "absent"))
    labels = np.array([n in (0, 3) for n in range(COUNT)])
    assert results.zero_shot == {"mass": zero_shot(zero_shot_scores(image, present, absent), labels)}
    folder = settings.run.output / "evaluation" / "test"
    assert RetrievalResults.model_validate_json((folder / "results.json").read_text()) == results
    table = (folder / "table.md").read_text()
    one = results.recall[0]
    assert f"| 6 | {100 * one.image_to_text[1]:.1f} | {100 * one.image_to_text[5]:.1f} |" in table
    assert "| 16.7 | 83.3 | 100.0 |\n" in table  # chance
    assert f"| mass | 2 | 4 | {100 * results.zero_shot['mass'].auc:.1f} |" in table
    assert "fewer than 100 items: compare with chance" in table
    printed = capsys.readouterr().out
    assert "step_4" in printed and "image to" in printed and "mass" in printed
    assert retrieve(folder / "index", text="mass", device="cpu")["checkpoint"] == "step_4"


def test_embeddings_are_made_once(config: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    settings = config()
    first = evaluate(settings, device="cpu")
    seen: list[np.ndarray] = []
    embed_volume = EmbeddingModel.embed_volume

    def counted(self: EmbeddingModel, volume: np.ndarray) -> np.ndarray:
        seen.append(volume)
        return embed_volume(self, volume)

    monkeypatch.setattr(EmbeddingModel, "embed_volume", counted)
    assert evaluate(settings, device="cpu") == first and seen == []
    data = settings.run.output / "evaluation" / "test" / "index" / "embeddings.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"\0")
    assert evaluate(settings, device="cpu") == first and len(seen) == COUNT
    assert "embedding again" in capsys.readouterr().err
    evaluate(config(limit_volumes=3), device="cpu")
    assert len(seen) == COUNT + 3


def test_results_of_another_checkpoint_are_moved_aside(config: Any, tmp_path: Path) -> None:
    settings = config()
    before = evaluate(settings, device="cpu")
    other = evaluate(settings, save_clip(tmp_path / "other", seed=1), device="cpu")
    assert other.checkpoint == "other" and other.fingerprint != before.fingerprint
    aside = settings.run.output / "evaluation" / "test.step_4.1"
    assert RetrievalResults.model_validate_json((aside / "results.json").read_text()) == before


def test_each_volume_needs_a_report(world: Path, config: Any) -> None:
    manifest = world / "data" / "gap.jsonl"
    write_rows(manifest, [row(n, report=None if n == 4 else REPORTS[n]) for n in range(COUNT)])
    with pytest.raises(UserError, match="row r4: report: is missing; choose rows that have one with evaluation.where"):
        evaluate(config(manifest), device="cpu")


def test_eval_decides_by_the_recipe(config: Any, tmp_path: Path, capsys: Any) -> None:
    config()
    status, out, _ = run(capsys, "eval", "--config", tmp_path / "contrastive.yaml", "--device", "cpu")
    assert status == 0 and "6 volumes with reports" in out


# --- labels -------------------------------------------------------------------------------------------------


def test_labels_come_from_meta_or_from_questions_about_existence() -> None:
    items = rows(*(row(n) for n in range(4)))
    asked = rows(existence(0, "no"), existence(3, "Yes"), existence(5, "yes"))
    asked += rows(
        existence(1, "yes", id="o", subtask="mass in the lung", meta={"finding": "nodule"}),
        existence(2, "left", id="l"),
        existence(2, "yes", id="t", task="location"),
    )
    found = labels_of(["mass", "Pleural effusion", "nodule"], [*items, *asked], items, "finding")
    assert found == {
        "mass": [True, False, False, True],
        "Pleural effusion": [False, False, True, False],
        "nodule": [False, True, None, True],
    }
    spoken = rows(row(0, meta={"mass": "Yes"}), row(1, meta={"mass": "0"}), row(2, meta={"mass": None}))
    assert labels_of(["mass"], spoken, spoken, "finding") == {"mass": [True, False, None]}


def test_labels_that_cannot_be() -> None:
    items = rows(row(0), row(1))
    with pytest.raises(
        UserError, match=r"evaluation.zero_shot.Mass: no row says whether it is there; .*did you mean mass\?"
    ):
        labels_of(["Mass"], items, items, "finding")
    with pytest.raises(UserError, match="row x: says of mass what row r0 denies; correct one of them"):
        labels_of(["mass"], [*items, *rows(row(0, id="x", meta={"mass": False}))], items, "finding")
    with pytest.raises(UserError, match="row r0: meta.mass: 'maybe' is neither yes nor no"):
        labels_of(["mass"], rows(row(0, meta={"mass": "maybe"})), items, "finding")


def test_findings_without_figures_are_named(world: Path, config: Any) -> None:
    manifest = world / "data" / "labels.jsonl"
    given = [row(n, meta={"mass": n == 0 if n < 4 else None, "stone": True}) for n in range(COUNT)]
    write_rows(manifest, given)
    settings = config(manifest, zero_shot={**PROMPTS, "stone": PROMPTS["mass"]})
    results = evaluate(settings, device="cpu")
    assert (results.zero_shot["mass"].positives, results.zero_shot["mass"].negatives) == (1, 3)
    assert results.unlabelled == {"mass": 2, "stone": 0} and results.one_sided == ["stone"]
    table = (settings.run.output / "evaluation" / "test" / "table.md").read_text()
    assert "- mass: 2 volumes without a label left out\n" in table
    assert "- stone: all labelled volumes show it, or none: no figures\n" in table


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ({"mass": {"present": ["a mass"]}}, "mass: absent: one prompt or several are needed"),
        ({"mass": {"present": [], "absent": ["none"]}}, "mass: present: one prompt or several are needed"),
        ({"mass": {"present": [" "], "absent": ["none"]}}, "mass: present: one prompt or several are needed"),
        ({"mass": {"present": ["a"], "absent": ["b"], "unsure": ["c"]}}, "unsure"),
        ({"mass": {"present": "a mass", "absent": ["none"]}}, "mass.present"),
    ],
)
def test_prompts_that_cannot_be(config: Any, prompts: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        config(zero_shot=prompts)
    assert said in str(error.value) and "zero_shot" in str(error.value)


def test_the_manifests_rows_are_read_as_they_are(world: Path) -> None:
    assert [each.report for each in read_manifest(world / "data" / "manifest.jsonl")] == REPORTS
