"""What a script of the study needs, tiny: tasks, an original, a supernet of it and its search."""

from conftest import WORDS, randomize, tiny_bert_config, tiny_model
from search_folders import write_search
from tiny_tasks import examples, write_csv
from transformers import BertModel

from supershaper_hf import SuperShaperModel, save_for_hub


PAIR_TASKS = ("mrpc", "rte", "stsb")


def pair_examples(count, seed, numbers):
    """Pairs of sentences that are labelled by how alike their lengths are, or by whether they are."""
    rows = []
    for number in range(count):
        first = " ".join(WORDS[(seed + number + step) % len(WORDS)] for step in range(2 + number % 5))
        second = " ".join(WORDS[(2 * number + step) % len(WORDS)] for step in range(2 + number % 3))
        gap = abs(len(first.split()) - len(second.split()))
        rows.append({"sentence1": first, "sentence2": second, "label": 5.0 - gap if numbers else int(gap > 0)})
    return rows


def write_study(folder, tokenizer, tasks=("sst2", "stsb"), train=24, validation=16):
    """Write everything into `folder`; return the options that name it, for a script with few steps."""
    for task in tasks:
        (folder / "data" / "tasks" / task).mkdir(parents=True)
        for split, count, seed in (("train", train, 0), ("validation", validation, 1)):
            pairs = pair_examples(count, seed, task == "stsb")
            rows = pairs if task in PAIR_TASKS else examples(count, seed)
            write_csv(folder / "data" / "tasks" / task / f"{split}.csv", rows)
    sizes = {"vocab_size": len(tokenizer)}
    randomize(BertModel(tiny_bert_config(**sizes)), 3).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    supernet = tiny_model(SuperShaperModel, **sizes)
    save_for_hub(supernet, folder / "supernet", tokenizer=tokenizer, pooling="mean")
    (folder / "supernet" / "search").mkdir()
    write_search(folder / "supernet" / "search", supernet)
    names = {"data": "data", "bert": "bert", "supernet": "supernet", "output_dir": "out", "results": "results"}
    return [part for option, name in names.items() for part in (f"--{option}", str(folder / name))]
