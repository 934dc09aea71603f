"""Make 8-bit files of ONNX files, with settings that are chosen by measuring them.

ONNX Runtime quantises dynamically: weights are stored as 8-bit integers, activations are rounded to 8 bits while the
model runs. Three things decide how good the result is:

- A scale for every output channel (`per_channel`) instead of one for a whole weight. It costs no time; with one scale
  the cosine of all-MiniLM-L6-v2 falls from .990 to .878.
- The integers of the weights. Processors that have AVX2 but no VNNI add two products of an unsigned and a signed byte
  in 16 bits, which overflow without an error: at worst 2 * 255 * 127 = 64,770 for 32,767. So only weights that cannot
  overflow anywhere are tried: signed ones of 7 bits (`reduce_range`; at worst 2 * 255 * 64 = 32,640), which are the
  fastest, and unsigned ones of 8 bits, for which another instruction is used that takes 1.4 to 1.7 times as long. An
  exported file is published; that full signed weights look right on this machine would not help the others.
- Which maps stay in 32 bits. Every value of a state passes through the bottlenecks of a subnet, and no residual goes
  around them: with 32-bit bottlenecks the cosine of a subnet of MiniLM rises from .985 to .995, and its size from .26
  to .28 of the original.

Source: the documentation of ONNX Runtime on quantisation, sections "Data type selection" and "U8S8".
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..model.modeling_supershaper import SuperShaperPreTrainedModel
from .comparison import (
    CHOICES,
    INPUTS,
    Arrays,
    Run,
    cosine,
    input_axes,
    largest_difference,
    random_inputs,
    real_tokens,
    run_model,
)


# In the order of their speed.
CANDIDATES = [
    {"weights": weights, "per_channel": True, "reduce_range": weights == "QInt8", "fp32_bottlenecks": fp32_bottlenecks}
    for weights in ("QInt8", "QUInt8")
    for fp32_bottlenecks in (False, True)
]
LARGER = 1.15  # than the smallest candidate: a larger one is left out
CLOSE = 0.002  # to the best cosine: the fastest of those that are so close is taken
BOTTLENECK = "_bottleneck."  # in the name of a node
# What the candidates are compared on, if the folder has a tokenizer.
TEXTS = (
    "The river was high after three days of rain.",
    "She opened the letter, read it twice and put it back into the drawer.",
    "How do I change the battery of this phone?",
    "The committee will vote on the proposal next Tuesday.",
    "Prices rose by four percent in the second quarter, mostly because of energy.",
    "A small dog ran across the field behind the house.",
    "The film is far too long, and nothing happens in it.",
    "Install the package and run the tests before you commit.",
    "In 1969 two people walked on the moon for the first time.",
    "Can you recommend a quiet place to eat near the station?",
    "The patient had no fever but complained of a headache.",
    "He plays the piano every evening, and his sister sings.",
)


@dataclass(frozen=True)
class Candidate:
    """A quantised file, and how near it is to PyTorch."""

    file: Path
    settings: dict[str, Any]
    difference: float
    cosine: float

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.file.stat().st_size


def quantize(source: Path, target: Path, model: SuperShaperPreTrainedModel, folder: Path) -> Candidate:
    """Write the best 8-bit file of the ONNX file `source` to `target`.

    Four settings are tried, see `CANDIDATES`. Files that are more than 15 % larger than the smallest are left out. Of
    the others, those whose cosine is within .002 of the best are as good as it, and the fastest kind of them is taken.

    Args:
        source: An ONNX file whose nodes are named by their modules.
        target: The new file.
        model: What it was exported from.
        folder: Where the tokenizer of the model is, if it has one.

    Returns:
        The chosen file, with its settings and how near it is to PyTorch.
    """
    inputs = quantization_inputs(model, folder)
    mask = inputs["attention_mask"]
    expected = real_tokens(run_model(model, inputs), mask)
    candidates = []
    for index, settings in enumerate(CANDIDATES):
        file = target.with_name(f"candidate-{index}.onnx")
        write_quantized(source, file, settings)
        found = real_tokens(onnx_session(file)(inputs), mask)
        difference, _ = largest_difference(expected, found)
        candidates.append(Candidate(file, settings, difference, cosine(expected, found)))
    chosen = choose(candidates)
    chosen.file.replace(target)
    for candidate in candidates:
        candidate.file.unlink(missing_ok=True)
    return Candidate(target, chosen.settings, chosen.difference, chosen.cosine)


def choose(candidates: list[Candidate]) -> Candidate:
    """Return the first candidate that is as good as the best of those that are not much larger than the smallest."""
    smallest = min(candidate.size for candidate in candidates)
    allowed = [candidate for candidate in candidates if candidate.size <= LARGER * smallest]
    best = max(candidate.cosine for candidate in allowed)
    return next(candidate for candidate in allowed if candidate.cosine >= best - CLOSE)


def write_quantized(source: Path, target: Path, settings: dict[str, Any]) -> None:
    """Quantise an ONNX file with the given settings."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = onnx.load(source, load_external_data=False).graph.node
    with without_advice():
        quantize_dynamic(
            source,
            target,
            weight_type=QuantType[settings["weights"]],
            per_channel=settings["per_channel"],
            reduce_range=settings["reduce_range"],
            nodes_to_exclude=[node.name for node in nodes if BOTTLENECK in node.name]
            if settings["fp32_bottlenecks"]
            else [],
        )


@contextmanager
def without_advice() -> Iterator[None]:
    """Keep ONNX Runtime from recommending a preparation of the graph that the exporter has already done."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def quantization_inputs(model: SuperShaperPreTrainedModel, folder: Path) -> Arrays:
    """Return what the candidates are compared on: `TEXTS` if there is a tokenizer, otherwise random tokens."""
    choices = [CHOICES] if "num_choices" in input_axes(model) else []
    tokenizer = load_tokenizer(folder)
    longest = model.config.max_position_embeddings
    if tokenizer is None:
        return random_inputs(model.config, (len(TEXTS), *choices, min(32, longest)), seed=0)
    encoded = tokenizer(list(TEXTS), padding=True, truncation=True, max_length=longest, return_tensors="np")
    inputs = {name: encoded[name].astype(np.int64) for name in encoded if name in INPUTS}
    inputs.setdefault("token_type_ids", np.zeros_like(inputs["input_ids"]))
    return {name: array.reshape(-1, *choices, array.shape[-1]) for name, array in inputs.items()}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in `folder`, or `None` if there is none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder)


def onnx_session(file: Path) -> Run:
    """Return a function that runs an ONNX file on the CPU: arrays by name in, arrays by name out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs)))
