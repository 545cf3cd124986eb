"""Time, peak memory and a profile by parts of a model, on the CPU and on a GPU. Used by the programs beside it."""

import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mllm3d.evaluation.tables import markdown_table

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr when it starts and stops

Run = Callable[[], Any]


def machine(device: torch.device) -> str:
    """What a time was measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def seconds(run: Run, device: torch.device) -> float:
    """How long ``run`` takes: on a GPU until all its kernels have ended, on the CPU in seconds of this process.

    The process' own CPU time is blind to what else the machine does, but for shared caches and clocks.
    """
    start = now(device)
    run()
    return now(device) - start


def now(device: torch.device) -> float:
    """Seconds of this process; with a GPU those of a clock, once all that was asked of it is done."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one; a single value is both."""
    low, *_, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 2
    return low, high


def peak_bytes(run: Run, device: torch.device) -> int:
    """Most that ``run`` holds at once beyond what is there when it begins: activations, caches, logits, scratch.

    On a GPU by the caching allocator's own count. The CPU's allocator keeps none, but the profiler sees each of its
    allocations, kernels' scratch included; what math libraries allocate for themselves is not among them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = most = 0
    for _, size in changes:
        held += size
        most = max(most, held)
    return most


# --- where the time goes -----------------------------------------------------------------------------------------

REGION = "region: "
ATTENTION = ("scaled_dot_product", "flash_att", "FlashAtt", "efficient_attention", "varlen", "flex_attention")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::dot", "aten::mv")
KINDS = ("matrix products", "attention", "other")


class Part(NamedTuple):
    """A callable attribute of an object, and under which name its time is counted."""

    owner: Any
    attribute: str
    region: str


@contextmanager
def around(part: Part, manager: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Each call of ``part`` runs in a context of its own."""
    function = getattr(part.owner, part.attribute)

    @wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with manager():
            return function(*args, **kwargs)

    setattr(part.owner, part.attribute, marked)
    try:
        yield
    finally:
        delattr(part.owner, part.attribute)  # uncovers the class's


def named(part: Part) -> AbstractContextManager[None]:
    """The time of ``part`` carries its name; parts within parts have their own."""
    return around(part, partial(record_function, REGION + part.region))


@contextmanager
def clocked(parts: Iterable[Part], device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds in each part by its name, as `seconds` counts them; what is within a part counts for both."""
    spent: dict[str, float] = {}

    @contextmanager
    def counted(name: str) -> Iterator[None]:
        start = now(device)
        yield
        spent[name] = spent.get(name, 0.0) + now(device) - start

    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(around(part, partial(counted, part.region)))
        yield spent


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _kind(event: Any) -> str:
    names = [e.name for e in _ancestors(event)]
    if any(word in name for name in names for word in ATTENTION):
        return "attention"
    return "matrix products" if any(name in PRODUCTS for name in names) else "other"


def _region(event: Any) -> str | None:
    return next((e.name.removeprefix(REGION) for e in _ancestors(event) if e.name.startswith(REGION)), None)


@dataclass
class Spent:
    """Seconds of one part of a model by kind of work, and FLOPs of its matrix products (without attention)."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    flops: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def rate(self) -> float:
        """FLOPs a second in matrix products; 0 without any."""
        spent = self.seconds[KINDS[0]]
        return self.flops / spent if spent else 0.0


def profile_parts(run: Run, parts: Iterable[Part], device: torch.device) -> dict[str, Spent]:
    """What ``run`` spends by part of the model and kind of work; on a GPU the time of kernels.

    What a backward pass does counts for the part whose forward operation it belongs to (autograd numbers both alike).
    What no part covers is under ``rest``, gradients of parameters that are added up among it.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(named(part))
        run()  # warm
        with profile(activities=activities, with_flops=True) as profiled:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    events: list[Any] = [e for e in profiled.events() if e.device_type == DeviceType.CPU]
    forward = {e.sequence_nr: region for e in events if e.sequence_nr >= 0 and (region := _region(e))}
    found: dict[str, Spent] = defaultdict(Spent)
    for event in events:
        numbers = (e.sequence_nr for e in _ancestors(event) if e.sequence_nr >= 0)
        region = _region(event) or next((forward[n] for n in numbers if n in forward), "rest")
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        found[region].seconds[_kind(event)] += spent / 1e6
        found[region].flops += event.flops or 0
    return dict(found)


def show_table(title: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """As markdown with even columns."""
    cells = [header, *lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [
        [x.rjust(n) if i else x.ljust(n) for i, (x, n) in enumerate(zip(row, widths, strict=True))] for row in cells
    ]
    print(f"\n{title}\n", *markdown_table(aligned[0], aligned[1:]), sep="\n")
