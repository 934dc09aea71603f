r"""Add files to a subnet's folder that run without PyTorch: ONNX, ONNX of 8-bit integers, and OpenVINO.

    python examples/export_subnet.py --model SUBNET
    python examples/export_subnet.py --model SUPERNET --shape 240 144 96 240 288 384 --output_dir outputs/subnet

SUBNET is a folder that `save_for_hub` has written, with any head, and gets the files. With a SUPERNET, a folder or Hub
id, a subnet is cut and saved in the output folder first. This needs `pip install 'supershaper-hf[export]'`.

Every file is compared with PyTorch before it appears: batches of 1 to 8, lengths of 1 to the longest, with padding. The
printed table has the sizes, the largest difference from PyTorch, for 8 bits the mean cosine, and the median time of a
batch, for which all files take turns.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

import supershaper_hf
from supershaper_hf import SuperShaperConfig, add_exports, read_sentence_encoder, save_for_hub, text_table
from supershaper_hf.checks import check_count
from supershaper_hf.publish.comparison import Arrays, Run, input_axes, random_inputs, run_model
from supershaper_hf.publish.export import check_packages, model_to_export, openvino_session
from supershaper_hf.publish.quantization import onnx_session
from supershaper_hf.training.arguments import HelpFormatter, option


WEIGHTS = "*.safetensors"


PAUSE = 0.1  # seconds before a run: the threads of the library that ran last look for more work for up to so long


@dataclass
class ExportArguments:
    """The options of this script."""

    model: str = option("", "Folder of a subnet, or folder or Hub id of a supernet.")
    shape: list[int] | None = option(None, "With a supernet, the shape: one width for each layer; 0 drops the layer.")
    output_dir: str | None = option(None, "With a supernet, the new folder of the subnet.")
    formats: list[str] | None = option(None, "What to write: onnx, int8 and openvino. By default onnx and int8.")
    batch_size: int = option(1, "Sequences in the batch that is timed.")
    sequence_length: int = option(128, "Tokens of each; at most what the model can read.")
    repeats: int = option(15, "How often each file is timed.")

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "repeats"):
            check_count(name, getattr(self, name))
        if (self.shape is None) != (self.output_dir is None):
            raise ValueError("--shape and --output_dir go together: they are for cutting a subnet out of a supernet.")


def parse_arguments(argv: list[str]) -> ExportArguments:
    parser = HfArgumentParser((ExportArguments,), description=__doc__, formatter_class=HelpFormatter)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        parser.error(str(error))
    if not args.model:
        parser.error("--model is missing. See --help.")
    return args


def subnet_folder(args: ExportArguments) -> Path:
    """Return the folder of the subnet, which is cut first if the model is a supernet.

    Raises:
        ValueError: If a supernet has no shape, or a subnet has one.
    """
    config = AutoConfig.from_pretrained(args.model)
    elastic = isinstance(config, SuperShaperConfig) and not config.merged_bottlenecks
    if elastic and args.shape is None:
        raise ValueError(f"--model {args.model} is a supernet: give --shape and --output_dir.")
    if args.shape is None or args.output_dir is None:
        return Path(args.model)
    if not elastic:
        raise ValueError(f"--model {args.model} is not a supernet: leave out --shape and --output_dir.")
    name = (config.architectures or ["SuperShaperModel"])[0]
    subnet = getattr(supershaper_hf, name).from_pretrained(args.model).extract_subnet(args.shape)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return save_for_hub(subnet, args.output_dir, tokenizer=tokenizer, **read_sentence_encoder(args.model))


def median_milliseconds(runs: Mapping[str, Run], inputs: Arrays, repeats: int) -> dict[str, float]:
    """Return the median time of each run. They take turns, so that a slow moment of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):  # the first one warms up
        for name, run in runs.items():
            time.sleep(PAUSE)
            started = time.perf_counter()
            run(inputs)
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * float(np.median(each)) for name, each in seconds.items()}


def main() -> int:
    args = parse_arguments(sys.argv[1:])
    formats = args.formats or ["onnx", "int8"]
    check_packages(formats)
    folder = subnet_folder(args)
    files = add_exports(folder, formats)
    model = model_to_export(folder)
    length = min(args.sequence_length, model.config.max_position_embeddings)
    inputs = random_inputs(model.config, (args.batch_size, *[2] * (len(input_axes(model)) - 2), length), seed=0)
    inputs["attention_mask"][:] = 1
    weights = sum(file.stat().st_size for file in folder.glob(WEIGHTS))
    rows: list[dict[str, Any]] = [
        {"file": WEIGHTS, "format": "pytorch", "MB": weights / 1e6, "largest difference": "", "cosine": ""}
    ]
    runs: dict[str, Run] = {WEIGHTS: lambda inputs: run_model(model, inputs)}
    for file in files:
        runs[file.path] = (openvino_session if file.format == "openvino" else onnx_session)(folder / file.path)
        figures = {
            "largest difference": f"{file.difference:.1e}",
            "cosine": f"{file.cosine:.4f}" if file.cosine else "",
        }
        rows.append({"file": file.path, "format": file.format, "MB": file.size / 1e6} | figures)
    milliseconds = median_milliseconds(runs, inputs, args.repeats)
    print(text_table([row | {"ms": milliseconds[row["file"]]} for row in rows]))
    print(f"ms: batch {args.batch_size} x {length} tokens on {torch.get_num_threads()} threads.")
    for file in files:
        print(f"{file.path}: {', '.join(f'{name}={value}' for name, value in file.settings.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
