"""The length of rows a student can read: positions it was made for, and where rotary ones depend on the row."""

import math
from typing import Any

from lark.common.errors import LarkError
from lark.student.model_parts import get_base_model
from lark.student.student import Student


def read_max_positions(student: Student) -> float:
    """Read how many tokens the longest row has that the student was made for, by its config.json and `model.config`
    (infinite: it does not say). Reads no weights; infinite as well where nothing can be read, which loading the weights
    will report.
    """
    try:
        config = student.load_config()
    except LarkError:
        return math.inf
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_answer_room(student: Student, max_new_tokens: int) -> None:
    """Raise LarkError if answers of so many tokens leave a prompt no room in the student's positions."""
    positions = read_max_positions(student)
    if max_new_tokens >= positions:
        raise LarkError(
            f"task.max_new_tokens={max_new_tokens} leaves a prompt no room in the {positions:,} positions of "
            f"{student.name}; lower it, or set model.config (max_position_embeddings, rope_parameters)"
        )


def find_rope_border(model: Any) -> float:
    """Find from how many tokens on rotary positions depend on the longest row of a forward pass (infinite: they never
    do): a longer row would change the others'.
    """
    config = get_base_model(model).config.get_text_config()
    found = math.inf
    for rope in _rope_settings(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)):
        if rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic"):
            own = rope.get("original_max_position_embeddings")
            border = own or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
            found = min(found, border)
    return found


def _rope_settings(parameters: Any) -> list[dict[str, Any]]:
    """List the settings of all layers, or one of each kind of layer."""
    if not isinstance(parameters, dict):
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]
