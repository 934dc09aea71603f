"""Measure the speed and the memory of `evaluate_shapes` on a supernet of BERT-base size.

    python benchmarks/evaluate_shapes.py           # 2 minutes on two cores
    python benchmarks/evaluate_shapes.py --small   # half a minute

Speed: three ways to measure a random shape take turns, several times. They are `evaluate_shapes` on the supernet, a
plain loop over the batches with the subnet cut at that shape, and a strict loop: a plain one whose masked-LM head, too,
computes labelled positions only. The time that cutting takes is not counted. Target: at least 85 % of the strict
loop's speed.

Memory: the peak of a new process that measures several shapes, and of one that measures only the full shape.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from supershaper_hf import SearchSpace, SuperShaperConfig, SuperShaperForMaskedLM, evaluate_shapes
from supershaper_hf.checks import check_count


SMALL = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
LENGTH = 128
TARGET = 0.85


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a supernet of 192 hidden units and 6 layers")
    parser.add_argument("--num_shapes", type=int, default=3, help="random shapes to measure")
    parser.add_argument("--num_batches", type=int, default=2, help="batches that each shape is measured on")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--repeats", type=int, default=3, help="times that each way is measured")
    parser.add_argument("--head_slicing", choices=["prefix", "per_head"], default="prefix", help="as in the config")
    parser.add_argument("--peak_of", choices=["full", "sampled"], help="measure these shapes and print the peak in MB")
    args = parser.parse_args()
    for name in ("num_shapes", "num_batches", "batch_size", "repeats"):
        check_count(f"--{name}", getattr(args, name))
    return args


def make_supernet(args: argparse.Namespace) -> SuperShaperForMaskedLM:
    torch.manual_seed(0)
    sizes = SMALL if args.small else {}
    config = SuperShaperConfig(vocab_size=28996, head_slicing=args.head_slicing, **sizes)
    return SuperShaperForMaskedLM(config).to("cuda" if torch.cuda.is_available() else "cpu").eval()


def make_batches(args: argparse.Namespace, vocab_size: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of random tokens, of which 15 % are labelled. The time does not depend on the tokens."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(args.num_batches):
        ids = torch.randint(5, vocab_size, (args.batch_size, LENGTH), generator=generator)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) > 0.15, -100)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


@torch.no_grad()
def plain_loop(
    subnet: SuperShaperForMaskedLM, batches: list[dict[str, torch.Tensor]], sparse_prediction: bool
) -> float:
    """Return the loss of a subnet, computed by the simplest loop."""
    total, labelled = 0.0, 0
    for batch in batches:
        moved = {name: tensor.to(subnet.device) for name, tensor in batch.items()}
        count = int((batch["labels"] != -100).sum())
        total += subnet(**moved, sparse_prediction=sparse_prediction).loss.item() * count
        labelled += count
    return total / labelled


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def compare_speed(args: argparse.Namespace) -> None:
    supernet = make_supernet(args)
    space = SearchSpace.from_config(supernet.config)
    batches = make_batches(args, supernet.config.vocab_size)
    tokens = args.num_batches * args.batch_size * LENGTH
    print(
        f"supernet {supernet.num_parameters():,} parameters, {args.num_batches} batches of {args.batch_size} x {LENGTH}"
    )
    print(f"{args.head_slicing} slicing; {torch.get_num_threads()} threads, {supernet.device.type}\n")
    print("parameters   supernet   strict   plain   (tokens/s, medians)   against strict   against plain")
    against: dict[str, list[float]] = {"strict": [], "plain": []}
    for shape in space.sample(args.num_shapes, seed=0, distribution="budget"):
        subnet = supernet.extract_subnet(shape)
        ways = {
            "supernet": partial(evaluate_shapes, supernet, batches, [shape]),
            "strict": partial(plain_loop, subnet, batches, sparse_prediction=True),
            "plain": partial(plain_loop, subnet, batches, sparse_prediction=False),
        }
        difference = abs(ways["supernet"]()[0]["loss"] - ways["strict"]())  # also warms both up
        assert difference < 1e-4, f"supernet and subnet differ by {difference} nats at {shape}"
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, act in ways.items():
                times[name].append(seconds(act))
        medians = {name: statistics.median(found) for name, found in times.items()}
        for name, found in against.items():
            found.append(medians[name] / medians["supernet"])
        speeds = "   ".join(f"{tokens / median:6.0f}" for median in medians.values())
        print(
            f"{space.num_parameters(shape):10,}   {speeds}   {against['strict'][-1]:.1%}   {against['plain'][-1]:.1%}"
        )
        del subnet, ways
        gc.collect()
    for name, found in against.items():
        print(
            f"against {name}: median {statistics.median(found):.1%}, lowest {min(found):.1%}, highest {max(found):.1%}"
        )
    print(f"target: at least {TARGET:.0%} of strict\n")


def report_peak(args: argparse.Namespace) -> None:
    """Measure shapes in this process and print its peak resident memory in MB (10^6 bytes)."""
    supernet = make_supernet(args)
    space = SearchSpace.from_config(supernet.config)
    shapes = [space.largest] if args.peak_of == "full" else [space.largest, *space.sample(args.num_shapes, seed=0)]
    evaluate_shapes(supernet, make_batches(args, supernet.config.vocab_size), shapes)
    # Linux. The peak of this process alone: ru_maxrss would include the memory of the parent at the fork.
    with open("/proc/self/status") as status:
        kilobytes = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(kilobytes * 1024 / 1e6)


def compare_memory(args: argparse.Namespace) -> None:
    peaks = {}
    for what in ("full", "sampled"):
        command = [sys.executable, __file__, *sys.argv[1:], "--peak_of", what]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[what] = float(done.stdout.split()[-1])
    print(
        f"peak of a process that measures the full shape {peaks['full']:.0f} MB; that and {args.num_shapes} more ",
        end="",
    )
    print(f"{peaks['sampled']:.0f} MB, {peaks['sampled'] / peaks['full'] - 1:+.1%}")
    print("target: the memory of one supernet, without another model for each shape")


def main() -> None:
    args = parse_arguments()
    if args.peak_of:
        report_peak(args)
    else:
        compare_speed(args)
        compare_memory(args)


if __name__ == "__main__":
    main()
