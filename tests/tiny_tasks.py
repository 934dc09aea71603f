"""A tiny task that a tiny model can learn, in files with GLUE's column names, and a fine-tuning of it."""

import csv
import random

from conftest import randomize, tiny_bert_config, tiny_model
from transformers import BertForSequenceClassification

from supershaper_hf import SuperShaperForMaskedLM, save_for_hub
from supershaper_hf.finetuning.arguments import FineTuningArguments
from supershaper_hf.finetuning.experiment import fine_tune
from supershaper_hf.finetuning.glue import glue_task


ANIMALS, PLACES = ["cat", "dog"], ["mat", "moon"]


def examples(count, seed):
    """Sentences of random words, positive if they name an animal, negative if they name a place."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        label = number % 2
        words = generator.choices(["the", "a", "was", "on", "big"], k=generator.randint(3, 7))
        words[generator.randrange(len(words))] = generator.choice(ANIMALS if label else PLACES)
        rows.append({"sentence": " ".join(words), "label": label})
    return rows


def write_csv(file, rows):
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def write_task(folder, train=48, validation=24):
    """Write training and validation examples; return the two files."""
    return write_csv(folder / "train.csv", examples(train, 0)), write_csv(folder / "val.csv", examples(validation, 1))


def write_supernet(folder, tokenizer, model_class=SuperShaperForMaskedLM, **changes):
    supernet = tiny_model(model_class, vocab_size=len(tokenizer), **changes)
    return str(save_for_hub(supernet, folder, tokenizer=tokenizer))


def write_bert(folder, tokenizer, seed=3, **changes):
    """Write a BERT that is fine-tuned on the labels of the task, in name only."""
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    config = tiny_bert_config(vocab_size=len(tokenizer), **{**labels, **changes})
    randomize(BertForSequenceClassification(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def arguments(folder, model, **changes):
    values = {
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "max_length": 12,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return FineTuningArguments(output_dir=str(folder), model=model, **{**values, **changes})


def tune(folder, model, files, tokenizer, name="sst2", **changes):
    """Fine-tune on a task in two files; return the results."""
    args = arguments(folder, model, **changes)
    task = glue_task(name, tokenizer, files[0], [files[1]], max_length=args.max_length)
    return fine_tune(args, task, tokenizer)
