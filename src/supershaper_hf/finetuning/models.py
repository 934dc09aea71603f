"""The model that a task starts from: a subnet, which may be cut out of a supernet first, or any other encoder."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

from ..checks import load_pretrained
from ..devices import copy_mapped_weights
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.modeling_supershaper import SuperShaperModel
from ..model.shapes import SearchSpace
from ..report.findings import PREDICTOR_FILE
from ..search.evaluation import evaluate_shapes
from ..search.pareto import amount, pareto_front
from ..search.predictor import ShapePredictor
from ..search.records import read_records
from ..search.rounds import best_measured, measure_in_rounds
from .arguments import FineTuningArguments
from .task import Task


logger = logging.get_logger(__name__)

RECORDS = Path("search", "records.jsonl")  # where a published supernet has the records of its shapes
EXAMPLES = 64  # of the task, on which shapes are measured if there are no records


def load_tokenizer(args: FineTuningArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model."""
    name = args.tokenizer_name or args.model
    option = "tokenizer_name" if args.tokenizer_name else "model"
    load = partial(AutoTokenizer.from_pretrained, trust_remote_code=args.trust_remote_code)
    return load_pretrained(option, name, load)


def load_model(args: FineTuningArguments, task: Task, shape: list[int] | None, seed: int) -> PreTrainedModel:
    """Return a model with the head of `task`, to be trained in float32.

    A head that was trained on the labels of the task is kept. Any other one is replaced by a new one, drawn from the
    seed: the encoder that MNLI has trained starts RTE, its three labels do not.

    Args:
        args: The options: which model.
        task: The task.
        shape: The shape that is cut out of a supernet; `None` takes the largest one, or the whole model. With
            `args.sandwich` the supernet stays whole.
        seed: Seed of the new head.
    """
    trust: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    before = AutoConfig.from_pretrained(args.model, **trust)
    config = AutoConfig.from_pretrained(args.model, **trust)
    config.update({**task.config, "dtype": torch.float32})
    set_seed(seed)
    model = task.auto_class.from_config(config, **trust)
    architecture = type(model).__name__
    if architecture in (before.architectures or []) and same_labels(before, config):
        model = task.auto_class.from_pretrained(args.model, config=config, dtype=torch.float32, **trust)
    else:
        encoder = AutoModel.from_pretrained(args.model, dtype=torch.float32, **trust)
        missing = model.base_model.load_state_dict(encoder.state_dict(), strict=False).missing_keys
        if missing:
            raise ValueError(f"{args.model} lacks weights that {architecture} needs: {missing[:3]}.")
        start_at_the_mean(model, task)
    copy_mapped_weights(model)
    if args.sandwich:
        return model
    if is_supernet(model.config):
        return model.extract_subnet(model.config.hidden_sizes if shape is None else shape)
    return model


@torch.no_grad()
def start_at_the_mean(model: PreTrainedModel, task: Task) -> None:
    """Let a new head that predicts a number begin with the mean label of the task.

    AdamW moves a bias by at most the learning rate in each step, which is far too slow for ratings from 0 to 5. The
    encoder would learn the mean instead, and end where it says the same of every example: a subnet of MiniLM with 59 %
    of the encoder did on STS-B.
    """
    if task.config.get("problem_type") != "regression":
        return
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
    if heads and heads[-1].bias is not None:
        heads[-1].bias.fill_(float(np.mean(task.train["labels"])))


def same_labels(first: Any, second: Any) -> bool:
    """Return whether two configurations are of the same labels: as many, with the same names."""
    return {int(key): name for key, name in first.id2label.items()} == {
        int(key): name for key, name in second.id2label.items()
    }


def load_teacher(args: FineTuningArguments, task: Task, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """Return the fine-tuned teacher, if the options name one.

    Raises:
        ValueError: If it has no head for the task, or other labels, another vocabulary or, where states are compared,
            another hidden size than the model that learns.
    """
    if args.teacher is None:
        return None
    trust: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    load = partial(task.auto_class.from_pretrained, dtype=torch.float32, output_loading_info=True, **trust)
    teacher, loading = load_pretrained("teacher", args.teacher, load)
    if loading["missing_keys"]:
        raise ValueError(
            f"The teacher {args.teacher} lacks weights of a {type(teacher).__name__}: "
            f"{sorted(loading['missing_keys'])}. Use a teacher that was fine-tuned on this task."
        )
    expected = teacher.config.__class__()
    expected.update(task.config)
    if not same_labels(teacher.config, expected):
        raise ValueError(
            f"The teacher {args.teacher} has the labels {list(teacher.config.id2label.values())}, the task has "
            f"{list(expected.id2label.values())}. Use a teacher that was fine-tuned on this task."
        )
    if AutoTokenizer.from_pretrained(args.teacher, **trust).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"The teacher {args.teacher} has another vocabulary than {args.model}. Both read the same ids."
        )
    config: Any = AutoConfig.from_pretrained(args.model, **trust)
    if args.state_weight > 0 and teacher.config.hidden_size != config.hidden_size:
        raise ValueError(
            f"state_weight={args.state_weight} compares hidden states, but those of the teacher {args.teacher} have "
            f"{teacher.config.hidden_size} numbers, and those of {args.model} {config.hidden_size}. Set it to 0."
        )
    copy_mapped_weights(teacher)
    return teacher


def take_head(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Replace what stands behind the encoder of `model` by that of the teacher, where both have the same.

    This is the classifier, and the pooler. They were made for the states that the model will learn.
    """
    own, others = model.state_dict(), teacher.state_dict()
    parts = ("encoder.", "embeddings.")
    base = f"{model.base_model_prefix}."
    heads = {
        name: tensor
        for name, tensor in others.items()
        if name in own and own[name].shape == tensor.shape and not name.removeprefix(base).startswith(parts)
    }
    model.load_state_dict(heads, strict=False)


def is_supernet(config: PreTrainedConfig) -> bool:
    """Return whether shapes can be cut out of a model with this configuration."""
    return isinstance(config, SuperShaperConfig) and not config.merged_bottlenecks


# Which shape


def choose_shape(args: FineTuningArguments, task: Task, folder: Path) -> list[int] | None:
    """Return the shape that the options ask for; `None` for the whole model, which a sandwich trains.

    With `max_cost` it is the shape with the lowest predicted loss or distance within the budget. The predictor is that
    of the search, beside its records, or else it is fitted to the records. Without records, `num_shapes` shapes around
    the budget are measured by their distance to the largest one on examples of the task, which needs no labels, into
    `folder`, and the nearest is taken.

    Whatever the options say of shapes is checked here, before anything is trained or written.

    Raises:
        ValueError: If the model is not a supernet, `shape` is not one of its shapes, or no shape is as cheap as
            `max_cost`.
    """
    wanted = next((name for name in ("sandwich", "shape", "max_cost") if getattr(args, name)), None)
    if wanted is None:
        return None
    config: Any = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    if not is_supernet(config):
        raise ValueError(
            f"{wanted}={getattr(args, wanted)} needs a supernet, and {args.model} is not one. Leave {wanted} out."
        )
    config.update(task.config)
    with torch.device("meta"):
        space = SearchSpace.from_model(task.auto_class.from_config(config))  # budgets are of subnets with this head
    if args.shape is not None:
        space.validate(args.shape)
    if args.max_cost is not None:
        check_budget(args, space, args.max_cost)
    if args.max_cost is None or args.sandwich:
        return args.shape
    file, cost = Path(args.records_file or Path(args.model) / RECORDS), cast(Any, args.cost)
    if args.records_file is None and not file.exists():
        logger.warning(
            f"There are no records of shapes in {file}. {args.num_shapes} shapes are measured: their distance to the "
            f"largest shape on {EXAMPLES} examples. Name other records with --records_file."
        )
        return best_measured(space, measure_on(task, args, space, folder), cost, args.max_cost, args.max_length)
    found = file.with_name(PREDICTOR_FILE)
    predictor = ShapePredictor.load(found) if found.exists() else ShapePredictor.fit_records(read_records(file))
    front = pareto_front(space, predictor, cost=args.cost, sequence_length=args.max_length)
    return front.best(max_cost=args.max_cost)


def check_budget(args: FineTuningArguments, space: SearchSpace, max_cost: float) -> None:
    """Raise a ValueError unless the smallest shape is as cheap as `max_cost`."""
    smallest = (
        space.flops(space.smallest, args.max_length) if args.cost == "flops" else space.num_parameters(space.smallest)
    )
    if smallest > max_cost:
        raise ValueError(
            f"max_cost={amount(max_cost, args.cost)} cannot be met: the smallest shape has "
            f"{amount(smallest, args.cost)}. Raise the budget."
        )


def measure_on(task: Task, args: FineTuningArguments, space: SearchSpace, folder: Path) -> list[dict[str, Any]]:
    """Measure shapes by their distance to the largest one on examples of a task; return their records."""
    supernet = SuperShaperModel.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    batches = first_batches(task.train, task, EXAMPLES)
    file = folder / "records.jsonl"

    def measure(shapes: list[list[int]]) -> list[dict[str, Any]]:
        return evaluate_shapes(supernet, batches, shapes, measure="distance", layers="all", records_file=file)

    return measure_in_rounds(
        space, measure, args.num_shapes, cost=args.cost, max_cost=args.max_cost, sequence_length=args.max_length
    )


def first_batches(data: Dataset, task: Task, count: int) -> list[dict[str, torch.Tensor]]:
    """Return the first examples of a split as batches of 16, without labels."""
    kept = [name for name in data.column_names if name in ("input_ids", "attention_mask", "token_type_ids")]
    examples = data.select_columns(kept).select(range(min(count, len(data))))
    rows = [examples[row] for row in range(len(examples))]
    return [dict(task.collator(rows[start : start + 16])) for start in range(0, len(rows), 16)]
