"""The DeepSpeed engine of a run: its configuration, and the model and optimizer inside it."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mllm3d.config import Config, TrainingConfig
from mllm3d.errors import UserError
from mllm3d.training import random_state
from mllm3d.training.distributed import World
from mllm3d.training.gradients import InOrder, forget_outputs
from mllm3d.training.optim import build_optimizer, trainable_and_frozen
from mllm3d.training.recipe import Recipe
from mllm3d.training.schedule import build_schedule

BUCKET_ELEMENTS = 200_000_000
"""Gradients that are reduced at once: large enough for the network, small enough for a GPU's memory."""


def build_engine(config: Config, recipe: Recipe, world: World, total_steps: int) -> Any:
    """Model, optimizer and schedule in a `deepspeed.DeepSpeedEngine`.

    All ranks start from the same seed, so that they draw the same weights; afterwards each has its own.
    """
    import deepspeed

    from mllm3d.training.stored import StateFiles

    training = config.training
    random_state.seed(config.run.seed)
    with world.together():
        model = recipe.build()
        if training.activation_checkpointing:
            checkpoint_activations(model)
    optimizer = build_optimizer(model, recipe.parameter_groups(model), training.optimizer)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    def schedule(inner: Optimizer) -> LambdaLR:
        # In bf16 without ZeRO, DeepSpeed's set-up takes one optimizer step with zero gradients, weight decay
        # included: it is taken at rate 0 and forgotten here.
        inner.state.clear()
        for group, peak in zip(inner.param_groups, peaks, strict=True):
            group["lr"] = peak
        return build_schedule(inner, training.optimizer, total_steps)

    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=deepspeed_config(training, model)
    )
    engine.checkpoint_engine = StateFiles()
    # Else each checkpoint gets a copy of DeepSpeed's conversion script, which loads pickles; model/ will do.
    engine._copy_recovery_script = lambda folder: None
    if training.zero_stage == 2 and world.size > 1:
        InOrder(engine.optimizer, engine.module)
    if training.zero_stage == 3:
        forget_outputs(engine.module)
    random_state.seed(config.run.seed + world.rank)
    engine.train()
    return engine


def deepspeed_config(training: TrainingConfig, model: nn.Module) -> dict[str, Any]:
    """DeepSpeed's own configuration for these settings."""
    bucket = min(BUCKET_ELEMENTS, trainable_and_frozen(model)[0] + 1)
    zero: dict[str, Any] = {
        "stage": training.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket + bucket % 2,
        "allgather_bucket_size": bucket + bucket % 2,
    }
    if training.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if training.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.volumes_per_batch,
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": training.optimizer.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own Adam would be compiled on the machine; torch's serves all stages.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if training.precision == "bf16":
        config["bf16"] = {"enabled": True}
        if training.zero_stage > 0:  # stage 0 has no such option
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def is_plain(engine: Any) -> bool:
    """True where DeepSpeed leaves the optimizer as it is (fp32 without ZeRO): its step then has no guard."""
    return engine.optimizer is engine.basic_optimizer


def checkpoint_activations(model: nn.Module) -> None:
    """Have the backward pass recompute activations. Raises `UserError` if the model does not offer it."""
    # The second is the name of older transformers.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if enable is None:
        raise UserError("training.activation_checkpointing: this model does not offer it; set it to false")
    enable({"use_reentrant": False})
