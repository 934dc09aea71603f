"""Load every head of a published model: in this process, or as a script in one that does not have the package.

As a script it takes the file to write to, the commit message of a copy that it publishes, and the Auto classes.
"""

import re
import sys
from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download


SENTENCES = ["the big cat sat on the moon .", "a dog"]


class NoPackage:
    """Makes this process behave as if supershaper_hf were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "supershaper_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def load_everything(auto_classes, **options):
    """Return what the model, its tokenizer and its heads are, as loaded by `from_pretrained(..., **options)`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("user/name", **options)
    encoded = tokenizer("the big cat [MASK] on the moon .", return_tensors="pt")
    results = {"vocabulary": tokenizer.get_vocab(), "encoded": dict(encoded)}
    for auto_class in auto_classes:
        model = getattr(transformers, auto_class).from_pretrained("user/name", **options)
        results[auto_class] = type(model).__name__, type(model).__module__, model.base_model.encoder.state_dict()
        if auto_class == "AutoModelForMaskedLM":
            with torch.no_grad():
                results["logits"] = model(**encoded).logits
    return results


def code_in_card(repo_id):
    """Return the blocks of Python code in a model's card."""
    card = Path(hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.+?)```", card, re.DOTALL)


def embed(encoder):
    """Return the embeddings of a SentenceTransformer, one sentence at a time, as a tensor."""
    return encoder.encode(SENTENCES, batch_size=1, convert_to_tensor=True).cpu()


if __name__ == "__main__":
    sys.meta_path.insert(0, NoPackage())
    output, commit_message, *auto_classes = sys.argv[1:]
    torch.set_num_threads(1)  # as in the tests: the number of threads changes the last bits
    # Before anything else is loaded: the tokenizer needs no code of the repository.
    tokenizer = transformers.AutoTokenizer.from_pretrained("user/name", trust_remote_code=False)
    loaded_code = [name for name in sys.modules if name.startswith("transformers_modules.user")]
    shown: dict = {}
    for block in code_in_card("user/name"):
        exec(block, shown)
    results = load_everything(auto_classes, trust_remote_code=True)
    results["tokenizer alone"] = tokenizer.get_vocab(), loaded_code
    results["card"] = [type(shown[name]).__name__ for name in ("model", "tokenizer")]
    results["filled"] = shown["result"]
    for block in code_in_card("user/encoder"):
        exec(block, shown)
    results["embeddings"] = embed(shown["encoder"])
    pushed = shown["model"].push_to_hub("user/copy", commit_message=commit_message)
    results["pushed"] = type(pushed).__name__, str(pushed)
    torch.save(results, output)
