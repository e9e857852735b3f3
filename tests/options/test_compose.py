"""What is composed is what the command would run."""

from pathlib import Path

import pytest

from softmoe_cli.errors import UsageError
from softmoe_cli.optim import span_length
from softmoe_cli.options.inherit import described_by_timm
from softmoe_cli.run.header import Source
from tests.conftest import TINY, Softmoe
from tests.oracles import compose


def test_compose_is_what_the_command_would_run() -> None:
    from softmoe_cli.model.vit import build
    from softmoe_cli.options.compose import compose

    config = compose("model=vit_nano7_soft", "data=fashion_mnist", "model.router.num_experts=8")
    assert build(config.model, num_classes=10).blocks[3].mlp.router.num_experts == 8
    with pytest.raises(UsageError, match="Did you mean 'seed'"):
        compose("sede=1")


def test_hydra_as_users_know_it(softmoe: Softmoe, tmp_path: Path) -> None:
    assert "num_experts: 16" in softmoe("train", "--cfg", "job").out
    assert "softmoe-own" not in softmoe("train", "--info", "searchpath").out
    own = tmp_path / "conf" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\n# mine\nseed: 7\ndefaults:\n  - override /recipe: finetune\n")
    told = softmoe("train", "+experiment=mine", "--cfg", "job").out
    assert "seed: 7" in told and "default_epochs: 20" in told
    assert "mine" in softmoe("list").out
    assert "softmoe-own" in softmoe("train", "--info", "searchpath").out


def test_precedence_recipe_experiment_command_line(softmoe: Softmoe, tmp_path: Path) -> None:
    own = tmp_path / "conf" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\noptim:\n  lr: 0.5\n")
    assert "lr: 0.5" in softmoe("finetune", "+experiment=mine", "checkpoint=x", "--cfg", "job").out
    assert "lr: 0.25" in softmoe("train", "+experiment=mine", "optim.lr=0.25", "--cfg", "job").out


def test_groups(softmoe: Softmoe, tmp_path: Path) -> None:
    answer = softmoe("train", *TINY, "optim.layer_decay=0.5", "optim.freeze=[blocks.0.attn.*]", "--groups")
    assert answer.code == 0, answer
    lines = {line.split()[0]: line.split()[1:] for line in answer.out.splitlines() if line}
    assert lines["pos_embed"] == ["1x16x16", "0", "0.125", "0"]
    assert lines["blocks.1.mlp.experts.w1"] == ["4x16x32", "2", "0.5", "0.05"]
    assert lines["blocks.1.mlp.experts.b1"] == ["4x32", "2", "0.5", "0"]
    assert lines["blocks.0.attn.qkv.weight"] == ["48x16", "1", "frozen"]
    assert "adamw trains 7,195 of 8,299 parameters in 8 groups" in answer.out
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_of_factorised_heads_is_the_published_one() -> None:
    """james-oldfield/muMoE, finetune.py: 10 epochs of 4096 images, 500 updates of warmup, crops alone."""
    config = compose(
        "recipe=finetune_mumoe", "data=folder", "data.root=x", "data.image_size=32", "data.num_classes=1000"
    )
    o, t, a = config.optim, config.train, config.augment
    assert (o.name, o.lr, o.final_lr, o.schedule, o.clip_norm) == ("adamw", 3e-5, 0, "cosine", 1)
    assert (t.epochs, t.batch_size, t.precision, t.label_smoothing) == (10, 4096, "fp16", 0)
    assert (span_length(o.warmup, 3130), o.weight_decay, o.head_weight_decay, o.layer_decay) == (500, 0.1, 0.1, None)
    assert (a.crop, a.hflip, a.mixup, a.cutmix, a.randaugment, a.erase) == ("resized", 0, 0, 0, None, 0)


def test_the_sgd_recipe_is_the_published_one() -> None:
    """google-research/vmoe, configs/vmoe_paper/*_ft_ilsvrc2012.py."""
    config = compose("recipe=finetune_sgd", "data=folder", "data.root=x", "data.image_size=32", "data.num_classes=1000")
    o, t, a = config.optim, config.train, config.augment
    assert (o.name, o.momentum, o.lr, o.final_lr, o.schedule, o.clip_norm) == ("sgd", 0.9, 0.003, 1e-5, "cosine", 10)
    assert (t.steps, t.batch_size, t.loss, t.label_smoothing, t.ema) == (10_000, 1024, "softmax", 0, None)
    assert (span_length(o.warmup, 10_000), o.weight_decay, o.head_weight_decay, o.layer_decay) == (500, 0, 0, None)
    assert (a.crop, a.area, a.hflip, a.mixup, a.cutmix, a.randaugment, a.erase) == ("resized", 0.05, 0.5, 0, 0, None, 0)


def test_a_file_that_says_nothing_is_the_model_of_timms_name() -> None:
    source = Source("x", "", {}, {})
    card = described_by_timm(source, {"backbone": {"timm": "test_vit"}}).card
    assert card["model"]["backbone"]["timm"] == "test_vit" and card["data"]["mean"]
    ours = Source("x", "", {}, card | {"ours": True})
    assert described_by_timm(ours, {"backbone": {"timm": "test_vit2"}}) is ours
    assert all(described_by_timm(source, each) is source for each in ("???", {}, {"backbone": {"timm": "???"}}))
