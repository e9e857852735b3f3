"""What divided weights take."""

import pytest

from softmoe_cli.errors import UsageError
from softmoe_cli.model.vit import build
from tests.cost.loads import composed, held


def test_what_is_divided_is_divided() -> None:
    """Weights, gradients, moments and average; in `expert` a process has a quarter of the experts and no more."""
    config = composed("soft", "train.batch_size=32", "train.ema=0.9")
    whole = held(config, 4)
    for way in ("fsdp", "expert"):
        part = held(config, 4, way)
        assert part.state_bytes == pytest.approx(whole.state_bytes / 4, rel=0.01)
        assert part.state_bytes == 5 * part.weight_bytes
        assert part.state_bytes < part.peak_bytes < whole.peak_bytes
        assert part.activation_bytes == pytest.approx(whole.activation_bytes, rel=0.2)
    experts = sum(p.nbytes for name, p in build(config.model, 10).named_parameters() if ".experts." in name)
    fsdp, expert = (held(config, 4, way).peak_bytes for way in ("fsdp", "expert"))
    assert fsdp - expert > experts, "what is gathered in fsdp are the experts"


def test_experts_that_cannot_be_divided() -> None:
    with pytest.raises(UsageError, match="parallel=expert cannot divide no experts over 4 devices"):
        held(composed("dense", "train.batch_size=32"), 4, "expert")
    with pytest.raises(UsageError, match="parallel=expert cannot divide 16 experts over 32 devices"):
        held(composed("soft", "train.batch_size=32"), 32, "expert")
