"""Publish a complete repository: weights, configuration, code, tokenizer and model card, in one commit.

Three verbs: `save_for_hub` writes the folder, `push_folder` uploads one, `push_to_hub` does both. A folder or a
repository is complete or unchanged; a README.md that is already there is left alone unless `overwrite_card` is set.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError
from transformers import PreTrainedTokenizerBase
from transformers.pipelines import PIPELINE_REGISTRY

from ..data.sequences import check_vocabulary
from ..files import write_folder
from ..model.modeling_supershaper import SuperShaperPreTrainedModel
from ..model.shapes import SearchSpace


TEMPLATE = Path(__file__).with_name("model_card_template.md")
PIPELINE_TAGS = {
    "SuperShaperModel": "feature-extraction",
    "SuperShaperForMaskedLM": "fill-mask",
    "SuperShaperForSequenceClassification": "text-classification",
    "SuperShaperForTokenClassification": "token-classification",
    "SuperShaperForQuestionAnswering": "question-answering",
    "SuperShaperForMultipleChoice": None,
}


def model_card(
    model: SuperShaperPreTrainedModel,
    repo_id: str,
    *,
    with_tokenizer: bool = True,
    license: str | None = None,
    language: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] | None = None,
    tags: Sequence[str] | None = None,
    training: str | None = None,
    evaluation: str | None = None,
    limits: str | None = None,
) -> ModelCard:
    """Return the model card of a supernet or subnet: what it is, how to load it, and what its author says of it.

    Args:
        model: The model to describe; parameters are counted, not declared.
        repo_id: The name used in the card's code examples.
        with_tokenizer: Whether the repository has a tokenizer for the examples to load.
        license: Licence identifier of the Hub, such as `"apache-2.0"`. None is claimed by default.
        language: Language code, such as `"en"`.
        base_model: Hub id of the model the weights started from.
        datasets: Hub ids of the training data.
        tags: Further tags.
        training: Markdown for the section on training.
        evaluation: Markdown for the section on evaluation.
        limits: Markdown for the section on limits.
    """
    config, architecture = model.config, type(model).__name__
    tag = PIPELINE_TAGS.get(architecture)
    data = ModelCardData(
        model_name=repo_id.split("/")[-1],
        library_name="transformers",
        pipeline_tag=tag,
        license=license,
        language=language,
        base_model=base_model,
        datasets=list(datasets) if datasets else None,
        tags=["supershaper", "bert", *(tags or [])],
    )
    elastic = not config.merged_bottlenecks
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        model_name=data.model_name,
        elastic=elastic,
        architecture=architecture,
        auto_class=architecture.replace("SuperShaperModel", "AutoModel").replace("SuperShaperFor", "AutoModelFor"),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=config.num_hidden_layers,
        hidden_sizes=config.hidden_sizes,
        hidden_size=config.hidden_size,
        width_choices=config.width_choices,
        heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_length=config.max_position_embeddings,
        middle_budget=middle_budget(model) if elastic else None,
        base_model=base_model,
        with_tokenizer=with_tokenizer,
        pipeline=tag if with_tokenizer and tag in PIPELINE_REGISTRY.get_supported_tasks() else None,
        training=training,
        evaluation=evaluation,
        limits=limits,
    )


def middle_budget(model: SuperShaperPreTrainedModel) -> int:
    """Return a parameter budget in the middle of a supernet's range, rounded up, for the example in its card."""
    space = SearchSpace.from_config(model.config)
    middle = (space.num_parameters(space.smallest) + space.num_parameters(space.largest)) // 2
    digit = 10 ** (len(str(middle)) - 2)
    return -(-middle // digit) * digit


def save_for_hub(
    model: SuperShaperPreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    repo_id: str | None = None,
    max_shard_size: int | str = "5GB",
    state_dict: dict[str, torch.Tensor] | None = None,
    replace: bool = False,
    **card: Any,
) -> Path:
    """Write everything a Hub repository needs into `folder`, which appears complete or not at all.

    Args:
        model: A supernet or subnet, any head.
        folder: A folder that does not exist or is empty.
        tokenizer: Saved beside it; `None` leaves it out.
        repo_id: The name used in the card's examples; by default the folder's name. Give it before `push_folder`.
        max_shard_size: Largest weight file.
        state_dict: The weights, where `model` itself holds only this process's share of them.
        replace: Whether a folder that is already there gives way to the new one.
        **card: The sections and metadata of `model_card`.

    Returns:
        The path of `folder`.

    Raises:
        FileExistsError: If `folder` is not empty.
        ValueError: If the tokenizer has more tokens than the model.

    Example:
        >>> save_for_hub(subnet, "subnet-63m", tokenizer=tokenizer, license="apache-2.0")  # doctest: +SKIP
    """
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config)
    readme = model_card(model, repo_id or Path(folder).name, with_tokenizer=tokenizer is not None, **card)

    def write(partial: Path) -> None:
        model.save_pretrained(partial, max_shard_size=max_shard_size, state_dict=state_dict)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        readme.save(partial / "README.md")

    return write_folder(folder, write, replace)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    path_in_repo: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> str:
    """Upload a folder written by `save_for_hub` as one commit, creating the repository if there is none.

    With `path_in_repo` any folder goes beside a model, such as the records of its shapes. Hidden files and folders
    (`.git`, `.cache`, ...) and `__pycache__` are left out.

    Args:
        folder: The folder; it is only read.
        repo_id: `"user/name"`.
        path_in_repo: Folder of the repository to upload into, such as `"search"`; by default its root, which takes a
            model. What else is in the repository, its README.md included, is left as it is.
        private: Whether a new repository is private; ignored for an existing one.
        token: Access token; by default the one of `hf auth login`.
        revision: Branch to commit to; created if there is none.
        create_pr: Open a pull request instead of committing.
        overwrite_card: Replace a README.md that the repository already has.
        commit_message: Title of the commit; by default it names what is uploaded.
        commit_description: Its body.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        FileNotFoundError: If `folder` holds no model; with `path_in_repo`, no file.
        ValueError: If `path_in_repo` is not a folder inside the repository.
        PermissionError: If there is no token, or it may not write there.
        ConnectionError: If the Hub cannot be reached or fails. The repository is complete or unchanged.

    Example:
        >>> push_folder("subnet-63m", "user/subnet-63m", private=True)  # doctest: +SKIP
        >>> push_folder("outputs/search", "user/supernet", path_in_repo="search")  # doctest: +SKIP
    """
    folder = Path(folder)
    files = files_to_publish(folder)
    if path_in_repo is None and folder / "config.json" not in files:
        raise FileNotFoundError(
            f"{folder} has no config.json. Write it with save_for_hub(model, folder, tokenizer=tokenizer)."
        )
    if not files:
        raise FileNotFoundError(f"{folder} has no file to upload: it is empty, not a folder, or all in it is hidden.")
    target = PurePosixPath(path_in_repo or "")
    if path_in_repo is not None and (not target.parts or any(part[0] in "./" for part in target.parts)):
        raise ValueError(
            f"path_in_repo={path_in_repo!r} must name a folder inside the repository, such as 'search', and no hidden "
            "one. Leave it out to upload a model."
        )
    if commit_message is None:
        commit_message = f"Upload {target if target.parts else 'model'} with supershaper-hf"
    api = HfApi(library_name="supershaper-hf", token=token)
    with explain_failure(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        keep_card = path_in_repo is None and not overwrite_card
        keep_card = keep_card and api.file_exists(repo_id, "README.md", revision=revision)
        # create_commit, not upload_folder: always exactly one commit, so a repository is never half new.
        commit = api.create_commit(
            repo_id,
            operations=[
                CommitOperationAdd((target / path.relative_to(folder).as_posix()).as_posix(), path)
                for path in files
                if not (keep_card and path == folder / "README.md")
            ],
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.pr_url or commit.commit_url


def files_to_publish(folder: Path) -> list[Path]:
    """Return the files in a folder and those inside it, but for what tools keep there for themselves."""

    def is_private(path: Path) -> bool:
        return any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)

    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not is_private(path)]


def push_to_hub(
    model: SuperShaperPreTrainedModel,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
    commit_message: str = "Upload model with supershaper-hf",
    commit_description: str | None = None,
    max_shard_size: int | str = "5GB",
    **card: Any,
) -> str:
    """Publish a model as a complete repository: `save_for_hub` into a temporary folder, then `push_folder`.

    Example:
        >>> push_to_hub(subnet, "user/subnet-63m", tokenizer=tokenizer, private=True)  # doctest: +SKIP
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = save_for_hub(
            model, Path(parent) / "model", tokenizer=tokenizer, repo_id=repo_id, max_shard_size=max_shard_size, **card
        )
        return push_folder(
            folder,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            overwrite_card=overwrite_card,
            commit_message=commit_message,
            commit_description=commit_description,
        )


@contextmanager
def explain_failure(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a message that says what happened and what to do."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:  # HTTPError: also a connection that failed
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # a RuntimeError wraps LFS uploads
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status == 401 or isinstance(error, LocalTokenNotFoundError):
            raise PermissionError(
                f"The Hub did not accept the token for {repo_id!r} (401): it is missing, expired or mistyped. Log in "
                "with `hf auth login` or pass token=... with the role 'write'. Nothing was published."
            ) from error
        if status == 403:
            raise PermissionError(
                f"This token may not write to {repo_id!r} (403): the name belongs to someone else, or the token has "
                "only the role 'read'. Choose a repo_id in your own namespace or another token. Nothing was published."
            ) from error
        passing = status is None or status >= 500
        raise ConnectionError(
            f"Uploading to {repo_id!r} failed{f' with status {status}' if status else ''}: {str(error).rstrip('.')}. "
            "A commit is applied whole or not at all, so the repository is complete or unchanged."
            f"{' Run the same call again.' * passing}"
        ) from error
