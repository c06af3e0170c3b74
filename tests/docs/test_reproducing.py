"""docs/reproducing.md: the papers' settings are what its commands compose to; its costs are recomputed."""

import re
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from pages import commands, composed, text_of
from transformers import Qwen2Config

from lark import config as configuration
from lark.experiment.bill import CostSettings, find_device, read_shape
from lark.experiment.cost import Work, estimate_stages
from lark.student.student import Student
from lark.training.recipe import Recipe

PAGE = text_of("docs/reproducing.md")
COMMANDS = [line.replace("<hash>", "0" * 16) for line in commands("docs/reproducing.md")]
RUNS = [line for line in COMMANDS if "lark.run" in line]


def papers(word: str) -> DictConfig:
    (command,) = (command for command in RUNS if word in command and "probe.top_k=50" in command)
    return composed(command)


def test_the_papers_settings() -> None:
    """What the page's table says, against what its commands come to."""
    lora, full, stretched = papers("model=qwen sft"), papers("trainer=fsdp"), papers("model=qwen_math")
    assert (lora.sft.lr, lora.sft.epochs, lora.task.max_length) == (1e-4, 3, 8192)
    assert (full.sft.lr, full.sft.epochs, full.task.max_length) == (1e-5, 5, 32768)
    assert lora.model.lora == {"r": 64, "lora_alpha": 128, "lora_dropout": 0.05, "target_modules": "all-linear"}
    assert full.model.lora is None and full.trainer.precision == "bf16-mixed"
    for config, steps in ((lora, 633), (full, 1055), (stretched, 633)):
        sft, boxed = config.sft, r"Please reason step by step, and put your final answer within \boxed{}."
        assert (sft.batch_size, sft.schedule, sft.warmup, sft.weight_decay, sft.clip) == (64, "cosine", 0.05, 0, 1.0)
        assert (config.budget, config.probe.top_k, config.probe.span) == (3, 50, "authors")
        assert (config.evaluation.temperature, config.evaluation.top_p) == (0.6, 0.95)
        assert config.task.system == boxed and config.model.gradient_checkpointing
        assert config.task.eval == "aime24, aime25, amc23, math500, gpqa"
        recipe: Recipe = configuration.build(sft)
        kept = round(5000 * (1 - config.task.held_out))
        assert recipe.count_steps(kept * config.budget) == steps and f"{steps:,} " in PAGE


def test_the_stretched_students_positions_are_what_transformers_makes_of_them() -> None:
    config = Qwen2Config(**OmegaConf.to_container(papers("model=qwen_math").model.config))  # type: ignore[arg-type]
    assert config.max_position_embeddings == 32768
    assert config.rope_parameters is not None and config.rope_parameters.get("rope_theta") == 300000


def test_students() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\w./-]+)[ |]", PAGE, re.MULTILINE)
    named = {option: weights for option, weights in rows if "/" in weights}
    assert {"qwen", "qwen_math", "llama"} < set(named) <= set(configuration.list_options("model"))
    for option, weights in named.items():
        student: Student = configuration.build_model_option(option)
        assert student.id == weights


SIZES = {  # hidden, layers, heads, key-value heads, intermediate, vocabulary, tied embeddings
    "qwen": (3584, 28, 28, 4, 18944, 152064, False),
    "qwen_math": (3584, 28, 28, 4, 18944, 152064, False),
    "qwen3_14b": (5120, 40, 40, 8, 17408, 151936, False),
    "llama": (4096, 32, 32, 8, 14336, 128256, False),
    "qwen3": (2560, 36, 32, 8, 9728, 151936, True),
    "qwen_3b": (2048, 36, 16, 2, 11008, 151936, True),
}


def test_costs(tmp_path: Path) -> None:
    """The table is what stop_after=cost reckons with, for the counts that the page gives."""
    work = Work(
        passes={"statistics": (1, 0)},
        rows=4500 * 33,
        row_tokens=4000.0,
        arms=1,
        steps=4500 * 3 * 3 // 64,
        batch_size=64,
        held_out_rows=256 * 21,
        sampled=798 * 5,
        answer_tokens=4000.0,
    )
    device = find_device(CostSettings(device="h100"), torch.device("cpu"))
    rows = re.findall(r"^\| `(\w+)` \| (\d+\.\d+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert [option for option, *_ in rows] == list(SIZES)
    for option, billions, hours in rows:
        hidden, layers, heads, kv_heads, intermediate, vocabulary, is_tied = SIZES[option]
        config = Qwen2Config(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=intermediate,
            vocab_size=vocabulary,
            tie_word_embeddings=is_tied,
        )
        config.head_dim = 128
        config.save_pretrained(tmp_path / option)
        made: Student = configuration.build_model_option(option)
        found = []
        for lora in (made.lora, None):
            student = replace(made, path=str(tmp_path / option), lora=lora, dtype="bfloat16")
            shape = read_shape(student, torch.device("cpu"))
            stages = estimate_stages(shape, work, device, {})
            found.append({stage.name.partition(",")[0]: stage.seconds / 3600 for stage in stages})
        assert f"{shape.parameters / 1e9:.2f}" == billions
        lora_hours, full_hours = found
        cells = [lora_hours["statistics"], lora_hours["training"], full_hours["training"], lora_hours["held-out loss"]]
        cells.append(lora_hours["answers"] / 2)  # one student of two
        assert hours.split(" | ") == [f"{value:.1f}" for value in cells], option
