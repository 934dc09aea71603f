"""torch.compile for an elastic encoder: it makes one graph for each width of a layer, not one for each shape.

A layer works at the width of its input, and all layers share their code. So if single layers are compiled, there are as
many graphs as width choices, however many of the 7^12 shapes are trained. If the whole model were compiled, there would
be one graph for every shape.
"""

import shutil

import torch
from transformers.utils import logging

from ..model.elastic import SuperShaperLayer


logger = logging.get_logger(__name__)

STEPS_THAT_PAY = 200  # To compile one graph, forward and backward, takes tens of seconds.


def compile_layers(model: torch.nn.Module, widths: int, steps: int, device: torch.device) -> None:
    """Compile every layer of `model` in place. Warn if compiling takes longer than it saves.

    Args:
        model: A supernet or subnet.
        widths: Number of widths that the layers will meet.
        steps: Number of training steps that will use the compiled layers.
        device: The device that they will run on.

    Raises:
        RuntimeError: If the device is the CPU and there is no C++ compiler.
    """
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise RuntimeError(
            "torch_compile=True needs a C++ compiler on the CPU, and there is none. Install g++, or leave it out."
        )
    if steps < STEPS_THAT_PAY:
        logger.warning(
            f"torch_compile=True will take longer than it saves: {steps} steps are too few to compile {widths} widths."
        )
    # There is one graph for each width in training, and one in evaluation. By default torch gives up after 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * widths)
    for layer in model.modules():
        if isinstance(layer, SuperShaperLayer):
            layer.compile(dynamic=False)


def release_layers(model: torch.nn.Module) -> None:
    """Undo `compile_layers`."""
    for layer in model.modules():
        if isinstance(layer, SuperShaperLayer):
            layer._compiled_call_impl = None
