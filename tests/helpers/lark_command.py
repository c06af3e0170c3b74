"""`python -m lark.run` in this process, for tests: imports are paid for once."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

from lark import run as command

SMALL = [
    "task.limit=24",
    "task.eval_limit=6",
    "task.max_new_tokens=24",
    "sft.steps=3",
    "evaluation.samples=2",
    "evaluation.pass_at=[1,2]",
    "logger=csv",
    "diagnostics=none",
]


@dataclass(frozen=True, kw_only=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        """The run folder it printed."""
        (line,) = (line for line in self.out.splitlines() if line.startswith("LARK "))
        return Path(line.split()[-1]).absolute()

    @property
    def log(self) -> str:
        """What it logged."""
        return (self.folder / "run.log").read_text()


def lark(*words: object) -> Done:
    """Runs the command with `words` as command line; exit code and what it printed, as a shell would see them."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["lark.run", *map(str, words)]
    GlobalHydra.instance().clear()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        err.write(stop.code + "\n" if isinstance(stop.code, str) else "")
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full
    return Done(code=code, out=out.getvalue(), err=err.getvalue())


def answered_lightly(command: str, words: list[str], folder: Path) -> str:
    """What `python -m lark.<command>` prints in an empty folder, having imported nothing heavy and written nothing."""
    code = (
        f"import sys; sys.argv = ['lark.{command}', *sys.argv[1:]]\n"
        "heavy = {'torch', 'lightning', 'transformers', 'pandas', 'wandb'}\n"
        "import atexit; atexit.register(lambda: print('HEAVY', heavy & set(sys.modules)))\n"
        f"from lark.{command} import main; main()"
    )
    words = [sys.executable, "-c", code, *words]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=True)
    assert "HEAVY set()" in done.stdout
    assert not done.stderr
    assert not list(folder.iterdir())
    return done.stdout
