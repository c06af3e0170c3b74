import pytest

from lark.tasks.prompts import PROMPTS

# A text under a name never changes: a better wording is a new name here, and the old one stays.
HASHES = {
    "boxed-1": "ff0c71b20988378fcdc43ce134c38ecc6c433fc781e62bb1bf6f8ddf277d0576",
    "boxed-user-1": "c55800b3aa76fa47597c5e8b84e9460df404b63e91721a00b55b0d846de66de6",
    "plain-1": "bd7a998c868ddd3f03e61e798d03366d1308b12efb20b89ca4a7a65bec447be1",
    "choice-1": "c82825d032c8ca61614f7b54250a0be5524c887dce54bfee629f64cfaa40851b",
    "choice-user-1": "018bc1510e25b03cee26b0d55de1d22ea501f43b99983f4c1f90eff564e082da",
}


def test_the_text_under_a_name_is_what_it_was() -> None:
    assert {name: prompt.hash for name, prompt in PROMPTS.items()} == HASHES
    assert all(name == prompt.name and name.rpartition("-")[2].isdecimal() for name, prompt in PROMPTS.items())


def test_a_problem_is_put_into_its_turns() -> None:
    system = {"role": "system", "content": r"Please reason step by step, and put your final answer within \boxed{}."}
    assert PROMPTS["boxed-1"].messages("1 + 1?") == [system, {"role": "user", "content": "1 + 1?"}]
    (turn,) = PROMPTS["boxed-user-1"].messages("1 + 1?")
    assert turn == {"role": "user", "content": "1 + 1?\n\n" + system["content"]}
    assert PROMPTS["plain-1"].messages("1 + 1?") == [{"role": "user", "content": "1 + 1?"}]
    first, second = PROMPTS["choice-1"].messages("Which?", ["this", "that"])
    assert first == system
    assert second["content"] == "Which?\n\nA. this\nB. that\n\nAnswer with the letter of the right option."


@pytest.mark.parametrize("name", PROMPTS)
def test_braces_of_a_problem_stay_as_they_are(name: str) -> None:
    problem = r"Simplify $\frac{1}{2}$, {problem}, {options}, {0}, \g<0> and \boxed{}."
    options = ["{problem}", r"\1"] if PROMPTS[name].choice else []
    content = PROMPTS[name].messages(problem, options)[-1]["content"]
    assert content.startswith(problem)
    assert all(option in content.removeprefix(problem) for option in options)
    assert content.count("{problem}") == 1 + bool(options)
