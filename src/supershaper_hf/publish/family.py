"""Publish a family: a supernet, a subnet for each budget, the search as a data set, a page, and a collection of all.

`plan_family` says which repositories there will be, `write_family` writes a folder for each of them, and `push_family`
uploads the folders. All three can be interrupted at any moment, and the same calls continue:

- A folder is complete or absent, and one that is there is not written again.
- A repository gets one commit, and none if it has the same files already.
- The collection comes last: it names only what is published.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData
from huggingface_hub.utils import validate_repo_id

from ..files import read_json, write_file, write_folder, write_json
from ..latency.insensitivity import save_comparisons
from ..report.data_card import write_data_card
from ..report.explorer import explorer_page
from ..report.findings import (
    INSENSITIVITY_FILE,
    LATENCY_FILE,
    PREDICTOR_FILE,
    RECORDS_FILE,
    Findings,
    write_config,
)
from ..report.page import write_report
from ..search.records import parse
from .card import inline_code, middle_budget
from .hub import explain_failure, hub_client, push_folder, save_for_hub
from .results import front_results
from .subnet import SEARCH, Source, shape_within, write_subnet


FAMILY_FILE, FORMAT = "family.json", "supershaper-hf family 1"


@dataclass(frozen=True)
class Member:
    """A repository of a family.

    Attributes:
        repo_id: Its name, `"user/name"`.
        repo_type: `"model"`, `"dataset"` or `"space"`.
        note: What it is, in one line, for the collection.
        shape: The shape of a subnet; `None` for the others.
    """

    repo_id: str
    repo_type: str
    note: str
    shape: list[int] | None = None

    @property
    def folder(self) -> str:
        """The name of its folder in the folder of the family."""
        return self.repo_id.split("/")[-1]


@dataclass(frozen=True)
class Family:
    """What a family is made of.

    Attributes:
        members: Its repositories, in the order in which they are published.
        source: The supernet.
        findings: The search of the supernet.
        search: The folder of the search.
        cost: The unit of the budgets.
        budgets: The budgets.
    """

    members: list[Member]
    source: Source
    findings: Findings
    search: Path
    cost: str
    budgets: list[float]

    @property
    def supernet(self) -> str:
        """Hub id of the supernet."""
        return self.members[0].repo_id


def plan_family(
    source: Source, findings: Findings, search: Path, name: str, cost: str, budgets: Sequence[float]
) -> Family:
    """Say which repositories a family will have.

    Args:
        source: The supernet.
        findings: Its search.
        search: The folder of the search.
        name: Repository of the supernet, `"user/name"`. The names of the others begin with it.
        cost: The unit of the budgets: see `shape_within`.
        budgets: One for each subnet. Budgets with the same best shape share one.

    Raises:
        ValueError: If `source` is a subnet, `name` is no name of a repository, there is no budget, or no shape is as
            cheap as one of them.
    """
    if not source.is_supernet:
        raise ValueError(f"{source.name} is a subnet. A family is cut out of a supernet.")
    validate_repo_id(name)
    if not budgets:
        raise ValueError("budgets is empty. Give one for each subnet.")
    shapes = {tuple(shape_within(findings, cost, budget)): budget for budget in sorted(budgets, reverse=True)}
    sizes = [findings.space.num_parameters(shape) for shape in shapes]
    members = [
        Member(name, "model", f"The supernet, of which the others are cut: {findings.space.size:,} shapes."),
        *(
            Member(
                f"{name}-{label}", "model", f"A subnet of {size:,} parameters, hidden sizes {list(shape)}.", list(shape)
            )
            for shape, size, label in zip(shapes, sizes, size_labels(sizes))
        ),
        Member(f"{name}-{SEARCH}", "dataset", f"{len(findings.records):,} measured shapes of the supernet."),
        Member(f"{name}-explorer", "space", "A page on which you choose a shape by looking."),
    ]
    return Family(members, source, findings, search, cost, list(budgets))


def size_labels(sizes: Sequence[int]) -> list[str]:
    """Return short names for numbers of parameters, with as many digits as it takes to tell them apart.

    Example:
        >>> size_labels([247_208, 11_934_720]), size_labels([11_934_720, 11_941_000])
        (['247k', '11.9m'], ['11.93m', '11.94m'])
    """
    for digits in range(3, 12):
        labels = []
        for size in sizes:
            unit, letter = (1e6, "m") if size >= 1e6 else (1e3, "k")
            labels.append(f"{size / unit:.{digits}g}{letter}")
        if len(set(labels)) == len(sizes):
            return labels
    raise ValueError(f"sizes={list(sizes)} has the same number twice, which gives two repositories one name.")


# Folders


def write_family(folder: Path, family: Family, **options: Any) -> None:
    """Write a folder for each member that has none yet, into `folder`.

    Args:
        folder: The folder of the family. `family.json` in it says what it holds.
        family: What `plan_family` returned.
        **options: Options of `write_subnet` for all subnets. They may not change in a folder.

    Raises:
        FileExistsError: If `folder` holds other files.
        ValueError: If `folder` holds another family, or the same one with other options.
    """
    plan = {
        "members": [asdict(member) for member in family.members],
        "model": parse(family.search / RECORDS_FILE).header["model"],
        "cost": family.cost,
        "budgets": family.budgets,
        "options": options,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FAMILY_FILE
    if not file.exists():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise FileExistsError(
                f"{folder} holds other files, and no family. Choose another folder or remove this one."
            )
        write_json(file, FORMAT, plan)
    before = read_json(file, FORMAT)
    changed = [key for key, value in plan.items() if before[key] != value]
    if changed:
        raise ValueError(
            f"{folder} holds another family: {', '.join(changed)} differ from those in {FAMILY_FILE}. Its "
            "budgets and options are fixed. Choose another folder, or remove this one."
        )
    for member in family.members:
        if not (folder / member.folder).exists():
            _write_member(folder / member.folder, member, family, options)


def _write_member(folder: Path, member: Member, family: Family, options: dict[str, Any]) -> None:
    source, findings, related = family.source, family.findings, _related(member, family.members)
    if member.shape is not None:
        named: dict[str, Any] = {"repo_id": member.repo_id, "supernet": family.supernet, "findings": findings}
        write_subnet(source, member.shape, folder, **named, related=related, **options)
    elif member.repo_type == "dataset":
        write_folder(folder, lambda partial: _write_search(partial, member, family))
    elif member.repo_type == "space":
        write_folder(folder, lambda partial: _write_page(partial, member, family))
    else:
        own = source.metadata | {"limits": source.limits}
        card = own | {key: options[key] for key in ("license", "limits") if key in options}
        save_for_hub(
            source.load_whole(),
            folder,
            tokenizer=source.tokenizer,
            repo_id=member.repo_id,
            **source.encoder,
            **card,
            training=source.training,
            shape=findings.front("parameters").best(middle_budget(source.model)),
            evaluation=front_results(findings).text,
            related=related,
        )


def _write_page(folder: Path, member: Member, family: Family) -> None:
    """Write a static Space: the page, and the card that says what kind of Space it is."""
    page = explorer_page(family.findings, family.cost, family.budgets, family.supernet)
    write_file(folder / "index.html", page)
    ids = {
        kind: [other.repo_id for other in family.members if other.repo_type == kind] for kind in ("model", "dataset")
    }
    data = SpaceCardData(
        title=member.folder,
        sdk="static",
        models=ids["model"],
        datasets=ids["dataset"],
        short_description="Choose a small BERT by looking",
        tags=["supershaper"],
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{member.note}\n\n{_related(member, family.members)}\n"
    write_file(folder / "README.md", text)


def _write_search(folder: Path, member: Member, family: Family) -> None:
    """Write the folder of a search anew, from what was read and checked: no other file can slip in."""
    findings = family.findings
    shutil.copyfile(family.search / RECORDS_FILE, folder / RECORDS_FILE)
    write_config(folder, findings.space)
    findings.predictor.save(folder / PREDICTOR_FILE)
    if findings.table is not None:
        findings.table.save(folder / LATENCY_FILE)
    if findings.comparisons:
        save_comparisons(folder / INSENSITIVITY_FILE, findings.comparisons)
    write_report(
        folder, family.cost, sequence_length=findings.sequence_length, supernet=family.supernet, max_cost=family.budgets
    )
    write_data_card(folder, member.repo_id, family.supernet)


def _related(member: Member, members: Sequence[Member]) -> str:
    """Return the section of a card that names the other members."""
    prefix = {"model": "", "dataset": "datasets/", "space": "spaces/"}
    others = [other for other in members if other != member]
    links = [f"https://huggingface.co/{prefix[other.repo_type]}{other.repo_id}" for other in others]
    return "\n".join(f"- [{inline_code(other.repo_id)}]({link}): {other.note}" for other, link in zip(others, links))


# The Hub


def push_family(
    folder: Path,
    members: Sequence[Member],
    *,
    private: bool = False,
    token: str | bool | None = None,
    report: Callable[[str], None] = print,
) -> str:
    """Upload the folder of each member in one commit, and then make a collection of all of them.

    Args:
        folder: The folder of the family, which `write_family` has filled.
        members: The repositories of the family.
        private: Whether new repositories and the collection are private.
        token: Access token; by default the one that `hf auth login` has stored.
        report: Called with the address of each commit.

    Returns:
        The address of the collection.

    Raises:
        PermissionError: If there is no token, or the token may not write there.
        ConnectionError: If the Hub cannot be reached or fails. The same call continues.
    """
    api = hub_client(token)
    for member in members:
        pushed = push_folder(
            folder / member.folder,
            member.repo_id,
            repo_type=member.repo_type,
            private=private or None,  # None leaves it to the settings of an organisation
            token=token,
            overwrite_card=member.repo_type == "space",  # the Hub gives every new Space a card
        )
        report(f"{member.repo_id}: {pushed.commit_url}")
    namespace, name = members[0].repo_id.split("/")
    with explain_failure(members[0].repo_id):
        collection = api.create_collection(
            name,
            namespace=namespace,
            description="A supernet, its subnets for some budgets, its measured shapes, and a page to choose one.",
            private=private,
            exists_ok=True,
        )
        for member in members:
            kind: Any = member.repo_type
            collection = api.add_collection_item(
                collection.slug, member.repo_id, kind, note=member.note[:500], exists_ok=True
            )
    return collection.url
