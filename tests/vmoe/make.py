"""Writes made/: checkpoints of tiny models with random weights, by the official code, and the logits of that code.

It needs jax, flax, optax, einops and the packages `vmoe` (google-research/vmoe at 942a78bc), `vit_jax`
(google-research/vision_transformer at c6de1e53) and `big_vision` (google-research/big_vision at 0127fb6b) where Python
finds them, and is no test: the files in made/ came of it once, with jax 0.4.35 and flax 0.10.2 on a CPU. Of TensorFlow,
which the official code opens files with, a stand-in of a few lines is enough.

    python tests/vmoe/make.py tests/vmoe/made

- `v_moe.index` with its `v_moe.data-*`: what vmoe's own partitioned saving writes of a training state, in three shards
  and small chunks. Class token, pre-logits, tokens that choose (k = 2) in blocks 1 and 3, room for all of them.
- `soft_moe.msgpack`: `flax.serialization.to_bytes` of a state with `params`. Mean of tokens, norms on queries and keys,
  two slots for each of three experts in the last block.
- `experts_choice.msgpack`: as before, of parameters alone; experts that take as many tokens as there are for each.
- `big_vision.npz`: a dense ViT of big_vision's, as its `save` wrote archives: names with slashes, class token added
  after the positions, pre-logits.
- `sincos2d.npz`: the same with fixed positions, mean of tokens, bfloat16 numbers and all blocks in one (`scan`).
- `logits.json`: the float32 logits of each, of `images(...)`, by the official code. The official routers round tokens
  and the experts' rows to bfloat16; for these numbers that rounding, and nothing else, was switched off.
"""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np


def images(side: int, number: int = 3) -> np.ndarray:
    """Images that both sides can make from nothing: b s s c, float32."""
    counted = np.arange(number * side * side * 3, dtype=np.float64)
    return np.sin(counted * 0.7 + counted**2 * 1e-4).astype(np.float32).reshape(number, side, side, 3)


SIDE, PATCH, CLASSES = 12, 4, 5
WIDE: dict[str, Any] = {"num_layers": 4, "mlp_dim": 12, "num_heads": 2}
COMMON: dict[str, Any] = {"num_classes": CLASSES, "patch_size": (PATCH, PATCH), "hidden_size": 8, "deterministic": True}


def stand_in_for_tensorflow() -> None:
    """What vmoe and big_vision ask of TensorFlow to write a local file."""
    gfile = types.ModuleType("tensorflow.io.gfile")
    vars(gfile).update(
        GFile=open,
        exists=os.path.exists,
        makedirs=lambda path: os.makedirs(path, exist_ok=True),
        rename=lambda old, new, overwrite=True: os.replace(old, new),
    )
    io, tensorflow = types.ModuleType("tensorflow.io"), types.ModuleType("tensorflow")
    io.gfile, tensorflow.io = gfile, io  # type: ignore[attr-defined]
    sys.modules |= {"tensorflow": tensorflow, "tensorflow.io": io, "tensorflow.io.gfile": gfile}


def randomised(params: Any, seed: int) -> Any:
    """Random numbers in the places of all parameters: no zero head, no unit scales, no experts that are alike."""
    import jax

    leaves, tree = jax.tree_util.tree_flatten(params)
    draw = np.random.default_rng(seed)
    return tree.unflatten([jax.numpy.asarray(draw.normal(0, 0.5, leaf.shape), "float32") for leaf in leaves])


def vmoe_models() -> dict[str, Any]:
    """The official arguments of each model of vmoe's."""
    tokens = (SIDE // PATCH) ** 2
    soft = {"name": "vmoe.projects.soft_moe.router.SoftRouter", "num_slots": 2, "compute_similarity_metrics": False}
    room = {"name": "einsum", "capacity_factor": 2.0, "batch_priority": False, "capacity_multiple_of": None}
    takes = {"name": "einsum", "capacity_factor": 1.0, "capacity_ceil_or_round": "round", "capacity_multiple_of": 1}
    chosen = {"num_selected_experts": 2, "noise_std": 1.0, "dispatcher": room}
    taken = {"name": "NoisyTopItemsPerExpertRouter", "noise_std": 1.0, "dispatcher": takes}
    mixture = {"num_experts": 3, "group_size": tokens, "router": soft, "layers": (3,)}
    return {
        "v_moe": COMMON
        | {"classifier": "token", "representation_size": 8}
        | {"encoder": WIDE | {"moe": {"layers": (1, 3), "num_experts": 4, "group_size": tokens + 1, "router": chosen}}},
        "soft_moe": COMMON | {"classifier": "gap", "encoder": WIDE | {"attention_qk_norm": True, "moe": mixture}},
        "experts_choice": COMMON
        | {
            "classifier": "gap",
            "encoder": WIDE | {"num_layers": 2, "moe": mixture | {"layers": (1,), "router": taken}},
        },
    }


def write_vmoe(folder: Path) -> dict[str, Any]:
    """Three models of vmoe's, and their logits."""
    import flax
    import jax
    from vmoe.checkpoints import partitioned
    from vmoe.nn.vit_moe import VisionTransformerMoe
    from vmoe.projects.soft_moe import router

    router.Bfloat16Dispatcher = lambda dispatcher: dispatcher  # the rounding alone
    logits, x = {}, images(SIDE)
    for seed, (name, arguments) in enumerate(vmoe_models().items()):
        model = VisionTransformerMoe(**arguments)
        params = randomised(model.init(jax.random.PRNGKey(0), x)["params"], seed)
        logits[name] = np.asarray(model.apply({"params": params}, x)[0]).tolist()
        state = {"params": flax.core.unfreeze(params), "step": jax.numpy.asarray(7)}
        if name == "v_moe":
            state["opt_state"] = [{"count": jax.numpy.asarray(7)}, {"mu": {"head": jax.numpy.ones(3)}}]
            partitioned.save_checkpoint(str(folder / name), state, num_shards=3, max_chunk_bytes=400).wait()
        else:
            saved = state if name == "soft_moe" else state["params"]
            (folder / f"{name}.msgpack").write_bytes(flax.serialization.to_bytes(saved))
    return logits


def write_big_vision(folder: Path) -> dict[str, Any]:
    """Two dense models of big_vision's, and their logits."""
    import flax
    import jax
    from big_vision.models import vit

    logits, x = {}, images(SIDE)
    size: dict[str, Any] = {
        "patch_size": (PATCH, PATCH),
        "width": 8,
        "depth": 2,
        "mlp_dim": 12,
        "num_heads": 2,
        "rep_size": True,
    }
    kinds: dict[str, dict[str, Any]] = {
        "big_vision": {"pool_type": "tok"},
        "sincos2d": {"pool_type": "gap", "posemb": "sincos2d", "scan": True},
    }
    for seed, (name, arguments) in enumerate(kinds.items()):
        model = vit.Model(CLASSES, **size, **arguments)
        params = randomised(model.init(jax.random.PRNGKey(0), x)["params"], 10 + seed)
        if name == "sincos2d":
            params = jax.tree_util.tree_map(lambda each: each.astype("bfloat16").astype("float32"), params)
        logits[name] = np.asarray(model.apply({"params": params}, x)[0]).tolist()
        named = flax.traverse_util.flatten_dict(flax.core.unfreeze(params), sep="/")
        if name == "sincos2d":  # numpy writes bfloat16 numbers as two bytes without a meaning
            named = {key: np.asarray(value.astype("bfloat16")).view("V2") for key, value in named.items()}
        archive: dict[str, Any] = {f"params/{key}": np.asarray(value) for key, value in named.items()}
        np.savez(folder / f"{name}.npz", **archive)
    return logits


if __name__ == "__main__":
    import flax.training.checkpoints  # noqa: F401  which looks for the true TensorFlow

    stand_in_for_tensorflow()
    place = Path(sys.argv[1])
    logits = write_vmoe(place) | write_big_vision(place)
    (place / "logits.json").write_text(json.dumps(logits, indent=1) + "\n")
