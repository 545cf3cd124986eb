"""What sharing a volume among its questions saves in a training step, and what dropping saves beside it.

    python benchmarks/photon_sharing.py

Forward and backward of a small Photon on random volumes, one thread, CPU time. The variants run in turn, round
after round, so that other load on the machine meets all of them; printed are medians over the rounds, their
quartiles, the ratio to the first row, and the ratio that counting FLOPs predicts. Ratios are of one run on one
machine: do not compare seconds between machines.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from photon import PhotonConfig, PhotonForConditionalGeneration, PhotonProcessor
from photon.flops import forward_flops
from photon.processing_photon import VolumeChats
from photon.tokenization import SPECIAL_TOKENS, token_fields, train_tokenizer

SHAPE = (56, 112, 112)
QUESTION, ANSWER = "Is there a pleural effusion on the left side of this chest CT?", "yes"


@dataclass(frozen=True)
class Variant:
    """One way to run the same questions.

    shared: one encoding for all questions of a volume. keep: share of tokens kept; None drops nothing.
    """

    name: str
    shared: bool
    keep: float | None


VARIANTS = (
    Variant("separate samples, all tokens", False, None),
    Variant("separate samples, keep 0.4", False, 0.4),
    Variant("one volume, all layers shared", True, None),
    Variant("one volume, keep 0.4", True, 0.4),
    Variant("one volume, keep 0.1", True, 0.1),
)


def build(width: int, layers: int) -> tuple[PhotonForConditionalGeneration, PhotonProcessor]:
    """A random Photon whose patches are 14 x 7 x 7, merged 2 x 2: 256 tokens of a 56 x 112 x 112 volume."""
    tokenizer = train_tokenizer([QUESTION, ANSWER], 320)
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    half = width // 4 // 2
    config = PhotonConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 3 * width,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                "mrope_section": [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]},
            "pad_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "bos_token_id": None,
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 192, "num_heads": 4, "out_hidden_size": width,
            "fullatt_block_indexes": [0, 1], "patch_size": 7, "temporal_patch_size": 14, "in_channels": 1,
            "window_size": 112, "tokens_per_second": 2,
        },
        tie_word_embeddings=True, scheduling={"keep_ratio": 0.4},
        **token_fields(tokenizer),
    )  # fmt: skip
    return PhotonForConditionalGeneration(config), PhotonProcessor.from_config(config, tokenizer)


def step_seconds(
    model: PhotonForConditionalGeneration, processor: PhotonProcessor, variant: Variant, questions: int
) -> float:
    """CPU seconds of one forward and backward over ``questions`` questions about one volume."""
    chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    volume = torch.rand(SHAPE)
    groups = [VolumeChats([volume], [chat] * questions)]
    if not variant.shared:
        groups = [VolumeChats([volume], [chat]) for _ in range(questions)]
    batch = processor.batch(groups)
    if variant.keep is not None:
        model.model.scheduling = type(model.config.scheduling_settings)(keep_ratio=variant.keep)
    start = time.process_time()
    model(**batch, reduction="none" if variant.keep is None else "hard").loss.backward()
    seconds = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return seconds


def predicted(config: PhotonConfig, variant: Variant, questions: int, text: int) -> float:
    """Forward FLOPs per question."""
    together = questions if variant.shared else 1
    return forward_flops(config, SHAPE, together, text, 2, variant.keep) / together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--questions", type=int, default=8, help="questions per volume")
    parser.add_argument("--rounds", type=int, default=7, help="times that each variant runs")
    parser.add_argument("--width", type=int, default=256, help="width of the decoder")
    parser.add_argument("--layers", type=int, default=8, help="layers of the decoder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, processor = build(args.width, args.layers)
    text = len(processor.tokenizer(QUESTION)["input_ids"]) + 8
    times: dict[str, list[float]] = {v.name: [] for v in VARIANTS}
    for round_ in range(args.rounds + 1):
        for variant in VARIANTS:
            seconds = step_seconds(model, processor, variant, args.questions)
            if round_:  # the first round warms up
                times[variant.name].append(seconds)

    table = Table(title=f"{args.questions} questions about one volume of 256 visual tokens, width {args.width}")
    for column in ("", "CPU s, median", "quartiles", "times as fast", "FLOPs predict"):
        table.add_column(column, justify="left" if not column else "right")
    first, work = VARIANTS[0], predicted(model.config, VARIANTS[0], args.questions, text)
    base = statistics.median(times[first.name])
    for variant in VARIANTS:
        low, median, high = statistics.quantiles(times[variant.name], n=4)
        ratio = work / predicted(model.config, variant, args.questions, text)
        table.add_row(variant.name, f"{median:.2f}", f"{low:.2f}-{high:.2f}", f"{base / median:.1f}", f"{ratio:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
