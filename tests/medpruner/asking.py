"""What tests of the adapter share: loading, asking, refusing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from medpruner.recipes.adapter import SlicewiseAdapter
from mllm3d.errors import UserError
from mllm3d.inference.adapter import RawAnswer


def load(folder: Path) -> SlicewiseAdapter:
    return SlicewiseAdapter.load(folder, torch.device("cpu"), torch.float32)


def texts(answers: Sequence[RawAnswer]) -> list[str]:
    return [answer.text for answer in answers]


def generated(adapter: SlicewiseAdapter, inputs: dict[str, Any]) -> list[str]:
    """The library's own, of inputs in which each row has pixels of its own."""
    out = adapter.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    found = adapter.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in found]


def refused(call: Any) -> str:
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    return text
