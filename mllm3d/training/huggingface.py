"""Model folders of the transformers library: what recipes write."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging


@contextmanager
def without_bars() -> Iterator[None]:
    """Files on this machine are read and written without the library's progress bars, which break up the run's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def without_reports() -> Iterator[None]:
    """No tables of a checkpoint's keys that are not wanted: what is missing is checked where this is used."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        logging.set_verbosity(before)


def save_pretrained(module: nn.Module, processor: Any, state_dict: dict[str, Tensor] | None, directory: Path) -> None:
    """Model and processor into an existing folder. `state_dict`: weights, where the module does not hold them itself.

    Raises `OSError` where the folder does not take them.
    """
    with without_bars():
        module.save_pretrained(directory, state_dict=state_dict)  # type: ignore[operator]
    try:
        processor.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library has no other for a full disk
        raise OSError(f"{directory / 'tokenizer.json'}: {error}") from error
