"""A router from its options, or a sentence."""

from typing import Any

import pytest

from softmoe_cli.errors import UsageError
from softmoe_cli.model.router import make_router
from softmoe_cli.moe.routers.soft import SoftRouter
from tests.routers import ROUTERS

SOFT: dict[str, Any] = {
    "_target_": "softmoe_cli.moe.routers.soft.SoftRouter",
    "num_experts": 4,
    "slots_per_expert": 1,
    "capacity_factor": None,
    "noise_std": 0.0,
}


def test_make_router_passes_its_options_on() -> None:
    router = make_router(SOFT | {"slots_per_expert": None, "capacity_factor": 2.0, "noise_std": 1.0}, 6, 16)
    assert isinstance(router, SoftRouter)
    assert router.phi.shape == (6, 4, 8)
    assert router.noise_std == 1


def test_whole_numbers_become_floats() -> None:
    router = make_router(SOFT | {"slots_per_expert": None, "capacity_factor": 2, "noise_std": 1}, 6, 16)
    assert router.slots_per_expert == 8
    assert isinstance(router, SoftRouter) and type(router.noise_std) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_expert": 4},
            r"router\.num_expert: SoftRouter has no such option.*'num_experts'.*It has num_experts, slots",
        ),
        ({"dim": 4}, r"router\.dim: SoftRouter has no such option"),
        ({"num_tokens": 4}, r"router\.num_tokens: SoftRouter has no such option"),
        ({"num_experts": "four"}, r"router\.num_experts=four is of type str; it must be int"),
        ({"num_experts": 4.0}, r"router\.num_experts=4.0 is of type float; it must be int"),
        ({"num_experts": True}, r"router\.num_experts=True is of type bool; it must be int"),
        ({"num_experts": None}, r"router\.num_experts=None is of type NoneType; it must be int"),
        ({"slots_per_expert": 1.5}, r"router\.slots_per_expert=1.5 is of type float; it must be int or null"),
        ({"noise_std": None}, r"router\.noise_std=None is of type NoneType; it must be float"),
        ({"noise_std": True}, r"router\.noise_std=True is of type bool; it must be float"),
        ({"num_experts": 0}, r"model\.router: num_experts=0 must be at least 1"),
        ({"_target_": "os.system"}, r"_target_=os\.system is not a subclass of .*Router"),
        ({"_target_": "torch.nn.Linear"}, r"_target_=torch\.nn\.Linear is not a subclass"),
        ({"_target_": "no_such_module_at_all.Router"}, r"_target_=no_such_module_at_all\.Router cannot be imported"),
        ({"_target_": "softmoe_cli.moe.routers.soft.Sotf"}, r"_target_=.*Sotf cannot be imported"),
        ({"_target_": "bare"}, r"_target_=bare cannot be imported"),
    ],
)
def test_wrong_router_options_are_refused(change: dict[str, Any], message: str) -> None:
    make_router(SOFT, 6, 16)
    with pytest.raises(UsageError, match=message):
        make_router(SOFT | change, 6, 16)


@pytest.mark.parametrize("assigned", [[0, 1], [[0, 1], None], [[[0]], [[1]]], [[True, 0], [1, 2]], "[[0,1],[1,2]]"])
def test_lists_hold_what_they_are_said_to_hold(assigned: Any) -> None:
    options = ROUTERS["static_tasks"] | {"num_tasks": 2, "num_experts": 4, "k": 2}
    make_router(options | {"assigned": [[0, 1], [1, 2]]}, 6, 16)
    with pytest.raises(UsageError, match=r"router\.assigned=.* is of type .*; it must be list of list of int or null"):
        make_router(options | {"assigned": assigned}, 6, 16)


@pytest.mark.parametrize("key", sorted(SOFT.keys() - {"_target_"}))
def test_missing_router_options_are_refused(key: str) -> None:
    with pytest.raises(UsageError, match=rf"model\.router\.{key} is missing; SoftRouter needs it"):
        make_router({name: value for name, value in SOFT.items() if name != key}, 6, 16)
