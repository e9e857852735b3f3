"""`softmoe check ROUTER`: runs every check on a router and reports the results. The tests run the same checks."""

import inspect
import os
import sys
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from softmoe_cli import programs
from softmoe_cli.check.laws import (
    DIM,
    FAULTS,
    TOKENS,
    Check,
    Finding,
    NotApplicable,
    Outcome,
    Subject,
    auxiliary_losses,
    batch_independence,
    combine_law,
    compiles,
    cost_formula,
    dispatch_law,
    finite_gradients,
    float32_decisions,
    handing_on,
    no_leakage,
    one_expert,
    padding_is_neutral,
    rebuilt,
    statistics,
    token_permutation,
)
from softmoe_cli.check.official import (
    case_options,
    compare_case,
    is_case_of,
    numbers_of_kinds,
    official_cases,
    read_case,
    tolerance,
    vectors_folder,
)
from softmoe_cli.errors import UsageError, first_line, nearest
from softmoe_cli.model.router import router_class
from softmoe_cli.moe.kind import Decider
from softmoe_cli.options.compose import tree_of
from softmoe_cli.options.conf_files import files, load_yaml


def options_to_check(name: str) -> dict[str, Any]:
    """The options in a router's yaml, or the target of a Python file's one router.

    Raises:
        UsageError: there is no such router, or none to check.
    """
    routers = files("model/router")
    if name in routers:
        options = load_yaml(routers[name])
        if options.get("_target_") is None:
            raise UsageError(f"{name} has no router to check")
        left = router_class(str(options["_target_"])).for_checks
        return options | {key: value for key, value in left.items() if options.get(key) is None}
    path = Path(name)
    if path.suffix != ".py":
        raise UsageError(f"there is no router '{name}'.{nearest(name, routers)} Routers: {', '.join(sorted(routers))}")
    if not path.is_file():
        raise UsageError(f"{name} does not exist")
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module = import_module(path.stem)
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        raise UsageError(f"{name} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    place = getattr(module, "__file__", None)  # a module that is built in has none
    if place is None or Path(place).resolve() != path.resolve():
        raise UsageError(
            f"{name}: Python has another module {path.stem} ({place or 'built in'}), so that no _target_ could name "
            "what is in this file; rename it"
        )
    own = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Decider) and each.__module__ == path.stem
    ]
    concrete = [each for each in own if not inspect.isabstract(each)]
    if len(concrete) != 1:
        names = ", ".join(each.__name__ for each in concrete) or "none"
        raise UsageError(f"{name} must define one subclass of softmoe_cli.moe.routing.Router; it has {names}")
    return {"_target_": f"{path.stem}.{concrete[0].__name__}"}


def official_numbers(subject: Subject) -> Finding:
    """Agreement with the numbers of the official code, in float32 and in float64."""
    every = official_cases()
    cases = [name for name, meta in every.items() if is_case_of(subject.router_class, meta)]
    others = numbers_of_kinds(meta["kind"] for name, meta in every.items() if name not in cases)
    passed_over = f"; not for it: {others}" if others and "SOFTMOE_VECTORS" in os.environ else ""
    if not cases:
        raise NotApplicable(f"there are none for it in {vectors_folder()}{passed_over}")
    meta = every[cases[0]]
    theirs = {"_target_", *case_options(meta)} | (
        {"images_per_group"} if meta["kind"] in ("tc_layer", "ec_layer") else set()
    )
    other = sorted(subject.options.keys() ^ theirs)
    if other:
        raise NotApplicable(f"the router that they are of has other options: {', '.join(other)}{passed_over}")
    worst = 0.0
    for name in cases:
        case = read_case(name)
        for dtype in dict.fromkeys((subject.dtype, torch.float32)):
            for what, got, want in compare_case(subject.router_class, case, dtype):
                absolute, relative = tolerance(what, want, dtype)
                if got.shape != want.shape:
                    return False, f"{name}: {what} is {tuple(got.shape)}, not {tuple(want.shape)}"
                error = (got.double() - want.double()).abs()
                if not bool((error <= absolute + relative * want.double().abs()).all()):
                    return False, f"{name}: {what} is off by {error.max().item():.1e}"
                if dtype == subject.dtype and what in ("y", "y_f32"):
                    worst = max(worst, error.max().item())
    return True, f"{len(cases)} cases, with their options; outputs within {worst:.1e}{passed_over}"


CHECKS: dict[str, Check] = {
    "images do not see each other": no_leakage,
    "batch order and size": batch_independence,
    "token permutation": token_permutation,
    "padding is neutral": padding_is_neutral,
    "one expert is the dense MLP": one_expert,
    "dispatch law": dispatch_law,
    "combine law": combine_law,
    "hands on to the next": handing_on,
    "finite gradients": finite_gradients,
    "float32 under bf16 autocast": float32_decisions,
    "auxiliary losses": auxiliary_losses,
    "cost formula": cost_formula,
    "rebuilt from its options": rebuilt,
    "statistics": statistics,
    "official numbers": official_numbers,
    "compiles in one graph": compiles,
}


def run_check(name: str, subject: Subject) -> Outcome:
    """One check's verdict: pass, fail or n/a."""
    if name in subject.exempt:
        return Outcome(name, "n/a", subject.exempt[name])
    try:
        holds, figure = CHECKS[name](subject)
    except NotApplicable as reason:
        return Outcome(name, "n/a", str(reason))
    except FAULTS as error:
        return Outcome(name, "fail", f"{type(error).__name__}: {first_line(error)}")
    return Outcome(name, "pass" if holds else "fail", figure)


def check_router(options: dict[str, Any]) -> list[Outcome]:
    """Every check of one router.

    Raises:
        UsageError: the router cannot be built for the checks' sizes, or SOFTMOE_VECTORS is not a folder of cases.
    """
    official_cases()
    try:
        subject = Subject(options)
    except UsageError as error:
        raise UsageError(f"{error} (the checks build it for {TOKENS} tokens of width {DIM})") from error
    torch.set_num_threads(1)
    return [run_check(name, subject) for name in CHECKS]


def check_as_typed(name: str, options: Sequence[str]) -> int:
    """Checks the router of that name with its options as KEY=VALUE, and prints the report; 1 if a check failed."""
    chosen = options_to_check(name)
    for word in options:
        try:
            chosen |= tree_of(OmegaConf.from_dotlist([word]))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UsageError(f"cannot read '{word}': {first_line(error)}") from error
    outcomes = check_router(chosen)
    count = Counter(outcome.verdict for outcome in outcomes)
    if programs.listen():
        laws = [{"law": each.name, "verdict": each.verdict, "figure": each.figure} for each in outcomes]
        programs.reply({"router": name, "passed": count["pass"], "failed": count["fail"], "laws": laws})
    else:
        for outcome in outcomes:
            print(f"{outcome.verdict:<5} {outcome.name:<30} {outcome.figure}")
        rest = len(outcomes) - count["pass"] - count["fail"]
        print(f"{name}: {count['pass']} passed, {count['fail']} failed, {rest} not applicable")
    return 1 if count["fail"] else 0
