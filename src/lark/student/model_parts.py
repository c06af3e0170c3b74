"""Parts of a loaded student: the transformers model under LoRA, its layers, its head, its hidden states."""

from typing import Any

import torch
from transformers import PreTrainedModel

from lark.common.log import logger
from lark.student.attention import TREE_ATTENTION, PrefixTree
from lark.student.token_statistics import Head, find_compile_failure


def get_base_model(model: Any) -> PreTrainedModel:
    """Return the transformers model under a LoRA wrapper (its layers are changed in place)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """List the decoder's layers, first to last: its longest list of modules."""
    decoder: Any = get_base_model(model).get_decoder()
    return list(max((m for m in decoder.children() if isinstance(m, torch.nn.ModuleList)), key=len, default=[]))


def get_head(model: Any) -> Head:
    """Return the LM head with what the architecture does to its logits (`load_model` checks that this is all)."""
    base = get_base_model(model)
    linear: Any = base.get_output_embeddings()
    config = base.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale /= float(config.logits_scaling)
    return Head(
        weight_VD=linear.weight,
        bias_V=getattr(linear, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=scale,
    )


def compute_hidden_states(
    model: Any, input_ids_1X: torch.Tensor, position_ids_1X: torch.Tensor | None = None, tree: PrefixTree | None = None
) -> torch.Tensor:
    """Compute last hidden states [X, D] of one row, which needs no attention mask, or of the nodes of a prefix tree
    (once `lark.student.attention.enable_packed_rows` has made the student understand one).
    """
    decoder: Any = get_base_model(model).get_decoder()
    # Ranks agree on it; a student that takes no tree would let every trajectory see the others.
    assert tree is None or decoder.config._attn_implementation == TREE_ATTENTION, "a student that takes no prefix tree"
    packed = {} if tree is None else {"prefix_tree": tree}
    output = decoder(input_ids=input_ids_1X, position_ids=position_ids_1X, use_cache=False, **packed)
    return output.last_hidden_state.flatten(0, 1)


def compile_layers(model: Any, device: torch.device) -> None:
    """Compile the layers of a student that takes packed rows, in place: one graph for all layers alike and all layouts.
    After LoRA, and before the layers are divided over ranks. On other devices than CUDA nothing is compiled.
    """
    if device.type != "cuda":
        return
    reason = find_compile_failure(device)
    if reason is not None:
        logger.warning("the student's layers are not compiled: %s", reason)
        return
    torch._dynamo.config.suppress_errors = True  # a layer that cannot be compiled runs as it is, with a warning
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)
    logger.info("the student's layers are compiled")
