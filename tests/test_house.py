"""The rules of the house: imports go down, moe/ stands alone, files and functions are short, README shows the rooms."""

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.oracles import compose

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "softmoe_cli"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

LONG_FUNCTIONS: dict[str, str] = {
    "softmoe_cli/train/loop.py: train": "the loop, told once, from the first line of a run to its last",
}
"""Functions of more than 80 lines, as `file: function`, and why."""
TWICE: dict[str, str] = {"T": "a type variable, bound anew in each file"}
"""Public names that several files define, and why."""


def imported(tree: ast.Module) -> Iterator[str]:
    """What a file imports, at its top and inside functions, as dotted names of modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and not node.level, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else node.module


def room(name: str) -> str:
    """`softmoe_cli.data.sets` lies in the room `data`; a file of the top floor is a room of its own."""
    return [*name.split("."), name][1]


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Some names that lie on a circle, or nothing. Removes, again and again, the names that point at removed names
    only."""
    left = {name: set(targets) for name, targets in arrows.items()}
    while done := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in done:
            del left[name]
    return sorted(left)


def test_imports_go_down() -> None:
    """Files can be put on floors so that each imports from floors below only, and so can rooms."""
    files = {name: {each for each in imported(tree) if each in FILES} - {name} for name, tree in TREES.items()}
    rooms: dict[str, set[str]] = {room(name): set() for name in files}
    for name, targets in files.items():
        rooms[room(name)] |= {room(each) for each in targets} - {room(name)}
    assert circle(files) == [] == circle(rooms)


def test_moe_needs_torch_and_jaxtyping_only() -> None:
    allowed = {"torch", "jaxtyping", *sys.stdlib_module_names}
    for name, tree in TREES.items():
        if name.startswith("softmoe_cli.moe"):
            foreign = {each for each in imported(tree) if each.partition(".")[0] not in allowed}
            assert {each for each in foreign if not each.startswith("softmoe_cli.moe")} == set(), name


def test_the_package_knows_nothing_of_tests_and_experiments() -> None:
    """The package imports nothing from tests/ and experiments/, and no string in it, docstrings apart, names a path
    there."""
    path = re.compile(r"(^|[\s/'\"(])(tests|experiments)/")
    for name, tree in TREES.items():
        assert {each.partition(".")[0] for each in imported(tree)}.isdisjoint({"tests", "experiments"}), name
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
                assert not path.search(node.value), f"{name}, line {node.lineno}: {node.value!r}"
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
                assert node.right.value not in ("tests", "experiments"), f"{name}, line {node.lineno}"


def test_annotations_of_shapes_are_checked() -> None:
    """Each file that writes a shape beside a tensor is among those whose calls pytest checks. data/ is not named as a
    whole: the checks of files that read listings by the million make their tests take three times as long."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    *checked, _ = re.findall(r"--jaxtyping-packages=(\S+)", options)[0].split(",")
    assert set(checked) <= FILES.keys()
    for name, tree in TREES.items():
        if "jaxtyping" in imported(tree):
            assert any(f"{name}.".startswith(f"{each}.") for each in checked), f"{name} is not in --jaxtyping-packages"


def test_one_function_ends_a_process_at_once() -> None:
    """What a process has started, and its terminal, are looked after in one place: signals.leave_now."""
    calls = [
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "_exit"
    ]
    assert calls == ["softmoe_cli.signals"]


def test_files_and_functions_are_short() -> None:
    """No file is longer than 500 lines, and the list above holds exactly the long functions."""
    files, functions = set(), set()
    for name, tree in TREES.items():
        place = str(FILES[name].relative_to(ROOT))
        if len(FILES[name].read_text().splitlines()) > 500:
            files.add(place)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > 80:
                functions.add(f"{place}: {node.name}")
    assert not files
    assert functions == set(LONG_FUNCTIONS)


def defined(tree: ast.Module) -> set[str]:
    """The public names that a file defines at its top."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_a_public_name_means_one_thing() -> None:
    """No two files define the same one at their top; the list above holds exactly the exceptions."""
    times = Counter(name for tree in TREES.values() for name in defined(tree))
    assert {name for name, count in times.items() if count > 1} == set(TWICE)


def test_no_local_name_hides_an_imported_one() -> None:
    for name, tree in TREES.items():
        aliases = [
            each for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for each in node.names
        ]
        foreign = {(each.asname or each.name).partition(".")[0] for each in aliases}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                own = {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
                own |= {
                    each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
                }
                assert not own & foreign, f"{name}, {node.name}"


def rooms() -> list[Path]:
    return sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())


def test_a_room_has_three_files_at_least() -> None:
    for each in rooms():
        assert len([path for path in each.glob("*.py") if path.name != "__init__.py"]) >= 3, each.name


def test_readme_shows_the_rooms() -> None:
    """README has a block that begins with `softmoe_cli/`, then `name/ one line` for each room and `name.py one line`
    for each file beside them."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"^```\w*\nsoftmoe_cli/[^\n]*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block is not None, "README.md has no tree of softmoe_cli/"
    lines = [line.split(maxsplit=1) for line in block[1].splitlines() if line.strip()]
    assert all(len(line) == 2 for line in lines), "each with its one line"
    beside = [path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]
    assert sorted(line[0] for line in lines) == sorted([*(f"{path.name}/" for path in rooms()), *beside])


EXPERIMENTS = sorted((ROOT / "conf/experiment").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT / "conf/experiment").with_suffix("")) for path in EXPERIMENTS if path.stem[0] != "_"]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_says_what_it_asks_and_found(path: Path) -> None:
    """A file says its question, command, needs and result, or inherits them from a file that does."""
    text = path.read_text()
    heads = re.findall(r"^# (Question|Command|Needs|Result) {2,}\S", text, re.MULTILINE)
    shared = re.search(r"^defaults:\n(?: +- .*\n)*? +- (\S+/_\w+)\n", text, re.MULTILINE)
    if shared is None:
        assert heads == ["Question", "Command", "Needs", "Result"]
        result = re.search(r"^# Result +(\S+)", text, re.MULTILINE)
        assert result is not None and (ROOT / result[1]).is_file()
    else:
        assert heads == [] and (ROOT / "conf/experiment" / f"{shared[1]}.yaml") in EXPERIMENTS


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_composes(name: str) -> None:
    assert compose(f"+experiment={name}").study == name.partition("/")[0]
