"""`mllm3d convert --from gguf`: a language model in llama.cpp's format as a Hugging Face folder.

transformers reads the file; its weights, often stored in 4 or 8 bits, become float32. What is written is an ordinary
model: nothing in it says that it was quantized, so it loads without the package `gguf` and every weight can train.
"""

import re
from hashlib import file_digest
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from mllm3d.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MAGIC = b"GGUF"
SHOWN = 3
"""So many weights are named in an error."""


class Gguf:
    """`mllm3d.release.convert.Reader` for a .gguf file, or a folder with one in it."""

    def _file(self, source: Path) -> Path:
        """The file. Raises `UserError` where it is not one of that format, or `gguf` is not installed."""
        file = source
        if source.is_dir():
            files = sorted(source.glob("*.gguf"))
            if len(files) != 1:
                names = ", ".join(file.name for file in files)
                raise UserError(f"{source}: {len(files)} .gguf files in it{names and f' ({names})'}; name the file")
            file = files[0]
        if not file.is_file():
            raise UserError(f"{file}: no such file; name a .gguf file, or a folder with one in it")
        with file.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{file}: does not begin as a GGUF file does; download it again, or name another")
        if find_spec("gguf") is None:
            raise UserError("--from gguf: needs the package gguf; pip install gguf, or install with the extra gguf")
        return file

    def read(self, source: Path, folder: Path) -> str:
        """Write model, tokenizer and README.md into `folder`; returns what was done.

        Raises `UserError` for a file that is damaged, not all of a model, or a model that transformers cannot read.
        """
        file = self._file(source)
        try:
            facts = _facts(file)
            model, tokenizer = _read(file)
        except UserError:
            raise
        except (ValueError, KeyError, IndexError, TypeError, OSError, NotImplementedError, RuntimeError) as error:
            # Whatever the two libraries come across in a file that is cut short or of a model that they do not know.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{file}: cannot be read ({reason}); download it again, or name another model") from error
        try:
            _plain(model.config).save_pretrained(folder, state_dict=model.state_dict())
        except SafetensorError as error:
            raise OSError(f"weights: {error}") from error
        tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):
            weights.chmod((folder / "config.json").stat().st_mode)  # safetensors makes files for their owner alone
        (folder / "README.md").write_text(_card(file, facts), encoding="utf-8")
        return f"{facts['name']}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M weights of {file} in float32"


def _read(file: Path) -> tuple["PreTrainedModel", Any]:
    """Model in float32, and tokenizer. Raises `UserError` where it is no whole causal language model."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

    named = {"gguf_file": file.name}
    config = AutoConfig.from_pretrained(file.parent, **named)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{file}: a {config.model_type}, which is no causal language model; name another")
    model, report = AutoModelForCausalLM.from_pretrained(
        file.parent, config=config, dtype=torch.float32, output_loading_info=True, **named
    )
    if missing := sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])}):
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise UserError(
            f"{file}: not all of a model: {', '.join(missing[:SHOWN])}{more} missing or of another shape; "
            "join the parts of a split file with llama.cpp's llama-gguf-split --merge, or download it again"
        )
    return model, AutoTokenizer.from_pretrained(file.parent, **named)


def _plain(config: "PreTrainedConfig") -> "PreTrainedModel":
    """A model without weights to save them by: one that was read from GGUF says it is quantized and cannot be saved."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config.to_dict()
    values.pop("quantization_config", None)
    with torch.device("meta"):
        found: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
    return found


def _facts(file: Path) -> dict[str, str]:
    """What the file says of itself: name, organization, license, and how weights are stored."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    found = {}
    for key in ("name", "organization", "license"):
        field = reader.fields.get(f"general.{key}")
        found[key] = "" if field is None else " ".join(str(field.contents()).split())
    found["name"] = found["name"] or file.stem
    found["stored"] = ", ".join(sorted({tensor.tensor_type.name for tensor in reader.tensors}))
    return found


def _card(file: Path, facts: dict[str, str]) -> str:
    """README.md: whose model it is, its license, and which file it came from."""
    with file.open("rb") as stream:
        digest = file_digest(stream, "sha256").hexdigest()
    license_name = facts["license"]
    front = f"---\nlicense: {license_name}\n---\n\n" if re.fullmatch(r"[\w.+-]+", license_name) else ""
    whose = f" by {facts['organization']}" if facts["organization"] else ""
    return (
        f"{front}# {facts['name']}\n\nA language model{whose}. License: {license_name or 'not said in the file'}.\n\n"
        f"Read from `{file.name}` (sha256 {digest}) with `mllm3d convert --from gguf`. Weights were stored as "
        f"{facts['stored']} and are float32 here.\n"
    )
