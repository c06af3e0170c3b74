"""Checks that a student can learn to stop: is its end token trained, and can the head give it probability?

LoRA leaves the head as it is. A token that pre-training never used has a row in it that is all but a copy of the other
unused tokens' rows (Land and Bartolo, arXiv 2405.05417), and shares their probability whatever the layers below
compute.
How unlikely the token is before training says nothing of that: a word that is merely out of place is less likely still,
and is learned in a few steps.

Shapes: V vocabulary, D hidden size, L tokens of a row, N trajectories.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lark.common.cache import write_json
from lark.common.log import logger
from lark.common.ranks import is_main
from lark.pool.pool import read_arrow_column
from lark.student.distributed import call_as_method, gather_head
from lark.student.model_parts import compute_hidden_states, get_base_model, get_head
from lark.student.token_statistics import Head
from lark.student.tokenized_pool import TokenizedPool
from lark.training.datamodule import TrajectoryDataModule

ENOUGH = 0.9
"""Probability that training must at least be able to reach: trained tokens reach 1, unused ones a share of it."""
RECORD = "end_token.json"
_ROWS = 8  # trajectories that are looked at
_ITERATIONS = 40  # of L-BFGS; some 20 suffice


class EndTokenCheck(Callback):
    """Warns, once a run, where the end token cannot be learned, and leaves what it found in each arm's
    end_token.json.
    """

    def __init__(self, data: TrajectoryDataModule):
        self.data = data
        self.found: dict[str, Any] | None = None
        """Of the student, which all arms have in common."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        data = self.data
        row = data.selections[data.active_arm].row
        counts = {"trajectories": len(row), "without_end": count_missing_ends(data.trajectories, row)}
        if counts["without_end"]:
            logger.warning(
                f"{counts['without_end']:,} of the {len(row):,} trajectories of {data.active_arm} have no end token to "
                f"learn, as they are cut to task.max_length={data.task.max_length}; raise it, or set task.overlong=drop"
            )
        if self.found is None:
            self.found = inspect_end_token(module.student_model, data.trajectories, row)
            if text := describe_problem(self.found):
                logger.warning(text)
        folder: Path = module.folder
        if is_main():
            write_json(folder / RECORD, {**self.found, **counts})


def count_missing_ends(pool: TokenizedPool, row: np.ndarray) -> int:
    """Count the trajectories whose end-of-turn token was cut off; all others end their span with it."""
    return int((read_arrow_column(pool.tokens, "end_of_turn").to_numpy()[row] < 0).sum())


def inspect_end_token(model: Any, pool: TokenizedPool, row: np.ndarray) -> dict[str, Any]:
    """Find out what training can make of the student's end token; all ranks take part.

    Returns token, id and head_trained: whether training reaches the token's row of the head. Where it does not, also
    ceiling, the largest probability that the token can get (see `max_probability`); head and rows, the layers to name
    to train the whole head or the token's row; eos, eos_ceiling: the same of the tokenizer's own end token.
    """
    chat = pool.chat
    token, eos = chat.end_id, chat.tokenizer.eos_token_id
    found: dict[str, Any] = {"token": chat.tokenizer.convert_ids_to_tokens(token), "id": token}
    found["head_trained"] = is_trainable(model, token)
    if found["head_trained"] or not len(row):
        return found
    head, length = gather_head(get_head(model)), _measure_hidden_length(model, pool, row)
    base: Any = get_base_model(model)
    layer, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    names = {part: name.split(".")[-1] for name, part in base.named_modules()}
    rows = embeddings if layer.weight is embeddings.weight else layer  # a shared row is trained as the embeddings'
    found |= {"ceiling": max_probability(head, token, length), "head": names[layer], "rows": names[rows]}
    if isinstance(eos, int) and eos != token:
        found |= {"eos": chat.tokenizer.eos_token, "eos_ceiling": max_probability(head, eos, length)}
    return found


def describe_problem(found: dict[str, Any]) -> str | None:
    """Say what follows and what to set where the end token cannot be learned; None where it can."""
    if found.get("ceiling", 1.0) >= ENOUGH:
        return None
    other = f"'model.end_token=\"{found['eos']}\"', or " if found.get("eos_ceiling", 0.0) >= ENOUGH else ""
    return (
        f"trained students will not stop: their end token {found['token']} can get a probability of "
        f"{found['ceiling']:.1%} at most, as model.lora leaves the head as it is, where the token is hardly told apart "
        f"from others that were never trained; set {other}"
        f"'+model.lora.trainable_token_indices={{{found['rows']}:[{found['id']}]}}', or "
        f"'+model.lora.modules_to_save=[{found['head']}]'"
    )


def is_trainable(model: Any, token: int) -> bool:
    """Say whether training changes the head's row for `token`."""
    weight_VD = get_head(model).weight_VD
    if not weight_VD.requires_grad or weight_VD.is_leaf:
        return weight_VD.requires_grad
    with torch.enable_grad():  # some rows alone: peft's trainable_token_indices
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(get_head(model).weight_VD[token].sum(), trained, allow_unused=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


@torch.enable_grad()
def max_probability(head: Head, token: int, length: float) -> float:
    """Find the largest probability that a hidden state of this length, which the final norm fixes, gives to the token.

    L-BFGS over directions. The logarithm is concave in the hidden state (without a soft cap), so where it still grows
    outwards there is no larger one. Too little may be found for a token amid others (in their convex hull), whose
    largest probability is below 1/2.
    """
    weight_VD = head.weight_VD.detach().float()
    exact = Head(weight_VD=weight_VD, bias_V=head.bias_V, softcap=head.softcap, scale=head.scale)
    direction_D = F.normalize(weight_VD[token] - weight_VD.mean(0), dim=0).requires_grad_()
    search = torch.optim.LBFGS([direction_D], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def compute_surprisal() -> Tensor:
        search.zero_grad()
        hidden_1D = length * F.normalize(direction_D, dim=0)[None]
        surprisal = -exact.compute_logits(hidden_1D).log_softmax(1)[0, token]
        surprisal.backward()
        return surprisal

    search.step(compute_surprisal)  # type: ignore[arg-type]
    return float(torch.exp(-compute_surprisal().detach()))


@torch.no_grad()
def _measure_hidden_length(model: Any, pool: TokenizedPool, row: np.ndarray) -> float:
    """Measure the longest last hidden state in a few of the shorter trajectories, the same on every rank."""
    shorter = row[np.argsort(pool.length[row], kind="stable")][: max(_ROWS, len(row) // 2)]
    looked_at = shorter[np.linspace(0, len(shorter) - 1, min(_ROWS, len(shorter))).round().astype(int)]
    device, longest = next(model.parameters()).device, 0.0
    model.eval()
    for trajectory in pool.read_tokens(looked_at):
        hidden_LD = call_as_method(model, _last_hidden_states, torch.tensor([trajectory.input_ids], device=device))
        longest = max(longest, float(hidden_LD[trajectory.prompt_tokens - 1 :].float().norm(dim=1).max()))
    model.train()
    return longest


def _last_hidden_states(model: Any, input_ids_1L: Tensor) -> Tensor:
    return compute_hidden_states(model, input_ids_1L, None)
