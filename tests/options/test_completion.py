"""Tab: commands, keys, choices, runs."""

import os
import subprocess
import sys
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


def test_completion_in_bash(studies: Path) -> None:
    """As readline calls it: what it takes for the word is what follows the =; nothing is ever written to the prompt."""
    binaries = studies / "bin"
    binaries.mkdir()
    (binaries / "softmoe").write_text(f'#!/bin/sh\nexec {sys.executable} -m softmoe_cli "$@"\n')
    (binaries / "softmoe").chmod(0o755)
    (studies / "conf/model").mkdir(parents=True)
    (studies / "conf/model/latin.yaml").write_bytes(b"\xe9: 1")
    code = (
        'eval "$(softmoe completion bash)"; complete -p softmoe\n'
        'ask() { COMP_LINE=$1 COMP_POINT=${#1}; _softmoe softmoe "$2"; printf "%s\\n" "${COMPREPLY[@]}"; }\n'
        'ask "softmoe train model=vit_nano2_s" vit_nano2_s; ask "softmoe evaluate checkpoint=" ""\n'
        'ask "softmoe train model=latin model.router.k" model.router.k; ask "softmoe trainn x" x\n'
    )
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": root}
    told = subprocess.run(["bash", "-c", code], cwd=studies, env=env, capture_output=True, text=True, check=False)
    assert told.stderr == ""
    first, choice, *runs = told.stdout.splitlines()
    assert first == "complete -F _softmoe softmoe" and choice == "vit_nano2_soft"
    assert sorted(runs[:3]) == ["outputs/a\\ study/run\\ 1", "outputs/digits/one-1", "outputs/digits/two-2"]


def test_completion_imports_neither_torch_nor_hydra(studies: Path) -> None:
    code = (
        "import sys; from softmoe_cli.cli import run\n"
        "run(['completion', 'answer', 'softmoe train model/router=soft model.router.num'])\n"
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'timm', 'numpy') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "model.router.num_experts=\n[]\n"
