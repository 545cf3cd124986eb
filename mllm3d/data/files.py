"""Writing files so that another process sees the old one or the new one, never half of it."""

import os
import secrets
from pathlib import Path


def write_atomically(file: Path, data: bytes) -> None:
    """Write `data` under a temporary name beside `file` and rename. On OSError nothing is left behind."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
