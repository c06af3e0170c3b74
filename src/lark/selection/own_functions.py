"""Functions and classes of the user's own: found by name, their results checked, their errors told apart from ours."""

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lark.common.errors import LarkError


def import_function(path: str, setting: str) -> Callable[..., Any]:
    """Import what a user names as `module:function`, found as Python finds modules and in the working folder.

    Raises LarkError naming `setting` when there is no such function or its source is not Python. What else a module
    raises while it is imported, a module that it misses itself included, is its author's and passes through.
    """
    if not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", path):
        raise LarkError(f"{setting}={path!r} names no function; set it to module:function, as in my_module:my_score")
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:  # an installed command starts without it, `python -m` with it
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name, None)
    except (ModuleNotFoundError, SyntaxError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
            raise
        raise LarkError(
            f"{setting}={path!r} could not be imported ({error}); correct it, or add its folder to PYTHONPATH"
        ) from error
    if not callable(function):
        raise LarkError(
            f"{setting}={path!r} names no function: {name} of the module is {function!r}; set one it defines"
        )
    return function


@contextmanager
def locate_errors(called: Any, what: str) -> Iterator[None]:
    """Turn what a function of the user's own raises into a LarkError that says where; let ours pass."""
    try:
        yield
    except Exception as error:
        module = getattr(called, "__module__", None) or ""  # of a function, or of an object's class
        if isinstance(called, str) or module.startswith("lark."):
            raise
        source = getattr(sys.modules.get(module), "__file__", None)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
        where = f" ({Path(source).name}, line {lines[-1]})" if source and lines else ""
        text = f"{what} raised {type(error).__name__}{where}: {error}"
        raise LarkError(f"{text} (correct it; HYDRA_FULL_ERROR=1 shows the traceback)") from error


def to_numbers(values: Any, rows: int, what: str) -> np.ndarray:
    """Convert `values` to float64 [N], None to NaN. Raises LarkError that names them by `what`."""
    try:
        array = np.asarray(values)
        if array.shape == (rows,):
            return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise LarkError(f"{what} is not one number for each of {rows} candidates ({error})") from error
    found = "is None" if values is None else f"has shape {array.shape}"
    raise LarkError(f"{what} {found} for {rows} candidates; return one number a row")
