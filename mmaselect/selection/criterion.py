"""What every criterion is: it reads feature maps batch by batch, and what it keeps of them is small."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from mmaselect.errors import InputError
from mmaselect.selection.features import Features

#: What a criterion keeps: per name one number per group of images, or, where ``fields`` is None, any sum over images.
Sums = dict[str, Tensor]


class Criterion(ABC):
    """Scores a timestep by the features it gives; the highest score is chosen.

    Attributes:
        draws: Independent noises per image that it needs.
        needs_labels: Whether it reads the labels of the images.
        label: Name for people, with the parameters that matter most.

    Every argument of a criterion's constructor is an attribute of the same name.
    """

    draws: int = 1
    needs_labels: bool = False
    label: str

    @property
    def parameters(self) -> dict[str, Any]:
        """Its type and every argument, given or default: two criteria that agree in them are the same."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != 'self']
        values = {name: getattr(self, name) for name in names}
        plain = {name: getattr(value, 'fields', value) for name, value in values.items()}
        return {'type': type(self).__name__, **plain}


class SummedCriterion(Criterion):
    """A criterion that keeps nothing but sums over images: memory does not grow with their number.

    Attributes:
        fields: Names of its sums. None if they are not numbers: such a criterion cannot be resampled.
    """

    fields: ClassVar[tuple[str, ...] | None]

    @abstractmethod
    def sums(self, features: Features) -> Sums:
        """Reduces a batch.

        Args:
            features: Maps of the batch under ``draws`` noises.

        Returns:
            For each of ``fields`` (G,), one number per group of images; without ``fields`` any tensors that may be
            added to those of other batches.
        """

    @property
    def names(self) -> tuple[str, ...]:
        """``fields``, none where there are none."""
        return self.fields or ()

    @abstractmethod
    def score(self, sums: Sums) -> Tensor:
        """Turns sums over images into scores.

        Args:
            sums: Tensors of one shape, each entry the sum of a field over images; every entry is scored by itself.

        Returns:
            The scores, in that shape.
        """


def unlike_maps(first: Sequence[int], second: Sequence[int]) -> InputError:
    """The error of a selection whose images have several sizes, by the sizes of two maps."""
    return InputError(
        f'selection met maps of {tuple(first)} and {tuple(second)}: its images must have one size (give the hook a '
        'pipeline that crops or resizes)'
    )


def add_sums(first: Sums, second: Sums) -> Sums:
    """Adds two sums entry by entry; an entry that one of them lacks counts as zero.

    Raises:
        InputError: If maps of two sizes meet, which cannot be averaged.
    """
    out = dict(first)
    for key, value in second.items():
        if key in out and out[key].shape != value.shape:
            raise unlike_maps(out[key].shape, value.shape)
        out[key] = out[key] + value if key in out else value
    return out
