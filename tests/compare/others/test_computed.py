"""Costs of timm models, by name."""

from pathlib import Path

import pytest
import timm
import torch

from softmoe_cli.compare.others.computed import model_cost
from softmoe_cli.cost.flop import count_flop
from tests.synthetic import asked


def test_they_are_what_is_counted_in_timms_own_model() -> None:
    """torch's counter, over the model that timm makes."""
    found = model_cost("vit_tiny_patch16_224", 96, None, 10)
    assert isinstance(found, dict)
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=10)
    assert found["params_m"] == found["active_params_m"] == sum(each.numel() for each in vit.parameters()) / 1e6
    forward, step = count_flop(vit, batch=1, recompute=False)
    assert found["forward_gflop"] == pytest.approx(forward.flop / 1e9, rel=1e-12)
    assert found["train_gflop"] == pytest.approx(step.flop / 1e9, rel=1e-12)


def test_what_is_stated_is_kept_and_training_follows_from_images(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "model,seed,acc,seen,params\nvit_tiny_patch16_224,0,90,1000,7\nresnet18,0,90,1000,7\nown_net,0,91,1000,7\n"
    )
    comparison = asked(tmp_path / "t.csv", map=("quality=acc", "images=seen,params_m=params"), by=("model",))
    rows = {run.row["backbone"]: run.row for each in comparison.groups for run in each.runs}
    tiny = rows["vit_tiny_patch16_224"]
    assert tiny["params_m"] == 7, "stated"
    assert tiny["train_pflop"] == pytest.approx(1000 * tiny["train_gflop"] / 1e6)
    assert tiny["computed"] == ["active_params_m", "forward_gflop", "train_gflop", "train_pflop"]
    assert "forward_gflop" not in rows["own_net"] and "forward_gflop" not in rows["resnet18"]
    told = " ".join(comparison.notes)
    assert "own_net is no model of timm" in told and "softmoe cost knows no cost of resnet18" in told
    assert "train_pflop (from images) are computed" in told
