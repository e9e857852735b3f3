"""Rounds of seeds: decides which jobs there are, and gives them to a sweep's launcher."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from softmoe_cli import programs
from softmoe_cli.compare.blocks import kept_apart
from softmoe_cli.compare.looks import read_looks, record_look
from softmoe_cli.compare.power import Outlook, outlook
from softmoe_cli.compare.question import Question
from softmoe_cli.compare.runs import FINGERPRINT, FinishedRun, read_runs
from softmoe_cli.compare.send import send_look
from softmoe_cli.config.settle import FAIR_KEYS, Fairness, SettleConfig
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.launch.sweep import Sweep
from softmoe_cli.options.compose import say_once
from softmoe_cli.run.mirror import tracking_of
from softmoe_cli.settle.arms import FIRST_SEED, expanded, key_of, science, without_seed
from softmoe_cli.settle.fair import Arms, fair_arms
from softmoe_cli.settle.foresee import foreseen, plan_text
from softmoe_cli.settle.record import agree, fix_question
from softmoe_cli.settle.report import Account, as_json, as_text
from softmoe_cli.settle.rounds import Contest, Standing, fewest_seeds, lacking, seen, stand
from softmoe_cli.settle.spent import Spent, passed, spent_by, spent_in, total
from softmoe_cli.settle.trials import require_below, tune_arms
from softmoe_cli.settle.tune import Tuned
from softmoe_cli.text import several

OPEN_STATUS = 3
"""The exit status where a budget ended before every arm had its verdict."""
MAIN = Question.quality
"""The main measure where nobody chooses one."""
HELD = "sweep-settle"
"""The folder of jobs and logs in the study: one settling is all that a study has, however it was typed."""
AHEAD = 4
"""Where places would stand idle, a round is at most one part in so many larger than the next look needs."""


class Fair(Sweeper):
    """The sweeper that Hydra uses while `softmoe train -m` makes its arms fair."""

    asked: ClassVar[Fairness]
    """What was typed; this is set before Hydra is called."""

    def __init__(self, params: dict[str, str] | None = None, **_options: Any) -> None:
        """`params`: the keys that an experiment lists for a sweep."""
        self._params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._loader = hydra_context.config_loader
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if not isinstance(launcher, Sweep):
            raise UsageError("jobs of such arms run by softmoe's own launchers: hydra/launcher=local, slurm or ray")
        self._launcher = launcher

    def sweep(self, arguments: list[str]) -> None:
        batch = expanded(self._params, arguments, self._loader)
        typed = without_seed(batch)
        if Fair.asked.tune is not None:
            require_below(int(seed) for seed in _seeds(batch) if seed.isdigit())
        arms = fair_arms(self._launcher, typed, Fair.asked, [FIRST_SEED])
        if Fair.asked.tune is not None and not self._launcher.plans:
            with self._launcher.held():
                self._launcher.recall()
                arms, _ = tune_arms(self._launcher, arms, Fair.asked, MAIN, [FIRST_SEED])
        given = [arms.arms[typed.index(without_seed([words])[0])].words for words in batch]
        seeds = [[word for word in words if key_of(word) == "seed"] for words in batch]
        jobs = [[*words, *seed] for words, seed in zip(given, seeds, strict=True)]
        self._launcher.launch(jobs, self._launcher.jobs_so_far)


class Settle(Fair):
    """The sweeper that Hydra uses while `softmoe settle` runs."""

    asked: ClassVar[SettleConfig]
    status: ClassVar[int | None]
    """The exit status, once it is known: Hydra returns nothing."""

    def sweep(self, arguments: list[str]) -> None:
        launcher, asked = self._launcher, Settle.asked
        if "seed" in self._params:
            say_once(f"the experiment's seed={self._params.pop('seed')} is not used: settle chooses seeds")
        batch = expanded(self._params, arguments, self._loader)
        seeds = range(first := _first_seed(batch), first + asked.max_seeds)
        typed = without_seed(batch)
        if len(typed) < 2:
            raise UsageError("settle needs two arms or more: write choices with commas, as model/router=dense,soft")
        least = fewest_seeds(len(typed) - 1)
        if asked.max_seeds < least:
            raise UsageError(
                f"max_seeds={asked.max_seeds} can give no verdict: with {several(len(typed) - 1, 'comparison')} the "
                f"any-time rule needs {least} seeds"
            )
        arms = fair_arms(launcher, typed, asked, seeds)
        base = arms.arms[arms.base].label
        others = tuple(arm.label for arm in arms.arms if arm.label != base)
        contest = Contest(others, base, asked.quality, asked.margin, first)
        if launcher.plans:
            plan = foreseen(contest, arms, asked, Rounds(launcher, contest, arms, asked).outlook())
            programs.reply(plan) if asked.format == "json" else print(plan_text(plan))
            Settle.status = 0
            return
        launcher.lie_in(arms.study, HELD)
        question = _question(contest, arms, asked)
        agree(arms.study, question)  # before it waits for its turn
        with launcher.held(in_turn=True):
            launcher.recall()
            fix_question(arms.study, question, lambda: _begun(arms, asked))
            tuned: list[Tuned] = []
            if asked.tune is not None:
                arms, tuned = tune_arms(launcher, arms, asked, asked.quality, seeds)
            account = Rounds(launcher, contest, arms, asked, tuned).go()
        end = f"\ntables and figures: softmoe compare {arms.study}"
        programs.say(as_json(account)) if asked.format == "json" else print(as_text(account) + end)
        Settle.status = OPEN_STATUS if account.open else 0


def _mode(tracking: str | list[str]) -> str:
    """online or offline where that was typed, or where tracking=auto is online; else off, as looks cost figures."""
    mode = tracking_of(tracking)
    typed = "auto" not in (tracking if isinstance(tracking, list) else [tracking])
    return mode if typed or mode == "online" else "off"


def _seeds(batch: Sequence[Sequence[str]]) -> set[str]:
    """The seeds that were typed."""
    return {word.partition("=")[2] for words in batch for word in words if key_of(word) == "seed"}


def _first_seed(batch: Sequence[Sequence[str]]) -> int:
    """The first seed: the one that was typed, else FIRST_SEED.

    Raises:
        UsageError: several were.
    """
    seeds = _seeds(batch)
    if len(seeds) > 1 or not all(seed.isdigit() for seed in seeds):
        raise UsageError(
            f"seed={','.join(sorted(seeds))}: settle chooses how many seeds there are; seed=N is the first one"
        )
    return int(seeds.pop()) if seeds else FIRST_SEED


def _begun(arms: Arms, asked: SettleConfig) -> bool:
    """Whether a run of an arm has a result. Which runs tuned arms will have is not known: then any run of the study."""
    if asked.tune is not None:
        return any(arms.study.glob("*/result.json"))
    return any((folder / "result.json").exists() for arm in arms.arms for folder in arm.job.folders.values())


def _question(contest: Contest, arms: Arms, asked: SettleConfig) -> dict[str, Any]:
    """What is fixed before the first run."""
    told = [{"label": arm.label, "words": science(words)} for arm, words in zip(arms.arms, arms.typed, strict=True)]
    fairness = {key: getattr(asked, key) for key in FAIR_KEYS if key != "baseline"}
    return {
        "arms": told, "baseline": contest.baseline, "quality": contest.quality, "margin": contest.margin,
        "first_seed": contest.first, "fairness": fairness,
    }  # fmt: skip


class Rounds:
    """The rounds of one settling, while its sweep's folder is held."""

    def __init__(
        self, launcher: Sweep, contest: Contest, arms: Arms, asked: SettleConfig, tuned: Sequence[Tuned] = ()
    ) -> None:
        self._tuned = list(tuned)
        self._launcher, self._slots, self._contest, self._asked = launcher, arms.slots, contest, asked
        self._arms = {arm.label: arm for arm in arms.arms}
        self._read: dict[Path, FinishedRun] = {}
        self._told: list[str] = []
        self._study, self._project = arms.study, arms.project
        self._mode, self._sent = _mode(arms.tracking), 0
        self._unlike: dict[tuple[str, int], str] = {}
        """Pairs that cannot be compared, and why."""
        self._reasons = {
            (arm.label, seed): noted[place]
            for noted in [launcher.noted()]
            for arm in arms.arms
            for seed, folder in arm.job.folders.items()
            if (place := Path(os.path.abspath(folder))) in noted
        }
        """Why runs failed when they were last tried; they are not waited for."""
        self._to_retry = set(self._reasons)
        """The runs that failed under a command before, until this one has tried them once more."""

    def go(self) -> Account:
        """Rounds until every arm has its verdict or a budget is used up. What failed under a command before is tried
        once more where an arm is open without it."""
        while True:
            runs = self._finished()
            standing = self._look(runs)
            report = self._report(standing, runs)
            self._send(standing, runs)
            retried = self._retried(standing)
            if retried and standing.wanted and self._over(report.spent, retried, runs)[1]:
                retried = []  # what the next look needs may be less
            if not standing.wanted and not retried:
                return report
            wanted = retried or self._next(standing, runs)
            price, over = self._over(report.spent, wanted, runs)
            if over and not retried and wanted != standing.wanted:  # without the runs ahead
                wanted = standing.wanted
                price, over = self._over(report.spent, wanted, runs)
            if over:
                return replace(report, over=over, next_round=price)
            if standing.n:
                self._launcher.tell(as_text(report))
            if retried:
                self._to_retry.clear()
            self._launch(wanted)

    def _send(self, standing: Standing, runs: dict[str, dict[int, FinishedRun]]) -> None:
        """Sends what compare says of what a look has seen, where the runs are tracked: all looks are one W&B run."""
        if not standing.n or self._mode == "off" or self._sent == standing.n:
            return
        self._sent = standing.n
        ahead = self._read.keys() - {run.folder for run in seen(self._contest, standing, runs)}
        begun = [folder for arm in self._arms.values() for folder in arm.job.folders.values() if folder.is_dir()]
        shown = [folder for folder in begun if folder not in ahead]
        out = self._study / "compare"
        try:
            send_look(shown, Question(), out, self._mode, self._launcher.tell, project=self._project, look=self._sent)
        except (UsageError, RunError) as error:
            self._launcher.tell(f"W&B has not got this look: {error}")

    @property
    def _passed_over(self) -> set[tuple[str, int]]:
        """The runs that no look waits for."""
        return {*self._reasons, *self._unlike}

    def _retried(self, standing: Standing) -> list[tuple[str, int]]:
        """The runs that failed before, of arms that are open, and of the baseline while one is."""
        undecided = standing.undecided(self._contest)
        arms = {self._contest.baseline, *undecided} if undecided else set()
        return sorted(each for each in self._to_retry if each[0] in arms)

    def outlook(self) -> Outlook | None:
        """What runs that are there already say of the deviation; this is no look, as nothing else is told."""
        runs = self._finished()
        shown = [run for of_arm in runs.values() for run in of_arm.values()]
        standing = stand(self._contest, runs, read_looks(shown), self._asked.max_seeds)
        return outlook(standing.found, [], self._contest.margin, len(self._contest.arms))

    def _finished(self) -> dict[str, dict[int, FinishedRun]]:
        """The finished runs of every arm, by seed.

        Raises:
            UsageError: a result is damaged, or runs were tested on other images.
        """
        places = {
            folder: (arm.label, seed)
            for arm in self._arms.values()
            for seed, folder in arm.job.folders.items()
            if (folder / "result.json").exists()
        }
        new = [folder for folder in places if folder not in self._read]
        found, left_out = read_runs(new) if new else ([], [])
        if left_out:
            raise UsageError("; ".join(f"{folder}: {reason}" for folder, reason in left_out))
        self._read |= {run.folder: run for run in found}
        runs: dict[str, dict[int, FinishedRun]] = {label: {} for label in self._arms}
        for folder, (label, seed) in places.items():
            runs[label][seed] = self._read[folder]
        self._drop_unlike(runs)
        return runs

    def _drop_unlike(self, runs: dict[str, dict[int, FinishedRun]]) -> None:
        """Takes out runs that were timed on other hardware than the baseline with their seed: that pair is missing, as
        one that failed.

        Raises:
            UsageError: runs differ in more.
        """
        base = self._contest.baseline
        for arm, of_arm in runs.items():
            for seed in sorted(of_arm.keys() & runs[base].keys()):
                pair = [of_arm[seed], runs[base][seed]]
                parts, keys = kept_apart(pair, Question(quality=self._contest.quality))
                if len(parts) > 1 and not set(keys) <= set(FINGERPRINT):
                    raise UsageError(f"arms that differ in {', '.join(keys)} cannot be compared; choose others")
                if len(parts) > 1:
                    told = f"{arm} with seed {seed} is left out: it had other {' and '.join(keys)} than {base}"
                    self._unlike[arm, seed] = told
                    self._tell_once(f"{told}, and train.minutes buys other training there")
                    del of_arm[seed]

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.append(text)
            self._launcher.tell(text)

    def _look(self, runs: dict[str, dict[int, FinishedRun]]) -> Standing:
        """Looks at the runs, and records that."""
        shown = [run for of_arm in runs.values() for run in of_arm.values()]
        looks = read_looks(shown)
        for told in looks.damage:
            self._tell_once(told)
        standing = stand(self._contest, runs, looks, self._asked.max_seeds, self._passed_over)
        if standing.n:
            looked = seen(self._contest, standing, runs)
            for told in record_look(looked, self._contest.quality, self._contest.margin):
                self._launcher.tell(told)
        return standing

    def _spent(self) -> Spent:
        return spent_in(
            list(self._read.values()), [folder for arm in self._arms.values() for folder in arm.job.folders.values()]
        )

    def _report(self, standing: Standing, runs: dict[str, dict[int, FinishedRun]]) -> Account:
        return Account(self._contest, standing, runs, self._spent(), self._reasons, self._asked, self._tuned,
                       notes=list(self._unlike.values()))  # fmt: skip

    def _next(self, standing: Standing, runs: dict[str, dict[int, FinishedRun]]) -> list[tuple[str, int]]:
        """The runs of the next round: the first seed of all, which tells what a seed costs; then what the next look
        needs, and a little more where places would stand idle."""
        wanted = standing.wanted
        if not any(runs.values()) and not self._reasons:
            return [each for each in wanted if each[1] == self._contest.first]
        n = wanted[-1][1] - self._contest.first + 1
        for more in range(n + 1, min(n + max(1, n // AHEAD), self._asked.max_seeds) + 1):
            larger = lacking(self._contest, standing, runs, more, self._passed_over)
            if len(larger) > len(self._slots) * self._launcher.seeds_at_once:
                break
            wanted = larger
        return wanted

    def _over(
        self, spent: Spent, wanted: Sequence[tuple[str, int]], runs: dict[str, dict[int, FinishedRun]]
    ) -> tuple[Spent, str]:
        """What these runs cost, and which budget they would pass; empty for none."""
        price = total(self._of_one(label, runs) for label, _ in wanted)
        after = spent + total(each.spent for each in self._tuned) + price
        return price, passed(self._asked, after)

    def _of_one(self, label: str, runs: dict[str, dict[int, FinishedRun]]) -> Spent:
        """What one more seed of an arm costs: the mean of its runs; before the first, its FLOPs by formula."""
        done = runs[label].values()
        if not done:
            return Spent(0.0, self._arms[label].job.cost["train_pflop"])
        return total(spent_by(run.row) for run in done).times(1 / len(done))

    def _launch(self, wanted: Sequence[tuple[str, int]]) -> None:
        jobs = []
        for label, seed in wanted:
            job = self._arms[label].job
            words = [f"seed={seed}" if word.startswith("seed=") else word for word in job.overrides]
            jobs.append(replace(job, run=f"{label} seed={seed}", overrides=words, folder=job.folders[seed]))
        for each, entry in zip(wanted, self._launcher.carry_out(jobs, self._slots), strict=True):
            self._reasons.pop(each, None)
            if not entry.finished:
                self._reasons[each] = self._launcher.failures.get(entry.job.folder, f"{entry.job.run}: no result")
        base = self._contest.baseline
        if not self._finished()[base] and any(arm == base for arm, _ in self._reasons):
            why = "\n  ".join(self._reasons.values())
            raise RunError(f"the baseline {base} failed, and so nothing can be compared with it\n  {why}")
