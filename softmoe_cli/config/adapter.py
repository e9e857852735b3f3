"""The options of adapters: small layers that are trained beside the sublayers of a frozen backbone."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from softmoe_cli.config.option import Section, option
from softmoe_cli.errors import UsageError

SITES = {"attn": ("attn",), "mlp": ("mlp",), "both": ("attn", "mlp")}
"""The sublayers that each location means."""
OWN: dict[str, tuple[str, ...]] = {
    "none": (),
    "soft_moa": ("location", "num_adapters", "slots_per_adapter", "normalised", "width", "reduction"),
    "dense_moa": ("location", "num_adapters", "width", "reduction"),
    "bottleneck": ("location", "insert", "width", "reduction"),
    "lora": ("alpha", "width", "reduction"),
}
"""The options that each adapter has; all others are null."""
FEWEST = 4
"""The smallest width that follows from `reduction`."""


@dataclass
class AdapterOptions(Section):
    """What is trained beside a frozen backbone, and where."""

    path: ClassVar[str] = "model.adapter"
    name: str = option("finetune: small layers that are trained beside a frozen backbone", choices=tuple(OWN))
    location: str | None = option(
        "finetune: adapters beside attention (attn), beside the MLP (mlp) or beside both, in every block",
        choices=tuple(SITES),
    )
    insert: str | None = option(
        "finetune: parallel: it reads what its sublayer reads; sequential: it reads what its sublayer returns, and "
        "its result is added to that",
        choices=("parallel", "sequential"),
    )
    num_adapters: int | None = option("finetune: adapters at each place", low=1)
    slots_per_adapter: int | None = option("finetune: rows that an adapter computes of each image", low=1)
    normalised: bool | None = option(
        "finetune: logits from tokens and slots of unit length, as Soft MoE has them; false: plain products"
    )
    width: int | None = option(
        "finetune: r, the hidden width of an adapter, or LoRA's rank; null: from reduction", low=1
    )
    reduction: float | None = option(
        f"finetune: r = round(d / reduction), at least {FEWEST}, d being the model's width; null: from width", above=0
    )
    alpha: float | None = option("finetune: LoRA's products are multiplied by alpha / r", above=0)

    def check(self) -> None:
        own, word = OWN[self.name], f"adapter={self.name}"
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name not in ("name", *own) and value is not None:
                has = f"; it has {', '.join(own)}" if own else ""
                raise UsageError(f"{word} has no use for model.adapter.{f.name}={value}{has}; set it to null")
            if f.name in own and value is None and f.name not in ("width", "reduction"):
                raise UsageError(f"model.adapter.{f.name}=null: {word} needs a value")
        if own and (self.width is None) == (self.reduction is None):
            raise UsageError(
                f"model.adapter.width={self.width} and model.adapter.reduction={self.reduction}: give one of them and "
                "set the other to null"
            )

    def width_for(self, dim: int) -> int:
        """r at a model width of `dim`; half is rounded to even, as in the official code."""
        if self.width is not None:
            return self.width
        assert self.reduction is not None
        return max(FEWEST, round(dim / self.reduction))

    @property
    def sites(self) -> tuple[str, ...]:
        """The sublayers that have an adapter beside them."""
        return () if self.location is None else SITES[self.location]


def no_adapter() -> AdapterOptions:
    nothing: dict[str, Any] = {f.name: None for f in dataclasses.fields(AdapterOptions)}
    return AdapterOptions(**nothing | {"name": "none"})
