"""Runs of other programs: files that those wrote, in the repository or by the test itself.

`events/` was written with torch 2.15.0's SummaryWriter and tensorboard 2.21.0, which the tests do not install:

    for arm, gain in (("dense", 0.0), ("soft", 0.02)):
        for seed in range(3):
            with SummaryWriter(f"{arm}/seed{seed}") as w:
                for epoch in range(5):
                    w.add_scalar("val/acc", 0.5 + 0.1 * epoch + 0.003 * seed, epoch)
                    w.add_scalar("train/loss", 2 - 0.1 * epoch, epoch)
                w.add_scalar("test/acc", 0.9 + gain + 0.003 * seed * (1 + gain), 4)
                w.add_scalar("seen", 5000.0, 4, new_style=True)
                w.add_histogram("weights", torch.arange(4.0), 4)
                w.add_hparams({"arm": arm, "seed": seed, "lr": 0.1}, {"hparam/acc": 0.9}, run_name="chosen")

`offline/` was written with wandb 0.31.0, offline, by WANDB below with ids such as soft0001, without metadata of the
machine. Only the files' names were changed.
"""

import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import yaml
from timm.utils import update_summary

HERE = Path(__file__).parent
ARMS = {"dense": 0.0, "soft": 0.02}
WANDB = """
import wandb
for arm, gain in (("dense", 0.0), ("soft", 0.02)):
    for seed in range(3):
        run = wandb.init(
            mode="offline", project="others", group="arms", name=f"{arm}-{seed}",
            config={"arm": arm, "seed": seed, "optim": {"lr": 0.1}}, settings=wandb.Settings(silent=True, console="off")
        )
        for i in range(5):
            run.log(
                {"val": {"acc": 0.5 + 0.1 * i + 0.003 * seed}, "loss": 2 - 0.1 * i, "samples": 1000 * (i + 1)},
                step=10 * i,
            )
        run.summary["test/acc"] = 0.9 + gain + 0.003 * seed * (1 + gain)
        run.finish()
"""


def reached(arm: str, seed: int) -> float:
    """The test accuracy of each of these runs, a share."""
    return 0.9 + ARMS[arm] + 0.003 * seed * (1 + ARMS[arm])


def events(folder: Path) -> Path:
    return shutil.copytree(HERE / "events", folder / "events")


def offline(folder: Path) -> Path:
    return shutil.copytree(HERE / "offline", folder / "offline")


def written_offline(folder: Path) -> Path:
    """The same six runs, by the wandb that is installed."""
    folder.mkdir()
    subprocess.run([sys.executable, "-c", WANDB], cwd=folder, check=True, timeout=300)
    return folder / "wandb"


def table(folder: Path, name: str = "results.csv") -> Path:
    lines = [f"{arm},{seed},{reached(arm, seed)!r},1.5" for seed in range(3) for arm in ARMS]
    (folder / name).write_text("\n".join(["arm,run_seed,acc,hours", *lines]) + "\n")
    return folder / name


def timm_runs(folder: Path) -> Path:
    """Written by timm's own function, args.yaml as its train.py does."""
    for arm in ("vit_tiny_patch16_224", "vit_small_patch16_224"):
        for seed in range(3):
            run = folder / "timm" / f"{arm}-{seed}"
            run.mkdir(parents=True)
            args: dict[str, Any] = {
                "model": arm,
                "seed": seed,
                "img_size": None,
                "num_classes": 10,
                "dataset": "torch/cifar10",
            }
            args |= {"lr": 0.1, "output": str(folder), "experiment": run.name, "mean": [0.5, 0.5, 0.5], "epochs": 3}
            (run / "args.yaml").write_text(yaml.safe_dump(args, default_flow_style=False))
            gain = 3.0 * arm.startswith("vit_small")
            for epoch in range(3):
                told = OrderedDict(
                    loss=1.9 - 0.1 * epoch, top1=50.0 + 2 * epoch + seed * (1 + gain / 10) + gain, top5=90.0
                )
                update_summary(epoch, OrderedDict(loss=2.0), told, str(run / "summary.csv"), lr=0.1)
    return folder / "timm"
