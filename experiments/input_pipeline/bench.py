"""Images per second of softmoe's input pipeline and of timm's loader: the same JPEG files, transforms and workers.

python experiments/input_pipeline/bench.py [--images 960] [--batch 32] [--rounds 9] [--workers 0 2] [--csv FILE]

Writes JPEG files of 500 x 375 pixels once. In each round the loaders, in an order that turns, are started, warmed up,
timed in the middle of an epoch, where every worker is busy, and ended; what is timed ends at a normalised float32 batch
on the CPU. timm has two loaders: with its prefetcher, which is its default and normalises whole batches in the main
process as softmoe does, and without. `cached` is softmoe with data.cache: squares of 256 pixels that were decoded
before they are asked for, cut and mirrored a batch at a time, without workers. Training: random resized crop (area 0.08
to 1, bicubic), mirroring. Evaluation: shorter side 256, centre 224 (cached: the square, resized). Prints, per setting,
the mean of the rounds' ratios and its 95% interval by Student's t, both of their logarithms.
"""

import argparse
import csv
import functools
import io
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from softmoe_cli.compare.intervals import mean_interval
from softmoe_cli.data import batches, sets
from softmoe_cli.device import hardware
from softmoe_cli.options.compose import compose

SIDE, CLASSES = 224, 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_images(root: Path, count: int) -> None:
    """Smooth shapes with some grain: about 60 kB each, as photographs of this size have."""
    rng = np.random.default_rng(0)
    for i in range(count):
        folder = root / f"class_{i % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        grain = rng.normal(0, 9, (375, 500, 1)).astype(np.int16)
        out = io.BytesIO()
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        (folder / f"{i:06d}.jpg").write_bytes(out.getvalue())


def ours(root: Path, part: str, workers: int, batch: int, *more: str) -> Iterator[Any]:
    config = compose("data=imagenet", f"data.root={root}", f"data.workers={workers}", "data.num_classes=null", *more)
    config.data.test_fraction = 1
    images = sets.load(config.data).test
    if part == "evaluation":
        yield from batches.eval_batches(
            images, config.data, image_size=SIDE, in_chans=3, batch_size=batch, device=torch.device("cpu")
        )
        return
    yield from batches.train_batches(
        images, config.data, config.augment, image_size=SIDE, in_chans=3, num_classes=CLASSES, batch_size=batch,
        label_smoothing=0.0, seed=0, first_step=0, device=torch.device("cpu"),
    )  # fmt: skip


def timms(root: Path, part: str, workers: int, batch: int, prefetcher: bool = True) -> Iterator[Any]:
    training = part == "training"
    yield from create_loader(
        create_dataset("", root=str(root), is_training=training), (3, SIDE, SIDE), batch, is_training=training,
        use_prefetcher=prefetcher, device=torch.device("cpu"), num_workers=workers, pin_memory=False, scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3), hflip=0.5, color_jitter=None, interpolation="bicubic", mean=MEAN, std=STD,
        crop_pct=0.875, persistent_workers=False,
    )  # fmt: skip


def cached(root: Path, part: str, workers: int, batch: int) -> Iterator[Any]:
    yield from ours(
        root, part, workers, batch, "data.from_file=false", "data.image_size=256", f"data.cache={root.parent / 'cache'}"
    )


SIDES: dict[str, Callable[..., Iterator[Any]]] = {
    "softmoe": ours,
    "cached": cached,
    "timm": timms,
    "timm_plain": functools.partial(timms, prefetcher=False),
}


def images_per_s(batches: Iterator[Any], warm_up: int, count: int) -> float:
    for _ in range(warm_up):
        x, *_ = next(batches)
    start, seen = time.perf_counter(), 0
    for _ in range(count):
        x, *_ = next(batches)
        assert x.dtype == torch.float32 and x.shape[1:] == (3, SIDE, SIDE)
        seen += len(x)
    took = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]  # ends the workers before the next side starts
    return seen / took


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=960)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--csv", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # of this process; a worker has one as well
    machine = hardware(torch.device("cpu"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        write_images(root, chosen.images)
        for part in ("training", "evaluation"):
            for workers in chosen.workers:
                warm_up = 2 + 2 * workers
                count = chosen.images // chosen.batch - warm_up - 2 * workers - 2  # before workers run out of work
                ratios: dict[str, list[float]] = {name: [] for name in SIDES}
                for number in range(chosen.rounds):
                    names = list(SIDES)
                    speed = {}
                    turn = number % len(names)
                    for name in names[turn:] + names[:turn]:
                        batches = SIDES[name](root, part, workers, chosen.batch)
                        speed[name] = images_per_s(batches, warm_up, count)
                    row: dict[str, Any] = {"part": part, "workers": workers, "round": number}
                    for name in names:
                        ratios[name].append(math.log(speed["softmoe"] / speed[name]))
                        row[f"{name}_images_per_s"] = f"{speed[name]:.4g}"
                    rows.append(row | {"hardware": machine, "torch": torch.__version__})
                told = []
                for name in names[1:]:
                    over = mean_interval(ratios[name])
                    low, high = (math.exp(edge) if edge is not None else math.nan for edge in (over.low, over.high))
                    told.append(f"{math.exp(over.mean):.3f} of {name} ({low:.3f} to {high:.3f})")
                medians = [
                    np.median([float(row[f"{n}_images_per_s"]) for row in rows[-chosen.rounds :]]) for n in names
                ]
                speeds = ", ".join(f"{name} {median:.1f}" for name, median in zip(names, medians, strict=True))
                print(
                    f"{part}, {workers} workers: {speeds} images/s; softmoe is {', '.join(told)}; {machine}", flush=True
                )
    if chosen.csv is not None:
        with chosen.csv.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


if __name__ == "__main__":
    main()
