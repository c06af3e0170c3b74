"""Conversations to tokens: chat templates with generation marks, the trained span, the steps inside it.

The span of a row is its last assistant turn: the trajectory's content plus its end-of-turn token. Exactly these
tokens are scored and trained, and what the template marks after them, such as a newline. They are found by position
in the rendered text, never by token id (some tokenizers use their end token as padding). The tokens before the span
are those that the student is sampled after: where one would reach over the border, as a newline of the header and one
of the trajectory may be one token, the text is cut there.

What a row says is text: where a prompt or trajectory spells out a special token (`<|im_end|>`), it is tokenised as
ordinary characters, so that no row can end its own span or forge a turn. Added tokens that are not special, such as
Qwen3's `<think>`, stay tokens.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lark.common.errors import LarkError
from lark.common.log import logger

SPANS = ("content", "authors")
STEPS = ("sentences", "blank_lines")
_STEP_END = {  # white space after a sentence or with a newline in it; with two newlines in it
    "sentences": re.compile(r"(?<=[.!?])\s+|\n\s*"),
    "blank_lines": re.compile(r"\n[^\S\n]*\n\s*"),
}
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}.*?\{%[-+]?\s*endgeneration\s*[-+]?%\}", re.DOTALL)
_TURNS = [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, "abcd", strict=True)]
_ADDED = re.compile(r"\s*(?:<think>\s*</think>\s*)?")  # by a template, before what a row says and within its mark
_TODAY = re.compile(r"""\bstrftime_now\s*\(\s*(['"])(.*?)\1\s*\)""")
_MASK = "\ue000"  # a private-use character: no tokenizer's special tokens hold it
Offsets = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class TokenizedTrajectory:
    """One row as tokens: `input_ids[prompt_tokens:]` is the span.

    `end_of_turn` is the index of the end-of-turn token inside the span (-1 once truncation has removed it), `steps`
    are the span indices at which the trajectory's steps begin (the first is 0).
    """

    input_ids: list[int]
    prompt_tokens: int
    end_of_turn: int
    steps: list[int]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Turns rows into tokens."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    """Jinja source with `{% generation %}` marks."""
    span: str = "content"
    """content: the trajectory and its end-of-turn token are trained; authors: also what the template prints up to the
    next token boundary after it (the newline of ChatML), as LARK's released code does.
    """
    step_splitter: str = "sentences"
    """Where a trajectory's steps begin: sentences | blank_lines."""
    end_token: str | None = None
    """Ends the assistant's turns in `template` in place of `own_end` (see `replace_end_token`); None: as it came."""
    own_end: str | None = None

    def __post_init__(self) -> None:
        assert self.span in SPANS and self.step_splitter in STEPS, "ScoringSettings checks them"
        if not self.tokenizer.is_fast:
            raise LarkError(
                f"the tokenizer {type(self.tokenizer).__name__} gives no character offsets, without which the trained "
                "span cannot be found; set model.path to a folder with a tokenizer.json"
            )

    @property
    def prompt_identity(self) -> dict[str, str]:
        """Identify what the tokens of a prompt depend on."""
        return {name: value for name, value in self.span_identity.items() if name != "span"}

    @cached_property
    def span_identity(self) -> dict[str, str]:
        """Identify what tokens and spans depend on."""
        vocabulary = self.tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
        # Templates and passes name special tokens by their role, which only tokenizer_config.json says.
        roles = json.dumps(
            {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}, sort_keys=True
        )
        return {
            "tokenizer": hashlib.sha256((vocabulary + roles).encode()).hexdigest()[:16],
            "template": hashlib.sha256(self.template.encode()).hexdigest()[:16],
            "span": self.span,
            **({} if self.end_token is None else {"end_token": self.end_token}),
        }

    @property
    def end_id(self) -> int:
        """Return the token that ends the assistant's turns."""
        row = self.encode([_TURNS[:2]])[0]
        return row.input_ids[row.prompt_tokens + row.end_of_turn]

    def replace_end_token(self, token: str) -> "Chat":
        """Return a chat whose assistant's turns, this one and earlier ones, end with `token`; what others say ends as
        before.

        The template itself is changed, so that scoring, training, sampling and whoever loads the student render alike.
        Raises LarkError when `token` is not a single special token of the tokenizer (another might occur within a
        trajectory, which would then end there), or the template does not spell out its end between its marks.
        """
        special = [entry.content for entry in self.tokenizer.added_tokens_decoder.values() if entry.special]
        if token not in special:
            count = len(self.tokenizer(token, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
            what = f"{count} tokens" if count != 1 else "a token that may occur within a trajectory"
            shown = ", ".join(special[:8]) + (", ..." if len(special) > 8 else "")
            raise LarkError(
                f"model.end_token={token!r} is {what} of this tokenizer, not a single special one; set it to one of "
                f"{shown}, or null"
            )
        own = str(self.tokenizer.decode([self.end_id]))
        if own == token:
            return self
        (text,), (marks,) = self._render([_TURNS], return_assistant_tokens_mask=True)
        wanted, done = "", 0
        for begin, end in marks:
            wanted += text[done:begin] + text[begin:end].replace(own, token)
            done = end
        wanted += text[done:]

        def change(block: re.Match[str]) -> str:
            source = block[0].replace(own, token)
            if own == self.tokenizer.eos_token:
                source = re.sub(r"\beos_token\b", lambda _: f"'{token}'", source)
            return source

        own_end = own if own in special else None
        template = _GENERATION.sub(change, self.template)
        chat = replace(self, template=template, end_token=token, own_end=own_end)
        if chat._render([_TURNS])[0] != [wanted]:
            raise LarkError(
                f"model.end_token={token!r} cannot take the place of {own!r}, which the chat template does not spell "
                "out between {% generation %} and {% endgeneration %}; set model.template=chatml, llama3 or a file "
                "that does, or model.end_token=null"
            )
        return chat

    def encode(self, conversations: Sequence[Sequence[dict[str, str]]]) -> list[TokenizedTrajectory]:
        """Tokenise whole rows, each ending with the assistant's trajectory.

        Raises LarkError when the template marks no generation, alters the trajectory (strips it, drops its
        <think> block), or ends a turn with something that is not one token.
        """
        texts, marks = self._render(conversations, return_assistant_tokens_mask=True)
        tokens = self._tokenise(texts, conversations)
        prompts: dict[str, tuple[str, list[int]]] = {}  # candidates of a problem have theirs in common
        rows = []
        for text, spans, conversation, (ids, offsets) in zip(texts, marks, conversations, tokens, strict=True):
            key = json.dumps(conversation[:-1])
            if key not in prompts:
                prompts[key] = self._tokenise_prompt(conversation[:-1])
            prompt, prompt_ids = prompts[key]
            begin, content_begin, end = _find_marks(text, spans, conversation[-1]["content"], prompt)
            if not text.startswith(prompt):
                _warn_of_prompt(self.template)
            if begin == len(prompt) and ids[: len(prompt_ids)] != prompt_ids:
                ids, offsets = self._tokenise_literally(text, conversation, border=begin)
            span = begin, content_begin, content_begin + len(conversation[-1]["content"]), end
            rows.append(self._find_span(text, span, ids, offsets))
        return rows

    def encode_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Tokenise a prompt that asks the student for its turn."""
        return self._tokenise_prompt(messages)[1]

    def _tokenise_prompt(self, messages: Sequence[dict[str, str]]) -> tuple[str, list[int]]:
        texts, _ = self._render([messages], add_generation_prompt=True)
        return texts[0], self._tokenise(texts, [messages], add_generation_prompt=True)[0][0]

    def _render(
        self, conversations: Sequence[Sequence[dict[str, str]]], **how: bool
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """Render rows as text and, if asked for, the character spans marked as generated."""
        try:
            return render_jinja_template(  # type: ignore[return-value]
                [list(conversation) for conversation in conversations],
                chat_template=self.template,
                **self.tokenizer.special_tokens_map,  # type: ignore[arg-type]
                **how,
            )
        except TemplateError as error:
            raise LarkError(
                f"the chat template cannot render a row ({error}); set model.template=chatml, llama3, or another file"
            ) from error

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Build a pattern of the texts of the tokenizer's special tokens."""
        texts = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")

    def _tokenise(
        self, texts: list[str], conversations: Sequence[Sequence[dict[str, str]]], **how: bool
    ) -> list[tuple[list[int], Offsets]]:
        """Tokenise rendered rows, with character offsets; `how` they were rendered."""
        batch: Any = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = list(zip(batch["input_ids"], batch["offset_mapping"], strict=True))
        for i, conversation in enumerate(conversations):
            if any(self._special.search(message["content"]) for message in conversation):
                tokens[i] = self._tokenise_literally(texts[i], conversation, **how)
        return tokens

    def _tokenise_literally(
        self, text: str, conversation: Sequence[dict[str, str]], border: int = 0, **how: bool
    ) -> tuple[list[int], Offsets]:
        """Tokenise a row so that only the template's special tokens are special, none that messages spell out, and that
        no token reaches over `border`.

        The template's are those left when the messages' are masked by as many other characters. No token crosses a
        special one, so the text between them can be tokenised by itself.
        """
        masked_row = [
            message | {"content": self._special.sub(lambda match: _MASK * len(match[0]), message["content"])}
            for message in conversation
        ]
        (masked,), _ = self._render([masked_row], **how)
        whole: Any = self.tokenizer(masked, add_special_tokens=False, return_offsets_mapping=True)
        fixed = [
            (token, start, stop)
            for token, (start, stop) in zip(whole["input_ids"], whole["offset_mapping"], strict=True)
            if self._special.fullmatch(masked[start:stop].strip())
        ]
        if len(masked) != len(text) or self._tokenise_between(masked, fixed)[0] != whole["input_ids"]:
            raise LarkError(
                f"a message that spells out a special token ({self._special.findall(text)[-1]!r}, in the row that "
                f"ends {text[-60:]!r}) cannot be told from a real one with this template and tokenizer; take it out"
            )
        return self._tokenise_between(text, sorted([*fixed, (None, border, border)], key=lambda one: one[1:]))

    def _tokenise_between(self, text: str, fixed: Sequence[tuple[int | None, int, int]]) -> tuple[list[int], Offsets]:
        """Tokenise `text` between `fixed` tokens (id or None for a border, start, stop), with none special."""
        ids: list[int] = []
        offsets: Offsets = []
        done = 0
        for token, start, stop in [*fixed, (None, len(text), len(text))]:
            part: Any = self.tokenizer(
                text[done:start], add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
            )
            ids += part["input_ids"]
            offsets += [(done + a, done + b) for a, b in part["offset_mapping"]]
            if token is not None:
                ids.append(token)
                offsets.append((start, stop))
            done = stop
        return ids, offsets

    def _find_span(
        self, text: str, span: tuple[int, int, int, int], ids: list[int], offsets: Offsets
    ) -> TokenizedTrajectory:
        """Find the trained tokens of a row; `span`: where they begin, where the content begins and ends, the end."""
        begin, content_begin, content_end, end = span
        first = next(i for i, (_, stop) in enumerate(offsets) if stop > begin)
        # Some tokenizers (Llama 3) trim white space off the offsets: only a token's stop says where it lies.
        inside = [i for i, (start, stop) in enumerate(offsets) if start < end and stop > content_end]
        rest = text[offsets[inside[0]][1] : end].strip() if inside else ""
        if (
            not inside
            or offsets[inside[0]][0] < content_end
            or (rest and not self._special.fullmatch(self._decode(ids[inside[0] : inside[0] + 1])))
        ):
            raise LarkError(
                f"the template ends a turn with {text[content_end:end]!r}, which is not one token of this tokenizer "
                f"(but in {len(inside)}); set model.template to the family the tokenizer belongs to"
            )
        last = inside[-1] if self.span == "content" else max(inside[-1], min(inside[0] + 1, len(ids) - 1))
        steps_first = next(i for i, (_, stop) in enumerate(offsets) if stop > content_begin)
        steps = self._find_steps(text[content_begin:content_end], content_begin, offsets[steps_first : inside[0]])
        return TokenizedTrajectory(
            input_ids=ids[: last + 1],
            prompt_tokens=first,
            end_of_turn=inside[0] - first,
            steps=[0, *(steps_first - first + step for step in steps[1:])],
        )

    def _find_steps(self, content: str, begin: int, offsets: Offsets) -> list[int]:
        """Find the span index of each step's first token; a token over a border opens the later step."""
        steps = [0]
        index = 0
        for match in _STEP_END[self.step_splitter].finditer(content):
            if match.start() == 0 or match.end() == len(content):
                continue  # white space at either end of the trajectory separates nothing
            char = begin + match.end()
            while index < len(offsets) and offsets[index][1] <= char:
                index += 1
            if steps[-1] < index < len(offsets):
                steps.append(index)
        return steps

    def preview(self, row: TokenizedTrajectory, limit: int = 400) -> str:
        """Print the row as text with its trained span between guillemets; of a long span or prompt, both ends."""
        prompt, span = self._decode(row.input_ids[: row.prompt_tokens]), row.input_ids[row.prompt_tokens :]
        if len(prompt) > 200:
            prompt = f"{prompt[:120]} ... {prompt[-60:]}"
        if len(span) <= limit:
            return f"{prompt}«{self._decode(span)}»"
        return f"{prompt}«{self._decode(span[:limit])} ... {len(span) - limit - 1} more ... {self._decode(span[-1:])}»"

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids))).rstrip("\ufffd")  # a character may be cut in its midst


def _find_marks(text: str, marks: list[tuple[int, int]], content: str, prompt: str) -> tuple[int, int, int]:
    """Find in a rendered row where the span begins, where the trajectory's content does, and where the span ends.

    It begins at the template's mark, or, where the mark covers the end of the `prompt` to sample after, behind that.
    Raises LarkError where nothing is marked, or the trajectory is not printed as it is.
    """
    if not marks or marks[-1][0] >= marks[-1][1]:
        raise LarkError(
            "the chat template marks nothing as generated by the assistant, so no token could be trained; set "
            "model.template=chatml, llama3, or a file with {% generation %} ... {% endgeneration %} in it"
        )
    starts = [marks[-1][0]]
    for earlier, stop in marks[-2::-1]:  # marks that touch may be one
        if stop != starts[-1]:
            break
        starts.append(earlier)
    end, behind = marks[-1][1], len(prompt) if text.startswith(prompt) else 0
    content_begin = -1
    for begin in (later for start in starts for later in (max(start, behind), start)):
        added = _ADDED.match(text, begin)
        assert added is not None, "it matches nothing too"
        content_begin = text.find(content, begin, min(end, added.end() + len(content)))
        if content_begin >= 0:
            return min(max(begin, behind), content_begin), content_begin, end
    begin = starts[0]
    raise LarkError(
        f"the chat template changes the trajectory (it prints {text[begin : begin + 40]!r} for "
        f"{content[:40]!r}); set model.template=chatml, llama3, or a file that prints content as it is"
    )


@cache
def _warn_of_prompt(_template: str) -> None:
    logger.warning(
        "the chat template begins the assistant's turn otherwise in rows than when it asks for an answer: students are "
        "sampled after another prompt than they are trained after; set model.template=chatml, llama3 or another file"
    )


def load_template(name: str, tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> str:
    """Load the template called `name`: chatml, llama3, `own` (the tokenizer's) or a path to a Jinja file.

    date: ISO; stands in the template in place of today's. Raises LarkError where the template asks for one.
    """
    template = _read_template(name, tokenizer)
    if date is not None:
        try:
            day = datetime.date.fromisoformat(date)
        except ValueError as error:
            raise LarkError(f"model.date={date!r} is not a date; write it as '2026-01-31'") from error
        template = _TODAY.sub(lambda match: repr(day.strftime(match[2])), template)
    if re.search(r"\bstrftime_now\s*\(", template):
        raise LarkError(
            f"model.template={name!r} prints the date of the day by strftime_now, so rows and prompts would change "
            "from day to day; set model.date to one date, such as '2026-01-31', or take the call out of a file"
        )
    return template


def _read_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if name == "own":
        if not isinstance(tokenizer.chat_template, str):
            raise LarkError("model.template=own, but the tokenizer brings no chat template; set chatml or llama3")
        return tokenizer.chat_template
    shipped = resources.files("lark") / "student/templates" / f"{name}.jinja"
    if shipped.is_file():
        return shipped.read_text(encoding="utf-8")
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    raise LarkError(f"model.template={name!r} is neither chatml, llama3, own nor a file; set one of these")


def truncate_trajectory(row: TokenizedTrajectory, max_length: int) -> TokenizedTrajectory:
    """Cut the row to `max_length` tokens; the end-of-turn token goes with the tail."""
    ids = row.input_ids[:max_length]
    span = len(ids) - row.prompt_tokens
    return TokenizedTrajectory(
        input_ids=ids,
        prompt_tokens=min(row.prompt_tokens, len(ids)),
        end_of_turn=row.end_of_turn if row.end_of_turn < span else -1,
        steps=[step for step in row.steps if step < max(span, 1)],
    )
