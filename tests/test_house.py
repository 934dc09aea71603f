"""The rules of the house: which file imports which, what travels to the Hub, and how long files and functions are."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "supershaper_hf"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Every module under its name without the package's: "model.elastic"; "search" is `search/__init__.py`.
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}
WINGS = [name for name, file in MODULES.items() if file.name == "__init__.py" and name != "__init__"]

FLOORS = [  # from the ground
    ["files", "checks", "devices", "processes"],
    ["model"],
    ["convert", "data", "latency", "search"],
    ["training", "publish", "report"],
    ["finetuning"],
    ["__init__"],
]
TRAVELLERS = ["model.configuration_supershaper", "model.elastic", "model.modeling_supershaper", "model.narrowing"]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60  # without the docstring, which grows with the number of arguments
LONGER: dict[str, str] = {}  # a file, or "file: function", and the reason why it is longer
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def imports(name: str) -> Iterator[tuple[str, ast.Import | ast.ImportFrom]]:
    """Yield the full names of all modules that `name` imports, also inside functions, each with its statement."""
    package = ["supershaper_hf", *MODULES[name].relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:  # `from ..search import pareto` imports a module, other names stand in one
                module = ".".join([*base, alias.name])
                yield module if own_name(module) in MODULES else ".".join(base), node


def own_name(module: str) -> str | None:
    """Return the name in `MODULES` of a module of ours, or None for one of another package."""
    first, _, rest = module.partition(".")
    return (rest or "__init__") if first == "supershaper_hf" else None


def public_imports_in_try() -> list[ast.stmt]:
    """Return the statements `import supershaper_hf` of the modeling file that stand directly inside `try`."""
    blocks = [node for node in ast.walk(TREES["model.modeling_supershaper"]) if isinstance(node, ast.Try)]
    return [line for block in blocks for line in block.body if ast.unparse(line) == "import supershaper_hf"]


def own_imports(name: str) -> list[tuple[str, int]]:
    """Return the modules of ours that `name` imports, and the line, without the public imports that travel."""
    allowed = public_imports_in_try()
    return [
        (target, node.lineno) for module, node in imports(name) if (target := own_name(module)) and node not in allowed
    ]


def room(name: str) -> str:
    return name.split(".")[0]


def floor(name: str) -> int:
    return next(height for height, rooms in enumerate(FLOORS) if room(name) in rooms)


def test_every_file_has_a_floor():
    rooms = {room(name) for name in MODULES}
    assert rooms == {name for rooms in FLOORS for name in rooms}


def test_imports_point_down():
    up = [
        f"{name}, line {line}, imports {target}"
        for name in MODULES
        for target, line in own_imports(name)
        if room(target) != room(name) and floor(target) > floor(name)
    ]
    assert not up, "\n".join(up)


def test_no_circle_of_wings():
    graph: dict[str, set[str]] = {}
    for name in MODULES:
        rooms = {room(target) for target, _ in own_imports(name)}
        graph.setdefault(room(name), set()).update(rooms - {room(name)})
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_circle_of_files():
    graph = {name: {target for target, _ in own_imports(name)} for name in MODULES}
    TopologicalSorter(graph).prepare()


def test_files_that_travel_import_only_each_other():
    own = {name: {target for target, _ in own_imports(name)} for name in TRAVELLERS}
    assert all(targets <= set(TRAVELLERS) for targets in own.values()), own
    # The Hub's loader follows relative imports of one dot: the files lie side by side there.
    for name in TRAVELLERS:
        relative = [node for _, node in imports(name) if isinstance(node, ast.ImportFrom) and node.level]
        assert all(node.level == 1 and node.module for node in relative)
    assert len(public_imports_in_try()) >= 1


def test_a_wing_says_what_it_is_for_and_exports_nothing():
    for wing in WINGS:
        assert ast.get_docstring(TREES[wing]), f"{wing}/__init__.py needs a docstring"
        assert len(TREES[wing].body) == 1, f"{wing}/__init__.py holds more than its docstring"


def test_every_file_opens_with_what_it_does():
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_no_file_is_named_for_nothing():
    assert [name for name in MODULES if name.split(".")[-1] in {"utils", "util", "helpers", "misc", "common"}] == []


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines of a function from `def` to its end, without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def long_ones() -> Iterator[tuple[str, str]]:
    """Yield the names of all files and functions that are too long, and by how much."""
    for file in [*MODULES.values(), *sorted((ROOT / "examples").glob("*.py"))]:
        text = file.read_text(encoding="utf-8")
        name = file.relative_to(ROOT).as_posix()
        if file in MODULES.values() and (lines := len(text.splitlines())) > MAX_FILE_LINES:
            yield name, f"{lines} lines, allowed {MAX_FILE_LINES}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, FUNCTION) and (lines := code_lines(node)) > MAX_FUNCTION_LINES:
                yield f"{name}: {node.name}", f"{lines} lines, allowed {MAX_FUNCTION_LINES}"


def test_files_and_functions_are_short():
    found = dict(long_ones())
    unexplained = [f"{name}: {lines}" for name, lines in found.items() if name not in LONGER]
    assert not unexplained, "\n".join(unexplained)
    assert set(LONGER) <= set(found)  # no excuse for what is short by now


def requirements(*extras: str) -> list[Requirement]:
    """Return what the package needs, and what some extras add."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [requirement for line in lines if (requirement := Requirement(line)).name != PROJECT["name"]]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, Version]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines())
    pairs = [line.split("==") for line in lines if line]
    found = {canonical(name): Version(version) for name, version in pairs}
    assert len(found) == len(pairs), f"{file} pins a package twice"
    return found


def test_everything_imported_is_declared():
    """What only an extra installs is imported inside functions, so that every module can be imported without it."""
    declared = {canonical(requirement.name) for requirement in requirements()}
    optional = {canonical(requirement.name) for requirement in requirements("export")} - declared
    for name, tree in TREES.items():
        for module, node in imports(name):
            package = canonical(module.partition(".")[0])
            if package not in {*sys.stdlib_module_names, "supershaper-hf", *declared}:
                assert package in optional, f"{name} imports {package}, which pyproject.toml does not name"
                assert node not in tree.body, f"{name} imports {package}, an optional package, outside a function"


def test_every_tool_and_library_is_pinned_within_its_bounds():
    pinned = pins("constraints.txt")
    for requirement in requirements("test", "dev", "benchmarks", "neighbours"):
        assert pinned[canonical(requirement.name)] in requirement.specifier, requirement


def test_the_oldest_versions_are_the_lower_bounds():
    pinned = pins("constraints-oldest.txt")
    for requirement in requirements("test"):
        bounds = [Version(bound.version) for bound in requirement.specifier if bound.operator == ">="]
        assert [pinned[canonical(requirement.name)]] == bounds, requirement


def test_the_citation_names_the_version():
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {PROJECT['version']}" in lines
