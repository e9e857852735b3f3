"""The rows of a run: what each key says, declared once, and how every reader takes rows from their files.

A file may be cut, edited by hand, or written by another program. A value that contradicts the declaration of its key is
named, with the reason, and only its own run is left out.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmoe_cli.text import printable, shortened

Row = dict[str, Any]
FORMAT = 1
"""The format of metrics.jsonl, routing.jsonl and result.json: every row says it, and a row of another format is not
read."""


# --- what a value may be ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What a key may hold, in words, and the test of whether a value is that."""

    said: str
    holds: Callable[[Any], bool]


def number(value: Any) -> bool:
    """Whether a value is a number that can be squared and divided by: a fourth power of it is still within float64."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or 1e-50 <= abs(value) <= 1e50


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _count(value: Any) -> bool:
    return _whole(value) and value > 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _path(value: Any) -> bool:
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


YES_NO = Kind("true or false", lambda value: isinstance(value, bool))
TEXT, PATH, LIST = Kind("text", _text), Kind("a path", _path), Kind("a list of words", _texts)
NUMBER, WHOLE, COUNT = Kind("a number", number), Kind("a whole number", _whole), Kind("a whole number above 0", _count)


# --- what each key says -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One key of a row.

    Attributes:
        kind: what it holds.
        title: what tables and charts call it, with the unit that the row has it in.
        meaning: what it says, where the title does not.
        null: it may be null.
        optional: it may be missing.
        unit: of the number in the row, a part of the title.
        better: `higher` or `lower` of a quality.
        curve: of a quality, its key in the validation rows.
        guesses: of an accuracy, how many guesses it allows.
        amount: of a cost, what it is an amount of.
        axis: of a cost, whether rows hold it as it grows, so that curves are drawn and compared against it.
        trained: of a cost, whether it grows with training, and so lacks what a checkpoint had cost.
        clocked: of a cost, whether it depends on the machine, so that it is compared on one machine only.
    """

    kind: Kind
    title: str = ""
    meaning: str = ""
    null: bool = False
    optional: bool = False
    unit: str = ""
    better: str = ""
    curve: str = ""
    guesses: int = 0
    amount: str = ""
    axis: bool = False
    trained: bool = False
    clocked: bool = False


def _said(kind: Kind, meaning: str, *, null: bool = False, optional: bool = False) -> Key:
    return Key(kind, meaning=meaning, null=null, optional=optional)


def _quality(title: str, better: str, curve: str, guesses: int = 0) -> Key:
    unit = "%" if title.endswith("%") else ""
    return Key(NUMBER, title, unit=unit, better=better, curve=curve, guesses=guesses)


def _statistic(meaning: str) -> Key:
    return Key(NUMBER, meaning=meaning, optional=True)


FORMAT_KEY = {"format": _said(COUNT, "of the row: its keys and what they say")}
SPENT = {
    "train_pflop": Key(NUMBER, "training PFLOP", unit="PFLOP", amount="training FLOPs", axis=True, trained=True),
    "device_s": Key(NUMBER, "training s", "seconds of training, summed over devices", unit="s", amount="training time",
                    axis=True, trained=True, clocked=True),
    "landed_pflop": Key(NUMBER, "training PFLOP, landed", "train_pflop without the rows of experts that held no "
                        "token", optional=True, unit="PFLOP",
                        amount="training FLOPs that landed", trained=True),
    "eval_s": Key(NUMBER, "evaluation s", unit="s", amount="evaluation time", clocked=True),
    "save_s": Key(NUMBER, "saving s", unit="s", amount="saving time", clocked=True),
    "compile_s": Key(NUMBER, "compilation s", unit="s", amount="compilation time", clocked=True),
    "load_s": _said(NUMBER, "seconds of training and compilation that the first process waited for images",
                    optional=True),
    "energy_kj": Key(NUMBER, "energy, kJ", "of the devices, where they tell", optional=True, unit="kJ", amount="energy",
                     trained=True, clocked=True),
}  # fmt: skip
"""What a run has cost so far: in every row, and in the result."""
EVERY = {
    **FORMAT_KEY,
    "step": _said(NUMBER, "updates so far"),
    "images": Key(NUMBER, "training images", "images so far", amount="training images", axis=True, trained=True),
    "epoch": _said(NUMBER, "images so far over images of the training part"),
    "split": _said(TEXT, "what the row is of: train, validation or test"),
    **SPENT,
}
"""Any row of metrics.jsonl. In charts these have the same name in all splits."""
TRAIN = {
    "loss": _said(NUMBER, "mean over updates since the row before, without the auxiliary loss"),
    "aux_loss": _said(NUMBER, "mean auxiliary loss of the routers over the same updates"),
    "lr": _said(NUMBER, "learning rate of the last update"),
    "grad_norm": _said(NUMBER, "of the last update, before clipping; null where that was not made", null=True),
    "images_per_s": _said(NUMBER, "images of all updates so far over the seconds of training"),
}
"""Keys beside EVERY in rows of split train."""
LOOK = {
    "top1_pct": _quality("validation top-1, %", "higher", "top1_pct", 1),
    "top5_pct": _quality("validation top-5, %", "higher", "top5_pct", 5),
    "loss": _quality("validation loss", "lower", "loss"),
    "nll": _quality("validation NLL", "lower", "nll"),
    "ece_pct": _quality("validation calibration error, %", "lower", "ece_pct"),
    "images_evaluated": _said(COUNT, "images that were looked at"),
}
"""Keys beside EVERY in rows of split validation or test; their titles are those of the validation rows, which curves
are made of. Validation rows have `routing_NAME` for each NAME of ROUTING, its mean over layers, and FEWSHOT."""
FEWSHOT = "fewshot_{}_top1_pct"
"""In validation rows, and in results after `validation_`, for each number of `train.fewshot`."""
TASK_QUALITY = "task_{}_{}"
"""Of a mix, for each task by its name, `top1_pct` and `nll`: in rows of split validation or test, and in results, there
of the validation images after `validation_`."""
OVER_TASKS = "mean_over_tasks_{}"
"""The mean of that over tasks, each of which counts once; under the plain name stands the mean over images."""
OF_TASKS = tuple(key.partition("{")[0] for key in (TASK_QUALITY, OVER_TASKS))
"""How both begin."""
TASK_EPOCHS = "task_{}_epochs"
"""In results: how often training has seen each task's training images."""
EXPERTS_LEFT = "experts_left_block_{}"
"""In rows of metrics.jsonl, for each block of experts of a finetuning that prunes them; beside it `forward_gflop`, what
a forward pass takes with those."""
ROUTING = {
    **FORMAT_KEY,
    "step": _said(NUMBER, "updates so far"),
    "block": _said(WHOLE, "which of the model's blocks the row is of"),
    "beside": _said(TEXT, "of adapters their sublayer, or head; an MoE layer's row has none", optional=True),
    "utilisation": _statistic("share of slots that hold a token; empty ones are computed all the same"),
    "dropped_share": _statistic("share of tokens that no expert saw"),
    "dead_share": _statistic("share of experts with less than a hundredth of the mean load"),
    "load_max": _statistic("the busiest expert's load over the mean"),
    "effective_experts_share": _statistic("exp(entropy of the loads) / experts: 1 when all are used alike"),
    "gate_mean": _statistic("mean over tokens of the sum of their gates (sparse routers)"),
    "ffn_share": _statistic("share of choices that are of experts with an MLP (zero_computation)"),
    "constant_share": _statistic("the same of constant experts (zero_computation)"),
    "copy_share": _statistic("the same of copy experts (zero_computation)"),
    "zero_share": _statistic("the same of zero experts (zero_computation)"),
    "ffn_dropped_share": _statistic("share of choices of MLPs that training's capacity drops (zero_computation)"),
    "constant_dropped_share": _statistic("the same of constant experts (zero_computation)"),
    "copy_dropped_share": _statistic("the same of copy experts (zero_computation)"),
    "zero_dropped_share": _statistic("the same of zero experts (zero_computation)"),
    "ffn_per_token": _statistic("MLPs that compute a token, mean over tokens (zero_computation)"),
    "ffn_per_token_std": _statistic("their standard deviation over tokens (zero_computation)"),
    "zero_gate": _statistic("zero experts' share in a token's softmax, mean over tokens (zero_computation)"),
    "logit_variance": _statistic("variance of a token's logits over experts, mean over tokens (zero_computation)"),
    "dispatch_max": _statistic("a slot's largest share of one token, mean over slots (soft)"),
    "dispatch_min": _statistic("a slot's smallest share of one token, mean over slots (soft)"),
    "combine_max": _statistic("a token's largest share of one slot, mean over tokens (soft)"),
    "combine_min": _statistic("a token's smallest share of one slot, mean over tokens (soft)"),
    "slot_cosine_min": _statistic("how alike the slots' parameters are: the least alike pair (soft)"),
    "slot_cosine_mean": _statistic("how alike the slots' parameters are: the mean over pairs (soft)"),
    "slot_cosine_max": _statistic("how alike the slots' parameters are: the most alike pair (soft)"),
    "scale": _statistic("the learned scale of the logits; near 1 the routing is still almost uniform (soft)"),
    "coefficient_entropy": _statistic("entropy of a token's coefficients in nats, mean over tokens (muMoE)"),
    "coefficient_zeros": _statistic("share of coefficients that are exactly zero (muMoE)"),
    "coefficient_max": _statistic("a token's largest coefficient, mean over tokens (muMoE)"),
    "specialist_share": _statistic("share of experts that have half of some token or more (muMoE)"),
    "task_overlap": _statistic("experts that two tasks share over all that they take, mean over pairs (tasks)"),
    "task_changes": _statistic("tasks that take other experts than at the look before (tasks)"),
    "task_gate_max": _statistic("a task's largest gate before any is divided, mean over tasks (task_choice)"),
}  # fmt: skip
"""A row of routing.jsonl. Which statistics there are is the router's; one of your own may have others. A finetuning
that prunes experts has a row there for each block and window, with `window` and what it decided. Of routers that decide
for tasks it has `task_experts`: the experts of each task by its name."""
RESULT = {
    **FORMAT_KEY,
    "metrics_rows": _said(COUNT, "rows of metrics.jsonl when the run ended"),
    "metrics_sha256": _said(TEXT, "SHA-256 of metrics.jsonl then, so that a later change is noticed"),
    "name": _said(TEXT, "of the run's folder"),
    "signature": _said(TEXT, "ten hex digits of all that decides the numbers"),
    "study": _said(TEXT, "the folder that holds the run"),
    "command": _said(TEXT, "train or finetune"),
    "checkpoint": _said(TEXT, "what the run began with", null=True),
    "seed": _said(WHOLE, "of everything random"),
    "backbone": _said(TEXT, "the ViT's name"),
    "router": _said(TEXT, "the router's name, or dense"),
    "num_experts": _said(WHOLE, "of a layer", null=True),
    "slots_per_expert": _said(WHOLE, "of an expert in one group of images", null=True),
    "slots_per_token": _said(NUMBER, "slots of a layer over tokens", null=True),
    "images_per_group": _said(WHOLE, "images whose tokens compete for the same slots", null=True),
    "moe_blocks": _said(TEXT, "the blocks that hold experts"),
    "adapter": _said(TEXT, "what was trained beside a frozen backbone", null=True, optional=True),
    "image_size": _said(COUNT, "pixels of a side"),
    "tokens": _said(COUNT, "of an image"),
    "data": _said(TEXT, "the data set's name"),
    "train_images": _said(COUNT, "images of the training part"),
    "test_images": _said(COUNT, "images of the test part"),
    "test_is_cut": _said(YES_NO, "whether they are cut by data.split_seed", optional=True),
    "classes": _said(COUNT, "classes of the data set"),
    "chance_pct": _said(NUMBER, "share of the test images that are of their commonest class"),
    "top1_pct": _quality("test top-1, %", "higher", "top1_pct", 1),
    "top5_pct": _quality("test top-5, %", "higher", "top5_pct", 5),
    "loss": _quality("test loss", "lower", "loss"),
    "nll": _quality("test NLL", "lower", "nll"),
    "ece_pct": _quality("test calibration error, %", "lower", "ece_pct"),
    "validation_top1_pct": _quality("validation top-1, %", "higher", "top1_pct", 1),
    "validation_loss": _quality("validation loss", "lower", "loss"),
    "best_validation_top1_pct": _quality("best validation top-1, %", "higher", "top1_pct", 1),
    "best_step": _said(WHOLE, "updates after which that was reached"),
    "train_pflop": SPENT["train_pflop"],
    "landed_pflop": SPENT["landed_pflop"],
    "landed_share": _said(NUMBER, "share of the tokens' choices in training that an MLP has computed", optional=True),
    "nominal_share": _said(NUMBER, "the same when the load is as even as the router aims at", optional=True),
    "device_s": SPENT["device_s"],
    "forward_gflop": Key(NUMBER, "forward GFLOP/image", unit="GFLOP", amount="forward FLOPs"),
    "train_gflop": Key(NUMBER, "training GFLOP/image", unit="GFLOP", amount="training FLOPs an image"),
    "remark": _said(TEXT, "what the router says of its last look; empty: nothing", optional=True),
    "params_m": Key(NUMBER, "parameters, M", unit="M", amount="parameters"),
    "trained_params_m": Key(
        NUMBER, "trained parameters, M", "all that are not frozen", optional=True, unit="M", amount="trained parameters"
    ),
    "trained_body_params_m": Key(
        NUMBER,
        "trained parameters without the head, M",
        optional=True,
        unit="M",
        amount="trained parameters outside the head",
    ),
    "active_params_m": Key(NUMBER, "active parameters, M", unit="M", amount="active parameters"),
    "experts_left": _said(
        TEXT, "in each block of experts, where some were pruned or could be", null=True, optional=True
    ),
    "served_as": _said(
        TEXT,
        "dense or experts: what softmoe prune makes of what is left; task: one of several, by softmoe extract",
        null=True,
        optional=True,
    ),
    "served_params_m": Key(
        NUMBER,
        "served parameters, M",
        "of that; the mean over tasks",
        optional=True,
        unit="M",
        amount="served parameters",
    ),
    "served_forward_gflop": Key(
        NUMBER,
        "served forward GFLOP/image",
        "of that; the mean over tasks",
        optional=True,
        unit="GFLOP",
        amount="served forward FLOPs",
    ),
    "peak_mib": Key(NUMBER, "peak memory, MiB", "predicted", unit="MiB", amount="peak memory"),
    "images": Key(WHOLE, "training images", amount="training images", axis=True, trained=True),
    "epochs": Key(NUMBER, "epochs", amount="epochs", trained=True),
    "steps": Key(WHOLE, "updates", amount="updates", trained=True),
    **{key: SPENT[key] for key in ("eval_s", "save_s", "compile_s", "load_s", "energy_kj")},
    "batch_size": _said(COUNT, "images of an update"),
    "lr": _said(NUMBER, "the highest learning rate"),
    "precision": _said(TEXT, "of the arithmetic"),
    "fp32_is_faster": _said(YES_NO, "whether float32 would have been, on this hardware", optional=True),
    "devices": _said(COUNT, "that trained together"),
    "parallel": _said(TEXT, "how several devices shared the model", null=True),
    "hardware": _said(TEXT, "what the run ran on"),
    "torch": _said(TEXT, "its version"),
    "softmoe": _said(TEXT, "its version"),
    "commit": _said(TEXT, "of a checkout, -dirty where it had changes", null=True),
    "python": _said(TEXT, "its version"),
    "checkpoint.train_pflop": _said(NUMBER, "what training the checkpoint had cost", null=True),
    "checkpoint.digest": _said(TEXT, "of the checkpoint's weights", null=True),
    "checkpoint.origin": _said(TEXT, "equal for checkpoints that differ by seed and cut only", null=True),
    "data.identity": _said(TEXT, "of the images, where the settings do not say it", null=True),
    "data.num_classes": _said(COUNT, "as it is set", null=True),
    "train.loss": _said(TEXT, "as it is set"),
    "model.router._target_": _said(TEXT, "the router's class", null=True),
}
"""result.json. Beside these it has every setting that decides the numbers, under its own key."""

QUALITIES = {key: each for key, each in RESULT.items() if each.better}
COSTS = {key: each for key, each in RESULT.items() if each.amount}
CURVES = {key: each for key, each in LOOK.items() if each.better}
AXES = tuple(key for key, each in COSTS.items() if each.axis)

LOOKED = {
    **FORMAT_KEY,
    "time": _said(NUMBER, "when, in seconds since 1970"),
    "quality": _said(TEXT, "the main measure"),
    "margin": _said(NUMBER, "within which groups are equal", null=True),
    "runs": _said(LIST, "the signatures of the runs that were shown together"),
}
"""A row of looks.jsonl, which lies in the folder of a study: what softmoe compare has shown of it."""
JOB = {"run": _said(TEXT, "the job's name"), "folder": _said(PATH, "its run's, from the sweep's")}
"""A job in jobs.json."""
FAILED_FILE = "failed.json"
FAILURE = {"reason": _said(TEXT, "why a job failed")}
"""NN.json beside a sweep's log, and FAILED_FILE in a run's folder."""


# --- how rows are read ------------------------------------------------------------------------------------------------


MOST_BYTES = 2**24
"""The largest file of one row that is read: softmoe writes none as large, and a larger one could take all memory."""
MOST_LINES_BYTES = 2**31
"""The largest file with a row on each line that is read."""


class Unreadable(ValueError):
    """A file that is there and does not hold what it should; the message goes on from the file's name."""


def of_tasks(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What a row says of each task by its name: `top1_pct`, `nll` or `epochs`."""
    first, last = TASK_QUALITY.format("\0", key).split("\0")
    return {name[len(first) : -len(last)]: value for name, value in row.items()
            if name.startswith(first) and name.endswith(last)}  # fmt: skip


def fault(row: Mapping[str, Any], keys: Mapping[str, Key]) -> str:
    """What is wrong with the first key that is not as declared; empty where all are."""
    if "format" in keys and (type(row.get("format")) is not int or row["format"] != FORMAT):
        given = shortened(printable(repr(row["format"])), 40) if "format" in row else "none"
        return f"has format {given}, and this softmoe reads format {FORMAT}"
    for name, key in keys.items():
        if name not in row:
            if not key.optional:
                return f"has no {name}"
            continue
        value = row[name]
        if not (value is None and key.null) and not key.kind.holds(value):
            return f"says {name} is {shortened(printable(repr(value)), 40)}, which is not {key.kind.said}"
    return ""


def metrics_digest(metrics: bytes) -> Row:
    """What a result says of its metrics.jsonl, so that a later change of that file is noticed."""
    return {"metrics_rows": metrics.count(b"\n"), "metrics_sha256": hashlib.sha256(metrics).hexdigest()}


def contents(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: a folder, a pipe (which would be waited for), a file without permission or beyond `most` bytes.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise Unreadable("is no file")
        if found.st_size > most:
            raise Unreadable(f"is larger than {most / 2**20:g} MiB")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error


def parsed(text: bytes, *, finite: bool = False) -> Any:
    """JSON; with `finite` no number in it may be beyond what floats hold, which takes longer to see.

    Raises:
        Unreadable: anything else, NaN and infinity by name included.
    """
    try:
        return json.loads(text, parse_float=_finite if finite else None, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is truncated or damaged ({error})" if text else "is empty") from error


def _finite(text: str) -> float:
    """What softmoe writes is finite: anything else is damage."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def printed(value: Any) -> Any:
    """The value with every word in it made printable, names of keys too."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [printed(each) for each in value]
    if isinstance(value, dict):
        return {printable(key): printed(each) for key, each in value.items()}
    return value


def row(path: Path, keys: Mapping[str, Key]) -> Row:
    """A file that is one JSON object with these keys.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: the file is no such object.
    """
    parsed_row = parsed(contents(path), finite=True)
    if not isinstance(parsed_row, dict):
        raise Unreadable("is no row of softmoe")
    wrong = fault(parsed_row, keys)
    if wrong:
        raise Unreadable(wrong)
    return parsed_row


def lines(path: Path, keys: Mapping[str, Key]) -> list[Row]:
    """A file of JSON objects, one a line, each with these keys.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: one of its lines is no such object.
    """
    parsed_rows = []
    for place, line in enumerate(contents(path, MOST_LINES_BYTES).splitlines(), 1):
        try:
            row = parsed(line)
        except Unreadable as error:
            raise Unreadable(f"is damaged in line {place}: it {error}") from error
        wrong = fault(row, keys) if isinstance(row, dict) else "is no row of softmoe"
        if wrong:
            raise Unreadable(f"is damaged in line {place}: it {wrong}")
        parsed_rows.append(row)
    return parsed_rows


def jobs(path: Path) -> tuple[list[str], list[Row]]:
    """The command line that was typed and the jobs, from a sweep's jobs.json.

    Raises:
        FileNotFoundError, Unreadable: there is none, or it is damaged; the message says which job.
    """
    sweep_row = row(path, {"command": _said(TEXT, "train, finetune or settle", optional=True)})
    job_rows, typed = sweep_row.get("jobs"), sweep_row.get("typed") or []
    if not isinstance(job_rows, list):
        raise Unreadable("has no list of jobs")
    if not isinstance(typed, list) or not all(isinstance(word, str) for word in typed):
        raise Unreadable("says typed is no list of words")
    for place, job in enumerate(job_rows):
        wrong = fault(job, JOB) if isinstance(job, dict) else "is no row"
        if wrong:
            raise Unreadable(f"is damaged: job {place} {wrong}")
    command = sweep_row.get("command") or "train"
    return ["softmoe", command, *([] if command == "settle" else ["-m"]), *typed], job_rows


def charted(row: Row) -> Row:
    """A row as charts of other programs name it: train/loss, validation/top1_pct; what every row has keeps its name."""
    said = {key: value for key, value in row.items() if key not in ("format", "split") and value is not None}
    return {key if key in EVERY else f"{row['split']}/{key}": value for key, value in said.items()}
