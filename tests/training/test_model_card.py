"""The model card: it says what the files say, whatever characters are in them, and its code runs."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from trained_arm import EVALUATION, LORA, SELECTION, trained_json, write_arm
from transformers import AutoTokenizer

from lark.common.cache import read_json
from lark.export import export
from lark.selection.rule import Between, Rule
from lark.student.student import Student
from lark.training.arms import describe_student
from lark.training.model_card import render_card
from lark.training.run_folder import write_selection

NASTY = "a|b `c` <script>x</script> [l](http://x) *b* $y$ &lt; ~~z~~\n# not a heading"


def rows_of(text):
    """The tables' rows as {first cell: further cells}, as a reader of Markdown sees them."""
    html = MarkdownIt("commonmark").enable("table").render(text)
    found = {}
    for row in re.findall(r"<tr>\n(.*?)</tr>", html, re.DOTALL):
        cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)
        found[cells[0]] = [re.sub(r"</?code>", "", cell) for cell in cells[1:]]
    return found


def body(text):
    return ModelCard(text).text


def test_the_card_says_what_the_files_say(make_student):
    text = render_card(trained_json(make_student(lora=LORA)), SELECTION, EVALUATION, run="/somewhere/a run")
    rows = rows_of(body(text))
    assert rows["rows dropped"] == ["3 overlong"]
    assert rows["candidates"] == ["154 candidates, 44 chosen, 110 not chosen, 22 problems"]
    assert rows["policy"] == ["kind chi2, budget 2, prior uniform"]
    assert rows["effective sample size"] == ["28 of 44"]
    assert rows["weight by teacher"] == ["expert_steps 87%, expert_prose 13%"]
    assert rows["LoRA"] == ["r 2, lora_alpha 4, target_modules all-linear"]
    assert rows["optimizer steps"] == ["3"] and rows["lr"] == ["0.0003"]
    assert rows["all held-out trajectories"] == ["0.1220", "0.1199"]
    assert rows["avg@2"] == ["0.25", "0.125"] and rows["stop"] == ["0.5", ""]
    assert "on 44 trajectories of 154 candidates for 22 problems, each with its weight." in text
    assert (
        "`samples 2, pass_at [1, 2], temperature 0.6, top_p 0.95, engine transformers, dtype float32`, at most 24"
        in text
    )
    assert "--config-path '/somewhere/a run' --config-name replay" in text


def test_what_was_not_measured_is_not_there(make_student):
    text = render_card(trained_json(make_student(), curve=[], held_out={}), None)
    for section in ("Evaluation", "Held-out", "Again", "weight by teacher", "policy", "effective", "rule"):
        assert section not in text
    assert "on 44 trajectories, each" in text


@pytest.mark.parametrize(
    ("settings", "merged", "library", "base", "tags"),
    [
        ({"lora": LORA}, False, "peft", None, True),
        ({"lora": LORA}, True, "transformers", None, True),
        ({}, False, "transformers", None, False),
        ({"path": None, "id": "org/name", "lora": LORA}, False, "peft", "org/name", True),
    ],
)
def test_the_header(make_student, settings, merged, library, base, tags):
    student = make_student(**settings)
    known = {"student": {"id": "org/name", "revision": "c" * 40}}
    trained = trained_json(make_student())
    trained["student"] = {**trained["student"], **settings}
    trained["identity"] |= known if student.path is None else {}
    data = ModelCard(render_card(trained, SELECTION, merged=merged)).data.to_dict()
    assert (data["library_name"], data.get("base_model"), "lora" in data["tags"]) == (library, base, tags)
    assert "license" not in data


def test_equal_weights_are_called_so(make_student):
    trained = trained_json(make_student())
    trained["identity"]["recipe"]["weighted"] = False
    assert "with equal weights." in render_card(trained, SELECTION)


def test_what_users_write_stays_text(make_student):
    trained = trained_json(make_student(name=NASTY))
    inputs = SELECTION["inputs"] | {"task": NASTY, "score": NASTY}
    selection = SELECTION | {"rule": NASTY, "teacher_share": {NASTY: 1.0}, "inputs": inputs}
    metrics = EVALUATION | {"metrics": {NASTY: {"avg@2": 0.5}}}
    text = render_card(trained, selection, metrics, run=f"/x/```{NASTY}")
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(body(text))
    for tag in ("<script", "<a ", "<em>", "<s>", "<h1>not"):
        assert tag not in html
    assert html.count("<h1>") == 1 and html.count("<pre>") == 2
    shown = "a|b `c` &lt;script&gt;x&lt;/script&gt; [l](http://x) *b* $y$ &amp;lt; ~~z~~ # not a heading"
    rows = rows_of(body(text))
    assert rows["task"] == rows["rule"] == rows["score"] == [shown]
    assert rows["weight by teacher"] == [f"{shown} 100%"]
    assert rows["avg@2"] == ["0.5"]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("lora", [None, LORA])
def test_its_code_runs(make_student, tmp_path, monkeypatch, capsys, lora, merge):
    write_arm(tmp_path / "arm", make_student(lora=lora), metrics=EVALUATION)
    export(tmp_path / "arm", tmp_path / "out", merge=merge)
    text = (tmp_path / "out" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    found = {}
    exec(code.replace("max_new_tokens=512", "max_new_tokens=4"), found)
    assert 0 < len(found["answer"]) <= 4
    ends = found["model"].generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(".").convert_tokens_to_ids("<|im_end|>") in ends


def test_code_for_a_base_that_peft_cannot_find(make_student, tmp_path):
    trained = trained_json(make_student(lora=LORA))
    trained["student"] |= {"path": "/models/it's/model.gguf", "adapter": [str(tmp_path / "a"), str(tmp_path / "b")]}
    text = render_card(trained, SELECTION)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "card", "exec")
    assert """from_pretrained("/models/it's", gguf_file='model.gguf', dtype="auto")""" in code
    assert code.index(str(tmp_path / "a")) < code.index(str(tmp_path / "b")) < code.index("(model, folder)")


# --- what an arm writes down


def test_a_described_student_can_be_made_again(make_data, make_student, student_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(student_folder.parent)
    data = make_data(student={"path": student_folder.name, "lora": LORA, "dtype": "bfloat16"})
    described = json.loads(json.dumps(describe_student(data.student)))
    monkeypatch.chdir(tmp_path)
    assert Student(**described) == make_student(path=str(student_folder), lora=LORA, dtype="bfloat16")


def my_score(candidates):
    return candidates["loss"]


def test_a_rule_of_the_users_own_in_words(make_data, tmp_path):
    data = make_data()
    between = Between(score=my_score, min=1.0)
    data.rules["selector"] = Rule(name="mine", score=my_score, policy=data.rules["selector"].policy, filter=between)
    data.prepare_data()
    data.setup("fit")
    write_selection("selector", "mine", data, tmp_path / "selector")
    inputs = read_json(tmp_path / "selector" / "selection.json")["inputs"]
    assert inputs["score"] == f"{__name__}:my_score"
    assert inputs["filter"] == f"Between(column=None, score={__name__}:my_score, min=1.0, max=inf)"
