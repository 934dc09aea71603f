"""The tensors that a run resumes from: the weights, and the moments that AdamW keeps of the gradients.

Both are collected as whole tensors by name, also where FSDP gave each process a part of every tensor. They are stored
as safetensors, which hold numbers and no code. The rest of a run's state is a few numbers; see `resuming.py`.
"""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..model.modeling_supershaper import SuperShaperPreTrainedModel
from ..processes import on_main_process


def collect_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Return the weights by name, without the second name of tied ones. Every process has to call this.

    Args:
        accelerator: The accelerator that prepared `model`.
        model: The prepared model.

    Returns:
        The weights. Under FSDP they are complete on the main process only.
    """
    weights = accelerator.get_state_dict(model)
    for tied in unwrap(accelerator, model).all_tied_weights_keys:
        weights.pop(tied, None)
    return weights


def restore_weights(model: SuperShaperPreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Copy what `collect_weights` returned into `model`.

    Raises:
        ValueError: If names or shapes differ from those of `model`.
    """
    own = model.state_dict()
    different = (own.keys() - set(model.all_tied_weights_keys)) ^ weights.keys()
    if different:
        raise ValueError(f"The weights belong to another model: {sorted(different)} are in one of the two only.")
    for name, value in weights.items():
        copy_into(own[name], value, name)


def collect_moments(model: nn.Module, optimizer: AcceleratedOptimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors by the name of their parameter. Every process has to call this.

    Call it after `collect_weights`: FSDP then has each parameter in the form that the optimizer knows.

    Returns:
        Tensors such as `"cls.predictions.bias/exp_avg"`. A parameter without an update so far has none.
    """
    return {
        f"{name}/{kind}": value.full_tensor().cpu() if isinstance(value, DTensor) else value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(model: nn.Module, optimizer: AcceleratedOptimizer, moments: Mapping[str, Tensor]) -> None:
    """Give the optimizer of `model` what `collect_moments` returned. Learning rate and decay stay as they are.

    Raises:
        ValueError: If names or shapes differ from those of `model`.
    """
    parameters = dict(model.named_parameters())
    for key, value in moments.items():
        name, _, kind = key.rpartition("/")
        if name not in parameters:
            raise ValueError(f"The optimizer's {key} belongs to another model: this one has no parameter {name!r}.")
        parameter = parameters[name]
        # "step" is one number; every other tensor has the shape of its parameter. New memory, as in a run without a
        # stop: on unaligned memory the last digit of a sum can differ.
        own = torch.zeros_like(value, device=parameter.device) if kind == "step" else torch.zeros_like(parameter)
        copy_into(own, value, key)
        optimizer.state[parameter][kind] = own


def copy_into(target: Tensor, value: Tensor, name: str) -> None:
    """Copy the whole tensor `value` into `target`, or this process's part of it if `target` is shared out by FSDP."""
    if target.shape != value.shape:
        raise ValueError(f"{name} has the shape {tuple(value.shape)}; this model needs {tuple(target.shape)}.")
    with torch.no_grad():
        if isinstance(target, DTensor):  # every process has the whole value, so nothing has to be sent
            value = value.to(target.device)
            value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(value)


def check_finite(accelerator: Accelerator, weights: Mapping[str, Tensor], step: int, advice: str) -> None:
    """Raise a FloatingPointError on every process if a weight is NaN or infinite.

    Args:
        accelerator: Connects the processes.
        weights: The result of `collect_weights`.
        step: Number of the last step done.
        advice: End of the message: what to do.
    """

    def check() -> None:
        name = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
        if name is not None:
            raise FloatingPointError(
                f"After step {step}, weights are not finite (the first: {name}), so the model of this step is of no "
                f"use and is not saved. {advice}"
            )

    on_main_process(check, accelerator)


def unwrap(accelerator: Accelerator, model: nn.Module) -> SuperShaperPreTrainedModel:
    """Return the model inside the wrappers of `Accelerator.prepare`."""
    unwrapped: SuperShaperPreTrainedModel = accelerator.unwrap_model(model)
    return unwrapped
