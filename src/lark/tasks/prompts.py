r"""Prompts of the benchmarks, each under a name with a version.

The text under a name never changes: figures are compared by it. A better wording gets the next number.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

_BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
_LETTER = "Answer with the letter of the right option."


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A system turn and a user turn that a problem is put into.

    name: with its version, such as "boxed-1".  system: the system turn; None: there is none.
    user: the user's turn, with {problem} for the bare problem and {options} for the lettered options of a choice.
    """

    name: str
    system: str | None
    user: str

    @property
    def choice(self) -> bool:
        """Whether it asks for one of several options."""
        return "{options}" in self.user

    def messages(self, problem: str, options: Sequence[str] = ()) -> list[dict[str, str]]:
        """The turns that ask `problem`; options: texts in the order of their letters, for a prompt of a choice."""
        assert self.choice == bool(options), f"prompt {self.name} with {len(options)} options"
        texts = {"problem": problem, "options": "\n".join(f"{letter(i)}. {text}" for i, text in enumerate(options))}
        user = re.sub(r"\{(problem|options)\}", lambda field: texts[field[1]], self.user)  # never inside a problem
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*turns, {"role": "user", "content": user}]

    @property
    def hash(self) -> str:
        """sha256 of name and text, 64 hex digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def letter(index: int) -> str:
    """A for 0, B for 1, ..."""
    assert 0 <= index < 26
    return chr(ord("A") + index)


PROMPTS = {
    prompt.name: prompt
    for prompt in (
        Prompt(name="boxed-1", system=_BOXED, user="{problem}"),
        Prompt(name="boxed-user-1", system=None, user=f"{{problem}}\n\n{_BOXED}"),
        Prompt(name="plain-1", system=None, user="{problem}"),
        Prompt(name="choice-1", system=_BOXED, user=f"{{problem}}\n\n{{options}}\n\n{_LETTER}"),
        Prompt(name="choice-user-1", system=None, user=f"{{problem}}\n\n{{options}}\n\n{_LETTER} {_BOXED}"),
    )
}
