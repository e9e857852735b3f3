"""Forty damaged files of other programs: each is named with the reason, and the whole ones are compared."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from softmoe_cli.compare.others import tables
from softmoe_cli.compare.others.tables import csv_lines
from tests.compare.others.runs import HERE, events, offline, table, timm_runs
from tests.synthetic import asked

Damage = Callable[[bytes], bytes]


def cut(share: float) -> Damage:
    return lambda data: data[: int(len(data) * share)]


def flipped(place: int) -> Damage:
    """One bit of one byte is another."""
    return lambda data: data[: place % len(data)] + bytes([data[place % len(data)] ^ 4]) + data[place % len(data) + 1 :]


def replaced(old: str, new: str) -> Damage:
    def damage(data: bytes) -> bytes:
        assert old.encode() in data
        return data.replace(old.encode(), new.encode(), 1)

    return damage


def instead(data: bytes) -> Damage:
    return lambda _: data


BINARY = bytes(range(256)) * 8
EVENTS: dict[str, tuple[Damage, str]] = {
    "empty": (instead(b""), "is empty"),
    "within a length": (cut(0.0013), "is cut short after 0 bytes"),
    "within a record": (cut(0.5), "is cut short"),
    "one byte less": (lambda data: data[:-1], "is cut short"),
    "a bit of a length": (flipped(3), "checksum of a length"),
    "a bit of a length's checksum": (flipped(9), "checksum of a length"),
    "a bit of the first record": (flipped(15), "checksum of a record"),
    "a bit in the middle": (flipped(300), "checksum"),
    "a bit of the last checksum": (flipped(-2), "checksum of a record"),
    "binary": (instead(BINARY), "checksum of a length"),
    "words": (instead(b"epoch,acc\n0,0.5\n" * 4), "checksum of a length"),
    "a length beyond the file": (instead(struct.pack("<Q", 2**40) + b"\xff" * 40), "checksum of a length"),
}
WANDB: dict[str, tuple[Damage, str]] = {
    "empty": (instead(b""), "is empty"),
    "a head alone": (lambda data: data[:7], "has no end"),
    "killed": (cut(0.4), "is cut short"),
    "one byte less": (lambda data: data[:-1], "is cut short"),
    "a bit of the head": (flipped(1), "is no file of W&B's"),
    "a bit of a checksum": (flipped(8), "a checksum does not fit"),
    "a bit of a length": (flipped(12), "checksum does not fit|cut short"),
    "a bit of a kind": (flipped(13), "checksum does not fit"),
    "a bit in the middle": (flipped(1200), "a checksum does not fit"),
    "a bit of the end": (flipped(-1), "a checksum does not fit"),
    "binary": (instead(BINARY), "is no file of W&B's"),
    "JSON": (instead(b'{"acc": 1}'), "is no file of W&B's"),
}
TIMM: dict[str, tuple[str, Damage, str]] = {
    "no epoch": ("summary.csv", lambda data: data[: data.index(b"\n") + 1], "has no epoch yet"),
    "empty": ("summary.csv", instead(b""), "summary.csv is empty"),
    "cut in a line": ("summary.csv", lambda data: data[: data.rindex(b",")], "is cut short: line 4 has"),
    "cut in the last number": ("summary.csv", lambda data: data[:-3], "its last line has no end"),
    "binary": ("summary.csv", instead(BINARY), "damaged summary.csv or args.yaml"),
    "zero bytes": ("summary.csv", replaced("1,", "\0,"), "holds zero bytes"),
    "no number": ("summary.csv", replaced("\n1,", "\nx,"), "epoch is no number in line 3"),
    "goes back": ("summary.csv", replaced("\n2,", "\n0,"), "goes back to epoch 0 in line 4"),
    "another table": ("summary.csv", instead(b"a,b\n1,2\n"), "has no column epoch"),
    "arguments cut": ("args.yaml", lambda data: data[: data.index(b"mean") + 5] + b"\n- [", "is no YAML"),
    "arguments of code": ("args.yaml", instead(b"a: !!python/name:os.system\n"), "is no YAML of plain values"),
    "arguments too deep": ("args.yaml", instead(b"a: " + b"[" * 5000 + b"]" * 5000), "nested too deeply"),
    "seed in words": ("args.yaml", replaced("seed: 0", "seed: zero"), "says seed is 'zero', which is not a whole"),
}
TABLES: dict[str, tuple[str, Damage, str]] = {
    "empty": ("x.csv", instead(b""), "is empty"),
    "a head alone": ("x.csv", lambda data: data[: data.index(b"\n") + 1], "has no row under its head"),
    "no text": ("x.csv", instead(b"\xff\xfe" + BINARY), "is no text in UTF-8"),
    "zero bytes": ("x.csv", replaced("soft", "so\0t"), "holds zero bytes"),
    "an open quote": ("x.csv", replaced("soft", '"soft'), "truncated or damaged"),
    "a name twice": ("x.csv", replaced("hours", "acc"), "has two columns acc"),
    "a line cut": ("x.csv", lambda data: data[: data.rindex(b",0.")], "has 2 values under 4 names"),
    "a seed that is none": ("x.csv", replaced("soft,1,", "soft,1.5,"), "says seed is 1.5, which is not a whole number"),
    "no number": ("x.csv", replaced("soft,1,0.", "soft,1,nan"), "not a number"),
    "no JSON": ("x.json", cut(0.5), "is truncated or damaged"),
    "JSON of numbers": ("x.json", instead(b"[1, 2, 3]"), "is no object with names and values"),
    "JSON of words": ("x.json", instead(b'"acc"'), "is no list of rows"),
    "JSON too deep": ("x.json", instead(b"[" * 100_000), "is truncated or damaged"),
}


def test_forty_and_more() -> None:
    assert len(EVENTS) + len(WANDB) + len(TIMM) + len(TABLES) >= 40


def named(folder: Path, whole: int, reason: str, *more: Path, **question: object) -> None:
    """One place is left out for the reason, and so many runs are compared."""
    comparison = asked(folder, *more, **question)
    assert sum(len(each.runs) for each in comparison.groups) == whole
    ((_, told),) = comparison.left_out
    assert any(each in told for each in reason.split("|")), told


@pytest.mark.parametrize("kind", EVENTS)
def test_events(tmp_path: Path, kind: str) -> None:
    damage, reason = EVENTS[kind]
    folder = events(tmp_path)
    (file,) = (folder / "soft" / "seed1").glob("events*")
    shutil.rmtree(folder / "soft" / "seed1" / "chosen")
    file.write_bytes(damage(file.read_bytes()))
    named(folder, 5, reason, map=("quality=test/acc*100",))


@pytest.mark.parametrize("kind", WANDB)
def test_wandb(tmp_path: Path, kind: str) -> None:
    damage, reason = WANDB[kind]
    folder = offline(tmp_path)
    file = folder / "run-soft0001.wandb"
    file.write_bytes(damage(file.read_bytes()))
    named(folder, 5, reason, map=("quality=test/acc*100",))


@pytest.mark.parametrize("kind", TIMM)
def test_timm(tmp_path: Path, kind: str) -> None:
    name, damage, reason = TIMM[kind]
    folder = timm_runs(tmp_path)
    file = folder / "vit_tiny_patch16_224-0" / name
    file.write_bytes(damage(file.read_bytes()))
    named(folder, 5, reason, cost="epochs")


@pytest.mark.parametrize("name", ["args.yaml", "summary.csv"])
def test_a_timm_folder_without_one_of_its_files(tmp_path: Path, name: str) -> None:
    folder = timm_runs(tmp_path)
    (folder / "vit_tiny_patch16_224-0" / name).unlink()
    named(folder, 5, f"has no {name}", cost="epochs")


@pytest.mark.parametrize("kind", TABLES)
def test_tables(tmp_path: Path, kind: str) -> None:
    """A whole table beside the damaged one; where a row is damaged, the others of its table are compared."""
    name, damage, reason = TABLES[kind]
    good, bad = table(tmp_path), table(tmp_path, name)
    if name.endswith("json"):
        bad.write_text(json.dumps([{"arm": "soft", "run_seed": 7, "acc": 0.9}]))
    bad.write_bytes(damage(bad.read_bytes()))
    kept = {"a line cut": 5, "a seed that is none": 5, "no number": 5}.get(kind, 0)
    maps = ("quality=acc*100,seed=run_seed",)
    comparison = asked(good, bad, map=maps)
    told = [why for _, why in comparison.left_out if not why.startswith("the same run as")]
    assert told and all(any(each in why for each in reason.split("|")) for why in told), told
    doubles = sum(why.startswith("the same run as") for _, why in comparison.left_out)
    assert sum(len(each.runs) for each in comparison.groups) + doubles == 6 + kept


@pytest.mark.parametrize("to", ["nowhere", "itself"])
@pytest.mark.parametrize("name", ["run-x.wandb", "events.out.tfevents.1.host"])
def test_links_that_lead_to_no_file(tmp_path: Path, name: str, to: str) -> None:
    folder = offline(tmp_path) if name.endswith(".wandb") else events(tmp_path)
    place = folder if name.endswith(".wandb") else folder / "soft" / "seed1"
    if place != folder:
        shutil.rmtree(place / "chosen")
    (place / name).symlink_to(name if to == "itself" else "nowhere")
    reason = "a link that leads nowhere" if to == "nowhere" else "(Too many levels of symbolic links)"
    named(folder, 6 if place == folder else 5, reason, map=("quality=test/acc*100",))


def test_a_table_of_history_whose_runs_have_no_names(tmp_path: Path) -> None:
    good = table(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps([{"_step": i, "run": [1], "acc": 0.9} for i in range(2)]))
    maps = ("quality=acc*100,seed=run_seed,run=run",)
    named(good, 6, "has a row whose run is a list", tmp_path / "x.json", map=maps)


def test_an_export_of_the_public_api_without_a_history(tmp_path: Path) -> None:
    rows = [{"config": {"seed": i}, "summary": {"acc": 90}, "history": None} for i in range(3)]
    odd = [{"config": None, "summary": {"acc": 91}}, {"acc": 90}, {"config": {}, "summary": [1], "history": None}]
    (tmp_path / "api.json").write_text(json.dumps([*rows, *odd]))
    comparison = asked(tmp_path / "api.json", map=("quality=acc",))
    assert sorted(run.row["top1_pct"] for each in comparison.groups for run in each.runs) == [90, 90, 90, 91]
    assert [place.rpartition(" ")[2] for place, _ in comparison.left_out] == ["5", "6"]
    assert all("is no run as the others" in reason for _, reason in comparison.left_out)


def test_large_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many columns would take minutes if each were looked for among the others."""
    names = [f"c{i}" for i in range(40_000)]
    head, _ = csv_lines(",".join(names) + "\n")
    assert head == names
    monkeypatch.setattr(tables, "MOST_ROWS", 6)
    good, large = table(tmp_path), table(tmp_path, "x.csv")
    large.write_text(large.read_text() + "soft,7,0.9,1\n")
    named(good, 6, "has 7 rows, and no more than 6 are read", large, map=("quality=acc*100,seed=run_seed",))


def test_a_failed_run_of_wandb_is_none(tmp_path: Path) -> None:
    """The last record says how the run ended."""
    from wandb.proto import wandb_internal_pb2

    from tests.wandb_file import records

    kinds = [each.WhichOneof("record_type") for each in records(HERE / "offline" / "run-soft0001.wandb")]
    assert kinds.count("exit") == 1
    import zlib

    record = wandb_internal_pb2.Record()
    record.exit.exit_code = 3
    text = record.SerializeToString()
    body = bytes([1]) + text
    framed = zlib.crc32(body).to_bytes(4, "little") + len(text).to_bytes(2, "little") + body
    folder = offline(tmp_path)
    (folder / "run-soft0001.wandb").write_bytes(b":W&B\xe1\xbe\0" + framed)
    named(folder, 5, "failed (exit status 3)", map=("quality=test/acc*100",))
