"""What a run's files tell a doctor: rows, settings, state. Nothing is computed here, and torch is not needed."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmoe_cli.run import rows
from softmoe_cli.run.budget import NOTHING, config_tree
from softmoe_cli.run.rows import EVERY, LOOK, ROUTING, TRAIN, Row
from softmoe_cli.run.status import State

RESULT_NEEDED = {
    key: rows.RESULT[key] for key in ("format", "chance_pct", "classes", "tokens", "devices", "validation_top1_pct")
}
"""What is needed of a result beside what may be missing."""


@dataclass(frozen=True)
class Chart:
    """One run.

    Attributes:
        state: what it is doing.
        config: its config.yaml; every value is text as it is written.
        train: its rows of training, looks: those of validation images, last: its last row of any kind.
        routing: the rows of the last look in routing.jsonl.
        result: result.json, where there is one.
        faults: file -> what is wrong with it.
        gone: the steps after which a finetuning dropped experts, which its loss feels.
    """

    state: State
    config: Mapping[str, Any]
    train: list[Row]
    looks: list[Row]
    last: Row | None
    routing: list[Row]
    result: Row | None
    faults: dict[str, str]
    gone: list[int]

    @property
    def folder(self) -> Path:
        return Path(self.state.folder)

    def setting(self, key: str) -> str | None:
        """A setting as it is written; None where it is null or not there."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return None if isinstance(value, dict | list) or value in NOTHING else str(value)

    def amount(self, key: str) -> float | None:
        """A setting that is a number."""
        try:
            value = float(self.setting(key) or "")
        except ValueError:
            return None
        return value if rows.number(value) else None

    def router(self, block: int | None = None) -> dict[str, Any]:
        """The options of the router, or of a block's own; empty where there is none."""
        model = self.config.get("model")
        model = model if isinstance(model, dict) else {}
        options = self._apart(block) or model.get("router")
        return options if isinstance(options, dict) and options.get("_target_") not in NOTHING else {}

    def router_key(self, block: int) -> str:
        """Where the options of a block's router stand, such as model.router."""
        return f"model.blocks.{block}" if self._apart(block) else "model.router"

    def _apart(self, block: int | None) -> dict[str, Any]:
        """The options of a router that a block has for itself; empty where it has none."""
        model = self.config.get("model")
        blocks = model.get("blocks") if isinstance(model, dict) else None
        own = blocks.get(str(block)) if isinstance(blocks, dict) else None
        return own if isinstance(own, dict) and "_target_" in own else {}

    @property
    def tokens(self) -> int | None:
        """Tokens of an image; None where that cannot be told."""
        if self.result is not None:
            return int(self.result["tokens"])
        side, patch = self.amount("model.image_size"), self.amount("model.backbone.patch_size")
        if side is None or not patch:
            return None
        return int(side // patch) ** 2 + (self.setting("model.backbone.class_token") == "true") or None

    @property
    def devices(self) -> float:
        """That trained together: torchrun starts more than the settings say."""
        return float(self.result["devices"]) if self.result is not None else self.amount("devices") or 1.0

    @property
    def young(self) -> str:
        """Why a run is no matter for signs that are natural at a beginning; empty where it is."""
        if self.state.progress is None:
            return "how much of the budget is used cannot be read"
        return "" if self.state.progress >= 0.5 else "less than half of the budget is used"

    @property
    def done(self) -> bool:
        return self.state.state in ("done", "done before")


def read_chart(state: State) -> Chart:
    """All files of a run that are rows or settings. What cannot be read is named and left out."""
    folder, faults = Path(state.folder), {}
    config: Mapping[str, Any] = {}
    try:
        config = config_tree(folder / "config.yaml")
    except FileNotFoundError:
        faults["config.yaml"] = "is missing"
    except rows.Unreadable as error:
        faults["config.yaml"] = str(error)
    result = None
    try:
        result = rows.row(folder / "result.json", RESULT_NEEDED)
    except FileNotFoundError:
        pass
    except rows.Unreadable as error:
        faults["result.json"] = str(error)
    metrics, told = _rows(folder / "metrics.jsonl", EVERY)
    kept: dict[str, list[Row]] = {}
    for split, keys in (("train", TRAIN), ("validation", LOOK)):
        kept[split] = [row for row in metrics if row["split"] == split]
        wrong = next((fault for row in kept[split] if (fault := rows.fault(row, keys))), "")
        wrong = wrong or (_backwards(kept[split]) if split == "train" else "")
        if wrong:
            told, kept[split] = told or f"a row of {split} {wrong}", []
    if told:
        faults["metrics.jsonl"] = told
    routing, told = _rows(folder / "routing.jsonl", ROUTING)
    if told:
        faults["routing.jsonl"] = told
    looked = [row for row in routing if "window" not in row]  # the others tell which experts went
    gone = [row["step"] for row in routing if row.get("dropped")]
    routing = [row for row in looked if row["step"] == looked[-1]["step"]]
    last = metrics[-1] if metrics else None
    return Chart(state, config, kept["train"], kept["validation"], last, routing, result, faults, gone)


def _backwards(train: Sequence[Row]) -> str:
    """What no training writes: that would make less of all learning rates added up."""
    step = 0
    for row in train:
        if row["lr"] < 0:
            return f"says lr is {row['lr']}, which is below 0"
        if row["step"] < step:
            return f"says step is {row['step']}, which is below that of the row before"
        step = row["step"]
    return ""


def _rows(path: Path, keys: Mapping[str, rows.Key]) -> tuple[list[Row], str]:
    """The whole lines of a file, and what is wrong with it: of damaged files nothing is taken. The last line may be in
    the middle of being written."""
    try:
        text = rows.contents(path, rows.MOST_LINES_BYTES)
    except FileNotFoundError:
        return [], ""
    except rows.Unreadable as error:
        return [], str(error)
    found = []
    for place, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            row = rows.parsed(line)
        except rows.Unreadable:
            row = None
        wrong = rows.fault(row, keys) if isinstance(row, dict) else "is no row"
        if wrong:
            return [], f"is damaged in line {place}: it {wrong}"
        found.append(row)
    return found, ""


def name_of(state: State) -> str:
    """What a run is called: the path of its folder."""
    return os.path.normpath(state.folder)
