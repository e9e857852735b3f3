"""Tab: commands, keys, choices, runs."""

import ast
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softmoe_cli.options import completion


@pytest.fixture
def studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for run in ("digits/one-1", "digits/two-2", "a study/run 1"):
        folder = tmp_path / "outputs" / run
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    (tmp_path / "w.safetensors").touch()
    return tmp_path


COMPLETED = {
    "softmoe tr": ["train"],
    "softmoe data ": ["check"],
    "softmoe help ev": ["evaluate"],
    "softmoe completion f": ["fish"],
    "softmoe list r": ["routers", "recipes"],
    "softmoe train model=vit_nano2_s": ["model=vit_nano2_soft"],
    "softmoe train -m model=vit_nano2_dense,vit_nano2_s": ["model=vit_nano2_dense,vit_nano2_soft"],
    "softmoe train mo": ["model=", "model/backbone=", "model/router=", "model."],
    "softmoe train optim.l": ["optim.lr=", "optim.layer_decay="],
    "softmoe train 'optim.l": ["optim.lr=", "optim.layer_decay="],
    "softmoe train model.router.k": [],
    "softmoe train model/router=tokens_choice model.router.k": ["model.router.k="],
    "softmoe train train.compile=": ["train.compile=true", "train.compile=false"],
    "softmoe train +experiment=placement/e": ["+experiment=placement/every_2"],
    "softmoe train --cfg j": ["job"],
    "softmoe train --g": ["--groups"],
    "softmoe match to=vit_s16_d": ["to=vit_s16_dense"],
    "softmoe check soft_": ["soft_uniform"],
    "softmoe check tokens_choice k": ["k="],
    "softmoe evaluate checkpoint=w": ["checkpoint=w.safetensors"],
    "softmoe evaluate checkpoint=outputs/digits/t": [
        "checkpoint=outputs/digits/two-2", "checkpoint=outputs/digits/two-2/"
    ],
    "softmoe evaluate checkpoint=outputs/a\\ study/r": [
        "checkpoint=outputs/a\\ study/run\\ 1", "checkpoint=outputs/a\\ study/run\\ 1/"
    ],
    "softmoe compare outputs/d": ["outputs/digits"],
    "softmoe status outputs/digits/o": ["outputs/digits/one-1/"],
    "softmoe compare --c": ["--cost", "--columns"],
    "softmoe scaling --t": ["--train-pflop", "--total-pflop", "--total-s"],
    "softmoe nonsense ": [],
    "softmoe train data.root=/no/such/place/": [],
}  # fmt: skip


@pytest.mark.parametrize("line", COMPLETED)
def test_completion(line: str, studies: Path) -> None:
    assert completion.answers(line) == COMPLETED[line]


@pytest.fixture
def environment(studies: Path) -> dict[str, str]:
    """In which a shell finds softmoe, and nothing of whoever runs the tests."""
    binaries = studies / "bin"
    binaries.mkdir()
    (binaries / "softmoe").write_text(f'#!/bin/sh\nexec {sys.executable} -m softmoe_cli "$@"\n')
    (binaries / "softmoe").chmod(0o755)
    root = str(Path(__file__).parents[2])
    paths = {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": root, "HOME": str(studies)}
    return os.environ | paths | {"TERM": "dumb"}


def test_completion_in_bash(studies: Path, environment: dict[str, str]) -> None:
    """As readline calls it: what it takes for the word is what follows the =; nothing is ever written to the prompt."""
    (studies / "conf/model").mkdir(parents=True)
    (studies / "conf/model/latin.yaml").write_bytes(b"\xe9: 1")
    code = (
        'eval "$(softmoe completion bash)"; complete -p softmoe\n'
        'ask() { COMP_LINE=$1 COMP_POINT=${#1}; _softmoe softmoe "$2"; printf "%s\\n" "${COMPREPLY[@]}"; }\n'
        'ask "softmoe train model=vit_nano2_s" vit_nano2_s; ask "softmoe evaluate checkpoint=" ""\n'
        'ask "softmoe train model=latin model.router.k" model.router.k; ask "softmoe trainn x" x\n'
    )
    told = subprocess.run(
        ["bash", "-c", code], cwd=studies, env=environment, capture_output=True, text=True, check=False
    )
    assert told.stderr == ""
    first, choice, *runs = told.stdout.splitlines()
    assert first == "complete -F _softmoe softmoe" and choice == "vit_nano2_soft"
    assert sorted(runs[:3]) == ["outputs/a\\ study/run\\ 1", "outputs/digits/one-1", "outputs/digits/two-2"]


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish here")
def test_completion_in_fish(studies: Path, environment: dict[str, str]) -> None:
    """complete -C prints what the Tab key would offer."""
    lines = [
        "softmoe tr",
        "softmoe train -m model=vit_nano2_dense,vit_nano2_s",
        "softmoe evaluate checkpoint=outputs/d",
    ]
    code = "\n".join(["softmoe completion fish | source", *(f"complete -C '{line}'" for line in lines)])
    told = subprocess.run(
        ["fish", "--no-config", "-c", code], cwd=studies, env=environment, capture_output=True, text=True, check=False
    )
    assert told.stderr == ""
    train, models, *runs = told.stdout.splitlines()
    assert (train, models) == ("train", "model=vit_nano2_dense,vit_nano2_soft")
    assert {"checkpoint=outputs/digits/one-1", "checkpoint=outputs/digits/two-2"} <= {*runs}


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
def test_completion_in_zsh(studies: Path, environment: dict[str, str]) -> None:
    """A terminal, in which the Tab key is pressed and then, for a whole line, the Return key."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(studies)
        os.execvpe("zsh", ["zsh", "-f", "-i"], environment)

    def press(keys: str, until: str) -> None:
        os.write(terminal, keys.encode())
        shown, end = "", time.monotonic() + 60
        while until not in shown:
            assert time.monotonic() < end and select.select([terminal], [], [], 60)[0], shown
            shown += os.read(terminal, 4096).decode(errors="replace")

    try:
        press('eval "$(softmoe completion zsh)"; echo "re"ady\r', "ready")
        press("softmoe tr\t", "softmoe train ")
        press("model=vit_nano2_so\t", "model=vit_nano2_soft ")
        press("optim.layer\t", "_decay=")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)


def test_what_the_tab_key_imports(studies: Path) -> None:
    """Beside Python's own modules those of the command line and of YAML; of Python's own, none that is slow."""
    code = (
        "import sys; before = {*sys.modules}; from softmoe_cli.cli import run\n"
        "run(['completion', 'answer', 'softmoe train model/router=soft model.router.num'])\n"
        "found = {name.partition('.')[0] for name in {*sys.modules} - before if 'cython' not in name}\n"
        "slow = {'multiprocessing', 'socket', 'asyncio', 'tempfile', 'argparse', 'http', 'subprocess'}\n"
        "print(sorted(found - sys.stdlib_module_names | found & slow))\n"
        "print(sorted({n.split('.')[1] for n in sys.modules if n.startswith('softmoe_cli.')}))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    words, others, rooms = told.stdout.splitlines()
    assert words == "model.router.num_experts=" and set(ast.literal_eval(others)) <= {"softmoe_cli", "yaml", "_yaml"}
    assert {"config", "options"} <= set(ast.literal_eval(rooms))
    assert not {"train", "model", "moe", "compare", "launch", "cost", "evaluate"} & set(ast.literal_eval(rooms))
