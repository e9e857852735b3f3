"""`softmoe scaling` on runs of a planted law: what it prints, decides, refuses and writes."""

import csv
import dataclasses
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softmoe_cli.compare.runs import read_runs
from softmoe_cli.cost.flop import account
from softmoe_cli.errors import UsageError
from softmoe_cli.scaling.answer import (
    decision,
    held_against,
    law_world,
    may_decide,
    predicted,
    prices,
    proposal,
    sizes_at,
)
from softmoe_cli.scaling.command import SCALING_OPTIONS, scaling_options
from softmoe_cli.scaling.costs import matched
from softmoe_cli.scaling.decide import Aim
from softmoe_cli.scaling.fit import fit_law, seed_scatter
from softmoe_cli.scaling.forms import FORMS, held_at
from softmoe_cli.scaling.laws import chance_held, granular_moe, inference_optimal
from softmoe_cli.scaling.points import Family, dense_parameters, families, sizes_of
from softmoe_cli.scaling.report import Report, law_table
from tests.conftest import TINY, Softmoe
from tests.oracles import compose
from tests.processes import Started
from tests.scaling.made_up import PLANTED
from tests.scaling.study import TRUE, planted, planted_study
from tests.synthetic import row, write
from tests.wandb_file import recorded

DENSE: dict[str, Any] = {"experts": (1,), "images": (48_000, 96_000, 192_000), "seeds": 2}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure, which takes longer than the laws."""
    monkeypatch.setattr("softmoe_cli.scaling.bands.law_figures", lambda _: {})


def family(folder: Path, **changes: Any) -> Family:
    runs, _ = read_runs([planted_study(folder, **changes)])
    (found,) = families(runs, "validation_loss")
    return found


def test_sizes_are_those_of_the_ledger() -> None:
    """N is what the dense model's attention and MLPs hold; S what the slots leave idle."""
    for backbone in ("vit_pico2", "vit_nano2"):
        model = compose(f"model/backbone={backbone}", "model/router=dense").model
        told = {f"model.backbone.{key}": value for key, value in vars(model.backbone).items()}
        parts = {part.name: part.params for part in account(model, 10).parts}
        assert dense_parameters(told) == parts["attn"] + parts["mlp"]
    assert dense_parameters({"model.backbone.width": None}) is None
    soft = sizes_of(planted(32, 16, 96_000, 0))
    assert (soft["E"], soft["D"], soft["G"], soft["U"]) == (16, 96_000, 1, 4_000_000)
    assert soft["S"] == 1 - 1 / 16 and sizes_of(planted(32, 1, 96_000, 0))["S"] == 0


def test_families_share_the_dense_runs(tmp_path: Path) -> None:
    folder = planted_study(tmp_path, widths=(16,), images=(48_000,), seeds=2)
    for seed in range(2):
        write(folder, row(router="tokens_choice", seed=seed))
    runs, _ = read_runs([folder])
    found = {each.name: each for each in families(runs, "validation_loss")}
    assert {name: len(each.runs) for name, each in found.items()} == {"soft": 6, "tokens_choice": 4}
    assert len(np.unique(found["soft"].points.config)) == 3
    errors = {each.name: each for each in families(runs, "top1_pct")}["soft"].points
    assert errors.share and errors.images == 359 and errors.chance == pytest.approx(0.9)
    assert errors.loss == pytest.approx(1 - np.array([run.row["top1_pct"] for run in found["soft"].runs]) / 100)


def test_what_varies_beside_the_sizes_is_said(tmp_path: Path) -> None:
    planted_study(tmp_path, widths=(16,), images=(48_000,), seeds=1)
    write(tmp_path, planted(16, 1, 48_000, 0, optim__lr=0.01) | {"signature": "other", "name": "other"})
    runs, _ = read_runs([tmp_path])
    (found,) = families(runs, "validation_loss")
    assert found.notes == [
        "runs differ in optim.lr (0.003, 0.01) too, which the laws take as chance; --where keeps one"
    ]


@pytest.mark.thorough
def test_the_answer_is_that_of_the_planted_law(softmoe: Softmoe, tmp_path: Path) -> None:
    """The best experts, size, images and loss within the noise; the files; a run held against the law; exit 0."""
    folder = planted_study(tmp_path / "study", images=(48_000, 96_000, 192_000), noise=0.002)
    held = write(tmp_path, planted(64, 4, 300_000, 7, noise=0.0))
    arguments = (
        "--law",
        "inference_optimal",
        "--train-pflop",
        "0.001",
        "--draws",
        "12",
        "--next",
        "--check",
        str(held),
    )
    answer = softmoe("scaling", str(folder), *arguments)
    assert answer.code == 0, answer.err
    told = json.loads((folder / "scaling/scaling.json").read_text())["families"][0]
    choices = {each["experts"]: each for each in told["rows"] if each["kind"] == "choice"}
    assert set(choices) == {1.0, 4.0, 16.0} and choices[16.0]["wins"] == 1.0
    for e, each in choices.items():
        want = float(inference_optimal(each["size"], each["images"], e, **TRUE))
        assert each["loss"] == pytest.approx(want, rel=0.01)
        assert each["training"] == pytest.approx(0.001) and each["loss_low"] < each["loss_high"]
    sizes = np.geomspace(1e4, 1e6, 4000)
    gflop = 32e-9 * sizes * (1 + 0.02 * np.log(16))
    losses = inference_optimal(sizes, 0.001 / (3e-6 * gflop), 16, **TRUE)
    assert losses.min() == pytest.approx(choices[16.0]["loss"], rel=0.01)
    assert "inside the interval" in told["checked"] and "soft: 16 experts, N " in answer.out
    assert shlex.split(told["command"])[:3] == ["softmoe", "train", "-cp"] and told["next"].startswith("softmoe train")
    files = {path.name for path in (folder / "scaling").iterdir()}
    assert files == {
        "index.html",
        "table.md",
        "table.tex",
        "table.csv",
        "scaling.json",
        "laws.svg",
        "laws.pdf",
        "laws.png",
        "iso_loss.svg",
        "iso_loss.pdf",
        "iso_loss.png",
    }
    rows = list(csv.DictReader((folder / "scaling/table.csv").read_text().splitlines()))
    assert float(next(each for each in rows if each["experts"] == "16.0")["loss"]) == choices[16.0]["loss"]
    page = (folder / "scaling/index.html").read_text()
    assert 'content="softmoe scaling"' in page and "{{" not in page and "data:image/svg+xml" in page
    assert softmoe("scaling", str(folder), *arguments).code == 0, "the folder is its own and is made anew"


def test_laws_without_a_decision(softmoe: Softmoe, tmp_path: Path) -> None:
    folder = planted_study(tmp_path / "dense", **DENSE)
    answer = softmoe("scaling", str(folder), "--law", "chinchilla,saturating_compute", "--draws", "4", "--out", "laws")
    assert answer.code == 0, answer.err
    assert re.search(r"dense, validation_loss: 24 runs of 12 configurations, 4 sizes, dense only, 48k", answer.out)
    assert re.search(r"^chinchilla +5 +0\.0\d+ ", answer.out, re.MULTILINE) and "mean of 3 neighbours" in answer.out
    assert (
        (tmp_path / "laws/laws.svg").is_file()
        and (tmp_path / "laws/iso_loss.svg").is_file()
        and "no decision" not in answer.out
    )


@pytest.mark.usefixtures("undrawn")
def test_no_law_beats_what_needs_none(softmoe: Softmoe, tmp_path: Path) -> None:
    """Losses by chance: exit 1, and no decision, with the reason. Without repeated seeds too all laws are fitted with
    one Huber delta: Akaike's criteria of fits with different ones cannot be compared."""
    for width in (16, 32, 64, 128):
        for images in DENSE["images"]:
            made = planted(width, 1, images, 0)
            loss = 1 + 0.1 * float(np.random.default_rng([width, images]).random())
            write(tmp_path / "chance", made | {"validation_loss": loss})
    told = ("scaling", str(tmp_path / "chance"), "--draws", "3", "--law")
    answer = softmoe(*told, "chinchilla", "--train-pflop", "1")
    assert answer.code == 1
    assert "no decision: the best law, chinchilla, is not good enough: no better than the " in answer.out
    softmoe(*told, "chinchilla,saturating_compute")
    laws = json.loads((tmp_path / "chance/scaling/scaling.json").read_text())["families"][0]
    deltas = [each["delta"] for each in laws["rows"] if each["kind"] == "law"]
    assert len(deltas) == 2 and len(set(deltas)) == 1


@pytest.mark.thorough
@pytest.mark.usefixtures("undrawn")
def test_refused_far_from_the_runs(softmoe: Softmoe, tmp_path: Path) -> None:
    folder = planted_study(tmp_path / "dense", **DENSE)
    far = ("scaling", str(folder), "--law", "chinchilla", "--draws", "3", "--train-pflop", "100")
    answer = softmoe(*far)
    assert re.search(r"dense: refused: a factor of \S+ outside the runs; --extrapolate asks for it", answer.out)
    asked = softmoe(*far, "--extrapolate")
    assert "extrapolated by a factor of" in asked.out and "To test it" in asked.out
    repeated = planted_study(tmp_path / "repeated", **DENSE)
    for run in repeated.iterdir():
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(
            json.dumps(result | {"train_images": 48_000, "epochs": result["images"] / 48_000})
        )
    again = softmoe("scaling", str(repeated), "--law", "chinchilla", "--draws", "3", "--train-pflop", "0.002")
    assert "best, all images that are fresh to the law" in again.out and " on 192k [" in again.out
    assert "images come again, up to 4 times" in again.out


@pytest.mark.thorough
@pytest.mark.usefixtures("undrawn")
def test_measured_costs(softmoe: Softmoe, tmp_path: Path) -> None:
    """The clock's rows are found by parameters and FLOPs; a latency limits the size; others' rows are counted."""
    folder = planted_study(tmp_path / "dense", **DENSE)
    measured = []
    for width in (16, 32, 64, 128):
        made = planted(width, 1, 48_000, 0)
        size = dense_parameters(made)
        assert size is not None
        model = {key: made[key] for key in ("params_m", "forward_gflop")}
        model["hardware"] = f"{made['hardware']}, torch 2, fp32, eager"
        measured.append(model | {"latency_ms": size / 1e4, "batch_size": 2})
    measured.append(measured[0] | {"params_m": 77.0})
    (tmp_path / "costs.json").write_text(json.dumps(measured))
    law = ("scaling", str(folder), "--law", "chinchilla", "--draws", "3")
    asked = (*law, "--train-pflop", "0.002", "--costs", "costs.json")
    answer = softmoe(*asked, "--latency-ms", "3")
    assert answer.code == 0, answer.err
    told = json.loads((folder / "scaling/scaling.json").read_text())["families"][0]
    (choice,) = (each for each in told["rows"] if each["kind"] == "choice")
    assert choice["size"] == pytest.approx(3e4, rel=1e-6) and choice["serving"] == pytest.approx(0.0015, rel=1e-6)
    assert "1 of its rows are of other models" in (folder / "scaling/table.md").read_text()
    seconds = softmoe(*law, "--loss", "1.4", "--served", "1e6", "--costs", "costs.json")
    assert seconds.code == 0 and "cheapest to train and serve: loss at most 1.4, 1M images served" in seconds.out
    assert softmoe(*asked, "--batch", "3").err.startswith(
        "softmoe: --batch 3: --costs costs.json has batches of 2 only"
    )


@pytest.mark.thorough
def test_proposals_compose(softmoe: Softmoe, tmp_path: Path) -> None:
    """The run that would test a decision: width, experts and images of a run's own configuration are changed, and the
    command line works as typed."""
    assert softmoe("train", *TINY, "train.steps=2", "train.batch_size=8", "model.backbone.qk_norm=scale").code == 0
    (run,) = (tmp_path / "outputs/default").iterdir()
    runs, _ = read_runs([run])
    (found,) = families(runs, "validation_loss")
    size = float(found.points.sizes["N"][0])
    made = proposal(found, "N", 4 * size, 803.0, 2.0)
    assert made.images == 800 and made.size == pytest.approx(4 * size, rel=0.2) and made.experts == 2
    answer = softmoe(*shlex.split(made.command)[1:], "train.images=8", "tracking=off")
    assert answer.code == 0, answer.err
    new = next(path for path in (tmp_path / "outputs/default").iterdir() if path != run)
    result = json.loads((new / "result.json").read_text())
    assert dense_parameters(result) == pytest.approx(made.size) and result["num_experts"] == 2 and result["images"] == 8


def test_worlds_of_laws(tmp_path: Path) -> None:
    """Sparsity follows the experts; the law of a decision must know what it decides; noisy seeds decide nothing."""
    found = family(tmp_path / "a", widths=(16, 32, 64), images=(48_000, 96_000, 192_000), seeds=1)
    of = sizes_at(found, 1e5, 2e5, 16.0)
    assert of["S"] == 1 - 1 / 16 and of["N"] == of["N_total"] == 1e5 and sizes_at(found, 1e5, 2e5, 1.0)["S"] == 0.0
    plain = fit_law(FORMS["chinchilla"], found.points, starts=2)
    assert may_decide(plain, found) == "chinchilla knows no experts, of which the runs have several numbers"
    compute = fit_law(FORMS["saturating_compute"], found.points, starts=2)
    assert may_decide(compute, found) == "saturating_compute does not know both size and images"
    cost = prices(found, "N", None, "", seconds=False)
    world = law_world(found, plain, cost, 1.0)
    first = found.runs[0].row
    size = dense_parameters(first)
    assert size is not None and world.memory is not None
    assert world.train(size, 1.0) * first["images"] == pytest.approx(first["train_pflop"])
    assert world.serve(size, 1.0) == pytest.approx(first["forward_gflop"] / 1e6)
    assert world.memory(size, 1.0) == pytest.approx(4e6 * first["params_m"] / 2**20)
    noisy = family(tmp_path / "b", **DENSE | {"seeds": 3}, noise=1.0)
    law = fit_law(FORMS["chinchilla"], noisy.points, starts=1)
    assert "more seeds or more validation images are needed" in may_decide(law, noisy)


def test_slots_of_a_world_are_those_of_runs_with_experts(tmp_path: Path) -> None:
    """Two slots per token with 4 experts, and with 16 but for rounding; dense runs, which are most, have no say."""
    for width in (16, 32, 64):
        for images in (48_000, 96_000, 192_000):
            write(tmp_path, planted(width, 1, images, 0))
        for e, slots in ((4, 2.0), (16, 2.6)):
            write(tmp_path, planted(width, e, 48_000, 0) | {"slots_per_token": slots})
    runs, _ = read_runs([tmp_path])
    (found,) = families(runs, "validation_loss")
    fit = fit_law(FORMS["sparsity"], found.points, starts=1)
    world = law_world(found, fit, prices(found, "N_total", None, "", seconds=False), None)
    for experts, sparsity in ((1.0, 0.0), (4.0, 1 - 2 / 4), (16.0, 1 - 2.6 / 16), (64.0, 1 - 2.3 / 64)):
        assert sizes_at(found, 1e5, 2e5, experts)["S"] == pytest.approx(sparsity)
        want = fit.predict({"N_total": 1e5, "D": 2e5, "S": sparsity})
        assert world.loss(1e5, 2e5, experts) == pytest.approx(want, rel=1e-12)


def test_a_proposal_of_other_experts_has_their_parameters(tmp_path: Path) -> None:
    """All parameters, where 8 experts were not run: a third of N in experts, within what lies between 4 and 16."""
    found = family(tmp_path, widths=(64, 128, 256), images=(48_000,), seeds=1)
    for size in ("N_total", "N"):
        made = proposal(found, size, 2e6, 48_000.0, 8.0)
        assert "model.router.num_experts=8" in made.command
        width = int(re.findall(r"backbone\.width=(\d+)", made.command)[0])
        changed = {"model.backbone.width": width, "model.backbone.mlp_width": 4 * width}
        own = dense_parameters(planted(16, 1, 48_000, 0) | changed)
        assert own is not None
        really = own * (1 + 7 / 3) if size == "N_total" else own
        assert made.size == pytest.approx(really, rel=0.05 if size == "N_total" else 1e-9)
        assert made.size == pytest.approx(2e6, rel=0.1)
    dense = proposal(found, "N", 2e5, 48_000.0, 1.0)
    assert "model.router" not in dense.command
    for run in found.runs:
        run.row["model.expert_width"] = run.row["model.backbone.mlp_width"] // 2
        if run.row["num_experts"] == 4:
            run.row["model.router.slots_per_expert"] = 4
    made = proposal(found, "N", 4e5, 48_000.0, 8.0)
    width = int(re.findall(r"backbone\.width=(\d+)", made.command)[0])
    assert f"model.expert_width={2 * width} model.router.num_experts=8 model.router.slots_per_expert=2 " in made.command
    of_16 = np.flatnonzero(found.points.sizes["E"] == 16)
    only = dataclasses.replace(found, runs=[found.runs[i] for i in of_16], points=found.points.taken(of_16))
    assert "model.router._target_=null" in proposal(only, "N", 8e5, 48_000.0, 1.0).command
    same = proposal(found, "N_total", float(found.points.sizes["N_total"].max()), 48_000.0, 16.0)
    assert "width" not in same.command and same.size == found.points.sizes["N_total"].max()


def test_an_accuracy_is_held_against_the_law_as_its_error(tmp_path: Path) -> None:
    found = family(tmp_path, **DENSE | {"seeds": 3})
    compute, random = found.points.sizes["C"], np.random.default_rng(0)
    errors = chance_held(compute, a=0.02, b=0.3, c=0.02, chance=0.9)
    logits = np.log(errors / (1 - errors)) + 0.05 * random.standard_normal(len(errors))
    for run, logit in zip(found.runs, logits, strict=True):
        run.row["validation_top1_pct"] = 100 / (1 + math.exp(logit))
    (of_errors,) = families(found.runs, "validation_top1_pct")
    fit = fit_law(held_at(of_errors.points.chance), of_errors.points, starts=4)
    draws = fit.free[None].repeat(200, axis=0)
    last = found.runs[-1]
    told = held_against(of_errors, fit, draws, last, "validation_top1_pct")
    middle, low, high = predicted(of_errors, fit, draws, {"C": last.row["train_pflop"]})
    truth = float(chance_held(last.row["train_pflop"], a=0.02, b=0.3, c=0.02, chance=0.9))
    assert middle == pytest.approx(truth, rel=0.1)
    odds = [math.log(each / (1 - each)) for each in (low, middle, high)]
    assert np.diff(odds) == pytest.approx([1.96 * seed_scatter(of_errors.points)] * 2, rel=0.1)
    error = 1 - last.row["validation_top1_pct"] / 100
    assert f"error by validation_top1_pct {error:.4f}, predicted {middle:.4f} [{low:.4f}, {high:.4f}] by sat" in told
    assert told.endswith(f"the interval, {100 * (error / middle - 1):+.1f}%")
    notes = [law_table(Report(each, "", [], {}, {}, [])).note for each in (found, of_errors)]
    assert "1% of the loss;" in notes[0] and "1% of the odds of an error;" in notes[1]


@pytest.mark.thorough
@pytest.mark.usefixtures("undrawn")
def test_a_law_without_experts_decides_for_those_that_the_runs_have(softmoe: Softmoe, tmp_path: Path) -> None:
    """All runs have 16 experts: the answer is of 16, inside of the runs, and not of a dense model."""
    folder = planted_study(tmp_path / "soft", **DENSE | {"experts": (16,)})
    asked = ("--law", "chinchilla", "--train-pflop", "0.0005", "--draws", "3")
    answer = softmoe("scaling", str(folder), *asked)
    assert answer.code == 0, answer.err
    told = json.loads((folder / "scaling/scaling.json").read_text())["families"][0]
    (choice,) = (each for each in told["rows"] if each["kind"] == "choice")
    assert choice["experts"] == 16 and choice["outside"] < 2
    assert "soft: 16 experts, N " in answer.out and "dense" not in answer.out


@pytest.mark.thorough
def test_a_law_of_granularity_is_shown_and_decides_nothing(softmoe: Softmoe, tmp_path: Path) -> None:
    for width in (16, 32, 64):
        for images in (48_000, 96_000, 192_000):
            for g in (1, 2, 4):
                made = planted(width, 16, images, 0)
                loss = float(granular_moe(1e6 * made["params_m"], images, g, **PLANTED["granular_moe"]))
                made |= {"validation_loss": loss, "model.expert_width": 4 * width // g}
                write(tmp_path / "study", made | {key: f"{made[key]}{g}" for key in ("name", "signature")})
    asked = ("--law", "granular_moe", "--train-pflop", "0.001", "--draws", "3")
    answer = softmoe("scaling", str(tmp_path / "study"), *asked)
    assert answer.code == 0, answer.err
    assert "granular_moe is a law of granularity, which no question asks for" in answer.out


def test_answers_near_and_far(tmp_path: Path) -> None:
    """Ten times the runs are the end, unless more is asked for; a measured row is found by its model."""
    found = family(tmp_path, **DENSE)
    fit = fit_law(FORMS["chinchilla"], found.points, starts=2)
    cost = prices(found, "N", None, "", seconds=False)
    free = fit.free[None].repeat(2, axis=0)
    near, refused, far = (
        decision(found, fit, free, Aim(train=budget), cost, [1.0], None, far=each)
        for budget, each in ((0.0005, False), (100.0, False), (100.0, True))
    )
    assert near.best is not None and near.shares == {1.0: 1.0} and near.factors[1.0] < 10
    assert refused.best is None and refused.choices[0].reason.startswith("refused: a factor of ")
    assert far.best is not None and far.factors[1.0] > 10
    rows = [{"params_m": run.row["params_m"], "forward_gflop": run.row["forward_gflop"]} for run in found.runs[:7]]
    pairs, strangers = matched([*rows, {"params_m": 1.0, "forward_gflop": 1.0}], [run.row for run in found.runs])
    assert strangers == 1 and len(pairs) == 12 and all(found.runs[i].row["params_m"] == r["params_m"] for i, r in pairs)


def test_published(softmoe: Softmoe, tmp_path: Path) -> None:
    answer = softmoe("scaling", "--published", "joint_moe,granular_moe", "--out", "papers")
    assert answer.code == 0 and "Joint law, Table 1" in answer.out and "2.0832" in answer.out
    assert {path.name for path in (tmp_path / "papers").iterdir()} == {"index.html", "table.md", "table.tex"}


@pytest.mark.thorough
def test_wandb_gets_the_laws(tmp_path: Path) -> None:
    """In a process of its own: what W&B leaves in the environment would reach the processes of other tests."""
    planted_study(tmp_path / "runs", **DENSE)
    words = ["scaling", "runs", "--law", "chinchilla", "--draws", "2", "--wandb", "--project", "mine"]
    code, out = Started(tmp_path, words, {}).wait()
    assert code == 0, out
    assert "W&B: run scaling of validation_loss of group planted, offline" in out
    file, kept = recorded(tmp_path / "runs" / "scaling")
    run = next(each.run for each in kept if each.WhichOneof("record_type") == "run")
    assert (run.run_group, run.job_type, run.project) == ("planted", "scaling", "mine")
    artifact = next(each.artifact for each in kept if each.artifact.type == "comparison")
    assert {each.path for each in artifact.manifest.contents} >= {"table.csv", "scaling.json", "index.html", "laws.pdf"}
    media = {path.name.split("_0_")[0] for path in (file.parent / "files" / "media").rglob("*") if path.is_file()}
    drawn = {each.stem for each in (tmp_path / "runs" / "scaling").glob("*.svg")}
    assert "laws" in drawn and media == drawn | {"table", "page"}


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_another_router_is_not_held_against_the_law(softmoe: Softmoe, tmp_path: Path) -> None:
    folder = planted_study(tmp_path / "dense", **DENSE)
    other = write(tmp_path, row(router="tokens_choice"))
    answer = softmoe("scaling", str(folder), "--law", "chinchilla", "--draws", "2", "--check", str(other))
    assert answer.code == 2 and "its router is tokens_choice, and the laws are of dense" in answer.err


WRONG = {
    "--quality ece_pct": "--quality ece_pct: no law is fitted to that.",
    "--law chinchila": "--law chinchila: no such law. Did you mean 'chinchilla'? Laws: ",
    "--train-pflop 1 --device-s 1": "--train-pflop and --device-s are two budgets; give one",
    "--train-pflop 0": "--train-pflop 0.0: must be above 0",
    "--served 1e6": "--served has no effect without one of --train-pflop, ",
    "--latency-ms 4 --train-pflop 1": "--latency-ms needs --costs",
    "--devices 2 --train-pflop 1": "--devices needs --device-mib",
    "--total-pflop 1": "--total-pflop needs --served",
    "--loss 1": "--loss needs a budget",
    "--loss 1 --total-pflop 1 --served 3": "--loss with one total budget asks for nothing to be made least",
    "--experts a --train-pflop 1": "a: write numbers of experts, such as 4,8,16",
    "--costs nowhere.json --train-pflop 0.02": "--costs nowhere.json: there is no such file",
    "--check nowhere": "nowhere is no folder",
    "--published joint_moe": "outputs has no effect with --published",
    "--lw x": "--lw: there is no such option. Did you mean '--law'?",
    "--where router=sofd": "--where router=sofd: no run has that. router is dense",
    "--law joint_moe": "dense: the runs identify no law: joint_moe needs 3 values of E, and the runs have 1 value",
}


@pytest.mark.usefixtures("undrawn")
def test_wrong_options(softmoe: Softmoe, tmp_path: Path) -> None:
    planted_study(tmp_path / "outputs", widths=(16, 32, 64), experts=(1,), images=(48_000, 96_000, 192_000), seeds=1)
    for words, want in WRONG.items():
        answer = softmoe(
            "scaling",
            "outputs",
            *words.split(),
            *(["--law", "chinchilla", "--draws", "2"] if "nowhere.json" in words else []),
        )
        assert answer.code == 2 and want in answer.err, f"{words}: {answer.err}"
    assert "scaling needs the folder of a study" in softmoe("scaling").err
    with pytest.raises(UsageError, match="no effect without --wandb"):
        scaling_options(["outputs", "--project", "p"])


def test_every_option_is_in_the_help(softmoe: Softmoe) -> None:
    told = softmoe("scaling", "--help").out
    assert all(f"--{name}" in told for name in SCALING_OPTIONS) and max(map(len, told.splitlines())) <= 80
