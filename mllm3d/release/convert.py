"""`mllm3d convert`: checkpoints that a model's authors published, to ours and back.

What a weight is called, and everything else about a model, its package knows (`mllm3d.registry.CONVERTERS`); here are
the files. A converted folder holds what the published one had in `published/`, so that the way back restores it:

    config.json, *.safetensors, ...   the model in our format; shards as they were published
    preprocessing.json                how the published model's volumes were prepared
    published/                        every other file of the published folder, byte for byte
    published/extras.safetensors      weights that our model has no place for, because nothing reads them

Weights go from file to file one shard at a time, in their own dtype. Where a library reads a format as a whole, its
`Reader` takes the place of all this.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from safetensors import SafetensorError, safe_open

from mllm3d.config import VolumeConfig
from mllm3d.errors import UserError
from mllm3d.registry import converter_class
from mllm3d.release.export import MODEL, PICKLES, PREPROCESSING
from mllm3d.rundirs import newest_step

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PUBLISHED, EXTRAS = "published", "extras.safetensors"
CONFIG, TEMPLATE, OLD_TEMPLATE = "config.json", "chat_template.jinja", "chat_template.json"
CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", TEMPLATE, "generation_config.json"),
)
"""Files that mean the same in both formats."""

SHOWN = 5
"""So many keys are named in an error."""

Shape = tuple[int, ...]


class Conversion(Protocol):
    """What happens to a model.

    config: text of the new config.json.
    names: weight of the source -> its name afterwards; None where the new format has no place for it.
    shapes: by the name afterwards; the numbers keep their order.
    equal: pairs of the source's weights that the model ties, so they must be equal.
    volume: how volumes are prepared, where that is not as the preset says.
    files: further files of the folder that `convert_to` writes, name -> text.
    """

    config: str
    names: dict[str, str | None]
    shapes: dict[str, Shape]
    equal: tuple[tuple[str, str], ...]
    volume: dict[str, Any]
    files: dict[str, str]


class Converter(Protocol):
    """What a model package offers in `mllm3d.registry.CONVERTERS`. Everything raises `ValueError` with one line.

    volume_preset: how the published model's volumes were prepared (`VolumeConfig.preset`).
    """

    volume_preset: str

    def from_published(self, folder: Path, shapes: dict[str, Shape]) -> Conversion:
        """How the published checkpoint in `folder` with weights of these shapes becomes ours."""
        ...

    def to_published(self, folder: Path, shapes: dict[str, Shape]) -> Conversion:
        """How our model in `folder` with weights of these shapes becomes one with the published names."""
        ...

    def complete(self, folder: Path) -> None:
        """Add the processor to a converted folder and check that it fits the model."""
        ...


@runtime_checkable
class Reader(Protocol):
    """In place of a `Converter`: a format that is read as a whole by a library, with no way back."""

    def read(self, source: Path, folder: Path) -> str:
        """Write the model in `source` into `folder`; returns what to tell the user. Raises `UserError`."""
        ...


@dataclass(frozen=True)
class Weights:
    """The weights of a folder, as the headers of their files have them: by name, the file and the shape."""

    files: dict[str, Path]
    shapes: dict[str, Shape]

    def names(self) -> list[str]:
        """Names of the files, in order."""
        return sorted({file.name for file in self.files.values()})


Layout = dict[str, dict[str, tuple[Path, str, Shape]]]
"""File to write -> weight in it -> the file and the name to read it by, and its new shape."""


def convert_from(name: str, source: Path, out: Path) -> Path:
    """Write `out`, a model of ours, from the published checkpoint in `source`. Returns `out`.

    Raises `UserError`, before anything is written, where `source` is not such a checkpoint or not all of it, and
    where `out` is not empty.
    """
    converter: Converter | Reader = converter_class(name)()
    if isinstance(converter, Reader):
        return _read_whole(converter, source, out)
    _check_folders(source, out)
    weights = read_weights(source)
    others = sorted(path for path in source.iterdir() if path.name not in (*weights.names(), CONFIG, INDEX))
    kept = [path for path in others if path.is_file() and path.suffix not in (*PICKLES, ".safetensors")]
    with _one_line(source):
        conversion = converter.from_published(source, weights.shapes)
        _check_equal(weights, conversion.equal)
    layout: Layout = {}
    extras: Layout = {}
    for key, new in conversion.names.items():
        file = weights.files[key]
        if new is None:
            extras.setdefault(EXTRAS, {})[key] = (file, key, weights.shapes[key])
        else:
            layout.setdefault(file.name, {})[new] = (file, key, conversion.shapes[new])
    with _draft(out) as folder:
        (folder / CONFIG).write_text(conversion.config, encoding="utf-8")
        _copy([path for path in kept if path.name in CARRIED], folder)
        _modern_template(source, folder)
        volume = VolumeConfig.model_validate({"preset": converter.volume_preset, **conversion.volume})
        (folder / PREPROCESSING).write_text(volume.model_dump_json(indent=2) + "\n", encoding="utf-8")
        with _one_line(source):
            converter.complete(folder)
        (folder / PUBLISHED).mkdir()
        _copy([source / CONFIG, *([source / INDEX] if (source / INDEX).is_file() else []), *kept], folder / PUBLISHED)
        _write(layout, folder, indexed=weights.names() != [WEIGHTS])
        _write(extras, folder / PUBLISHED, indexed=False)
    aside = [key for key, new in conversion.names.items() if new is None]
    _report(out, f"{len(weights.shapes)} weights of {source}, each accounted for", aside, set(others) - set(kept))
    return out


def convert_to(name: str, source: Path, out: Path) -> Path:
    """Write `out` with the published names from our model in `source`: a folder, a run, or one of its steps.

    A model that was converted before becomes what it was, tensor by tensor and file by file; another gets a
    config.json of the published kind. Raises `UserError` as `convert_from` does. Returns `out`.
    """
    converter: Converter | Reader = converter_class(name)()
    if isinstance(converter, Reader):
        raise UserError(f"--to {name}: this format is only read; give --from {name}, or name another format")
    _check_folders(source, out)
    if not (source / CONFIG).is_file():
        step = source if (source / MODEL).is_file() else newest_step(source, MODEL)
        source = (step / MODEL).parent
    weights = read_weights(source)
    with _one_line(source):
        conversion = converter.to_published(source, weights.shapes)
    before = source / PUBLISHED
    from_before = (before / CONFIG).is_file()
    layout = _way_back(weights, conversion, before) if from_before else _renamed(weights, conversion)
    others = sorted(path for path in source.iterdir() if path.name not in (*weights.names(), CONFIG, INDEX, PUBLISHED))
    carried = [path for path in others if path.name in CARRIED]
    with _draft(out) as folder:
        if from_before:
            _copy([path for path in before.iterdir() if path.name != EXTRAS], folder)
        else:
            (folder / CONFIG).write_text(conversion.config, encoding="utf-8")
            _copy(carried, folder)
            for file, text in conversion.files.items():
                (folder / file).write_text(text, encoding="utf-8")
        _write(layout, folder, indexed=len(layout) > 1 and not (folder / INDEX).is_file())
    left = set() if from_before else {path for path in others if path.name not in (*CARRIED, *conversion.files)}
    _report(out, f"{sum(map(len, layout.values()))} weights of {source}, each accounted for", [], left)
    return out


def _read_whole(reader: Reader, source: Path, out: Path) -> Path:
    _check_out(out)
    with _draft(out) as folder:
        done = reader.read(source, folder)
    _report(out, done, [], [])
    return out


def _renamed(weights: Weights, conversion: Conversion) -> Layout:
    """The same files with other names in them."""
    layout: Layout = {}
    for key, new in conversion.names.items():
        assert new is not None
        layout.setdefault(weights.files[key].name, {})[new] = (weights.files[key], key, conversion.shapes[new])
    return layout


def _way_back(weights: Weights, conversion: Conversion, before: Path) -> Layout:
    """The published files again, with the weights that were kept aside."""
    found = {
        new: (weights.files[key], key, conversion.shapes[new])
        for key, new in conversion.names.items()
        if new is not None
    }
    if (before / EXTRAS).is_file():
        extras = _headers([before / EXTRAS])
        found |= {key: (file, key, extras.shapes[key]) for key, file in extras.files.items()}
    if not (before / INDEX).is_file():
        return {WEIGHTS: found}
    places = _read_index(before / INDEX)
    if lost := sorted(places.keys() ^ found.keys()):
        raise UserError(f"{before / INDEX}: names other weights than the model has: {listed(lost)}; convert again")
    layout: Layout = {}
    for key, name in places.items():
        layout.setdefault(name, {})[key] = found[key]
    return layout


# --- reading ------------------------------------------------------------------------------------------------


def read_weights(folder: Path) -> Weights:
    """Names, files and shapes of a folder's weights. Raises `UserError` where a file is missing or damaged."""
    if (folder / WEIGHTS).is_file():
        return _headers([folder / WEIGHTS])
    if not (folder / INDEX).is_file():
        raise UserError(_no_weights(folder))
    places = _read_index(folder / INDEX)
    files = [folder / name for name in sorted(set(places.values()))]
    found = _headers([file for file in files if file.is_file()])
    missing = [key for key, name in places.items() if found.files.get(key) != folder / name]
    if missing:
        gone = [file.name for file in files if not file.is_file()]
        where = f"{', '.join(gone)}: not there, so" if gone else f"{INDEX} names them, but"
        raise UserError(f"{folder}: {where} {len(missing)} weights are missing: {listed(missing)}; download it again")
    return found


def _no_weights(folder: Path) -> str:
    """What a folder has instead of weights."""
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        return f"{folder / INDEX}: missing; download it to the other files"
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    if pickles:
        return (
            f"{folder}: only pickles ({listed(pickles)}), which can run code when loaded and so are never read; "
            "download the safetensors files, or convert the pickle on a machine that you trust (docs/convert.md)"
        )
    return f"{folder}: no weights ({WEIGHTS} or {INDEX}) in it; download the checkpoint again"


def _read_index(file: Path) -> dict[str, str]:
    """Weight -> name of its file."""
    try:
        places = dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
        if any(Path(name).name != name for name in places.values()):
            raise ValueError("a shard outside of the folder")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); download it again") from error
    return places


def _headers(files: Iterable[Path]) -> Weights:
    """Read no more than the headers."""
    found = Weights({}, {})
    for file in files:
        with _opened(file) as content:
            for key in content.keys():  # noqa: SIM118 (not a mapping)
                if key in found.files:
                    raise UserError(f"{file}: has {key}, as {found.files[key].name} has; download the folder again")
                found.files[key] = file
                found.shapes[key] = tuple(content.get_slice(key).get_shape())
    return found


@contextmanager
def _opened(file: Path) -> Iterator["safe_open"]:
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except SafetensorError as error:
        raise UserError(f"{file}: damaged ({error}); download it again") from error


def _check_equal(weights: Weights, pairs: Sequence[tuple[str, str]]) -> None:
    import torch

    for one, other in pairs:
        with _opened(weights.files[one]) as first, _opened(weights.files[other]) as second:
            if not torch.equal(first.get_tensor(one), second.get_tensor(other)):
                raise ValueError(f"{CONFIG} ties {one} to {other}, but they differ; set tie_word_embeddings to false")


# --- writing ------------------------------------------------------------------------------------------------


def _write(layout: Layout, folder: Path, indexed: bool) -> None:
    """Write files of weights, each with the metadata that the file it comes from had."""
    from safetensors.torch import save_file

    total = 0
    for name, contents in layout.items():
        with ExitStack() as stack:
            opened = {file: stack.enter_context(_opened(file)) for file, _, _ in contents.values()}
            metadata = next(iter(opened.values())).metadata()
            tensors: dict[str, Tensor] = {
                new: opened[file].get_tensor(key).reshape(shape) for new, (file, key, shape) in contents.items()
            }
            total += sum(tensor.nbytes for tensor in tensors.values())
            try:
                save_file(tensors, folder / name, metadata)
            except SafetensorError as error:
                raise OSError(f"{name}: {error}") from error
        (folder / name).chmod((folder / CONFIG).stat().st_mode)  # safetensors makes files for their owner alone
    if indexed:
        places = {key: name for name, contents in layout.items() for key in contents}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy(files: Iterable[Path], folder: Path) -> None:
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _modern_template(source: Path, folder: Path) -> None:
    """Older versions of the library keep the chat template in a file that tokenizers of today do not read."""
    file = source / OLD_TEMPLATE
    if not file.is_file() or (folder / TEMPLATE).is_file():
        return
    try:
        template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged; download it again") from error


@contextmanager
def _draft(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes it if all goes well."""
    temporary = out.absolute().parent / f".{out.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(out)  # also onto an empty folder
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; nothing was converted") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- what the user reads ------------------------------------------------------------------------------------


def _check_folders(source: Path, out: Path) -> None:
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; download the checkpoint first")
    _check_out(out)


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already and is not empty; name another folder")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: its parent folder does not exist; create it first")


@contextmanager
def _one_line(source: Path) -> Iterator[None]:
    """What a model package says of a folder."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from error


def listed(names: Sequence[str]) -> str:
    """The first few of them and how many there are more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _report(out: Path, done: str, aside: Sequence[str], left: Iterable[Path]) -> None:
    print(f"{out}: {done}")
    if aside:
        print(f"kept in {PUBLISHED}/{EXTRAS}, because nothing reads them: {', '.join(aside)}")
    pickles = sorted(path.name for path in left if path.suffix in PICKLES)
    others = sorted(path.name for path in left if path.suffix not in PICKLES)
    if pickles:
        print(f"not carried over, because pickles can run code when loaded: {', '.join(pickles)}")
    if others:
        print(f"not carried over: {', '.join(others)}")
