"""Several processes train the same model as one process would: the same batches, numbers and files."""

import contextlib
import json
import os
import re
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.layers import DropPath
from torch import Tensor
from torch.distributed.elastic.rendezvous import RendezvousParameters

from softmoe_cli.config.run import WAYS, Config
from softmoe_cli.cost import fit
from softmoe_cli.cost.fit import _first_that_fits, obstacle
from softmoe_cli.cost.load import Load
from softmoe_cli.cost.memory import Memory, predict
from softmoe_cli.data import batches as data_batches
from softmoe_cli.data import contents, sets
from softmoe_cli.data.contents import identity
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.launch import devices
from softmoe_cli.launch.devices import Loopback, Note, cause
from softmoe_cli.moe.divided import span
from softmoe_cli.moe.routing import noise_like, whole_batch
from softmoe_cli.parallel import Crew, Lost, Turns, WholeBatchDropPath, _contact, largest_share
from softmoe_cli.run.budget import configured_budget
from softmoe_cli.run.sealed import piece_files
from softmoe_cli.train import setup
from softmoe_cli.train.setup import images_identity
from tests.conftest import TINY, thinned
from tests.data.trees import write_tree
from tests.oracles import compose
from tests.processes import Started, torchrun
from tests.runs import CLOCKS, last, rows, the_run

HOW = {"devices", "parallel", "hardware", "peak_mib", "commit"}
"""Keys of a result that say how it was computed."""
EVERYTHING = (
    "train.steps=50", "train.batch_size=20", "train.accumulate=2", "train.eval_batch_size=48", "train.ema=0.9",
    "train.fewshot=[1]", "augment.mixup=0.2", "augment.crop=resized", "augment.randaugment=[1,5]", "augment.erase=0.3",
    "model.backbone.drop_path=0.2", "train.log_every=1", "train.eval_every=25",
)  # fmt: skip
"""Every random option, sizes that no number of processes divides, and evaluations whose last batch is short."""
CPU = torch.device("cpu")


def start(folder: Path, size: int, *arguments: str, dtype: str = "float64") -> list[Started]:
    """The processes that `torchrun --nproc-per-node=SIZE -m softmoe_cli train ARGUMENTS` would start."""
    return [
        Started(folder, ["train", *TINY, "threads=1", *arguments], environment, f"{rank}.txt", dtype)
        for rank, environment in enumerate(torchrun(size))
    ]


def finish(processes: list[Started], code: int = 0) -> list[str]:
    ended = [process.wait() for process in processes]
    assert [left for left, _ in ended] == [code] * len(ended), "\n".join(out for _, out in ended)
    return [out for _, out in ended]


def split(row: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers of a row, and the rest; seconds, and how many processes there were, are left out."""
    kept = {key: value for key, value in row.items() if key not in CLOCKS | HOW}
    numbers = {key: value for key, value in kept.items() if isinstance(value, int | float)}
    return numbers, {key: value for key, value in kept.items() if key not in numbers}


def alike(a: Path, b: Path, tolerance: float) -> None:
    """Every row, weight, moment and random state."""
    results = [[json.loads((run / "result.json").read_text())] for run in (a, b)]
    files = [[rows(run, path.name) for run in (a, b)] for path in sorted(a.glob("*.jsonl"))]
    for these, those in [results, *files]:
        for x, y in zip(these, those, strict=True):
            (numbers, rest), (expected, other) = split(x), split(y)
            if tolerance > 1e-6:  # rounding may decide about an image
                assert numbers.keys() == expected.keys()
                numbers.pop("best_step", None), expected.pop("best_step", None)
                for key in [key for key in numbers if key.endswith(("top1_pct", "top5_pct", "ece_pct"))]:
                    assert numbers.pop(key) == pytest.approx(expected.pop(key), abs=1)
            assert numbers == pytest.approx(expected, rel=tolerance, abs=tolerance)
            assert rest == other
    for file in ("model.safetensors", "training.safetensors"):
        found, wanted = (load_file(last(run) / file) for run in (a, b))
        assert found.keys() == wanted.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, wanted[key], rtol=tolerance, atol=tolerance)


@pytest.mark.long
@pytest.mark.parametrize(
    ("router", "size", "ways", "options"),
    [
        ("experts_choice", 2, ("ddp", "fsdp"), ("model.router.noise_std=1", "optim.freeze=[blocks.0.*]")),
        pytest.param(
            "tokens_choice",
            4,
            ("expert",),
            (
                "model.router.noise_std=1", "model.router.images_per_group=2", "model.router.bias_rate=0.01",
                "model.router.load_weight=0",
                "model.router.num_experts=6", "train.recompute=true",
            ),
            marks=pytest.mark.thorough,
        ),
        ("tokens_choice_dropless", 2, ("expert",), ("train.steps=5", "model.router.num_experts=3")),
        pytest.param(
            "mumoe_cp", 2, ("ddp", "fsdp"), ("train.accumulate=1", "train.recompute=true"),
            marks=pytest.mark.thorough,
        ),
        pytest.param("mumoe_tr", 2, ("ddp", "fsdp"), ("train.accumulate=1",), marks=pytest.mark.thorough),
        pytest.param(
            "experts_choice", 2, ("ddp", "fsdp"),
            ("train.accumulate=1", "model.head=mumoe_tr", "model.head_experts=2", "model.head_norm=batch"),
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "zero_computation", 2, ("ddp", "fsdp", "expert"),
            ("model.moe_blocks=every_1", "model.router.images_per_group=2", "train.recompute=true"),
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "zero_computation", 2, ("expert",),
            ("model.moe_blocks=every_1", "model.router.num_experts=3", "model.router.capacity_factor=null"),
            marks=pytest.mark.thorough,
        ),
    ],
)  # fmt: skip
def test_the_numbers_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, router: str, size: int, ways: tuple[str, ...], options: tuple[str, ...]
) -> None:
    line = (*EVERYTHING, "train.steps=12", "train.eval_every=6", f"model/router={router}", *options)
    in_runs = router == "tokens_choice_dropless" or "model.router.capacity_factor=null" in options
    dtype, tolerance = ("", 1e-5) if in_runs else ("float64", 1e-10)
    alone = start(tmp_path / "alone", 1, *line, dtype=dtype)
    for way in ways:
        together = start(tmp_path / way, size, *line, f"parallel={way}", dtype=dtype)
        outs = finish(together)
        assert [bool(out) for out in outs] == [True, *[False] * (size - 1)], f"only the first one speaks {outs[1:]}"
        assert f"({way})" in outs[0]
    finish(alone)
    for way in ways:
        alike(the_run(tmp_path / "alone"), the_run(tmp_path / way), tolerance)
        result = json.loads((the_run(tmp_path / way) / "result.json").read_text())
        assert (result["devices"], result["parallel"]) == (size, way) and result["hardware"].startswith(f"{size} x ")
        budget = configured_budget(the_run(tmp_path / way) / "config.yaml")
        assert budget.devices == size, "by which softmoe status divides the seconds of a run that goes on"


@pytest.mark.long
@pytest.mark.parametrize("parts", thinned([[(2, 1, "fsdp")], [(4, 3, "fsdp"), (2, 0, "expert")]], 1))
def test_some_stop_fewer_go_on_one_ends(parts: list[tuple[int, int, str]], tmp_path: Path) -> None:
    """A signal to any one of the processes stops all at the same step; resuming works whatever part of the model each
    had."""
    line = (*EVERYTHING, "model.router.noise_std=0.5")
    whole = start(tmp_path / "whole", 1, *line)
    seen = 0
    for size, asked, way in parts:
        processes = start(tmp_path / "parts", size, *line, f"parallel={way}")
        while sum(file.stat().st_size for file in tmp_path.glob("parts/outputs/*/*/metrics.jsonl")) <= seen:
            assert not processes[0].ended
            time.sleep(0.01)
        processes[asked].send(signal.SIGTERM)
        assert "stopped by SIGTERM" in finish(processes, 130)[0]
        assert len(piece_files(last(the_run(tmp_path / "parts")) / "model.safetensors")) == size
        seen = (the_run(tmp_path / "parts") / "metrics.jsonl").stat().st_size
    assert "going on from step" in finish(start(tmp_path / "parts", 1, *line))[0]
    finish(whole)
    alike(the_run(tmp_path / "whole"), the_run(tmp_path / "parts"), 1e-10)


def workers(launcher: int) -> list[int]:
    """The processes that train: descendants, each at the head of a process group."""
    parents: dict[int, int] = {}
    groups: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        pid = int(path.parent.name)
        try:
            _, parent, group, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parents[pid], groups[pid] = int(parent), int(group)

    def below(pid: int) -> bool:
        return pid in parents and (parents[pid] == launcher or below(parents[pid]))

    return sorted(pid for pid in parents if below(pid) and groups[pid] == pid)


def test_no_other_machine_reaches_where_processes_meet() -> None:
    """`devices=2` listens on 127.0.0.1 alone, and what is left of an earlier round does not count."""
    meeting = Loopback(RendezvousParameters(Loopback.BACKEND, "", "run", 1, 1))
    listening = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    every = [line.split() for line in Path("/proc/self/net/tcp6").read_text().splitlines()[1:]]
    first, second = meeting.next_rendezvous(), meeting.next_rendezvous()
    info = first.bootstrap_store_info
    assert info is not None and info.master_addr == "127.0.0.1"
    port = f"{info.master_port:04X}"
    assert [line[1] for line in listening if line[1].endswith(f":{port}") and line[3] == "0A"] == [f"0100007F:{port}"]
    assert not [line for line in every if line[1].endswith(f":{port}")]
    first.store.set("x", "1")
    assert not second.store.check(["x"]) and first.store.get("x") == b"1"


def test_processes_need_not_read_the_images_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `softmoe train devices=2` has read to know whether the run is finished, it tells them."""
    told: list[dict[str, str]] = []

    def process(*given: Any) -> dict[int, int]:
        told.append(given[3])
        (Path(given[4]) / devices.ENDED_IN).write_text("run")
        return {0: 0, 1: 0}

    monkeypatch.setattr(devices, "start_server", lambda _: None)
    monkeypatch.setattr(devices, "elastic_launch", lambda *_: process)
    words = ("data=folder", f"data.root={write_tree(tmp_path)}", "data.image_size=8", "devices=2")
    config = compose(*words)
    identity(config.data)
    devices.launch(config, "train")
    monkeypatch.setenv(contents.KNOWN, told[0][contents.KNOWN])
    monkeypatch.setattr(contents, "_known", {})
    monkeypatch.setattr(contents, "_pictures", lambda _: pytest.fail("read again"))
    identity(config.data)


def listened(pid: int) -> set[str]:
    """The addresses on which a process, and those that it started, listen."""
    found = set()
    for each in [pid, *workers(pid)]:
        with contextlib.suppress(OSError):
            sockets = {os.readlink(link) for link in Path(f"/proc/{each}/fd").iterdir()}
            for kind in ("tcp", "tcp6"):
                for line in Path(f"/proc/{each}/net/{kind}").read_text().splitlines()[1:]:
                    words = line.split()
                    if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                        found.add(words[1].partition(":")[0])
    return found


@pytest.mark.long
@pytest.mark.thorough
def test_a_killed_process(tmp_path: Path) -> None:
    """`devices=2`: killed once, all start again from the last checkpoint; killed again, all end and say so. The same
    command, with one process, ends as if nothing had been."""
    line = ("train.steps=200", "train.save_seconds=0", "train.log_every=1", "model.router.noise_std=0.1")
    alone = start(tmp_path / "alone", 1, *line, dtype="")
    launcher = Started(
        tmp_path / "killed", ["train", *TINY, "threads=1", *line, "devices=2", "restarts=1"],
        {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "1"}, own_server=True,  # of a job's script: not for these
    )  # fmt: skip
    seen = 0
    for _ in range(2):
        rows_file = tmp_path / "killed" / "outputs"
        while sum(file.stat().st_size for file in rows_file.glob("*/*/metrics.jsonl")) <= seen:
            assert not launcher.ended, launcher.wait()[1]
            time.sleep(0.01)
        victims = workers(launcher.pid)
        assert len(victims) == 2
        assert listened(launcher.pid) == {"0100007F"}  # 127.0.0.1
        os.kill(victims[1], signal.SIGKILL)
        while victims[1] in workers(launcher.pid):
            time.sleep(0.01)
        seen = sum(file.stat().st_size for file in rows_file.glob("*/*/metrics.jsonl")) + 500
    code, out = launcher.wait()
    assert code == 1 and "restart 1 of 1" in out and "going on from step" in out, out
    assert re.search("process [01] of 2 was killed", out) and "type the same command to go on" in out, out
    assert not any(Path(f"/proc/{pid}").exists() for pid in victims)
    finish(start(tmp_path / "killed", 1, *line, dtype=""))
    finish(alone)
    alike(the_run(tmp_path / "alone"), the_run(tmp_path / "killed"), 1e-4)


def test_one_process_of_a_machine_reads_what_images_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = compose().data
    read: list[str] = []

    def identity(_: object) -> str:
        read.append("here")
        return "a"

    monkeypatch.setattr(setup, "identity", identity)
    second = Crew(rank=1, size=4, local_rank=1, local_size=2)
    monkeypatch.setattr(Crew, "gather", lambda _, own: [own, "a", None, "a"])
    assert images_identity(settings, second) == "a" and not read
    assert images_identity(settings, Crew(size=4, local_size=2)) == "a" and read == ["here"]
    monkeypatch.setattr(Crew, "gather", lambda _, own: [own, None, "b", None])
    with pytest.raises(UsageError, match="holds other images on one machine than on another"):
        images_identity(settings, Crew(size=4, local_size=2))
    monkeypatch.setattr(Crew, "gather", lambda _, own: [own, None])
    assert images_identity(settings, second) is None, "embedded sets are the same everywhere"


def load(config: Config) -> Load:
    return Load.of(config, 10, CPU)


def test_memory_of_each_of_several_processes() -> None:
    """Each process has a quarter of the batch's activations; gradients exist from the start, and twice while parts add
    up."""
    whole = compose("model/backbone=vit_nano4", "data=fashion_mnist", "train.batch_size=64")
    quarter = compose("model/backbone=vit_nano4", "data=fashion_mnist", "train.batch_size=16")
    own, alone = predict(load(whole), 4), predict(load(quarter))
    assert (own.state_bytes, own.activation_bytes) == (alone.state_bytes, alone.activation_bytes)
    assert alone.peak_bytes < own.peak_bytes <= alone.peak_bytes + own.gradient_bytes
    parts = replace(whole, train=replace(whole.train, accumulate=2))
    in_parts, one_in_parts = predict(load(parts), 4), predict(load(parts))
    assert in_parts.peak_bytes - in_parts.gradient_bytes < one_in_parts.peak_bytes


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("batch", "parts", "group"), [(24, 2, 1), (18, 1, 4), (40, 2, 4)])
def test_shares_are_whole_groups_and_make_the_batch(size: int, batch: int, parts: int, group: int) -> None:
    config = sized(batch, parts, group)
    shares = [Crew(rank, size).share(config) for rank in range(size)]
    assert [share.first for share in shares] == [0, *[share.last for share in shares[:-1]]]
    assert shares[-1].last == shares[0].total == batch // parts
    assert all(share.first % group == 0 for share in shares)
    assert sum(share.of_images for share in shares) == pytest.approx(1)
    assert sum(share.of_groups for share in shares) == pytest.approx(1)
    busiest = max(share.last - share.first for share in shares)
    assert busiest <= largest_share(batch // parts, config.model.images_per_group, size) < busiest + group
    positions = torch.arange(batch)
    assert sorted(torch.cat([positions[share.rows(parts)] for share in shares]).tolist()) == positions.tolist()


def sized(batch: int, parts: int, group: int) -> Config:
    return compose(
        "model/router=tokens_choice",
        f"model.router.images_per_group={group}",
        f"train.batch_size={batch}",
        f"train.accumulate={parts}",
    )


def test_too_many_processes_for_the_groups() -> None:
    with pytest.raises(UsageError, match="5 processes cannot divide 4 groups of"):
        Crew(0, 5).share(sized(32, 2, 4))


def test_groups_of_different_sizes_must_be_full() -> None:
    """Else a share of 4-image groups is none of 2-image groups: 6 images are 2 of one kind and 3 of the other."""
    words = [
        "model/router=tokens_choice", "model.router.images_per_group=2",
        "model.blocks={3: {router: tokens_choice, images_per_group: 4}}",
    ]  # fmt: skip
    odd, even = (compose(*words, f"train.batch_size={batch}") for batch in (6, 8))
    assert Crew(0, 1).share(odd).total == 6 and Crew(0, 2).share(even).total == 8
    refusal = "train.batch_size=6 is not a multiple of model.router.images_per_group=4"
    with pytest.raises(UsageError, match=refusal):
        Crew(0, 2).share(odd)
    with pytest.raises(UsageError, match=refusal):
        compose(*words, "train.batch_size=6", "devices=2")


def test_words_of_ours_are_no_lost_contact() -> None:
    with pytest.raises(RunError, match="igloo") as error, _contact():
        raise RunError("cannot write /data/igloo: no space left")
    assert not isinstance(error.value, Lost)
    with pytest.raises(Lost), _contact():
        raise RuntimeError("[gloo/transport] connection closed by peer")


def test_words_of_torchrun(softmoe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "LOCAL_RANK is not set" in softmoe("train", *TINY).err
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert "torchrun has started 2 processes" in softmoe("train", *TINY, "devices=3").err
    assert "train.batch_size=auto knows one device" in softmoe("train", *TINY, "train.batch_size=auto").err
    assert "device=mps is one device" in softmoe("train", *TINY, "device=mps").err


def test_what_cannot_be_divided(softmoe: Any) -> None:
    assert "parallel=fsdp has no effect in one process" in softmoe("train", *TINY, "parallel=fsdp").err
    config = compose("model.router.num_experts=4")
    assert "cannot divide 4 experts over 8 processes" in (obstacle("expert", load(config), 8) or "")
    assert "cannot divide no experts" in (obstacle("expert", load(compose("model/router=dense")), 8) or "")
    assert "no loss scale" in (obstacle("fsdp", load(compose("train.precision=fp16")), 8) or "")
    assert "optim.moments=8bit; set that to" in (obstacle("fsdp", load(compose("optim.moments=8bit")), 8) or "")
    assert obstacle("fsdp", load(config), 8) is None


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        ((90, 50, 40), ("ddp", "it fits")),
        ((110, 90, 40), ("fsdp", "ddp needs")),
        ((130, 120, 40), ("expert", "fsdp needs")),
        ((130, 120, 110), ("expert", "fsdp needs")),
        ((130, 120, None), ("fsdp", "ddp needs")),
    ],
)
def test_auto_takes_the_first_way_that_fits(
    needed: tuple[int | None, ...], expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 bytes are free on this device, and 95 on another process's; None: there are no experts to divide."""

    class Tight(Crew):
        def largest_of_all(self, number: float) -> float:
            return number + 5

    def predicted(_load: Load, _processes: int, way: str) -> Memory:
        return Memory(0, 0, 0, 0, 0, peak_bytes=needed[WAYS.index(way)] or 0, held_bytes=0, saving_bytes=0)

    monkeypatch.setattr(fit, "predict", predicted)
    monkeypatch.setattr(fit, "free_memory", lambda _device: 100)
    config = compose() if needed[2] is not None else compose("model/router=dense")
    way, why, _ = _first_that_fits(load(config), 100, Tight(size=2))
    assert way == expected[0] and expected[1] in why


@pytest.mark.parametrize(("length", "size"), [(8, 4), (6, 4), (3, 4)])
def test_spans_are_those_of_dtensor(length: int, size: int) -> None:
    chunks = torch.arange(length).chunk(size)
    expected = [chunk.tolist() for chunk in chunks] + [[]] * (size - len(chunks))
    assert [list(range(*span(length, size, place))) for place in range(size)] == expected


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_rows_of_a_batch_are_those_of_the_whole(mixup: float) -> None:
    """Order, crop, flip, RandAugment and mixup of an image do not depend on which others are made."""
    config = compose(
        "augment.crop=resized", "augment.hflip=0.5", "augment.randaugment=[2,10]", "augment.erase=0.5",
        f"augment.mixup={mixup}", f"augment.cutmix={mixup}",
    )  # fmt: skip
    images = sets.load(config.data).train.subset(np.arange(40))

    def batches(chosen: Tensor | slice) -> list[data_batches.Batch]:
        made = data_batches.train_batches(
            images, config.data, config.augment, image_size=8, in_chans=1, num_classes=10, batch_size=10,
            label_smoothing=0.1, seed=3, first_step=0, device=CPU, rows=chosen,
        )  # fmt: skip
        return [next(made) for _ in range(3)]

    chosen = torch.tensor([0, 1, 4, 7])
    for (x, targets, _), (whole, all_targets, _) in zip(batches(chosen), batches(slice(None)), strict=True):
        assert torch.equal(x, whole[chosen]) and torch.equal(targets, all_targets[chosen])


def test_noise_is_that_of_the_whole_batch() -> None:
    """The random state also moves on as if the whole batch had been drawn."""
    x = torch.empty(12, 3, 4)
    torch.manual_seed(0)
    whole, after = noise_like(x), torch.rand(())
    for first, end in ((0, 4), (4, 12)):
        torch.manual_seed(0)
        with whole_batch(first, 12):
            assert torch.equal(noise_like(x[first:end]), whole[first:end])
        assert torch.rand(()) == after
    torch.manual_seed(0)
    groups = noise_like(torch.empty(6, 3, 4))
    torch.manual_seed(0)
    with whole_batch(6, 12):
        assert torch.equal(noise_like(torch.empty(3, 3, 4), images=2), groups[3:])


def test_dropped_paths_are_those_of_the_whole_batch() -> None:
    x = torch.randn(24, 5, 3)
    torch.manual_seed(0)
    expected = DropPath(0.4).train()(x)
    torch.manual_seed(0)
    with whole_batch(8, 24):
        assert torch.equal(WholeBatchDropPath(0.4).train()(x[8:20]), expected[8:20])
    assert WholeBatchDropPath(0.4).eval()(x) is x


@pytest.mark.parametrize(("batches", "size"), [(7, 3), (2, 4), (1, 1)])
def test_every_batch_is_counted_once(batches: int, size: int) -> None:
    owns = [Turns(batches, Crew(rank, size)).own for rank in range(size)]
    assert len({len(own) for own in owns}) == 1, "all take as many turns"

    class Told(Crew):
        def gather(self, items: Any) -> list[Any]:
            return owns

    assert Turns(batches, Told(0, size)).collect(owns[0]) == list(range(batches))


def test_what_ended_a_run(tmp_path: Path) -> None:
    """The cause is the first error that is not about another process; else the process that left no note; else that
    contact was lost, of which nobody is accused."""

    def note(rank: int, moment: float, text: str, lost: bool) -> None:
        written = asdict(Note(rank, moment, 1, text, lost))
        (tmp_path / f"note-0-{rank}.json").write_text(json.dumps(written))

    note(0, 1.0, "lost contact", True)
    note(2, 2.0, "lost contact", True)
    assert cause(tmp_path, 3, {0: 1})[1].startswith("process 1 of 3 was killed,")
    assert cause(tmp_path, 3, {1: -9})[1].startswith("process 1 of 3 was killed by SIGKILL,")
    note(1, 3.0, "lost contact", True)
    for exits in ({0: 1, 1: 1, 2: 1}, {}):
        assert cause(tmp_path, 3, exits) == (1, "process 0 of 3: lost contact")
    note(1, 3.0, "no room", False)
    assert cause(tmp_path, 3, {0: 1}) == (1, "process 1 of 3: no room")
