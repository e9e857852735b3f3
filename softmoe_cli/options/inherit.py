"""What a checkpoint decides of a configuration: the model, the pixels, which images are held out, whose code runs."""

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from softmoe_cli.config.adapter import no_adapter
from softmoe_cli.config.data import DATA_FORMATS, OF_A_SET, OF_THE_MIX, Data
from softmoe_cli.config.model import Model
from softmoe_cli.config.option import absent_keys
from softmoe_cli.config.run import Config
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.options.compose import door, names, overlay, say_once
from softmoe_cli.options.trust import require_trust, router_targets, targets

if TYPE_CHECKING:
    from softmoe_cli.run.header import Source


def resolve(command: str, tree: dict[str, Any], typed: Sequence[str]) -> "tuple[Config, Source | None]":
    """What `softmoe train` or `finetune` would run: the checked configuration and the weights to start from.

    Raises:
        UsageError: it cannot work.
    """
    if command == "train":
        checked = door(tree, Config)
        refuse_idle_pruning(checked, typed)
        if checked.slots != "kept":
            raise UsageError(f"slots={checked.slots} belongs to softmoe finetune: there is no checkpoint to keep to")
        if checked.prune.keep is not None:
            raise UsageError(
                f"prune.keep={checked.prune.keep} belongs to softmoe finetune; train with model.router.num_experts="
                f"{checked.prune.keep} instead"
            )
        for key in ("checkpoint", "base", "trust"):
            if (value := getattr(checked, key)) is not None:
                raise UsageError(f"{key}={value} belongs to softmoe finetune; softmoe train starts afresh")
        if checked.model.adapter.name != "none":
            raise UsageError(
                f"adapter={checked.model.adapter.name} belongs to softmoe finetune: adapters stand beside a trained "
                "backbone, and softmoe train starts afresh"
            )
        return checked, None
    if not tree["checkpoint"]:
        raise UsageError(
            "softmoe finetune needs checkpoint=: a run folder, a .safetensors file, hf-hub:OWNER/NAME, timm:NAME or "
            "vmoe:PATH"
        )
    source = described_by_timm(named_source(tree["checkpoint"], tree["base"]), tree["model"])
    from softmoe_cli.model.weights import experts_left, proportional_slots

    checked = _from(tree, source, typed)
    require_own(tree, source)
    if checked.model.adapter.name != "none" and experts_left(source.weights):
        raise UsageError(
            f"adapter={checked.model.adapter.name}: checkpoint={source.label} still holds the experts that were "
            f"pruned, which adapters would keep; first softmoe prune checkpoint={source.label}"
        )
    require_same_tasks(checked.model, source)
    if checked.slots == "proportional":
        for key in ("model.router.slots_per_expert", "model.router.capacity_factor"):
            if names(key, typed):
                raise UsageError(f"slots=proportional and {key} both say how many slots there are; leave one out")
        if "model" not in source.card:
            raise UsageError(f"slots=proportional: checkpoint={source.label} does not say how many slots it has")
        kept = door(source.card["model"], Model)
        checked.model.router |= {"slots_per_expert": proportional_slots(kept, checked.model)}
    return checked, source


def resolved_early(command: str, tree: dict[str, Any], typed: Sequence[str]) -> "tuple[Config, Source | None] | None":
    """What `resolve` would return, without the weights and so without torch, where the checkpoint's file says enough of
    itself; else None.

    Raises:
        UsageError: it cannot work.
    """
    if command == "train":
        return resolve(command, tree, typed)
    checkpoint = tree["checkpoint"]
    plain_file = isinstance(checkpoint, str) and checkpoint and not checkpoint.startswith(("hf-hub:", "timm:", "vmoe:"))
    if not plain_file or tree["base"] is not None or tree["slots"] != "kept":
        return None
    from softmoe_cli.run.header import read_header

    source = read_header(checkpoint)
    return None if source is None else (_from(copy.deepcopy(tree), _told(source), typed), source)


def _from(tree: dict[str, Any], source: "Source", typed: Sequence[str]) -> Config:
    """The configuration of a run that begins with these weights, checked but for what they are."""
    take_model(tree, source, typed)
    checked = door(tree, Config)
    refuse_idle_pruning(checked, typed)
    return checked


def require_same_tasks(model: Model, source: "Source") -> None:
    """Raises UsageError where a checkpoint's routers decide for other tasks than the data have."""
    theirs = source.card.get("model", {}).get("tasks")
    same = theirs == model.tasks and list(theirs or {}) == list(model.tasks or {})  # their order is the routers'
    if theirs and not same and any("num_tasks" in each for each in model.routers):
        own = ", ".join(model.tasks) if model.tasks else "one and no name for it"
        raise UsageError(
            f"checkpoint={source.label} routes by its tasks, {', '.join(theirs)}, and the data have {own}; softmoe "
            f"extract checkpoint={source.label} task=NAME makes a model of one of them, which other data can finetune"
        )


def refuse_idle_pruning(config: Config, typed: Sequence[str]) -> None:
    """Raises UsageError where options of pruning are typed, and nothing says how many experts are to stay. A sweep's
    control says that all do: prune.keep=null."""
    idle = [word for word in typed if word.lstrip("+").startswith("prune.")]
    if config.prune.keep is None and idle and not names("prune.keep", typed):
        raise UsageError(
            f"{idle[0]} has no effect without prune.keep, which says how many experts stay in each block; add it, as "
            "null for a control, or leave this out"
        )


def named_source(
    checkpoint: str, base: str | None = None, check: "Callable[[Source], None]" = lambda _: None
) -> "Source":
    """Reads what `checkpoint=` names, and of a delta, which `check` sees by itself, its base; says so where every
    weight's name has the same prefix, which is left out.

    Raises:
        UsageError: nothing usable there.
    """
    from softmoe_cli.run.sealed import require_there

    if not checkpoint.startswith(("hf-hub:", "timm:", "vmoe:")):
        require_there(checkpoint)  # before torch is imported
    from softmoe_cli.model.pretrained import read_checkpoint

    source = _told(read_checkpoint(checkpoint, base, check))
    if source.prefix:
        say_once(f"checkpoint={source.label}: every name in it begins with '{source.prefix}'; read without that")
    if source.assumed:
        say_once(f"checkpoint={source.label}: {source.assumed}")
    return source


def _told(source: "Source") -> "Source":
    """The source; says so where it is not a run's last checkpoint."""
    if source.damaged:
        say_once(f"checkpoint={source.label} is taken, as newer ones are damaged: {source.damaged}")
    return source


def source_of_layers(checkpoint: str, command: str) -> "Source":
    """`named_source` for a command that changes a model's layers, which takes none with adapters.

    Raises:
        UsageError: nothing usable there, or a model with adapters; of those no base is read.
    """
    return named_source(checkpoint, check=lambda source: _refuse_adapters(source, command))


def cut_from(tree: dict[str, Any], command: str, timm: str) -> "tuple[Source, Model]":
    """The checkpoint of a command that makes another one of a part of it, and its model. `timm`: why it is none of
    timm's own.

    Raises:
        UsageError: none is named, nothing usable there, or a model whose layers cannot be changed.
    """
    if tree["checkpoint"] == "???":
        raise UsageError(
            f"softmoe {command} needs checkpoint=: a run folder, a .safetensors file, hf-hub:OWNER/NAME or vmoe:PATH"
        )
    if tree["checkpoint"].startswith("timm:"):
        raise UsageError(f"checkpoint={tree['checkpoint']} is timm's own and {timm}")
    source = source_of_layers(tree["checkpoint"], command)
    return source, model_of(source, tree["trust"])


class Request(NamedTuple):
    """What was typed, with what a checkpoint decides of it: the command's options, the name of the model that it makes,
    and what tells the settings that a receipt has, from the images too."""

    config: Any
    name: str
    settings: Callable[[], dict[str, Any]]


def made_before(what: str, tree: dict[str, Any], asked: "Callable[[Source], Request | None]") -> dict[str, Any] | None:
    """The receipt, with its folder, of what a command has made before of the same checkpoint with the same settings;
    said, from files alone. None where nothing was, or where torch is needed to know.

    `what` has happened to the model (pruned). A mistake is left to whoever makes it, in the order there.
    """
    checkpoint, made = tree["checkpoint"], Path(tree["folder"] or Path(tree["output_root"], what))
    if not made.exists() or checkpoint == "???" or checkpoint.startswith(("hf-hub:", "timm:", "vmoe:")):
        return None
    from softmoe_cli.data.contents import must_fetch
    from softmoe_cli.run.header import read_header
    from softmoe_cli.run.receipt import already_made, folder_of
    from softmoe_cli.terminal import Screen

    with contextlib.suppress(UsageError):
        source = read_header(checkpoint)
        if source is None or "model" not in source.card or (known := asked(source)) is None:
            return None
        if must_fetch(known.config.data):
            return None
        settings = known.settings()
        folder = folder_of(what, known.config, known.name, source, settings)
        found = already_made(folder, source, settings, clock=getattr(known.config, "clock", False))
        if found is not None:
            Screen().say(f"{folder} holds this already; nothing to do")
            return found | {"folder": str(folder)}
    return None


def described_by_timm(source: "Source", model: Any) -> "Source":
    """The source, with the card of timm's model where it has none and that is named (`model.backbone.timm`)."""
    backbone = model.get("backbone") if isinstance(model, dict) else None
    name = backbone.get("timm") if isinstance(backbone, dict) else None
    if "model" in source.card or name in (None, "???"):
        return source
    from softmoe_cli.model.pretrained import timm_card

    return dataclasses.replace(source, card=timm_card(name))


def take_model(tree: dict[str, Any], source: "Source", typed: Sequence[str]) -> None:
    """Fills in the checkpoint's model and pixel normalisation, except where something else was typed."""
    card, label = source.card, source.label
    if "model" not in card and (not isinstance(tree["model"], dict) or tree["model"].get("image_size") == "???"):
        raise UsageError(f"checkpoint={label} does not say what model it is; name one with model=")
    own = dict(card.get("model", {"adapter": dataclasses.asdict(no_adapter())}))
    own.pop("tasks", None)  # they follow the data
    _check_adapter(own["adapter"], tree["model"], label)
    chosen = tree["model"] if isinstance(tree["model"], dict) else {}
    blocks: Any = chosen.get("blocks")
    blocks = blocks if isinstance(blocks, dict) else {}
    whole = {block: router for block, router in blocks.items() if "_target_" in router}  # with all its options
    by_word = any(names(key, typed) for key in ("model", "model/router", "model.router._target_"))
    own_words = targets({"router": chosen.get("router") if by_word else None, "blocks": whole})
    tree["model"] = overlay(own, tree["model"])
    for block, router in whole.items():  # no change of the checkpoint's
        tree["model"]["blocks"][block] = router
    require_trust(tree["model"], source, tree.get("trust"), own_words)
    take_pixels(tree["data"], card.get("data", {}), typed)
    keep_cut(tree["data"], card.get("data", {}), typed)


def require_own(tree: dict[str, Any], source: "Source") -> None:
    """Raises UsageError where the weights of a checkpoint of ours are not those of the model that it describes."""
    if "classes" in source.card:  # ours, not timm's
        same = router_targets(tree["model"]) == router_targets(source.card["model"])
        _described(source, source.card["model"]["router"] if same else {"_target_": None})


def _check_adapter(own: dict[str, Any], model: Any, label: str) -> None:
    """Raises UsageError where a checkpoint has adapters and others are chosen: there is one set in a model."""
    chosen: dict[str, Any] = (model.get("adapter") if isinstance(model, dict) else None) or {}
    others = [key for key, value in chosen.items() if value not in ("???", own[key])]
    if own["name"] != "none" and others:
        raise UsageError(
            f"checkpoint={label} has adapters ({own['name']}), and model.adapter.{others[0]}={chosen[others[0]]} is "
            "not theirs; leave adapter out to train them further, or start from what they belong to"
        )


def _refuse_adapters(source: "Source", command: str) -> None:
    name = source.card.get("model", {}).get("adapter", {}).get("name", "none")
    if name == "none":
        return
    way = f"softmoe {command} takes what they belong to, and softmoe finetune adapters beside the result"
    if name == "lora":
        way = f"first softmoe export checkpoint={source.label}, which adds them up, then take the folder that it makes"
    elif "base" in source.card:
        way = way.replace("what they belong to", f"what they belong to, {source.card['base']['checkpoint']}")
    raise UsageError(f"checkpoint={source.label} has adapters ({name}), which softmoe {command} does not know; {way}")


def model_of(source: "Source", trusted: str | None) -> Model:
    """The model that a checkpoint describes, once its weights are found to be of that model.

    Raises:
        UsageError: the checkpoint describes no model, or one that cannot be built, or only the checkpoint names its
            router.
    """
    if "model" not in source.card:
        raise UsageError(f"checkpoint={source.label} does not say what model it is; softmoe saved no such file")
    require_trust(source.card["model"], source, trusted)
    return _described(source, source.card["model"]["router"])


def _described(source: "Source", router: dict[str, Any]) -> Model:
    """The model of the checkpoint's card with this router, compared with the weights before anything is built."""
    from softmoe_cli.model.weights import require_described

    try:
        model = door(source.card["model"] | {"router": dict(router)}, Model)
    except UsageError as error:
        raise UsageError(f"checkpoint={source.label} says that it is a model that cannot be: {error}") from error
    require_described(source, model)
    return model


def names_data(data: Any) -> bool:
    """Whether the command line names a data set."""
    return isinstance(data, dict) and data.get("name", "???") != "???"


def check_here(data: Data, source: "Source") -> None:
    """Raises UsageError where the set would have to be downloaded although only the checkpoint names it."""
    from softmoe_cli.data.sets import is_here

    if not is_here(data):
        mixed = data.sets is not None or source.card["data"].get("sets")
        way = "name the folder that has it with data.root=" if mixed else f"add data={data.name}"
        raise UsageError(
            f"checkpoint={source.label} names data={data.name}, which is not in data.root={data.root}; only a set that "
            f"is typed is fetched: {way}"
        )


def data_said(source: "Source", *, named: bool) -> dict[str, Any]:
    """What a checkpoint says of its data, but for the place of decoded images, which nobody typed. Where another set is
    `named`, nothing of what only a mix or exemplars have."""
    left_out = {"cache", *(absent_keys(Data) if named else ())}
    return {key: value for key, value in source.card.get("data", {}).items() if key not in left_out}


def take_data(tree: dict[str, Any], source: "Source", typed: Sequence[str]) -> None:
    """Fills in the checkpoint's data set. Where another set was named, only its mean and deviation of pixels."""
    named = names_data(tree["data"])
    base = data_said(source, named=named)
    if not named and "name" not in base:
        raise UsageError(f"checkpoint={source.label} names no images; choose some with data=")
    tree["data"] = overlay(base, tree["data"])
    if tree["data"]["image_size"] == "auto":
        own = same_set(tree["data"], source.card["data"])
        tree["data"]["image_size"] = (source.card["data"] if own else source.card["model"])["image_size"]
    if named:
        take_pixels(tree["data"], source.card["data"], typed)
        keep_cut(tree["data"], source.card["data"], typed)


def take_pixels(data: dict[str, Any], card: dict[str, Any], typed: Sequence[str]) -> None:
    """Fills in the mean and deviation of pixels that a checkpoint was trained with, unless others are typed."""
    known = _said_of(data, card)
    for key in ("mean", "std"):
        if key in known and not names(f"data.{key}", typed):
            data[key] = known[key]


def _said_of(data: dict[str, Any], card: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's card says of data: where it is of a mix, of that set in it which has their name. Nothing
    where it does not know such a set, or where the data are a mix, whose sets speak for themselves."""
    if data.get("sets") not in (None, "???"):
        return card if same_set(data, card) else {}
    if not card.get("sets"):
        return card
    own = card["sets"].get(data.get("name"))
    return {} if own is None else {key: card[key] for key in OF_THE_MIX if key in card} | own


def take_task(tree: dict[str, Any], source: "Source", typed: Sequence[str], *, named: bool) -> None:
    """Where a task is named: takes that set of the checkpoint's mix as the data, with what is typed of it, or, where
    other images are `named`, its mean and deviation of pixels.

    Raises:
        UsageError: the checkpoint knows no such task, or nobody says which one the images are of, or where no set of
            the mix would look a root is typed.
    """
    tasks, task, data = source.card["model"].get("tasks"), tree["task"], tree["data"]
    mix = data.get("sets") not in (None, "???")
    if not tasks:
        if task is not None or mix:
            word = f"task={task}" if task is not None else "data=mix"
            raise UsageError(f"{word}: checkpoint={source.label} knows one task, which has no name; leave it out")
        return
    if task is None and not (mix and same_set(data, source.card["data"])):
        raise UsageError(
            f"checkpoint={source.label} knows the tasks {', '.join(tasks)}, and an image of an unknown task has no "
            "answer: say task=NAME for other images, or nothing for its own"
        )
    if task is None:
        _check_mix_root(data, typed)
        return
    if task not in tasks:
        raise UsageError(
            f"task={task}: checkpoint={source.label} knows the tasks {', '.join(tasks)}.{nearest(str(task), tasks)}"
        )
    if named and mix:
        raise UsageError(f"task={task}: the images of one task are one set; leave out data=mix, or name a set")
    own = source.card["data"]["sets"][task]
    if named:
        tree["data"] |= {key: own[key] for key in ("mean", "std") if not names(f"data.{key}", typed)}
        return
    common = {key: data[key] for key in OF_THE_MIX}
    own = own | {key: data[key] for key in OF_A_SET if names(f"data.{key}", typed)}
    none = {"class_numbers": False, "from_file": False, **dict.fromkeys(absent_keys(Data))}
    tree["data"] = common | own | none | {"cache": data.get("cache")}  # none of a mix, but it may be typed


def _check_mix_root(data: dict[str, Any], typed: Sequence[str]) -> None:
    """Raises UsageError where data.root is typed although each set that has files has a root of its own."""
    own = {name: each["root"] for name, each in data["sets"].items() if "root" in each}
    if own and names("data.root", typed) and own.keys() >= data["sets"].keys() - {"digits"}:
        name, root = next(iter(own.items()))
        raise UsageError(
            f"data.root={data['root']} has no effect, as each set of the mix has its own, such as {name} {root}; say "
            f"task={name} with it, or name the sets with their places: data=mix data.sets=[…]"
        )


def keep_cut(data: dict[str, Any], card: dict[str, Any], typed: Sequence[str]) -> None:
    """The checkpoint's own set is cut as it was for the checkpoint, unless typed otherwise: another cut would have
    images that were trained on among those that are held out. So is the set that the checkpoint's exemplars are of."""
    card = _said_of(data, card)
    if "name" not in card or data["test_fraction"] == 1:  # all of it is for evaluation
        return
    if card.get("source") is not None and data.get("source") is None:
        own = card["source"]
        card = card | {"name": own, "format": own if own in DATA_FORMATS else None, "source": None}
    other = {key: card[key] for key in CUT_KEYS if key in card and data[key] != card[key]}
    other = {key: value for key, value in other.items() if not names(f"data.{key}", typed)}
    words = " ".join(f"data.{key}={value}" for key, value in other.items())
    if other and same_set(data, card):
        data |= other
        said = f"cut as for the checkpoint: {words}"
    elif other and data.get("name") == card["name"] and data.get("format") == card.get("format"):
        said = (
            f"data.root={data['root']} is not the checkpoint's {card['root']}, so it is cut anew; if these are the "
            f"images that it was trained on, add {words}"
        )
    else:
        return
    if os.environ.get("RANK", "0") == "0":
        say_once(said)


def take_backbone(model: dict[str, Any], source: "Source", typed: Sequence[str]) -> None:
    """Fills in the checkpoint's backbone and image size, for an upcycling that chooses router, blocks and experts only.

    Raises:
        UsageError: something else was typed, or the checkpoint has a router already.
    """
    if names("model.expert_init", typed):
        raise UsageError(
            "model.expert_init has no effect here: experts start as copies; see expert_noise, expert_redraw"
        )
    own = source.card.get("model")
    if own is None:
        if model["image_size"] == "???":
            raise UsageError(
                f"checkpoint={source.label} does not say what model it is; name timm's with "
                "model.backbone.timm=NAME, or one of ours with model="
            )
        return
    if own["router"]["_target_"] is not None:
        raise UsageError(
            f"checkpoint={source.label} has a router already ({own['router']['_target_']}); use a dense one"
        )
    chosen = model["backbone"]
    free = ("name", "drop_path", "pos_std", "init")  # settings that trained weights do not depend on
    for key, value in own["backbone"].items():
        if str(chosen[key]).startswith("${suits:"):  # follows the images, and so the checkpoint
            chosen[key] = value
        if key not in free and chosen[key] not in ("???", value):
            raise UsageError(
                f"the backbone chosen has {key}={chosen[key]}, but checkpoint={source.label} has {key}={value} "
                f"({own['backbone']['name']}); choose only model/router=, model.moe_blocks= and the router's options"
            )
        if key == "name":
            chosen[key] = value
    if not names("model.image_size", typed):
        model["image_size"] = own["image_size"]
    model["in_chans"] = own["in_chans"]


CUT_KEYS = ("split_seed", "test_fraction", "validation_fraction")
"""Keys of data that say which images are held out."""


def same_set(data: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both name the same images: one data set, and where it is read from files, one place."""
    if any(data.get(key) != other.get(key) for key in ("name", "format", "source")):
        return False
    if data.get("sets") not in (None, "???"):
        return _sets(data) == _sets(other)
    of_files = data.get("format") is not None or data.get("source") in DATA_FORMATS
    return not of_files or Path(data["root"]).resolve() == Path(other["root"]).resolve()


def _sets(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The sets of a mix without what is no image: where they lie, and how often the mix draws from them."""
    return [{key: value for key, value in own.items() if key != "root"} for own in (data.get("sets") or {}).values()]
