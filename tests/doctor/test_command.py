"""softmoe doctor: the files of one real run, made healthy by hand, and from them a run with each illness alone."""

import dataclasses
import functools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from softmoe_cli.doctor.chart import Chart, read_chart
from softmoe_cli.doctor.experts import of_experts
from softmoe_cli.doctor.learning import of_learning
from softmoe_cli.doctor.signs import SIGNS
from softmoe_cli.doctor.weights import Weighed, mean_cosine
from softmoe_cli.options.explain import known_keys
from softmoe_cli.run.status import State
from tests.conftest import TINY, Softmoe
from tests.routers import ROOT, ROUTERS, YAMLS, start
from tests.runs import the_run

Rows = list[dict[str, Any]]
ROWS = 40
SPENT = {"device_s": 100.0, "eval_s": 5.0, "save_s": 1.0, "compile_s": 0.0, "load_s": 2.0}


def falls(end: float, rate: float = 6.0) -> list[float]:
    """A training loss from 2.3 down to `end`, nearly all of it in the first half."""
    return [end + (2.3 - end) * math.exp(-rate * i / (ROWS - 1)) for i in range(ROWS)]


def edited(run: Path, file: str, change: Callable[[Rows], object]) -> None:
    rows = [json.loads(line) for line in (run / file).read_text().splitlines()]
    change(rows)
    (run / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def set_all(run: Path, file: str, split: str | None, **values: Any) -> None:
    edited(run, file, lambda rows: [row.update(values) for row in rows if split in (None, row.get("split"))])


def train_losses(run: Path, losses: list[float]) -> None:
    def change(rows: Rows) -> None:
        for row, loss in zip((row for row in rows if row["split"] == "train"), losses, strict=True):
            row["loss"] = loss

    edited(run, "metrics.jsonl", change)


def make_healthy(run: Path) -> None:
    """A real run of four steps gets the rows of one of forty that has learned."""

    def learned(rows: Rows) -> None:
        train = next(row for row in rows if row["split"] == "train")
        look = next(row for row in rows if row["split"] == "validation")
        curve = [train | SPENT | {"step": i, "loss": loss, "lr": 0.01, "grad_norm": 0.5, "epoch": i / 4}
                 for i, loss in enumerate(falls(0.05), 1)]  # fmt: skip
        rows[:] = [*curve, look | SPENT | {"step": ROWS, "loss": 0.1, "top1_pct": 95.0, "epoch": 10.0}]

    edited(run, "metrics.jsonl", learned)
    set_all(run, "routing.jsonl", None, scale=1.5, dispatch_max=0.3, combine_max=0.4)


def alike(run: Path) -> None:
    (file,) = (run / "checkpoints").glob("last-*/model.safetensors")
    weights = load_file(file)
    for name in ("blocks.1.mlp.experts.w1", "blocks.1.mlp.experts.w2"):
        weights[name] = np.broadcast_to(weights[name][:1], weights[name].shape).copy()
    save_file(weights, file)


def config(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert text.count(old) == 1
    (run / "config.yaml").write_text(text.replace(old, new))


def result(run: Path, **values: Any) -> None:
    row = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(row | values))


def slow(run: Path) -> None:
    config(run, "precision: fp32", "precision: bf16")
    result(run, fp32_is_faster=True)


def small(run: Path) -> None:
    train_losses(run, falls(1.0))
    set_all(run, M, "validation", loss=1.05)


M, R = "metrics.jsonl", "routing.jsonl"
PLANTED: dict[str, Callable[[Path], object]] = {
    "damaged": lambda run: (run / M).write_text((run / M).read_text().replace('"step": 3,', '"step": x,')),
    "unfinished": lambda run: (run / "result.json").unlink(),
    "chance": lambda run: set_all(run, M, "validation", top1_pct=10.5),
    "diverged": lambda run: train_losses(run, [2.3 + 0.05 * i for i in range(ROWS)]),
    "spikes": lambda run: train_losses(run, [loss + (i == 30) for i, loss in enumerate(falls(0.05))]),
    "idle": lambda run: set_all(run, M, "train", lr=1e-9),
    "falling": lambda run: train_losses(run, [2.3 - 2.25 * i / ROWS for i in range(ROWS)]),
    "data_bound": lambda run: set_all(run, M, "validation", loss=1.0),
    "capacity_bound": small,
    "dead": lambda run: set_all(run, R, None, dead_share=0.25),
    "collapsed": lambda run: set_all(run, R, None, effective_experts_share=0.4),
    "dropped": lambda run: set_all(run, R, None, dropped_share=0.3),
    "experts_alike": alike,
    "slots_alike": lambda run: set_all(run, R, None, slot_cosine_mean=0.95),
    "saturated": lambda run: set_all(run, R, None, dispatch_max=0.97),
    "scale_idle": lambda run: set_all(run, R, None, scale=1.001, dispatch_max=0.07),
    "loading": lambda run: set_all(run, M, None, load_s=70.0),
    "evaluation": lambda run: set_all(run, M, None, eval_s=80.0),
    "saving": lambda run: set_all(run, M, None, save_s=80.0),
    "compilation": lambda run: set_all(run, M, None, compile_s=80.0),
    "precision": slow,
}  # fmt: skip
"""Each illness, and the change to the files of a healthy run that is this illness and no other."""


def findings(softmoe: Softmoe, *folders: Path) -> dict[str, list[dict[str, Any]]]:
    """What is found in each run, by its folder's name; checks what is the same for all answers."""
    answer = softmoe("doctor", *map(str, folders), "--json")
    told = json.loads(answer.out)
    found = {Path(run["run"]).name: [each for each in run["readings"] if each["ill"]] for run in told["runs"]}
    assert answer.code == (1 if any(found.values()) else 0) and answer.err == ""
    assert told["ill"] == sum(map(bool, found.values())) == len(told["runs"]) - told["healthy"]
    for run in told["runs"]:
        assert run["findings"] == [each["sign"] for each in run["readings"] if each["ill"]]
        for each in run["readings"]:
            assert each["source"] and each["measured"]
            assert (each["figure"] is None) == bool(each["unseen"]) and bool(each["turn"]) == each["ill"]
    return found


@pytest.mark.long
def test_each_illness_is_found_alone(softmoe: Softmoe, tmp_path: Path) -> None:
    line = (*TINY, "threads=1", "model.expert_init=independent", "train.steps=4", "train.log_every=1")
    assert softmoe("train", *line).code == 0
    study = tmp_path / "outputs/planted"
    shutil.move(the_run(tmp_path), study / "healthy")
    make_healthy(study / "healthy")
    assert PLANTED.keys() == SIGNS.keys()
    known = {*known_keys("train", []), *known_keys("train", ["model/router=tokens_choice"])}
    for sign, plant in PLANTED.items():
        shutil.copytree(study / "healthy", study / sign)
        plant(study / sign)
    found = findings(softmoe, study)
    signs = {run: [each["sign"] for each in readings] for run, readings in found.items()}
    assert signs == {"healthy": []} | {sign: [sign] for sign in PLANTED}
    for sign, (reading,) in ((sign, readings) for sign, readings in found.items() if readings):
        assert reading["limit"] == SIGNS[sign].limit or sign == "chance"
        for key in re.findall(r"\b(?:optim|train|model|data|augment)\.[a-z_]+(?:\.[a-z_]+)*", reading["turn"]):
            assert key in known, f"{sign}: {key}"

    healthy = softmoe("doctor", str(study / "healthy"))
    assert healthy.code == 0 and "(done): healthy; looked at: damaged, " in healthy.out
    assert "not looked at" not in healthy.out, "every sign was looked at"
    table = softmoe("doctor", str(study)).out
    assert "outputs/planted/dropped (done): 1 finding\n" in table
    assert re.search(r"^  dropped tokens +30 +from 25 +block 1, step 4$", table, re.MULTILINE)
    assert "model.router.slots_per_expert (1) up, or model/router=tokens_choice_dropless." in " ".join(table.split())
    assert "to go on: softmoe train -cp" in table
    edited(study / "healthy", M, lambda rows: [row.pop("load_s") for row in rows])
    without = softmoe("doctor", str(study / "healthy"))
    assert without.code == 0 and "not looked at: time lost in loading: the rows have no load_s" in without.out

    rules(softmoe, study / "healthy")

    code = (
        f"import sys; sys.argv = ['softmoe', 'doctor', {str(study / 'healthy')!r}]\n"
        "from softmoe_cli.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('TORCH', 'torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout.split()[-1] == "False", "torch takes seconds to import"


OTHER = "softmoe_cli.moe.routers.{}"
SOFT = OTHER.format("soft.SoftRouter")


def rules(softmoe: Softmoe, healthy: Path) -> None:
    """Limits that depend on the router, and runs and looks that are too small to say anything."""

    def signs(name: str, *changes: Callable[[Path], object]) -> list[str]:
        run = healthy.parent.parent / "rules" / name
        shutil.copytree(healthy, run)
        for change in changes:
            change(run)
        ((_, found),) = findings(softmoe, run).items()
        return [each["sign"] for each in found]

    def experts_go(after: int) -> Callable[[Path], object]:
        gone = {"step": after, "block": 1, "window": 0, "dropped": [0, 2], "format": 1}
        return lambda run: edited(run, R, lambda rows: rows.append(gone))

    assert signs("experts_went", PLANTED["spikes"], experts_go(30)) == []
    assert signs("experts_went_before", PLANTED["spikes"], experts_go(29)) == ["spikes"]

    young = [alike, *(PLANTED[sign] for sign in ("unfinished", "chance", "idle", "scale_idle"))]
    assert signs("young", *young, lambda run: config(run, "steps: 4\n", "steps: 400\n")) == ["unfinished"]
    by_expert = lambda run: config(run, SOFT, OTHER.format("experts_choice.ExpertsChoiceRouter"))  # noqa: E731
    assert signs("experts_choice", by_expert, PLANTED["dropped"]) == []
    assert signs("more", by_expert, lambda run: set_all(run, R, None, dropped_share=0.5)) == ["dropped"]
    for share, told in {0.6: [], 0.7: ["dropped"]}.items():
        change = functools.partial(set_all, file=R, split=None, ffn_dropped_share=share)
        assert signs(f"choices {share}", change) == told
    sparse = lambda run: edited(run, R, lambda rows: [row.pop("dispatch_max") for row in rows])  # noqa: E731
    for images, told in {5: ["dead"], 4: []}.items():  # of 16 tokens, for 4 experts
        few = functools.partial(config, old="eval_batch_size: 64", new=f"eval_batch_size: {images}")
        assert signs(f"{images} images", sparse, PLANTED["dead"], few) == told
        half = functools.partial(set_all, file=R, split=None, ffn_share=0.5)
        assert signs(f"{images} images, half of the choices", sparse, PLANTED["dead"], few, half) == []
    sgd = functools.partial(config, old="name: adamw", new="name: sgd")
    fast = functools.partial(set_all, file=M, split="train", lr=0.1)
    assert signs("sgd", sgd, fast) == []
    assert signs("sgd, flat", sgd, fast, lambda run: set_all(run, M, "train", grad_norm=1e-3)) == ["idle"]
    for epochs, told in {9.0: [], 9.96: ["experts_alike"]}.items():
        assert signs(f"equal, {epochs} epochs", alike, functools.partial(began_equal, epochs=epochs)) == told
    for key in ("label_smoothing", "mixup", "cutmix"):
        several_labels = functools.partial(config, old=f" {key}: 0.0", new=f" {key}: 0.1")
        assert signs(f"{key}, small", several_labels, small) == [], "its loss ends above that of validation images"
        assert signs(f"{key}, few images", several_labels, PLANTED["data_bound"]) == ["data_bound"]
    by_torchrun = functools.partial(result, devices=4)  # of which the settings say nothing: 25 s on each
    assert signs("torchrun", by_torchrun) == []
    slow_looks = functools.partial(set_all, file=M, split=None, device_s=400.0, eval_s=70.0)
    assert signs("torchrun, looks", slow_looks) == [] and signs("looks", by_torchrun, slow_looks) == ["evaluation"]
    seconds = {key: value / 10 for key, value in SPENT.items()}
    assert signs("short", lambda run: set_all(run, M, None, **seconds | {"eval_s": 59.0})) == []


def began_equal(run: Path, epochs: float) -> None:
    config(run, "expert_init: independent", "expert_init: identical")
    set_all(run, M, None, epoch=epochs)


ONLY_JUST_BEGUN = {"chance", "idle", "experts_alike", "scale_idle", "dead", "collapsed", "dropped"}
"""What is true of a run of two updates."""
BY_TASK = {name for name, options in YAMLS.items() if "num_tasks" in options}


@pytest.mark.thorough
@pytest.mark.parametrize("name", [*sorted(ROUTERS), "dense"])
def test_a_run_just_begun_is_told_only_what_is_true(name: str, softmoe: Softmoe, tmp_path: Path) -> None:
    """With any router; of a dense model nothing is said of experts."""
    tiny = [word for word in TINY if name != "dense" or "num_experts" not in word]
    tasks = ["model.router.num_tasks=1"] if name in BY_TASK else []
    tiny.append("model.expert_init=identical" if name == "dense" else start(name))
    assert softmoe("train", *tiny, *tasks, f"model/router={name}", "threads=1", "train.steps=2").code == 0
    run = the_run(tmp_path)
    ((_, found),) = findings(softmoe, run.parent).items()
    assert {each["sign"] for each in found} <= ONLY_JUST_BEGUN
    routing = [json.loads(line) for line in (run / R).read_text().splitlines()] if (run / R).exists() else []
    last = [row for row in routing if row["step"] == 2]
    assert bool(last) == (name != "dense")
    of_rows = {"dead": ("dead_share", max), "collapsed": ("effective_experts_share", min)}
    for each in found:
        if each["sign"] in of_rows:
            key, worst = of_rows[each["sign"]]
            assert each["figure"] == pytest.approx(100 * worst(row[key] for row in last))
        assert name != "dense" or each["sign"] in ("chance", "idle")


def chart_of(folder: Path, rows: Rows, model: dict[str, Any] | None = None, **epoch: float) -> Chart:
    """What is read of a folder that has these rows of training, beside what every row has."""
    every = {"format": 1, "images": 8, "epoch": 1.0, "split": "train", "train_pflop": 0.1, **SPENT}
    every |= {"loss": 1.0, "aux_loss": 0.0, "lr": 0.1, "grad_norm": 1.0, "images_per_s": 9.0} | epoch
    told = {"expert_init": "identical"} | (model or {"router": {"_target_": "x"}})
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": told}))
    (folder / M).write_text("".join(json.dumps(every | row) + "\n" for row in rows))
    return read_chart(State("x", "done", 1.0, None, None, None, None, str(folder)))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"step": 100, "lr": -1}, {"step": 139, "lr": -1}], "a row of train says lr is -1, which is below 0"),
        (
            [{"step": 9}, {"step": 9}, {"step": 3}],
            "a row of train says step is 3, which is below that of the row before",
        ),
        ([{"step": 9, "lr": 0}, {"step": 9}], None),
    ],
)
def test_rows_that_no_training_writes_are_damage(rows: Rows, told: str | None, tmp_path: Path) -> None:
    chart = chart_of(tmp_path, rows)
    assert chart.faults.get(M) == told and len(chart.train) == (0 if told else len(rows))
    assert {each.sign for each in of_learning(chart, "no weights")} >= {"diverged", "falling"}


@pytest.mark.parametrize(
    ("shares", "block", "ill", "turn"),
    [
        ({0: 0.3, 1: 0.4, 2: 0.1}, 0, True, "model.router.slots_per_expert (1) up, or model/router="),
        ({0: 0.2, 1: 0.6, 2: 0.1}, 1, True, "model.blocks.1.capacity_factor (0.5) up"),
        ({0: 0.3, 1: 0.1, 2: 0.1}, 0, True, "model.router.slots_per_expert (1) up, or model/router="),
        ({0: 0.1, 1: 0.1, 2: 0.7}, 2, True, "model.blocks.2.capacity_factor (1.1) up, or model.blocks.2.images_"),
        ({0: 0.2, 1: 0.4, 2: 0.5}, 0, False, ""),
    ],
)
def test_each_block_drops_tokens_by_the_limit_of_its_router(
    shares: dict[int, float], block: int, ill: bool, turn: str, tmp_path: Path
) -> None:
    """25% of tokens that choose, 50% where experts do, two thirds of choices of MLPs."""
    choice, plus = OTHER.format("experts_choice.ExpertsChoiceRouter"), OTHER.format("zero_computation.X")
    blocks = {1: {"_target_": choice, "capacity_factor": 0.5}, 2: {"_target_": plus, "capacity_factor": 1.1}}
    own = {"_target_": OTHER.format("tokens_choice.TokensChoiceRouter"), "slots_per_expert": 1}
    rows = [{"format": 1, "step": 9, "block": place, "dropped_share": share} for place, share in shares.items()]
    rows[2] |= {"dropped_share": 0.0, "ffn_dropped_share": shares[2]}
    (tmp_path / R).write_text("".join(json.dumps(row) + "\n" for row in rows))
    chart = chart_of(tmp_path, [{"step": 9}], {"router": own, "blocks": blocks})
    (reading,) = (each for each in of_experts(chart, "no weights") if each.sign == "dropped")
    assert reading.ill == ill and reading.turn.startswith(turn) and bool(reading.turn) == ill
    assert reading.where.startswith(f"block {block}, step 9") and reading.figure == 100 * shares[block]


@pytest.mark.parametrize(("epochs", "seen"), [(6.0, False), (9.96, True)])
def test_experts_that_began_equal_get_time_to_part(epochs: float, seen: bool, tmp_path: Path) -> None:
    """Those of adapters begin independent."""
    chart = chart_of(tmp_path, [{"step": 9}], epoch=epochs)
    weights = Weighed(9, {"blocks.1.mlp": 0.9955}, 1.0, 1, 10)
    *_, reading = of_experts(chart, weights)
    assert reading.ill == seen and ("began equal" in reading.unseen) == (not seen)
    *_, reading = of_experts(chart, dataclasses.replace(weights, alike={"blocks.1.mlp_adapter": 0.9955}))
    assert reading.ill


def test_why_a_run_broke_off(softmoe: Softmoe, tmp_path: Path) -> None:
    """Its folder says it, to softmoe doctor and softmoe status."""
    line = ("train", *TINY, "threads=1", "train.steps=9", "optim.lr=1e30", "optim.clip_norm=null")
    answer = softmoe(*line)
    assert answer.code == 1 and "lower optim.lr" in answer.err
    ((_, found),) = findings(softmoe, the_run(tmp_path)).items()
    (ended,) = (each for each in found if each["sign"] == "unfinished")
    assert ended["where"].startswith("failed: ") and "lower optim.lr" in ended["where"]
    (state,) = json.loads(softmoe("status", str(the_run(tmp_path)), "--json").out)
    assert state["state"] == "failed" and ended["where"] == f"failed: {state['reason']}"


def test_readme_has_every_sign() -> None:
    readme = (ROOT / "softmoe_cli/doctor/README.md").read_text()
    rows = [f"| {s.title} | {s.measured} | {s.side} {s.limit:.3g} | {s.source} |" for s in SIGNS.values()]
    assert "\n".join(["|---|---|---|---|", *rows, ""]) in readme


def test_words_that_cannot_work(softmoe: Softmoe, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    wrong = {
        (): "needs a run, a study or a sweep", ("nix",): "nix is no folder", ("empty",): "holds neither",
        ("empty", "--jsno"): "has no option --jsno; it has --json",
    }  # fmt: skip
    for words, told in wrong.items():
        answer = softmoe("doctor", *words)
        assert answer.code == 2 and told in answer.err, words


def test_cosine_of_experts() -> None:
    """Against all pairs, one after the other."""
    vectors = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    vectors[3] = 0

    def pairs() -> Iterator[float]:
        for i in range(5):
            for j in range(5):
                if i != j:
                    lengths = np.linalg.norm(vectors[i].astype(float)) * np.linalg.norm(vectors[j].astype(float))
                    yield float(vectors[i].astype(float) @ vectors[j].astype(float) / lengths) if lengths else 0.0

    assert mean_cosine(vectors) == pytest.approx(sum(pairs()) / 20, abs=1e-7)
