"""How fast is a subnet on a CPU, in PyTorch, ONNX Runtime and 8-bit integers, beside the BERT it was cut from?

    python benchmarks/inference.py                          # about 10 minutes on two cores
    python benchmarks/inference.py --formats pytorch        # without ONNX, about 5 minutes
    python benchmarks/inference.py --output inference.json  # all times, as JSON
    python benchmarks/inference.py --quick                  # tiny models: does it run?

BERT-base is transformers' `BertModel`. The subnet has the shape "supershaper" with at most 63 M parameters. Unmerged is
the same with two bottlenecks between neighbouring layers, out to hidden_size and in again, as the code of the paper
runs it; all else is equal. The BERT of half the layers has as many parameters as the subnet: its FFN is narrower than
that of BERT-base. MiniLM has the size of all-MiniLM-L6-v2, and its subnet 59 % of the parameters of its encoder. The
weights are random, because the time does not depend on them. No model has a head, all have the pooler.

ONNX and int8 are the files of `add_exports`. The bottlenecks of an int8 subnet stay in 32 bits, as it chooses for
trained ones. Each sweep runs every model once in every format, in random order, so that a slow moment of the machine
does not always meet the same one. The table has medians, and in brackets the distance between the quartiles in percent
of the median. "Of its BERT" is the time divided by that of BERT-base, or of MiniLM, in PyTorch. Every ratio is the
median of the ratios of the sweeps.
"""

import argparse
import functools
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sweeps import Contender, Key, make_batch, run_pytorch, time_contenders
from torch import nn
from train_step import PlainEncoder
from transformers import BertConfig, BertModel, PreTrainedModel

from supershaper_hf import SearchSpace, SuperShaperConfig, SuperShaperModel
from supershaper_hf.devices import device_name
from supershaper_hf.files import write_json
from supershaper_hf.model.elastic import bottleneck
from supershaper_hf.model.modeling_supershaper import empty_model
from supershaper_hf.report.tables import markdown_table


FORMATS = ("pytorch", "onnx", "int8")
FILE_FORMAT = "supershaper-hf inference 1"

BASE = {"vocab_size": 28_996, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
MINILM = {**BASE, "vocab_size": 30_522, "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
MINILM_SHAPE = [240, 144, 96, 240, 288, 384]
QUICK = {"vocab_size": 50, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
QUICK |= {"intermediate_size": 64, "max_position_embeddings": 16}
QUICK_SHAPE = [40, 72]

BERT, HALF, SUBNET, UNMERGED = "BERT-base", "BERT of half the layers", "subnet", "subnet, unmerged"
SMALL_BERT, SMALL_SUBNET = "MiniLM", "subnet of MiniLM"
ORIGIN = {SMALL_BERT: SMALL_BERT, SMALL_SUBNET: SMALL_BERT}  # of all others, BERT-base

# Of the largest batch: the time of the first may be so much of the time of the second.
TARGETS: list[tuple[Key, Key, float]] = [
    ((SUBNET, "pytorch"), (UNMERGED, "pytorch"), 0.92),
    ((SUBNET, "pytorch"), (HALF, "pytorch"), 1.15),
    ((SUBNET, "int8"), (SUBNET, "onnx"), 0.5),
    ((SUBNET, "int8"), (SUBNET, "pytorch"), 0.5),
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32], help="sequences in a batch")
    parser.add_argument("--repeats", type=int, nargs="+", default=[30, 7], help="sweeps, for each batch size")
    parser.add_argument("--sequence_length", type=int, default=128, help="tokens in a sequence, none of them padding")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="what runs the models")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch and of ONNX Runtime")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights, tokens and orders")
    parser.add_argument("--output", type=Path, help="JSON file to write all times to")
    parser.add_argument("--quick", action="store_true", help="tiny models and few sweeps, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.batch_sizes, args.repeats, args.sequence_length = [1, 3], [2, 3], 9
    if len(args.repeats) != len(args.batch_sizes):
        parser.error(f"--repeats {args.repeats} needs one number for each of --batch_sizes {args.batch_sizes}.")
    return args


def make_models(quick: bool, seed: int) -> dict[str, PreTrainedModel]:
    """Build every model with random weights, by its name in the table."""
    config = SuperShaperConfig(**(QUICK if quick else BASE))
    space = SearchSpace.from_config(config)
    shape = QUICK_SHAPE if quick else space.named_shape("supershaper", max_parameters=63_000_000)
    small_config = SuperShaperConfig(**(QUICK if quick else MINILM))
    subnet = SuperShaperModel(config.subnet_config(shape))
    models = {
        BERT: bert_like(config),
        HALF: bert_of_half_the_layers(config, subnet.num_parameters()),
        SUBNET: subnet,
        UNMERGED: unmerged_subnet(config, shape),
        SMALL_BERT: bert_like(small_config),
        SMALL_SUBNET: SuperShaperModel(small_config.subnet_config(QUICK_SHAPE if quick else MINILM_SHAPE)),
    }
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for model in models.values():
            # A new bottleneck holds zeros and ones, on which a processor may be faster.
            for name, parameter in model.eval().named_parameters():
                parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.02, generator=generator)
    return models


def bert_config(config: SuperShaperConfig, **changes: int) -> BertConfig:
    """Return the configuration of the BERT that a supernet is made of, with some sizes changed."""
    names = [*BASE, "intermediate_size", "max_position_embeddings"]
    return BertConfig(**{**{name: getattr(config, name) for name in names}, **changes})


def bert_like(config: SuperShaperConfig, **changes: int) -> BertModel:
    return BertModel(bert_config(config, **changes))


def bert_of_half_the_layers(config: SuperShaperConfig, parameters: int) -> BertModel:
    """Build a BERT of half the layers with about as many `parameters`: its FFN is a multiple of 16 wide."""
    layers = config.num_hidden_layers // 2
    narrow, wide = (
        empty_model(BertModel, bert_config(config, num_hidden_layers=layers, intermediate_size=width)).num_parameters()
        for width in (16, 32)
    )
    steps = round((parameters - narrow) / (wide - narrow))
    return bert_like(config, num_hidden_layers=layers, intermediate_size=16 * (1 + steps))


def unmerged_subnet(config: SuperShaperConfig, shape: list[int]) -> SuperShaperModel:
    """Build the subnet at `shape` with two bottlenecks between neighbouring layers, as they are in a supernet."""
    model, full = SuperShaperModel(config.subnet_config(shape)), config.hidden_size
    model.encoder.input_bottleneck = nn.ModuleList(bottleneck(full, width) for width in shape)
    model.encoder.output_bottleneck = nn.ModuleList(bottleneck(width, full) for width in shape)
    model.encoder.__class__ = PlainEncoder
    return model


def make_contenders(
    models: Mapping[str, PreTrainedModel], formats: list[str], threads: int, folder: Path
) -> dict[Key, Contender]:
    """Bring every model into every format."""
    contenders = {}
    for name, model in models.items():
        if "pytorch" in formats:
            size = sum(parameter.nbytes for parameter in model.parameters())
            contenders[name, "pytorch"] = Contender(size, functools.partial(run_pytorch, model))
        for kind, file in write_files(model, formats, folder / name).items():
            contenders[name, kind] = Contender(file.stat().st_size, onnx_runner(file, threads))
    return contenders


def write_files(model: PreTrainedModel, formats: list[str], folder: Path) -> dict[str, Path]:
    """Write the ONNX file of `model` and the one of 8-bit integers, if asked for, and return where they are."""
    if not {"onnx", "int8"} & set(formats):
        return {}
    from supershaper_hf.publish.export import export_onnx
    from supershaper_hf.publish.quantization import CANDIDATES, write_quantized

    files = {"onnx": folder / "model.onnx", "int8": folder / "model_quantized.onnx"}
    export_onnx(model, files["onnx"])
    if "int8" in formats:
        write_quantized(files["onnx"], files["int8"], {**CANDIDATES[0], "fp32_bottlenecks": True})
    return {kind: files[kind] for kind in formats if kind in files}


def onnx_runner(file: Path, threads: int) -> Callable[[Mapping[str, np.ndarray]], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, dict(batch))


def ratio(seconds: Mapping[Key, list[float]], first: Key, second: Key) -> float:
    """Return the median over the sweeps of the time of the first over that of the second."""
    return statistics.median(one / other for one, other in zip(seconds[first], seconds[second]))


def table_rows(
    models: Mapping[str, PreTrainedModel],
    contenders: Mapping[Key, Contender],
    seconds: Mapping[int, Mapping[Key, list[float]]],
) -> list[dict[str, Any]]:
    """Return a row for every model and format, with two columns for each batch size."""
    _, first_format = next(iter(contenders))
    rows = []
    for (name, kind), contender in contenders.items():
        origin = ORIGIN.get(name, BERT)
        row = {"model": name, "parameters": models[name].num_parameters(), "format": kind}
        row["MB"] = f"{contender.size / 1e6:.1f}"
        for batch_size, times in seconds.items():
            low, median, high = np.quantile(times[name, kind], [0.25, 0.5, 0.75])
            row[f"batch {batch_size}: ms"] = f"{1e3 * median:.1f} ({(high - low) / median:.0%})"
            row[f"batch {batch_size}: of its BERT"] = ratio(times, (name, kind), (origin, first_format))
        rows.append(row)
    return rows


def check_targets(seconds: Mapping[Key, list[float]]) -> list[dict[str, Any]]:
    """Return the ratios of `TARGETS` whose formats were measured."""
    measured = [target for target in TARGETS if target[0] in seconds and target[1] in seconds]
    return [
        {"time": list(first), "of": list(second), "measured": ratio(seconds, first, second), "target": most}
        for first, second, most in measured
    ]


def conditions_of(args: argparse.Namespace, models: Mapping[str, PreTrainedModel]) -> dict[str, Any]:
    """Return what the times depend on: machine, versions, and the sizes of the models."""
    packages = ["torch", "transformers", *(["onnxruntime"] if set(args.formats) != {"pytorch"} else [])]
    sizes = ("num_hidden_layers", "hidden_size", "hidden_sizes", "intermediate_size")
    return {
        "device": device_name("cpu"),
        **{package: importlib.metadata.version(package) for package in packages},
        "sequence_length": args.sequence_length,
        "models": {
            name: {size: getattr(model.config, size) for size in sizes if hasattr(model.config, size)}
            for name, model in models.items()
        },
    }


def main() -> None:
    args = parse_arguments()
    start = time.perf_counter()
    torch.set_num_threads(args.threads)
    models = make_models(args.quick, args.seed)
    vocab_size = min(model.config.vocab_size for model in models.values())
    with tempfile.TemporaryDirectory() as folder:
        contenders = make_contenders(models, args.formats, args.threads, Path(folder))
        prepared = time.perf_counter() - start
        seconds = {}
        for batch_size, repeats in zip(args.batch_sizes, args.repeats):
            batch = make_batch(batch_size, args.sequence_length, vocab_size, args.seed)
            seconds[batch_size] = time_contenders(contenders, batch, repeats, args.seed)
        conditions, targets = conditions_of(args, models), check_targets(seconds[args.batch_sizes[-1]])
    for name, value in conditions.items():
        print(f"{name}: {value}")
    print(f"sweeps: {args.repeats}\n\n{markdown_table(table_rows(models, contenders, seconds))}\n")
    for target in targets:
        first, second = (", ".join(target[key]) for key in ("time", "of"))
        print(f"{first} / {second}: {target['measured']:.3f} (target: at most {target['target']})")
    print(f"\n{time.perf_counter() - start:.0f} s in all, {prepared:.0f} s of them to build and export the models")
    if args.output:
        times = [
            {
                "model": name,
                "format": kind,
                "batch_size": batch_size,
                "bytes": contenders[name, kind].size,
                "seconds": each,
            }
            for batch_size, by_key in seconds.items()
            for (name, kind), each in by_key.items()
        ]
        write_json(args.output, FILE_FORMAT, {**conditions, "targets": targets, "times": times})


if __name__ == "__main__":
    main()
