"""The time of one step of super pre-training, of a plain step, and of the machine's matrix products, in turns.

    python benchmarks/train_step.py                                     # CPU: BERT-base size, batch 8 x 128
    python benchmarks/train_step.py --batch_size 256 --precision bf16   # GPU

A step trains the largest shape, the smallest and one random shape, and updates the weights: once with hard labels, and
once with in-place distillation. The plain step does what the 2021 code did: it does not merge bottlenecks, applies the
masked-LM head to every position, uses eager attention, and has no fused kernel for AdamW. Dropout is that of the
paper's recipe: 0 for hidden states, .1 for attention.

The largest pass is one forward and backward pass of the full supernet on labels. Its matrix products are timed too,
with the same sizes and nothing between them: no pass can be faster than they are on this machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch.nn import functional

from supershaper_hf import SearchSpace, SuperShaperConfig, SuperShaperForMaskedLM
from supershaper_hf.devices import matrix_product_rate
from supershaper_hf.model.costs import training_flops
from supershaper_hf.model.elastic import SuperShaperEncoder, elastic_linear
from supershaper_hf.training.distillation import Objective
from supershaper_hf.training.sandwich import decay_groups, sandwich_step


LENGTH = 128
IGNORE_INDEX = -100


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--repeats", type=int, default=7, help="times that each job is measured")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no", help="as in Accelerate")
    parser.add_argument("--attention_dropout", type=float, default=0.1, help="as in the configuration")
    parser.add_argument("--profile", action="store_true", help="Print where the time of the largest pass goes.")
    return parser.parse_args()


def make_model(attention: str, dropout: float) -> SuperShaperForMaskedLM:
    torch.manual_seed(0)
    config = SuperShaperConfig(vocab_size=28996, hidden_dropout_prob=0.0, attention_probs_dropout_prob=dropout)
    config._attn_implementation = attention
    return SuperShaperForMaskedLM(config).train()


def make_batch(batch_size: int, vocab_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return random tokens, 15 % of which are labelled. The time does not depend on the tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocab_size, (batch_size, LENGTH), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) > 0.15, IGNORE_INDEX)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


class PlainEncoder(SuperShaperEncoder):
    """The encoder without merging: every token is mapped to `hidden_size` between two layers."""

    def _enter(self, hidden_states, previous, index, width):
        if previous is not None:
            hidden_states = elastic_linear(self.output_bottleneck[previous], hidden_states)
        return elastic_linear(self.input_bottleneck[index], hidden_states, width)


def plain_step(accelerator, model, batch, shapes, distilled: bool) -> None:
    """Do a step as the 2021 code did it: logits of every position, soft cross-entropy over all of them."""
    teacher = None
    for shape in shapes:
        output = model(**batch, shape=shape)
        loss = output.loss
        if teacher is None:
            teacher = output.logits.detach()
        elif distilled:
            targets = functional.softmax(teacher.flatten(0, 1), dim=-1)
            soft = -(targets * functional.log_softmax(output.logits.flatten(0, 1), dim=-1)).sum(-1).mean()
            loss = 0.5 * loss + 0.5 * soft
        accelerator.backward(loss)


def matrix_products(config, batch_size: int, labelled: int, device, dtype) -> tuple[Callable[[], None], int]:
    """Return a function that does the products of the largest pass, forward and backward, and their FLOPs."""
    tokens, full, ffn, heads = batch_size * LENGTH, config.hidden_size, config.intermediate_size, 12
    layers, vocab = config.num_hidden_layers, config.vocab_size
    # rows, inner, columns, how often: the last bottleneck and the first, merged ones, attention, FFN, the head
    linear = [
        (tokens, full, full, layers * 4 + 2),
        (full, full, full, layers - 1),  # merging ...
        (tokens, full, full, layers - 1),  # ... and the merged product
        (tokens, full, ffn, layers),
        (tokens, ffn, full, layers),
        (labelled, full, full, 1),
        (labelled, full, vocab, 1),
    ]
    batched = [(LENGTH, full // heads, LENGTH, layers), (LENGTH, LENGTH, full // heads, layers)]
    jobs = []
    for (rows, inner, columns, count), size in [
        *((p, None) for p in linear),
        *((p, batch_size * heads) for p in batched),
    ]:
        lead = () if size is None else (size,)
        left, right, out = (
            torch.randn(*lead, *shape, device=device, dtype=dtype)
            for shape in ((rows, inner), (inner, columns), (rows, columns))
        )
        jobs.append((left, right, out, count, 6 * (size or 1) * rows * inner * columns * count))

    def run() -> None:
        for left, right, out, count, _ in jobs:
            for _ in range(count):
                torch.matmul(left, right)
                torch.matmul(out, right.mT)
                torch.matmul(left.mT, out)

    return run, sum(job[-1] for job in jobs)


class Study:
    """Everything that is timed: the models, their optimizers, and one batch for all of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.accelerator = accelerator = Accelerator(mixed_precision=args.precision)
        self.device = accelerator.device
        ours, plain = make_model("sdpa", args.attention_dropout), make_model("eager", args.attention_dropout)
        plain.bert.encoder.__class__ = PlainEncoder
        self.config = ours.config
        space = SearchSpace.from_config(self.config)
        self.largest = space.largest
        self.shapes = [space.largest, space.smallest, *space.sample(1, 0).tolist()]
        optimizers = [
            torch.optim.AdamW(decay_groups(ours, 0.0), lr=1e-5, fused=True),
            torch.optim.AdamW(decay_groups(plain, 0.0), lr=1e-5, foreach=False),
        ]
        self.ours, self.plain, *self.optimizers = accelerator.prepare(ours, plain, *optimizers)
        self.batch = make_batch(args.batch_size, self.config.vocab_size, self.device)
        self.labelled = int((self.batch["labels"] != IGNORE_INDEX).sum())

    def update(self, model, optimizer) -> None:
        self.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def our_step(self, weight: float) -> None:
        sandwich_step(self.accelerator, self.ours, [self.batch], self.shapes, Objective(distillation_weight=weight))
        self.update(self.ours, self.optimizers[0])

    def old_step(self, distilled: bool) -> None:
        plain_step(self.accelerator, self.plain, self.batch, self.shapes, distilled)
        self.update(self.plain, self.optimizers[1])

    def largest_pass(self) -> None:
        self.accelerator.backward(self.ours(**self.batch, shape=self.largest, sparse_prediction=True).loss)


def time_jobs(
    jobs: dict[str, Callable[[], None]], repeats: int, cuda: bool
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Run the jobs one after the other, `repeats` times; return the seconds and the peak memory in GB of each."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    peaks: dict[str, float] = dict.fromkeys(jobs, 0.0)
    for repeat in range(repeats + 1):
        for name, job in jobs.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            job()
            if cuda:
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() / 1e9
            if repeat:  # The first round warms up.
                seconds[name].append(time.perf_counter() - start)
    return seconds, peaks


def main() -> None:
    args = parse_arguments()
    study = Study(args)
    cuda = study.device.type == "cuda"
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    products, product_flops = matrix_products(study.config, args.batch_size, study.labelled, study.device, dtype)
    jobs: dict[str, Callable[[], None]] = {
        "step, hard labels": lambda: study.our_step(0.0),
        "plain step, hard labels": lambda: study.old_step(False),
        "step, distilled": lambda: study.our_step(0.5),
        "plain step, distilled": lambda: study.old_step(True),
        "largest pass": study.largest_pass,
        "its matrix products": products,
    }
    seconds, peaks = time_jobs(jobs, args.repeats, cuda)
    medians = {name: statistics.median(values) for name, values in seconds.items()}

    machine = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, precision {args.precision}, batch {args.batch_size} x {LENGTH}, ")
    print(f"{study.labelled} labels, attention dropout {args.attention_dropout}, shapes {study.shapes}\n")
    for name, values in seconds.items():
        memory = f", peak {peaks[name]:.1f} GB" if cuda else ""
        print(f"{name:26s} median {medians[name]:7.3f} s ({min(values):.3f} to {max(values):.3f}){memory}")
    for kind in ("hard labels", "distilled"):
        ratio = statistics.median(p / o for p, o in zip(seconds[f"plain step, {kind}"], seconds[f"step, {kind}"]))
        print(f"{kind}: {ratio:.2f} times the plain step")
    flops = training_flops(study.config, [study.largest], args.batch_size, LENGTH, study.labelled)
    share = statistics.median(m / p for m, p in zip(seconds["its matrix products"], seconds["largest pass"]))
    rate = flops / medians["largest pass"]
    print(f"largest pass: {share:.0%} of the rate of its matrix products, {rate / 1e9:,.0f} GFLOP/s")
    print(f"its matrix products: {product_flops / medians['its matrix products'] / 1e9:,.0f} GFLOP/s")
    best = matrix_product_rate(study.device, args.precision)
    print(f"largest square product: {best / 1e9:,.0f} GFLOP/s; the largest pass does {rate / best:.0%} of it")
    if args.profile:
        print_profile(study.largest_pass, cuda)


def print_profile(job: Callable[[], None], cuda: bool) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        job()
    sort_by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=sort_by, row_limit=20))


if __name__ == "__main__":
    main()
