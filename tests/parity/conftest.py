"""The small models of tests/photon serve here too."""

from tests.photon.conftest import tiny, tokenizer

__all__ = ["tiny", "tokenizer"]
