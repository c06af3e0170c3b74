"""docs/reproducing.md: the papers' settings are what its commands compose to; its costs are recomputed."""

import re

from omegaconf import DictConfig, OmegaConf
from pages import commands, composed, text_of
from transformers import Qwen2Config

from lark import config as configuration
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


def test_costs() -> None:
    """The table is the formulas above it."""
    flops, share, bandwidth, reached = 989e12, 0.4, 3.35e12, 0.5
    pool, trained, answers = 4500 * 33 * 4000, 4500 * 3 * 4000, 798 * 5 * 4000
    rows = re.findall(r"^\| `\w+` \| (\d+\.\d+) \| ([\d,]+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 6
    for billions, cache_bytes, hours in rows:
        n, c = float(billions) * 1e9, int(cache_bytes.replace(",", ""))
        seconds = [
            2 * n * pool / (share * flops),
            6 * n * trained * 3 / (share * flops),
            8 * n * trained * 5 / (share * flops),
            answers * (2 * n / 64 + c * 4000 / 2) / (reached * bandwidth),
        ]
        assert hours.split(" | ") == [f"{value / 3600:.1f}" for value in seconds]
