"""Builds a router, and the layer that it decides for, from its options."""

import inspect
import math
import sys
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from softmoe_cli.config.model import LARGEST_SIZE, Model, check_groups, group_of
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.moe.kind import Decider, Layer
from softmoe_cli.moe.layer import layer_for
from softmoe_cli.moe.routing import Router


def make_router(options: dict[str, Any], dim: int, num_tokens: int, where: str = "model.router") -> Decider:
    """The router that a config's `_target_` names, with the other keys as its arguments.

    The constructor's keyword-only arguments are the schema: unknown, missing and ill-typed keys are errors. Only
    subclasses of `Decider` are ever called; but importing a module runs it, so a name in a checkpoint is compared with
    the known routers before it comes here. `where` errors say that the options stand.
    """
    kind = router_class(str(options["_target_"]), where)
    given = {key: value for key, value in options.items() if key != "_target_"}
    known = {
        name: get_type_hints(kind.__init__).get(name)
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for key, value in given.items():
        if key not in known:
            raise UsageError(
                f"{where}.{key}: {kind.__name__} has no such option.{nearest(key, known)} It has {', '.join(known)}"
            )
        _check_size(f"{where}.{key}", value)
        if _admits(known[key], value):
            continue
        if type(value) is not int or not _admits(known[key], float(value)):
            names = " or ".join(map(_kind, _kinds(known[key])))
            raise UsageError(f"{where}.{key}={value} is of type {type(value).__name__}; it must be {names}")
        given[key] = float(value)
    missing = known.keys() - given.keys()
    if missing:
        raise UsageError(f"{where}.{sorted(missing)[0]} is missing; {kind.__name__} needs it")
    try:
        router = kind(dim, num_tokens, **given)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    except Exception as error:
        if kind.__module__.startswith("softmoe_cli."):
            raise
        raise UsageError(f"{kind.__name__} cannot be made: {type(error).__name__}: {error}") from error
    if router.images_per_group not in (1, group_of(given)):
        raise UsageError(
            f"{kind.__name__}.images_per_group={router.images_per_group} must come from an option of that "
            "name, which says in what groups images are read and divided among devices"
        )
    if isinstance(router, Router) and (rows := router.train_rows(num_tokens)) > LARGEST_SIZE:
        raise UsageError(
            f"{where}: its experts would compute {rows:.3g} rows of an image, and {LARGEST_SIZE} are the most; "
            "choose smaller numbers"
        )
    return router


def _check_size(key: str, value: Any) -> None:
    """Raises UsageError for a number, or a list with one, that no router can have."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and math.isinf(number):
            raise UsageError(f"{key}={value} is not a finite number")
        if isinstance(number, int | float) and number > LARGEST_SIZE:
            raise UsageError(f"{key}={value} is out of range: it must be <= {LARGEST_SIZE}")


def evaluation_group(model: Model) -> int:
    """Images that make full groups for every router that has groups in evaluation too."""
    grouped = [each for each in model.routers if group_of(each) > 1]
    return math.lcm(*(group_of(each) for each in grouped if not router_class(str(each["_target_"])).evaluates_alone))


def check_evaluated(key: str, images: int, model: Model) -> None:
    """Raises UsageError unless an evaluation's batches of so many images are whole groups."""
    check_groups(key, images, evaluation_group(model))


def make_layer(
    options: dict[str, Any],
    dim: int,
    hidden: int,
    num_tokens: int,
    *,
    gelu: str,
    identical: bool,
    where: str = "model.router",
) -> Layer:
    """The layer that a config's router decides for, in the place of an MLP from `dim` to `hidden` units and back.

    Raises:
        UsageError: as `make_router`, or a layer that cannot be of this width.
    """
    router = make_router(options, dim, num_tokens, where)
    try:
        return layer_for(router, dim, hidden, gelu=gelu, identical=identical)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: one, or several of a union."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _admits(annotation: Any, value: Any) -> bool:
    for kind in _kinds(annotation):
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return True
        elif get_origin(kind) is list:
            item = get_args(kind)[0]
            number = float | int if item is float else item
            if type(value) is list and all(_admits(number, each) for each in value):
                return True
        elif kind in (None, Any) or type(value) is (get_origin(kind) or kind):
            return True
    return False


def _kind(annotation: Any) -> str:
    if annotation is NoneType:
        return "null"
    if get_origin(annotation) is list:
        return f"list of {_kind(get_args(annotation)[0])}"
    return " or ".join(map(str, get_args(annotation))) if get_origin(annotation) is Literal else annotation.__name__


def router_class(target: str, where: str = "model.router") -> type[Decider]:
    """The class that a `_target_` names.

    Raises:
        UsageError: there is none, or it is no router.
    """
    module, _, name = target.rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a router of one's own is a file in the working folder
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{where}._target_={target} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Decider)):
        raise UsageError(f"{where}._target_={target} is not a subclass of softmoe_cli.moe.routing.Router")
    return found
