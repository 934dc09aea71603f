"""What a run needs before its first step: processes, text, optimizer, learning rates, losses, teacher."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, get_scheduler

from ..checks import check_choice
from ..data.batches import MicroBatches
from ..data.sequences import check_vocabulary
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.elastic import SuperShaperSelfAttention
from ..model.modeling_supershaper import (
    SuperShaperForMaskedLM,
    SuperShaperForMultipleChoice,
    SuperShaperPreTrainedModel,
)
from ..processes import start_accelerator
from .arguments import PRECISIONS, SuperPretrainingArguments
from .distillation import OUTPUT_WEIGHTS, Objective
from .sandwich import decay_groups, parameters_by_width
from .teacher import OutsideTeacher


def make_accelerator(args: SuperPretrainingArguments) -> Accelerator:
    """Return the `Accelerator` of a run.

    Raises:
        ValueError: If `accelerate launch` was given a precision or a kind of distribution that is not supported.
        RuntimeError: If Accelerate and the launcher disagree on the number of processes.
    """
    accelerator = start_accelerator(
        mixed_precision=args.mixed_precision, log_with=list(args.report_to) or None, project_dir=args.output_dir
    )
    check_choice("mixed_precision", accelerator.mixed_precision, PRECISIONS)
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise ValueError(
            f"Super pre-training does not run under {kind.value}{' 1' * (kind == DistributedType.FSDP)}. Use DDP, or "
            "FSDP with `fsdp_version: 2` in the configuration of Accelerate."
        )
    return accelerator


def make_stream(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: SuperPretrainingArguments,
    accelerator: Accelerator,
) -> MicroBatches:
    """Return the text as the endless masked micro-batches of this process."""
    return MicroBatches(
        dataset,
        tokenizer,
        args.per_device_train_batch_size,
        args.mlm_probability,
        args.seed,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=args.dataloader_num_workers,
        max_length=args.max_length,
        cross_documents=args.cross_documents,
        group_by_length=args.group_by_length,
        pad_to_multiple_of=args.max_length if args.torch_compile else None,  # another length would need another graph
    )


def make_optimizer(model: torch.nn.Module, args: SuperPretrainingArguments) -> torch.optim.AdamW:
    """Return AdamW for `model`. The fused kernel exists on CPU, CUDA and MPS.

    Each parameter group has a `scale`, the factor of its learning rate.
    """
    own = parameters_by_width(model)
    groups = [{**group, "scale": 1.0} for group in decay_groups(model, args.weight_decay)]
    if args.shared_learning_rate_scale != 1:
        groups = [
            {**group, "params": chosen, "scale": scale}
            for group in groups
            for scale, by_width in ((args.shared_learning_rate_scale, False), (1.0, True))
            if (chosen := [parameter for parameter in group["params"] if (parameter in own) == by_width])
        ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)


def learning_rate_schedule(args: SuperPretrainingArguments) -> Callable[[int], float]:
    """Return the function from the number of updates done so far to the learning rate of the next one."""
    # The schedulers of transformers need an optimizer, so they get this stand-in. Every scheduler that the arguments
    # allow computes the learning rate from the number of updates alone.
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    warmup = args.get_warmup_steps()
    scheduler: LambdaLR = get_scheduler(args.lr_scheduler_type, stand_in, warmup, args.max_steps)
    factor = scheduler.lr_lambdas[0]
    return lambda updates: args.learning_rate * factor(updates)


def make_objective(args: SuperPretrainingArguments, teacher: OutsideTeacher | None) -> Objective:
    return Objective(
        distillation_weight=args.distillation_weight or 0.0,
        temperature=args.temperature,
        divergence=args.divergence,
        hidden_weight=args.hidden_weight,
        attention_weight=args.attention_weight,
        teacher=teacher,
        teacher_weight=args.teacher_weight,
        relation_heads=args.relation_heads,
        state_weight=args.state_weight,
        pooled_weight=args.pooled_weight,
        first_token_weight=args.first_token_weight,
        pooling=str(args.pooling),
        labels=args.mlm_probability > 0,
    )


def check_teacher(
    args: SuperPretrainingArguments,
    config: SuperShaperConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher: OutsideTeacher | None,
) -> None:
    """Raise a ValueError unless an outside teacher can read the text and can be compared with every width."""
    if teacher is None:
        return
    theirs: Any = teacher.model.config
    check_vocabulary(tokenizer, theirs)
    longest = getattr(theirs, "max_position_embeddings", args.max_length)
    if longest < args.max_length:
        raise ValueError(f"max_length={args.max_length} is more than the teacher's {longest} positions. Lower it.")
    if any(getattr(args, name) > 0 for name in OUTPUT_WEIGHTS) and theirs.hidden_size != config.hidden_size:
        raise ValueError(
            f"{', '.join(OUTPUT_WEIGHTS)} compare last hidden states, but the teacher has hidden_size="
            f"{theirs.hidden_size} and the model {config.hidden_size}. Use the BERT that the model was made of as "
            "teacher, or teacher_weight instead of them."
        )
    if args.teacher_weight > 0:
        check_relations(args, config, theirs.hidden_size)


def check_relations(args: SuperPretrainingArguments, config: SuperShaperConfig, teacher_width: int) -> None:
    """Raise a ValueError unless the relation heads divide every width."""
    heads = args.relation_heads or config.num_attention_heads
    widths = [*(config.width_choices or config.hidden_sizes or []), teacher_width]
    misfits = sorted({width for width in widths if width % heads})
    if misfits:
        raise ValueError(
            f"relation_heads={heads} does not divide {misfits}, widths of the student or the teacher. Use a number "
            f"that divides all of {sorted(set(widths))}: at most {math.gcd(*widths)}."
        )


def check_model(args: SuperPretrainingArguments, model: SuperShaperPreTrainedModel) -> None:
    """Raise a ValueError unless the model has what it needs to learn from the text."""
    kind = type(model).__name__
    if args.mlm_probability > 0 and not isinstance(model, SuperShaperForMaskedLM):
        raise ValueError(
            f"{kind} has no masked-LM head, which mlm_probability={args.mlm_probability} needs. Use "
            "SuperShaperForMaskedLM, or set mlm_probability=0 and let the encoder learn from a teacher by state_weight."
        )
    if isinstance(model, SuperShaperForMultipleChoice):
        raise ValueError(f"{kind} reads several sequences at once, and the text has single ones. Train its model.bert.")


def freeze(model: SuperShaperPreTrainedModel, args: SuperPretrainingArguments) -> list[str]:
    """Turn off the gradients of parameters that do not learn in this run; return their names.

    Without labels only the encoder learns: embeddings, pooler and head stay those of the original, whose states the
    encoder is to return. With `shared_learning_rate_scale=0` only weights by width learn.

    Raises:
        ValueError: If no parameter is left to learn.
    """
    learning = {parameter for parameter in model.parameters() if parameter.requires_grad}
    if args.mlm_probability == 0:
        learning &= set(model.base_model.get_submodule("encoder").parameters())
    if args.shared_learning_rate_scale == 0:
        learning &= parameters_by_width(model)
    if not learning:
        raise ValueError(
            f"No parameter is left to learn: mlm_probability={args.mlm_probability}, shared_learning_rate_scale="
            f"{args.shared_learning_rate_scale}, bottlenecks={model.config.bottlenecks!r}. With "
            "shared_learning_rate_scale=0 only weights by width learn: use a supernet with bottlenecks='by_width'."
        )
    off = [name for name, p in model.named_parameters() if p.requires_grad and p not in learning]
    for name in off:
        model.get_parameter(name).requires_grad_(False)
    return off


def unfreeze(model: torch.nn.Module, names: Sequence[str]) -> None:
    """Undo `freeze`, also where FSDP has replaced the parameters."""
    for name in names:
        model.get_parameter(name).requires_grad_(True)


def start_training_mode(model: torch.nn.Module, args: SuperPretrainingArguments) -> None:
    """Put the model into training mode, with `no_dropout` without the modules that drop."""
    model.train()
    if args.no_dropout:
        for module in model.modules():
            if isinstance(module, (torch.nn.Dropout, SuperShaperSelfAttention)):
                module.eval()


def checkpoint_layers(model: SuperShaperPreTrainedModel, on: bool) -> None:
    """Turn gradient checkpointing on or off. From version 5.23 on, transformers calls it activation checkpointing."""
    verb = "enable" if on else "disable"
    newest = getattr(model, f"activation_checkpointing_{verb}", None)
    (newest or getattr(model, f"gradient_checkpointing_{verb}"))()
