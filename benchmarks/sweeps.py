"""Folders of finished runs that never ran: a sweep of made-up figures and texts, as lark.run leaves them."""

import csv
import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lark.common.cache import write_json
from lark.comparison.inference import compute_paired_difference, compute_smallest_detectable
from lark.page.pool_sample import NAME, shorten

RULES = ("lark", "random", "longest", "shortest", "likelihood", "rsr", "entropy", "lark_length")
TEACHERS = ("qwen3-8b", "deepseek-r1", "llama-3.1-70b", "phi-4", "gpt-oss-20b")
STEPS, POINTS, BUDGET, EVALUATED = 60, 20, 2, 200
WORDS = 4_000  # of the texts' vocabulary, drawn as in natural text


def write_sweep(
    folder: Path,
    *,
    rules: Sequence[str] = RULES,
    seeds: Sequence[int] = (0, 1, 2),
    problems: int = 400,
    characters: int = 1_300,
    names: Sequence[str] = TEACHERS,
    texts: Sequence[str] = (),
) -> list[Path]:
    """A run of the first rule against each other one and for each seed, with a pool of `problems`, each solved by every
    teacher of `names` in about so many characters; `texts` are the first trajectories instead. Returns the folders.
    """
    pool = _Pool(problems, names, characters, texts)
    (folder / "multirun.yaml").parent.mkdir(parents=True, exist_ok=True)
    (folder / "multirun.yaml").write_text("{}\n")
    folders = []
    for seed in seeds:
        chosen = {rule: pool.choose(number, seed) for number, rule in enumerate(rules)}
        for rule in rules[1:]:
            run = folder / str(len(folders))
            roles = {"baseline": rule, "selector": rules[0]}
            pool.write(run / NAME, {role: chosen[name] for role, name in roles.items()}, roles, seed)
            write_json(
                run / "summary.json",
                _summary(roles, seed, {role: pool.record(*chosen[r]) for role, r in roles.items()}),
            )
            _write_diagnostics(run, pool, rules, chosen)
            folders.append(run)
    return folders


class _Pool:
    """Shapes: N candidates."""

    def __init__(self, problems: int, names: Sequence[str], characters: int, texts: Sequence[str]):
        rng = np.random.default_rng(0)
        self.problems, self.names = problems, names
        vocabulary = ["".join(rng.choice(list("abcdefghijklmnoprstuvw"), rng.integers(2, 11))) for _ in range(WORDS)]
        often = 1 / np.arange(1, WORDS + 1)

        def prose(length: float) -> str:
            words = rng.choice(vocabulary, max(3, int(length / 6)), p=often / often.sum())
            return ". ".join(" ".join(words[i : i + 9]).capitalize() for i in range(0, len(words), 9)) + "."

        self.texts = [
            f"{prose(characters * rng.lognormal(0, 0.4))}\nSo the answer is \\boxed{{{i}}}."
            for i in range(problems)
            for _ in names
        ]
        self.texts[: len(texts)] = texts
        self.questions = [f"{prose(160)} What is {i} + {i}?" for i in range(problems)]
        self.teacher_N = np.tile(np.arange(len(names)), problems)
        self.loss_N = rng.gamma(8, 0.05, len(self.texts)) * (1 + 0.3 * self.teacher_N)
        self.correct_N = rng.random(len(self.texts)) < 0.8

    def choose(self, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and weights [N] of the rule of that number: the first one's weights are unequal."""
        rng = np.random.default_rng([number, seed if number == 1 else 0])
        score_N = rng.normal(0, 1, len(self.texts)) + (number - 3) * 0.3 * self.loss_N
        weight_N = np.zeros(len(self.texts))
        for start in range(0, len(self.texts), len(self.names)):
            best = start + np.argsort(-score_N[start : start + len(self.names)])[:BUDGET]
            weight_N[best] = rng.dirichlet([2.0] * len(best)) if number == 0 else 1 / len(best)
        return score_N, weight_N * (weight_N > 0).sum() / weight_N.sum()

    def record(self, score_N: np.ndarray, weight_N: np.ndarray) -> dict[str, Any]:
        shares = np.bincount(self.teacher_N, weight_N, len(self.names)) / weight_N.sum()
        return {
            "counts": {"chosen": int((weight_N > 0).sum())},
            "effective_sample_size": float(weight_N.sum() ** 2 / (weight_N**2).sum()),
            "teacher_share": dict(sorted(zip(self.names, shares.tolist(), strict=True), key=lambda item: -item[1])),
            "tokens": sum(len(self.texts[i]) // 4 for i in np.flatnonzero(weight_N)),
        }

    def write(self, path: Path, chosen: dict[str, Any], rules: dict[str, str], seed: int) -> None:
        """candidates.jsonl.gz, as lark.page.pool_sample does."""
        count = len(self.names)
        ids = [str(i) for i in range(self.problems)]
        short = [shorten(text) for text in self.texts]
        facts = {
            "task": "made_up",
            "model": "smollm2",
            "seed": seed,
            "settings": {},
            "pool": f"{self.problems} made-up problems",
            "problems": self.problems,
            "of_problems": 4 * self.problems,
            "trajectories": len(self.texts),
            "of_trajectories": 4 * len(self.texts),
            "cut": sum("tail" in text for text in short),
            "arms": {
                role: {"rule": rule, "hash": f"{rule}{seed}", "record": self.record(*chosen[role])}
                for role, rule in rules.items()
            },
        }
        columns = {
            "problem_id": [problem for problem in ids for _ in range(count)],
            "candidate_id": [str(i) for _ in ids for i in range(count)],
            "teacher": [self.names[teacher] for teacher in self.teacher_N],
            "correct": self.correct_N.tolist(),
            "tokens": [len(text) // 4 for text in self.texts],
            "loss": np.round(self.loss_N, 4).tolist(),
            "characters": [len(text) for text in self.texts],
        }
        scores, weights = (
            {role: [float(f"{x:.5g}") for x in of[part]] for role, of in chosen.items()} for part in (0, 1)
        )
        head = {"facts": facts, "columns": columns, "scores": scores, "weights": weights}
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
            file.write(json.dumps(head) + "\n")
            for i, question in enumerate(self.questions):
                line = {
                    "problem_id": ids[i],
                    "question": {"text": question},
                    "answer": str(i),
                    "prompt": {"text": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"},
                    "texts": [
                        text | {"end": "<|im_end|>", "untrained": None} for text in short[i * count : (i + 1) * count]
                    ],
                }
                file.write(json.dumps(line) + "\n")


def _summary(rules: dict[str, str], seed: int, records: dict[str, Any]) -> dict[str, Any]:
    arms: dict[str, Any] = {}
    for role, rule in {"before": "before", **rules}.items():
        rng = np.random.default_rng([sum(map(ord, rule)), seed])
        gain = 0.0 if rule == "before" else 0.05 + 0.3 * (sum(map(ord, rule)) % 7) / 7
        skill = np.random.default_rng(7).beta(2, 3, EVALUATED)
        correct = (rng.random((EVALUATED, 4)) < np.clip(skill + gain, 0, 1)[:, None]).mean(1)
        noise = rng.normal(0, 0.004, POINTS + 1).cumsum()
        curve = [
            {
                "step": round(i * STEPS / POINTS),
                "held_out/loss": 0.9 - gain * (1 - math.exp(-i / 6)) + noise[i] * (i > 0),
            }
            for i in range(1 if rule == "before" else POINTS + 1)
        ]
        metrics = {"avg@4": float(correct.mean()), "pass@4": float((correct > 0).mean()), "stop": 0.97, "boxed": 0.95}
        record = records.get(role, {})
        arms[role] = {
            "rule": rule,
            "hash": f"{rule}{seed}",
            "action": "train",
            "matched": rule != "all",
            "lr": None if rule == "before" else 1e-4,
            "cost": {"forward_tokens": 140_000 * (rule[0] in "lr"), "backward_tokens": 0, "seconds": 12.5},
            "trajectories": record.get("counts", {}).get("chosen", 0),
            "tokens": record.get("tokens", 0),
            "effective_sample_size": record.get("effective_sample_size", 0.0),
            "held_out_loss": curve[-1]["held_out/loss"],
            "held_out_loss_correct": None,
            "curve": curve,
            "selection": record,
            "metrics": {"eval": metrics},
            "per_problem": {"eval": {str(i): float(x) for i, x in enumerate(correct)}},
        }
    a, b = (np.array([list(arms[role]["per_problem"]["eval"].values())]) for role in ("selector", "baseline"))
    interval = compute_paired_difference(a, b, resamples=200)
    smallest = compute_smallest_detectable(interval.standard_error, df=interval.df)
    return {
        "status": "finished",
        "task": "made_up",
        "model": "smollm2",
        "seed": seed,
        "selector": rules["selector"],
        "baseline": rules["baseline"],
        "settings": {"selector.name": rules["selector"], "baseline.name": rules["baseline"]},
        "difference_of": ["selector", "baseline"],
        "sets": {
            "eval": {"metrics": ["avg@4", "pass@4"], "difference": vars(interval) | {"smallest_detectable": smallest}}
        },
        "arms": arms,
    }


def _write_diagnostics(run: Path, pool: _Pool, rules: Sequence[str], chosen: dict[str, Any]) -> None:
    """diagnostics.json, as far as the page reads it, and diagnostics-candidates.csv of 40 problems."""

    def mean(value: float, **more: float) -> dict[str, Any]:
        spread = {"low": max(value - 0.1, -1), "high": min(value + 0.1, 1), "problems": 40}
        return {"mean": value, **spread, "chance": 0.0, "chance_low": -0.15, "chance_high": 0.15, **more}

    rng = np.random.default_rng(1)
    values = {rule: float(rng.uniform(-0.9, 0.9)) for rule in rules}
    targets = ("loss", "length", "correct")
    losses = [0.82, 0.8, 0.79, 0.76]
    trend = {"spearman": -1.0, "p": 0.083, "bins": 4}
    found = {
        "correlations": {r: {t: {"within": mean(float(rng.uniform(-0.9, 0.9)))} for t in targets} for r in rules},
        "fidelity": {
            "problems": 40,
            "candidates": 40 * len(pool.names),
            "of_problems": pool.problems,
            "parameters": "trained",
            "proxies": {
                rule: {"loss_drop": {"spearman": mean(value), "overlap": mean(0.5, chance=0.4)}}
                for rule, value in values.items()
            },
        },
        "bins": {
            "bins": 4,
            "rule": rules[0],
            "problems": pool.problems,
            "rows": [
                {"bin": i + 1, "held_out_loss": loss, "accuracy": {"eval": 0.3 + 0.05 * i}}
                for i, loss in enumerate(losses)
            ],
            "trends": {"held_out_loss": trend, "eval": trend | {"spearman": 1.0}},
        },
    }
    write_json(run / "diagnostics.json", found)
    with (run / "diagnostics-candidates.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["problem_id", "candidate_id", "teacher", "exact_loss_drop", *rules])
        for row in range(min(40 * len(pool.names), len(pool.texts))):
            problem, candidate = divmod(row, len(pool.names))
            drop = float(rng.normal()) + 0.8 * chosen[rules[0]][0][row]
            scores = [chosen[rule][0][row] for rule in rules]
            writer.writerow([problem, candidate, pool.names[candidate], drop, *scores])
