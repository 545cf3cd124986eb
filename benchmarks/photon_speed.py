"""What the 3D patch embedding, dropping and sharing a volume save, beside what counting FLOPs predicts.

    python benchmarks/photon_speed.py                        a small model, on the CPU: ten minutes of one core
    python benchmarks/photon_speed.py --device cuda          Photon 3B with random weights in bfloat16
    python benchmarks/photon_speed.py --profile c            where the time of one variant goes
    python benchmarks/photon_speed.py --quick                whether the program works; its ratios say nothing

One model, whose patch embedding is changed, reads a volume of 140 x 280 x 280 voxels as 7,000 or 1,000 tokens and
answers 1 to 16 questions about it. All variants run the same code, so that (a), the unpruned backbone, too computes
logits only where they are needed. They run in turn, round after round. Apart are measured

- a training step: forward and backward, no optimizer; index tables are there, as the trainer's workers make them;
- the prefill: from token ids and patches on the device to the first token of every question;
- each further token, of all questions at once. Where tokens are dropped there are two rows of it: the layers below the
  drop keep all that passed them (`early_cache: keep`), or have what the drop left (`evict`).

Seconds and caches are per question. Peak memory is of the whole batch, above weights, gradients and the batch itself.
The threshold is set so that the predictor's mask keeps the share that is asked for; predictor and surrogate gradient
run as in training. ``--out`` keeps the single times.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import KINDS, Part, machine, peak_bytes, profile_parts, seconds, show_table
from torch import Tensor

from mllm3d.training.engine import checkpoint_activations
from photon import PhotonConfig, PhotonForConditionalGeneration
from photon.building import patched_config, planned_config
from photon.decoding import EarlyCache
from photon.flops import forward_flops, token_flops, volume_flops
from photon.geometry import Size3
from photon.patch_embedding import PatchEmbedding, patchify
from photon.varlen import choose

BACKBONE = "Qwen/Qwen2.5-VL-3B-Instruct"
SHAPE, QUICK_SHAPE = (140, 280, 280), (56, 112, 112)
DEEP = (14, 14, 14)
KEEP, KEEP_MAX = 0.39, 0.44
"""Shares that Photon and Photon Max keep in the paper (Table 4)."""
HEADER = 4
"""Tokens between a question and its answer: the ends and beginnings of turns."""
STEP, PREFILL, TOKEN = PHASES = ("training step", "prefill", "further token")


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        deep: the 3D patch embedding instead of the backbone's patches of two slices.
        questions: K, asked about one volume in one batch. keep: share of the visual tokens that stay; None drops none.
        early: what further tokens see below the drop. ``evict`` changes nothing before them, and has a row only there.
    """

    name: str
    title: str
    deep: bool
    questions: int = 1
    keep: float | None = None
    early: EarlyCache = "keep"

    @property
    def evicting(self) -> "Variant":
        """The same, evicting."""
        return replace(self, name=f"{self.name}-evict", title=f"{self.title}, evict", early="evict")

    def is_one_of(self, rows: Sequence[str]) -> bool:
        """Whether a user who names ``rows`` means this one too: ``d``, ``d8`` and ``d8-evict`` mean the last."""
        return not {self.name, self.name.removesuffix("-evict"), self.name[0]}.isdisjoint(rows)

    def measured_in(self, phase: str) -> bool:
        """Whether its figures of a phase are its own."""
        return self.early == "keep" or phase == TOKEN


def variants(questions: Sequence[int]) -> list[Variant]:
    """All rows; more than one question a volume only where they share it."""
    several = [k for k in questions if k > 1]
    rows = [
        Variant("a", "(a) unpruned baseline", False),
        Variant("b", "(b) 3D patch embedding", True),
        Variant("c", f"(c) Photon, keep {KEEP}", True, 1, KEEP),
        *(Variant(f"d{k}", f"(d) keep {KEEP}, K = {k}", True, k, KEEP) for k in several),
        Variant("e", f"(e) Photon Max, keep {KEEP_MAX}", False, 1, KEEP_MAX),
        *(Variant(f"f{k}", f"(f) all layers shared, K = {k}", True, k) for k in several),
    ]
    return [row for v in rows for row in ((v,) if v.keep is None else (v, v.evicting))]


@dataclass(frozen=True)
class Work:
    """What all variants have to do: one volume, and for each question as many tokens.

    Attributes:
        text: tokens of a question with its answer. answer: tokens of it with a label. before: tokens of text before
            the questions. tokens: further tokens generated.
    """

    shape: Size3
    text: int
    answer: int
    before: int
    tokens: int

    def flops(self, config: PhotonConfig, variant: Variant, phase: str) -> float:
        """Per question, of a forward pass: a backward pass is two, for every variant."""
        if phase == TOKEN:
            behind = self.text - self.answer + 1 + self.tokens / 2  # on average, as far as attention goes
            return token_flops(config, self.shape, round(behind), variant.keep, self.before, variant.early)
        text, logits = (self.text, self.answer) if phase == STEP else (self.text - self.answer, 1)
        total = forward_flops(config, self.shape, variant.questions, text, logits, variant.keep, self.before)
        return total / variant.questions


# --- the model and its input ------------------------------------------------------------------------------------


def small_config(width: int = 256, layers: int = 4, vision_width: int = 160, vision_depth: int = 6) -> PhotonConfig:
    """A model for the CPU: the parts cost about what they do in Photon 3B, seen from each other."""
    half = 32  # of a head
    text = {
        "vocab_size": 2048, "hidden_size": width, "intermediate_size": round(5.375 * width),
        "num_hidden_layers": layers, "num_attention_heads": width // (2 * half), "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "bos_token_id": None, "eos_token_id": 4, "pad_token_id": 5,
    }  # fmt: skip
    vision = {
        "depth": vision_depth, "hidden_size": vision_width, "intermediate_size": round(2.67 * vision_width),
        "num_heads": 2, "out_hidden_size": width, "fullatt_block_indexes": [vision_depth - 1], "window_size": 112,
        "tokens_per_second": 2,
    }  # fmt: skip
    return PhotonConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, scheduling={}, image_token_id=0,
        video_token_id=1, vision_start_token_id=2, vision_end_token_id=3, turn_end_token_id=4,
        user_turn_token_ids=(5, 6),
    )  # fmt: skip


def rows(config: PhotonConfig, work: Work, questions: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels ``(K, L)`` of questions about one volume: random words, special tokens where they belong."""
    names = ("vision_start_token_id", "video_token_id", "vision_end_token_id")
    start, video, end = (torch.full((questions, 1), getattr(config, name)) for name in names)
    low, high = 7, min(2048, config.text_config.vocab_size)
    before = torch.randint(low, high, (1, work.before - 2)).expand(questions, -1)
    text = torch.randint(low, high, (questions, work.text))
    text[:, -work.answer - HEADER] = config.turn_end_token_id
    ids = torch.cat([before, start, video.expand(-1, config.patches.tokens(work.shape)), end, text], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -work.answer :] = ids[:, -work.answer :]
    return ids, labels


class Subject:
    """One model that can be any of the variants, and their batches."""

    def __init__(self, config: PhotonConfig, work: Work, device: torch.device, dtype: torch.dtype) -> None:
        self.work, self.device = work, device
        self.configs = {True: patched_config(config, DEEP, 1), False: config}
        with torch.device(device):
            # Made in its dtype: casting it would cast the rotary frequencies as well.
            made: Any = PhotonForConditionalGeneration._from_config(self.configs[True], dtype=dtype)
            self.model: PhotonForConditionalGeneration = made
            width = config.vision_config.hidden_size
            self.embeddings = {deep: PatchEmbedding(c.patches.voxels, width) for deep, c in self.configs.items()}
        for embedding in self.embeddings.values():
            embedding.to(dtype)
        volume = torch.rand(work.shape)
        self.patches = {}
        self.grids = {}
        for deep, own in self.configs.items():
            patches, grid = patchify(volume, own.patches)
            self.patches[deep], self.grids[deep] = patches.to(device, dtype), torch.tensor([grid])
        self.thresholds: dict[Variant, float] = {}

    def become(self, variant: Variant) -> dict[str, Any]:
        """Set the model up for a variant; what every pass of it gets."""
        self.model.model.visual.patch_embed = self.embeddings[variant.deep]
        self.model.config = self.configs[variant.deep]  # by which a batch is laid out
        if variant in self.thresholds:
            self._set_threshold(self.thresholds[variant])
        return {
            "pixel_values_videos": self.patches[variant.deep],
            "video_grid_thw": self.grids[variant.deep],
            "reduction": "none" if variant.keep is None else "hard",
        }

    def training(self, variant: Variant) -> dict[str, Any]:
        """A batch with labels, laid out."""
        given = self.become(variant)
        ids, labels = self._rows(variant)
        group = torch.zeros(len(ids), dtype=torch.long)
        layout = self.model.layout(ids, None, given["video_grid_thw"], group, labels)
        return {"input_ids": ids.to(self.device), "layout": layout.to(self.device), **given}

    def prompt(self, variant: Variant) -> dict[str, Any]:
        """The same questions without their answers."""
        ids = self._rows(variant)[0][:, : -self.work.answer].to(self.device)
        group = torch.zeros(len(ids), dtype=torch.long, device=self.device)
        return {"input_ids": ids, "group_index": group, "early_cache": variant.early, **self.become(variant)}

    def _rows(self, variant: Variant) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return rows(self.configs[variant.deep], self.work, variant.questions)

    def _set_threshold(self, threshold: float) -> None:
        """The predictor's answer from now on, whatever its features are."""
        predictor: Any = self.model.model.threshold_predictors[0]
        with torch.no_grad():
            predictor.mlp[-1].weight.zero_()
            predictor.mlp[-1].bias.fill_(torch.tensor(threshold / predictor.scale).logit())

    def calibrate(self, variant: Variant) -> float:
        """Find the threshold at which a variant keeps its share; the share kept then."""
        with _watching(self.model.model, "schedule") as seen, torch.no_grad():
            self.model(**self.training(variant))
        retention = seen[0]
        self.thresholds[variant] = float(retention.saliency[retention.valid].float().quantile(1 - (variant.keep or 0)))
        with torch.no_grad():
            return float(self.model(**self.training(variant)).keep_rate.mean())


@contextmanager
def _watching(owner: Any, method: str) -> Iterator[list[Any]]:
    """What a method returns, call by call."""
    function, seen = getattr(owner, method), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(function(*args, **kwargs))
        return seen[-1]

    setattr(owner, method, watched)
    try:
        yield seen
    finally:
        delattr(owner, method)


# --- measuring --------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What was measured of a variant.

    Attributes:
        seconds: per question (and token), by phase. peak: bytes, by phase. cache: bytes of keys and values after the
            prefill, per question. kept: share of the visual tokens. missing: phases that the memory was too small for.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    peak: dict[str, int] = field(default_factory=dict)
    cache: float | None = None
    kept: float = 1.0
    missing: list[str] = field(default_factory=list)

    def median(self, phase: str) -> float | None:
        return statistics.median(self.seconds[phase]) if self.seconds[phase] else None


class Runs:
    """The three phases of one variant, each a call."""

    def __init__(self, subject: Subject, variant: Variant) -> None:
        self.model, self.tokens = subject.model, subject.work.tokens
        self.trains = variant.measured_in(STEP)
        self.training, self.prompt = subject.training(variant), subject.prompt(variant)

    def __iter__(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """In the order in which they can run, with the model in the right mode."""
        steps = [(STEP, self.step)] if self.trains else []
        for phase, run in (*steps, (PREFILL, self.prefill), (TOKEN, self.decode)):
            self.model.train(phase == STEP)
            yield phase, run

    def step(self) -> None:
        self.model(**self.training).loss.backward()

    def prefill(self) -> None:
        with torch.no_grad():
            output = self.model(**self.prompt, use_cache=True)
            self.cache, self.next = output.past_key_values, output.logits.argmax(-1)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all questions, after a prefill; rows are padded to the longest."""
        return sum(x.nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))

    def decode(self) -> None:
        """After a prefill."""
        with torch.no_grad():
            for _ in range(self.tokens):
                output = self.model(self.next, past_key_values=self.cache)
                self.next = output.logits[:, -1:].argmax(-1)


def attempt(found: Found, phase: str, run: Callable[[], Any], model: torch.nn.Module) -> Any:
    """What ``run`` returns; None, and a note, where the device's memory does not do."""
    if phase in found.missing or (phase == TOKEN and PREFILL in found.missing):
        return None
    try:
        return run()
    except torch.OutOfMemoryError:
        found.missing.append(phase)
    # After the handler, whose traceback holds the tensors of the failed pass.
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return None


def measure_memory(subject: Subject, variant: Variant) -> Found:
    """Peak memory of a variant, which warms it up as well. Gradients are there already, as in an accumulated step."""
    found, model, device = Found(), subject.model, subject.device
    if variant.keep is not None:
        found.kept = subject.calibrate(variant)
    runs = Runs(subject, variant)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for phase, run in runs:
        if phase == TOKEN:
            break
        if device.type == "cuda":  # kernels that are compiled or chosen at their first call
            attempt(found, phase, run, model)
        peak = attempt(found, phase, partial(peak_bytes, run, device), model)
        if peak is not None:
            found.peak[phase] = peak
    if PREFILL in found.peak:
        found.cache = runs.cache_bytes / variant.questions
    model.zero_grad(set_to_none=True)
    return found


def time_once(subject: Subject, variant: Variant, found: Found) -> None:
    """One round of one variant."""
    for phase, run in Runs(subject, variant):
        taken = attempt(found, phase, partial(seconds, run, subject.device), subject.model)
        subject.model.zero_grad(set_to_none=True)
        if taken is not None:
            found.seconds[phase].append(taken / variant.questions / (subject.work.tokens if phase == TOKEN else 1))


# --- tables -----------------------------------------------------------------------------------------------------


class Report:
    """Tables of all variants."""

    def __init__(self, subject: Subject, chosen: list[Variant], found: dict[Variant, Found]) -> None:
        self.subject, self.chosen, self.found = subject, chosen, found

    def _like(self, **wanted: Any) -> Variant | None:
        """The variant with these properties."""
        return next((v for v in self.chosen if all(getattr(v, k) == x for k, x in wanted.items())), None)

    def times(self, phase: str, slow: Variant | None, fast: Variant | None) -> float | None:
        """How many times as fast ``fast`` is per question."""
        if slow is None or fast is None:
            return None
        above, below = self.found[slow].median(phase), self.found[fast].median(phase)
        return None if above is None or below is None else above / below

    def predicted(self, phase: str, variant: Variant) -> float:
        """The same against (a), by FLOPs."""
        base = Variant("a", "", False)
        configs, work = self.subject.configs, self.subject.work
        return work.flops(configs[False], base, phase) / work.flops(configs[variant.deep], variant, phase)

    def gains(self, phase: str, variant: Variant) -> list[float | None]:
        """What the 3D patch embedding, dropping and sharing each contribute: factors of the ratio to (a)."""
        one = {"deep": variant.deep, "questions": 1, "keep": None}
        alone, whole = self._like(**one), self._like(**{**one, "questions": variant.questions})
        return [
            self.times(phase, self._like(name="a"), alone) if variant.deep else 1.0,
            self.times(phase, whole, variant) if variant.keep is not None else 1.0,
            self.times(phase, alone, whole) if variant.questions > 1 else 1.0,
        ]

    def size_row(self, variant: Variant) -> list[str]:
        """Tokens, and peak memory beside that of (a)."""
        work, found = self.subject.work, self.found[variant]
        config = self.subject.configs[variant.deep]
        visual = config.patches.tokens(work.shape)
        shared = (work.before + visual) / variant.questions + work.text
        upper = shared if variant.keep is None else work.before + found.kept * visual + work.text
        cells = [variant.title, f"{visual:,}", f"{found.kept * visual:,.0f}", f"{shared:,.0f}", f"{upper:,.0f}"]
        base = self.found.get(self._like(name="a") or variant)
        for phase in (STEP, PREFILL):
            peak, first = found.peak.get(phase), None if base is None else base.peak.get(phase)
            cells.append(_text(None if peak is None else peak / 1e6, ",.0f"))
            cells.append(_text(peak / first if peak and first else None, ".2f"))
        return cells

    def time_row(self, phase: str, variant: Variant) -> list[str]:
        """Seconds, their spread, what each measure contributes, and the ratio to (a) beside the predicted one."""
        taken = self.found[variant].seconds[phase]
        if not taken:
            return [variant.title, "out of memory", *[""] * (8 if phase == TOKEN else 7)]
        middle = statistics.median(taken)
        low, high = (statistics.quantiles(taken, n=4)[i] for i in (0, 2)) if len(taken) > 1 else (middle, middle)
        ratio, planned = self.times(phase, self._like(name="a"), variant), self.predicted(phase, variant)
        measured = [_text(x, ".2f") for x in (*self.gains(phase, variant), ratio)]
        quotient = None if ratio is None else ratio / planned
        cells = [variant.title, f"{middle:.3g}", f"{low:.3g}-{high:.3g}", *measured, f"{planned:.2f}"]
        cells.append(_text(quotient, ".2f"))
        if phase == TOKEN:
            cache = self.found[variant].cache
            cells.append(_text(None if cache is None else cache / 1e6, ",.2f"))
        return cells

    def show(self) -> None:
        """Print all tables."""
        tokens = ["visual tokens", "kept", "a question's tokens, lower layers", "upper layers"]
        header = ["", *tokens, "training MB", "of (a)", "prefill MB", "of (a)"]
        rows = [self.size_row(v) for v in self.chosen if v.measured_in(STEP)]
        show_table("Tokens, and peak memory of a batch above weights and gradients", header, rows)
        factors = ["3D patch embedding", "dropping", "sharing"]
        header = ["", "s per question", "quartiles", *factors, "times as fast as (a)", "FLOPs predict", "of it"]
        for phase in PHASES:
            title = phase.capitalize() + (", K at a time" if phase == TOKEN else "")
            own = [*header, "cache MB per question"] if phase == TOKEN else header
            show_table(title, own, [self.time_row(phase, v) for v in self.chosen if v.measured_in(phase)])

    def to_json(self) -> dict[str, Any]:
        """Everything measured, with what was predicted."""
        return {
            "machine": machine(self.subject.device),
            "work": asdict(self.subject.work),
            "config": self.subject.configs[True].to_dict(),
            "variants": [
                {**asdict(v), **asdict(self.found[v]), "predicted": {p: self.predicted(p, v) for p in PHASES}}
                for v in self.chosen
            ],
        }


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# --- where the time goes ----------------------------------------------------------------------------------------


def parts(model: PhotonForConditionalGeneration, variant: Variant) -> list[Part]:
    """What a profile tells apart."""
    inner: Any = model.model
    layers, drop = list(inner.language_model.layers), model.config.scheduling_layers[0]
    decoder = ["decoder"] * len(layers)
    if variant.keep is not None:
        decoder = ["decoder, " + ("below the drop" if i < drop else "above the drop") for i in range(len(layers))]
    return [
        Part(inner.visual, "encode", "vision tower"),
        Part(inner.visual.patch_embed, "forward", "patch embedding"),
        *(Part(layer, "forward", name) for layer, name in zip(layers, decoder, strict=True)),
        Part(inner, "schedule", "choice of tokens"),
        Part(inner, "reduce", "dropping"),
        Part(model, "_logits", "logits"),
        Part(model, "layout", "index tables"),
    ]


def show_profile(subject: Subject, variant: Variant) -> None:
    """Milliseconds of one pass by part of the model and kind of work."""
    if variant.keep is not None:
        subject.calibrate(variant)
    for phase, run in Runs(subject, variant):
        if phase == TOKEN:
            break
        shares = profile_parts(run, parts(subject.model, variant), subject.device)
        subject.model.zero_grad(set_to_none=True)
        total = sum(spent.total for spent in shares.values())
        lines = [
            [name, *(f"{1e3 * spent.seconds[k]:.1f}" for k in KINDS), f"{1e3 * spent.total:.1f}",
             f"{spent.total / total:.1%}", f"{spent.rate / 1e9:,.0f}" if spent.rate else ""]
            for name, spent in sorted(shares.items(), key=lambda item: -item[1].total)
        ]  # fmt: skip
        columns = [sum(spent.seconds[k] for spent in shares.values()) for k in KINDS]
        lines.append(["all", *(f"{1e3 * x:.1f}" for x in (*columns, total)), "", ""])
        header = ["", *KINDS, "together", "share", "GFLOPS of products"]
        show_table(f"{variant.title}: {phase}, ms of a batch", header, lines)


# --- the program ------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the backbone's full shape")
    parser.add_argument("--backbone", default=BACKBONE, help="whose shape to take on cuda, with random weights")
    parser.add_argument("--rounds", type=int, default=5, help="times that each variant runs")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4, 8, 16], help="questions per volume")
    parser.add_argument("--variants", nargs="+", help="only these rows: a b c d e f; a is what others are compared to")
    parser.add_argument("--text", type=int, default=120, help="tokens of a question with its answer")
    parser.add_argument("--answer", type=int, default=8, help="tokens of the answer")
    parser.add_argument("--before", type=int, default=5, help="tokens before the questions beside the volume's")
    parser.add_argument("--tokens", type=int, default=8, help="further tokens to generate")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, in every variant")
    parser.add_argument("--profile", metavar="ROW", help="only say where the time of this row goes: a, b, c, d8, ...")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a small volume, few questions, one round")
    parser.add_argument("--out", type=Path, help="a JSON file for all that was measured")
    args = parser.parse_args()
    spare = args.text - args.answer - HEADER
    if min(args.rounds, args.answer, args.tokens, args.before - 1, spare, *args.questions) < 1:
        least = f"text at least {HEADER + 1} more than answer, before 2, the others 1"
        parser.error(f"--rounds, --questions, --text, --answer, --before, --tokens: too few; {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: no GPU that torch can use; take cpu")
    return args


def prepare(args: argparse.Namespace) -> Subject:
    """The model on its device."""
    device = torch.device(args.device)
    shape, dtype, config = SHAPE, torch.float32, small_config()
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        planned = planned_config(args.backbone)
        if planned is None:
            raise SystemExit(f"--backbone: {args.backbone} is not known; see BACKBONES in photon")
        planned.scheduling = {}
        config, dtype = planned, torch.bfloat16
    if args.quick:
        shape, config = QUICK_SHAPE, small_config(64, 4, 32, 2)
    subject = Subject(config, Work(shape, args.text, args.answer, args.before, args.tokens), device, dtype)
    if args.checkpointing:
        checkpoint_activations(subject.model)
    return subject


def heading(subject: Subject) -> str:
    """Machine, model, and how its parts compare in cost."""
    work, config = subject.work, subject.configs[False]
    parameters = sum(p.numel() for p in subject.model.parameters()) / 1e6
    kernel = choose(torch.empty(1, 1, 64, device=subject.device, dtype=subject.model.dtype))
    vision = volume_flops(config, work.shape) / forward_flops(config, work.shape, 1, work.text, work.answer, None)
    return (
        f"{machine(subject.device)}, {subject.model.dtype}, attention: {kernel}\n"
        f"{parameters:,.0f} M parameters; the vision tower has {vision:.0%} of (a)'s FLOPs\n"
        f"{work.text} tokens a question, {work.answer} of them its answer; {work.before} tokens of text before it"
    )


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    every = variants([1, 4] if args.quick else args.questions)
    chosen = [v for v in every if args.variants is None or v.is_one_of(args.variants)]
    subject = prepare(args)
    print(heading(subject))
    if args.profile:
        named = {v.name: v for v in every}
        if args.profile not in named:
            raise SystemExit(f"--profile: {args.profile} is none of {', '.join(named)}")
        show_profile(subject, named[args.profile])
        return
    found = {variant: measure_memory(subject, variant) for variant in chosen}
    for _ in range(1 if args.quick else args.rounds):
        for variant in chosen:
            time_once(subject, variant, found[variant])
    report = Report(subject, chosen, found)
    report.show()
    if args.out:
        args.out.write_text(json.dumps(report.to_json(), indent=1) + "\n")


if __name__ == "__main__":
    main()
