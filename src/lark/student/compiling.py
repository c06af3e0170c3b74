"""Compile a student's layers, where that pays: on CUDA."""

from typing import Any

import torch

from lark.common.log import logger
from lark.student.student import decoder_layers
from lark.student.token_statistics import find_compile_failure


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
