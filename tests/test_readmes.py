"""What README.md, AGENTS.md and the rooms' README.md files say: each command works as typed, links and files are there.

A command goes as far as its work: it is composed whole, every value is checked, a checkpoint's card is read, and then
it is ended. What cannot go so far stands here, or behind the command as `# not run: REASON`.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.plugins.sweeper import Sweeper
from omegaconf import open_dict, read_write
from PIL import Image

from softmoe_cli.config.model import Model
from softmoe_cli.config.run import Config
from softmoe_cli.cost.flop import on_meta
from softmoe_cli.launch.sweep import Sweep
from softmoe_cli.options.compose import plain
from softmoe_cli.options.inherit import resolve
from tests.conftest import TINY, Softmoe
from tests.images import shards
from tests.runs import saved

ROOT = Path(__file__).resolve().parents[1]
READMES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", ROOT / "AGENTS.md", *sorted(ROOT.glob("softmoe_cli/*/README.md"))]
    if path.parent.name != "vectors"  # which says how the official numbers were made
}
NOT_RUN = {
    "make": "installs from the network, and make test is what runs this test",
    "pip": "installs from the network",
    "torchrun": "takes devices for each process; tests/test_parallel.py starts the same processes with a small model",
    "wandb": "sends to a server",
    "#!/bin/bash": "a batch script, which tests/launch/test_places.py runs with stand-ins for Slurm",
    "extract": "takes a model that was trained on several sets; tests/extract types it",
    "+search=quality": "Optuna warns when it is imported; tests/launch/test_sweep.py runs it in a process of its own",
    "+search=pareto": "the same",
}
"""Words of commands that are not run here, and why."""
WORK = (
    "softmoe_cli.cli._train", "softmoe_cli.upcycle.make.upcycle",
    "softmoe_cli.evaluate.command.evaluate_checkpoint", "softmoe_cli.export.make.export",
    "softmoe_cli.prune.make.prune", "softmoe_cli.cost.command.costs",
    "softmoe_cli.cost.match.match", "softmoe_cli.compare.blocks.compare", "softmoe_cli.check.command.check_router",
    "softmoe_cli.compare.blocks.usable_runs",
    "softmoe_cli.data.check.check_data", "softmoe_cli.show.command.read_record",
    "softmoe_cli.doctor.command.examine",
)  # fmt: skip
"""What commands call with all that was checked. softmoe list, status, completion, --help, --groups and --cfg run."""


def blocks(text: str, language: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for written_in, block in found if written_in == language]


def commands(text: str) -> Iterator[str]:
    """The lines behind `$`; and all lines of a block without `$` whose first word is a command's."""
    for block in blocks(text):
        block = block.replace("\\\n", " ")
        if block.startswith("#!"):
            yield block
        elif re.search(r"^\$ ", block, re.MULTILINE):
            yield from re.findall(r"^\$ (.*)", block, re.MULTILINE)
        elif block.split(maxsplit=1)[0] in ("softmoe", "eval", *NOT_RUN):
            yield from block.splitlines()


def ours(command: str) -> list[str] | None:
    """The words after `softmoe`; None for what is not run."""
    if NOT_RUN.keys() & command.split() or "# not run: " in command:
        return None
    inner = re.fullmatch(r'eval "\$\((.*)\)"', command.partition("  #")[0].strip())
    words = shlex.split(inner[1] if inner else command.partition(" | ")[0], comments=True)
    assert words[0] == "softmoe", command
    return words[1:]


def once() -> dict[str, list[list[str]]]:
    """The commands of each file that none before it has."""
    found: dict[str, list[list[str]]] = {}
    for name, text in READMES.items():
        before = [words for each in found.values() for words in each]
        found[name] = [words for words in map(ours, commands(text)) if words is not None and words not in before]
    return found


COMMANDS = once()
RARE = ("cost", "data", "evaluate", "export", "model", "moe", "settle", "train", "upcycle")
"""Rooms whose commands are tried by `make long` only: their own tests run most of them, and composing takes time."""


@pytest.fixture
def place(tmp_path: Path) -> dict[str, str]:
    """What stands for the words in capitals: images, and checkpoints with weights that nobody trained."""
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (16, 16), (number, 9, 9)).save(tmp_path / "images" / label / f"{number}.png")
    study = tmp_path / "outputs/STUDY"
    for name in ("STUDY", "quick", "first_compare", "expert_count"):
        (tmp_path / "outputs" / name / "run").mkdir(parents=True)
        (tmp_path / "outputs" / name / "run/config.yaml").write_text("seed: 0")
    (tmp_path / "my_router.py").write_text(
        "from softmoe_cli.moe.routers.soft import SoftRouter\n\n\nclass Mine(SoftRouter):\n    pass\n"
    )
    return {"PATH": str(tmp_path / "images"), "STUDY": study.name}


def checkpoint(words: Sequence[str], folder: Path) -> str:
    """A dense one for softmoe upcycle; one of colour images where such are named."""
    dense = words[0] == "upcycle"
    colour = any(re.match(r"data=(folder|imagenet)", word) for word in words)
    path = folder / f"{'dense' if dense else 'soft'}{3 if colour else 1}.safetensors"
    tiny = [word for word in TINY if not (dense and "num_experts" in word)]
    more = [f"data.channels={3 if colour else 1}", *(["model/router=dense"] if dense else [])]
    return str(path if path.exists() else saved(path, 0, *more, tiny=tiny))


def reached(given: Any = None, *_: Any, **__: Any) -> None:
    """Instead of the work; whatever model it would be about can be built."""
    for config in given if isinstance(given, list) else [given]:
        if isinstance(model := getattr(config, "model", None), Model):
            on_meta(model, 10)
    raise SystemExit(0)


def compose_last(self: Any, job_overrides: Sequence[Sequence[str]], *_: Any, **__: Any) -> None:
    """Instead of a sweep's work: its last job is composed and checked."""
    config = self._compose(self._config, list(job_overrides[-1]))
    with read_write(config), open_dict(config):
        del config["hydra"]
    reached(resolve(self.command, plain(config, Config), job_overrides[-1])[0])


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] * (Path(name).parent.name in RARE)) for name in COMMANDS]
)
def test_commands_work_as_typed(
    name: str, softmoe: Softmoe, place: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in WORK:
        monkeypatch.setattr(work, reached)
    monkeypatch.setattr("softmoe_cli.train.first.first_words", lambda *_: None)
    monkeypatch.setattr(Sweep, "launch", compose_last)
    monkeypatch.setattr("softmoe_cli.settle.sweeper.fair_arms", compose_last)
    monkeypatch.setattr(Sweeper, "validate_batch_is_legal", lambda *_: None)  # by composing it
    for words in COMMANDS[name]:
        for capitals, there in place.items():
            words = [re.sub(rf"\b{capitals}\b", there, word) for word in words]
        if any("RUN" in word for word in words):
            words = [word.replace("RUN", checkpoint(words, tmp_path)) for word in words]
        if "data=webdataset" in words:  # whose files it looks for before anything else
            words = [word.replace(place["PATH"], str(shards(tmp_path / "shards"))) for word in words]
        answer = softmoe(*words)
        wrong = "vit_nano4_sof" in words[-1]  # shown for its answer
        assert answer.code == (2 if wrong else 0), f"{words}\n{answer.err}"
        assert not wrong or answer.err in READMES[name]


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", READMES[name]):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if heading:
            heads = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target


@pytest.mark.parametrize("name", [name for name in READMES if name.startswith("softmoe_cli/")])
def test_a_room_lists_its_files(name: str) -> None:
    room = (ROOT / name).parent
    (listed,) = [block for block in blocks(READMES[name]) if block.startswith(f"{room.name}/")]
    if (room / "__init__.py").exists():
        told = {line.split()[0] for line in listed.splitlines() if line.split()[0].endswith(".py")}
        assert told == {f"{room.name}/{path.name}" for path in room.glob("*.py") if path.name != "__init__.py"}


def test_the_python_of_a_readme_runs() -> None:
    code = [block for text in READMES.values() for block in blocks(text, "python")]
    code = [block for block in code if "local-dir:" not in block]  # tests/export/test_make.py loads a folder so
    assert len(code) == 1
    exec(code[0], {})


def test_readme_is_short() -> None:
    assert len(READMES["README.md"].splitlines()) <= 250


def test_the_version_to_cite() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
