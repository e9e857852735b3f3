"""Export: every router as a program, compared with the model; folders that timm, the hub and softmoe read back."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli.data import sets
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.export import make as export
from softmoe_cli.model.pretrained import read_checkpoint
from softmoe_cli.model.router import make_layer
from softmoe_cli.model.vit import build, portable
from softmoe_cli.run.card import CARD_FORMAT
from softmoe_cli.run.sealed import damage
from softmoe_cli.run.source import read_source
from tests.conftest import Softmoe
from tests.oracles import compose
from tests.processes import forked, with_little_disk
from tests.routers import ROUTERS

TINY = (
    "model.backbone.width=16", "model.backbone.depth=1", "model.backbone.heads=2", "model.backbone.mlp_width=32",
    "model.moe_blocks=last_1",
)  # fmt: skip
DROPLESS = "tokens_choice_dropless"


def weights_of(folder: Path, *overrides: str) -> tuple[Path, VisionTransformer]:
    """A model with random weights, as one of our runs would save it; and the model."""
    config = compose(*overrides)
    torch.manual_seed(0)
    vit = build(config.model, 10)
    nn.init.normal_(vit.head.weight)
    card: dict[str, Any] = {"format": CARD_FORMAT, "model": portable(config.model, vit), "data": asdict(config.data)}
    card |= {"classes": sets.load(config.data).classes, "loss": "softmax", "precision": "fp32"}
    path = folder / "model.safetensors"
    save_file(vit.state_dict(), path, metadata={"softmoe": json.dumps(card)})
    return path, vit.eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VisionTransformer]:
    return weights_of(tmp_path_factory.mktemp("soft"), "model/router=soft", "model.router.num_experts=4", *TINY)


def images(count: int, channels: int = 1, size: int = 8) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


class Zoo(nn.Module):
    """A layer for each router, on tokens of width 16."""

    def __init__(self, *names: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList()
        for name in names:
            own = ROUTERS[name] | {key: value for key, value in options.items() if key in ROUTERS[name]}
            layer = make_layer(own, 16, 16, 16, gelu="tanh", identical=False)
            nn.init.normal_(next(layer.experts.parameters()))  # so that it matters which expert a token meets
            self.layers.append(layer)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.mean(dim=1)


def tokens(images: int) -> Tensor:
    return torch.randn(images, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.thorough
def test_routers_that_sort_and_scatter_in_onnx(tmp_path: Path) -> None:
    """The programs take any number of images."""
    model, x = Zoo("experts_choice", "tokens_choice_bpr"), tokens(5)
    with torch.no_grad():
        expected = model(x)
    program = export.write_onnx(export.trace(model, tokens(2), None, "zoo"), tmp_path, "zoo")
    assert export.distance("zoo", program, x, expected, None)["max_difference"] < 1e-5


@pytest.mark.thorough
def test_rows_that_are_not_equal_are_for_torch_export_alone(tmp_path: Path) -> None:
    model, x = Zoo(DROPLESS), tokens(3)
    with torch.no_grad():
        expected = model(x)
    graph = export.trace(model, tokens(2), None, DROPLESS)
    program = export.write_torch_export(graph, tmp_path, DROPLESS)
    assert export.distance("", program, x, expected, None)["max_difference"] < 1e-5
    with pytest.raises(UsageError, match=r"no operator for aten\S+ of router tokens_choice_dropless"):
        export.write_onnx(graph, tmp_path, DROPLESS)


def test_groups_of_images_stay_together(tmp_path: Path) -> None:
    """Where images compete for slots, a program takes exactly one group and gives what the model gives."""
    model, x = Zoo("tokens_choice", images_per_group=2, capacity_factor=0.5), tokens(4)
    with torch.no_grad():
        expected, alone = model(x), torch.cat([model(each) for each in x.split(1)])
    assert (expected - alone).abs().max() > 1e-3, "groups must matter, or this shows nothing"
    program = export.write_torch_export(export.trace(model, tokens(2), 2, "tokens_choice"), tmp_path, "tokens_choice")
    assert export.distance("", program, x, expected, 2)["max_difference"] < 1e-5
    with pytest.raises(AssertionError, match="Guard failed"):
        program(x[:1])


@pytest.mark.parametrize(("size", "off", "allowed"), [(1.0, 2e-4, False), (1.0, 5e-5, True), (50.0, 2e-3, True)])
def test_how_far_outputs_may_be_off(size: float, off: float, allowed: bool) -> None:
    expected = size * torch.eye(3)
    wrong: Callable[[Tensor], Tensor] = lambda x: expected[: len(x)] + off  # noqa: E731
    if allowed:
        found = export.distance("onnx", wrong, images(3), expected, None)
        assert found == {"max_difference": pytest.approx(off, rel=0.01), "same_top1": 3}
        return
    with pytest.raises(RunError, match=r"formats=onnx: outputs are off by 0.0002 where 0.0001 is allowed, on 4 of 4"):
        export.distance("onnx", wrong, images(3), expected, None)
    with pytest.raises(RunError, match="off by nan"):
        export.distance("onnx", lambda x: expected[: len(x)] * torch.nan, images(3), expected, None)


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_folder_for_everybody(source: tuple[Path, VisionTransformer], softmoe: Softmoe, tmp_path: Path) -> None:
    """The command with both formats; the folder through timm, from the hub's cache, and as a checkpoint."""
    path, vit = source
    line = ("export", f"checkpoint={path}", "formats=[torch_export,onnx]", "folder=out", "format=json", "images=8")
    answer = softmoe(*line)
    assert answer.code == 0, answer
    told = json.loads(answer.out)
    assert told["programs"].keys() == {"timm", "torch_export", "onnx"} and told["images"] == 8
    assert all(each["max_difference"] < 1e-5 and each["same_top1"] == 8 for each in told["programs"].values())
    out = tmp_path / "out"
    assert told | {"folder": 0} == json.loads((out / "receipt.json").read_text()) | {"folder": 0}
    assert damage(out, files=None) is None
    kept = load_file(out / "model.safetensors")
    assert all(torch.equal(kept[key], value) for key, value in vit.state_dict().items())

    assert "holds this already" in softmoe(*line[:-1], "format=table", "images=8").out
    (out / "model.onnx").write_bytes(b"cut")
    assert "model.onnx does not match its checksum" in softmoe(*line).err


@pytest.mark.parametrize(
    ("kind", "crop_pct", "told"), [(None, None, ("bilinear", 1.0)), ("arrow", None, ("bicubic", 1.0)),
                                   ("webdataset", 0.875, ("bicubic", 0.875))]
)  # fmt: skip
def test_pixels_are_told_as_they_were_made(
    kind: str | None, crop_pct: float | None, told: tuple[str, float], source: tuple[Path, VisionTransformer]
) -> None:
    said = {"mean": [0.5], "std": [0.5], "format": kind, "crop_pct": crop_pct}
    model = compose("model=vit_nano2_soft").model
    made = export.hub_config(model, source[1], {"data": said, "classes": [], "model": {}})["pretrained_cfg"]
    assert (made["interpolation"], made["crop_pct"]) == told


@pytest.mark.thorough
def test_programs_are_compared_on_whole_groups(softmoe: Softmoe, tmp_path: Path) -> None:
    """The digits have 143 validation images: 35 groups of 4, and a rest."""
    path, _ = weights_of(tmp_path, "model/router=tokens_choice", "model.router.images_per_group=4", *TINY)
    line = ("export", f"checkpoint={path}", "images=144", "formats=[torch_export]", "format=json")
    answer = softmoe(*line)
    assert answer.code == 0, answer
    told = json.loads(answer.out)
    assert told["images"] == told["programs"]["torch_export"]["same_top1"] == 140
    assert told["programs"]["timm"]["same_top1"] == 140


@pytest.mark.thorough
def test_a_program_of_more_images_than_there_are_is_refused(softmoe: Softmoe, tmp_path: Path) -> None:
    path, _ = weights_of(tmp_path, "model/router=tokens_choice", "model.router.images_per_group=144", *TINY)
    line = ("export", f"checkpoint={path}", "images=144", "formats=[torch_export]")
    answer = softmoe(*line)
    assert answer.code == 2 and "fewer validation images than one group" in answer.err, answer
    assert softmoe(*line[:-1]).code == 0


def test_timm_adapts_it(source: tuple[Path, VisionTransformer], softmoe: Softmoe) -> None:
    """What timm's users do with any model: load, preprocess, another head, other sizes and channels."""
    path, vit = source
    assert softmoe("export", f"checkpoint={path}", "folder=out").code == 0
    create = lambda **asked: timm.create_model("local-dir:out", pretrained=True, **asked).eval()  # noqa: E731
    x = images(2)
    with torch.no_grad():
        assert torch.equal(create()(x), vit(x))
        features = vit.forward_head(vit.forward_features(x), pre_logits=True)
        assert torch.equal(create(num_classes=0)(x), features)
        assert create(num_classes=3)(x).shape == (2, 3)
        assert create(img_size=16)(images(2, size=16)).shape == (2, 10)
        colour = create(in_chans=3)
        assert (colour.patch_embed(x.expand(-1, 3, -1, -1)) - vit.patch_embed(x)).abs().max() < 1e-5
    pixels = timm.data.resolve_model_data_config(create())
    assert (pixels["input_size"], pixels["mean"], pixels["std"]) == ([1, 8, 8], [0.5], [0.5])
    with pytest.raises(UsageError, match="image_size=15 is not a multiple"):
        create(img_size=15)
    config = json.loads(Path("out/config.json").read_text())
    assert config["label_names"] == [str(digit) for digit in range(10)]
    config["model_args"]["softmoe"]["router"]["_target_"] = "antigravity.Router"
    Path("out/config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="if you trust it, import antigravity first"):
        create()


def test_timm_gives_a_factorised_head_other_classes(softmoe: Softmoe, tmp_path: Path) -> None:
    """Fewer or more, whether such a head could have as many parameters or not: a new one, all else as trained."""
    head = ("model.head=mumoe_cp", "model.head_experts=2", "model/router=dense")
    path, vit = weights_of(tmp_path, *head, *TINY[:-1])
    assert softmoe("export", f"checkpoint={path}", "folder=out").code == 0
    x = images(2)
    create = lambda **asked: timm.create_model("local-dir:out", pretrained=True, **asked).eval()  # noqa: E731
    with torch.no_grad():
        assert torch.equal(create()(x), vit(x)) and torch.equal(create(num_classes=10)(x), vit(x))
        features = vit.forward_head(vit.forward_features(x), pre_logits=True)
        for classes in (3, 100):
            other = create(num_classes=classes)
            assert other(x).shape == (2, classes) and type(other.head) is nn.Linear
            assert torch.equal(other.forward_head(other.forward_features(x), pre_logits=True), features)
        assert torch.equal(create(num_classes=0)(x), features)
        fresh = timm.create_model("local-dir:out", num_classes=3)
        assert fresh(x).shape == (2, 3)


def test_a_dense_timm_model_needs_timm_alone(softmoe: Softmoe, tmp_path: Path) -> None:
    """Its folder names timm's architecture, and timm's load_checkpoint takes its weights."""
    backbone = ("model/backbone=timm", "model/router=dense", "model.backbone.timm=test_vit", "model.image_size=32")
    path, vit = weights_of(tmp_path, *backbone, "model.in_chans=1")
    assert softmoe("export", f"checkpoint={path}", "folder=out").code == 0
    assert json.loads(Path("out/config.json").read_text())["architecture"] == "test_vit"
    ours, x = "out/model.safetensors", images(2, size=32)
    plain = timm.create_model("test_vit", num_classes=10, img_size=32, in_chans=1)
    timm.models.load_checkpoint(plain, ours)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), vit(x))
        assert torch.equal(timm.create_model("local-dir:out", pretrained=True).eval()(x), vit(x))


def test_a_timm_model_with_a_head_of_its_own_is_ours(softmoe: Softmoe, tmp_path: Path) -> None:
    """timm's architecture has a linear head."""
    backbone = ("model/backbone=timm", "model/router=dense", "model.backbone.timm=test_vit", "model.image_size=32")
    path, vit = weights_of(tmp_path, *backbone, "model.in_chans=1", "model.head=mumoe_cp", "model.head_experts=2")
    assert softmoe("export", f"checkpoint={path}", "folder=out").code == 0
    assert json.loads(Path("out/config.json").read_text())["architecture"] == "softmoe_vit"
    x = images(2, size=32)
    with torch.no_grad():
        assert torch.equal(timm.create_model("local-dir:out", pretrained=True).eval()(x), vit(x))


def test_pulled_from_the_hub(
    source: tuple[Path, VisionTransformer], softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder in the hub's layout on disk: timm and softmoe find it by name; what is not there is said."""
    path, vit = source
    assert softmoe("export", f"checkpoint={path}", "folder=out").code == 0
    cache, commit = tmp_path / "hub/models--someone--digits", "0" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    shutil.copytree("out", cache / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    pulled = timm.create_model("hf-hub:someone/digits", pretrained=True).eval()
    assert torch.equal(pulled(images(2)), vit(images(2)))
    source_again = read_checkpoint("hf-hub:someone/digits@main")
    assert source_again.digest == read_source(str(path)).digest and source_again.label == "hf-hub:someone/digits@main"
    told = json.loads(softmoe("evaluate", "checkpoint=hf-hub:someone/digits", "format=json").out)
    assert told["checkpoint"] == "hf-hub:someone/digits" and told["images"] == 359
    for name, words in (("someone/else", "could not be fetched"), ("a/b/c", "is not of the form hf-hub:OWNER/NAME")):
        with pytest.raises(UsageError, match=words):
            read_checkpoint(f"hf-hub:{name}")


def test_push(
    source: tuple[Path, VisionTransformer], softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network it fails in one sentence and the folder stays; with one, the hub's own function gets it."""
    line = ("export", f"checkpoint={source[0]}", "folder=out", "push=someone/digits")
    answer = softmoe(*line)
    assert answer.code == 1 and answer.err.count("\n") == 1, answer
    assert "push=someone/digits failed" in answer.err and "out is whole" in answer.err
    assert damage(tmp_path / "out", files=None) is None
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, name, **how: calls.append({"name": name, **how})
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **how: calls.append(how))
    answer = softmoe(*line)
    assert answer.code == 0 and "https://huggingface.co/someone/digits" in answer.out, answer
    assert calls[0] == {"name": "someone/digits", "private": True, "exist_ok": True}
    assert calls[1]["repo_id"] == "someone/digits" and calls[1]["folder_path"] == Path("out")


def test_outputs_that_differ_leave_nothing(
    source: tuple[Path, VisionTransformer], softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy.deepcopy(source[1])
    nn.init.constant_(other.head.bias, 1.0)
    monkeypatch.setattr(export, "timm", SimpleNamespace(create_model=lambda *_, **__: other))
    answer = softmoe("export", f"checkpoint={source[0]}", "folder=out")
    assert answer.code == 1 and "nothing was written" in answer.err, answer
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["torch_export", "onnx"])
def test_full_disk(name: str, source: tuple[Path, VisionTransformer], tmp_path: Path) -> None:
    """A file size limit stands for the disk, above the weights and below programs: one sentence, and nothing is
    left."""
    (tmp_path / "here").mkdir()
    line = ["export", f"checkpoint={source[0]}", "folder=out", f"formats=[{name}]", "threads=1"]
    assert forked(tmp_path / "told.txt", with_little_disk, tmp_path / "here", line) == 1
    assert "softmoe: cannot write out: [Errno 27] File too large" in (tmp_path / "told.txt").read_text()
    assert "Traceback" not in (tmp_path / "told.txt").read_text() and not list((tmp_path / "here").iterdir())


WRONG = {
    "without a checkpoint": ("", "needs checkpoint="),
    "a format": ("checkpoint=SOURCE formats=[onxx]", "Did you mean 'onnx'?"),
    "a name": ("checkpoint=SOURCE push=digits", "push=digits is not of the form OWNER/NAME: it has no owner"),
    "a key": ("checkpoint=SOURCE formts=[onnx]", "Did you mean 'formats'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_line(name: str, source: tuple[Path, VisionTransformer], softmoe: Softmoe, tmp_path: Path) -> None:
    line, words = WRONG[name]
    answer = softmoe("export", *line.replace("SOURCE", str(source[0])).split())
    assert answer.code == 2, answer
    assert words in answer.err
    assert list(tmp_path.iterdir()) == [], "nothing may be written"


def test_onnx_that_is_not_installed(
    source: tuple[Path, VisionTransformer], softmoe: Softmoe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    answer = softmoe("export", f"checkpoint={source[0]}", "formats=[onnx]")
    assert (
        answer.code == 2 and "needs onnxscript, which is not installed: pip install 'softmoe-cli[onnx]'" in answer.err
    )
