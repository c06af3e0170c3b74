"""LARK: choose, weigh and train on the teacher-written trajectories a student learns fastest from.

    import lark

    pool = lark.load_pool("pool.jsonl")                  # or a datasets.Dataset, a pandas.DataFrame, a list of rows
    student = lark.load_student("Qwen/Qwen2.5-0.5B-Instruct")     # or a folder, a .gguf file, an option of model=
    scores = lark.score(pool, student)                   # one forward pass of the student, cached
    chosen = lark.select(scores, rule="lark", budget=3)  # three trajectories a problem, with weights
    chosen.to_dataset()                                  # messages, weight, meta: for any trainer
    chosen.save("selection")                             # selection.jsonl, selection.json

    trained = lark.train(chosen, epochs=3)               # or lark.trl.WeightedSFTTrainer
    lark.evaluate(trained, "eval.jsonl", samples=4)

    control = lark.select(scores, rule="random", like=chosen)     # as many trajectories of each problem
    print(lark.compare(chosen, control, "eval.jsonl"))            # trains both; differences with intervals

A row of a pool is one trajectory: {"problem_id": "17", "candidate_id": "0", "messages": [..., the assistant's turn]},
where known with "teacher", "answer" and "correct". Names of rules, settings and their defaults are those of the command
line (`python -m lark.run --help`), and so are the results: the same classes do the work. Scores, students and samples
are kept in a cache ($LARK_CACHE, else ~/.cache/lark), so that a call is repeated at no cost; nothing else is written.

Everything loads on first use; `help(lark.select)` and the like have the details.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lark.api.functions import compare, evaluate, load_pool, load_student, score, select, train

__version__ = "0.2.0.dev0"
_TOOLKIT = ("Lark", "Token", "Transformer", "Tree", "Visitor", "v_args")
"""Names of the parsing toolkit, which is called `lark` too."""
__all__ = ["compare", "evaluate", "load_pool", "load_student", "score", "select", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("lark.api.functions"), name)
    if name in _TOOLKIT:
        raise ImportError(
            f"{name} is the parsing toolkit's, which LARK hides here; give each an environment of its own"
        )
    raise AttributeError(f"module 'lark' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
