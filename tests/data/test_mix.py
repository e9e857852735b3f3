"""Several sets in one run: which images a batch has, how they are seen, and what cannot be mixed."""

import itertools
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softmoe_cli.config.run import Config
from softmoe_cli.data import order
from softmoe_cli.data.batches import Batch, eval_batches, train_batches
from softmoe_cli.data.contents import identity
from softmoe_cli.data.mix import MixedSet, classes_of_task, task_shares
from softmoe_cli.data.order import Epochs, TaskDraws, mixed_stream
from softmoe_cli.data.sets import load, load_of_task
from softmoe_cli.data.splits import ImageSet
from softmoe_cli.errors import UsageError
from softmoe_cli.options.inherit import require_same_tasks, take_task
from softmoe_cli.run.header import Source
from softmoe_cli.run.identity import flat_science, signature
from tests.conftest import Softmoe
from tests.mixes import mix, write_clothes
from tests.oracles import compose

CPU = torch.device("cpu")


def sized(*sizes: int) -> MixedSet:
    """A mix of sets of so many images, which nobody looks at."""
    parts = tuple(ImageSet(torch.zeros(n, dtype=torch.int64), None, 1, 1) for n in sizes)
    tasks = torch.cat([torch.full((n,), task) for task, n in enumerate(sizes)])
    return MixedSet(torch.zeros_like(tasks), None, 1, 1, parts=parts, tasks=tasks, places=tasks)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return compose(*mix(write_clothes(tmp_path / "clothes")))


def batches(config: Config, first_step: int, count: int, **changes: Any) -> list[Batch]:
    options: dict[str, Any] = {"batch_size": 8, "label_smoothing": 0.0, "seed": 3} | changes
    found = train_batches(
        load(config.data).train, config.data, config.augment, image_size=config.model.image_size, in_chans=1,
        num_classes=20, first_step=first_step, device=CPU, **options,
    )  # fmt: skip
    return list(itertools.islice(found, count))


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(one, other) for one, other in zip(a, b, strict=True) if one is not None and other is not None
    )


# --- which images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5, 5.0, "inf"])
def test_shares_are_powers_of_sizes(temperature: float | str) -> None:
    sizes = [1295, 55_000, 7]
    powers = [n ** (0 if temperature == "inf" else 1 / float(temperature)) for n in sizes]
    assert task_shares(sizes, temperature).tolist() == pytest.approx([p / sum(powers) for p in powers], rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 5.0, "inf"])
def test_draws_are_within_binomial_bounds(temperature: float | str) -> None:
    """Of 10^5 draws each task has as many as its share says, within five standard deviations; and not all the same."""
    images, draws = sized(40, 600, 3), 100_000
    p = task_shares([40, 600, 3], temperature)
    drawn = TaskDraws(images, temperature, 50, seed=1).before(draws // 50)
    assert drawn.sum() == draws
    assert ((drawn - draws * p).abs() < 5 * (draws * p * (1 - p)).sqrt()).all()
    counts = torch.stack([each.bincount(minlength=3) for each in itertools.islice(
        TaskDraws(images, temperature, 50, seed=1).batches(0), 400)]).double()  # fmt: skip
    spread, want = counts.var(dim=0), 50 * p * (1 - p)
    assert (spread > 0.6 * want).all() and (spread < 1.6 * want).all()  # of independent draws, not of quotas


def test_batches_are_a_function_of_seed_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """From wherever a run goes on, within a chapter of draws and at its ends."""
    monkeypatch.setattr(order, "CHAPTER", 4)
    images = sized(5, 11)

    def indices(seed: int, first_step: int, count: int) -> list[list[int]]:
        found = mixed_stream(TaskDraws(images, 2.0, 3, seed), seed, first_step)
        return [each.tolist() for each in itertools.islice(found, count)]

    whole = indices(0, 0, 30)
    for step in (1, 3, 4, 5, 8, 17):
        assert indices(0, step, 4) == whole[step : step + 4]
        before = TaskDraws(images, 2.0, 3, 0).before(step).tolist()
        seen = [index >= 5 for batch in whole[:step] for index in batch]
        assert before == [seen.count(False), seen.count(True)]
    assert indices(1, 0, 30) != whole


def test_images_of_a_task_come_in_epochs() -> None:
    """Every image of a task once before any comes again, in an order of its own for each task."""
    images = sized(6, 6)
    found = torch.cat(list(itertools.islice(mixed_stream(TaskDraws(images, 1.0, 4, 0), 0, 0), 30)))
    of_task = [found[found < 6].tolist(), (found[found >= 6] - 6).tolist()]
    for numbers in of_task:
        for start in range(0, len(numbers) - 5, 6):
            assert sorted(numbers[start : start + 6]) == list(range(6))
    assert of_task[0][:12] != of_task[1][:12]
    assert Epochs(6, 0, 1).between(0, 12).tolist() == of_task[1][:12]


def test_rows_of_a_batch_are_those_of_the_whole(config: Config) -> None:
    """What several processes make of a batch is what one makes."""
    rows = torch.tensor([0, 3, 6])
    for whole, some in zip(batches(config, 2, 2), batches(config, 2, 2, rows=rows), strict=True):
        assert same(some, Batch(*(each[rows] for each in whole if each is not None)))


# --- how they are seen ------------------------------------------------------------------------------------------------


def test_each_set_has_its_own_pixels(tmp_path: Path) -> None:
    """Mean, deviation, size and channels: an image is seen as by a model of its set alone."""
    root = write_clothes(tmp_path / "clothes")
    sets = "[{data: digits, mean: [0.25], std: [0.75], channels: 3}, {data: fashion_mnist, mean: [0.1], std: [0.2]}]"
    config = compose(*mix(root, f"data.sets={sets}"))
    assert config.data.channels == config.model.in_chans == 3
    mixed = load(config.data).validation
    assert isinstance(mixed, MixedSet)
    batch = next(eval_batches(mixed, config.data, image_size=8, in_chans=3, batch_size=200, device=CPU))
    assert batch.task is not None and set(batch.task.tolist()) == {0, 1}
    for task, own in enumerate(config.data.of_sets()):
        alone = load(own).validation
        want = next(eval_batches(alone, own, image_size=8, in_chans=3, batch_size=200, device=CPU))
        here = (mixed.tasks == task).nonzero()[:, 0]
        place = mixed.places[here]
        assert torch.equal(batch.images[here], want.images[place])
        assert torch.equal(batch.labels[here] - 10 * task, want.labels[place])


def test_a_task_of_a_checkpoint_is_that_set_of_its_mix(config: Config) -> None:
    """Every option of the data, as `softmoe evaluate RUN task=NAME` and `softmoe show` take them."""
    card = {"model": {"tasks": config.data.tasks}, "data": asdict(config.data)}
    for own in config.data.of_sets():
        tree = {"task": own.name, "data": asdict(config.data)}
        take_task(tree, Source("RUN", "", {}, card), [], named=False)
        assert tree["data"] == asdict(own)


def test_what_is_typed_of_a_tasks_images_counts(config: Config) -> None:
    """A share, a root, a size: `softmoe evaluate RUN task=digits data.test_fraction=0.3` read the set's own share."""
    card = {"model": {"tasks": config.data.tasks}, "data": asdict(config.data)}
    other = {"test_fraction": 0.3, "root": "elsewhere", "channels": 3}
    tree = {"task": "digits", "data": asdict(config.data) | other}
    take_task(tree, Source("RUN", "", {}, card), [f"data.{key}={value}" for key, value in other.items()], named=False)
    assert tree["data"] == asdict(config.data.of_sets()[0]) | other


def test_a_root_that_no_set_of_a_mix_would_read_is_refused(config: Config) -> None:
    card = {"model": {"tasks": config.data.tasks}, "data": asdict(config.data)}
    source, typed = Source("RUN", "", {}, card), ["data.root=elsewhere"]
    tree: dict[str, Any] = {"task": None, "data": asdict(config.data) | {"root": "elsewhere"}}
    take_task(tree, source, typed, named=False)
    tree["data"]["sets"]["fashion_mnist"]["root"] = "own"
    take_task(tree, source, [], named=False)
    with pytest.raises(UsageError, match=r"data\.root=elsewhere has no effect, .* fashion_mnist own; say task=fashion"):
        take_task(tree, source, typed, named=False)


def test_a_task_has_the_classes_that_the_checkpoint_knows(config: Config) -> None:
    """Labels are numbers: those of other classes, or in another order, would be scored as its own."""
    digits, known = config.data.of_sets()[0], load(config.data).classes
    assert load_of_task(digits, known).classes == load(digits).classes
    for others, says in (
        (["digits/zero", *known[1:]], "other classes than the checkpoint's task: 0, zero"),
        (["digits/ten", *known], "other classes than the checkpoint's task: ten"),
        ([known[1], known[0], *known[2:]], "the classes in another order"),
    ):
        with pytest.raises(UsageError, match=f"data.sets, digits: its files have {says}; .* with task=digits"):
            load_of_task(digits, others)


def test_the_task_is_no_function_of_the_label(config: Config) -> None:
    """It is there when an image is asked for: labels that are drawn anew leave it as it was."""
    mixed = load(config.data).test
    assert isinstance(mixed, MixedSet)
    others = replace(mixed, labels=torch.zeros_like(mixed.labels))
    options = {"image_size": 8, "in_chans": 1, "batch_size": 50, "device": CPU}
    pairs = zip(*(eval_batches(each, config.data, **options) for each in (mixed, others)), strict=True)  # type: ignore[arg-type]
    for one, other in pairs:
        assert one.task is not None and other.task is not None and torch.equal(one.task, other.task)


def test_smoothing_stays_among_the_classes_of_a_task(config: Config) -> None:
    for batch in batches(config, 0, 3, label_smoothing=0.2):
        assert batch.task is not None
        own = torch.stack([batch.labels[:, :10].sum(dim=1), batch.labels[:, 10:].sum(dim=1)], dim=1)
        torch.testing.assert_close(own, torch.eye(2)[batch.task])
        shares = batch.labels.sort(dim=1).values
        torch.testing.assert_close(shares[:, -1], torch.full((8,), 0.82))
        torch.testing.assert_close(shares[:, -10:-1], torch.full((8, 9), 0.02))


def test_no_set_is_changed_more_than_is_natural_for_it(config: Config) -> None:
    """digits may not be mirrored or moved: they are seen as they are, whatever is done to the clothes."""
    assert (config.augment.hflip, config.augment.shift) == (1.0, 1.0)
    images = load(config.data).train
    assert isinstance(images, MixedSet)
    index = next(mixed_stream(TaskDraws(images, 5.0, 64, 3), 3, 0))
    (batch,) = batches(config, 0, 1, batch_size=64)
    plain = next(eval_batches(images.subset(index.numpy()), config.data, image_size=8, in_chans=1, batch_size=64,
                              device=CPU))  # fmt: skip
    changed = (batch.images != plain.images).flatten(1).any(dim=1)
    assert batch.task is not None and changed[batch.task == 1].any() and not changed[batch.task == 0].any()


# --- what a run says of it --------------------------------------------------------------------------------------------


def test_classes_are_called_by_their_set(config: Config) -> None:
    classes = load(config.data).classes
    assert len(classes) == len(set(classes)) == 20 and classes[3] == "digits/3"
    assert classes_of_task("fashion_mnist", classes)[0] == "T-shirt/top"


def test_a_mix_at_another_place_is_the_same_run(tmp_path: Path) -> None:
    a, b = (compose(*mix(write_clothes(tmp_path / name))) for name in "ab")
    other = compose(*mix(write_clothes(tmp_path / "c", seed=1)))
    marks = [signature(each, "train", None, identity(each.data)) for each in (a, b, other)]
    assert marks[0] == marks[1] != marks[2]
    each_alike = [compose(*mix(tmp_path / "a", f"data.temperature={word}")) for word in ("inf", ".inf")]
    assert [config.data.temperature for config in each_alike] == ["inf", "inf"]
    warm = compose(*mix(tmp_path / "a", "data.temperature=2"))
    assert signature(warm, "train", None, None) != signature(a, "train", None, None)


def test_one_set_says_nothing_of_mixes() -> None:
    """So that runs of one set keep their signatures."""
    assert not {"data.sets", "data.temperature", "model.tasks"} & flat_science(compose()).keys()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("data=mix",), "data=mix does not say of what; name its sets"),
        (("data=mix", "data.sets=[]"), "data=mix does not say of what; name its sets"),
        (("data=mix", "data.sets=5"), "data.sets=5 is no list"),
        (("data=mix", "data.sets={cifar10: {hflip: 0}}"), "write a list, each set's options with data=NAME among them"),
        (("data=mix", "data.sets=[{data: [digits]},cifar10]"), "there is no set '['digits']'"),
        (("data=mix", "data.sets=[digits]"), "data.sets=[digits] is no mix; name at least two sets"),
        (("data=mix", "data.sets=[digits,digits]"), "data.sets names digits twice, and a set is one task"),
        (("data=mix", "data.sets=[digits,mix]"), "a mix is of sets alone"),
        (("data=mix", "data.sets=[digits,digit]"), "there is no set 'digit'. Did you mean 'digits'?"),
        (("data=mix", "data.sets=[{data: digits, classes: [0,1]},cifar10]"), "is not known when it is used"),
        (("data=mix", "data.sets=[{data: digits, num_classes: 1},cifar10]"), "a set of one class is no task"),
        (("data=mix", "data.sets=[{data: digits, test_fraction: 1},cifar10]"), "leaves no training and validation"),
        (("data=mix", "data.sets=[{data: folder, root: x},digits]"), "data.sets, folder: say num_classes"),
        (("data=mix", "data.sets=[imagenet,digits]"), "its images are read from their files"),
        (("data=mix", "data.sets=[digits,cifar10]", "data.mean=[0.3]"), "data.mean=[0.3] has no effect on data=mix"),
        (("data=mix", "data.sets=[digits,cifar10]", "data.temperature=0"), "data.temperature=0 is out of range"),
        (("data=mix", "data.sets=[digits,cifar10]", "augment.mixup=0.2"), "two images, which data=mix may have of two"),
        (("data=mix", "data.sets=[digits,cifar10]", "train.fewshot=[1]"), "is of the classes of one set"),
        (("data.sets=[digits,cifar10]",), "data.sets=[cifar10,digits] has no effect on data=digits; say data=mix"),
        (("data.temperature=3",), "data.temperature=3 has no effect on data=digits"),
    ],
)  # fmt: skip
def test_what_cannot_be(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError) as told:
        compose(*words)
    assert says in str(told.value)


def test_a_set_with_other_classes_than_it_says_is_named(tmp_path: Path) -> None:
    config = compose(*mix(write_clothes(tmp_path)), "data.sets=[{data: digits, num_classes: 5}, fashion_mnist]")
    with pytest.raises(UsageError, match="num_classes=5 is less than the 10 classes found") as told:
        load(config.data)
    assert str(told.value).startswith("data.sets, digits: ")


def test_the_order_of_sets_is_none() -> None:
    """Or two runs that differ in their numbers would have one signature, and a finetuning would swap its tasks."""
    one, other = (compose("data=mix", f"data.sets=[{sets}]") for sets in ("digits,cifar10", "cifar10,digits"))
    assert list(one.data.sets) == list(other.data.sets) == list(one.model.tasks) == ["cifar10", "digits"]
    assert one == other
    theirs = dict(reversed(one.model.tasks.items()))
    source: Any = SimpleNamespace(label="old", card={"model": {"tasks": theirs}})
    one.model.router["num_tasks"] = None
    with pytest.raises(UsageError, match="routes by its tasks, digits, cifar10, and the data have cifar10, digits"):
        require_same_tasks(one.model, source)


def test_temperature_may_be_infinite() -> None:
    data = compose("data=mix", "data.sets=[digits,cifar10]", "data.temperature=inf").data
    assert data.temperature == "inf" and task_shares([5, 500], data.temperature).tolist() == [0.5, 0.5]
    assert task_shares([5, 500], 1e-320).tolist() == [0, 1]


def test_sets_are_checked_one_by_one(softmoe: Softmoe) -> None:
    answer = softmoe("data", "check", "data=mix", "data.sets=[digits,cifar10]")
    assert answer.code == 2 and "check them one by one" in answer.err
