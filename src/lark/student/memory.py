"""Choose how many tokens a pass takes at a time: from free memory, and less once it did run out."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lark.common.errors import LarkError
from lark.student.model_parts import decoder_layers

CPU_TOKENS = 2048  # more gain nothing: the products are at their best rate, and activations leave the cache
CPU_TRAINING_TOKENS = 1024  # the same; what is kept for the backward pass is 2 MB a token even in a small student
ACTIVATION_BYTES = 3  # a number: half of them bfloat16 under autocast, the rest float32
MOST_TOKENS = 65536
LEAST_TOKENS = 256
SHARE_OF_FREE_MEMORY = 0.5  # the rest: logits in float32, what the allocator loses, other processes


def estimate_scoring_tokens(model: Any, device: torch.device) -> int:
    """Estimate how many tokens' activations, in a forward pass without gradients, fit into the device's free memory.

    What is alive at a time is one layer's: the residual stream with its copies, and what its matrices give, some of it
    rotated or gathered once more.
    """
    if device.type == "cpu":
        return CPU_TOKENS
    layers = decoder_layers(model)
    if not layers:
        return LEAST_TOKENS
    width = max(sum(p.shape[0] for p in layer.parameters() if p.ndim == 2) for layer in layers)
    hidden = model.get_input_embeddings().weight.shape[1]
    fitting = int(
        SHARE_OF_FREE_MEMORY
        * get_free_bytes(device, "probe.batch_tokens")
        / (model.dtype.itemsize * (8 * hidden + 3 * width))
    )
    return min(max(fitting, LEAST_TOKENS), MOST_TOKENS)


def estimate_training_tokens(model: Any, device: torch.device, *, checkpointed: bool) -> int:
    """Estimate how many tokens' activations, kept for the backward pass, fit into what the weights, their gradients and
    AdamW's moments leave free of the device.

    Kept are what its matrices take and give, and copies of the residual stream: in every layer, or, `checkpointed`, in
    one layer at a time beside one residual stream a layer.
    """
    if device.type == "cpu":
        return CPU_TRAINING_TOKENS
    layers = decoder_layers(model)
    if not layers:
        return LEAST_TOKENS
    hidden = model.get_input_embeddings().weight.shape[1]
    each = max(sum(sum(p.shape) for p in layer.parameters() if p.ndim == 2) for layer in layers) + 8 * hidden
    kept = each + len(layers) * hidden if checkpointed else len(layers) * each
    # Of what is trained the gradient, twice (ddp holds another copy), and two moments; autocast's bfloat16 copy.
    to_come = sum(4 * _own_bytes(p) for p in model.parameters() if p.requires_grad)
    to_come += sum(_own_bytes(p) // 2 for p in model.parameters() if p.dtype == torch.float32)
    free = SHARE_OF_FREE_MEMORY * (get_free_bytes(device, "sft.micro_batch_tokens") - to_come)
    return min(max(int(free / (ACTIVATION_BYTES * kept)), LEAST_TOKENS), MOST_TOKENS)


def _own_bytes(parameter: torch.Tensor) -> int:
    """Count the bytes this rank keeps."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).nbytes


def get_free_bytes(device: torch.device, setting: str) -> int:
    """Ask the device for its free memory. Raises LarkError naming `setting` where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    raise LarkError(f"nothing is known of the memory of a {device.type} device; set {setting}=<tokens of one pass>")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether a device, or the CPU's allocator, had no memory left."""
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def release_memory(device: torch.device) -> None:
    """Give what the allocator holds back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
