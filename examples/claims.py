"""How the quickstart checks what it says about its result: equal outputs, the counted size, and loading elsewhere."""

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from supershaper_hf import SuperShaperForMaskedLM


WITHOUT_PACKAGE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):  # as if supershaper_hf were not installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "supershaper_hf":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
from transformers import pipeline

folder, sentence = sys.argv[1:]
for guess in pipeline("fill-mask", model=folder, trust_remote_code=True)(sentence, top_k=3):
    print(f"    {guess['score']:.3f}  {guess['sequence']}")
"""


@torch.no_grad()
def largest_difference(
    supernet: SuperShaperForMaskedLM,
    subnet: SuperShaperForMaskedLM,
    shape: list[int],
    batches: Sequence[Mapping[str, torch.Tensor]],
) -> float:
    """Return the largest difference between a logit of the supernet at `shape` and the same logit of the subnet.

    One sequence and a whole batch are compared, because the supernet merges its bottlenecks only in long inputs.
    """
    differences = []
    for size in (1, 64):
        inputs = {name: batches[-1][name][:size].to(supernet.device) for name in ("input_ids", "attention_mask")}
        differences.append((subnet(**inputs).logits - supernet(**inputs, shape=shape).logits).abs().max().item())
    return max(differences)


def stored_parameters(folder: Path) -> int:
    """Return how many numbers the weight file in `folder` holds."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def loads_without_package(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a new process that has transformers but not supershaper_hf can load the model and fill a mask."""
    sentence = f"the president of the united {tokenizer.mask_token} ."
    print(f"A fresh process without supershaper_hf completes: {sentence}", flush=True)
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(folder), sentence]
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as modules:  # transformers copies the code beside the weights to this folder
        environment = os.environ | quiet | {"HF_MODULES_CACHE": modules}
        return subprocess.run(command, env=environment, check=False).returncode == 0


def print_claims(claims: Mapping[str, bool]) -> bool:
    """Print each claim after "yes" or "NO", and return whether all of them hold."""
    print()
    for claim, holds in claims.items():
        print(f"{'yes' if holds else 'NO '}  {claim}")
    return all(claims.values())
