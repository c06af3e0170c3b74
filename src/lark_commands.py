"""Start LARK's console commands, unless the parsing toolkit stands in its place.

The toolkit is called `lark` on the package index, and both install a package of that name. Whoever has both in one
environment imports one, or a mixture of their files. This module has a name of its own, so it can look first.
"""

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

REMEDY = "install LARK (lark-select) into an environment of its own"


def main() -> None:
    """Run the module that the console command is named after: `lark-run` is lark.run."""
    if clash := describe_clash():
        sys.exit(f"lark: {clash}; {REMEDY}")
    sys.path.append(os.getcwd())  # where `python -m` finds a user's own rules
    importlib.import_module(f"lark.{Path(sys.argv[0]).stem.removeprefix('lark-')}").main()


def describe_clash() -> str | None:
    """Describe how the parsing toolkit is in LARK's way; None: it is not.

    `lark/config.py` is a file of ours alone, `lark/lark.py` (its parser) one of the toolkit's.
    """
    spec = find_spec("lark")  # finds, imports nothing
    if spec is None or spec.origin is None:
        return "the package lark is not there"
    folder = Path(spec.origin).parent
    is_ours, is_toolkit = (folder / "config.py").is_file(), (folder / "lark.py").is_file()
    if is_ours and is_toolkit:
        return f"{folder} holds LARK and the parsing toolkit of the same name, whose files overwrite each other"
    if is_toolkit:
        return f"{folder} is the parsing toolkit of the same name, which hides LARK here"
    return None
