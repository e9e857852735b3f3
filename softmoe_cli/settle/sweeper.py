"""Rounds of seeds: decides which jobs there are, and gives them to a sweep's launcher."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from softmoe_cli.compare.blocks import kept_apart
from softmoe_cli.compare.groups import Question
from softmoe_cli.compare.looks import read_looks, record_look
from softmoe_cli.compare.runs import FinishedRun, read_runs
from softmoe_cli.config.settle import SettleConfig
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.launch.sweep import Sweep
from softmoe_cli.options.compose import say_once
from softmoe_cli.settle.arms import FIRST_SEED, Arm, baseline_of, labels, without_seed
from softmoe_cli.settle.record import fix_question
from softmoe_cli.settle.report import Account, as_json, as_text
from softmoe_cli.settle.rounds import Contest, Standing, lacking, stand
from softmoe_cli.settle.spent import Spent, spent_by, spent_in, total

OPEN_STATUS = 3
"""The exit status where a budget ended before every arm had its verdict."""
AHEAD = 4
"""Where places would stand idle, a round is at most one part in so many larger than the next look needs."""


class Settle(Sweeper):
    """The sweeper that Hydra uses while `softmoe settle` runs."""

    asked: ClassVar[SettleConfig]
    """What was typed; command.py sets this, and `plan`, before it calls Hydra."""
    plan: ClassVar[bool]
    status: ClassVar[int | None]
    """The exit status, once it is known: Hydra returns nothing."""

    def __init__(self, params: dict[str, str] | None = None, **_options: Any) -> None:
        """`params`: the keys that an experiment lists for a sweep."""
        self._params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._loader = hydra_context.config_loader
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        launcher = self._launcher
        if not isinstance(launcher, Sweep):
            raise UsageError("settle has its jobs run by softmoe's own launchers: hydra/launcher=local, slurm or ray")
        asked = Settle.asked
        if asked.format == "json":
            launcher.say_aside()
        words, first = self._arms(arguments)
        seeds = range(first, first + asked.max_seeds)
        jobs, slots = launcher.ask([[*each, f"seed={first}"] for each in words], seeds)
        told = labels(words)
        arms = [Arm(*each) for each in zip(told, words, jobs, strict=True)]
        base = baseline_of(arms, asked.baseline)
        others = tuple(arm.label for arm in arms if arm is not base)
        contest = Contest(others, base.label, asked.quality, asked.margin, first)
        if asked.max_seeds < contest.least:
            raise UsageError(
                f"max_seeds={asked.max_seeds} can give no verdict: with {len(others)} comparisons the any-time rule "
                f"needs {contest.least} seeds"
            )
        rounds = Rounds(launcher, slots, contest, arms, asked)
        with launcher.held():
            launcher.recall()
            fix_question(rounds.study, rounds.question())
            report = rounds.go()
        print(as_json(report) if asked.format == "json" else as_text(report))
        Settle.status = OPEN_STATUS if report.standing.undecided(contest) else 0

    def _arms(self, arguments: Sequence[str]) -> tuple[list[list[str]], int]:
        """The words of each arm, without the seed; and the first seed.

        Raises:
            UsageError: fewer than two arms, or several seeds.
        """
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        parser = OverridesParser.create(config_loader=self._loader)
        params = [f"{key}={value}" for key, value in self._params.items() if key != "seed"]
        if "seed" in self._params:
            say_once(f"the experiment's seed={self._params['seed']} is not used: settle chooses seeds")
        first = FIRST_SEED
        for override in parser.parse_overrides(list(arguments)):
            if override.key_or_group == "seed":
                if override.is_sweep_override():
                    raise UsageError(
                        f"{override.input_line}: settle chooses how many seeds there are; seed=N is the first one"
                    )
                first = int(override.value())
        (batch,) = BasicSweeper.split_arguments(parser.parse_overrides([*params, *arguments]), None)
        words = without_seed(batch)
        if len(words) < 2:
            raise UsageError("settle needs two arms or more: write choices with commas, as model/router=dense,soft")
        return words, first


class Rounds:
    """The rounds of one settling, while its sweep's folder is held."""

    def __init__(
        self, launcher: Sweep, slots: Sequence[str], contest: Contest, arms: Sequence[Arm], asked: SettleConfig
    ) -> None:
        self._launcher, self._slots, self._family, self._asked = launcher, slots, contest, asked
        self._arms = {arm.label: arm for arm in arms}
        self._read: dict[Path, FinishedRun] = {}
        self._failed: set[tuple[str, int]] = set()
        self.study = arms[0].job.folder.parent

    def question(self) -> dict[str, Any]:
        return {
            "arms": [{"label": arm.label, "words": arm.words} for arm in self._arms.values()],
            "baseline": self._family.baseline,
            "quality": self._family.quality,
            "margin": self._family.margin,
            "first_seed": self._family.first,
        }

    def go(self) -> Account:
        """Rounds until every arm has its verdict or a budget is used up."""
        while True:
            runs = self._finished()
            standing = self._look(runs)
            report = self._report(standing, runs)
            if not standing.wanted:
                return report
            wanted = self._next(standing, runs)
            over = self._over(report.spent, wanted, runs)
            if over:
                return replace(report, over=over)
            if standing.n:
                self._launcher.say(as_text(report))
            self._launch(wanted)

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
        everything = [self._read[folder] for folder in places]
        if everything:
            parts, keys = kept_apart(everything, Question(quality=self._family.quality))
            if len(parts) > 1:
                raise UsageError(f"runs that differ in {', '.join(keys)} cannot be compared: choose arms that agree")
        return runs

    def _look(self, runs: dict[str, dict[int, FinishedRun]]) -> Standing:
        """Looks at the runs, and records that."""
        shown = [run for of_arm in runs.values() for run in of_arm.values()]
        standing = stand(self._family, runs, read_looks(shown), self._asked.max_seeds, self._failed)
        if standing.n:
            for told in record_look(shown, self._family.quality, self._family.margin):
                self._launcher.say(told)
        return standing

    def _spent(self, runs: dict[str, dict[int, FinishedRun]]) -> Spent:
        done = [run for of_arm in runs.values() for run in of_arm.values()]
        return spent_in(done, [folder for arm in self._arms.values() for folder in arm.job.folders.values()])

    def _report(self, standing: Standing, runs: dict[str, dict[int, FinishedRun]]) -> Account:
        return Account(self._family, standing, runs, self._spent(runs), self._reasons(), self._asked)

    def _reasons(self) -> list[str]:
        return list(self._launcher.failures.values())

    def _next(self, standing: Standing, runs: dict[str, dict[int, FinishedRun]]) -> list[tuple[str, int]]:
        """The runs of the next round: the first seed of all, which tells what a seed costs; then what the next look
        needs, and a little more where places would stand idle."""
        wanted = standing.wanted
        if not any(runs.values()) and not self._failed:
            return [each for each in wanted if each[1] == self._family.first]
        n = wanted[-1][1] - self._family.first + 1
        for more in range(n + 1, min(n + max(1, n // AHEAD), self._asked.max_seeds) + 1):
            larger = lacking(self._family, standing, runs, more, self._failed)
            if len(larger) > len(self._slots):
                break
            wanted = larger
        return wanted

    def _over(self, spent: Spent, wanted: Sequence[tuple[str, int]], runs: dict[str, dict[int, FinishedRun]]) -> str:
        """Which budget the next round would pass; empty for none."""
        after = spent + total(self._of_one(label, runs) for label, _ in wanted)
        hours, pflop = self._asked.hours, self._asked.pflop
        if hours is not None and after.seconds > 3600 * hours:
            return f"hours={hours:g}"
        return f"pflop={pflop:g}" if pflop is not None and after.pflop > pflop else ""

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
            if not entry.finished:
                self._failed.add(each)
        base = self._family.baseline
        if not self._finished()[base] and any(arm == base for arm, _ in self._failed):
            why = "\n  ".join(self._reasons())
            raise RunError(f"the baseline {base} failed, and so nothing can be compared with it\n  {why}")
