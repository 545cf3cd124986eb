"""Slice-wise models of the transformers library, whole and pruned, behind the framework's inference interface."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_type_hints

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer, StoppingCriteriaList

import medpruner
from medpruner.pruner import Pruner
from medpruner.recipes.gemma import GemmaReader
from medpruner.recipes.qwen import QwenReader
from medpruner.recipes.reader import Reader, Shown
from medpruner.recipes.sharing import Memory, SharedTower
from medpruner.recipes.slicewise import FILE, read_slicewise
from medpruner.settings import METHODS, PruningSettings, Random, Uniform, settings_of
from medpruner.slices import Report
from mllm3d.errors import UserError
from mllm3d.inference.adapter import Mode, RawAnswer
from mllm3d.inference.checkpoint import open_checkpoint
from mllm3d.inference.generation import Clock, answer_length, question_seed
from mllm3d.training.huggingface import without_reports

READERS: dict[str, type[Reader]] = {"gemma3": GemmaReader, "qwen2_5_vl": QwenReader, "qwen3_vl": QwenReader}
"""By `model_type`: how volumes and questions become a model's inputs."""

WHOLE = Uniform(keep=1.0)
"""Every slice and every token: what the model sees is what it sees unpruned."""


@dataclass
class SlicewiseAdapter:
    """A slice-wise model behind `mllm3d.inference.adapter.Adapter`.

    The tower runs once for all questions of a call, whatever is pruned; the choice of tokens, the prefill and the
    decoding are each question's own, as the library has no prefix that rows share.

    Attributes:
        settings: of the pruner; None: all tokens stay in every mode.
        report: what the last call kept, and how long it took.
    """

    model: Any
    tokenizer: Any
    reader: Reader
    settings: PruningSettings | None = None
    report: Report | None = None

    @classmethod
    def load(cls, directory: Path, device: torch.device, dtype: torch.dtype) -> Self:
        """Strict: weights that do not fit raise `UserError`."""
        volume = open_checkpoint(directory).volume
        settings = read_slicewise(directory)
        try:
            with without_reports():
                model = _strictly(directory, dtype)
                tokenizer = AutoTokenizer.from_pretrained(directory)
            kind = model.config.model_type
            if settings.text_after == "maximum" and kind != "qwen2_5_vl":
                raise ValueError(f"{FILE}: text_after: maximum is for qwen2_5_vl, not for {kind}; take it out")
            reader = READERS[kind](model.config, tokenizer, settings, volume)
        except (OSError, ValueError, SafetensorError, UserError) as error:
            raise UserError(f"{directory}: {' '.join(str(error).split())}") from error
        return cls(model.to(device).eval(), tokenizer, reader)

    def prune_with(self, name: str, values: Mapping[str, Any]) -> None:
        """Prune by this method of `medpruner.METHODS` from now on; `gamma_unit: hu` knows the volumes' window.

        Raises `UserError` for a method or setting that is not there, or a value that is not allowed.
        """
        given = dict(values)
        try:
            if name in METHODS:
                _check_types(name, given)
            if given.get("gamma_unit") == "hu" and "hu_per_pixel" not in given:
                given["hu_per_pixel"] = self.reader.hu_per_pixel
            self.settings, before = settings_of(name, given), self.settings
            try:
                self._attach(self.settings)
            except ValueError:
                self.settings = before
                self._attach(before)
                raise
        except ValueError as error:
            text = str(error)
            raise UserError(text if text.startswith("pruner ") else f"pruner {name}: {text}") from error

    def _attach(self, settings: PruningSettings | None) -> None:
        """Exchange what is attached; None: nothing from now on."""
        if getattr(self.model, "medpruner", None) is not None:
            medpruner.detach(self.model)
        if settings is not None:
            medpruner.attach(self.model, settings)

    @contextmanager
    def _pruning(self, settings: PruningSettings, rows: int, memory: Memory) -> Iterator[Pruner]:
        """The model under these settings for a call of so many questions about the same volumes."""
        self._attach(settings)
        pruner: Pruner = self.model.medpruner
        shared: Any = SharedTower(pruner.backbone, rows, memory, self.reader.settings.text_after)
        pruner.backbone = shared  # a backbone by delegation, which a type checker cannot see
        try:
            yield pruner
        finally:
            self._attach(self.settings)

    # --- answers ------------------------------------------------------------------------------------------

    def answer(
        self, volumes: Sequence[np.ndarray], questions: Sequence[str], mode: Mode, max_new_tokens: int, seed: int
    ) -> list[RawAnswer]:
        """Greedy answers.

        mode: `none` keeps all tokens. `random` keeps of each slice the share that `scheduled` keeps of all tokens, at
        least one, drawn for each question; its questions are asked one by one. The others are `scheduled`: there is
        nothing that could be noisy, and dropped tokens have no keys and values.
        """
        start = time.perf_counter()
        memory: Memory = {}
        with torch.inference_mode():
            shown = self._on_device(self.reader.show(volumes))
            if mode != "random" or self.settings is None:
                settings = WHOLE if mode == "none" or self.settings is None else self.settings
                return self._generate(settings, shown, questions, max_new_tokens, start, memory)
            rate = self._rate(shown, questions[:1], memory)
            shared = time.perf_counter() - start
            answers = []
            for question in questions:
                drawn = Random(keep=rate, seed=question_seed(seed, question))
                begin = time.perf_counter() - shared
                answers += self._generate(drawn, shown, [question], max_new_tokens, begin, memory)
        return answers

    def _rate(self, shown: Shown, question: Sequence[str], memory: Memory) -> float:
        """Share of all tokens that the pruner keeps of these volumes, whatever is asked about them."""
        assert self.settings is not None
        with self._pruning(self.settings, 1, memory) as pruner:
            pruner.prune(self._inputs(shown, question))
            assert pruner.report is not None
            return pruner.report.rate

    def _generate(
        self,
        settings: PruningSettings,
        shown: Shown,
        questions: Sequence[str],
        max_new_tokens: int,
        start: float,
        memory: Memory,
    ) -> list[RawAnswer]:
        """One call of `generate`; start: when its clock began."""
        clock = Clock()
        clock.start = start
        inputs = self._inputs(shown, questions)
        ends = self._ends()
        with self._pruning(settings, len(questions), memory) as pruner:
            generated = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        assert pruner.report is not None
        self.report = pruner.report
        kept = self._kept(pruner.report, len(questions))
        new = generated[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = [answer_length(row, ends) for row in new]
        texts = self.tokenizer.batch_decode(
            [row[:n] for row, n in zip(new, lengths, strict=True)], skip_special_tokens=True
        )
        report = pruner.report
        rates = {"slices": report.slice_rate, "tokens": report.token_rate, "overall": report.rate}
        of_call = (None if settings is WHOLE else rates, _phases(report, clock, max(lengths)))
        return [
            RawAnswer(text.strip(), len(k), int(k.sum()), n, clock.until(0), clock.until(n - 1), k, *of_call)
            for text, n, k in zip(texts, lengths, kept, strict=True)
        ]

    def _inputs(self, shown: Shown, questions: Sequence[str]) -> dict[str, Any]:
        inputs = self.reader.ask(shown, questions)
        return {k: v.to(self.model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}

    def _on_device(self, shown: Shown) -> Shown:
        # In float32: small differences between slices count, and the tower rounds by itself.
        return Shown(shown.pixels.to(self.model.device), shown.grids)

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        given = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return sorted({*given, self.tokenizer.eos_token_id})

    @staticmethod
    def _kept(report: Report, rows: int) -> list[np.ndarray]:
        """Of each row which tokens stayed, volume by volume, in the order of their boxes."""
        per_row = len(report.volumes) // rows
        masks = [volume.tokens.flatten().numpy() for volume in report.volumes]
        return [np.concatenate(masks[r * per_row : (r + 1) * per_row]) for r in range(rows)]

    def token_boxes(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Voxel boxes of a volume's tokens, in their order; boxes may reach past the volume's end."""
        return self.reader.boxes(shape)


def _phases(report: Report, clock: Clock, tokens: int) -> dict[str, float]:
    """Seconds of a call's parts. Cutting the volume into patches and building prompts count as prefill."""
    tower, pruner = report.seconds["tower"], report.seconds["pruner"]
    first, last = clock.until(0), clock.until(tokens - 1)
    return {"tower": tower, "pruner": pruner, "prefill": first - tower - pruner, "decode": last - first}


def _strictly(directory: Path, dtype: torch.dtype) -> Any:
    """`from_pretrained` that fails where the library would leave a weight random or unused."""
    model, report = AutoModelForImageTextToText.from_pretrained(
        directory,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in `report` instead of raised
    )
    wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if wrong:
        named = "; ".join(f"{name.replace('_', ' ')}: {', '.join(keys[:5])}" for name, keys in wrong.items())
        raise ValueError(f"the weights do not fit config.json ({named}); copy or export the checkpoint again")
    return model


def _check_types(name: str, values: Mapping[str, Any]) -> None:
    """Each value against its field's type; names that are not known are left to `settings_of`."""
    hints = get_type_hints(METHODS[name])
    for key, value in values.items():
        if key not in METHODS[name].__dataclass_fields__:
            continue
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(f"{key}: {error.errors()[0]['msg']}, got {value!r}") from error
