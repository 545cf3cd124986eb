"""`mllm3d doctor`: what is installed, which accelerator is there, and whether the two fit together."""

import importlib.util
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from mllm3d.errors import UserError

Build = Literal["cpu", "cuda", "any"]
CORE = ("transformers", "deepspeed", "monai", "peft", "einops", "safetensors")
OPTIONAL = ("timm", "flash-attn")


def report() -> list[tuple[str, str]]:
    """What a bug report should say: (what, state) pairs."""
    rows = [
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("mllm3d", installed("mllm3d")),
    ]
    rows += [
        ("torch", torch_build()),
        ("accelerator", accelerator()),
        ("cpu", f"{len(os.sched_getaffinity(0))} cores"),
    ]
    rows += [(name, installed(name)) for name in (*CORE, *OPTIONAL)]
    rows += [("attention", attention_backends()), ("deepspeed ops", deepspeed_ops())]
    return rows


def check_install(expected: Build) -> str:
    """One line about torch. Raises `UserError` if the build is not the one that the set-up chose."""
    found = "cuda" if _torch_cuda() else "cpu"
    if expected != "any" and found != expected:
        raise UserError(
            f"torch {installed('torch')}: the {found} build, but the set-up chose the {expected} build; "
            "another package replaced it: run make clean, then install only with -c constraints.txt"
        )
    if found == "cuda" and not gpus():
        return f"torch {torch_build()}; no GPU here, so it runs on the CPU"
    return f"torch {torch_build()}; {accelerator()}"


def installed(package: str) -> str:
    """Version of a package, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def torch_build() -> str:
    """For example `2.13.0+cpu (CPU build)`."""
    cuda = _torch_cuda()
    return f"{installed('torch')} ({f'CUDA {cuda} build' if cuda else 'CPU build'})"


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the driver shows, whatever torch can do with them."""
    if shutil.which("nvidia-smi") is None:
        return []
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return found.stdout.strip().splitlines() if found.returncode == 0 else []


def accelerator() -> str:
    """What torch computes on, and what it leaves unused."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in names)
    present = gpus()
    return f"CPU, though there is a GPU that this torch cannot use: {present[0]}" if present else "CPU"


def attention_backends() -> str:
    """Ways to compute attention here, the default first."""
    import torch

    found = []
    if torch.cuda.is_available():
        if importlib.util.find_spec("flash_attn"):
            found.append("flash-attn 2")
        if importlib.util.find_spec("torch.nn.attention.varlen"):
            found.append("torch varlen")
    return ", ".join([*found, "sdpa"])


def deepspeed_ops() -> str:
    """Whether DeepSpeed's own kernels could be compiled (the default settings need none of them)."""
    tools = {name: shutil.which(name) for name in ("nvcc", "g++", "ninja")}
    missing = [name for name, path in tools.items() if path is None]
    return f"cannot be compiled, no {', '.join(missing)}; none is needed" if missing else "compiled when asked for"


def _torch_cuda() -> str | None:
    try:
        from torch.version import cuda
    except ImportError as error:
        raise UserError(f"torch: cannot be imported ({error}); run make install") from error
    return cuda
