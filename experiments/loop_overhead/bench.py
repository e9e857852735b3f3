"""What the loop adds to bare PyTorch: the same model, images and optimizer, in turns within one process.

python experiments/loop_overhead/bench.py [OVERRIDES...]

Prints, per round, the seconds of STEPS steps under `softmoe train` (a run of STEPS + 1 steps less a run of 1 step,
so that set-up, evaluation and saving cancel) over the seconds of a plain loop of forward, backward, clipping and
update over the same batches; then the median and the range of the ratios.
"""

import contextlib
import io
import itertools
import statistics
import sys
import tempfile
import time

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from softmoe_cli import data
from softmoe_cli.cli import conf_folder
from softmoe_cli.config import Config
from softmoe_cli.device import hardware
from softmoe_cli.models import build
from softmoe_cli.optim import adamw, schedule
from softmoe_cli.terminal import Screen
from softmoe_cli.train import train

ROUNDS, STEPS = 5, 600


def composed(overrides: list[str], root: str, turn: int, steps: int) -> Config:
    ConfigStore.instance().store(name="schema", node=Config)
    lines = [*overrides, "tracking=off", f"output_root={root}", f"study=turn{turn}", f"train.steps={steps}"]
    lines += ["train.eval_every=1000", "train.log_every=10", "train.save_seconds=3600"]
    with initialize_config_dir(str(conf_folder()), version_base=None):
        config = OmegaConf.to_object(compose("train", lines))
    assert isinstance(config, Config)
    config.check()
    return config


def ours(config: Config) -> float:
    """Seconds from calling `train` to its result: set-up, steps, rows, one look at each held-out split, saving."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        train(config, "train", None, Screen())
    return time.perf_counter() - start


def bare(config: Config) -> float:
    """Seconds of the same updates in a plain loop."""
    splits = data.load(config.data)
    torch.manual_seed(config.seed)
    model = build(config.model, len(splits.classes)).train()
    optimizer = adamw(model, config.optim)
    batches = data.train_batches(
        splits.train, config.data, config.augment, image_size=config.model.image_size,
        in_chans=config.model.in_chans, num_classes=len(splits.classes), batch_size=config.train.batch_size,
        label_smoothing=0.0, seed=config.seed, first_step=0, device=torch.device("cpu"),
    )  # fmt: skip
    steps = config.train.steps or 0
    rate = schedule(config.optim, steps)
    start = time.perf_counter()
    for step, (x, targets) in enumerate(itertools.islice(batches, steps)):
        loss = torch.nn.functional.cross_entropy(model(x), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return time.perf_counter() - start


def main() -> None:
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as root:
        for turn in range(-1, ROUNDS):  # the first round warms up
            line = sys.argv[1:]
            times = {}
            for side in ("softmoe", "bare") if turn % 2 else ("bare", "softmoe"):
                if side == "bare":
                    times[side] = bare(composed(line, root, turn, STEPS))
                else:
                    times[side] = ours(composed(line, f"{root}/long", turn, STEPS + 1))
                    times[side] -= ours(composed(line, f"{root}/short", turn, 1))
            if turn >= 0:
                ratios.append(times["softmoe"] / times["bare"])
                told = ", ".join(f"{side} {seconds:.3f} s" for side, seconds in sorted(times.items()))
                print(f"round {turn}: {told}, ratio {ratios[-1]:.4f}")
    print(f"{hardware(torch.device('cpu'))}, torch {torch.__version__}, n = {ROUNDS}")
    print(f"ratio: median {statistics.median(ratios):.4f}, range {min(ratios):.4f} to {max(ratios):.4f}")


if __name__ == "__main__":
    main()
