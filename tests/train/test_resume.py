"""A run that was killed, or whose checkpoint is damaged, goes on to the same bits."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softmoe_cli.config.run import Config
from softmoe_cli.model.vit import build, portable
from softmoe_cli.run.folder import Run
from softmoe_cli.run.header import Source
from softmoe_cli.terminal import Screen
from softmoe_cli.train.resume import load_source
from tests.conftest import TINY, Softmoe, thinned
from tests.oracles import compose
from tests.runs import finish, kill_five_times, last, same, start, the_run


@pytest.mark.long
@pytest.mark.thorough
def test_five_kills_change_nothing(tmp_path: Path) -> None:
    """SIGKILL at random moments, some of them while a checkpoint is being written."""
    options = (
        "train.steps=600", "train.batch_size=8", "train.save_seconds=0", "train.ema=0.99", "augment.mixup=0.2",
        "augment.crop=resized", "model.router.noise_std=0.1", "model.backbone.drop_path=0.1",
    )  # fmt: skip
    finish(start(tmp_path / "whole", *options))
    kill_five_times(lambda: start(tmp_path / "killed", *options), tmp_path / "killed")
    finish(start(tmp_path / "killed", *options))
    same(the_run(tmp_path / "whole"), the_run(tmp_path / "killed"))


def test_damaged_last_checkpoint(softmoe: Softmoe, tmp_path: Path) -> None:
    """A flipped byte is noticed by its checksum, and the checkpoint before goes on to the same end."""
    line = ("train", *TINY, "train.steps=60", "train.save_seconds=0")
    assert softmoe(*line, "output_root=whole").code == 0
    assert softmoe(*line, "output_root=damaged").code == 0
    whole, damaged = (next((tmp_path / root / "default").iterdir()) for root in ("whole", "damaged"))
    (damaged / "result.json").unlink()
    newest, before = sorted((damaged / "checkpoints").glob("last-*"), reverse=True)
    raw = bytearray((newest / "model.safetensors").read_bytes())
    raw[-100] ^= 1
    (newest / "model.safetensors").write_bytes(raw)
    answer = softmoe(*line, "output_root=damaged")
    assert answer.code == 0
    assert f"{newest.name} is damaged (model.safetensors does not match its checksum)" in answer.out
    assert f"({before.relative_to(tmp_path)})" in answer.out
    same(whole, damaged)


HARD = {
    "adamw": (
        "optim.layer_decay=0.7", "optim.freeze=[blocks.0.*,*.scale]", "augment.erase=0.5", "augment.randaugment=[1,5]",
        "augment.mixup=0.4", "model.backbone.drop_path=0.3", "train.ema=0.9", "train.recompute=true",
    ),
    "sgd": ("optim.name=sgd", "optim.momentum=0.9", "optim.layer_decay=0.7", "augment.erase=0.5", "optim.lr=0.1"),
    "what the images cost": (
        "model/router=zero_computation", "model.moe_blocks=every_1", "train.recompute=true", "train.accumulate=2",
        "train.log_every=1",
    ),
    "8bit": ("optim.moments=8bit", "model.backbone.mlp_width=256"),
}  # fmt: skip


@pytest.mark.parametrize("name", thinned(HARD, 2))
def test_finetune_options_resume_to_the_same_bits(name: str, softmoe: Softmoe, tmp_path: Path) -> None:
    """From the checkpoint before the last, in the middle of the run."""
    line = ("train", *TINY, "train.steps=6", "train.batch_size=8", "train.save_seconds=0", "train.eval_every=3",
            *HARD[name])  # fmt: skip
    assert softmoe(*line, "output_root=whole").code == 0
    whole = next((tmp_path / "whole" / "default").iterdir())
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    stopped = next((tmp_path / "stopped" / "default").iterdir())
    (stopped / "result.json").unlink()
    shutil.rmtree(last(stopped))
    before = load_file(last(stopped) / "model.safetensors")
    answer = softmoe(*line, "output_root=stopped")
    assert answer.code == 0 and "going on from step" in answer.out, answer
    same(whole, stopped)
    kept, end = load_file(last(whole) / "training.safetensors"), load_file(last(whole) / "model.safetensors")
    moments = {key.split(".", 1)[1].rpartition(".")[0] for key in kept if key.startswith("optimizer.")}
    frozen = {key for key in end if name == "adamw" and (key.startswith("blocks.0.") or key.endswith(".scale"))}
    assert moments == end.keys() - frozen
    assert {key for key, value in end.items() if torch.equal(before[key], value)} == frozen
    bytes_kept = {key for key, value in kept.items() if value.dtype == torch.uint8 and key.startswith("optimizer.")}
    assert bool(bytes_kept) == (name == "8bit")


@pytest.mark.thorough
def test_what_another_process_has_ended_meanwhile_stays(
    softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had the folder when we looked, and has let go of it when we take it."""
    line = ("train", *TINY, "train.steps=2")
    assert softmoe(*line).code == 0
    run, take = the_run(tmp_path), Run.open
    files = [run / name for name in ("result.json", "metrics.jsonl", "config.yaml")]
    ended = [file.read_bytes() for file in files]
    files[0].unlink()

    def open_late(self: Run, config: Config) -> None:
        files[0].write_bytes(ended[0])
        take(self, config)

    monkeypatch.setattr(Run, "open", open_late)
    answer = softmoe(*line, "threads=1")
    assert answer.code == 0 and "is finished; nothing to do" in answer.out, answer
    assert [file.read_bytes() for file in files] == ended


def test_the_only_checkpoint_damaged(softmoe: Softmoe, tmp_path: Path) -> None:
    line = ("train", *TINY, "train.steps=10")
    assert softmoe(*line).code == 0
    run = the_run(tmp_path)
    (run / "result.json").unlink()
    with (last(run) / "model.safetensors").open("ab") as file:
        file.write(b"x")
    answer = softmoe(*line)
    assert answer.code == 0 and "no undamaged checkpoint is left: starting afresh" in answer.out
    assert list((run / "checkpoints").glob("damaged-last-*"))


def test_slots_are_compared_block_by_block(capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint whose blocks have different numbers of slots has what it had."""
    words = (*TINY, "model/router=soft", "model.moe_blocks=[0,1]", "model.blocks={0: {slots_per_expert: 3}}")
    config = compose(*words)
    model = build(config.model, 10)
    card = {"model": portable(config.model, model), "classes": ["x"]}
    load_source(model, Source("x", "", dict(model.state_dict()), card), config, ["x"], Screen())
    assert "3, 1 per expert, as in the checkpoint" in capsys.readouterr().out
