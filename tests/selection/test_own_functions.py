"""Functions of the user's own are found, and what is wrong with them is one sentence."""

import sys

import pytest

from lark.selection.own_functions import import_function


def test_a_function_is_imported_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rule_in_cwd.py").write_text("def score(candidates):\n    return -candidates['loss']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    score = import_function("my_rule_in_cwd:score", "selector.score")
    assert score({"loss": 2.0}) == -2.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_rule", "names no function"),
        (":score", "names no function"),
        (".relative:score", "names no function"),
        ("no such module:score", "names no function"),
        ("no_such_module:score", "could not be imported .No module named 'no_such_module'"),
        ("no_such_package.rules:score", "could not be imported .No module named 'no_such_package'"),
        ("math.rules:score", "could not be imported .No module named 'math.rules'"),
        ("math:no_such_function", "names no function"),
        ("broken_rule:score", "could not be imported .*broken_rule.py, line 1"),
        ("math:pi", "names no function"),
    ],
)
def test_what_cannot_be_imported_is_an_error_that_names_the_setting(path, message, tmp_path, monkeypatch):
    (tmp_path / "broken_rule.py").write_text("def score(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(ValueError, match=f"selector.score='{path}' {message}"):
        import_function(path, "selector.score")


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("math.no_such_name", AttributeError, "module 'math' has no attribute 'no_such_name'"),
        ("from math import no_such_name", ImportError, "cannot import name 'no_such_name'"),
        ("import no_such_package", ModuleNotFoundError, "No module named 'no_such_package'"),
        ("raise ValueError('my own')", ValueError, "^my own$"),
    ],
)
def test_what_a_module_raises_while_it_is_imported_passes_through(line, error, message, tmp_path, monkeypatch):
    (tmp_path / "raising_rule.py").write_text(f"import math\n{line}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(error, match=message) as raised:
        import_function("raising_rule:score", "selector.score")
    assert raised.type is error
