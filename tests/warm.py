"""Imported by the server that forks the tests' processes: what takes longer the first time has been done once, and what
is there by then is no longer searched for garbage."""

import atexit
import gc

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import softmoe_cli.cli
import softmoe_cli.launch.sweep
import softmoe_cli.train.loop  # noqa: F401 (for the processes that are forked)
from softmoe_cli.model.vit import build
from tests.conftest import TINY
from tests.oracles import compose

with torch.device("meta"):
    vit = build(compose(*TINY).model, 10)
# As memory is predicted, but forwards only: after a backward pass torch can no longer be forked.
with FakeTensorMode(allow_non_fake_inputs=True):
    vit.to_empty(device="cpu")(torch.empty(4, 1, 8, 8)).sum()
del vit
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
