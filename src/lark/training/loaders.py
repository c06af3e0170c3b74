"""What a Trainer draws its batches from: without end in training, once through in validation.

Both are iterable, so that no Trainer thinks of dividing them among the ranks once more.
"""

from collections.abc import Callable, Iterator

from lightning import Trainer
from torch.utils.data import IterableDataset

from lark.training.batches import Step


class TrainingSteps(IterableDataset):
    """`step(number, rank=, world=)` from the trainer's current optimizer step on; the Trainer's max_steps ends them."""

    def __init__(self, step: Callable[..., Step], trainer: Trainer):
        self.step, self.trainer = step, trainer

    def __iter__(self) -> Iterator[Step]:
        number = self.trainer.global_step
        while True:
            yield self.step(number, rank=self.trainer.global_rank, world=self.trainer.world_size)
            number += 1


class HeldOutSteps(IterableDataset):
    """This rank's held-out batches."""

    def __init__(self, steps: Callable[[], Iterator[Step]]):
        self.steps = steps

    def __iter__(self) -> Iterator[Step]:
        return self.steps()
