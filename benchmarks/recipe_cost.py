"""Count what the paper's full super pre-training takes: tokens, FLOPs and GPU hours. Nothing is measured here.

    python benchmarks/recipe_cost.py --share_of_peak 0.4

The recipe has 175,214 updates of 2,048 sequences of 128 tokens, of which 15 % are predicted. Each update trains the
largest, the smallest and one uniformly random shape of bert-base-cased. The hours follow from the peak in the data
sheet of the GPU (bf16, dense) and from the share of this peak that training reaches, which `benchmarks/train_step.py`
measures on a GPU.
"""

import argparse

from supershaper_hf import SearchSpace, SuperShaperConfig, markdown_table
from supershaper_hf.checks import check_number
from supershaper_hf.model.costs import training_flops


UPDATES, BATCH, LENGTH, MLM_PROBABILITY = 175_214, 2_048, 128, 0.15
PEAKS = {"V100 (fp16)": 125e12, "A100": 312e12, "H100, H200": 989e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share_of_peak", type=float, default=0.4, help="share of the GPU's peak (default: 0.4)")
    share = parser.parse_args().share_of_peak
    check_number("share_of_peak", share, above=0, most=1)
    config = SuperShaperConfig(vocab_size=28996)
    space = SearchSpace.from_config(config)
    labelled = round(BATCH * LENGTH * MLM_PROBABILITY)

    def flops(shapes: list[list[int]]) -> float:
        return training_flops(config, shapes, BATCH, LENGTH, labelled) / len(shapes)

    passes = {
        "largest": flops([space.largest]),
        "smallest": flops([space.smallest]),
        "random (mean of 1,000)": flops(space.sample(1000, seed=0).tolist()),
    }
    for name, cost in passes.items():
        print(f"{name:24s} {cost:.3g} FLOPs per update")
    total = UPDATES * sum(passes.values())
    print(f"\n{UPDATES * BATCH * LENGTH:,} tokens, {total:.3g} FLOPs; at {share:.0%} of peak:\n")
    print(markdown_table([{"GPU": gpu, "hours": round(total / (share * peak) / 3600)} for gpu, peak in PEAKS.items()]))


if __name__ == "__main__":
    main()
