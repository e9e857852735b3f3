"""The signs of illness: what is measured, from where on it is bad, and why from there. Each stands here once."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sign:
    """One illness.

    Attributes:
        title: what tables call it.
        measured: what the figure is, with its unit.
        limit: the first figure that is bad.
        side: how figures that are bad stand to the limit: `from` it on, `below` it, or `not surely above` it.
        source: why the limit is there; "ours" where nobody has published one.
    """

    title: str
    measured: str
    limit: float
    source: str
    side: str = "from"

    def bad(self, figure: float, limit: float) -> bool:
        return figure >= limit if self.side == "from" else figure < limit


@dataclass(frozen=True)
class Reading:
    """What was found of one sign in one run.

    Attributes:
        sign: its key in SIGNS.
        figure: what was measured, at the worst place; None where that could not be.
        limit: the sign's, or this run's own.
        ill: whether this is an illness.
        where: the place of the figure.
        turn: what to turn, where it is one.
        unseen: why it could not be looked at.
    """

    sign: str
    figure: float | None
    limit: float
    ill: bool
    where: str = ""
    turn: str = ""
    unseen: str = ""


def read(
    sign: str, figure: float, *, where: str = "", turn: str = "", limit: float | None = None, only_if: bool = True
) -> Reading:
    """A figure against its limit. `only_if`: what else must be so for an illness."""
    limit = SIGNS[sign].limit if limit is None else limit
    ill = only_if and SIGNS[sign].bad(figure, limit)
    return Reading(sign, figure, limit, ill, where, turn if ill else "")


def unseen(sign: str, why: str) -> Reading:
    """A sign that this run's files say nothing of."""
    return Reading(sign, None, SIGNS[sign].limit, False, unseen=why)


def as_row(reading: Reading) -> dict[str, Any]:
    """A reading as JSON has it, with what its sign means."""
    sign = SIGNS[reading.sign]
    return {
        "sign": reading.sign, "ill": reading.ill, "figure": reading.figure, "limit": reading.limit,
        "bad": sign.side, "measured": sign.measured, "where": reading.where,
        "turn": reading.turn, "source": sign.source, "unseen": reading.unseen,
    }  # fmt: skip


SIGNS = {
    # --- the run
    "damaged": Sign("damaged", "files that cannot be read", 1, "a file that contradicts its declaration is not read"),
    "unfinished": Sign("not finished", "% of the budget that was used", 100, "a run is done at its whole budget",
                       side="below"),
    "chance": Sign("at chance", "validation top-1, %", 0, "the rule of softmoe compare: right answers that guessing "
                   "the commonest class reaches with a probability above 2.5% (binomial); the limit is what guessing "
                   "reaches", side="not surely above"),
    # --- the learning rate
    "diverged": Sign("diverged", "training loss of the last tenth of rows over that of the first row, where it is 0.1 "
                     "more at least", 1.1, "ours: of 313 trained runs none ended above 0.23 of it"),
    "spikes": Sign("loss spikes", "training rows whose loss is 7 deviations above the ten rows before, and higher by a "
                   "tenth of the first row's at least", 1, "seven deviations above a rolling mean: the spike score of "
                   "OLMo 2 (arXiv 2501.00656); the tenth is ours: the loss of a run that has learned scatters little, "
                   "so that seven deviations may be nothing"),
    "idle": Sign("weights barely moved", "% of a weight's usual size that all updates together can have moved it", 1,
                 "ours: AdamW moves a weight by about the learning rate in an update at most (Kingma and Ba 2015, "
                 "section 2.1), SGD by the gradient times it; a hundredth of a weight changes nothing", side="below"),
    "falling": Sign("loss still falling", "% of the fall of the training loss that came in the last third of all "
                    "learning rates added up", 30, "ours: a loss that falls in proportion to what was learned has 33% "
                    "there; trained runs had 2% to 20%"),
    # --- data and size
    "data_bound": Sign("data-bound", "% of what the training loss fell by that the validation loss did not follow", 25,
                       "ours: 12% at most in 313 trained runs; that mixtures of experts help where parameters, "
                       "and not data, are scarce, is their authors' word (google-research/vmoe, issue 176)"),
    "capacity_bound": Sign("capacity-bound", "% of its first value that the training loss still has, flat and no lower "
                           "than that of validation images, after 5 epochs or more", 20, "ours: more training and more "
                           "data change little then"),
    # --- experts
    "dead": Sign("dead experts", "% of experts with less than a hundredth of the mean load", 1e-9,
                 "ours: any, where 20 tokens an expert were looked at on average, so that chance leaves none without"),
    "collapsed": Sign("collapsed experts", "effective experts, % of those that there are", 50 + 1e-9,
                      "ours: exp(entropy of the loads); half or fewer; trained runs had 60% and more", side="below"),
    "dropped": Sign("dropped tokens", "% of tokens that no expert saw", 25,
                    "Soft MoE paper, appendix B: up to 25% with Tokens Choice, and 50% with Experts Choice, which is "
                    "its limit here, in layers of 100 to 1,000 experts; two thirds of zero_computation's choices of "
                    "MLPs is ours (trained runs had up to 55%)"),
    "experts_alike": Sign("experts alike", "mean cosine between two experts' weights in a block, after 10 epochs or "
                          "more where they began equal", 0.99,
                          "arXiv 2605.19378 calls experts equal above it; in 124 trained runs it was 0.9898 at most"),
    "slots_alike": Sign("slots alike", "mean cosine between two slots' parameters in a block", 0.9,
                        "ours: slots at that angle differ in their logits by 0.45 times the scale at most"),
    "saturated": Sign("saturated routing", "largest share of a token in a slot, or of a slot in a token, mean in a "
                      "block", 0.95, "Soft MoE paper, appendix E: where the mean largest weights come near 1, accuracy "
                      "collapses; the 0.95 is ours: trained runs had up to 0.93"),
    "scale_idle": Sign("idle scale", "how far the scale of the logits has moved from 1, where it began, in the block "
                       "where it moved most, of a routing that is still almost uniform", 0.02,
                       "ours: almost uniform as softmoe train says it, a largest share below 1.5 times the mean one",
                       side="below"),
    # --- time
    "loading": Sign("time lost in loading", "% of all seconds that training waited for images", 20,
                    "ours, of a minute lost or more: more processes that read win it back"),
    "evaluation": Sign("time lost in evaluation", "% of all seconds that went into evaluation", 30,
                       "ours, of a minute lost or more: trained runs had up to 12%"),
    "saving": Sign("time lost in saving", "% of all seconds that went into saving", 10,
                   "ours, of a minute lost or more: training waits for checkpoints 2% of the time by design"),
    "compilation": Sign("time lost in compilation", "% of all seconds that went into torch.compile", 30,
                        "ours, of a minute lost or more"),
    "precision": Sign("slow precision", "whether float32 is no slower on this processor (1: it is)", 1,
                      "whether the processor has instructions for it, and the model is 128 wide or more: emulated "
                      "products took 3.8 times as long as in float32, those in loops 6 to 40 times "
                      "(softmoe_cli/moe/processor.py)"),
}  # fmt: skip
"""Every sign, in the order in which they are told."""
