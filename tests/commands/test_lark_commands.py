"""The console commands run the module that they are named after, with the user's folder at hand."""

import sys
from types import SimpleNamespace

import lark_commands


def test_a_users_folder_is_searched_for_modules(monkeypatch, tmp_path):
    seen = {}
    main = lambda: seen.update(path=list(sys.path))  # noqa: E731
    monkeypatch.setattr(lark_commands.importlib, "import_module", lambda name: SimpleNamespace(main=main, name=name))
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lark-run"])
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    lark_commands.main()
    assert seen["path"][-1] == str(tmp_path)
