"""The sets of a mix, as one types them in data.sets: names, or options; and what follows from them."""

import math
from collections.abc import Callable
from typing import Any

from softmoe_cli.config.data import EXEMPLARS, MIX_NAME, OF_A_SET
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.options.conf_files import files, laid

OF_LABELS = ("class", "classes", "labels", "label_range", "tasks")
"""What one might type in order to make tasks of the classes of one set."""


def spell_sets(tree: dict[str, Any]) -> None:
    """In a composed configuration, replaces data.sets by all options of each set, by the sets' names in alphabetical
    order; and where nothing else is typed takes channels, classes and size from them.

    Raises:
        UsageError: there is no such set, or one is named twice.
    """
    data = tree.get("data")
    if not isinstance(data, dict):
        return
    if data.get("temperature") == math.inf:
        data["temperature"] = "inf"  # no number in JSON
    if isinstance(data.get("sets"), str | int | float) and data["sets"] != "???":
        raise UsageError(f"data.sets={data['sets']} is no list; write data.sets=[{data['sets']},OTHER]")
    if data.get("name") == MIX_NAME and data.get("format") is None and data.get("sets") in (None, "???", []):
        raise UsageError(
            "data=mix does not say of what; name its sets: data.sets=[digits,fashion_mnist] (softmoe evaluate and "
            "extract take a checkpoint's own mix where no data= is typed)"
        )
    if isinstance(data.get("sets"), dict) and not all(
        isinstance(own, dict) and own.keys() >= {*OF_A_SET} - {"root"} for own in data["sets"].values()
    ):  # those of a checkpoint have all options
        first = next(iter(data["sets"]), "digits")
        raise UsageError(
            f"data.sets={{{first}: …}} is a mapping; write a list, each set's options with data=NAME among them: "
            f"data.sets=[{{data: {first}, …}}, OTHER]"
        )
    if not isinstance(data.get("sets"), list):
        return
    sets: dict[str, Any] = {}
    for entry in data["sets"]:
        options = _spelt_out(entry)
        if options["name"] in sets:
            way = "" if options["format"] is None else "; give each its own name, as {data: folder, name: site_a, …}"
            raise UsageError(f"data.sets names {options['name']} twice, and a set is one task{way}")
        sets[options["name"]] = options
    data["sets"] = {name: sets[name] for name in sorted(sets)}  # the same sets in another order are the same mix
    of_each: dict[str, Callable[[list[int]], int]] = {"channels": max, "num_classes": sum, "image_size": max}
    for key, of_all in of_each.items():
        if data.get(key) == "???":
            data[key] = of_all([each[key] for each in sets.values()])


def _spelt_out(entry: Any) -> dict[str, Any]:
    given = {"data": entry} if isinstance(entry, str) else entry
    known = files("data")
    if not isinstance(given, dict) or "data" not in given:
        raise UsageError(f"data.sets: {entry} names no set; write a name, or its options with data=NAME among them")
    name = given["data"]
    if name == MIX_NAME:
        raise UsageError("data.sets names a mix; a mix is of sets alone: name the sets of both mixes in one list")
    if name == EXEMPLARS:
        raise UsageError(
            "data.sets names exemplars; a mix is of sets as they are: name the set that they are taken from"
        )
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"data.sets: there is no set '{name}'.{nearest(str(name), known)}")
    file = laid("data", name)
    own = {key: value for key, value in given.items() if key != "data"}
    for key in own:
        if key in OF_LABELS:
            raise UsageError(
                f"data.sets, {name}: {key} would make a task of some of a set's classes; which class an image has is "
                "what the model is asked for, so that such a task is not known when it is used; a task is a set"
            )
        if key not in OF_A_SET:
            raise UsageError(f"data.sets, {name}: a set has no {key} of its own.{nearest(key, OF_A_SET)}")
    if file.get("from_file"):
        raise UsageError(f"data.sets, {name}: its images are read from their files, and those of a mix from memory")
    if file["format"] is None and own.get("name", file["name"]) != file["name"]:
        raise UsageError(f"data.sets, {name}: a set that softmoe knows keeps its name; leave out name={own['name']}")
    options = {key: (file | own)[key] for key in OF_A_SET if key != "root" or "root" in own}
    options["name"] = str(options["name"])
    for key in ("num_classes", "image_size"):
        if type(options[key]) is not int:
            raise UsageError(f"data.sets, {options['name']}: say {key}, which a mix must know before it reads a file")
    return options
