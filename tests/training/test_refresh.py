"""Re-anchoring: the current student is asked, training goes on as if it had not been, killed anywhere it goes on."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rows_of_a_pool, write_pool
from lark_command import lark
from lark_process import TWO_RANKS, finish, start
from safetensors.torch import load_file

from lark.common.cache import identity_hash, read_json
from lark.scoring.statistics_pass import PassModule
from lark.selection.policies import Policy
from lark.selection.scores.gradients import GradMatch
from lark.selection.scores.statistics import Length, Likelihood, Random
from lark.selection.selection import Between, Rule
from lark.student.student import save_student
from lark.training.arms import make_arm, train
from lark.training.refresh import announce, current, refresh_identity, segments, settings_of, total_cost
from lark.training.sft_module import SFTModule

LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}
STEPS, REFRESH = 8, 3


class KillError(Exception):
    pass


@pytest.fixture
def make_arm_of(make_data, make_trainer, tmp_path):
    """The data and an arm whose rule chooses anew every REFRESH of STEPS steps, and a function that trains it."""

    def make(*, name="selector", refresh=REFRESH, arms="arms", say=None, rule=None, **settings):
        settings["recipe"] = {"checkpoint_every": 2, "lr": 3e-3} | settings.get("recipe", {})
        data = make_data(**settings)
        data.rules[name] = replace(rule or data.rules[name], refresh=refresh)
        data.prepare_data()
        data.setup("fit")
        arm = make_arm(
            name,
            data.rules[name].name,
            data,
            steps=STEPS,
            precision="32-true",
            recipe=data.recipe,
            evaluation={},
            arms=tmp_path / arms,
        )

        def trained():
            quiet = say or (lambda text: None)
            train(arm, data, steps=STEPS, make_trainer=make_trainer, logger=None, say=quiet)
            return arm

        return data, arm, trained

    return make


def weights(arm) -> dict[str, torch.Tensor]:
    (file,) = arm.checkpoint.glob("*model.safetensors")
    return load_file(file)


def chosen(data, row) -> set[tuple[str, str]]:
    pool = data.trajectories
    return set(zip(pool.problem_id[row].tolist(), pool.candidate_id[row].tolist(), strict=True))


def weights_in(folder: Path) -> dict[tuple[str, str], float]:
    """By problem and candidate, of what was chosen."""
    lines = map(json.loads, (folder / "selection.jsonl").read_text().splitlines())
    return {(line["meta"]["problem_id"], line["meta"]["candidate_id"]): line["weight"] for line in lines}


def test_segments_cover_all_steps(tmp_path):
    for steps, refresh, ends in ((8, 3, [3, 6, 8]), (6, 3, [3, 6]), (2, 3, [2]), (5, None, [5]), (2, 1, [1, 2])):
        parts = segments(tmp_path, steps, refresh)
        assert [part.end for part in parts] == ends
        assert [part.first for part in parts] == [0, *ends[:-1]]


# ---- what is chosen


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_current_student_chooses(lora, make_arm_of, make_data, make_student, make_trainer, tmp_path):
    """Against a run of its own: train to the first refresh, save, ask what was saved."""
    said = []
    data, arm, trained = make_arm_of(student={"lora": lora}, say=said.append)
    trained()

    alone = make_data(cache="alone", student={"lora": lora}, recipe={"lr": 3e-3})
    module = SFTModule(student=alone.student, recipe=alone.recipe, steps=STEPS, seed=0, folder=tmp_path / "alone")
    make_trainer(max_steps=REFRESH).fit(module, datamodule=alone)
    save_student(module.student_model, alone.trajectories.chat, tmp_path / "student")
    asked = current(alone.student, tmp_path / "student")
    settings = {"path": asked.path} if lora is None else {"adapter": asked.adapter}
    fresh = make_data(cache="fresh", student={"lora": lora, **settings})
    fresh.prepare_data()
    fresh.setup("fit")

    folder = arm.folder / "refreshed" / str(REFRESH)
    again, first = fresh.selections["selector"], data.selections["selector"].row
    keys = zip(fresh.trajectories.problem_id[again.row], fresh.trajectories.candidate_id[again.row], strict=True)
    assert weights_in(folder) == pytest.approx(dict(zip(keys, again.weight.tolist(), strict=True)), abs=1e-4)
    assert weights_in(folder) != pytest.approx(weights_in(arm.folder), abs=1e-3), "training has changed nothing"
    record = read_json(folder / "selection.json")
    stay = len(weights_in(folder).keys() & weights_in(arm.folder).keys())
    tokens = int(data.trajectories.length[data.scored].sum())
    cost = record["refresh"].pop("cost")
    assert record["refresh"] == {
        "step": REFRESH,
        "trajectories": len(weights_in(folder)),
        "stay": stay,
        "stay_share": stay / len(first),
    }
    assert cost["forward_tokens"] == tokens and cost["seconds"] > 0
    assert record["policy"]["budget"] == data.rules["selector"].policy.budget and record["matched"]
    lines = [line for line in said if line.startswith("refresh ")]
    assert len(lines) == 2 and f"at step {REFRESH}: {stay / len(first):.0%} of the trajectories stay" in lines[0]


def test_what_is_left_and_what_it_costs(make_arm_of):
    data, arm, trained = make_arm_of()
    trained()
    folders = sorted((arm.folder / "refreshed").iterdir())
    assert [folder.name for folder in folders] == ["3", "6"]
    for folder in folders:
        assert not (folder / "student").exists() and not (folder / "cache").exists()
    refreshes = read_json(arm.folder / "trained.json")["refreshes"]
    assert refreshes == [read_json(folder / "selection.json")["refresh"] for folder in folders]
    once = data.cost_of(data.rules["selector"])
    total = total_cost(once, arm.folder)
    assert total["forward_tokens"] == 3 * once["forward_tokens"] > 0
    assert total["seconds"] == pytest.approx(once["seconds"] + sum(one["cost"]["seconds"] for one in refreshes))
    assert data.candidates["loss"] is not None and set(data.selections) == {"selector", "baseline"}
    assert [point["step"] for point in read_json(arm.folder / "trained.json")["curve"]] == list(range(STEPS + 1))


def test_a_baseline_takes_as_many_of_each_problem_at_every_refresh(make_arm_of):
    rule = Rule(name="likelihood", score=Likelihood(), policy=Policy(kind="top_b", budget=2))
    data, arm, trained = make_arm_of(name="baseline", rule=rule)
    trained()
    wanted = dict(data.selections["selector"].taken_by_problem)
    for step in (3, 6):
        problems, taken = np.unique(
            [problem for problem, _ in weights_in(arm.folder / "refreshed" / str(step))], return_counts=True
        )
        assert dict(zip(problems.tolist(), taken.tolist(), strict=True)) == wanted
        assert read_json(arm.folder / "refreshed" / str(step) / "selection.json")["policy"]["match"] == "trajectories"


# ---- training goes on


@pytest.mark.parametrize("lora", [None, LORA | {"lora_dropout": 0.0}])
def test_a_choice_that_does_not_change_leaves_training_as_it_was(lora, make_arm_of):
    """Every step on the whole choice, which is the same at every refresh: as if there were none, so the optimizer's
    state, the schedule and the held-out curve go on.
    """
    rows = [row | {"quality": int(row["candidate_id"]) % 3} for row in rows_of_a_pool()]
    rule = Rule(
        name="fixed",
        score=_quality,
        policy=Policy(kind="top_b", budget=2),
    )
    batch = {"batch_size": 12, "lr": 3e-3}
    settings = {"rows": rows, "rule": rule, "student": {"lora": lora}, "recipe": batch}
    data, once, train_once = make_arm_of(refresh=None, **settings)
    assert len(data.selections["selector"].row) == 12
    train_once()
    _, refreshed, train_refreshed = make_arm_of(**settings)
    train_refreshed()
    assert once.folder != refreshed.folder
    a, b = weights(once), weights(refreshed)
    untrained = data.student.load_trainable(torch.float32).state_dict() if lora is None else {}
    assert lora or any(not torch.equal(value, untrained[name]) for name, value in a.items() if name in untrained)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    curves = [read_json(arm.folder / "trained.json")["curve"] for arm in (once, refreshed)]
    assert [p["step"] for p in curves[0]] == [p["step"] for p in curves[1]]
    assert [p["held_out/loss"] for p in curves[1]] == pytest.approx([p["held_out/loss"] for p in curves[0]], abs=1e-5)
    assert [one["stay_share"] for one in read_json(refreshed.folder / "trained.json")["refreshes"]] == [1.0, 1.0]


def _quality(candidates):
    return candidates["quality"]


def test_each_segment_draws_from_its_choice_afresh(make_arm_of, monkeypatch):
    data, arm, trained = make_arm_of()
    seen = {}
    step = SFTModule.training_step

    def watching(self, batch, batch_idx):
        seen[self.global_step] = set(batch.rows.tolist())
        step(self, batch, batch_idx)

    monkeypatch.setattr(SFTModule, "training_step", watching)
    trained()
    batch = data.recipe.batch_size
    first = set(data.selections["selector"].row.tolist())
    assert len(first) == 2 * batch and seen[0] | seen[1] == first, "an epoch is two steps"
    for at in (3, 6):
        of_segment = weights_in(arm.folder / "refreshed" / str(at))
        assert chosen(data, np.array(sorted(seen[at] | seen[at + 1]))) == of_segment.keys()


# ---- killed


OF_KILLED = {"batch_tokens": 300, "shard_rows": 5}


def left_by(arm) -> dict[str, bytes]:
    """Weights, curve and choices."""
    names = ("checkpoint/*model.safetensors", "loss.csv", "refreshed/*/selection.jsonl")
    return {str(p.relative_to(arm.folder)): p.read_bytes() for name in names for p in arm.folder.glob(name)}


@pytest.fixture(scope="module")
def uninterrupted():
    """What an arm left that nobody killed, by whether it has LoRA; filled by the first test that asks."""
    return {}


def killing(monkeypatch, where: str):
    """Makes the next training raise KillError somewhere."""
    if where.startswith("step "):
        at, step = int(where.removeprefix("step ")), SFTModule.training_step

        def stopping(self, batch, batch_idx):
            if self.global_step == at:
                raise KillError
            step(self, batch, batch_idx)

        monkeypatch.setattr(SFTModule, "training_step", stopping)
    elif where == "inside a pass":
        measured, calls = PassModule.predict_step, []

        def stopping_pass(self, batch, batch_idx):
            calls.append(batch_idx)
            if len(calls) == 3:
                raise KillError
            return measured(self, batch, batch_idx)

        monkeypatch.setattr(PassModule, "predict_step", stopping_pass)
    else:
        name = {"before the student is saved": "save_student", "after the choice": "forget_student"}[where]

        def stop(*_, **__):
            raise KillError

        monkeypatch.setattr(f"lark.training.arms.{name}", stop)


@pytest.mark.parametrize(
    ("where", "lora"),
    [
        ("step 2", None),
        ("step 5", LORA),
        ("step 6", None),
        ("inside a pass", None),
        ("inside a pass", LORA),
        ("before the student is saved", LORA),
        ("after the choice", None),
    ],
)
def test_killed_anywhere_it_comes_to_the_same_weights(where, lora, make_arm_of, uninterrupted, monkeypatch):
    settings = {"student": {"lora": lora}, "probe": OF_KILLED}
    if (lora is not None) not in uninterrupted:
        uninterrupted[lora is not None] = left_by(make_arm_of(arms="whole", **settings)[2]())
    said = []
    _, arm, trained = make_arm_of(arms="killed", say=said.append, **settings)
    with monkeypatch.context() as patch:
        killing(patch, where)
        with pytest.raises(KillError):
            trained()
    assert not arm.trained
    make_arm_of(arms="killed", say=said.append, **settings)[2]()
    assert sum("goes on from" in line for line in said) == 1
    assert left_by(arm) == uninterrupted[lora is not None]
    assert len(left_by(arm)) == 4
    assert not [*arm.folder.glob("refreshed/*/student"), *arm.folder.glob("refreshed/*/cache")]


# ---- identity


def test_an_arm_is_what_its_later_choices_depend_on(make_arm_of, tmp_path):
    def folder(**settings):
        return make_arm_of(**settings)[1].folder.name

    data, arm, _ = make_arm_of(refresh=None)
    assert "refresh" not in arm.identity and arm.refresh is None
    never = make_arm_of(refresh=STEPS)[1]
    assert never.folder == arm.folder and never.refresh is None, "one that is never reached changes nothing"
    assert len({arm.folder.name, folder(), folder(refresh=4), folder(probe={"top_k": 5})}) == 4
    assert folder() == folder(probe={"batch_tokens": 900})

    quality = Rule(name="lark", score=Likelihood(), policy=Policy(kind="top_b", budget=2))
    identities = [quality, replace(quality, filter=Between(column="loss", max=1e9)), replace(quality, filter="correct")]
    hashes = []
    for rule in identities:
        data.rules["selector"] = replace(rule, refresh=3)
        hashes.append(identity_hash(refresh_identity(data, "selector")))
    assert len(set(hashes)) == 3


def test_settings_name_the_code(tmp_path, monkeypatch):
    assert settings_of(Between(column="loss", max=3.0)) == {
        "code": "lark.selection.selection.Between",
        "file": settings_of(Between(column="loss"))["file"],
        "column": "loss",
        "score": None,
        "min": "-inf",
        "max": 3.0,
    }
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rules_of_mine.py").write_text("def score(candidates):\n    return 1\n")
    import rules_of_mine  # type: ignore[import-not-found]

    before = settings_of(rules_of_mine.score)
    assert before["code"] == "rules_of_mine.score"
    assert settings_of(partial(rules_of_mine.score, 2)) != settings_of(partial(rules_of_mine.score, 3))
    (tmp_path / "rules_of_mine.py").write_text("def score(candidates):\n    return 2\n")
    assert settings_of(rules_of_mine.score) != before
    identity_hash({"numpy": settings_of(np.zeros), "ufunc": settings_of(np.add)})  # code without a file


def test_what_is_going_to_happen_is_said(make_data):
    data = make_data()
    assert list(announce(data, 10)) == []
    data.rules["selector"] = replace(data.rules["selector"], refresh=4)
    (line,) = announce(data, 10)
    assert "selector chooses anew every 4 of 10 optimizer steps, 2 times" in line
    (line,) = announce(data, 4)
    assert line.startswith("warning     selector.refresh=4 is never reached in 4 optimizer steps")


# ---- refused


@pytest.mark.parametrize("score", [Random(seed=0), Length(sign=1), GradMatch(validation_problems=4)])
def test_rules_whose_choice_cannot_change_or_rests_on_the_untrained_student(score):
    with pytest.raises(ValueError, match=r"selector\.refresh=5: .*set selector\.refresh=null"):
        Rule(name="r", score=score, policy=Policy(kind="top_b", budget=2), refresh=5)


# ---- two ranks


def test_two_ranks_equal_one(student_folder, tmp_path):
    pool = write_pool(tmp_path / "pool.jsonl", rows_of_a_pool(problems=24))
    words = [
        *("logger=csv", "task=jsonl", "task.checker=number", "task.max_length=256", f"task.pool={pool}"),
        *("sft.steps=5", "sft.lr=1e-3", "sft.validations=5", "selector.refresh=2", "baseline=none"),
        *("probe.batch_tokens=1000", "probe.shard_rows=20", "stop_after=training", f"model.path={student_folder}"),
    ]
    done = lark(*words, f"paths.logs={tmp_path / 'one'}")
    assert done.code == 0, done.err
    both = finish(start(*words, *TWO_RANKS, f"paths.logs={tmp_path / 'two'}"))
    for out in (done.out, both):
        assert out.count("refresh     selector at step") == 2, out
    found = {name: path.parent for name in ("one", "two") for path in (tmp_path / name).glob("arms/*/trained.json")}
    for step in ("2", "4"):
        one, two = (weights_in(folder / "refreshed" / step) for folder in found.values())
        assert one == pytest.approx(two, abs=1e-4)
    a, b = (load_file(folder / "checkpoint" / "model.safetensors") for folder in found.values())
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
