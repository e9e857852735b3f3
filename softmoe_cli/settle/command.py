"""`softmoe settle`: what is typed, and how it ends."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any, TypeVar

from softmoe_cli.config.settle import Fairness, SettleConfig
from softmoe_cli.errors import UsageError, first_line, nearest
from softmoe_cli.launch.job import RunCommand
from softmoe_cli.options.compose import Jobs, admit, door, say_once, tree_of
from softmoe_cli.options.conf_files import conf_folder, load_yaml
from softmoe_cli.options.explain import check_line
from softmoe_cli.run.rows import QUALITIES

NEEDS = {"tolerance": "equal", "tune_seeds": "tune"}
"""Options without effect where another one is null."""
F = TypeVar("F", bound=Fairness)


def settle_arms(arguments: Sequence[str], run: RunCommand) -> int:
    """Settles a comparison; returns 0 where every arm has its verdict, 3 where some are open.

    Raises:
        UsageError: it cannot work as typed; nothing was started.
        RunError: the baseline fails with every seed.
    """
    from softmoe_cli.launch.sweep import Sweep
    from softmoe_cli.launch.typed import in_full, study_of
    from softmoe_cli.settle.arms import key_of
    from softmoe_cli.settle.sweeper import Settle

    own, words = own_words(arguments, SettleConfig)
    if own.quality not in QUALITIES:
        choices = ", ".join(QUALITIES)
        raise UsageError(f"quality={own.quality}: no such figure.{nearest(own.quality, QUALITIES)} Choices: {choices}")
    _refuse_searches(words)
    words = [word for word in words if word not in ("-m", "--multirun", "--plan")]
    command = "finetune" if any(key_of(word) == "checkpoint" for word in words) else "train"
    words = check_line(command, ["-m", *in_full(words)])
    if "--plan" in arguments:
        words.append("hydra.launcher.plan=true")
    study = study_of(words)
    if study is not None:
        say_once(f"study=settle-{study}, after the keys that vary; study= names another folder")
        words.append(f"study=settle-{study}")
    admit(Sweep)
    admit(Settle)
    Sweep.run, Sweep.last, Sweep.line = staticmethod(run), None, ("settle", list(arguments))
    Settle.asked, Settle.status = own, None
    Jobs(command, [*words, f"hydra.sweeper._target_={Settle.__module__}.{Settle.__name__}"])
    assert Settle.status is not None
    return Settle.status


def fair_words(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of `softmoe train -m`: the words without those that make its arms fair, and the words that Hydra gets for these.

    Raises:
        UsageError: an option cannot have that value.
    """
    own, words = own_words(arguments, Fairness)
    if len(words) == len(arguments):
        return words, []
    if own.equal is None and own.tune is None:
        raise UsageError(f"{' '.join(set(arguments) - set(words))} has no effect without equal= or tune=")
    from softmoe_cli.settle.sweeper import Fair

    _refuse_searches(words)
    admit(Fair)
    Fair.asked = own
    return words, [f"hydra.sweeper._target_={Fair.__module__}.{Fair.__name__}"]


def _refuse_searches(words: Sequence[str]) -> None:
    found = next((word for word in words if word.lstrip("+").startswith(("search=", "hydra/sweeper"))), None)
    if found is not None:
        raise UsageError(f"{found} chooses the jobs of a sweep, and so do settle, equal= and tune=; leave one out")


def own_words(arguments: Sequence[str], section: type[F]) -> tuple[F, list[str]]:
    """The options that are a section's own, checked, and the other words.

    Raises:
        UsageError: an option cannot have that value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    keys = {field.name for field in dataclasses.fields(section)}
    own = [word for word in arguments if word.partition("=")[0] in keys and "=" in word]
    tree: dict[str, Any] = load_yaml(conf_folder() / "settle.yaml")
    lists = [key for key, value in tree.items() if isinstance(value, list)]
    for word in own:
        try:
            tree |= tree_of(OmegaConf.from_dotlist([word]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise UsageError(f"cannot read '{word}': {first_line(error)}") from error
    for key in lists:
        if not isinstance(tree[key], list):
            raise UsageError(f"{key}={tree[key]}: write a list, {key}=[VALUE,VALUE]")
    checked = door({key: tree[key] for key in keys}, section)
    typed = {word.partition("=")[0]: word for word in own}
    for key, needed in NEEDS.items():
        if key in typed and getattr(checked, needed) is None:
            raise UsageError(f"{typed[key]} has no effect without {needed}=")
    if checked.tune_trials is not None and importlib.util.find_spec("optuna") is None:
        raise UsageError(
            f"tune_trials={checked.tune_trials} needs Optuna: pip install 'softmoe-cli[optuna]'; or give tune_values="
        )
    if section is Fairness and "baseline" in typed and checked.equal is None and checked.tune is not None:
        raise UsageError(f"{typed['baseline']} has no effect without equal=: tuning measures each arm by itself")
    return checked, [word for word in arguments if word not in own]
