import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark.answers.extract import compile_pattern, extract_answer, find_boxed, parse_choice


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"a line\\\boxed{7}", "7"),
        (r"escaped twice \\boxed{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"\fbox{8}", "8"),
        (r"a stray { and \boxed{9}", "9"),
        (r"a stray } and \boxed{9}}", "9"),
        (r"\boxed{3} but then \boxed{4", "3"),
        (r"write it within \boxed{}", None),
        (r"\boxed 5", None),
        (r"boxed{5}", None),
        ("no answer", None),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> so one", None),
        (r"\boxed{1}</think> so \boxed{2}", "2"),
        (r"<think>first \boxed{1}", None),
        (r"\boxed{1} <think>wait \boxed{2}", "1"),
        (r"<think>a</think> \boxed{1} <think>b</think> \boxed{2}", "2"),
    ],
)
def test_last_balanced_box_outside_thought(text, answer):
    assert find_boxed(text) == answer
    assert extract_answer(text) == answer


@given(st.text(alphabet="a5{} ", max_size=30), st.text(alphabet="xy {}", max_size=20))
def test_a_box_is_found_whatever_stands_around_it(before, inside):
    balanced = inside.replace("{", "").replace("}", "") + "{z}"
    assert find_boxed(f"{before}\\boxed{{{balanced}}}") == balanced.strip()


def test_pattern_speaks_only_where_no_box_does():
    pattern = r"answer is (\d+)"
    assert extract_answer("the answer is 3, no, the answer is 4", pattern) == "4"
    assert extract_answer(r"\boxed{5}; the answer is 4", pattern) == "5"
    assert extract_answer("<think>the answer is 3</think>", pattern) is None
    assert extract_answer("I do not know", pattern) is None


@pytest.mark.parametrize("pattern", [r"(\d+", r"answer is \d+"])
def test_faulty_pattern_is_named(pattern):
    with pytest.raises(ValueError, match=r"task\.pattern"):
        compile_pattern(pattern)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 150_000,
        r"\boxed{" + "{" * 500_000 + "}" * 500_000,
        r"\boxed{1}" + "{" * 1_000_000,
        "\\" * 1_000_000 + "boxed",
        r"\boxed " + " " * 1_000_000,
        "<think>" * 150_000,
    ],
    ids=["boxes", "nested", "open", "backslashes", "spaces", "thoughts"],
)
def test_a_megabyte_of_braces_takes_linear_time(text):
    start = time.process_time()
    find_boxed(text)
    assert time.process_time() - start < 5  # quadratic time would be hours


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        ("The answer is 18.", "number", "18"),
        ("The answer is 5. No, the answer is 18, because 9 * 2 is.", "number", "18"),
        ("The answer is 18, or 19.", "number", "18, or 19"),
        ("so\n#### 1,234", "number", "1,234"),
        ("**Final Answer:** **$2.50**", "number", "$2.50"),
        ("The answer to the question is 18 dollars.", "number", "18 dollars"),
        ("The answer is simple.", "number", None),
        ("9 * 2 = 18", "number", None),
        ("The answer is (C).", "choice", "(C)"),
        ("**Answer:** B. the sun", "choice", "B"),
        ("The correct option is (B) 42", "choice", "(B) 42"),
        ("Thus\n\n**B**", "choice", "**B**"),
        ("A) 1\nB) 2", "choice", None),
        ("The answer is a cat", "choice", None),
        (r"\boxed{42}, so the answer is (C)", "choice", "(C)"),
        (r"\boxed{42}", "choice", "42"),
        (r"\boxed{E = mc^2}. Answer: D", "choice", "D"),
        (r"\boxed{A:B = 2:3}. Answer: D", "choice", "D"),
        (r"\boxed{B \text{ or } C}. Answer: B", "choice", r"B \text{ or } C"),
        ("<answer> 12 </answer>", "math", "12"),
        ("<answer>1</answer> no, <answer>2</answer>", None, "2"),
        ("The answer is 18.", "math", "18"),
        ("The answer is 18.", "exact", None),
        ("The answer is 18. I am sure the answer is right.", "math", "18"),
        ("The answer is 6. The answer is not 5.", "math", "6"),
        ("The answer is $f(1, a)$, as shown.", "math", "$f(1, a)$"),
        ("The answer is [0, 1), because it is open.", "math", "[0, 1)"),
        ("The answer is $5. He had $3.", "math", "$5"),
        ("## Final Answer\n\n$$\nx = 7\n$$", "math", "x = 7"),
        ("The answer is Monday.", "math", "Monday"),
        ("The answer is easy to see.", "math", None),
        ("The answer is 18.", None, None),
        ("<think>The answer is 18.</think>", "number", None),
    ],
)
def test_what_is_said_to_be_the_answer(text, kind, answer):
    assert extract_answer(text, kind=kind) == answer


def test_a_pattern_comes_before_what_is_said():
    assert extract_answer("result 3; the answer is 4", r"result (\d+)", "number") == "3"
    assert extract_answer("the answer is 4", r"result (\d+)", "number") == "4"


def test_a_pattern_has_a_second_for_a_text():
    with pytest.raises(TimeoutError):
        extract_answer("a" * 5_000, r"((?:a+)+)b")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b)", "B"),
        ("(B)", "B"),
        (r"\text{(B)}", "B"),
        (r"\textbf{(B) }42", "B"),
        ("B. the sun", "B"),
        ("(B). (A) is wrong", "B"),
        ("option B", "B"),
        ("**J**", "J"),
        ("A cat", None),
        ("Bob", None),
        ("B or C", None),
        ("(B) or (C)", None),
        ("B, C", None),
        ("(B)(C)", None),
        ("BC", None),
        ("42", None),
        ("", None),
    ],
)
def test_one_letter_is_chosen(text, letter):
    assert parse_choice(text) == letter


@pytest.mark.parametrize("kind", ["number", "choice"])
@pytest.mark.parametrize(
    "text",
    [
        "answer " * 150_000,
        "answer:" + "\n" * 1_000_000,
        "answer is (" * 90_000,
        "answer to " * 100_000,
        "answer" + " " * 1_000_000,
        "<answer>" * 120_000,
        "<answer>" + "<" * 1_000_000,
        "**A" * 300_000,
    ],
    ids=["words", "newlines", "brackets", "questions", "spaces", "tags", "open", "bold"],
)
def test_a_megabyte_of_statements_takes_linear_time(text, kind):
    start = time.process_time()
    extract_answer(text, kind=kind)
    assert time.process_time() - start < 5
