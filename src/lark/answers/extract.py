r"""Answers found in generated text: the last `\boxed{...}`, a task's pattern, what is said to be the answer.

Generated text is hostile input: everything here is linear in it, or bounded. Patterns are the user's, and may backtrack
without end on a text: they run under a time limit.
"""

import re
from collections import deque
from functools import lru_cache

import regex

from lark.answers.quantities import parse_number, to_plain_notation
from lark.common.errors import LarkError

__all__ = ["compile_pattern", "extract_answer", "find_boxed", "parse_choice", "parse_number"]

PATTERN_SECONDS = 1.0
_STATEMENTS = 1_000  # that say what the answer is; of a text that says so more often, the last

# One to three backslashes: texts that went through an escaping layer write \\boxed, and \\\boxed follows a line break.
_BRACES = re.compile(r"\\{1,3}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)

_TAGGED = re.compile(r"<answer>(?P<answer>(?:[^<]|<(?!/?answer>)){1,10000}+)</answer>", re.IGNORECASE)
_STATED = re.compile(
    r"(?:####|\banswers?\b[\s*_]{0,20}(?:(?:(?:to|for|of) [^\n.:=?]{1,120}?|\([^()\n]{1,20}\))[\s*_]{0,20})?"
    r"(?::|=|\b(?:is|are|was|would be|will be|should be|must be|equals)\b)"
    r"(?:\s{0,20}(?:therefore|thus|hence|indeed|simply|just|then|clearly)\b)?)"
    r"[\s*_:]{0,20}(?=(?P<answer>[^\n]{1,300}))",
    re.IGNORECASE,
)
_NAMED_CHOICE = re.compile(
    r"\b(?:correct|right|best)\s{1,20}(?:option|choice|letter)\s{0,20}(?::|\bis\b|=)"
    r"[\s*_:]{0,20}(?=(?P<answer>[^\n]{1,300}))",
    re.IGNORECASE,
)
_LONE_CHOICE = re.compile(r"[ \t]*(?:\*\*\(?[A-Z][.)]?\)?\*\*|\*\*\(?[A-Z]\)?[.)]\*\*[^\n]*|\(?[A-Z]\)?)[ \t.]*")
# Where the answer ends and the sentence goes on. A comma before a number, "or" or "and" belongs to the answer.
_SENTENCE_END = re.compile(
    r"[.!?;](?:[\s*\"'}\])]|$)|,\s+(?!(?i:or|and)\b|[A-Z]\b)(?=[A-Za-z])"
    r"|\s(?:because|since|as|so|which)\s|\s\(?(?:i\.e\.|that is)",
)
_CHOICE = re.compile(
    r"(?:(?:the\s+)?(?:final\s+)?(?:correct\s+)?(?:answer|option|choice)\s*(?:is\b|:)?\s*)?"
    r"(?:\(\s*([A-Za-z])\s*\)(.*)|([A-Za-z])(?:\s*[.):].*|\s+[-\N{EN DASH}\N{EM DASH}]\s.*)?)",
    re.DOTALL | re.IGNORECASE,
)
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Z](?![A-Za-z])")
_ANOTHER_CHOICE = re.compile(r"\s*(?:(?:[,/&]|\b(?:or|and)\b)\s*\(?[A-Z]\b|\(\s*[A-Z]\s*\))")


def find_boxed(text: str) -> str | None:
    r"""Find the content of the last non-empty `\boxed{...}` with balanced braces outside <think> blocks, or None.

    Of nested boxes the innermost that starts last counts; `\fbox{...}` is a box too. Linear in the length of the text.
    """
    text = _strip_thoughts(text)
    starts = [place for place in map(text.find, ("boxed", "fbox")) if place >= 0]
    if not starts:
        return None
    open_braces: list[int] = []  # where the content of each open box starts; -1 for a plain brace
    last, content = -1, None
    for match in _BRACES.finditer(text, max(0, min(starts) - 3)):
        token = match.group()
        if token == "{":
            open_braces.append(-1)
        elif token == "}":
            opened = open_braces.pop() if open_braces else -1
            if opened > last and (inside := text[opened : match.start()].strip()):
                last, content = opened, inside
        elif token.endswith("{") and "box" in token:
            open_braces.append(match.end())
    return content


def extract_answer(text: str, pattern: str | None = None, kind: str | None = None) -> str | None:
    r"""Find the final answer a text states, or None.

    In this order: its last `\boxed{...}`; the last match of the task's pattern; the last `<answer>...</answer>`; and
    for the kinds number and choice the last sentence that says what the answer is ("the answer is 18", "#### 18",
    "Final answer: (C)"), for choice also a last line of nothing but the letter ("**B**"). For choice, a box that holds
    no letter is passed over if one of the other ways finds something.

    Only what follows the last closed <think> block counts, and nothing inside one that was never closed.

    Args:
        text: generated text.
        pattern: regular expression whose group 1 is the answer.
        kind: the kind of check (`lark.answers.checker.KINDS`); None looks for no sentences.

    Raises:
        LarkError: the pattern does not compile or has no group.
        TimeoutError: the pattern took longer than 1 s on this text.
    """
    compiled = compile_pattern(pattern)
    boxed = find_boxed(text)
    if boxed is not None and (kind != "choice" or _LETTER.search(boxed) or parse_choice(boxed)):
        return boxed
    text = _strip_thoughts(text)
    if compiled is not None:
        answer = None
        for match in compiled.finditer(text, timeout=PATTERN_SECONDS):
            answer = match.group(1) or answer
        if answer and answer.strip():
            return answer.strip()
    return _find_statement(text, kind) or boxed


@lru_cache(maxsize=64)
def compile_pattern(pattern: str | None) -> "regex.Pattern[str] | None":
    """Compile the task's answer pattern. Raises LarkError if it is not a regular expression or has no group."""
    if pattern is None:
        return None
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise LarkError(f"task.pattern={pattern!r} is not a regular expression ({error}); correct it") from error
    if compiled.groups < 1:
        raise LarkError(f"task.pattern={pattern!r} has no group; put parentheses round the answer")
    return compiled


def parse_choice(text: str) -> str | None:
    r"""Find the one letter, A to Z, that an answer to a multiple-choice question chooses, or None.

    Reads B, (B), b), \text{(B)}, "B. text of the option", "option B"; what follows the letter is not looked at, unless
    it is another letter. A word that begins the answer is no letter ("A cat").
    """
    match = _CHOICE.fullmatch(to_plain_notation(text[:1000]).replace("**", ""))
    if match is None:
        return None
    bracketed, after, bare = match.groups()
    if after and _ANOTHER_CHOICE.match(after):
        return None
    return (bracketed or bare).upper()


def _find_statement(text: str, kind: str | None) -> str | None:
    tagged = None
    for match in _TAGGED.finditer(text):
        tagged = match["answer"].strip() or tagged
    if tagged or kind not in ("choice", "number"):
        return tagged
    found: list[tuple[int, str]] = []  # the last of each form
    for form in (_STATED, _NAMED_CHOICE) if kind == "choice" else (_STATED,):
        for match in reversed(deque(form.finditer(text), maxlen=_STATEMENTS)):
            if clause := _cut_clause(match["answer"], kind):
                found.append((match.start(), clause))
                break
    if found:
        return max(found)[1]
    if kind == "choice":
        line = text.strip().rpartition("\n")[2]
        if _LONE_CHOICE.fullmatch(line) or (line == text.strip() and parse_choice(line)):
            return line.strip()
    return None


def _cut_clause(said: str, kind: str) -> str | None:
    """Return the part of a sentence that is the answer; None if nothing in it could be one."""
    said = re.sub(r"(?<=\S)\*\*(?!\w)", "", said.partition("</answer>")[0])  # the end of bold; 2**3 is none
    clause = _SENTENCE_END.split(said, maxsplit=1)[0].strip()
    if kind == "choice":
        possible = re.match(r"(?:(?i:option|choice)\s+)?\(?\s*[A-Z]\b", to_plain_notation(clause).replace("**", ""))
        return clause if possible else None
    return clause if any(map(str.isdigit, clause)) else None


def _strip_thoughts(text: str) -> str:
    text = text.rpartition("</think>")[2]
    return text.partition("<think>")[0]
