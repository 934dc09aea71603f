"""How well does a latency table predict whole subnets? Does latency follow from size alone? What do odd widths cost?

    python benchmarks/latency.py                                         # CPU, bert-base size: about 5 minutes
    python benchmarks/latency.py --small                                 # a small BERT, half a minute
    python benchmarks/latency.py --device cuda --dtype bfloat16 --batch_size 32 --save table.json

Sweeps of the table alternate with runs of whole subnets, so that a slow moment of the machine meets both. The machine
has to be quiet, and to have memory for all subnets at once: 10 GB at bert-base size in float32.
"""

import argparse
import time

import numpy as np
import torch

from supershaper_hf import SearchSpace, SuperShaperConfig
from supershaper_hf.latency.insensitivity import compare_equal_sizes, insensitivity_rows, width_rows
from supershaper_hf.latency.table import LatencyProbe, LatencyTable
from supershaper_hf.latency.timing import SubnetTimer
from supershaper_hf.report.tables import markdown_table


TARGET = 0.05
WARMUP = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=768, help="this and the next four: size of the BERT")
    parser.add_argument("--num_hidden_layers", type=int, default=12)
    parser.add_argument("--num_attention_heads", type=int, default=12)
    parser.add_argument("--intermediate_size", type=int, default=3072)
    parser.add_argument("--vocab_size", type=int, default=28_996)
    parser.add_argument("--small", action="store_true", help="hidden size 256, 6 layers, 4 heads, vocabulary 8,000")
    parser.add_argument("--device", default="cpu", help="device to measure on, such as cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of weights")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences in a batch")
    parser.add_argument("--sequence_length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--num_shapes", type=int, default=30, help="random shapes to predict and measure")
    parser.add_argument("--repeats", type=int, default=12, help="sweeps over all subnets")
    parser.add_argument(
        "--parameters", type=int, nargs="*", help="sizes to compare shapes of; default: at 20, 50, 80 %% of the range"
    )
    parser.add_argument("--num_equal_shapes", type=int, default=10, help="number of shapes of each of these sizes")
    parser.add_argument("--seed", type=int, default=0, help="random seed of shapes and weights")
    parser.add_argument("--save", help="file to write the table to")
    return parser.parse_args()


def make_config(args: argparse.Namespace) -> SuperShaperConfig:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    sizes = {name: getattr(args, name) for name in names}
    if args.small:
        sizes = dict(zip(names, (256, 6, 4, 1024, 8_000)))
    return SuperShaperConfig(**sizes, max_position_embeddings=max(512, args.sequence_length))


def predict_and_measure(space: SearchSpace, args: argparse.Namespace, conditions: dict) -> LatencyTable:
    """Print how far predictions are from the seconds of whole subnets, and return the table."""
    shapes = space.sample(args.num_shapes, args.seed, distribution="budget")
    probe, timer = LatencyProbe(space, **conditions), SubnetTimer(space, shapes, **conditions)
    for sweep in range(WARMUP + args.repeats):
        probe.sweep(keep=sweep >= WARMUP)
        timer.sweep(keep=sweep >= WARMUP)
    table, truth = probe.table(), np.median(timer.seconds, axis=0)
    errors = table.predict(shapes) / truth - 1
    halves = [np.median(timer.seconds[start::2], axis=0) for start in (0, 1)] if args.repeats > 1 else [truth, truth]
    sizes = space.num_parameters(shapes)
    print(f"{table.device}, torch {table.torch_version}, {table.dtype}, attention {table.attention}")
    print(f"batch {table.batch_size} x {table.sequence_length}, {args.repeats} interleaved sweeps, widths")
    print(f"{table.width_choices}, {space.num_layers} layers\n")
    print(
        f"{args.num_shapes} random shapes of {sizes.min() / 1e6:.1f} to {sizes.max() / 1e6:.1f} M parameters, ", end=""
    )
    print(f"{truth.min() * 1e3:.1f} to {truth.max() * 1e3:.1f} ms, predicted from the table:")
    print(
        f"median error {np.median(np.abs(errors)):.1%}, largest {np.abs(errors).max():.1%}, mean {errors.mean():+.1%}"
    )
    print(f"within {TARGET:.0%} (the target): {(np.abs(errors) <= TARGET).sum()} of {len(errors)}")
    print(f"correlation of predicted and measured seconds: {np.corrcoef(table.predict(shapes), truth)[0, 1]:.4f}")
    print(f"medians of odd and of even sweeps differ by {np.median(np.abs(halves[0] / halves[1] - 1)):.1%} (median)")
    print(f"spread of the table's blocks: {np.median(table.spread.blocks):.1%} between the quartiles (median)")
    return table


def main() -> None:
    args = parse_arguments()
    start = time.perf_counter()
    space = SearchSpace.from_config(make_config(args))
    conditions = {
        "device": args.device,
        "batch_size": args.batch_size,
        "sequence_length": args.sequence_length,
        "dtype": getattr(torch, args.dtype),
        "seed": args.seed,
    }
    table = predict_and_measure(space, args, conditions)
    if args.save:
        table.save(args.save)

    smallest, largest = space.num_parameters(space.smallest), space.num_parameters(space.largest)
    sizes = args.parameters or [round(smallest + share * (largest - smallest)) for share in (0.2, 0.5, 0.8)]
    comparisons = compare_equal_sizes(space, sizes, args.num_equal_shapes, repeats=args.repeats, **conditions)
    print("\nShapes of equal size, within 2 %: the paper's spread is about 1 %\n")
    print(markdown_table(insensitivity_rows(comparisons)))
    print("\nBlocks that keep their width\n")
    print(markdown_table(width_rows(table)))
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
