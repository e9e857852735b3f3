"""The papers' own tables, computed anew from their coefficients; and our laws on the Soft MoE paper's published rows.

papers/ has the figures: coefficients.csv with where each was read (in the paper, or in the reading notes of others),
and the tables of optima as printed. Two misprints are known. The joint law's Table 4 does not follow from the E_start
of its Table 3 (2.0732) but from 2.0832; and its equation 7, taken with the signs of Table 3, has the optimum inverted.
"""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar

from softmoe_cli.compare.tables import Table
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.scaling.fit import Points, fit_law, identified
from softmoe_cli.scaling.holdout import apart_by, dearest, last_value, neighbours, rms
from softmoe_cli.scaling.laws import granular_moe, joint_moe, joint_optimum, joint_reduced, saturating_compute

PAPERS = Path(__file__).resolve().parent / "papers"


def records(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def published_coefficients(law: str, variant: str) -> dict[str, float]:
    """A law's coefficients as a paper prints them.

    Raises:
        KeyError: there are none of this name.
    """
    rows = [row for row in records(PAPERS / "coefficients.csv") if (row["law"], row["variant"]) == (law, variant)]
    if not rows:
        raise KeyError(f"{law}, {variant}")
    return {row["symbol"]: float(row["value"]) for row in rows}


def joint_tables() -> list[Table]:
    """Tables 1 and 4 of the joint law: optima of 6 N D for six numbers of experts, and the law at each of them."""
    told = published_coefficients("joint_moe", "paper_table_3")
    rows = []
    for row in records(PAPERS / "joint_optimum.csv"):
        e, budget = int(row["experts"]), float(row["train_flop"])
        reduced = joint_reduced(e, **{key: value for key, value in told.items() if key != "c"})
        n, d = joint_optimum(budget, *reduced)
        loss = joint_moe(n, d, e, **told)
        rows.append([f"{budget:g}", str(e), *_beside(row["published_n_active"], n),
                     *_beside(row["published_tokens"], d), f"{loss:.4f}"])  # fmt: skip
    head = [
        "training FLOP",
        "experts",
        "N_act printed",
        "computed",
        "apart",
        "tokens printed",
        "computed",
        "apart",
        "loss",
    ]
    note = "N_act and tokens with the least loss, from the coefficients of Table 3"
    tables = [Table("Joint law, Table 1 (Ludziejewski et al. 2025, arXiv 2502.05172)", note, head, rows)]
    rows = []
    for variant, start in (("paper_table_3", "2.0732, as in Table 3"), ("table_4_consistent", "2.0832")):
        told = published_coefficients("joint_moe", variant)
        for row in records(PAPERS / "joint_reduced.csv"):
            reduced = joint_reduced(int(row["experts"]), **{key: value for key, value in told.items() if key != "c"})
            cells = [f"{computed:.5g} ({_apart(row[key], computed)})"
                     for key, computed in zip(("m", "mu", "n", "nu"), reduced, strict=True)]  # fmt: skip
            rows.append([start, row["experts"], *cells])
    note = (
        "computed, and how far from the printed figure: Table 4 does not follow from the E_start that Table 3 prints, "
        "but from 2.0832; one of them is a misprint"
    )
    head = ["E_start", "experts", "m", "mu", "n", "nu"]
    return [*tables, Table("Joint law, Table 4", note, head, rows), _memory_table()]


JOINT_EXPERTS = (1, 2, 4, 8, 16, 32)
MLP_SHARE = 2 / 3
"""Of a block's parameters, where the MLP is four times as wide."""
WEIGHT_BYTES = 2


def joint_memory_optimum(budget: float, memory_bytes: float) -> int:
    """Experts with the least loss for 6 N_act D training FLOPs, where the weights of all experts fit the memory.

    Every MLP has experts: N_total = N_act (1 + (E - 1) 2/3), at two bytes a weight.
    """
    told = published_coefficients("joint_moe", "paper_table_3")
    reduced = {key: value for key, value in told.items() if key != "c"}

    def loss(experts: int) -> float:
        most = memory_bytes / WEIGHT_BYTES / (1 + (experts - 1) * MLP_SHARE)
        n = min(most, joint_optimum(budget, *joint_reduced(experts, **reduced))[0])  # the loss is convex in log n
        return float(joint_moe(n, budget / 6 / n, experts, **told))

    return min(JOINT_EXPERTS, key=loss)


def _memory_table() -> Table:
    rows = []
    for row in records(PAPERS / "joint_memory.csv"):
        cells = []
        for gigabytes in (24, 80, 640):
            cells += [
                row[f"memory_{gigabytes}gb"],
                str(joint_memory_optimum(float(row["train_flop"]), gigabytes * 1e9)),
            ]
        rows.append([row["train_flop"], *cells])
    head = ["training FLOP", "24 GB printed", "computed", "80 GB printed", "computed", "640 GB printed", "computed"]
    note = (
        "experts with the least loss whose weights fit, of 1 to 32, by the coefficients of Table 3. How a weight is "
        "counted is not known here: two bytes, and two thirds of N_act in the MLPs, are taken"
    )
    return Table("Joint law, experts by memory", note, head, rows)


def _apart(printed: str, computed: float) -> str:
    return f"{100 * (computed / float(printed) - 1):+.2f}%"


def _beside(printed: str, computed: float) -> list[str]:
    return [printed, f"{computed:.4g}", _apart(printed, computed)]


ROUTING_FLOP, EXPERT_FLOP = 14.0, 6.0
"""FLOPs of a parameter and token in training by the granular law's paper: 6, and 14 for a router's, which its main text
does not print: its Table 2 implies 13.2 to 14.3."""


def granular_optimum(budget: float, told: dict[str, float], experts: int = 64) -> tuple[float, float, int, float]:
    """Active parameters, tokens, granularity and loss with the least loss for a budget of training FLOPs.

    A model has blocks of width d = 64 blocks, 12 d^2 active and (8 experts + 4) d^2 parameters in all; it takes
    (12 d^2 6 + d experts G 14) tokens blocks FLOPs.
    """

    def model(blocks: float, granularity: int) -> tuple[float, float, float]:
        d = 64 * blocks
        flop = (12 * d**2 * EXPERT_FLOP + d * experts * granularity * ROUTING_FLOP) * blocks
        tokens = budget / flop
        total = d**2 * (8 * experts + 4) * blocks
        return 12 * d**2 * blocks, tokens, float(granular_moe(total, tokens, granularity, **told))

    best = (math.inf, 0.0, 1)
    for granularity in (2**k for k in range(8)):
        at = minimize_scalar(
            lambda x, g=granularity: model(math.exp(x), g)[2], bounds=(0.0, 8.0), method="bounded",
            options={"xatol": 1e-10},
        )  # fmt: skip
        best = min(best, (float(at.fun), float(at.x), granularity))
    active, tokens, loss = model(math.exp(best[1]), best[2])
    return active, tokens, best[2], loss


def granular_tables() -> list[Table]:
    """Table 2 of the granular law: optima of FLOPs with the router's."""
    told, rows = published_coefficients("granular_moe", "moe"), []
    for row in records(PAPERS / "granular_optimum.csv"):
        active, tokens, granularity, loss = granular_optimum(float(row["train_flop"]), told)
        rows.append([row["train_flop"], *_beside(row["published_n_active"], active),
                     *_beside(row["published_tokens"], tokens), row["published_granularity"], str(granularity),
                     row["published_loss"], f"{loss:.3f}"])  # fmt: skip
    head = ["training FLOP", "N_act printed", "computed", "apart", "tokens printed", "computed", "apart",
            "G printed", "computed", "loss printed", "computed"]  # fmt: skip
    note = (
        "active parameters, tokens and granularity with the least loss, from the coefficients of Table 1, which are "
        "rounded: the loss comes out 0.011 to 0.024 lower. A router's FLOPs are taken as 14 for each parameter and "
        "token, which the paper's main text does not print"
    )
    return [Table("Granular law, Table 2 (Krajewski et al. 2024, arXiv 2402.07871)", note, head, rows)]


def saturating_tables() -> list[Table]:
    """The ends of the saturating laws of Zhai et al., against ViT-G/14's printed errors."""
    rows = []
    for variant, printed in (("imagenet_finetune_error", 9.55), ("imagenet_10shot_error", 15.14)):
        error = float(saturating_compute(1e4, **published_coefficients("saturating_compute", variant)))
        rows.append([variant.replace("_", " "), f"{printed:.2f}", f"{100 * error:.2f}"])
    note = "errors in percent at 10,000 TPUv3 core-days; the coefficients are from the reading notes of others"
    head = ["curve", "ViT-G/14, printed", "the law at 10,000 core-days"]
    return [Table("Saturating law (Zhai et al. 2021, arXiv 2106.04560)", note, head, rows)]


ROUTER_OF = {"Dense": "dense", "Soft": "soft", "EC": "experts_choice", "TC": "tokens_choice"}
JFT_CLASSES = 29_593
QUALITY_OF = {"jft_prec1_pct": 1 - 1 / JFT_CLASSES, "imagenet_10shot_pct": 1 - 1 / 1000}
"""The paper's qualities, and the error of guessing."""


def paper_points(kind: str, quality: str) -> Points:
    """The published rows of one routing: training exaFLOP and the error."""
    rows = [row for row in records(SOFT_MOE) if row["routing"] == kind]
    cost = np.array([float(row["train_exaflop"]) for row in rows])
    models = sorted({row["model"] for row in rows})
    return Points(
        {"C": cost}, 1 - np.array([float(row[quality]) for row in rows]) / 100, np.arange(len(rows)),
        np.zeros(len(rows), dtype=int), np.array([models.index(row["model"]) for row in rows]), cost, share=True,
        chance=QUALITY_OF[quality],
    )  # fmt: skip


SOFT_MOE = Path(__file__).resolve().parents[1] / "compare" / "paper" / "pareto.csv"
HALF = 0.5


def soft_moe_tables() -> list[Table]:
    """The 107 rows: a saturating law for each routing, fitted to the cheaper half, on the dearer half."""
    rows = []
    for quality in QUALITY_OF:
        off: dict[str, list[np.ndarray]] = {}
        for kind, name in ROUTER_OF.items():
            points = paper_points(kind, quality)
            held = dearest(points, HALF)
            told = {}
            (form,), _ = identified(points)
            told["law"] = apart_by(form, points, held, fit_law(form, points))[0]
            told["last value"], told["mean of 3 neighbours"] = last_value(points, held), neighbours(points, held)
            actual = 100 * points.taken(held).loss
            errors = {key: _in_points(actual, each) for key, each in told.items()}
            for key, each in errors.items():
                off.setdefault(key, []).append(each)
            rows.append([f"{quality}, {name}", str(int(sum(~held))), str(int(sum(held))),
                         *(f"{rms(each):.2f}" for each in errors.values())])  # fmt: skip
        pooled = [f"{rms(np.concatenate(each)):.2f}" for each in off.values()]
        rows.append([f"{quality}, all", "", "", *pooled])
    note = (
        "root mean square, in points of the error, on the dearer half of the rows of each routing, by the saturating "
        "law fitted to the cheaper half, and by predictors without a law"
    )
    head = ["quality, routing", "rows fitted", "rows held out", "law", "last value", "mean of 3 neighbours"]
    return [Table("Soft MoE, Table 9 (Puigcerver et al. 2023, arXiv 2308.00951)", note, head, rows)]


def _in_points(actual: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """Differences of logits as differences of an error in percent."""
    logit = np.log(actual / (100 - actual))
    return 100 / (1 + np.exp(-(logit + apart))) - actual


PUBLISHED_LAWS: dict[str, Callable[[], list[Table]]] = {
    "joint_moe": joint_tables,
    "granular_moe": granular_tables,
    "saturating_compute": saturating_tables,
    "soft_moe": soft_moe_tables,
}


def published_tables(names: str) -> list[Table]:
    """The tables that --published names; `all` names all.

    Raises:
        UsageError: there is no such name.
    """
    chosen = list(PUBLISHED_LAWS) if names == "all" else names.split(",")
    for name in chosen:
        if name not in PUBLISHED_LAWS:
            known = ", ".join(["all", *PUBLISHED_LAWS])
            raise UsageError(f"--published {name}: no such tables.{nearest(name, PUBLISHED_LAWS)} Names: {known}")
    return [table for name in chosen for table in PUBLISHED_LAWS[name]()]
