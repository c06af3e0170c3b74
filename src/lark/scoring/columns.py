"""Columns that are read when they are asked for."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np


class Columns(Mapping[str, np.ndarray]):
    """Arrays [N] by name, each made by its reader when first asked for and kept from then on.

    In memory is what has been asked for: 8 bytes a row of a column of numbers, of one of arrays what they hold and some
    120 bytes a row.
    """

    def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]]):
        self._readers = dict(readers)
        self._read: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._read:
            self._read[name] = self._readers[name]()
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def also(self, readers: Mapping[str, Callable[[], np.ndarray]]) -> "Columns":
        return Columns({name: partial(self.__getitem__, name) for name in self} | dict(readers))

    def without(self, *names: str) -> "Columns":
        return Columns({name: partial(self.__getitem__, name) for name in self if name not in names})


def where(columns: Mapping[str, np.ndarray], keep_N: np.ndarray) -> Columns:
    """The same columns of the rows with keep_N true; none of them is read for that."""
    return Columns({name: partial(_kept, columns, name, keep_N) for name in columns})


def _kept(columns: Mapping[str, np.ndarray], name: str, keep_N: np.ndarray) -> np.ndarray:
    return columns[name][keep_N]
