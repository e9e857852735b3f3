"""What is asked before the first job."""

import os
import signal
from pathlib import Path

import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig

from softmoe_cli.launch import plan, sweep
from softmoe_cli.moe.processor import CPU_PRODUCTS
from softmoe_cli.options import inherit
from tests.conftest import TINY, Softmoe
from tests.launch.sweeps import LINE


def test_a_plan_writes_nothing_and_composes_a_job_once(
    softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed: list[str] = []
    compose = ConfigLoaderImpl.load_sweep_config

    def counted(self: ConfigLoaderImpl, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        composed.append(" ".join(sweep_overrides))
        return compose(self, master_config, sweep_overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    answer = softmoe("train", "-m", *LINE, "train.steps=100", "seed=0,1", "data.hflip=0,0.5", "--plan")
    assert answer.code == 0, answer
    assert "seed=1 data.hflip=0.5" in answer.out or "data.hflip=0.5" in answer.out
    lines = answer.out.splitlines()
    assert lines[-1].startswith("4 jobs, 4 to do: 1.412 GFLOP, ") and "at a time" in lines[-1]
    assert all("waiting" in line and "outputs/default/vit_nano2_soft-digits-" in line for line in lines[1:5])
    assert list(tmp_path.iterdir()) == []
    assert len(composed) == len(set(composed)) == 4


def test_a_plan_is_of_a_sweep(softmoe: Softmoe) -> None:
    for line in (("train", "--plan"), ("cost", "-m", "--plan")):
        answer = softmoe(*line)
        assert answer.code == 2 and "--plan lists the jobs of a sweep" in answer.err


def test_the_process_that_checks_the_jobs_is_killed(softmoe: Softmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "answer", killed)
    answer = softmoe("train", "-m", *TINY, "seed=0,1")
    words = "the process that checks the jobs has ended: killed by SIGKILL, which is also what the system does"
    assert answer.code == 1 and words in answer.err and "Traceback" not in answer.err
    assert answer.out.splitlines()[-1] == "2 jobs; all are checked before the first one starts", "said before the check"


def killed(_inquiry: plan.Inquiry) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_defect_in_the_process_that_checks_the_jobs(softmoe: Softmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "answer", confused)
    answer = softmoe("train", "-m", *TINY, "seed=0,1")
    assert answer.code == 1 and "2 of 2 jobs cannot work" in answer.err
    assert "seed=1: ValueError: odd; raised in" in answer.err


_ANSWER = plan.answer


def test_seeds_at_once_in_the_precision_of_auto(softmoe: Softmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is fp32 they are computed (tests/stack/test_command.py); where it is not, they are refused."""
    monkeypatch.setattr(sweep, "answer", with_fast_bf16)
    line = ("train", "-m", *TINY, "model.backbone.width=192", "train.precision=auto", "seed=0,1", "seeds_at_once=2")
    answer = softmoe(*line)
    words = "seed=0: seeds_at_once=2: train.precision=bf16 was not tried for several models; set it to fp32, or leave"
    assert answer.code == 2 and words in answer.err, answer


def with_fast_bf16(inquiry: plan.Inquiry) -> object:
    CPU_PRODUCTS[torch.bfloat16] = "fast"
    return _ANSWER(inquiry)


def confused(inquiry: plan.Inquiry) -> object:
    inherit.resolve = odd  # type: ignore[assignment]
    return _ANSWER(inquiry)


def odd(*_: object) -> None:
    raise ValueError("odd")
