"""The model card: what the model is, was trained on and was measured to do, from the run's own files."""

import json
from pathlib import Path
from typing import Any

import yaml

from mllm3d.registry import ADAPTERS

LIMITS = """\
For research. Not a medical device, and not evaluated for clinical use. What is known of its answers is
the table above: a score there counts for no more than what it adds to the text-only rules beside it. Scans of
other scanners or regions of the body were not measured, nor any prepared in another way.
"""

PREDICT = """\
```
mllm3d predict --checkpoint <this folder> --volume <scan.nii.gz> --question "..."
```

Volumes are prepared as `preprocessing.json` says; `mllm3d predict` does it by itself.
"""

PYTHON = """
In Python, with no more than torch, transformers and the package `{package}`:

```python
from {package} import {name}

model = {name}.from_pretrained("<this folder>")
```
"""

MAX_LINEAGE = 8
RAN_ON = ("python", "torch", "transformers", "deepspeed", "world_size", "device", "git_commit")


def write_card(run: Path, step: Path, folder: Path) -> None:
    """Write README.md and evaluation-SPLIT.json into `folder`, from the files of `run`; nothing is estimated.

    Only evaluations of this very step are taken over. Paths are shortened to their last part.
    """
    config = _read_yaml(run / "config.yaml")
    model = _read_json(folder / "config.json")
    number, recipe = step.name.removeprefix("step_"), config.get("recipe", "an unknown recipe")
    sections = {
        f"{model.get('model_type')}, step {number} of {recipe}": _what(config, model),
        "Data": _data(config),
        "Measured": _measured(run, step, folder),
        "Use": _use(model),
        "Training settings": _settings(config, _read_json(run / "environment.json")),
        "Limits": LIMITS,
        "Licence": _licence(config),
    }
    head = "---\nlibrary_name: transformers\ntags: [medical, 3d, ct]\n---\n"
    titles = [f"{'#' if number == 0 else '##'} {title}" for number, title in enumerate(sections)]
    body = "\n\n".join(f"{title}\n\n{text.strip()}" for title, text in zip(titles, sections.values(), strict=True))
    (folder / "README.md").write_text(f"{head}\n{body}\n", encoding="utf-8")


def _what(config: dict[str, Any], model: dict[str, Any]) -> str:
    architecture = ", ".join(model.get("architectures") or ["an unnamed architecture"])
    lines = [f"{architecture}: answers questions about a 3D scan.", ""]
    return "\n".join([*lines, "Trained by, the last first:", *_lineage(config)])


def _lineage(config: dict[str, Any]) -> list[str]:
    """This run's recipe and those of the runs that it started from, as far as their folders are there."""
    lines: list[str] = []
    while len(lines) < MAX_LINEAGE:
        source = str((config.get("model") or {}).get("checkpoint") or "")
        start = f", from `{_shorten(source)}`" if source else ", from random weights"
        lines.append(f"- `{config.get('recipe', 'unknown recipe')}`{start}")
        runs = [folder for folder in (Path(source), *Path(source).parents) if (folder / "checkpoints").is_dir()]
        if not source or not runs:
            break
        config = _read_yaml(runs[0] / "config.yaml")
    return lines


def _data(config: dict[str, Any]) -> str:
    data = config.get("data") or {}
    manifest = Path(str(data.get("manifest", "")))
    known = _read_json(manifest.parent / "dataset.json")
    name = known.get("name") or manifest.parent.name or "not recorded"
    lines = [f"Data set: {name}", f"Trained on split `{data.get('train_split', 'train')}`"]
    lines += [
        f"{key.capitalize()}: {known[key]}"
        for key in ("source", "version", "seed", "biased")
        if known.get(key) is not None
    ]
    if data.get("where"):
        lines.append(f"Rows: {json.dumps(data['where'])}")
    return "\n".join(f"- {line}" for line in lines)


def _measured(run: Path, step: Path, folder: Path) -> str:
    tables = []
    for file in sorted(run.glob("evaluation/*/results.json")):
        results = _read_json(file)
        if results.get("checkpoint") != step.name:
            continue
        table = (file.parent / "table.md").read_text(encoding="utf-8").strip()
        tables.append(f"Split `{results['split']}`, {results['date']}, {results['device']}. Percent.\n\n{table}")
        (folder / f"evaluation-{results['split']}.json").write_bytes(file.read_bytes())
    return "\n\n".join(tables) or "Nothing: this checkpoint was released without an evaluation."


def _use(model: dict[str, Any]) -> str:
    package = ADAPTERS.get(str(model.get("model_type")), "").partition(".")[0]
    name = next(iter(model.get("architectures") or []), None)
    return PREDICT + (PYTHON.format(package=package, name=name) if package and name else "")


def _settings(config: dict[str, Any], environment: dict[str, Any]) -> str:
    chosen = {key: _shorten(config[key]) for key in ("recipe", "model", "training", "volume") if key in config}
    ran = ", ".join(f"{key} {environment[key]}" for key in RAN_ON if environment.get(key))
    text = yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True).strip()
    return f"```yaml\n{text}\n```\n" + (f"\nRan on: {ran}." if ran else "")


def _licence(config: dict[str, Any]) -> str:
    manifest = Path(str((config.get("data") or {}).get("manifest", "")))
    known = _read_json(manifest.parent / "dataset.json")
    licence = known.get("licence") or known.get("license")
    data = f"The training data's licence: {licence}." if licence else "The training data's licence is not recorded."
    return f"{data} No licence for these weights was chosen; the base model's and the data's terms apply."


def _shorten(value: Any) -> Any:
    """Absolute paths to their last part: a card says nothing of the machine it was written on."""
    if isinstance(value, dict):
        return {key: _shorten(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shorten(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
