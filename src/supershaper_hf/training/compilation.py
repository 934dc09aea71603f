"""torch.compile for an elastic encoder: one graph for each width of a layer, never one for each shape.

A layer works at the width of its input and all layers share their code, so compiling the layer alone gives as many
graphs as there are width choices, however many of the 7^12 shapes are trained. Compiling the whole model would give one
for every shape.
"""

import shutil

import torch
from transformers.utils import logging

from ..model.elastic import SuperShaperLayer


logger = logging.get_logger(__name__)

STEPS_THAT_PAY = 200  # a graph takes tens of seconds to compile, forward and backward


def compile_layers(model: torch.nn.Module, widths: int, steps: int, device: torch.device) -> None:
    """Compile every layer of `model` in place; warn where that costs more than it gives.

    Args:
        model: A supernet or subnet.
        widths: How many widths the layers will meet.
        steps: How many training steps will use the compiled layers.
        device: Where they will run.

    Raises:
        RuntimeError: If there is no C++ compiler, which graphs for the CPU need.
    """
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise RuntimeError(
            "torch_compile=True needs a C++ compiler on the CPU, and there is none. Install g++ or leave it out."
        )
    if steps < STEPS_THAT_PAY:
        logger.warning(f"torch_compile=True will not pay: {steps} steps are too few for {widths} widths to compile.")
    # One graph for each width, in training and in evaluation; torch gives up after 8 by default.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * widths)
    for layer in model.modules():
        if isinstance(layer, SuperShaperLayer):
            layer.compile(dynamic=False)


def release_layers(model: torch.nn.Module) -> None:
    """Undo `compile_layers`."""
    for layer in model.modules():
        if isinstance(layer, SuperShaperLayer):
            layer._compiled_call_impl = None
