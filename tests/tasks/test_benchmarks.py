"""Benchmarks: rows in every layout, prompts, the prepared file, the hub (a server of this test's own)."""

import csv
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark.answers.checker import Checker
from lark.answers.extract import parse_number
from lark.common.cache import file_hash, read_json
from lark.common.errors import LarkError
from lark.tasks import benchmarks
from lark.tasks.benchmarks import (
    BENCHMARKS,
    PROMPTS,
    describe_benchmark,
    find_benchmark,
    is_benchmark,
    prepare_benchmark,
)
from lark.tasks.problems import make_answer, make_prompt, read_problems

GPQA = {"Question": "Which?", "Correct Answer": "yes\n", "Record ID": "rec1", "High-level domain": "Physics"}
GPQA |= {f"Incorrect Answer {i}": text for i, text in enumerate(["no", "A", "both"], start=1)}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(name: str, source: Path | None, tmp_path: Path) -> list[dict[str, Any]]:
    return rows_of(prepare_benchmark(name, source, tmp_path / "cache"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_pinned(name: str) -> None:
    benchmark = BENCHMARKS[name]
    digests = [benchmark.revision, *benchmark.files.values()]
    assert [len(digest) for digest in digests] == [40] + [64] * len(benchmark.files)
    assert all(set(digest) <= set("0123456789abcdef") for digest in digests)
    assert PROMPTS[benchmark.prompt].is_choice == (benchmark.gold is None)


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("aime24", {"id": 60, "problem": "P", "solution": "S", "answer": "033", "year": "2024"}, ("60", "P", "33")),
        ("aime24", {"id": 60, "problem": "P", "solution": r"so \boxed{204}"}, ("60", "P", "204")),
        ("aime24", {"ID": "2024-II-4", "Problem": "P", "Solution": "S", "Answer": 33}, ("2024-II-4", "P", "33")),
        ("aime25", {"problem": "P", "answer": r"336^\circ", "id": "19"}, ("19", "P", "336")),
        ("aime25", {"problem_idx": 3, "problem": "P", "answer": 0}, ("3", "P", "0")),
        ("amc23", {"id": 0, "question": "P", "answer": 27.0, "url": "u"}, ("0", "P", "27")),
        ("amc23", {"id": 1, "question": "P", "answer": -1.0, "url": "u"}, ("1", "P", "-1")),
        ("math500", {"unique_id": "test/a/1.json", "problem": "P", "answer": "p - q"}, ("test/a/1.json", "P", "p - q")),
        ("gsm8k", {"question": "P", "answer": "It is <<1+1=2>>2.\n#### 1,234"}, ("0", "P", "1234")),
        ("gsm8k", {"id": 1000, "problem": "P", "answer": "1"}, ("1000", "P", "1")),
        ("svamp", {"ID": "chal-1", "Body": "7 bins ", "Question": "How many?", "Answer": "145.0"}, None),
        ("svamp", {"ID": "chal-1", "Body": "7 bins.", "Question": "How many?", "Answer": 145}, None),
        ("svamp", {"id": "chal-1", "problem": "7 bins. How many?", "answer": "145"}, None),
    ],
)
def test_rows_of_every_layout(name: str, row: dict, expected: tuple | None, tmp_path: Path) -> None:
    (problem,) = prepared(name, jsonl(tmp_path / "rows.jsonl", row), tmp_path)
    expected = expected or ("chal-1", "7 bins. How many?", "145")
    assert (problem["problem_id"], problem["problem"], problem["answer"]) == expected
    assert problem["checker"] == BENCHMARKS[name].checker
    if problem["checker"] == "number":
        assert parse_number(problem["answer"]) is not None


@pytest.mark.parametrize(("level", "read"), [(5, 5), ("Level 5", 5), ("3", 3), ("Level ?", "Level ?")])
def test_levels_are_numbers(level: int | str, read: int | str, tmp_path: Path) -> None:
    row = {"problem": "P", "answer": "1", "level": level, "subject": "Algebra"}
    (problem,) = prepared("math500", jsonl(tmp_path / "rows.jsonl", row), tmp_path)
    assert (problem["level"], problem["subject"]) == (read, "Algebra")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_evaluation_reads_what_is_prepared(name: str, tmp_path: Path) -> None:
    rows = [{"id": 1, "problem": "P", "answer": "2", "options": ["1", "2"]}, {"id": 2, "problem": "Q", "answer": 1}]
    rows[1] |= {"options": ["1", "2"]}
    path = prepare_benchmark(name, jsonl(tmp_path / "rows.jsonl", *rows), tmp_path / "cache")
    problems = read_problems(path)
    assert problems == rows_of(path) and len(problems) == 2
    with Checker("exact") as checker:
        checker.validate([make_answer(problem, "") for problem in problems])


def test_a_prepared_row_needs_no_setting(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", {"id": 1, "problem": "1 + 1?", "answer": "2"})
    (problem,) = prepared("math500", source, tmp_path)
    assert make_prompt(problem, "another system turn") == PROMPTS["boxed-1"].render("1 + 1?")
    assert (problem["problem"], problem["prompt"]) == ("1 + 1?", "boxed-1")
    (other,) = prepared("math500@boxed-user-1", source, tmp_path)
    assert other["messages"] == PROMPTS["boxed-user-1"].render("1 + 1?")


def test_options_stand_where_their_texts_put_them(tmp_path: Path) -> None:
    """However a file lists them, and for good: an order that moved would compare other benchmarks."""
    right, *wrong = (GPQA["Correct Answer"], *(GPQA[f"Incorrect Answer {i}"] for i in (1, 2, 3)))
    layouts = [
        GPQA,
        GPQA | {"Incorrect Answer 1": wrong[2], "Incorrect Answer 3": wrong[0]},
        {"question": "Which?", "options": [*wrong, right], "answer": "D"},
        {"question": "Which?", "choices": [wrong[0], right, *wrong[1:]], "answer": 1},
        {"problem": " Which? ", "options": [right, *wrong], "answer": "yes"},
    ]
    for i, layout in enumerate(layouts):
        (problem,) = prepared("gpqa", jsonl(tmp_path / f"{i}.jsonl", layout), tmp_path)
        assert (problem["options"], problem["answer"]) == (["A", "no", "yes", "both"], "C")
        assert "\n\nA. A\nB. no\nC. yes\nD. both\n\n" in problem["messages"][-1]["content"]
        assert problem["problem"] == "Which?"


def test_a_right_option_that_is_a_letter_is_not_taken_for_one(tmp_path: Path) -> None:
    row = GPQA | {"Correct Answer": "B", "Incorrect Answer 1": "yes"}
    (problem,) = prepared("gpqa", jsonl(tmp_path / "rows.jsonl", row), tmp_path)
    assert problem["options"][ord(problem["answer"]) - ord("A")] == "B"


def test_no_letter_is_favoured(tmp_path: Path) -> None:
    rows = [GPQA | {"Question": f"Which of {i}?", "Record ID": str(i)} for i in range(1000)]
    counts = Counter(row["answer"] for row in prepared("gpqa", jsonl(tmp_path / "rows.jsonl", *rows), tmp_path))
    assert sorted(counts) == list("ABCD")
    assert sum((count - 250) ** 2 / 250 for count in counts.values()) < 16.3  # chi-squared, 3 degrees, p = .001


def test_csv_with_line_breaks_inside_fields(tmp_path: Path) -> None:
    path = tmp_path / "gpqa_diamond.csv"
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, [*GPQA, "Explanation"])
        writer.writeheader()
        writer.writerow(GPQA | {"Question": 'Two lines,\n"quoted"', "Explanation": ""})
    (problem,) = prepared("gpqa", path, tmp_path)
    assert (problem["problem"], problem["problem_id"]) == ('Two lines,\n"quoted"', "rec1")
    assert problem["subject"] == "Physics"


def test_a_prepared_file_is_a_source_too(tmp_path: Path) -> None:
    for name, row in {"gpqa": GPQA, "math500": {"id": 1, "problem": "P", "answer": "2", "level": 3}}.items():
        first = prepare_benchmark(name, jsonl(tmp_path / f"{name}.jsonl", row), tmp_path / "cache")
        assert prepared(name, first, tmp_path) == rows_of(first)


def test_the_fingerprint_is_of_problems_and_golds_alone(tmp_path: Path) -> None:
    def fingerprint(*rows: dict, name: str = "gsm8k") -> str:
        path = prepare_benchmark(name, jsonl(tmp_path / "rows.jsonl", *rows), tmp_path / "cache")
        return read_json(path.with_name("manifest.json"))["fingerprint"]

    a, b = {"id": 1, "problem": "P  1", "answer": "27.0"}, {"id": 2, "problem": "P 2", "answer": "3"}
    same = fingerprint(a, b)
    moved = {"question": "P 2", "answer": "#### 3"}, {"question": "P 1\n", "answer": "so #### 27"}
    assert fingerprint(*moved) == fingerprint(a, b, name="gsm8k@plain-1") == same
    assert len({same, fingerprint(a), fingerprint(a | {"answer": "28"}, b), fingerprint(a, b | {"problem": "P"})}) == 4
    choice = fingerprint(GPQA, name="gpqa")
    assert choice != fingerprint(GPQA | {"Correct Answer": "no", "Incorrect Answer 1": "yes"}, name="gpqa")


def test_prepared_once(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", {"id": 1, "problem": "P", "answer": "1"})
    path = prepare_benchmark("gsm8k", source, tmp_path / "cache")
    written = path.stat().st_mtime_ns
    assert prepare_benchmark("gsm8k", str(source), tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == written
    manifest = read_json(path.with_name("manifest.json"))
    assert describe_benchmark(manifest, source) == (
        f"gsm8k: 1 of the benchmark's 1,319 problems, {source} (sha256 {file_hash(source)[:7]}), "
        f"prompt boxed-1, checker number, fingerprint {manifest['fingerprint'][:12]}"
    )
    assert manifest["prompt"]["system"] == PROMPTS["boxed-1"].system
    path.with_name("manifest.json").unlink()  # as a writer leaves it that was killed
    path.write_text("half")
    assert prepare_benchmark("gsm8k", source, tmp_path / "cache") == path
    assert len(read_problems(path)) == 1


def test_a_copy_of_the_pinned_file_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "mine.jsonl", {"problem": "P", "answer": "1"})
    pin(monkeypatch, "aime25", {"test.jsonl": source.read_bytes()}, problems=1)
    path = prepare_benchmark("aime25", source, tmp_path / "cache")
    described = describe_benchmark(read_json(path.with_name("manifest.json")), source)
    assert f"aime25: 1 problems, {source} (the same bytes as math-ai/aime25@563bb84), " in described


def test_every_fault_has_file_line_and_field(tmp_path: Path) -> None:
    rows: list[Any] = [{"problem": "P", "answer": "1000"}, {"problem": "P", "answer": "1/2"}, {"problem": "P"}]
    rows += [{"answer": "1"}, [1], {"id": 1, "problem": "P", "answer": "1"}, {"id": 1, "problem": "P", "answer": "1"}]
    source = jsonl(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(ValueError) as error:
        prepare_benchmark("aime24", source, tmp_path / "cache")
    message = str(error.value)
    assert f"task.eval.aime24={source} has 6 faulty rows" in message
    places = [(1, "answer"), (3, "answer"), (4, "problem"), (5, "row"), (7, "problem_id")]
    for line, field in places:
        assert f"rows.jsonl, line {line}, {field}:" in message
    assert "(1 more like this: line 2)" in message
    source = jsonl(tmp_path / "rows.jsonl", {"Question": "Q", "options": ["a", "b"], "answer": "c"}, {"Question": "Q"})
    with pytest.raises(ValueError, match=r"(?s)line 1, answer: 'c' names none.*line 2, options:"):
        prepare_benchmark("gpqa", source, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"task\.eval\.gsm8k=.*does not exist"):
        prepare_benchmark("gsm8k", tmp_path / "missing.jsonl", tmp_path / "cache")
    with pytest.raises(ValueError, match="holds no problem"):
        prepare_benchmark("gsm8k", jsonl(tmp_path / "empty.jsonl"), tmp_path / "cache")


def test_names_and_their_prompts() -> None:
    assert is_benchmark("math500") and is_benchmark("gpqa@choice-user-1") and not is_benchmark("eval")
    assert find_benchmark("gpqa@choice-user-1") == (BENCHMARKS["gpqa"], PROMPTS["choice-user-1"])
    with pytest.raises(ValueError, match=r"task\.eval=math is not the name of a benchmark; set it .* aime24, .* svamp"):
        find_benchmark("math")
    with pytest.raises(ValueError, match=r"math500@choice-1 names no prompt .* boxed-1 or boxed-user-1 or plain-1"):
        find_benchmark("math500@choice-1")
    with pytest.raises(ValueError, match="gpqa@boxed-1 names no prompt for gpqa"):
        find_benchmark("gpqa@boxed-1")


class Hub(ThreadingHTTPServer):
    """What the hub answers about files of datasets; `files` is path -> bytes, `refused` the code of a refusal."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Reply)
        self.files: dict[str, bytes] = {}
        self.refused: str | None = None
        self.asked: list[str] = []


class Reply(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked += [path] if path.startswith("/datasets/") else []
        status = 403 if hub.refused else 200 if path in hub.files else 404
        body = hub.files[path] if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 200:
            self.send_header("X-Repo-Commit", path.partition("/resolve/")[2].partition("/")[0])
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", hub.refused or "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, which huggingface_hub takes for the real one; its cache is the test's own."""
    from huggingface_hub import constants

    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, here)
        monkeypatch.setattr(constants, "ENDPOINT", here)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()


def pin(monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, bytes], problems: int) -> None:
    """The benchmark with small files in place of its own, at its own commit."""
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    monkeypatch.setitem(benchmarks.BENCHMARKS, name, replace(BENCHMARKS[name], files=hashes, problems=problems))


def url(name: str, file: str) -> str:
    return f"/datasets/{BENCHMARKS[name].hub}/resolve/{BENCHMARKS[name].revision}/{file}"


def test_from_the_hub_at_the_pinned_commit(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"Body": "One", "Question": "Two?", "Answer": "3.0"}
    files = {name: json.dumps([row | {"ID": f"chal-{name}"}]).encode() for name in BENCHMARKS["svamp"].files}
    pin(monkeypatch, "svamp", files, problems=2)
    hub.files |= {url("svamp", file): content for file, content in files.items()}
    path = prepare_benchmark("svamp", None, tmp_path / "cache")
    assert [problem["problem_id"] for problem in read_problems(path)] == ["chal-train.json", "chal-test.json"]
    manifest = read_json(path.with_name("manifest.json"))
    described = describe_benchmark(manifest, None)
    assert described.startswith("svamp: 2 problems, ChilleD/SVAMP@5e0bf1e, prompt boxed-1, checker number, ")
    assert manifest["identity"]["source"]["revision"] == BENCHMARKS["svamp"].revision
    assert set(hub.asked) == {url("svamp", file) for file in files}
    hub.asked.clear()
    assert prepare_benchmark("svamp", None, tmp_path / "cache") == path  # prepared: the hub is not asked
    prepare_benchmark("svamp@plain-1", None, tmp_path / "cache")  # at a commit: what the hub's cache has is enough
    assert not hub.asked


def test_parquet_from_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"question": ["P", "Q"], "answer": ["#### 1", "#### 2"]}), sink)
    (file,) = BENCHMARKS["gsm8k"].files
    pin(monkeypatch, "gsm8k", {file: sink.read_bytes()}, problems=2)
    hub.files[url("gsm8k", file)] = sink.read_bytes()
    assert [(row["problem_id"], row["answer"]) for row in prepared("gsm8k", None, tmp_path)] == [("0", "1"), ("1", "2")]


def test_other_bytes_than_the_pinned_ones_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files[url("aime25", "test.jsonl")] = b'{"problem": "P", "answer": "1"}\n'
    with pytest.raises(ValueError, match=r"is not the pinned test\.jsonl .*set task\.eval=\{aime25: <file>\}"):
        prepare_benchmark("aime25", None, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.json*"))


def refused(code: str) -> Callable[[Hub], None]:
    return lambda hub: setattr(hub, "refused", code)


@pytest.mark.parametrize(
    ("name", "refuse", "words"),
    [
        ("gpqa", refused("GatedRepo"), ["huggingface.co/datasets/Idavidrein/gpqa", "HF_TOKEN", "{gpqa: <file>}"]),
        ("gpqa", refused("RepoNotFound"), ["accept", "HF_TOKEN"]),
        ("math500", refused("RepoNotFound"), ["HuggingFaceH4/MATH-500", "valid token", "{math500: <file>}"]),
        ("math500", lambda hub: None, ["cannot be fetched", "python -m lark.benchmarks math500", "{math500: <file>}"]),
    ],
)
def test_a_hub_that_refuses(name: str, refuse: Callable, words: list[str], hub: Hub, tmp_path: Path) -> None:
    refuse(hub)
    with pytest.raises(LarkError) as error:
        prepare_benchmark(name, None, tmp_path / "cache")
    message = str(error.value)
    assert message.startswith(f"benchmark {name}: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_without_a_network(tmp_path: Path) -> None:
    """As all tests run: HF_HUB_OFFLINE=1."""
    with pytest.raises(ValueError, match=r"amc23: .* cannot be fetched .*task\.eval=\{amc23: <file>\}"):
        prepare_benchmark("amc23", None, tmp_path / "cache")


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
    assert PROMPTS["boxed-1"].render("1 + 1?") == [system, {"role": "user", "content": "1 + 1?"}]
    (turn,) = PROMPTS["boxed-user-1"].render("1 + 1?")
    assert turn == {"role": "user", "content": "1 + 1?\n\n" + system["content"]}
    assert PROMPTS["plain-1"].render("1 + 1?") == [{"role": "user", "content": "1 + 1?"}]
    first, second = PROMPTS["choice-1"].render("Which?", ["this", "that"])
    assert first == system
    assert second["content"] == "Which?\n\nA. this\nB. that\n\nAnswer with the letter of the right option."


@pytest.mark.parametrize("name", PROMPTS)
def test_braces_of_a_problem_stay_as_they_are(name: str) -> None:
    problem = r"Simplify $\frac{1}{2}$, {problem}, {options}, {0}, \g<0> and \boxed{}."
    options = ["{problem}", r"\1"] if PROMPTS[name].is_choice else []
    content = PROMPTS[name].render(problem, options)[-1]["content"]
    assert content.startswith(problem)
    assert all(option in content.removeprefix(problem) for option in options)
    assert content.count("{problem}") == 1 + bool(options)
