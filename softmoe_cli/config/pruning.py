"""The options of pruning experts while finetuning (Chen et al., 2022)."""

from dataclasses import dataclass
from typing import ClassVar

from softmoe_cli.config.option import Section, option

MEASURES = ("alpha_score", "hit_rate", "router_change", "random")
"""What experts are pruned by."""
MEASURED = ("alpha_score", "hit_rate")
"""Those of them that routings measure (`Router.measures`)."""


@dataclass
class Prune(Section):
    """Which experts a finetuning drops, and when. Values that are no one's but ours, since the paper's were not
    published: threshold, windows."""

    path: ClassVar[str] = "prune"
    keep: int | None = option("finetune: experts that stay in each block in the end; null: all stay", low=1)
    by: str = option(
        "what an expert's worth is: the sum of its gates, its tokens, how its part of the router grows, or chance",
        choices=MEASURES,
    )
    threshold: float = option(
        "an expert goes at the end of a window if its share is below this over the number that are left; 0: none",
        low=0,
    )
    windows: int = option("windows until the deadline; at the end of the last one only `keep` experts stay", low=1)
    until: float = option("the deadline, as a share of the budget (eager: 0.5; staged: 1)", above=0, high=1)
    compare: str = option(
        "what the threshold compares: scores of a window, or of all windows so far", choices=("window", "all")
    )
    balance: str = option(
        "what evens the load of a block that has lost an expert: nothing (off), or what the router has, over those "
        "that are left",
        choices=("off", "kept"),
    )
