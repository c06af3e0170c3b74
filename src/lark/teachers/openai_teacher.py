"""An OpenAI-compatible endpoint as a teacher: requests at its pace, retried, and its key kept out of everything."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from lark.common.errors import LarkError
from lark.teachers.teachers import Teacher, seed_of

LONGEST_WAIT = 900.0
"""Seconds; an endpoint that asks to wait longer is left for another day."""
_SECRET = 16  # a key from this length on is taken out of trajectories too; "EMPTY" is none that need be kept
_PIECE = 8  # so many characters of a key are not shown either
_SHOWN = 300
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
_BACKOFF = wait_random_exponential(multiplier=1, max=60)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One trajectory to ask for. prompt: digest of its messages, by which its record is found."""

    problem_id: str
    prompt: str
    sample: int
    messages: Sequence[dict[str, str]]


class Pace:
    """Turns to make a request: at most `rate` a minute, evenly spaced, none while the endpoint wants to be left alone.

    clock, sleep: of the event loop; a test has its own.
    """

    def __init__(
        self,
        rate: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self._interval = 60 / rate if rate else 0.0
        self._clock, self._sleep = clock, sleep
        self._free_at = clock()
        self._line = asyncio.Lock()

    async def turn(self) -> None:
        async with self._line:  # who waits first goes first
            while (wait := self._free_at - self._clock()) > 0:
                await self._sleep(wait)
            self._free_at = self._clock() + self._interval

    def pause(self, seconds: float) -> bool:
        """No turn for so long; whether that is later than it would have been."""
        until = self._clock() + seconds
        later = until > self._free_at
        self._free_at = max(self._free_at, until)
        return later


class TransientError(Exception):
    """A request that may succeed when it is made again. after: seconds the endpoint asked for, or None."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class _PromptError(Exception):
    """No trajectory for this prompt, whoever asks how often."""

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message


@dataclass(kw_only=True)
class Halt:
    """Shared by endpoints that are asked together: once one cannot go on, none begins another request."""

    halted: bool = False


@dataclass(kw_only=True)
class Tally:
    """What asking came to. lost: trajectories given up after all tries, by reason; they are not in the file."""

    requests: int = 0
    retries: int = 0
    waited: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    lost: dict[str, int] = field(default_factory=dict)


class Endpoint:
    """Asks for trajectories, `concurrency` at a time.

    Raises LarkError (one sentence, without the key) from `ask_all` for what a user has to mend: a refused key, an
    unknown model, a refused request, an endpoint that is down.
    """

    def __init__(self, teacher: Teacher, *, halt: Halt, pace: Pace | None = None) -> None:
        assert teacher.url is not None
        self.teacher, self.halt = teacher, halt
        self.key = teacher.read_key()
        self.pace = pace or Pace(teacher.rate)
        self.tally = Tally()
        self._lost_in_a_row = 0

    async def ask_all(self, requests: Sequence[Request], keep: Callable[[dict[str, Any]], None]) -> None:
        """Asks for every trajectory; `keep` gets each record (a trajectory, or a failure of this prompt) at once."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        pending = deque(requests)
        begun = time.monotonic()
        limits = httpx2.Limits(max_connections=self.teacher.concurrency)
        async with httpx2.AsyncClient(headers=headers, timeout=None, limits=limits) as client:

            async def work() -> None:
                while pending and not self.halt.halted:
                    record = await self._ask(client, pending.popleft())
                    if record is not None:
                        keep(record)

            count = min(self.teacher.concurrency, len(pending))
            outcomes = await asyncio.gather(*(self._halting(work()) for _ in range(count)), return_exceptions=True)
        self.tally.seconds = time.monotonic() - begun
        # Those under way were let finish, as they are paid for; the first that could not go on says why.
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        if sum(self.tally.lost.values()) == len(requests) > 0 and not self.halt.halted:
            raise self._down(" and ".join(self.tally.lost))

    async def _halting(self, work: Awaitable[None]) -> None:
        try:
            await work
        except BaseException:
            self.halt.halted = True
            raise

    async def _ask(self, client: httpx2.AsyncClient, request: Request) -> dict[str, Any] | None:
        teacher, begun, tries = self.teacher, time.monotonic(), 0
        seed = seed_of(teacher.seed, request.problem_id, request.sample)
        record = {
            "problem_id": request.problem_id,
            "prompt": request.prompt,
            "sample": request.sample,
            "seed": seed if teacher.body.get("seed", seed) is not None else None,
        }
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(TransientError),
            stop=self._stops,
            wait=_wait,
            sleep=asyncio.sleep,
            reraise=True,
        )
        reply: dict[str, Any] = {}
        try:
            async for attempt in retrying:
                with attempt:
                    await self.pace.turn()
                    tries += 1
                    reply = await self._post(client, self._body(request, seed))
                    reply |= self._trajectory(reply)
        except TransientError as again:
            return self._lose(str(again))
        except _PromptError as failure:
            reply = {**reply, "failure": failure.kind, "message": failure.message}
        finally:
            self.tally.requests += tries
            self.tally.retries += max(0, tries - 1)
        self._lost_in_a_row = 0
        self.tally.tokens += reply.get("num_tokens") or 0
        reply.pop("choice", None)
        return record | reply | {"tries": tries, "seconds": round(time.monotonic() - begun, 3)}

    def _stops(self, state: RetryCallState) -> bool:
        return self.halt.halted or stop_after_attempt(self.teacher.tries)(state)

    def _lose(self, reason: str) -> None:
        """Gives a trajectory up; the endpoint as well once it answers nothing any more."""
        self.tally.lost[reason] = self.tally.lost.get(reason, 0) + 1
        self._lost_in_a_row += 1
        if self._lost_in_a_row >= max(3, self.teacher.concurrency) and not self.halt.halted:
            raise self._down(reason)

    def _down(self, reason: str) -> LarkError:
        return LarkError(
            f"teacher {self.teacher.name}: the endpoint {reason}, {self._lost_in_a_row} requests in a row, however "
            "often they were tried; give the same command again once it answers"
        )

    def _body(self, request: Request, seed: int) -> dict[str, Any]:
        teacher = self.teacher
        body = {
            "model": teacher.model,
            "messages": list(request.messages),
            "temperature": teacher.temperature,
            "top_p": teacher.top_p,
            "max_tokens": teacher.max_new_tokens,
            "seed": seed,
            **teacher.body,
        }
        return {name: value for name, value in body.items() if value is not None}

    async def _post(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice of the answer, with model and tokens; raises TransientError, _PromptError or ValueError."""
        try:
            async with asyncio.timeout(self.teacher.timeout):
                response = await client.post(f"{self.teacher.url}/chat/completions", json=body)
        except TimeoutError:
            raise TransientError(f"gave no answer within {self.teacher.timeout:g} s") from None
        except httpx2.RequestError as error:
            raise TransientError(f"could not be reached ({type(error).__name__})") from None
        try:
            data = response.json()
        except ValueError:  # broken JSON or text
            data = None
        status = response.status_code
        fault = data.get("error") if isinstance(data, dict) else None
        if status == 200 and isinstance(fault, dict):  # a router's way to pass on another's error
            code = fault.get("code")
            status = code if isinstance(code, int) and code >= 400 else 502
        if status != 200:
            self._refused(status, response, data)
        choices = data.get("choices") if isinstance(data, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise TransientError("answered 200 without a choice")
        assert isinstance(data, dict)
        usage = data.get("usage")
        return {
            "choice": choices[0],
            "model": self._text(data.get("model")) or None,
            "num_tokens": _count(usage, "completion_tokens"),
            "prompt_tokens": _count(usage, "prompt_tokens"),
        }

    def _refused(self, status: int, response: httpx2.Response, data: Any) -> None:
        """Raises what an answer other than 200 calls for."""
        message = self._message(response, data)
        said = f"{status}: {message}" if message else str(status)
        known = message.lower()
        name, key = self.teacher.name, self.teacher.key
        spent = status == 402 or "insufficient_quota" in response.text
        if spent:
            raise LarkError(f"teacher {name}: the account has no credit left ({said}); top it up and go on")
        if status in (408, 409, 425, 429) or status >= 500:
            after = _retry_after(response.headers.get("retry-after"))
            if after is not None and after > LONGEST_WAIT:
                raise LarkError(
                    f"teacher {name}: the endpoint asks to wait {after:,.0f} s ({said}); give the command again then"
                )
            if after is not None and self.pace.pause(after):
                self.tally.waited += after
            raise TransientError(f"answered {status}", after)
        if status in (400, 413, 422):
            detail = known + response.text.lower()
            if status == 413 or any(sign in detail for sign in _TOO_LONG):
                raise _PromptError("too_long", message)
            if any(sign in detail for sign in _FILTERED):
                raise _PromptError("content_filter", message)
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

    def _trajectory(self, reply: dict[str, Any]) -> dict[str, Any]:
        """content, reasoning and finish_reason of a choice; raises _PromptError if there is no trajectory in it."""
        choice = reply["choice"]
        message = choice.get("message") if isinstance(choice.get("message"), dict) else {}
        finish = self._text(choice.get("finish_reason")) or None
        content = self._text(_joined(message.get("content")))
        reasoning = next(
            (text for name in ("reasoning_content", "reasoning") if (text := self._text(message.get(name)))), None
        )
        if finish == "content_filter":
            raise _PromptError("content_filter")
        if self._text(message.get("refusal")):
            raise _PromptError("refused", self._text(message["refusal"])[:_SHOWN])
        if not content.strip() and not (reasoning and finish == "length"):
            raise _PromptError("empty", f"finish_reason {finish}")
        return {"content": content, "reasoning": reasoning, "finish_reason": finish}

    def _message(self, response: httpx2.Response, data: Any) -> str:
        """What the endpoint says of an error, in one line and without the key."""
        fault = data.get("error", data) if isinstance(data, dict) else None
        text = fault.get("message") if isinstance(fault, dict) else fault
        text = text if isinstance(text, str) and text else response.text
        return without_key(" ".join(text.split()), self.key)[:_SHOWN]  # cut last: half a key is no longer found

    def _text(self, value: Any) -> str:
        """A text of the answer as it may be kept: without the key, and as UTF-8 can hold it."""
        if not isinstance(value, str):
            return ""
        if self.key and len(self.key) >= _SECRET:
            value = value.replace(self.key, "***")
        return value.encode("utf-8", "replace").decode()


def without_key(text: str, key: str | None) -> str:
    """The text with *** for the key and for every piece of 8 or more of its characters."""
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


def _joined(content: Any) -> Any:
    """Content that comes in parts, as one text."""
    if not isinstance(content, list):
        return content
    return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) else None


def _retry_after(header: str | None) -> float | None:
    """Seconds, from a number of seconds or a date; None where there is neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _wait(state: RetryCallState) -> float:
    """Seconds before a request is made again; where the endpoint said how long, its pace sees to that."""
    error = state.outcome.exception() if state.outcome else None
    return 0.0 if isinstance(error, TransientError) and error.after is not None else _BACKOFF(state)
