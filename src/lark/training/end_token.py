"""Whether a student can learn to stop: is its end token in what is trained, and can the head give it probability?

LoRA leaves the head as it is. A token that pre-training never used has a row in it that is all but a copy of the other
unused tokens' rows (as of Land and Bartolo, arXiv 2405.05417), and shares their probability whatever the layers below
come to: `ceiling` is the most that any hidden state gives it. How unlikely the token is before training says nothing
of that: a word that is merely out of place is less likely still, and is learned in a few steps.

Shapes: V vocabulary, D hidden size, N positions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lark.common.cache import write_json
from lark.common.ranks import is_main
from lark.pool.pool import arrow_column
from lark.student.distributed import call_as_method, gather_head
from lark.student.student import compute_hidden_states, get_base_model, get_head
from lark.student.token_statistics import Head
from lark.student.tokenized_pool import TokenizedPool
from lark.training.datamodule import TrajectoryDataModule

ENOUGH = 0.9
"""Probability that training must at least be able to reach: trained tokens have a ceiling of 1, unused ones of 1/20."""
RECORD = "end_token.json"
_ROWS = 8  # trajectories whose ends are looked at
_EVALUATIONS = 40  # of the head, when its ceiling is sought; some 20 suffice
_CERTAIN = np.log(0.999)  # where the search may end
_HEAD_ROWS = 8192  # of it in float32 at a time


class EndTokenCheck(Callback):
    """Before an arm is trained: counts trajectories without an end, and warns, once, if it cannot be learned.

    Leaves what it found in the arm's folder, as end_token.json. One check serves all arms of a run.
    """

    def __init__(self, data: TrajectoryDataModule, say: Callable[[str], None]):
        self.data, self.say = data, say
        self.found: dict[str, Any] | None = None
        """Of the student, which all arms have in common."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        data, model = self.data, module.student_model
        selection = data.selections[data.active_arm]
        counts = span_ends(data.trajectories, selection.row)
        if counts["without_end"]:
            cut = f"{counts['without_end']:,} of {counts['trajectories']:,} trajectories"
            self.say(
                f"{data.active_arm:<11} {cut} have no end token to learn, cut as they are to task.max_length="
                f"{data.task.max_length}"
            )
        if self.found is None:
            self.found = look_at(model, data.trajectories, selection.row)
            if text := warning(self.found):
                self.say(text)
        folder: Path = module.folder
        if is_main():
            write_json(folder / RECORD, {**self.found, **counts})


def span_ends(pool: TokenizedPool, row: np.ndarray) -> dict[str, int]:
    """How many trajectories there are, and how many have their end-of-turn token cut off: all others end their span
    with it (with span=authors, what the template prints after it may follow).
    """
    end_N = _column(pool, "end_of_turn")[row]
    inside = (end_N >= 0) & (end_N < pool.length[row] - _column(pool, "prompt_tokens")[row])
    assert np.array_equal(inside, end_N >= 0)
    return {"trajectories": len(row), "without_end": int((~inside).sum())}


def _column(pool: TokenizedPool, name: str) -> np.ndarray:
    return arrow_column(pool.tokens, name).to_numpy()


def look_at(model: Any, pool: TokenizedPool, row: np.ndarray) -> dict[str, Any]:
    """What the student to be trained makes of its end token.

    token, head_trained: whether training reaches the token's row of the head. If it does not, further: ceiling (of the
    token's probability), and surprisal (nats) as it is at the ends of `trajectories_asked` of the trajectories `row`;
    eos, eos_ceiling: the same of the tokenizer's own end token; head: the head's name.
    """
    chat = pool.chat
    token, eos = chat.end_id, chat.tokenizer.eos_token_id
    found: dict[str, Any] = {"token": chat.tokenizer.convert_ids_to_tokens(token), "id": token}
    found["head_trained"] = trains(model, token)
    asked = _short(pool, row)
    if found["head_trained"] or not len(asked):
        return found
    head = gather_head(get_head(model))
    hidden_ND, longest = _at_ends(model, pool, asked)
    found |= {
        "ceiling": ceiling(head, token, longest),
        "surprisal": float(torch.stack([-_log_p(head, hidden_D)[token] for hidden_D in hidden_ND]).mean()),
        "vocabulary": len(head.weight_VD),
        "trajectories_asked": len(asked),
        "head": next(name for name, part in get_base_model(model).named_modules() if part is _output(model)).split(".")[
            -1
        ],
    }
    if isinstance(eos, int) and eos != token:
        found |= {"eos": chat.tokenizer.eos_token, "eos_ceiling": ceiling(head, eos, longest)}
    return found


def warning(found: dict[str, Any]) -> str | None:
    """The setting, the consequence and the remedy, if the end token cannot be learned."""
    if found.get("ceiling", 1.0) >= ENOUGH:
        return None
    other = f"'model.end_token=\"{found['eos']}\"', or " if found.get("eos_ceiling", 0.0) >= ENOUGH else ""
    head = found["head"]
    return (
        f"warning     the end token {found['token']} cannot be learned: model.lora leaves the head as it is, in which "
        f"the token is all but told apart from others, such as those that were never trained. It can get a probability "
        f"of {found['ceiling']:.1%} at most (surprisal now {found['surprisal']:.1f} nats; chance "
        f"{np.log(found['vocabulary']):.1f}), so that trained students would go on and on; set {other}"
        f"'+model.lora.trainable_token_indices={{{head}:[{found['id']}]}}', or '+model.lora.modules_to_save=[{head}]'"
    )


def trains(model: Any, token: int) -> bool:
    """Whether training changes the head's row for `token`."""
    weight_VD = get_head(model).weight_VD
    if not weight_VD.requires_grad or weight_VD.is_leaf:
        return weight_VD.requires_grad
    with torch.enable_grad():  # some rows alone: peft's trainable_token_indices
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(get_head(model).weight_VD[token].sum(), trained, allow_unused=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def ceiling(head: Head, token: int, length: float) -> float:
    """The largest probability that a hidden state of this length, which the final norm fixes, gives to the token.

    Found by L-BFGS over directions. The logarithm is concave in the hidden state (without a soft cap), so where it
    still grows outwards there is no larger one. Too little may be found for a token amid others (in their convex hull),
    whose ceiling is below 1/2. At most 40 times two products of the head with a vector, a few where the ceiling is 1.
    """
    start_D = head.weight_VD[token].float() - head.weight_VD.mean(0, dtype=torch.float32)
    free_D = (start_D / start_D.square().mean().sqrt()).requires_grad_()
    best = -np.inf

    def closure() -> float:
        nonlocal best
        size = free_D.detach().norm()
        unit_D = free_D.detach() / size
        log_p, gradient_D = _value_and_gradient(head, token, length * unit_D)
        best = max(best, log_p)
        across_D = gradient_D - (gradient_D @ unit_D) * unit_D
        free_D.grad = across_D * (0 if best > _CERTAIN else -length / size)  # no gradient ends the search
        return -log_p

    settings: dict[str, Any] = {"line_search_fn": "strong_wolfe", "tolerance_change": 1e-3}
    torch.optim.LBFGS([free_D], max_iter=_EVALUATIONS, max_eval=_EVALUATIONS, **settings).step(closure)
    return float(np.exp(best))


def _value_and_gradient(head: Head, token: int, hidden_D: Tensor) -> tuple[float, Tensor]:
    """ln p of the token, and its derivative with respect to the hidden state."""
    logits_V, slope_V = _logits(head, hidden_D)
    log_p_V = logits_V.log_softmax(0)
    toward_V = -log_p_V.exp()
    toward_V[token] += 1
    toward_V *= slope_V
    parts = zip(head.weight_VD.split(_HEAD_ROWS), toward_V.split(_HEAD_ROWS), strict=True)
    return float(log_p_V[token]), torch.stack([toward @ weight.float() for weight, toward in parts]).sum(0)


def _logits(head: Head, hidden_D: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [V] in float32, and their derivative with respect to weight_VD @ hidden_D."""
    logits_V = torch.cat([weight.float() @ hidden_D for weight in head.weight_VD.split(_HEAD_ROWS)])
    if head.bias_V is not None:
        logits_V = logits_V + head.bias_V.float()
    logits_V = head.scale * logits_V
    slope_V = torch.full_like(logits_V, head.scale)
    if head.softcap is not None:
        squashed_V = torch.tanh(logits_V / head.softcap)
        logits_V, slope_V = head.softcap * squashed_V, slope_V * (1 - squashed_V.square())
    return logits_V, slope_V


def _log_p(head: Head, hidden_D: Tensor) -> Tensor:
    return _logits(head, hidden_D)[0].log_softmax(0)


def _output(model: Any) -> Any:
    return get_base_model(model).get_output_embeddings()


def _short(pool: TokenizedPool, row: np.ndarray) -> np.ndarray:
    """A few of the trajectories that have an end, of the shorter half, the same on every rank."""
    row = row[_column(pool, "end_of_turn")[row] >= 0]
    row = row[np.argsort(pool.length[row], kind="stable")][: max(_ROWS, len(row) // 2)]
    return row[np.linspace(0, len(row) - 1, min(_ROWS, len(row))).round().astype(int)]


@torch.no_grad()
def _at_ends(model: Any, pool: TokenizedPool, row: np.ndarray) -> tuple[Tensor, float]:
    """Hidden states [N, D] that predict the ends, and the length of the longest in a trajectory; float32."""
    ends, longest = [], 0.0
    training = [module for module in model.modules() if module.training]
    model.eval()
    device = next(model.parameters()).device
    for encoded in pool.read_tokens(row):
        ids_1L = torch.tensor([encoded.input_ids], device=device)
        hidden_LD = call_as_method(model, _last_hidden_states, ids_1L).float()
        ends.append(hidden_LD[encoded.prompt_tokens + encoded.end_of_turn - 1])
        longest = max(longest, float(hidden_LD[encoded.prompt_tokens - 1 :].norm(dim=1).max()))
    for module in training:
        module.training = True
    return torch.stack(ends), longest


def _last_hidden_states(model: Any, input_ids_1L: Tensor) -> Tensor:
    return compute_hidden_states(model, input_ids_1L, None)
