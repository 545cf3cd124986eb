"""Who may import whom (docs/architecture: "Who may import whom"), read from the source with `ast`.

The checker is tried on small trees that break each rule, and then on this repository.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("photon", "med3dvlm", "medpruner")
OUTSIDE_THE_PACKAGES = ("data", "benchmarks", "train.py", "eval.py")

# What a released checkpoint needs to load: nothing else in model files. tokenizers and safetensors come with
# transformers; peft is for LoRA; flash_attn, timm and triton are used where they are installed.
MODEL_LIBRARIES = {"torch", "transformers", "einops", "numpy", "tokenizers", "safetensors", "peft", "flash_attn"}
MODEL_LIBRARIES |= {"timm", "triton"}
# Rooms of mllm3d and the rooms that each may import besides itself.
GROUND = {"errors", "config", "registry", "rundirs"}
MAY_IMPORT = {
    "": set(),
    "errors": set(),
    "registry": {"errors"},
    "config": {"errors", "registry"},
    "rundirs": {"errors"},
    "data": GROUND,
    "training": GROUND | {"data"},
    "inference": GROUND | {"data"},
    "evaluation": GROUND | {"data", "inference"},
    "release": GROUND | {"data"},
    "doctor": GROUND,
    "cli": GROUND | {"", "data", "training", "inference", "evaluation", "release", "doctor"},
}
FOR_RECIPES = GROUND | {"data", "training", "inference"}
ONLY_IN = {
    "deepspeed": "mllm3d.training",
    "monai": "mllm3d.data",
    "timm": "med3dvlm.slicewise",
    "triton": "med3dvlm.decomposed_triton",
}
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "SimpleITK": "simpleitk",
    "flash_attn": "flash-attn",
    "rouge_score": "rouge-score",
}
DISTRIBUTIONS |= {"bert_score": "bert-score", "PIL": "pillow", "triton": "torch"}  # its builds for CUDA bring triton


@dataclass(frozen=True)
class Import:
    """`importer` (dotted module) imports `imported`; `on_load`: when the module itself is imported."""

    importer: str
    imported: str
    line: int
    on_load: bool

    @property
    def top(self) -> str:
        return self.imported.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of everything in the importable packages."""
    found = {}
    for package in ("mllm3d", *MODELS):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> list[Import]:
    """All imports of a file; `from package import module` counts as an import of `package.module`."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node, on_load in _walk(ast.parse(path.read_text(encoding="utf-8")), on_load=True):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            whole = [f"{base}.{alias.name}" for alias in node.names]
            targets = sorted({target if target in known else base for target in whole})
        found += [Import(name, target, node.lineno, on_load) for target in targets]
    return found


def _walk(node: ast.AST, on_load: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, on_load
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _walk(child, on_load=False)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, on_load and not is_function)


def all_imports(root: Path) -> list[Import]:
    known = modules(root)
    return [item for name, path in known.items() for item in imports(name, path, set(known))]


def _is_recipes(module: str) -> bool:
    """`photon.recipes` and what is in it join a model to the framework."""
    return module.split(".")[1:2] == ["recipes"]


def room(module: str) -> str:
    """`mllm3d.data.cache` -> `data`; the package itself -> ``."""
    return (module.split(".") + [""])[1]


# --- the rules ----------------------------------------------------------------------------------------------


def broken_rules(found: list[Import]) -> list[str]:
    """Every import that a rule forbids."""
    problems = []
    for item in found:
        package = item.importer.partition(".")[0]
        is_recipes = _is_recipes(item.importer)
        if is_recipes and item.top == "mllm3d" and room(item.imported) not in FOR_RECIPES:
            problems.append(f"{item}: recipes may import {sorted(FOR_RECIPES)}")
        if package in MODELS and item.top in MODELS and item.top != package:
            problems.append(f"{item}: model packages do not import each other")
        elif package in MODELS and not is_recipes:
            if item.top != package and item.top not in MODEL_LIBRARIES and item.top not in sys.stdlib_module_names:
                problems.append(f"{item}: model files need only torch, transformers and einops")
        elif package == "mllm3d" and item.top in MODELS:
            problems.append(f"{item}: models are reached through the registry's strings")
        elif package == "mllm3d" and item.top == "mllm3d":
            here, there = room(item.importer), room(item.imported)
            if there != here and there not in MAY_IMPORT[here]:
                problems.append(f"{item}: {here or 'mllm3d'} may import {sorted(MAY_IMPORT[here])}")
        if item.top in ONLY_IN and not f"{item.importer}.".startswith(f"{ONLY_IN[item.top]}."):
            problems.append(f"{item}: only {ONLY_IN[item.top]} does that")
    return problems


def loops(found: list[Import]) -> list[list[str]]:
    """Groups of modules that cannot be loaded without each other."""
    graph: dict[str, set[str]] = {}
    names = {item.importer for item in found}
    for item in found:
        if item.on_load and item.imported in names and item.imported != item.importer:
            graph.setdefault(item.importer, set()).add(item.imported)
    reach = {name: _reachable(name, graph) for name in names}
    return sorted({tuple(sorted(b for b in reach[a] if a in reach[b])) for a in names if a in reach[a]})


def _reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph.get(start, ()))
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph.get(name, ())
    return seen


# --- the checker can fail -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source", "word"),
    [
        ("photon/model.py", "import mllm3d.config", "model files"),
        ("photon/model.py", "def f():\n    import monai", "model files"),
        ("photon/recipes.py", "from med3dvlm import model", "each other"),
        ("photon/recipes/phases.py", "import deepspeed", "only mllm3d.training"),
        ("med3dvlm/model.py", "def f():\n    import timm", "only med3dvlm.slicewise"),
        ("photon/recipes/phases.py", "from mllm3d import cli", "recipes may import"),
        ("mllm3d/training/trainer.py", "from photon.model import Photon", "registry"),
        ("mllm3d/training/trainer.py", "from mllm3d.evaluation import scoring", "may import"),
        ("mllm3d/data/cache.py", "from mllm3d.cli import main", "may import"),
        ("mllm3d/data/cache.py", "from deepspeed import comm", "only mllm3d.training"),
        ("mllm3d/training/trainer.py", "import monai.transforms", "only mllm3d.data"),
        ("mllm3d/config/__init__.py", "from ..data import cache", "may import"),
    ],
)
def test_a_broken_rule_is_found(tmp_path, path, source, word):
    for name in ("mllm3d/evaluation/scoring.py", "mllm3d/cli.py", "mllm3d/data/cache.py", path):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / path).write_text(source)
    problems = broken_rules(all_imports(tmp_path))
    assert word in problems[0]
    importer = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert {problem.partition(":")[0] for problem in problems} == {importer}


def test_a_loop_is_found_only_among_imports_on_load(tmp_path):
    folder = tmp_path / "mllm3d" / "data"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("from mllm3d.data import b")
    (folder / "b.py").write_text("import mllm3d.data.c")
    (folder / "c.py").write_text("def late():\n    from mllm3d.data.a import x\n")
    assert loops(all_imports(tmp_path)) == []
    (folder / "c.py").write_text("try:\n    from mllm3d.data.a import x\nexcept ImportError:\n    x = None\n")
    assert loops(all_imports(tmp_path)) == [("mllm3d.data.a", "mllm3d.data.b", "mllm3d.data.c")]


# --- this repository ----------------------------------------------------------------------------------------


def test_imports_follow_the_rules():
    assert broken_rules(all_imports(ROOT)) == []


def test_every_room_has_a_rule():
    assert {room(name) for name in modules(ROOT) if name.startswith("mllm3d")} <= set(MAY_IMPORT)


def test_no_module_needs_itself():
    assert loops(all_imports(ROOT)) == []


def test_programs_beside_the_packages_leave_deepspeed_and_monai_alone():
    files = [path for name in OUTSIDE_THE_PACKAGES for path in [ROOT / name, *(ROOT / name).rglob("*.py")]]
    found = [item for path in files if path.is_file() for item in imports(str(path), path, set())]
    assert len(files) > len(OUTSIDE_THE_PACKAGES)
    assert [str(item) for item in found if item.top in ONLY_IN] == []


def test_imported_libraries_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {name.split(">")[0] for name in project["dependencies"]}
    declared |= {name.split(">")[0] for extra in project["optional-dependencies"].values() for name in extra}
    outside = [item for item in all_imports(ROOT) if item.top not in {"mllm3d", *MODELS}]
    third_party = {item.top for item in outside if item.top not in sys.stdlib_module_names}
    assert {DISTRIBUTIONS.get(name, name) for name in third_party} - declared == set()


def test_models_load_where_only_torch_transformers_and_einops_are():
    """Runs every model file but recipes.py with all other libraries blocked."""
    own = [name for name in modules(ROOT) if name.partition(".")[0] in MODELS]
    names = [name for name in own if not _is_recipes(name)]
    assert names
    blocked = [
        "mllm3d",
        "deepspeed",
        "monai",
        "torchvision",
        "timm",
        "nibabel",
        "SimpleITK",
        "blosc2",
        "omegaconf",
    ]
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
