"""Trainers as conf/trainer says."""

import pytest
from omegaconf import DictConfig, OmegaConf

from lark.config import find_conf
from lark.student.distributed import ShardedStrategy
from lark.training.trainer import TrainerFactory


def node(option, **settings) -> DictConfig:
    merged = OmegaConf.merge(OmegaConf.load(find_conf() / "trainer" / f"{option}.yaml"), settings)
    assert isinstance(merged, DictConfig)
    return merged


def test_fsdp_is_the_second_version_also_on_cpu_and_each_trainer_has_its_own(tmp_path):
    trainers = TrainerFactory(node("fsdp", accelerator="cpu", devices=2), tmp_path)
    one, other = (trainers.make(progress="pass", precision="32-true", inference_mode=False) for _ in range(2))
    assert trainers.precision == "32-true" and one.world_size == 2
    assert isinstance(one.strategy, ShardedStrategy) and one.strategy is not other.strategy


def test_what_lightning_refuses_names_the_settings(tmp_path):
    trainers = TrainerFactory(node("fsdp", accelerator="cpu", precision="64-true"), tmp_path)
    with pytest.raises(ValueError, match=r"trainer.strategy=fsdp trainer.precision=64-true cannot be used here"):
        trainers.make()
    with pytest.raises(ValueError, match=r"trainer.max_time=1 is not for the trainer group"):
        TrainerFactory(node("cpu", max_time=1), tmp_path)


def test_a_precision_that_the_device_does_not_have_is_not_exchanged_silently(tmp_path):
    trainers = TrainerFactory(node("cpu", precision="16-mixed"), tmp_path)
    said = r"trainer\.precision=16-mixed cannot be used here \(it would be bf16-mixed\); set it to null"
    with pytest.raises(ValueError, match=said):
        trainers.make()
    assert trainers.make(precision="32-true").precision == "32-true"
    trainers = TrainerFactory(node("cpu", precision=32), tmp_path)
    assert trainers.make().precision == "32-true"
