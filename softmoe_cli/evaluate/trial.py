"""Whether self-contrast pays for a checkpoint: settings are chosen on validation images, test images are read once, and
what two passes or other routings would have brought otherwise stands beside it."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.compare.intervals import holm
from softmoe_cli.config.commands import EvaluateConfig
from softmoe_cli.data.batches import Batch
from softmoe_cli.data.splits import ImageSet
from softmoe_cli.device import wait
from softmoe_cli.errors import UsageError
from softmoe_cli.evaluate.contrast import (
    OUR_OWN,
    WeakPass,
    check_weak,
    contrasted,
    flop_ratios,
    mcnemar,
    ranking,
    strong_pass,
    weak_named,
)
from softmoe_cli.evaluate.quality import calibration_error, guesses
from softmoe_cli.moe.kind import Layer
from softmoe_cli.moe.routing import DenseRouting

CLOCK_REPEATS = 7
STRONG, FLIP = "strong alone", "flip average"


class Way(NamedTuple):
    """One way to predict: a control by its name, or a weak activation with its draw and strengths."""

    name: str
    draw: int = 0
    beta: float | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class Answers:
    """What one way of predicting said of n images, in their order, on the CPU. A class that is no valid answer has
    probability 0."""

    label: Int64[Tensor, " n"]
    prediction: Int64[Tensor, " n"]
    in_top5: Bool[Tensor, " n"]
    choices: Int64[Tensor, " n"]
    """Valid classes."""
    probability: Float64[Tensor, " n"]
    label_probability: Float64[Tensor, " n"]
    nll: Float64[Tensor, " n"]
    """-ln(probability of the label); infinite where the label is no valid answer."""

    @property
    def right(self) -> Bool[Tensor, " n"]:
        return self.prediction == self.label

    @property
    def top1_pct(self) -> float:
        return 100 * self.right.double().mean().item()


def answers_to(
    order: Float[Tensor, "b c"], logits: Float[Tensor, "b c"], labels: Int64[Tensor, " b"]
) -> tuple[Int64[Tensor, "4 b"], Float[Tensor, "3 b"]]:
    """The fields of `Answers` of a batch: classes are ranked by `order` and have the softmax of `logits`."""
    prediction, hit = guesses(order, labels)
    log_p = logits.log_softmax(dim=1)
    told = [log_p.gather(1, which[:, None])[:, 0] for which in (prediction, labels)]
    choices = logits.isfinite().sum(dim=1)
    return torch.stack([labels, prediction, hit.long(), choices]), torch.stack([told[0].exp(), told[1].exp(), -told[1]])


class ContrastTrial:
    """Measures ways of predicting with one checkpoint.

    Args:
        model: on its device, in evaluation.
        name: its router's.
        batches: gives images in batches, each once, in order.
        outputs: the head's outputs for the data's classes; None: all, in their order.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        model: VisionTransformer,
        name: str,
        batches: Callable[[ImageSet], Iterator[Batch]],
        autocast: torch.autocast,
        outputs: list[int] | None,
    ) -> None:
        self.config, self.model, self.name = config, model.eval(), name
        self.batches, self.autocast, self.outputs = batches, autocast, outputs
        check_weak(model, config.contrast, name)
        self.layers = [block.mlp for block in model.blocks if isinstance(block.mlp, Layer)]
        if config.contrast_gates == "one":
            self._check_gates()
        self.alone = {f"{word} alone": WeakPass(model, weak_named(word)) for word in self._tops()}

    def _check_gates(self) -> None:
        if not any(weak_named(word).kind in ("rank", "top") for word in self.config.contrast):
            raise UsageError("contrast_gates=one is about the gates of rank_R and top_J, which contrast= does not name")
        if all(getattr(layer.router, "renormalise", False) for layer in self.layers):
            raise UsageError(
                f"contrast_gates=one has no effect: {self.name} of this checkpoint divides its gates anyway"
            )

    def _tops(self) -> list[str]:
        """The controls of one pass with J experts a token, by its own gates, where there are ranks: every J up to 8,
        then powers of two."""
        limits = [layer.router.weak_limits() for layer in self.layers]
        if not all("rank" in each for each in limits):
            return []
        most = min(each["rank"] for each in limits)
        powers = [2**i for i in range(4, most.bit_length())]
        return [f"top_{j}" for j in sorted({*range(1, min(8, most) + 1), *powers, most})]

    def settings(self) -> dict[str, list[tuple[float, float]]]:
        """The (beta, alpha) to try for each weak activation, the mildest first."""
        grid = [(b, a) for b in sorted(self.config.contrast_beta) for a in sorted(self.config.contrast_alpha)[::-1]]
        return dict.fromkeys(self.config.contrast, grid)

    def passes(self, validation: ImageSet | None) -> dict[tuple[str, int], WeakPass]:
        """The weak passes by word and draw. `validation`: the images whose combine weights say which experts drop_Q
        keeps."""
        kept = None
        if any(weak_named(word).kind == "drop" for word in self.config.contrast):
            assert validation is not None
            kept = self._by_importance(validation)
        found = {}
        for word in self.config.contrast:
            how = weak_named(word)
            for draw in range(self.config.contrast_draws if how.kind == "random" else 1):
                found[word, draw] = WeakPass(
                    self.model, how, self.config.contrast_gates == "one", self.config.contrast_seed, draw, kept
                )
        return found

    @torch.no_grad()
    def _by_importance(self, images: ImageSet) -> dict[int, Int64[Tensor, " e"]]:
        """Each MoE block's experts by the sum of their combine weights over images, the largest first; of equal ones
        the lower number first."""
        total: dict[int, Tensor] = {}
        hooks = []
        for index, block in enumerate(self.model.blocks):
            if isinstance(block.mlp, Layer):

                def add(_router: object, _inputs: object, routing: DenseRouting, index: int = index) -> None:
                    weight = routing.combine_weights.double().sum(dim=(0, 1, 3)).cpu()
                    total[index] = total[index] + weight if index in total else weight

                hooks.append(block.mlp.router.register_forward_hook(add))
        with self.autocast:
            for x, *_ in self.batches(images):
                self.model(x)
        for hook in hooks:
            hook.remove()
        return {index: weight.argsort(descending=True, stable=True) for index, weight in total.items()}

    @torch.no_grad()
    def read(
        self,
        images: ImageSet,
        passes: Mapping[tuple[str, int], WeakPass],
        settings: Mapping[str, Sequence[tuple[float, float]]],
        *,
        controls: bool,
    ) -> dict[Way, Answers]:
        """Reads the images once and predicts them in every way that is asked for."""
        found: dict[Way, list[tuple[Tensor, Tensor]]] = {}
        first = 0

        def keep(way: Way, order: Tensor, logits: Tensor, labels: Tensor) -> None:
            found.setdefault(way, []).append(answers_to(order, logits, labels))

        with self.autocast:
            for x, labels, _ in self.batches(images):
                whole, entering = strong_pass(self.model, x)
                strong = self._of(whole)
                keep(Way(STRONG), strong, strong, labels)
                if controls:
                    both = [strong, self._of(self.model(x.flip(3)))]
                    mean = torch.stack([each.log_softmax(dim=1) for each in both]).logsumexp(dim=0)
                    keep(Way(FLIP), mean, mean, labels)
                for word, alone in self.alone.items() if controls else ():
                    logits = self._of(alone(entering, first))
                    keep(Way(word), logits, logits, labels)
                for (word, draw), passed in passes.items():
                    weak = self._of(passed(entering, first))
                    for beta, alpha in settings[word]:
                        logits, valid = contrasted(strong, weak, alpha=alpha, beta=beta)
                        keep(Way(word, draw, beta, alpha), ranking(logits, valid, strong), logits, labels)
                first += len(labels)
        made = {}
        for way, parts in found.items():
            label, prediction, hit, choices = torch.cat([each[0] for each in parts], dim=1).cpu()
            numbers = torch.cat([each[1] for each in parts], dim=1).cpu().double()
            made[way] = Answers(label, prediction, hit.bool(), choices, *numbers)
        return made

    def _of(self, logits: Float[Tensor, "b o"]) -> Float[Tensor, "b c"]:
        """Logits of the data's classes, float32 or better."""
        some = logits if self.outputs is None else logits[:, self.outputs]
        return some.to(torch.promote_types(some.dtype, torch.float32))

    def latency_ratios(self, images: ImageSet, passes: Mapping[tuple[str, int], WeakPass]) -> dict[str, float]:
        """Time of each double pass over that of one pass, on the first batch, by turns."""
        x = next(self.batches(images)).images
        both = {word: passed for (word, draw), passed in passes.items() if draw == 0}
        times: dict[str, list[float]] = {STRONG: [], **{word: [] for word in both}}
        with self.autocast:
            for turn in range(-1, CLOCK_REPEATS):
                for word, kept in times.items():
                    wait(x.device)
                    start = time.perf_counter()
                    if word == STRONG:
                        with torch.no_grad():
                            self.model(x)
                    else:
                        both[word](strong_pass(self.model, x)[1], 0)
                    wait(x.device)
                    if turn >= 0:
                        kept.append(time.perf_counter() - start)
        middle = {word: statistics.median(each) for word, each in times.items()}
        return {word: middle[word] / middle[STRONG] for word in both}


def best_settings(read: Mapping[Way, Answers]) -> tuple[dict[str, Way], dict[str, float]]:
    """For each weak activation the setting with the best top-1, of the mean over draws; of equal ones that of the
    smaller beta, then of the larger alpha. And these figures, in percent."""
    settings = dict.fromkeys(way._replace(draw=0) for way in read if way.beta is not None)
    best: dict[str, Way] = {}
    reached: dict[str, float] = {}
    for way in sorted(settings, key=lambda each: (each.beta, -(each.alpha or 0))):
        mean = statistics.fmean(said.top1_pct for each, said in read.items() if each._replace(draw=0) == way)
        if way.name not in best or mean > reached[way.name] + 1e-9:
            best[way.name], reached[way.name] = way, mean
    return best, reached


def line_of(way: Way, draws: Sequence[Answers], strong: Answers, bins: int) -> dict[str, Any]:
    """The figures of one way on the scored images against the strong pass alone. With several draws they are means over
    draws, and p is the largest: that of a claim about each."""

    def mean(of: Callable[[Answers], float]) -> float:
        return statistics.fmean(of(said) for said in draws)

    def masked(said: Answers) -> Tensor:
        return said.nll.isinf()

    row: dict[str, Any] = {"way": way.name, "beta": way.beta, "alpha": way.alpha, "draws": len(draws)}
    row["top1_pct"] = mean(lambda said: said.top1_pct)
    if len(draws) > 1:
        row |= {
            "top1_pct_low": min(each.top1_pct for each in draws),
            "top1_pct_high": max(each.top1_pct for each in draws),
        }
    row["top1_change_pct"] = row["top1_pct"] - strong.top1_pct
    row["changed_pct"] = 100 * mean(lambda said: (said.prediction != strong.prediction).double().mean().item())
    pairs = [(int((said.right & ~strong.right).sum()), int((strong.right & ~said.right).sum())) for said in draws]
    row["gained"], row["lost"] = (statistics.fmean(pair[i] for pair in pairs) for i in (0, 1))
    row["p"] = None if way.name == STRONG else max(mcnemar(*pair) for pair in pairs)
    row["top5_pct"] = 100 * mean(lambda said: said.in_top5.double().mean().item())
    row["ece_pct"] = 100 * mean(lambda said: calibration_error(said.probability, said.right, bins))
    row["label_masked_pct"] = 100 * mean(lambda said: masked(said).double().mean().item())
    kept = [said.nll[~masked(said)] for said in draws]
    row["nll_where_not_masked"] = statistics.fmean(each.mean().item() for each in kept) if all(map(len, kept)) else None
    row["could_change_pct"] = 100 * mean(lambda said: (said.choices > 1).double().mean().item())
    return row


def contrast_row(
    trial: ContrastTrial, images: ImageSet, validation: ImageSet | None
) -> tuple[dict[str, Any], dict[str, Sequence[Any]]]:
    """Chooses the settings and scores them. What goes into the row of an evaluation, and columns for each image.

    Args:
        images: those that are scored.
        validation: those that choose; None: the scored ones do, or there is nothing to choose.
    """
    config, settings = trial.config, trial.settings()
    passes, tried = trial.passes(validation), sum(map(len, settings.values()))
    choose_apart = tried > 1 and config.contrast_by == "validation" and config.split != "validation"
    row: dict[str, Any] = {}
    if choose_apart:
        assert validation is not None
        seen = trial.read(validation, passes, settings, controls=False)
        best, reached = best_settings(seen)
        row["contrast_strong_top1_pct_where_chosen"] = seen[Way(STRONG)].top1_pct
        settings = {word: [(way.beta or 0.0, way.alpha or 0.0)] for word, way in best.items()}
    scored = trial.read(images, passes, settings, controls=True)
    if not choose_apart:
        best, reached = best_settings(scored)
    chosen = max(best, key=lambda word: (round(reached[word], 9), -(best[word].beta or 0.0)))
    where = "nothing" if tried == 1 else "validation" if choose_apart else f"the scored {config.split}"
    row |= {"contrast_chosen": chosen, "contrast_chosen_on": where, "contrast_settings_tried": tried}
    draws: dict[Way, list[Answers]] = {}
    for way, said in scored.items():
        draws.setdefault(way._replace(draw=0), []).append(said)
    every = {way: line_of(way, each, scored[Way(STRONG)], config.calibration_bins) for way, each in draws.items()}
    for is_control in (True, False):  # two families: what was asked, and what it is compared with
        family = [line for line in every.values() if (line["beta"] is None) == is_control and line["p"] is not None]
        for line, p in zip(family, holm([line["p"] for line in family]), strict=True):
            line["p_holm"] = p
    lines = [line for way, line in every.items() if way.beta is None]
    for word, way in best.items():
        every[way] |= {"ours": weak_named(word).kind in OUR_OWN}
        lines.append(every[way] | {"top1_pct_where_chosen": reached[word] if choose_apart else None})
    ratios = {STRONG: 1.0, FLIP: 2.0}
    ratios |= flop_ratios(trial.model, {word: passes[word, 0] for word in best}, trial.alone)
    times = trial.latency_ratios(images, passes) if config.contrast_clock else {}
    for line in lines:
        line |= {"flop_ratio": ratios[line["way"]], "latency_ratio": times.get(line["way"])}
    return row | {"contrast": lines}, columns(scored, best[chosen])


def columns(scored: Mapping[Way, Answers], chosen: Way) -> dict[str, Sequence[Any]]:
    """For the file of predictions: the chosen contrast's, the strong pass's, and what every other way predicted."""
    said = scored[chosen]
    named: dict[str, Tensor] = {
        "prediction": said.prediction, "probability": said.probability, "label_probability": said.label_probability,
    }  # fmt: skip
    for way, each in scored.items():
        several = any(other.draw for other in scored if other.name == way.name)
        settings = [other for other in scored if other.name == way.name and other.draw == way.draw]
        name = "strong" if way.name == STRONG else way.name.replace(" ", "_") + (f"_draw_{way.draw}" if several else "")
        name += f"_beta_{way.beta:g}_alpha_{way.alpha:g}" if len(settings) > 1 else ""
        named[f"{name}_prediction"] = each.prediction
    return {name: each.tolist() for name, each in named.items()}
