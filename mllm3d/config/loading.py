"""Reading a config: YAML with line numbers, `extends:`, overrides, presets, and where each value came from.

YAML is read as YAML 1.2's core schema (`1e-4` is a number, `yes` is a string) from the composed nodes,
because the nodes know their lines and show duplicate keys; no tag can make anything but plain values.
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError, create_model

from mllm3d.config.messages import KeyPath, dotted, error_lines, leaves
from mllm3d.config.sections import PRESETS, Config, EvaluatedSettings, Settings
from mllm3d.errors import UserError
from mllm3d.registry import recipe_class

MAX_DEPTH = 16
NAMED = (("model", "encoder"), ("evaluation", "pruner"))
"""Mappings whose `name` says which other keys there are: with another name they are replaced, not merged."""
NOT_TRAINED: dict[str, Any] = {"max_steps": 1, "optimizer": {"lr": 1.0}}
"""What stands for `training` where a recipe only evaluates: nothing reads it."""


@dataclass
class Layer:
    """Values of one file or of the command line, and the `file:line` of each key."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """A config, the file it was read from, and the origin of every value (`section.key` -> text)."""

    config: Config
    source: Path
    origins: dict[str, str]


def load(name: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a config by path or by its name in configs/ and apply `section.key=value` overrides.

    Raises `UserError` with one line per mistake, all mistakes at once.
    """
    return load_with_origins(name, overrides).config


def load_with_origins(name: str | Path, overrides: list[str] | None = None) -> Loaded:
    """Like `load`, and also says for every value where it came from."""
    source = find_config(name)
    layer = _read_with_parents(source, seen=())
    for text in overrides or []:
        layer = _merge(layer, _parse_override(text))
    values = _resolve_references(layer)
    run = values.setdefault("run", {})
    if isinstance(run, dict) and run.get("output") is None:
        run["output"] = str(Path("runs") / run_name(source))
    config = _validate(values, layer, source)
    return Loaded(config, source, _origins_of_values(config, layer))


def read_values(texts: Sequence[str], option: str) -> dict[str, Any]:
    """`KEY=VALUE` texts of a command line's option, each value as a config has it. Raises `UserError`."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{option} {text!r}: must look like KEY=VALUE")
        if key.strip() in found:
            raise UserError(f"{option} {text!r}: {key.strip()} is given twice; keep one")
        found[key.strip()] = _parse(f"value: {value}", option).values["value"]
    return found


def find_config(name: str | Path) -> Path:
    """The file that `--config NAME` means: a path, or a name in configs/ with or without `.yaml`."""
    folders = [Path(), Path("configs"), _checkout() / "configs"]
    for folder in folders:
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    raise UserError(f"config {str(name)!r}: no such file, and no such name in configs/{_known_configs(str(name))}")


def run_name(source: Path) -> Path:
    """Name of a run: the config's path within configs/ without `.yaml`, or its stem elsewhere."""
    parts = source.resolve().with_suffix("").parts
    if "configs" in parts[:-1]:
        return Path(*parts[len(parts) - parts[::-1].index("configs") :])
    return Path(parts[-1])


def config_to_yaml(config: Config) -> str:
    """YAML with every value written out, but without `volume` if that is not given; `load` gives an equal config."""
    return yaml.dump(
        _escaped(config.model_dump(mode="json", exclude=None if config.prepares_volumes else {"volume"})),
        Dumper=_CoreDumper,
        sort_keys=False,
        default_flow_style=None,
        width=110,
    )


def _escaped(value: Any) -> Any:
    r"""Values whose strings are read back as they are: `${` becomes `\${`, backslashes before it double."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _checkout() -> Path:
    return Path(__file__).resolve().parents[2]


def _known_configs(name: str) -> str:
    root = _checkout() / "configs"
    known = sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    near = difflib.get_close_matches(name.removesuffix(".yaml"), known, n=1)
    return f"; did you mean {near[0]}?" if near else f" ({', '.join(known)})"


# --- reading ------------------------------------------------------------------------------------------------


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core schema: no `yes`/`on` booleans, octals, base-60 numbers or dates."""

    yaml_implicit_resolvers: dict[Any, Any] = {}


class _CoreDumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_CoreLoader` would not read as a string."""

    yaml_implicit_resolvers: dict[Any, Any] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    for _class in (_CoreLoader, _CoreDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> Layer:
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(str(p.name) for p in (*seen, path))}")
    layer = _read_file(path)
    if "extends" not in layer.values:
        return layer
    where = layer.origins.pop(("extends",))
    parent = layer.values.pop("extends")
    if not isinstance(parent, str):
        raise UserError(f"{where}: extends: the path of one file is needed, got {parent!r}")
    parent_path = path.parent / parent
    if not parent_path.is_file():
        raise UserError(f"{where}: extends: no such file: {parent_path}; the path is relative to {path.parent}")
    return _merge(_read_with_parents(parent_path, (*seen, path.resolve())), layer)


def _read_file(path: Path) -> Layer:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return _parse(text, str(path))


def _parse(text: str, source: str) -> Layer:
    layer = Layer()
    problems: list[str] = []
    try:
        reader = _CoreLoader(text)
        node = reader.get_single_node()
        if node is None:
            return layer
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{source}:1: a mapping (`key: value` lines) is needed at the top")
        layer.values = _plain(node, (), source, reader, layer.origins, problems)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{source}:{line}: not valid YAML: control character {error.character!r}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    if problems:
        raise UserError("\n".join(problems))
    return layer


def _plain(
    node: yaml.Node,
    path: KeyPath,
    source: str,
    reader: _CoreLoader,
    origins: dict[KeyPath, str],
    problems: list[str],
) -> Any:
    """The plain value of a node; notes the line of every key, and duplicate or odd keys as problems."""
    if len(path) > MAX_DEPTH:
        raise UserError(f"{source}:{node.start_mark.line + 1}: {dotted(path)}: nested too deeply")
    if isinstance(node, yaml.CollectionNode) and node.tag not in (
        "tag:yaml.org,2002:map",
        "tag:yaml.org,2002:seq",
    ):
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag!r} is not allowed", problem_mark=node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), source, reader, origins, problems) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return reader.construct_object(node)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else str(key_node.value)
        here = (*path, key)
        if here in origins:
            first = origins[here].rpartition(":")[2]
            problems.append(f"{source}:{line}: {dotted(here)}: given twice (first in line {first}); keep one")
            continue
        origins[here] = f"{source}:{line}"
        values[key] = _plain(value_node, here, source, reader, origins, problems)
    return values


def _parse_override(text: str) -> Layer:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"override {text!r}: must look like section.key=value")
    origin = "command line"
    layer = _parse(f"value: {value}", origin)
    nested: Any = layer.values.get("value")
    inner = {(*parts, *path[1:]): origin for path in layer.origins}
    for part in reversed(parts):
        nested = {part: nested}
    outer = {tuple(parts[:i]): origin for i in range(1, len(parts) + 1)}
    return Layer(nested, outer | inner)


def _merge(parent: Layer, child: Layer) -> Layer:
    """Child over parent: mappings key by key, everything else (lists too) replaced."""
    parent = _without_others(parent, child)
    cleared = [path for path in child.origins if _at(child.values, path) is None]
    kept = {path: origin for path, origin in parent.origins.items() if not any(path[: len(c)] == c for c in cleared)}
    origins = kept | child.origins
    with _references_named(origins):
        merged = OmegaConf.merge(OmegaConf.create(parent.values), OmegaConf.create(child.values))
        values = OmegaConf.to_container(merged, resolve=False)
    assert isinstance(values, dict)
    return Layer({str(key): value for key, value in values.items()}, origins)


def _without_others(parent: Layer, child: Layer) -> Layer:
    """The parent without what is `NAMED` otherwise in the child: another encoder's settings are not for this one."""
    for section, key in NAMED:
        name = (section, key, "name")
        if name in child.origins and name in parent.origins and _at(child.values, name) != _at(parent.values, name):
            parent = _merge(parent, Layer({section: {key: None}}, {(section, key): "replaced"}))
    return parent


def _at(values: Any, path: KeyPath) -> Any:
    for key in path:
        values = values[key]
    return values


def _resolve_references(layer: Layer) -> dict[str, Any]:
    """Values with `${section.key}` (of a key that is given) and `${oc.env:NAME}` filled in."""
    with _references_named(layer.origins):
        values = OmegaConf.to_container(OmegaConf.create(layer.values), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


@contextmanager
def _references_named(origins: dict[KeyPath, str]) -> Iterator[None]:
    """OmegaConf's errors about `${...}` as one line each."""
    try:
        yield
    except OmegaConfBaseException as error:
        path = tuple((error.full_key or "").split("."))
        where = origins.get(path, "config")
        raise UserError(f"{where}: {dotted(path)}: {str(error).splitlines()[0]}") from error


# --- checking -----------------------------------------------------------------------------------------------


def _validate(values: dict[str, Any], layer: Layer, source: Path) -> Config:
    """Check values against `Config` with the recipe's own `Settings` for `model`."""
    settings = _model_settings(values, layer)
    typed = create_model("Config", __base__=Config, model=(settings, ...))
    values.setdefault("model", {})
    if issubclass(settings, EvaluatedSettings):
        values.setdefault("training", NOT_TRAINED)
    if values.get("volume") is None:  # `volume: null` clears a parent's
        values.pop("volume", None)
    try:
        # Through JSON: pydantic's strict mode then takes a list for a tuple and a string for a path.
        checked = typed.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise UserError("\n".join(error_lines(error, typed, values, layer.origins, str(source)))) from error
    # As a plain Config: the class made above exists only here, and could not be pickled for a worker process.
    fields = {name: getattr(checked, name) for name in Config.model_fields}
    return Config.model_construct(checked.model_fields_set, **fields)


def _model_settings(values: dict[str, Any], layer: Layer) -> type[Settings]:
    recipe = values.get("recipe")
    if not isinstance(recipe, str):
        return Settings  # the missing or wrong `recipe` is reported with everything else
    try:
        settings: type[Settings] = recipe_class(recipe).Settings
    except UserError as error:
        raise UserError(f"{layer.origins.get(('recipe',), 'recipe')}: {error}") from None
    return settings


def _origins_of_values(config: Config, layer: Layer) -> dict[str, str]:
    """Origin of each leaf of the resolved config: a file's line, an override, a preset or the default."""
    preset = PRESETS.get(config.volume.preset or "", {})
    origins: dict[str, str] = {}
    for path in leaves(config.model_dump(mode="json")):
        if path in layer.origins:
            origins[dotted(path)] = layer.origins[path]
        elif path[0] == "volume" and path[1] in preset:
            origins[dotted(path)] = f"preset {config.volume.preset}"
        else:
            origins[dotted(path)] = "default"
    return origins
