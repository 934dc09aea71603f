"""What the paper's full super pre-training costs: tokens, FLOPs, GPU-hours. Counted, not measured.

    python benchmarks/recipe_cost.py --share_of_peak 0.4

175,214 updates of 2,048 sequences of 128 tokens, each with the largest, the smallest and one uniformly random shape of
bert-base-cased; 15 % of the tokens are predicted. The hours follow from the peak of the data sheet (bf16, dense) and
the share of it that training reaches, which `benchmarks/train_step.py` measures on a GPU.
"""

import argparse

from supershaper_hf import SearchSpace, SuperShaperConfig
from supershaper_hf.model.costs import training_flops
from supershaper_hf.report.tables import markdown_table


UPDATES, BATCH, LENGTH, MLM_PROBABILITY = 175_214, 2_048, 128, 0.15
PEAKS = {"V100 (fp16)": 125e12, "A100": 312e12, "H100, H200": 989e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share_of_peak", type=float, default=0.4)
    share = parser.parse_args().share_of_peak
    config = SuperShaperConfig(vocab_size=28996)
    space = SearchSpace.from_config(config)
    labelled = round(BATCH * LENGTH * MLM_PROBABILITY)

    def flops(shapes: list[list[int]]) -> float:
        return training_flops(config, shapes, BATCH, LENGTH, labelled) / len(shapes)

    passes = {
        "largest": flops([space.largest]),
        "smallest": flops([space.smallest]),
        "random, mean of 1,000": flops(space.sample(1000, seed=0).tolist()),
    }
    for name, cost in passes.items():
        print(f"{name:22s} {cost:.3g} FLOPs per update")
    total = UPDATES * sum(passes.values())
    print(f"\n{UPDATES * BATCH * LENGTH:,} tokens, {total:.3g} FLOPs; at {share:.0%} of peak:\n")
    print(markdown_table([{"GPU": gpu, "hours": round(total / (share * peak) / 3600)} for gpu, peak in PEAKS.items()]))


if __name__ == "__main__":
    main()
