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

__all__ = ["NO_GOLD", "compile_pattern", "extract_answer", "find_boxed", "parse_choice", "parse_number"]

NO_GOLD = (
    r"(?i)^(?:[\s?.-]*|\W*(?:text\W*)?(?:proof|see (?:the )?(?:proof|solution)|n/a|none|null|nan|unknown|missing"
    r"|omitted|unavailable|tbd|(?:no|not)[ _-]?(?:found|available|provided|given|specified|answer))\W*)$"
)
"""Gold answers that say there is none; a pattern for Arrow (RE2) too."""
PATTERN_SECONDS = 1.0
_STATEMENTS = 1_000  # that say what the answer is; of a text that says so more often, the last

_THOUGHTS = (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))

# One to three backslashes: texts that went through an escaping layer write \\boxed, and \\\boxed follows a line break.
_BRACES = re.compile(r"\\{1,3}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)

_TAGGED = re.compile(r"<answer>(?P<answer>(?:[^<]|<(?!/?answer>)){1,10000}+)</answer>", re.IGNORECASE)
_STATED = re.compile(
    r"(?:####|\bfinal answer\b[\s*_]{0,20}\n"
    r"|\banswers?\b[\s*_]{0,20}(?:(?:(?:to|for|of) [^\n.:=?]{1,120}?|\([^()\n]{1,20}\))[\s*_]{0,20})?"
    r"(?::|=|\b(?:is|are|was|would be|will be|should be|must be|equals)\b)"
    r"(?:\s{0,20}(?:therefore|thus|hence|indeed|simply|just|then|clearly)\b)?)"
    r"(?!\s{1,20}not\b)[\s*_:]{0,20}(?:(?:\$\$|\\\[)\s{0,20}\n)?(?=(?P<answer>[^\n]{1,300}))",
    re.IGNORECASE,
)
_NAMED_CHOICE = re.compile(
    r"\b(?:correct|right|best)\s{1,20}(?:option|choice|letter)\s{0,20}(?::|\bis\b|=)"
    r"[\s*_:]{0,20}(?=(?P<answer>[^\n]{1,300}))",
    re.IGNORECASE,
)
_LONE_CHOICE = re.compile(r"[ \t]*(?:\*\*\(?[A-Z][.)]?\)?\*\*|\*\*\(?[A-Z]\)?[.)]\*\*[^\n]*|\(?[A-Z]\)?)[ \t.]*")
_FORMULA = re.compile(r"\$\$?(?=[^\s$])[^$]*[^\s$]\$\$?(?![\w$])|\\\(.*?\\\)|\\\[.*?\\\]")
# Where the answer ends and the sentence goes on. A comma before a number, "or" or "and" belongs to the answer.
_SENTENCE_END = re.compile(
    r"[.!?;](?:[\s*\"'}\])]|$)|,\s+(?!(?i:or|and)\b|[A-Z]\b)(?=[A-Za-z])"
    r"|\s(?:because|since|as|so|which)\s|\s\(?(?:i\.e\.|that is)",
)
_CHOICE = re.compile(
    r"(?:(?:the\s+)?(?:final\s+)?(?:correct\s+)?(?:answer|option|choice)\s*(?:is\b|:)?\s*)?"
    r"(?:\(\s*([A-Za-z])\s*\)(.*)|([A-Za-z])(?:\s*(?:[.)]|:(?!\s*(?-i:[A-Z])\b)).*"
    r"|\s+[-\N{EN DASH}\N{EM DASH}]\s[^=]*)?)",
    re.DOTALL | re.IGNORECASE,
)
_SEVERAL_CHOICES = re.compile(r"\(?[A-Z]\)?(?:(?:\s*[,/&]\s*|\s+(?:or|and)\s+)\(?[A-Z]\)?)+|(?:\([A-Z]\)\s*){2,}")
_ANOTHER_CHOICE = re.compile(r"\s*(?:(?:[,/&]|\b(?:or|and)\b)\s*\(?[A-Z]\b|\(\s*[A-Z]\s*\)|[=+*/^_<>])")


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
    for the kinds math, number and choice the last sentence that says what the answer is ("the answer is 18", "#### 18",
    "Final answer: (C)"), for choice also a last line of nothing but the letter ("**B**"). For choice, a box that names
    no letters, such as E = mc^2, is passed over if one of the other ways finds something.

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
    if boxed is not None and (kind != "choice" or parse_choice(boxed) or _names_several_choices(boxed)):
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


def _names_several_choices(text: str) -> bool:
    return bool(_SEVERAL_CHOICES.fullmatch(to_plain_notation(text[:1000]).replace("**", "").strip()))


def _find_statement(text: str, kind: str | None) -> str | None:
    tagged = None
    for match in _TAGGED.finditer(text):
        tagged = match["answer"].strip() or tagged
    if tagged or kind not in ("choice", "number", "math"):
        return tagged
    found: list[tuple[bool, int, str]] = []
    for form in (_STATED, _NAMED_CHOICE) if kind == "choice" else (_STATED,):
        for match in deque(form.finditer(text), maxlen=_STATEMENTS):
            clause = _cut_clause(match["answer"])
            if rank := _rank_clause(clause, kind):
                found.append((rank > 1, match.start(), clause))
    if found:
        return max(found)[2]
    if kind == "choice":
        line = text.strip().rpartition("\n")[2]
        if _LONE_CHOICE.fullmatch(line) or (line == text.strip() and parse_choice(line)):
            return line.strip()
    return None


def _cut_clause(said: str) -> str:
    """Return the part of a sentence that is the answer: up to where a clause ends outside formulas and brackets."""
    said = re.sub(r"(?<=\S)\*\*(?!\w)", "", said.partition("</answer>")[0])  # the end of bold; 2**3 is none
    formula = _FORMULA.match(said)
    ends = [end.start() for end in _SENTENCE_END.finditer(said, formula.end() if formula else 0)]
    for end in ends:
        if sum(map(said[:end].count, "([{")) <= sum(map(said[:end].count, ")]}")):
            return said[:end].strip()
    return said[: ends[0] if ends else None].strip()


def _rank_clause(clause: str, kind: str) -> int:
    """Return 0 for a clause that cannot be the answer, 2 for one that can, 1 for a word, if nothing else is stated."""
    if kind == "choice":
        plain = to_plain_notation(clause).replace("**", "")
        return 2 if re.match(r"(?:(?i:option|choice)\s+)?\(?\s*[A-Z]\b", plain) else 0
    if any(map(str.isdigit, clause)):
        return 2
    words = re.findall(r"[A-Za-z]{3,}", clause)
    if kind == "number" or not clause or (len(words) > 1 and not re.search(r"[$\\]", clause)):
        return 0
    return 1 if words and not re.search(r"[$\\]", clause) else 2


def _strip_thoughts(text: str) -> str:
    for begin, end in _THOUGHTS:
        text = text.rpartition(end)[2].partition(begin)[0]
    return text
