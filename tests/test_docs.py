"""The documentation holds: its commands run, its links lead somewhere, and what it names is there.

`python -m tests.test_docs` writes the tables of settings into the pages anew.
"""

import argparse
import dataclasses
import importlib
import json
import re
import shutil
import types
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from med3dvlm.recipes import contrastive, language, text
from medpruner import METHODS
from mllm3d import cli, registry
from mllm3d.config import Settings, load, sections
from mllm3d.data.manifest import Row
from photon.building import patched_config, photon_config
from photon.configuration_photon import BACKBONES
from photon.flops import forward_flops
from photon.recipes import backbone, phases
from tests.docs_shell import PROGRAMS, ROOT, Shell, open_shell

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "python", "yaml", "json", "text"}
CONFIGS = sorted(path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


class Block(NamedTuple):
    """A fenced block of code and the line where it starts."""

    language: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in found]


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def quoted(path: Path) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(path))


# --- code blocks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    with open_shell() as found:
        yield found


@pytest.fixture(scope="module")
def world(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the pages' commands find what they name: programs, configs, data, runs and a release,
    all of it tiny."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("data", "benchmarks", "train.py", "eval.py"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    (folder / "model.py").write_text(START)
    (folder / "contrastive.py").write_text(CONTRASTIVE)
    (folder / "language.py").write_text(LANGUAGE)
    (folder / "slicewise.py").write_text(SLICEWISE)
    shell.run(SETUP, folder)
    return folder


START = """\
from mllm3d.data.manifest import read_manifest
from photon import PhotonForConditionalGeneration, PhotonProcessor
from photon.tokenization import train_tokenizer
from tests.photon.conftest import tiny_config

rows = read_manifest("runs/quickstart/data/manifest.jsonl")
tokenizer = train_tokenizer({text for row in rows for text in (row.question, row.answer)}, 400)
config = tiny_config(tokenizer, vision={"patch_size": 14, "temporal_patch_size": 14, "window_size": 112})
PhotonForConditionalGeneration(config).save_pretrained("runs/quickstart/phase1")
PhotonProcessor.from_config(config, tokenizer).save_pretrained("runs/quickstart/phase1")
"""

CONTRASTIVE = """\
from pathlib import Path
from tests.evaluation.tiny_retrieval import save_run

save_run(Path("runs/quickstart_med3dvlm/contrastive"))
"""

LANGUAGE = """\
from pathlib import Path
from tests.release.tiny_gguf import model, tokenizer, write_gguf

Path("models").mkdir()
write_gguf(Path("models/language.gguf"), model(len(tokenizer())))
"""

SLICEWISE = """\
from pathlib import Path
from tests.medpruner.saved_slicewise import saved

saved("qwen2_5_vl", Path("runs/slicewise"))
"""

SETUP = """\
python data/phantom/prepare.py --out runs/quickstart/data --cases 16 --seed 0 --tasks existence --priors 0 \
    --shape 28,56,56 --splits 0.7,0,0.3 --workers 1
cp "$(ls runs/quickstart/data/volumes/*.nii.gz | tail -n 1)" runs/quickstart/data/volumes/case_01199.nii.gz
python model.py
python train.py --config quickstart/phase2 training.max_steps=16 training.volumes_per_batch=2 training.optimizer.lr=1e-2
python eval.py --config quickstart/phase2 evaluation.modes=[scheduled]
mllm3d release runs/quickstart/phase2 runs/quickstart/release
cp -r runs/quickstart/phase2 runs/photon_phase2
cp runs/quickstart/data/volumes/case_01199.nii.gz CT.nii.gz
cp CT.nii.gz CT_earlier.nii.gz
python data/phantom/prepare.py --out runs/quickstart_med3dvlm/data --cases 8 --seed 0 --priors 0 \
    --tasks report existence --shape 28,56,56 --splits 0.5,0,0.5 --workers 1
python contrastive.py
python language.py
python slicewise.py
mkdir datasets my_data models/qwen3_vl_8b
cp runs/quickstart_med3dvlm/data/manifest.jsonl my_data/manifest.jsonl
printf 'VolumeName,Cardiomegaly\\ncase_00000.nii.gz,1\\ncase_00001.nii.gz,0\\n' > my_data/labels.csv
ln -s ../runs/quickstart/data datasets/3d_rad
ln -s ../runs/quickstart/data/volumes my_data/volumes
{
  echo scan,patient,split,finding,question,answer
  echo "$(cd my_data/volumes; ls | head -n 1),p1,train,splenomegaly,Is the spleen enlarged?,no"
  echo "case_01199.nii.gz,p2,test,splenomegaly,Is the spleen enlarged?,yes"
} > my_data/questions.csv
"""


@page
def test_every_block_says_what_it_is(page: Path) -> None:
    assert [block for block in blocks(page) if block.language not in LANGUAGES] == []


@page
def test_commands_run_as_they_stand(page: Path, shell: Shell, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    shutil.copytree(world, folder, symlinks=True)
    for block in blocks(page):
        if block.language == "bash":
            shell.run(block.text, folder)
        elif block.language == "python":
            (folder / "block.py").write_text(block.text)
            shell.run("python block.py", folder)
        elif block.language == "yaml" and (named := re.match(r"# (configs/\S+\.yaml)\n", block.text)):
            (folder / named[1]).write_text(block.text)


@page
def test_printed_plans_are_what_comes_out(page: Path, shell: Shell, tmp_path: Path) -> None:
    """Output below a block of dry runs and `mllm3d config`, which depends on nothing but the configs."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    for block, below in pairwise(blocks(page)):
        commands = block.text.splitlines()
        if block.language == "bash" and below.language == "text" and all(map(PLAN.search, commands)):
            assert below.text in shell.run(block.text, tmp_path), f"line {below.line}"


PLAN = re.compile(r"--dry-run|^mllm3d config")


@page
def test_rows_and_settings_are_valid(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language == "json":
            Row.model_validate_json(block.text)
        elif block.language == "yaml":
            shutil.copytree(ROOT / "configs", tmp_path / str(block.line) / "configs")
            file = tmp_path / str(block.line) / "configs" / "from_the_page.yaml"
            parent = "" if "extends:" in block.text else "extends: photon_phase2.yaml\n"
            file.write_text(parent + block.text)
            load(file)


def test_the_shell_fails_where_a_command_does(shell: Shell, world: Path) -> None:
    for command in (
        "python train.py --config photon_phase3",
        "deepspeed train.py --config photon_phase2 --ressume",
        "deepspeed train.py --config photon_phase2 training.epoch=1",
        "torchrun --no-such-option 2 train.py --config photon_phase2",
        "make quickstarted",
        "mllm3d predict --checkpoint nowhere --volume x.nii.gz --question q",
    ):
        with pytest.raises(AssertionError, match="exit status"):
            shell.run(command, world)
    assert "trainable" in shell.run("deepspeed --num_gpus 2 train.py --config photon_phase1", world)
    assert set(PROGRAMS) == {"python", "mllm3d", "deepspeed", "torchrun", "make"}


# --- what the text names ------------------------------------------------------------------------------------


@page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        assert ":" not in path, f"{target}: pages link to files of the project only"
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


@page
def test_files_exist(page: Path, world: Path) -> None:
    """In the checkout, beside the page, in configs/, or among what a run, a release and a data set hold."""
    quickstart = world / "runs" / "quickstart"
    places = [ROOT, page.parent, ROOT / "configs", world, *(quickstart / x for x in ("phase2", "release", "data"))]
    places += [*(quickstart / "phase2" / "checkpoints").glob("step_*"), world / "runs" / "slicewise"]
    missing = []
    for name in quoted(page):
        if not FILE.fullmatch(name) or name in BACKBONES or name in ON_HUB or name in CREATED:
            continue
        pattern = re.sub(r"\b[A-Z]+\b|(?<=_)[A-Z]\b", "*", name.rstrip("/"))
        if not any(True for place in places for _ in place.glob(pattern)):
            missing.append(name)
    assert missing == []


FILE = re.compile(r"[\w./*-]+/|[\w./-]*\w\.(py|md|ya?ml|jsonl?|txt|png|csv)|[\w.-]+(/[\w.-]+)+")
ON_HUB = {"medicalai/ClinicalBERT", "Qwen/Qwen2.5-7B-Instruct"}
CREATED = {"configs/my_phase2.yaml"}
"""Files that a page tells how to write."""


@page
def test_functions_exist(page: Path) -> None:
    for name in quoted(page):
        if re.fullmatch(r"(photon|mllm3d|medpruner)(\.\w+)+", name) and name not in registry.RECIPES:
            resolve(name)


def resolve(name: str) -> Any:
    """The module, class, method or function of a dotted name."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def test_each_equation_has_its_function() -> None:
    table = (ROOT / "docs" / "photon.md").read_text().partition("## Equations")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ") and "Eq." in line]
    numbers = {int(number) for row in rows for number in re.findall(r"\d+", row[1].partition("A.")[0])}
    assert numbers == set(range(1, 22))
    for row in rows:
        names = re.findall(r"`([\w.]+)`", row[3])
        assert names, row
        for name in names:
            assert callable(resolve(name)), name


def test_each_setting_of_a_pruner_is_in_its_table() -> None:
    text = (ROOT / "docs" / "medpruner.md").read_text().partition("## Settings")[2].partition("\n## ")[0]
    shown: dict[str, dict[str, str]] = {}
    rows: dict[str, str] = {}
    for method, key, default, _ in (re.split(r"\s*\|\s*", line)[1:5] for line in text.splitlines() if "| `" in line):
        rows = shown.setdefault(method.strip("`"), {}) if method else rows
        rows[key.strip("`")] = default.strip("`")
    common = shown.pop("all")
    assert set(shown) == set(METHODS)
    for name, method in METHODS.items():
        fields = dataclasses.fields(method)
        assert {f.name for f in fields} == {*shown[name], *common}
        for f in fields:
            default = {**shown[name], **common}[f.name]
            assert default == f.default or json.loads(default) == f.default, f"{name}: {f.name}"


def test_dropping_and_sharing_cost_what_counting_says() -> None:
    """The table of docs/photon.md: FLOPs with dropping over those with all layers shared."""
    text = (ROOT / "docs" / "photon.md").read_text().partition("(`photon.flops.forward_flops`):")[2]
    text = text.partition("Below 1 dropping costs less")[0]
    rows = [re.findall(r"[\d.]+", line) for line in text.splitlines() if re.match(r"\| \d", line)]
    config = patched_config(photon_config(BACKBONES["Qwen/Qwen2.5-VL-3B-Instruct"]), (14, 14, 14), 1)
    shape, questions = (140, 280, 280), (1, 2, 4, 8, 16)
    assert len(rows) == 2
    for rate, *shown in rows:
        dropped = [forward_flops(config, shape, k, 48, 8, float(rate)) for k in questions]
        shared = [forward_flops(config, shape, k, 48, 8, None) for k in questions]
        assert shown == [f"{a / b:.2f}" for a, b in zip(dropped, shared, strict=True)]


def test_each_config_of_a_real_run_belongs_to_a_table() -> None:
    named = quoted(ROOT / "docs" / "reproduce.md")
    configs = [f"configs/{name}" for name in CONFIGS if not name.startswith("quickstart/")]
    assert [name for name in configs if name not in named] == []


@page
def test_settings_exist(page: Path) -> None:
    known = {key for prefix, model in SECTIONS for key in keys(model, prefix)} | set(SECTION_NAMES)
    for name in quoted(page):
        key = name.partition("=")[0]
        if key.partition(".")[0] in SECTION_NAMES and re.fullmatch(r"\w+(\.\w+)+", key):
            assert key in known, key


@page
def test_options_and_commands_exist(page: Path) -> None:
    known = {option for parser in parsers(cli.build_parser()) for option in parser._option_string_actions}
    programs = ("data/phantom/prepare.py", "mllm3d/evaluation/check_table.py", "benchmarks/photon_speed.py")
    for program in programs:
        known |= set(re.findall(r'"(--[\w-]+)"', (ROOT / program).read_text()))
    known |= {"--hostfile", "--nnodes"}  # of the launchers
    commands = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    for name in quoted(page):
        for option in re.findall(r"(?<!\S)(--[\w-]+)", name):
            assert option in known, name
        if name.startswith("mllm3d "):
            assert name.split()[1] in commands, name


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


# --- tables of settings -------------------------------------------------------------------------------------

SECTIONS: list[tuple[str, type[BaseModel]]] = [
    ("run", sections.RunConfig),
    ("volume", sections.VolumeConfig),
    ("data", sections.DataConfig),
    ("training", sections.TrainingConfig),
    ("evaluation", sections.EvaluationConfig),
    ("estimate", sections.EstimateConfig),
    ("model", phases.Phase1Settings),
    ("model", phases.Phase2Settings),
    ("model", backbone.BackboneSettings),
    ("model", contrastive.ContrastiveSettings),
    ("model", language.ProjectorStage),
    ("model", language.FinetuneStage),
    ("model", text.TextSettings),
]
SECTION_NAMES = tuple(dict.fromkeys(name for name, _ in SECTIONS))
TABLES: dict[str, type[BaseModel]] = {model.__name__: model for _, model in SECTIONS} | {"Row": Row}
TABLE = re.compile(r"<!-- settings (\w+)(?: (\w+))? -->\n.*?<!-- end -->", re.DOTALL)


def keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        yield key
        if (inner := section_of(field.annotation)) is not None:
            yield from keys(inner, key)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The nested section that a field holds, if it does."""
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Settings):
            return part
    return None


def settings_table(model: type[BaseModel], prefix: str) -> str:
    """A markdown table of all fields, nested ones with their full key."""
    lines = ["| key | values | default | |", "|---|---|---|---|", *_rows(model, prefix)]
    return "\n".join(lines)


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        inner = section_of(field.annotation)
        if inner is None or field.default is None:
            default = _default(key, field.get_default(call_default_factory=True))
            kind = "section" if inner else _kind(field.annotation)
            text = (field.description or "").replace("|", "/").replace("<", "&lt;")
            yield f"| `{key}` | {kind} | {default} | {text} |"
        if inner is not None:
            yield from _rows(inner, key)


def _default(key: str, value: Any) -> str:
    if key == "run.output":
        return "`runs/` and the config's name"
    if value is PydanticUndefined:
        return "required"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _kind(annotation: Any) -> str:
    """A field's type in a user's words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in inner)
    if origin in (tuple, list):
        values = _kind(inner[0])
        values = PLURALS.get(values, values)
        return f"list of {values}" if inner[-1] is ... or origin is list else f"{len(inner)} {values}"
    if origin is dict:
        return "mapping"
    return NAMES[annotation]


NAMES = {int: "integer", float: "number", bool: "true, false", str: "text", Path: "path", type(None): "null"}
PLURALS = {"integer": "integers", "number": "numbers", "text": "texts"}


def with_tables(text: str) -> str:
    """A page with its tables as the code has them."""

    def fill(match: re.Match[str]) -> str:
        head = match[0].partition("\n")[0]
        return f"{head}\n{settings_table(TABLES[match[1]], match[2] or '')}\n<!-- end -->"

    return TABLE.sub(fill, text)


@page
def test_tables_say_what_the_code_has(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == with_tables(text), "run python -m tests.test_docs"


def test_every_section_has_its_table() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert {match[1] for match in TABLE.finditer(text)} == set(TABLES)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
