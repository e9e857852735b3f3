"""Identity against a slow loop."""

from tests import oracles
from tests.moe.layers import EXPERTS, TOKENS, close, expert_weights, layer, tokens


def test_identity() -> None:
    moe, x = layer("identity"), tokens()
    for image, out in zip(x, moe(x), strict=True):
        placed = oracles.Placed({(t % EXPERTS, t // EXPERTS): (t, 1.0) for t in range(TOKENS)}, [])
        close(out, oracles.sparse_moe(image.tolist(), placed, *expert_weights(moe)))
