"""What makes arms impossible to compare, found in their composed configurations before anything starts."""

from collections.abc import Sequence
from typing import Any

from softmoe_cli.compare.question import Question
from softmoe_cli.config.data import Data
from softmoe_cli.config.settle import Fairness, SettleConfig
from softmoe_cli.errors import UsageError
from softmoe_cli.run.rows import QUALITIES
from softmoe_cli.settle.arms import key_of
from softmoe_cli.settle.tune import chosen_by

SAME_IMAGES = (
    "name", "sets", "format", "root", "label", "num_classes", "split_seed", "validation_fraction", "test_fraction",
    "source", "exemplars", "strength", "views",
)  # fmt: skip
"""Settings of data that decide which images a run is tested on."""
UNPRICED = (
    "train.minutes", "prune.keep", "prune.until", "prune.windows", "prune.threshold", "prune.compare",
)  # fmt: skip
"""Settings that change what a run costs, which its formula does not say before it has ended."""
OWN_CUT = "write 'data.split_seed=${seed}': then each seed has its own cut"


def require_comparable(typed: Sequence[Sequence[str]], trees: Sequence[dict[str, Any]], asked: Fairness) -> None:
    """Arms as words and as composed configurations.

    Raises:
        UsageError: verdicts about them would be none, or a value tuned for them would be none.
    """
    if isinstance(asked, SettleConfig):
        _require_one_measure(trees, asked.quality)
    if asked.tune is None:
        return
    _require_tunable(asked.tune, asked.quality if isinstance(asked, SettleConfig) else Question.quality)
    common = set.intersection(*(set(words) for words in typed))
    if asked.tune in {key_of(word) for words in typed for word in words if word not in common}:
        raise UsageError(f"tune={asked.tune}: arms differ in it already; leave one out")
    if any("${seed}" in str(tree["data"]["split_seed"]) for tree in trees):
        raise UsageError(
            f"tune={asked.tune}: with data.split_seed=${{seed}} the images of one cut are in the others, so values "
            "would be chosen on images that verdicts rest on; tune with one cut, then settle with that value typed"
        )


def _require_tunable(key: str, quality: str) -> None:
    """Raises UsageError for a setting with which trials would differ in their cost, their images or their measure."""
    section, _, name = key.partition(".")
    if key in UNPRICED:
        raise UsageError(f"tune={key}: it changes what a run costs; tune a setting that leaves the cost as it is")
    if section == "data" and (not name or name.partition(".")[0] in SAME_IMAGES):
        raise UsageError(f"tune={key}: its values would be compared on other images each; tune another setting")
    if key == "train.loss" and QUALITIES[chosen_by(quality)].curve == "loss":
        raise UsageError(f"tune={key}: values are chosen by the loss, which is another measure in each; tune another")


def require_same_images(arms: Sequence[Data]) -> None:
    """Raises UsageError where arms, with the same seed, would be tested on other images than each other."""
    for key in SAME_IMAGES:
        values = list(dict.fromkeys(str(getattr(data, key)) for data in arms))
        if len(values) > 1:
            way_out = OWN_CUT if key == "split_seed" else "settle each in a study of its own"
            raise UsageError(f"data.{key}={','.join(values)}: arms must be tested on the same images; {way_out}")


def _require_one_measure(trees: Sequence[dict[str, Any]], quality: str) -> None:
    losses = list(dict.fromkeys(str(tree["train"]["loss"]) for tree in trees))
    if QUALITIES[quality].curve == "loss" and len(losses) > 1:
        raise UsageError(f"train.loss={','.join(losses)}: quality={quality} is another measure in each; use top1_pct")
    if any(tree["train"]["batch_size"] == "auto" for tree in trees):
        raise UsageError("train.batch_size=auto is another number where memory is; settle needs a number")
    if any(tree["train"]["precision"] == "auto" for tree in trees):
        raise UsageError("train.precision=auto is another one where the device is; settle needs fp32, bf16 or fp16")
