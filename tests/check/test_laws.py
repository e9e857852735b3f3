"""`softmoe check`: every shipped router passes every check; routers broken on purpose fail the right one."""

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from torch import Tensor

from softmoe_cli.check.command import CHECKS, run_check
from softmoe_cli.check.laws import Outcome, Subject
from softmoe_cli.errors import UsageError
from softmoe_cli.moe.routers.soft import SoftRouter, l2_normalize, soft_logits, soft_weights
from softmoe_cli.moe.routers.tokens_choice import TokensChoiceRouter
from softmoe_cli.moe.routers.zero_computation import ZeroComputationRouter, ZeroComputationRouting
from softmoe_cli.moe.routing import Carried, DenseRouting, SparseRouting, full_precision
from tests.processes import Started, forked
from tests.routers import ROOT, ROUTERS

OURS = ROOT / "softmoe_cli/check/vectors"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "two choices, groups of two images": ("tokens_choice", {"k": 2, "images_per_group": 2, "capacity_factor": 0.7}),
    "two choices, surest first": ("tokens_choice_bpr", {"k": 2, "images_per_group": 2, "capacity_factor": 0.7}),
    "sigmoid, bias, shared expert": (
        "tokens_choice",
        {"gate": "sigmoid", "bias_rate": 0.01, "shared_experts": 1, "load_weight": 0.0, "gshard_weight": 0.01},
    ),
    "dropless, two choices": ("tokens_choice_dropless", {"k": 2, "shared_experts": 2}),
    "dropless, losses over three images": ("tokens_choice_dropless", {"images_per_group": 3, "gshard_weight": 0.01}),
    "experts choose among two images": ("experts_choice", {"images_per_group": 2, "capacity_factor": 2.0}),
    "experts choose, gates add up to one": ("experts_choice", {"renormalise": True}),
    "soft with two slots": ("soft", {"slots_per_expert": 2}),
}
SUBJECTS = ROUTERS | {
    name: ROUTERS[router] | changes for name, (router, changes) in VARIANTS.items() if router in ROUTERS
}
COMPILES = "compiles in one graph"


@pytest.mark.parametrize(
    ("name", "check"),
    [
        (name, check)
        for name, check in itertools.product(SUBJECTS, CHECKS)
        if check != COMPILES and (name in ROUTERS or check != "official numbers")  # which have options of their own
    ],
)
def test_every_router_passes(name: str, check: str) -> None:
    outcome = run_check(check, Subject(SUBJECTS[name]))
    assert outcome.verdict != "fail", outcome.figure


@pytest.mark.long
@pytest.mark.thorough
def test_every_router_compiles(tmp_path: Path) -> None:
    """In a process of its own, where no shape checker is in the graph."""
    told = tmp_path / "told.txt"
    assert forked(told, compile_all, timeout=600) == 0, told.read_text()
    assert told.read_text().count("verdict='pass'") == len(ROUTERS), told.read_text()


def compile_all() -> None:
    for name in ROUTERS:
        print(name, run_check(COMPILES, Subject(ROUTERS[name])), sep=": ", flush=True)


def test_checks_apply_to_most() -> None:
    """What does not apply says why, and is the exception."""
    outcomes = [run_check(check, Subject(ROUTERS["tokens_choice_bpr"])) for check in CHECKS if check != COMPILES]
    assert [outcome.name for outcome in outcomes if outcome.verdict == "n/a"] == ["hands on to the next"]
    plus = run_check("hands on to the next", Subject(ROUTERS["zero_computation"]))
    assert plus.verdict == "pass", plus


def test_a_sigmoid_gate_is_not_said_to_be_a_dense_mlp() -> None:
    assert run_check(
        "one expert is the dense MLP", Subject(ROUTERS["tokens_choice"] | {"gate": "sigmoid"})
    ).verdict == ("n/a")


# --- broken on purpose ------------------------------------------------------------------------------------------------


class SoftmaxOverTheBatch(SoftRouter):
    """The dispatch softmax runs over images instead of tokens."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> DenseRouting:
        with full_precision(x):
            logits = soft_logits(x.to(self.phi.dtype), self.phi, self.scale)
            _, combine = soft_weights(logits, keep)
            return DenseRouting(logits.softmax(dim=0), combine, logits.new_zeros(()))


class _NormalisedTokens(DenseRouting):
    def dispatch(self, x: Tensor) -> Tensor:
        return super().dispatch(l2_normalize(x, dim=2))


class NormalisedTokensDispatched(SoftRouter):
    """The slots are mixtures of tokens of unit length."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> DenseRouting:
        routing = super().forward(x, keep)
        return _NormalisedTokens(routing.dispatch_weights, routing.combine_weights, routing.aux_loss)


class RenormalisedGates(TokensChoiceRouter):
    """The gates of a token's chosen experts are divided by their sum."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> SparseRouting:
        routing = super().forward(x, keep)
        total = routing.gate.new_zeros(x.shape[0] * x.shape[1] + 1)
        total = total.index_add(0, routing.token.flatten(), routing.gate.flatten())
        routing.gate = routing.gate / total[routing.token].clamp(min=1e-9)
        return routing


class NanForPadding(SoftRouter):
    """A token without any slot has the softmax of nothing."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> DenseRouting:
        routing = super().forward(x, keep)
        if keep is not None:
            routing.combine_weights = routing.combine_weights / keep[:, :, None, None]
        return routing


class OwnLossPerBatch(TokensChoiceRouter):
    """A loss that is a sum over the batch, not a mean."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> SparseRouting:
        routing = super().forward(x, keep)
        routing.aux_loss = routing.aux_loss * len(x)
        return routing


class FreeTraining(SoftRouter):
    """Says that its gradients cost nothing."""

    def train_flop(self, num_tokens: int) -> int:
        return self.flop(num_tokens)


class LooksAroundInTraining(SoftmaxOverTheBatch):
    """The same, but while it trains only."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> DenseRouting:
        return super().forward(x, keep) if self.training else SoftRouter.forward(self, x, keep)


class FirstComeOverTheBatch(SoftRouter):
    """Each image sees those before it."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> DenseRouting:
        routing = super().forward(x, keep)
        routing.combine_weights = routing.combine_weights.cumsum(dim=0) / (len(x) + 1)
        return routing


class UtilisationOfSeven(SoftRouter):
    """Says that it uses more than there is."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> DenseRouting:
        routing = super().forward(x, keep)
        return _Boasting(routing.dispatch_weights, routing.combine_weights, routing.aux_loss)


class _Boasting(DenseRouting):
    def statistics(self) -> dict[str, float]:
        return super().statistics() | {"utilisation": 7.0}


class RemembersLogits(ZeroComputationRouter):
    """Keeps what an earlier layer hands on, and takes the last batch's."""

    _kept: Carried | None = None

    def forward(self, x: Tensor, keep: Tensor | None = None, carried: Carried | None = None) -> ZeroComputationRouting:
        if carried is None or carried.logits is None:
            return super().forward(x, keep, carried)
        old, self._kept = self._kept, carried
        fits = old is not None and old.logits is not None and old.logits.shape == carried.logits.shape
        return super().forward(x, keep, old if fits else carried)


class DetachedLogits(ZeroComputationRouter):
    """What is handed on has lost its gradient."""

    def scores(self, tokens: Tensor, carried: Carried | None) -> Tensor:
        if carried is not None and carried.logits is not None:
            carried = Carried(carried.logits.detach())
        return super().scores(tokens, carried)


class UnpaidResidual(ZeroComputationRouter):
    """Leaves the residual's map out of its costs."""

    def flop(self, num_tokens: int) -> int:
        return super().flop(num_tokens) - (2 * num_tokens * sum(self.counts) ** 2 if self.residual is not None else 0)


class AddsTokens(TokensChoiceRouter):
    """Gives a token itself beside what its experts made, and does not say so."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> SparseRouting:
        routing = super().forward(x, keep)
        made = routing.combine
        routing.combine = lambda rows: made(rows) + 1  # type: ignore[method-assign]
        return routing


BROKEN: dict[type, tuple[str, set[str]]] = {
    NanForPadding: ("soft", {"padding is neutral"}),
    OwnLossPerBatch: ("tokens_choice", {"auxiliary losses", "official numbers"}),
    FreeTraining: ("soft", {"cost formula"}),
    SoftmaxOverTheBatch: ("soft", {"images do not see each other", "dispatch law", "official numbers"}),
    NormalisedTokensDispatched: ("soft", {"dispatch law", "official numbers"}),
    RenormalisedGates: ("tokens_choice", {"official numbers"}),
    LooksAroundInTraining: ("soft", {"images do not see each other", "official numbers"}),
    FirstComeOverTheBatch: ("soft", {"images do not see each other", "official numbers"}),
    UtilisationOfSeven: ("soft", {"statistics"}),
    RemembersLogits: ("zero_computation", {"hands on to the next"}),
    DetachedLogits: ("zero_computation", {"hands on to the next", "official numbers"}),
    UnpaidResidual: ("zero_computation", {"hands on to the next"}),
    AddsTokens: ("tokens_choice", {"combine law", "one expert is the dense MLP", "official numbers"}),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_routers_fail_for_the_right_reason(broken: type) -> None:
    router, reasons = BROKEN[broken]
    subject = Subject(ROUTERS[router] | {"_target_": f"{broken.__module__}.{broken.__name__}"})
    outcomes = {name: run_check(name, subject) for name in CHECKS if name != COMPILES}
    failed = {name for name, outcome in outcomes.items() if outcome.verdict == "fail"}
    allowed = reasons | {"batch order and size", "padding is neutral"}  # which leaks and mixtures touch too
    assert reasons <= failed <= allowed, outcomes


class InFloat32(SoftRouter):
    """Computes in float32 whatever comes, and has an option of its own."""

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        *,
        flavour: Literal["sweet", "sour"] | None,
        num_experts: int,
        slots_per_expert: int | None,
        capacity_factor: float | None,
        noise_std: float,
    ) -> None:
        super().__init__(
            dim, num_tokens, num_experts=num_experts, slots_per_expert=slots_per_expert,
            capacity_factor=capacity_factor, noise_std=noise_std,
        )  # fmt: skip

    def forward(self, x: Tensor, keep: Tensor | None = None) -> DenseRouting:
        with full_precision(x):
            logits = soft_logits(x.float(), self.phi.float(), self.scale.float())
            return DenseRouting(*soft_weights(logits, keep), logits.new_zeros(()))


def test_a_right_router_of_another_make_passes() -> None:
    options = ROUTERS["soft"] | {"_target_": f"{__name__}.InFloat32", "flavour": "sour"}
    outcomes = [run_check(name, Subject(options)) for name in CHECKS if name != COMPILES]
    assert [outcome for outcome in outcomes if outcome.verdict == "fail"] == []
    (official,) = [outcome for outcome in outcomes if outcome.name == "official numbers"]
    assert official.verdict == "n/a" and "flavour" in official.figure
    with pytest.raises(UsageError, match="flavour=bitter is of type str; it must be sweet or sour or null"):
        Subject(options | {"flavour": "bitter"})


class GroupsUnasked(SoftRouter):
    images_per_group = 4


def test_groups_must_be_an_option() -> None:
    with pytest.raises(UsageError, match="images_per_group=4 must come from an option of that name"):
        Subject(ROUTERS["soft"] | {"_target_": f"{__name__}.GroupsUnasked"})


def test_a_check_that_raises_is_a_failure() -> None:
    subject = Subject(ROUTERS["tokens_choice"] | {"_target_": f"{__name__}.Raises"})
    outcome = run_check("images do not see each other", subject)
    assert outcome == Outcome("images do not see each other", "fail", "RuntimeError: it broke")


class Raises(TokensChoiceRouter):
    def forward(self, x: Tensor, keep: Tensor | None = None) -> SparseRouting:
        raise RuntimeError("it broke")


# --- the command ------------------------------------------------------------------------------------------------------

OWN_ROUTER = """
import torch
from softmoe_cli.moe.routers.soft import SoftRouter

class Mine(SoftRouter):
    def forward(self, x, keep=None):
        routing = super().forward(x, keep)
        routing.combine_weights = {change}
        return routing
"""


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("routing.combine_weights", 0, "0 failed"),
        ("2 * routing.combine_weights", 1, "fail  combine law"),
    ],
)
def test_a_file_of_ones_own(change: str, code: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN_ROUTER.format(change=change))
    options = ("num_experts=4", "slots_per_expert=1", "capacity_factor=null", "noise_std=0.0")
    left, out = Started(tmp_path, ["check", "mine.py", *options], {}).wait()
    assert left == code, out
    assert words in out
    assert f"pass  {COMPILES}" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tokens_chioce",), "Did you mean 'tokens_choice'?"),
        ((), "takes one router"),
        (("soft", "hard"), "takes one router"),
        (("dense",), "has no router to check"),
        (("absent.py",), "absent.py does not exist"),
        (("soft", "slots=2"), "has no such option"),
        (("tokens_choice", "k=9"), "k=9 experts per token must be from 1 to num_experts=8"),
        (("soft", "num_experts=[1"), "cannot read 'num_experts=[1'"),
        (("none.py",), "must define one subclass"),
        (("syntax.py",), "syntax.py cannot be imported"),
        (("json.py",), "json.py: Python has another module json (/"),
        (("time.py",), "time.py: Python has another module time (built in), so that no _target_ could name"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_use(arguments: tuple[str, ...], words: str, softmoe: Any, tmp_path: Path) -> None:
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "syntax.py").write_text("def\n")
    for name in ("json", "time"):
        (tmp_path / f"{name}.py").write_text(OWN_ROUTER.format(change="routing.combine_weights"))
    answer = softmoe("check", *arguments)
    assert answer.code == 2, answer
    assert words in answer.err
    assert len(answer.err.strip().splitlines()) == 1


def test_vectors_folder_must_be_there(softmoe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTMOE_VECTORS", "nowhere")
    answer = softmoe("check", "soft", "num_experts=2")
    assert answer.code == 2 and "SOFTMOE_VECTORS=nowhere is not a folder" in answer.err


def test_vectors_folder_may_be_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTMOE_VECTORS", str(tmp_path))
    outcome = run_check("official numbers", Subject(ROUTERS["soft"]))
    assert outcome.verdict == "n/a" and str(tmp_path) in outcome.figure


def with_cases(folder: Path, *names: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with copies of our cases, which SOFTMOE_VECTORS names."""
    folder.mkdir()
    for name in names:
        for ending in ("json", "npz"):
            shutil.copy(OURS / f"{name}.{ending}", folder)
    monkeypatch.setenv("SOFTMOE_VECTORS", str(folder))
    return folder


@pytest.mark.parametrize(("wrong_by", "verdict"), [(0.0, "pass"), (2e-5, "fail")])
def test_large_figures_are_held_to_their_size(
    wrong_by: float, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of millions, of which a float32 figure may be off by tenths; but not by a share that counts."""
    folder = with_cases(tmp_path / "cases", "soft_eps", monkeypatch=monkeypatch)
    with np.load(folder / "soft_eps.npz") as file:
        arrays = dict(file)
    for key in ("loss_weight", "out/loss_f32", *(key for key in arrays if key.startswith("grad/"))):
        arrays[key] = 1000 * arrays[key]
    gradient = arrays["grad/x_seqs"] if "grad/x_seqs" in arrays else arrays["grad/x"]
    assert np.abs(gradient).max() > 1e6
    gradient.flat[np.abs(gradient).argmin()] += wrong_by * np.abs(gradient).max()
    np.savez(folder / "soft_eps.npz", **arrays)
    outcome = run_check("official numbers", Subject(ROUTERS["soft"]))
    assert outcome.verdict == verdict, outcome
    assert verdict == "pass" or "soft_eps: gradient of x is off by" in outcome.figure


@pytest.mark.parametrize(
    ("router", "names", "output"),
    [
        ("zero_computation", ("zero_computation_released", "zero_computation_paper_layer"), "y"),
        ("mumoe_tr", ("mumoe_trr_block_ln",), "y"),
    ],
)
def test_a_further_folder_of_cases_is_tried(
    router: str, names: tuple[str, ...], output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of layers from PyTorch too: under other names, and with a number that is wrong."""
    folder = with_cases(tmp_path / "cases", *names, monkeypatch=monkeypatch)
    for ending in ("json", "npz"):
        (folder / f"{names[0]}.{ending}").rename(folder / f"another.{ending}")
    outcome = run_check("official numbers", Subject(ROUTERS[router]))
    assert outcome.verdict == "pass" and f"{len(names)} cases" in outcome.figure, outcome
    with np.load(folder / "another.npz") as file:
        arrays = dict(file)
    wrong = [key for key in arrays if key.startswith("out/") and f"/{output}" in key]
    assert wrong
    for key in wrong:
        arrays[key] = arrays[key] + 1e-2
    np.savez(folder / "another.npz", **arrays)
    outcome = run_check("official numbers", Subject(ROUTERS[router]))
    assert outcome.verdict == "fail" and "another: " in outcome.figure, outcome


def test_cases_are_found_by_their_kind(softmoe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their names are; those of other kinds are told."""
    folder = with_cases(tmp_path / "cases", "soft_slots4", "tc_k1_tiny_vanilla", monkeypatch=monkeypatch)
    other = json.loads((folder / "tc_k1_tiny_vanilla.json").read_text()) | {"kind": "soft_unheard_of"}
    (folder / "soft_other.json").write_text(json.dumps(other))
    shutil.copy(folder / "tc_k1_tiny_vanilla.npz", folder / "soft_other.npz")
    for ending in ("json", "npz"):
        (folder / f"soft_slots4.{ending}").rename(folder / f"any.{ending}")
    outcome = run_check("official numbers", Subject(ROUTERS["soft"]))
    assert outcome.verdict == "pass", outcome
    assert "1 cases" in outcome.figure and "not for it: 1 soft_unheard_of, 1 tc_layer" in outcome.figure
    out = tmp_path / "out.txt"
    assert forked(out, tried_with, folder) == 0, out.read_text()
    told = out.read_text()
    assert f"official cases of {folder} compared: 1 soft_layer, 1 tc_layer" in told
    assert f"official cases of {folder} passed over, because nothing handles them: 1 soft_unheard_of" in told


def tried_with(folder: Path) -> None:
    """The vector tests, on the cases of a folder."""
    os.environ["SOFTMOE_VECTORS"] = str(folder)
    os.chdir(ROOT)
    # Without the settings of this project, which want to be there before anything is imported.
    options = ["-q", "-c", os.devnull, f"--rootdir={ROOT}", f"--basetemp={folder.parent / 'base'}"]
    options += ["-p", "no:cacheprovider", "--assert=plain"]
    os._exit(pytest.main([*options, "tests/check/test_official.py"]))


ARRAYS = (OURS / "capacity_table.npz").read_bytes()


@pytest.mark.parametrize(
    ("arrays", "description", "words"),
    [
        (ARRAYS, None, "a.npz is no official case, because a.json beside it does not say a kind (FileNotFoundError"),
        (ARRAYS, b"[1]", "does not say a kind (TypeError"),
        (ARRAYS, b"\xff", "does not say a kind (UnicodeDecodeError"),
        (ARRAYS, b'{"kind": 3}', "does not say a kind (kind=3)"),
        (b"", b'{"kind": "soft_layer"}', "a.npz is broken or no file of arrays; fetch it again"),
        (ARRAYS[:-30], b'{"kind": "soft_layer"}', "a.npz is broken or no file of arrays; fetch it again"),
    ],
    ids=["no description", "a list", "no text", "kind is a number", "empty arrays", "cut arrays"],
)
def test_what_is_no_case(
    arrays: bytes, description: bytes | None, words: str,
    softmoe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "a.npz").write_bytes(arrays)
    if description is not None:
        (tmp_path / "a.json").write_bytes(description)
    monkeypatch.setenv("SOFTMOE_VECTORS", str(tmp_path))
    answer = softmoe("check", "soft", "num_experts=2")
    assert (answer.code, answer.out) == (2, "")
    assert words in answer.err and len(answer.err.strip().splitlines()) == 1
