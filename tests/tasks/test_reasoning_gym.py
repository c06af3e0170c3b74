"""Task reasoning_gym: files from a seed, worked solutions that the library's own verifiers accept."""

import json
import re
from pathlib import Path

import pytest
import reasoning_gym

from lark.answers.checker import Checker
from lark.answers.extract import extract_answer
from lark.common.cache import read_json
from lark.tasks.gold_steps import STEPS, WITH_STEPS, solutions
from lark.tasks.problems import answer_to, read_problems
from lark.tasks.reasoning_gym import ANY_ANSWER, GymTask, generate

FEW: dict = {"problems": 6, "eval_problems": 4, "harder_problems": 3}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", WITH_STEPS)
def test_worked_solutions_are_right_and_tell_more_than_the_answer(name: str) -> None:
    dataset = reasoning_gym.create_dataset(name, size=40, seed=7)
    for item in dataset:
        found = dict(solutions(name, item, seed=0))
        assert len(set(found.values())) == len(found) >= 2
        for text in found.values():
            assert dataset.score_answer(extract_answer(text), item) == 1.0, text
        if name in STEPS:
            assert len(found["gold-steps"]) > len(found["gold-answer"])
            assert found["gold-answer"] == rf"\boxed{{{item['answer']}}}"


def test_equations_of_worked_solutions_hold() -> None:
    """`place` knows no thousands, so it is not asked about them."""
    for item in reasoning_gym.create_dataset("chain_sum", min_digits=1, max_digits=4, size=60, seed=3):
        for teacher, text in solutions("chain_sum", item, seed=0):
            for left, right in re.findall(r"(-?\d+(?: [+-] \d+)+) = (-?\d+)", text):
                assert eval(left) == int(right), (teacher, text)
        large = any(len(word) > 3 for word in item["metadata"]["expression"].split())
        assert ("place" in dict(solutions("chain_sum", item, seed=0))) is not large


def test_data_sets_without_steps_have_no_solutions() -> None:
    item = reasoning_gym.create_dataset("sokoban", size=1, seed=0)[0]
    assert list(solutions("sokoban", item, seed=0)) == []


def test_files_of_a_task(tmp_path: Path) -> None:
    said: list[str] = []
    task = GymTask(name="gym", settings={"tasks": ["chain_sum", "gsm_symbolic", "gcd"], **FEW}, system="Think.")
    pool, sets = task.sources(tmp_path, said.append)
    rows, problems = rows_of(pool), rows_of(pool.with_name("problems.jsonl"))
    assert {row["problem_id"].rpartition("-")[0] for row in rows} == {"chain_sum", "gsm_symbolic"}
    assert {row["teacher"] for row in rows} >= {"terse", "check", "gold-steps", "gold-answer"}
    assert all(row["messages"][0] == {"role": "system", "content": "Think."} and row["correct"] for row in rows)
    assert [len(problems), *(len(rows_of(sets[name])) for name in ("eval", "harder"))] == [18, 12, 6]
    questions = [row["problem"] for path in (pool.with_name("problems.jsonl"), *sets.values()) for row in rows_of(path)]
    assert len(set(questions)) == len(questions), "no problem stands in two sets"
    harder = [row for row in rows_of(sets["harder"]) if row["source_dataset"] == "chain_sum"]
    assert all(row["metadata"]["num_terms"] >= row["settings"]["min_terms"] > 5 for row in harder)
    assert any("none for gcd" in line for line in said) and any("harder problems of gsm_symbolic" in x for x in said)

    manifest = read_json(pool.with_name("manifest.json"))
    assert manifest["identity"]["settings"]["tasks"] == ["chain_sum", "gsm_symbolic", "gcd"] and not manifest["wrong"]
    again = []
    assert task.sources(tmp_path, again.append) == (pool, sets) and again == said
    with Checker("reasoning_gym") as checker:
        for path in sets.values():
            asked = read_problems(path)
            golds = checker.check([answer_to(row, rf"\boxed{{{row['answer']}}}") for row in asked])
            wrong = checker.check([answer_to(row, r"\boxed{-12345}") for row in asked])
            assert all(verdict.correct for verdict in golds) and not any(verdict.correct for verdict in wrong)


def test_equal_settings_give_equal_files_whatever_the_hash_seed(tmp_path: Path, monkeypatch) -> None:
    """isomorphic_strings walks over sets of strings."""
    settings = {"tasks": ["isomorphic_strings"], **FEW}
    found = []
    for hashing in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hashing)
        sets = GymTask(name="gym", settings=settings).evaluation_files(tmp_path / hashing)
        found.append([path.read_text() for path in sets.values()])
    assert found[0] == found[1]


def test_another_seed_gives_other_problems(tmp_path: Path) -> None:
    for seed in (0, 1):
        generate(tmp_path / str(seed), tasks=["gcd"], seed=seed, **FEW)
    zero, one = ({row["problem"] for row in rows_of(tmp_path / seed / "problems.jsonl")} for seed in "01")
    assert not zero & one


def test_without_worked_solutions_a_pool_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    task = GymTask(name="gym", settings={"tasks": ["sokoban"], "problems": 2, "eval_problems": 2, "harder_problems": 1})
    with pytest.raises(ValueError, match=r"\['sokoban'\] come without worked solutions.*lark\.sample.*problems\.jsonl"):
        task.sources(tmp_path)
    assert len(rows_of(task.evaluation_files(tmp_path)["eval"])) == 2
    own = GymTask(name="gym", settings=task.settings, pool="mine.jsonl")
    assert own.sources(tmp_path)[0] == "mine.jsonl"


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
    with pytest.raises(ValueError, match=r"task\.settings\.problem is no setting"):
        GymTask(name="gym", settings={"tasks": ["gcd"], "problem": 3})
    with pytest.raises(ValueError, match=r"task\.settings\.tasks names no data set"):
        GymTask(name="gym", settings={"tasks": []})
    with pytest.raises(ValueError, match=r"did you mean chain_sum\?$"):
        GymTask(name="gym", settings={"tasks": ["chain_sun"]}).sources(tmp_path)
    assert not list(tmp_path.glob("tasks/*/manifest.json"))
