"""Answer in words, first on the page: which rule by how much, how sure, at what cost, from which pool."""

from collections.abc import Iterator

from lark.comparison.comparison import Group
from lark.comparison.conclusions import list_conclusions
from lark.page.contents import GroupContents, PoolContents

ARMS_NAMED = 4


def list_headline(group: GroupContents) -> Iterator[tuple[str, str]]:
    """Yield what is asked and its answer, in the order in which a reader wants them."""
    if group.compared is not None:
        for result, sureness in list_conclusions(group.compared):
            yield "Result", result
            yield "How sure", sureness
        yield "Cost", _describe_cost(group.compared)
    for pool in group.pools:
        yield "Pool", _describe_pool(pool)


def _describe_cost(group: Group) -> str:
    """Say what choosing took of each arm, and how much was trained on."""
    trained = [arm for arm in group.arms if arm.trained]
    costly = sorted((arm for arm in trained if arm.forward_tokens > 0), key=lambda arm: -arm.seconds)
    parts = [
        f"{arm.label} {arm.forward_tokens:,.0f} tokens through the student, {arm.seconds:,.1f} s"
        for arm in costly[:ARMS_NAMED]
    ]
    if further := costly[ARMS_NAMED:]:
        parts.append(f"{len(further)} further rules less")
    if free := len(trained) - len(costly):
        parts.append(f"{free} rule{'s' if free > 1 else ''} asked no model")
    tokens = sorted(arm.tokens for arm in trained)
    sizes = " to ".join(dict.fromkeys(f"{count:,.0f}" for count in (tokens[0], tokens[-1])))
    return f"To choose: {'; '.join(parts)}. To train: {sizes} tokens an epoch."


def _describe_pool(pool: PoolContents) -> str:
    facts, columns = pool.sample.facts, pool.sample.columns
    teachers = len(set(columns["teacher"]) - {None})
    of_teachers = f" from {teachers} teachers" if teachers > 1 else ""
    checked = [correct for correct in columns["correct"] if correct is not None]
    text = f"{facts['of_trajectories']:,} candidates of {facts['of_problems']:,} problems{of_teachers}"
    if checked:
        wrong = sum(not correct for correct in checked) / len(columns["correct"])
        text += f"; {len(checked) / len(columns['correct']):.0%} checked, {wrong:.0%} known to be wrong"
    if facts["trajectories"] < facts["of_trajectories"]:
        text += f" (this page shows a sample of {facts['trajectories']:,}, by the hash of their ids)"
    return f"{text}."
