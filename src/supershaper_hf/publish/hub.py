"""Publish a complete repository: weights, configuration, code, tokenizer and model card, in one commit.

`save_for_hub` writes a folder, `push_folder` uploads one, `push_to_hub` does both. A folder or a repository is complete
or unchanged. A README.md that a repository already has stays as it is unless `overwrite_card` is set.
"""

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError
from transformers import PreTrainedTokenizerBase

from ..checks import check_choice
from ..data.sequences import check_vocabulary
from ..files import write_file, write_folder
from ..model.modeling_supershaper import SuperShaperPreTrainedModel
from .card import model_card
from .results import RESULTS_FOLDER, result_files
from .sentences import sentence_encoder_files, write_files


# Type of a repository -> the file that it cannot do without.
NEEDED_FILE = {"model": "config.json", "dataset": "README.md", "space": "index.html"}


def save_for_hub(
    model: SuperShaperPreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pooling: str | None = None,
    normalize: bool = False,
    max_seq_length: int | None = None,
    prompts: Mapping[str, str] | None = None,
    repo_id: str | None = None,
    exports: Sequence[str] = (),
    max_shard_size: int | str = "5GB",
    state_dict: dict[str, torch.Tensor] | None = None,
    replace: bool = False,
    **card: Any,
) -> Path:
    """Write everything a Hub repository needs into `folder`, which appears complete or not at all.

    Args:
        model: A supernet or subnet with any head.
        folder: A folder that does not exist or is empty.
        tokenizer: Tokenizer to save beside the model. It is saved without the truncation and padding of its last call,
            and with a `model_max_length` that the model can read.
        pooling: How a sentence encoder makes one embedding of the token states: "mean", their mean, or "cls", the state
            of the first token. The folder is then also a `SentenceTransformer`. `read_sentence_encoder(original)`
            returns this option and the next three.
        normalize: Whether the `SentenceTransformer` divides every embedding by its length.
        max_seq_length: Tokens after which it cuts a text, by default the `model_max_length` of the tokenizer. It never
            keeps more than the model can read.
        prompts: Names and texts that it can put before a text, such as `{"query": "query: "}`.
        repo_id: The name of the model in the card's examples; by default the name of the folder. Give it if you
            upload the folder with `push_folder` later.
        exports: Formats to export to, such as `("onnx", "int8")`: see `supershaper_hf.publish.export.add_exports`.
        max_shard_size: Size of the largest weight file.
        state_dict: The weights, if `model` itself holds only the share of this process.
        replace: Whether the new folder replaces one that is already there.
        **card: The sections and metadata of the card: see `supershaper_hf.publish.card.model_card`. Its `results` on
            data sets of the Hub are also written to the folder `.eval_results`, which the Hub reads.

    Returns:
        The path of `folder`.

    Raises:
        FileExistsError: If `folder` is not empty and `replace` is not set.
        ValueError: If the tokenizer has more tokens than the model, or the options of a sentence encoder do not go
            together.

    Example:
        >>> import tempfile
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperForMaskedLM
        >>> config = SuperShaperConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folder = save_for_hub(SuperShaperForMaskedLM(config), f"{parent}/tiny", license="apache-2.0")
        ...     sorted(file.name for file in folder.iterdir() if file.suffix != ".py")
        ['README.md', 'config.json', 'model.safetensors']
    """
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config)
        tokenizer = tokenizer_to_publish(tokenizer)
        # A tokenizer without a limit would let texts pass that the model cannot read. fastembed refuses to load it.
        tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    sentence_files = sentence_encoder_files(model.config, tokenizer, pooling, normalize, max_seq_length, prompts)
    name = repo_id or Path(folder).name
    described: dict[str, Any] = {"with_tokenizer": tokenizer is not None, "pooling": pooling, "normalize": normalize}
    described |= card
    if tokenizer is not None and tokenizer.mask_token:
        described["mask_token"] = tokenizer.mask_token
    model_card(model, name, **described)  # refuses a wrong option before anything is written

    def write(partial: Path) -> None:
        model.save_pretrained(partial, max_shard_size=max_shard_size, state_dict=state_dict)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_files(partial, sentence_files)
        for path, text in result_files(card.get("results", ())).items():
            (partial / path).parent.mkdir(exist_ok=True)
            write_file(partial / path, text)
        size = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
        model_card(model, name, weight_bytes=size, exports=export(partial, exports), **described).save(
            partial / "README.md"
        )

    return write_folder(folder, write, replace)


def export(folder: Path, formats: Sequence[str]) -> Sequence[Any]:
    """Export the model in `folder`, and return what was written. The exporters are imported only if they are used."""
    if not formats:
        return ()
    from .export import add_exports

    return add_exports(folder, formats=tuple(formats))


def tokenizer_to_publish(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy of `tokenizer` without what should not be published.

    That is the truncation and padding that its last call has left in it, and what it brings along from where it was
    loaded: whether that was a folder, and `auto_map`, which can name code in somebody else's repository. A class that
    is registered for AutoTokenizer writes it anew when it is saved, with its code.
    """
    tokenizer = copy.deepcopy(tokenizer)
    for name in ("auto_map", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    path_in_repo: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> CommitInfo:
    """Upload a folder written by `save_for_hub` as one commit. A repository that does not exist is created.

    With `path_in_repo` you can upload any folder beside a model, such as the records of its shapes. Hidden files and
    folders (`.git`, `.cache`, ...) and `__pycache__` are left out, except `.eval_results`, which the Hub reads.

    Args:
        folder: The folder to upload. It is not changed.
        repo_id: `"user/name"`.
        repo_type: `"model"`, `"dataset"` (such as the folder of a search), or `"space"` (a static page, `index.html`).
        path_in_repo: Folder of the repository to upload into, such as `"search"`. Nothing else in the repository
            changes. By default a model is uploaded to the root of the repository.
        private: Whether a new repository is private. An existing one keeps its visibility.
        token: Access token; by default the one that `hf auth login` has stored.
        revision: Branch to commit to. A branch that does not exist is created.
        create_pr: Whether to open a pull request instead of committing.
        overwrite_card: Whether to replace a README.md that the repository already has.
        commit_message: Title of the commit; by default it names what is uploaded.
        commit_description: Text below the title of the commit.

    Returns:
        What `push_to_hub` of transformers returns too: a string, the address of the commit, whose attributes are also
        `oid`, `pr_url` (the address of the pull request, or `None`) and `repo_url`.

    Raises:
        FileNotFoundError: If `folder` lacks the file that its type of repository needs, or with `path_in_repo` has no
            file.
        ValueError: If `repo_type` is unknown, `path_in_repo` is not a folder inside the repository, a symbolic link
            leads out of `folder`, or the token has an impossible character, such as a line break.
        PermissionError: If there is no token, or the token may not write there.
        ConnectionError: If the Hub cannot be reached or fails. The repository is complete or unchanged.

    Example:
        >>> push_folder("subnet-63m", "user/subnet-63m", private=True)  # doctest: +SKIP
        >>> push_folder("outputs/search", "user/supernet", path_in_repo="search")  # doctest: +SKIP
    """
    folder = Path(folder)
    check_choice("repo_type", repo_type, tuple(NEEDED_FILE))
    files = files_to_publish(folder)
    if path_in_repo is None and folder / NEEDED_FILE[repo_type] not in files:
        raise FileNotFoundError(
            f"{folder} has no {NEEDED_FILE[repo_type]}, which a {repo_type} needs. Write a model with "
            "save_for_hub(model, folder, tokenizer=tokenizer), and the folder of a search with write_report(folder)."
        )
    if not files:
        raise FileNotFoundError(
            f"{folder} has no file to upload: it is empty, it is not a folder, or all its files are hidden."
        )
    target = check_path_in_repo(path_in_repo)
    if commit_message is None:
        commit_message = f"Upload {target if target.parts else repo_type} with supershaper-hf"
    api = hub_client(token)
    kind: dict[str, Any] = {"repo_type": repo_type}
    with explain_failure(repo_id), warnings.catch_warnings():
        # Tables beside a model are meant: the records of its shapes.
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
        sdk = "static" if repo_type == "space" else None
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, space_sdk=sdk, **kind).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True, **kind)
        keep_card = path_in_repo is None and not overwrite_card
        if keep_card and api.file_exists(repo_id, "README.md", revision=revision, **kind):
            files = [path for path in files if path != folder / "README.md"]
        # create_commit makes exactly one commit, so a repository is never half new; upload_folder may make several.
        return api.create_commit(
            repo_id,
            **kind,
            operations=[CommitOperationAdd(str(target / path.relative_to(folder).as_posix()), path) for path in files],
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def hub_client(token: str | bool | None) -> HfApi:
    """Return a client of the Hub that names this package and its version, and sends a token that can be sent."""
    return HfApi(library_name="supershaper-hf", library_version=version("supershaper-hf"), token=check_token(token))


def files_to_publish(folder: Path) -> list[Path]:
    """Return the files in `folder` and in the folders inside it, without hidden ones and `__pycache__`.

    Of hidden ones, only `RESULTS_FOLDER` is published.

    Raises:
        ValueError: If a symbolic link leads to something else than one of these files. Its target could be any private
            file of this machine. The folders of the Hub's cache consist of such links.
    """

    def is_private(path: Path, root: Path) -> bool:
        first, *others = path.relative_to(root).parts or ("",)
        parts = others if first == RESULTS_FOLDER else [first, *others]
        return any(part.startswith(".") or part == "__pycache__" for part in parts)

    root = Path(os.path.realpath(folder))
    visible = [path for path in sorted(folder.rglob("*")) if not is_private(path, folder)]
    for link in (path for path in visible if path.is_symlink()):
        target = Path(os.path.realpath(link))
        if not target.is_file() or not target.is_relative_to(root) or is_private(target, root):
            raise ValueError(
                f"{link} is a symbolic link to {target}, which is not one of the files of {folder} that are uploaded. "
                "Replace the link by a copy of what you want to publish, or remove it. Nothing was published."
            )
    return [path for path in visible if path.is_file()]


def check_path_in_repo(path_in_repo: str | None) -> PurePosixPath:
    """Return the folder of the repository to upload into, or raise a ValueError."""
    target = PurePosixPath(path_in_repo or "")
    if path_in_repo is not None and (not target.parts or any(part[0] in "./" for part in target.parts)):
        raise ValueError(
            f"path_in_repo={path_in_repo!r} must name a folder inside the repository that is not hidden, such as "
            "'search'. Leave it out to upload a model."
        )
    return target


def check_token(token: str | bool | None) -> str | bool | None:
    """Return `token` without white space around it, or raise a ValueError that does not show it.

    The client of the Hub would print a token that it cannot send, for instance one with a line break, in its error.
    """
    if isinstance(token, str):
        token = token.strip()
    used = get_token() if token is None or token is True else token
    if isinstance(used, str) and not (used and all("!" <= character <= "~" for character in used)):
        raise ValueError(
            "The access token is empty or has an impossible character, such as a space or a line break. Copy it "
            "again from https://huggingface.co/settings/tokens. Nothing was published."
        )
    return token


def push_to_hub(
    model: SuperShaperPreTrainedModel,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pooling: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
    commit_message: str = "Upload model with supershaper-hf",
    commit_description: str | None = None,
    max_shard_size: int | str = "5GB",
    **options: Any,
) -> CommitInfo:
    """Publish a model as a complete repository: `save_for_hub` into a temporary folder, then `push_folder`.

    The arguments and the errors are those of these two functions. `options` are the further ones of `save_for_hub`.

    Returns:
        The address of the commit, with the attributes that `push_folder` names.

    Example:
        >>> push_to_hub(subnet, "user/subnet-63m", tokenizer=tokenizer, private=True)  # doctest: +SKIP
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = save_for_hub(
            model,
            Path(parent) / "model",
            tokenizer=tokenizer,
            pooling=pooling,
            repo_id=repo_id,
            max_shard_size=max_shard_size,
            **options,
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
    """Replace an error of the Hub's client by one that says what happened and what to do."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:  # a connection that failed is an HTTPError too
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # uploads of weights raise RuntimeError
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
        may_pass = status is None or status == 429 or status >= 500
        raise ConnectionError(
            f"Uploading to {repo_id!r} failed{f' with status {status}' if status else ''}: {str(error).rstrip('.')}. "
            "The Hub applies a commit completely or not at all, so the repository is complete or unchanged."
            f"{' Run the same call again.' * may_pass}"
        ) from error
