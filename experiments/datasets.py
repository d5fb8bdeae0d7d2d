"""The data sets that the experiments know by name, each with the networks, rates and radii of arXiv:2305.13404."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

import teleport_lite as tl
from teleport_lite.book.data import Dataset


@dataclass(frozen=True)
class Setting:
    """What the experiments are like on a data set; rates and radii are multiples of those on MNIST."""

    training: tuple[int, ...]  # widths of the network on which optimizers are compared
    minima: tuple[int, ...]  # widths of the network whose minima are measured and moved
    speed: float = 1.0
    reach: float = 1.0

    def rates(self, on_mnist: Iterable[float]) -> tuple[float, ...]:
        """Learning rates."""
        return tuple(round(self.speed * rate, 6) for rate in on_mnist)

    def radii(self, on_mnist: Iterable[float]) -> tuple[float, ...]:
        """Radii of the sharpness."""
        return tuple(round(self.reach * radius, 6) for radius in on_mnist)


SETTINGS = {
    "mnist": Setting((784, 16, 10, 10), (784, 16, 10, 10)),
    "fashion_mnist": Setting((784, 16, 10, 10), (784, 16, 10, 10), reach=0.1),
    "cifar10": Setting((3072, 128, 32, 10), (3072, 32, 10, 10), speed=2.0, reach=0.1),
}

REMARKS = {"cifar10": {"images_from": "a copy that went through JPEG once"}}  # what a record says of its images


def split(quick: bool, name: str = "mnist") -> tuple[Dataset, Dataset, Dataset]:
    """Images to train on, the last 10,000 of the training set to choose the learning rate with, and those to test on.

    With `quick` a few synthetic images of the same size.
    """
    if quick:
        generator, features = torch.Generator().manual_seed(0), SETTINGS[name].training[0]
        x, y = torch.rand(900, features, generator=generator), torch.randint(10, (900,), generator=generator)
        data = Dataset("synthetic", x, y)
        return data[:500], data[500:700], data[700:]
    train, test = tl.data.load(name)
    return train[:-10000], train[-10000:], test
