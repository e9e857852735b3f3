"""What the soft router and its ablations say of a run."""

import pytest

from softmoe_cli.model.router import router_class
from tests.routers import ROUTERS


@pytest.mark.parametrize("router", ["soft", "soft_uniform"])
def test_slots_that_are_still_almost_uniform_are_told(router: str) -> None:
    """In the mean over layers, against 1/64; below 1.5 times that."""
    remark = router_class(ROUTERS[router]["_target_"]).remark
    assert remark([{"dispatch_max": 0.020}, {"dispatch_max": 0.022}], 64) == (
        "still almost uniform: a slot's largest share of a token is 0.0210 in the mean, and 0.0156 where all tokens "
        "are mixed alike"
    )
    assert remark([{"dispatch_max": 0.020}, {"dispatch_max": 0.040}], 64) == ""
    assert remark([{"dispatch_max": 1 / 64}], 64) != ""
    assert remark([], 64) == ""


@pytest.mark.parametrize("router", ["uniform_soft", "uniform", "tokens_choice"])
def test_slots_that_are_uniform_by_definition_are_not_told(router: str) -> None:
    assert router_class(ROUTERS[router]["_target_"]).remark([{"dispatch_max": 1 / 64}], 64) == ""
