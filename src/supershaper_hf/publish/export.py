"""Add files to a published folder that run without PyTorch: ONNX, ONNX of 8-bit integers, and OpenVINO.

`add_exports(folder)` writes them beside the weights that `save_for_hub` has written, where stock clients look:

onnx/model.onnx                        32-bit floats
onnx/model_quantized.onnx              8-bit integers: see `quantization.py`
openvino/openvino_model.xml and .bin   32-bit floats

Every file is run and compared with the PyTorch model before it appears. The inputs are `input_ids`, `attention_mask`
and `token_type_ids`, (batch, length), or (batch, choices, length) for multiple choice; all these sizes are dynamic. The
outputs have the names of the fields of transformers: `logits`, `start_logits` and `end_logits`, or `last_hidden_state`
and `pooler_output`. A sentence encoder has `last_hidden_state` alone, whatever its head: sentence-transformers,
fastembed, transformers.js and text-embeddings-inference all read the token states under this name, or as the first
output, and pool them as the files of the folder say.
"""

import ast
import importlib.util
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checks import check_choice
from ..model import modeling_supershaper
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.modeling_supershaper import SuperShaperPreTrainedModel
from .comparison import INPUTS, Run, input_axes, largest_difference, many_inputs, random_inputs, run_model
from .quantization import onnx_session, quantization_inputs, quantize
from .sentences import MODULES_FILE


ONNX_FILE = "onnx/model.onnx"
QUANTIZED_FILE = "onnx/model_quantized.onnx"
OPENVINO_FILE = "openvino/openvino_model.xml"
PACKAGES = {  # format -> what it needs
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "int8": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("onnx", "onnxruntime", "onnxscript", "openvino"),
}
# The exporter of PyTorch writes opset 18 and converts to others. ONNX Runtime reads it since version 1.14 (2023).
OPSET = 18
# Two orders of the same sums differ by about 1e-6 of the largest output; another formula for GELU by 1e-3.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExportedFile:
    """What `add_exports` has written, and how far it is from PyTorch.

    Args:
        path: The file, from the folder.
        format: "onnx", "int8" or "openvino".
        size: Bytes; with those of the weights if they are in a file of their own.
        difference: Largest absolute difference of an output from PyTorch's; for int8 without those of padding.
        cosine: Mean cosine between the outputs and PyTorch's, token by token where a token has one; only for int8.
        settings: How the file was made.
    """

    path: str
    format: str
    size: int
    difference: float
    cosine: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def add_exports(folder: str | Path, formats: Sequence[str] = ("onnx", "int8")) -> list[ExportedFile]:
    """Export the model in `folder` and add the files to the folder. Files of earlier exports are replaced.

    All files are written beside the folder's own, compared with PyTorch, and moved to their places at the end. If one
    of them is refused, none appears. A supernet is exported at its full shape.

    Args:
        folder: A folder that `save_for_hub` or `save_pretrained` has written, of a model with any head.
        formats: "onnx", "int8" and "openvino".

    Returns:
        What was written, in the order of `formats`.

    Raises:
        ImportError: If a package is missing.
        OSError: If the folder holds no model.
        ValueError: If a format is unknown, the model is not ours, or a file computes something else than PyTorch.

    Example:
        >>> import tempfile
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperModel, save_for_hub
        >>> config = SuperShaperConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=50)
        >>> with tempfile.TemporaryDirectory() as parent:  # doctest: +SKIP
        ...     folder = save_for_hub(SuperShaperModel(config), f"{parent}/tiny")
        ...     [file.path for file in add_exports(folder)]
        ['onnx/model.onnx', 'onnx/model_quantized.onnx']
    """
    check_packages(formats)
    folder = Path(folder)
    model = model_to_export(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as directory:  # hidden: it is never published
        partial = Path(directory)
        graph = export_onnx(model, partial / ONNX_FILE)
        makers = {
            "onnx": lambda: graph,
            "int8": lambda: export_int8(model, folder, partial),
            "openvino": lambda: export_openvino(model, folder, partial),
        }
        exported = [makers[name]() for name in formats]
        for file in exported:
            for path in files_of(partial, file.path):
                target = folder / path.relative_to(partial)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
    return exported


def check_packages(formats: Sequence[str]) -> None:
    """Raise an ImportError that names the packages which `formats` need, or a ValueError if a format is unknown."""
    for name in formats:
        check_choice("formats", name, PACKAGES)
    needed = dict.fromkeys(package for name in formats for package in PACKAGES[name])
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"Exporting to {', '.join(formats)} needs {', '.join(missing)}: pip install 'supershaper-hf[export]'"
        )


def model_to_export(folder: Path) -> SuperShaperPreTrainedModel:
    """Load the model in `folder` in 32-bit floats. Of a sentence encoder, this is the part that makes token states."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Save the model there with save_for_hub first.")
    config = SuperShaperConfig.from_pretrained(folder)
    name = (config.architectures or ["SuperShaperModel"])[0]
    check_choice(f"{folder}: architectures", name, modeling_supershaper.__all__)
    model = getattr(modeling_supershaper, name).from_pretrained(folder, dtype=torch.float32).eval()
    if (folder / MODULES_FILE).is_file():
        model = model.base_model
        model.pooler = None
    return model


def files_of(folder: Path, path: str) -> list[Path]:
    """Return a file in `folder` and, of an OpenVINO model, the one with its weights."""
    file = folder / path
    return [file, file.with_suffix(".bin")] if file.suffix == ".xml" else [file]


def export_onnx(model: SuperShaperPreTrainedModel, file: Path) -> ExportedFile:
    """Write the ONNX file of `model` and compare it with `model`."""
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    axes = input_axes(model)
    sizes = {"sequence_length": torch.export.Dim("sequence_length", max=model.config.max_position_embeddings)}
    dynamic = {index: sizes.get(axis) or torch.export.Dim(axis) for index, axis in enumerate(axes)}
    inputs = random_inputs(model.config, (2,) * (len(axes) - 1) + (min(9, model.config.max_position_embeddings),), 0)
    with quiet():
        exported = OnnxExporter().export(
            model,
            {name: torch.from_numpy(array) for name, array in inputs.items()},
            OnnxConfig(dynamic=True, dynamic_shapes=dict.fromkeys(INPUTS, dynamic), opset_version=OPSET),
        )
    name_by_module(exported.program, axes)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(exported.program, file)
    difference = check_export(model, onnx_session(file), file.name)
    return ExportedFile(ONNX_FILE, "onnx", file.stat().st_size, difference, settings={"opset": OPSET})


def name_by_module(graph_model: Any, axes: Sequence[str]) -> None:
    """Name the nodes of an ONNX model by their modules and the axes by what they are; remove all other annotations.

    The annotations of the exporter hold the paths of source files. The names tell `quantize` which maps are
    bottlenecks, and are what one reads in a viewer.
    """
    import onnx_ir

    graph = graph_model.graph
    known = {str(symbol): axis for symbol, axis in zip(graph.inputs[0].shape, axes)}
    pattern = re.compile(r"\b(" + "|".join(known) + r")\b")
    seen: dict[str, int] = {}
    described = [graph_model, graph, *graph, *graph.inputs, *graph.initializers.values()]
    for node in graph:
        _, *modules, _ = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[None, None]"))
        name = f"{modules[-1]}.{node.op_type}" if modules else node.op_type
        seen[name] = seen.get(name, 0) + 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
    for thing in [*described, *(output for node in graph for output in node.outputs)]:
        thing.metadata_props.clear()
        thing.doc_string = None
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None:
            sizes = [size if isinstance(size, int) else size.value for size in value.shape]
            value.shape = onnx_ir.Shape(
                pattern.sub(lambda match: known[match[0]], size) if isinstance(size, str) else size for size in sizes
            )


def export_int8(model: SuperShaperPreTrainedModel, folder: Path, partial: Path) -> ExportedFile:
    """Quantise the ONNX file in `partial`, with texts for the tokenizer of `folder`."""
    file = partial / QUANTIZED_FILE
    chosen = quantize(partial / ONNX_FILE, file, model, folder)
    return ExportedFile(
        QUANTIZED_FILE, "int8", file.stat().st_size, chosen.difference, chosen.cosine, settings=chosen.settings
    )


def export_openvino(model: SuperShaperPreTrainedModel, folder: Path, partial: Path) -> ExportedFile:
    """Convert the ONNX file in `partial` to OpenVINO's format, with 32-bit weights, and compare it.

    It is compared in 32-bit arithmetic. Unless it is asked for that, OpenVINO computes in bfloat16 on processors that
    can: the settings say what this one does and how far the outputs are from PyTorch's then.
    """
    import openvino

    file = partial / OPENVINO_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(openvino.convert_model(partial / ONNX_FILE), file, compress_to_fp16=False)
    difference = check_export(model, openvino_session(file, INFERENCE_PRECISION_HINT="f32"), file.name)
    inputs = quantization_inputs(model, folder)
    by_default, _ = largest_difference(run_model(model, inputs), openvino_session(file)(inputs))
    precision = openvino.Core().compile_model(file, "CPU").get_property("INFERENCE_PRECISION_HINT")
    size = sum(path.stat().st_size for path in files_of(partial, OPENVINO_FILE))
    settings = {"weights": "f32", "default_precision": precision.get_type_name(), "default_difference": by_default}
    return ExportedFile(OPENVINO_FILE, "openvino", size, difference, settings=settings)


def openvino_session(file: Path, **properties: Any) -> Run:
    """Return a function that runs an OpenVINO file on the CPU: arrays by name in, arrays by name out.

    It uses as many threads as PyTorch.
    """
    import openvino

    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(file, "CPU", threads | properties)
    names = [output.get_any_name() for output in compiled.outputs]
    return lambda inputs: dict(zip(names, compiled(inputs).values()))


def check_export(model: SuperShaperPreTrainedModel, run: Run, name: str) -> float:
    """Return the largest difference between an exported file and `model` on inputs of many sizes.

    Raises:
        ValueError: If it is too large for two orders of the same sums.
    """
    largest = 0.0
    for inputs in many_inputs(model):
        difference, scale = largest_difference(run_model(model, inputs), run(inputs))
        if not difference <= TOLERANCE * max(1.0, scale):  # NaN is refused too
            raise ValueError(
                f"{name} differs from PyTorch by {difference:.2g} on inputs of size {inputs['input_ids'].shape}, where "
                f"the largest output is {scale:.2g}; allowed is {TOLERANCE * max(1.0, scale):.2g}. No file was "
                "written. Export again with the versions of torch, transformers and onnx in constraints.txt."
            )
        largest = max(largest, difference)
    return largest


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters of torch and transformers from printing progress, and warnings on parts that are not used."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "transformers.exporters")]
    levels = [logger.level for logger in loggers]
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
