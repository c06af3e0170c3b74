r"""Answers found in generated text: the last `\boxed{...}`, a task's pattern, numbers.

Generated text is hostile input: everything here is linear in it, or bounded.
"""

import re
from fractions import Fraction

# One to three backslashes: texts that went through an escaping layer write \\boxed, and \\\boxed follows a line break.
_BRACES = re.compile(r"\\{1,3}boxed\s*\{|\\.|[{}]", re.DOTALL)

_DECIMAL = r"(?:\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(rf"([+-]?)\s*\\?\$?\s*({_DECIMAL})(?:\s*/\s*([+-]?)({_DECIMAL}))?\s*\.?")
_LATEX_FRACTION = re.compile(
    rf"([+-]?)\s*\\[dt]?frac\s*\{{\s*([+-]?)({_DECIMAL})\s*\}}\s*\{{\s*([+-]?)({_DECIMAL})\s*\}}"
)
_MAX_DIGITS = 100


def find_boxed(text: str) -> str | None:
    r"""The content of the last non-empty `\boxed{...}` with balanced braces outside <think> blocks, or None.

    Of nested boxes the innermost that starts last counts. Linear in the length of the text.
    """
    text = _outside_thought(text)
    start = text.find("boxed")
    if start < 0:
        return None
    open_braces: list[int] = []  # where the content of each open box starts; -1 for a plain brace
    last, content = -1, None
    for match in _BRACES.finditer(text, max(0, start - 3)):
        token = match.group()
        if token == "{":
            open_braces.append(-1)
        elif token == "}":
            opened = open_braces.pop() if open_braces else -1
            if opened > last and (inside := text[opened : match.start()].strip()):
                last, content = opened, inside
        elif token.endswith("{") and "boxed" in token:
            open_braces.append(match.end())
    return content


def extract_answer(text: str, pattern: str | None = None) -> str | None:
    r"""The final answer a text states: its last `\boxed{...}`, else the last match of the task's pattern, else None.

    Only what follows the last closed <think> block counts, and nothing inside one that was never closed.

    Args:
        text: generated text.
        pattern: regular expression whose group 1 is the answer.

    Raises:
        ValueError: the pattern does not compile or has no group.
    """
    compiled = compile_pattern(pattern)
    boxed = find_boxed(text)
    if boxed is not None or compiled is None:
        return boxed
    answer = None
    for match in compiled.finditer(_outside_thought(text)):
        answer = match.group(1) or answer
    return answer.strip() or None if answer else None


def compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """The task's answer pattern, compiled; ValueError if it is no regular expression or has no group."""
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"task.pattern={pattern!r} is not a regular expression ({error}); correct it") from error
    if compiled.groups < 1:
        raise ValueError(f"task.pattern={pattern!r} has no group; put parentheses round the answer")
    return compiled


def parse_number(text: str) -> Fraction | None:
    r"""The number a text is, or None.

    Reads integers, decimals, thousands commas, a leading currency sign, a/b and \frac{a}{b}. Exponents and numbers of
    more than 100 digits are refused, so the cost is bounded whatever the text.
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    if len(text) > 4 * _MAX_DIGITS or sum(map(str.isdecimal, text)) > _MAX_DIGITS or not text.isascii():
        return None
    text = text.strip()
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    if match := _NUMBER.fullmatch(text):
        sign, above, sign_below, below = match.groups()
        sign_above = ""
    elif match := _LATEX_FRACTION.fullmatch(text):
        sign, sign_above, above, sign_below, below = match.groups()
    else:
        return None
    numerator, denominator = _fraction(above), _fraction(below or "1")
    if denominator == 0:
        return None
    negative = (sign == "-") ^ (sign_above == "-") ^ (sign_below == "-")
    return (-numerator if negative else numerator) / denominator


def _outside_thought(text: str) -> str:
    text = text.rpartition("</think>")[2]
    return text.partition("<think>")[0]


def _fraction(decimal: str) -> Fraction:
    return Fraction(re.sub(r"\{,\}|\\,|,", "", decimal))
