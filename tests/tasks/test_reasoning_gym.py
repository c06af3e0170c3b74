"""Task reasoning_gym: problems from a seed, whose answers the library's own verifiers accept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lark.answers.checker import Checker
from lark.common.cache import read_json
from lark.common.errors import LarkError
from lark.tasks.problems import make_answer, read_problems
from lark.tasks.reasoning_gym import ANY_ANSWER, ReasoningGymTask, generate

FEW: dict = {"problems": 6, "eval_problems": 4, "harder_problems": 3}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_files_of_a_task(tmp_path: Path) -> None:
    task = ReasoningGymTask(name="gym", settings={"tasks": ["chain_sum", "gsm_symbolic", "gcd"], **FEW})
    sets = task.prepare_evaluation(tmp_path)
    files = {**sets, "problems": sets["eval"].with_name("problems.jsonl")}
    assert {name: len(rows_of(path)) for name, path in files.items()} == {"eval": 12, "harder": 6, "problems": 18}
    questions = [row["problem"] for path in files.values() for row in rows_of(path)]
    assert len(set(questions)) == len(questions), "no problem stands in two sets"
    harder = [row for row in rows_of(sets["harder"]) if row["source_dataset"] == "chain_sum"]
    assert all(row["metadata"]["num_terms"] >= row["settings"]["min_terms"] > 5 for row in harder)

    manifest = read_json(sets["eval"].with_name("manifest.json"))
    assert manifest["identity"]["settings"]["tasks"] == ["chain_sum", "gsm_symbolic", "gcd"]
    (note,) = manifest["notes"]
    assert "harder problems of gsm_symbolic" in note
    assert task.prepare_evaluation(tmp_path) == sets
    with Checker("reasoning_gym") as checker:
        for path in sets.values():
            asked = read_problems(path)
            golds = checker.check([make_answer(row, rf"\boxed{{{row['answer']}}}") for row in asked])
            wrong = checker.check([make_answer(row, r"\boxed{-12345}") for row in asked])
            assert all(verdict.correct for verdict in golds) and not any(verdict.correct for verdict in wrong)


def test_equal_settings_give_equal_files_whatever_the_hash_seed(tmp_path: Path, monkeypatch) -> None:
    """isomorphic_strings walks over sets of strings."""
    settings = {"tasks": ["isomorphic_strings"], **FEW}
    found = []
    for hashing in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hashing)
        sets = ReasoningGymTask(name="gym", settings=settings).prepare_evaluation(tmp_path / hashing)
        found.append([path.read_text() for path in sets.values()])
    assert found[0] == found[1]


def test_another_seed_gives_other_problems(tmp_path: Path) -> None:
    for seed in (0, 1):
        generate(tmp_path / str(seed), tasks=["gcd"], seed=seed, **FEW)
    zero, one = ({row["problem"] for row in rows_of(tmp_path / seed / "problems.jsonl")} for seed in "01")
    assert not zero & one


def test_a_pool_has_to_be_sampled(tmp_path: Path) -> None:
    task = ReasoningGymTask(
        name="gym", settings={"tasks": ["sokoban"], "problems": 2, "eval_problems": 2, "harder_problems": 1}
    )
    with pytest.raises(LarkError, match=r"task\.pool=null .*lark\.sample --problems .*problems\.jsonl"):
        task.prepare_pool(tmp_path)
    assert len(rows_of(task.prepare_evaluation(tmp_path)["eval"])) == 2
    (tmp_path / "mine.jsonl").touch()
    assert replace(task, pool=tmp_path / "mine.jsonl").prepare_pool(tmp_path) == tmp_path / "mine.jsonl"


def test_settings_of_a_data_set_and_of_its_harder_set(tmp_path: Path) -> None:
    settings: dict = {
        "tasks": {"chain_sum": {"min_terms": 2, "max_terms": 2}, "propositional_logic": None},
        "harder": {"chain_sum": {"min_terms": 5, "max_terms": 5}},
    }
    generate(tmp_path, **settings | FEW)
    sets = {name: tmp_path / f"{name}.jsonl" for name in ("eval", "harder")}
    terms = {
        name: {row["metadata"].get("num_terms") for row in rows_of(path) if row["source_dataset"] == "chain_sum"}
        for name, path in sets.items()
    }
    assert terms == {"eval": {2}, "harder": {5}}
    logic = [row for row in rows_of(sets["eval"]) if row["source_dataset"] == "propositional_logic"]
    assert {row["answer"] for row in logic} == {ANY_ANSWER}, "many answers are right; the verifier decides"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["chain_sun"]}, r"no chain_sun; did you mean chain_sum\?"),
        ({"tasks": ["chain_sum"], "problems": 0}, r"task\.settings\.problems=0"),
        ({"tasks": {"chain_sum": {"min_terms": 9}}}, r"\{chain_sum: \{'min_terms': 9\}\} is not what reasoning_gym"),
        ({"tasks": {"chain_sum": {"foo": 9}}}, r"is not what reasoning_gym takes.*foo"),
        ({"tasks": {"chain_sum": {"max_terms": 2, "max_digits": 1}}, "problems": 900}, r"yields only \d+ of 900"),
        ({"tasks": ["chain_sum"], "harder": {"chain_sum": {"min_terms": 9}}}, r"min_terms"),
    ],
)
def test_wrong_settings_name_themselves(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, **FEW | settings)


def test_wrong_names_of_settings_and_errors_of_the_process(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.settings\.problem is not a setting"):
        ReasoningGymTask(name="gym", settings={"tasks": ["gcd"], "problem": 3})
    with pytest.raises(ValueError, match=r"task\.settings\.tasks names no data set"):
        ReasoningGymTask(name="gym", settings={"tasks": []})
    with pytest.raises(ValueError, match=r"did you mean chain_sum\?$"):
        ReasoningGymTask(name="gym", settings={"tasks": ["chain_sun"]}).prepare_pool(tmp_path)
    assert not list(tmp_path.glob("tasks/*/manifest.json"))
