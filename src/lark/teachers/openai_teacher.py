"""An OpenAI-compatible endpoint as a teacher: asked by openai's client, its key kept out of everything.

The client makes a request again (`max_retries`, `Retry-After`, exponential back-off). Hooks on its HTTP client see each
try: they hold all requests back while the endpoint wants to be left alone, and turn bodies that are not an answer into
the errors they are.
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, DefaultAsyncHttpxClient, Omit

from lark.common.errors import LarkError
from lark.teachers.teacher import Teacher, derive_seed

LONGEST_WAIT = 120.0
"""Seconds; the client waits no longer, and an endpoint that asks for more is left for another day."""
_SECRET = 16  # a key from this length on is taken out of trajectories too; "EMPTY" need not be kept
_PIECE = 8  # so many characters of a key are not shown either
_SHOWN = 300
_RETRIED = (408, 409, 425, 429)  # and 5xx
_TOO_LONG = ("context_length", "context length", "maximum context", "too long", "too many tokens", "max_model_len")
_FILTERED = (
    "content_filter",
    "content_policy",
    "content management policy",
    "moderation",
    "safety system",
    "safety polic",
    "safety reason",
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One trajectory to ask for. prompt: digest of its messages, by which its record is found."""

    problem_id: str
    prompt: str
    sample: int
    messages: Sequence[dict[str, str]]


@dataclass(kw_only=True)
class Tally:
    """What asking came to. lost: trajectories given up after all tries, by reason; they are not in the file."""

    seconds: float = 0.0
    tokens: int = 0
    lost: dict[str, int] = field(default_factory=dict)


class Endpoint:
    """Ask for trajectories, `concurrency` at a time.

    Raises LarkError (one sentence, without the key) from `ask_all` for what a user has to mend: a refused key, an
    unknown model, a refused request, an endpoint that is down.
    """

    def __init__(self, teacher: Teacher, *, halt: asyncio.Event) -> None:
        """Take the endpoint. halt: shared by those asked together: once one cannot go on, none begins a request."""
        assert teacher.url is not None
        self.teacher, self.halt = teacher, halt
        self.key = teacher.read_key()
        self._left_alone_until = 0.0  # on the monotonic clock
        self.tally = Tally()
        self._lost_in_a_row = 0

    async def ask_all(self, requests: Sequence[Request], keep: Callable[[dict[str, Any]], None]) -> None:
        """Ask for every trajectory; `keep` gets each record (a trajectory, or a failure of this prompt) at once."""
        pending = deque(requests)
        begun = time.monotonic()
        async with self._open_client() as client:

            async def work() -> None:
                try:
                    while pending and not self.halt.is_set():
                        record = await self._ask(client, pending.popleft())
                        if record is not None:
                            keep(record)
                except BaseException:
                    self.halt.set()
                    raise

            count = min(self.teacher.concurrency, len(pending))
            outcomes = await asyncio.gather(*(work() for _ in range(count)), return_exceptions=True)
        self.tally.seconds = time.monotonic() - begun
        # Those under way were let finish, as they are paid for; the first that could not go on says why.
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        if sum(self.tally.lost.values()) == len(requests) > 0 and not self.halt.is_set():
            raise self._down(" and ".join(self.tally.lost))

    def _open_client(self) -> AsyncOpenAI:
        # The client would take what it is not given from the environment: other people's keys and organizations.
        headers: dict[str, Any] = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        return AsyncOpenAI(
            api_key=self.key or "none",
            base_url=self.teacher.url,
            max_retries=self.teacher.tries - 1,
            default_headers=headers,
            http_client=DefaultAsyncHttpxClient(
                follow_redirects=False,  # the key goes to that URL only
                timeout=self.teacher.timeout,
                event_hooks={"request": [self._before_try], "response": [self._after_try]},
            ),
        )

    async def _before_try(self, request: Any) -> None:
        while (wait := self._left_alone_until - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    async def _after_try(self, response: Any) -> None:
        """Make an error of an answer that is none; hold every request back as long as the endpoint asks."""
        await response.aread()
        data = _parse_json(response)
        if response.status_code == 200:
            fault = data.get("error") if isinstance(data, dict) else None
            choices = data.get("choices") if isinstance(data, dict) else None
            if isinstance(fault, dict):  # a router's way to pass on another's error
                code = fault.get("code")
                response.status_code = code if isinstance(code, int) and code >= 400 else 502
            elif not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
                response.status_code = 502
        if response.status_code == 425:  # too early, which the client does not know
            response.headers["x-should-retry"] = "true"
        if self.halt.is_set() or "insufficient_quota" in response.text:
            response.headers["x-should-retry"] = "false"
        after = _read_retry_after(response)
        if response.status_code in (429, 503) and after is not None and after <= LONGEST_WAIT:
            self._left_alone_until = max(self._left_alone_until, time.monotonic() + after)

    async def _ask(self, client: AsyncOpenAI, request: Request) -> dict[str, Any] | None:
        teacher, begun = self.teacher, time.monotonic()
        seed = derive_seed(teacher.seed, request.problem_id, request.sample)
        body = {
            "temperature": teacher.temperature,
            "top_p": teacher.top_p,
            "max_tokens": teacher.max_new_tokens,
            "seed": seed,
            **teacher.body,
        }
        messages: Any = list(request.messages)
        without_authorization: Any = {"Authorization": Omit()}
        try:
            answer = await client.chat.completions.with_raw_response.create(
                model=teacher.model,
                messages=messages,
                extra_headers=None if self.key else without_authorization,
                extra_body={name: value for name, value in body.items() if value is not None},
            )
            reply = self._read_answer(json.loads(answer.text))
        except APITimeoutError:
            return self._lose(f"gave no answer within {teacher.timeout:g} s")
        except APIConnectionError as error:
            return self._lose(f"could not be reached ({type(error.__cause__).__name__})")
        except APIStatusError as error:
            refusal = self._read_refusal(error.response)
            if refusal is None:
                return self._lose(f"answered {error.response.status_code}")
            reply = refusal
        self._lost_in_a_row = 0
        self.tally.tokens += reply.get("num_tokens") or 0
        record = {"problem_id": request.problem_id, "prompt": request.prompt, "sample": request.sample}
        record |= {"seed": None if body["seed"] is None else seed}
        return record | reply | {"seconds": round(time.monotonic() - begun, 3)}

    def _lose(self, reason: str) -> None:
        """Give a trajectory up; the endpoint as well once it answers nothing any more."""
        self.tally.lost[reason] = self.tally.lost.get(reason, 0) + 1
        self._lost_in_a_row += 1
        if self._lost_in_a_row >= max(3, self.teacher.concurrency) and not self.halt.is_set():
            raise self._down(reason)

    def _down(self, reason: str) -> LarkError:
        return LarkError(
            f"teacher {self.teacher.name}: the endpoint {reason}, {self._lost_in_a_row} requests in a row, however "
            "often they were tried; give the same command again once it answers"
        )

    def _read_answer(self, data: dict[str, Any]) -> dict[str, Any]:
        """Read model, tokens and the first choice: content, reasoning and finish_reason, or why it has no
        trajectory.
        """
        choice, usage = data["choices"][0], data.get("usage")
        message = choice.get("message") if isinstance(choice.get("message"), dict) else {}
        finish = self._clean(choice.get("finish_reason")) or None
        content = self._clean(message.get("content"))
        reasoning = next(
            (text for name in ("reasoning_content", "reasoning") if (text := self._clean(message.get(name)))), None
        )
        refusal = self._clean(message.get("refusal"))
        reply = {
            "model": self._clean(data.get("model")) or None,
            "num_tokens": _read_count(usage, "completion_tokens"),
            "prompt_tokens": _read_count(usage, "prompt_tokens"),
        }
        if finish == "content_filter":
            return reply | {"failure": "content_filter", "message": ""}
        if refusal:
            return reply | {"failure": "refused", "message": refusal[:_SHOWN]}
        if not content.strip() and not (reasoning and finish == "length"):
            return reply | {"failure": "empty", "message": f"finish_reason {finish}"}
        return reply | {"content": content, "reasoning": reasoning, "finish_reason": finish}

    def _read_refusal(self, response: Any) -> dict[str, Any] | None:
        """Read what an answer other than 200 calls for: None where trying again did not help, the failure where there
        is no trajectory for this prompt, whoever asks how often. Raises LarkError for what a user has to mend.
        """
        status, detail, message = response.status_code, response.text.lower(), self._read_message(response)
        said = f"{status}: {message}" if message else str(status)
        name, key = self.teacher.name, self.teacher.key
        if status == 402 or "insufficient_quota" in detail:
            raise LarkError(f"teacher {name}: the account has no credit left ({said}); top it up and go on")
        if status in _RETRIED or status >= 500:
            after = _read_retry_after(response)
            if after is not None and after > LONGEST_WAIT:
                raise LarkError(
                    f"teacher {name}: the endpoint asks to wait {after:,.0f} s ({said}); give the command again then"
                )
            return None
        if status == 413 or (status in (400, 422) and any(sign in detail for sign in _TOO_LONG)):
            return {"failure": "too_long", "message": message}
        if status in (400, 422) and any(sign in detail for sign in _FILTERED):
            return {"failure": "content_filter", "message": message}
        if status in (401, 403) and key is None:
            raise LarkError(
                f"teacher {name}: the endpoint wants a key ({said}); name the environment variable that holds it, "
                f"--key {name}=VARIABLE"
            )
        if status in (401, 403):
            raise LarkError(
                f"teacher {name}: the endpoint refuses the key ({said}); set the environment variable {key} to a valid "
                "one"
            )
        if status == 404:
            raise LarkError(
                f"teacher {name}: {self.teacher.url} has no model {self.teacher.model} ({said}); correct the URL or "
                "the name behind #"
            )
        raise LarkError(
            f"teacher {name}: the endpoint refuses the request ({said}); correct the settings, or take fields out of "
            "it or add some with body in --teachers"
        )

    def _read_message(self, response: Any) -> str:
        """Read what the endpoint says of an error, in one line and without the key."""
        data = _parse_json(response)
        fault = data.get("error", data) if isinstance(data, dict) else None
        text = fault.get("message") if isinstance(fault, dict) else fault
        text = text if isinstance(text, str) and text else response.text
        return without_key(" ".join(text.split()), self.key)[:_SHOWN]  # cut last: half a key is no longer found

    def _clean(self, value: Any) -> str:
        """Return a text of the answer, also one that comes in parts, without the key and as UTF-8 can hold it."""
        if isinstance(value, list):
            parts = (part.get("text") for part in value if isinstance(part, dict))
            value = "".join(part for part in parts if isinstance(part, str))
        if not isinstance(value, str):
            return ""
        if self.key and len(self.key) >= _SECRET:
            value = value.replace(self.key, "***")
        return value.encode("utf-8", "replace").decode()


def without_key(text: str, key: str | None) -> str:
    """Put *** for the key and for every piece of 8 or more of its characters."""
    if not key:
        return text
    size = min(_PIECE, len(key))
    pieces = {key[i : i + size] for i in range(len(key) - size + 1)}
    hidden = [False] * len(text)
    for i in range(len(text) - size + 1):
        if text[i : i + size] in pieces:
            hidden[i : i + size] = [True] * size
    shown = (
        "***" if hide and not (i and hidden[i - 1]) else "" if hide else char
        for i, (char, hide) in enumerate(zip(text, hidden, strict=True))
    )
    return "".join(shown)


def _parse_json(response: Any) -> Any:
    """Return the body, or None where it is not JSON."""
    try:
        return response.json()
    except ValueError:
        return None


def _read_count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) else None


def _read_retry_after(response: Any) -> float | None:
    """Read seconds, from a number of seconds or a date; None where there is neither."""
    header = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
