"""Datasets for the book and the experiments, by name; nothing is ever downloaded.

Digits come with scikit-learn. MNIST, Fashion-MNIST and CIFAR-10 are read from their standard files below a folder:
`root`, or the environment variable TELEPORT_LITE_DATA, or ./data.
"""

from __future__ import annotations

import gzip
import os
import pickle
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from teleport_lite.errors import DataError, TeleportError, UnknownNameError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images as rows of numbers in [0, 1], and their classes.

    Attributes:
        name: what it is.
        x: [n, features], float32.
        y: [n], int64, classes from 0.
        classes: how many classes there are.
    """

    name: str
    x: Tensor
    y: Tensor
    classes: int = 10

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index) -> Dataset:
        """The samples at `index` (a slice, a mask or a tensor of positions), as a dataset."""
        return replace(self, x=self.x[index], y=self.y[index])

    def to(self, *args, **kwargs) -> Dataset:
        """The same on another device, or with `x` of another dtype; arguments as of `Tensor.to`."""
        x = self.x.to(*args, **kwargs)
        return replace(self, x=x, y=self.y.to(x.device))

    def batch(self, size: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`size` samples drawn without replacement.

        Raises:
            TeleportError: when there are fewer.
        """
        if not 0 < size <= len(self):
            raise TeleportError(f"a batch of 1 to {len(self)} samples", size, "ask for fewer")
        chosen = self._draw_order(generator)[:size]
        return self.x[chosen], self.y[chosen]

    def batches(self, size: int, *, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, in batches of `size`; a smaller rest is dropped.

        Raises:
            TeleportError: when there are fewer samples than `size`.
        """
        if not 0 < size <= len(self):
            raise TeleportError(f"batches of 1 to {len(self)} samples", size, "ask for smaller ones")
        order = self._draw_order(generator)[: len(self) // size * size]
        return ((self.x[chosen], self.y[chosen]) for chosen in order.split(size))

    def _draw_order(self, generator: torch.Generator | None) -> Tensor:
        device = self.x.device if generator is None else generator.device
        return torch.randperm(len(self), generator=generator, device=device).to(self.x.device)

    def __repr__(self) -> str:
        return f"Dataset({self.name}: {len(self)} samples of {self.x.shape[1]} numbers, {self.classes} classes)"


def load(name: str = "digits", *, root: str | os.PathLike | None = None) -> tuple[Dataset, Dataset]:
    """The training set and the test set of that name.

    Pixels are divided by their largest possible value, 16 for digits and 255 otherwise, and each image becomes one row.

    Args:
        name: "digits" (8 x 8, with scikit-learn), "mnist", "fashion_mnist" (28 x 28) or "cifar10" (3 x 32 x 32).
        root: folder with `MNIST/raw`, `FashionMNIST/raw` or `cifar-10-batches-py` in it.

    Raises:
        UnknownNameError: for another name.
        DataError: when a file is missing, truncated or not what it should be; it names the file and the remedy.
        TeleportError: when scikit-learn is missing.

    >>> train, test = load("digits")
    >>> train, len(test)
    (Dataset(digits: 1437 samples of 64 numbers, 10 classes), 360)
    """
    if name not in LOADERS:
        raise UnknownNameError("dataset", name, LOADERS)
    folder = root or os.environ.get("TELEPORT_LITE_DATA") or "data"
    return LOADERS[name](Path(os.path.expanduser(folder)))


def _load_digits(root: Path) -> tuple[Dataset, Dataset]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TeleportError("scikit-learn", "none", "pip install teleport-lite[book]") from error
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    digits = Dataset("digits", (x.float() / 16)[order], y.long()[order])
    return digits[:1437], digits[1437:]


def _idx_pair(name: str, folder: str) -> Callable[[Path], tuple[Dataset, Dataset]]:
    """A loader of the four idx files of MNIST or Fashion-MNIST."""

    def read_pair(root: Path) -> tuple[Dataset, Dataset]:
        sets = []
        for part in ("train", "t10k"):
            path = _first_present(*_file_spellings(root / folder / "raw" / f"{part}-images-idx3-ubyte"))
            images = _read_idx(path, dims=3)
            if images.shape[1:] != (28, 28):
                raise DataError(path, "images of 28 x 28", " x ".join(map(str, images.shape[1:])), _remedy(path))
            path = _first_present(*_file_spellings(root / folder / "raw" / f"{part}-labels-idx1-ubyte"))
            labels = _read_idx(path, dims=1)
            if len(labels) != len(images):
                raise DataError(path, f"{len(images)} labels, one an image,", f"{len(labels)}", _remedy(path))
            if int(labels.max()) > 9:
                raise DataError(path, "labels from 0 to 9", f"{int(labels.max())}", _remedy(path))
            sets.append(Dataset(name, images.flatten(1).float() / 255, labels.long()))
        return sets[0], sets[1]

    return read_pair


_TORCHVISION = {"MNIST": "MNIST", "FashionMNIST": "FashionMNIST", "cifar-10-batches-py": "CIFAR10"}


def _remedy(path: Path) -> str:
    source = next(_TORCHVISION[part] for part in reversed(path.parts) if part in _TORCHVISION)
    return (
        f"torchvision.datasets.{source}(FOLDER, download=True) writes the standard files, root= or TELEPORT_LITE_DATA "
        "names the FOLDER; load('digits') needs no files"
    )


def _first_present(*files: Path) -> Path:
    """The first of these files that is there.

    Raises:
        DataError: when none is; it names the last one, and tells what there is in its place.
    """
    for file in files:
        if file.is_file():
            return file
    path = files[-1]
    there = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
    listed = ", ".join(there[:8] + ["..."] * (len(there) > 8)) or "nothing"
    got = f"none; in its folder there is {listed}" if path.parent.is_dir() else "none; there is no such folder"
    raise DataError(path, "a file", got, _remedy(path))


def _file_spellings(path: Path) -> list[Path]:
    """An idx file as it may be called: with a dot, as on the page of its authors, or a dash; packed or not."""
    names = [path.name.replace("-idx", ".idx"), path.name]
    return [path.with_name(name + packed) for name in names for packed in ("", ".gz")]


def _read_idx(path: Path, dims: int) -> Tensor:
    """The bytes of an idx file, as a tensor of `dims` dimensions: a magic number, the sizes, then the data.

    Raises:
        DataError: when it is truncated or of another format.
    """
    content = _read_unpacked(path)
    if len(content) < 4 + 4 * dims:
        raise DataError(path, "an idx header", f"{len(content)} bytes", _remedy(path))
    if content[:4] != bytes([0, 0, 8, dims]):
        raise DataError(
            path, f"the idx magic number 0x0000080{dims}", f"0x{content[:4].hex()} ({content[:4]!r})", _remedy(path)
        )
    shape = [int.from_bytes(content[4 + 4 * d : 8 + 4 * d], "big") for d in range(dims)]
    size, found = torch.Size(shape).numel(), len(content) - 4 - 4 * dims
    if found != size:
        got = f"{found}, it is truncated" if found < size else f"{found}"
        raise DataError(path, f"{size} bytes of data", got, _remedy(path))
    if not size:
        raise DataError(path, "at least one sample", "none", _remedy(path))
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * dims).reshape(shape)


def _read_unpacked(path: Path) -> bytes:
    """The content of a file, unpacked when it is packed by gzip, whatever its name is.

    Raises:
        DataError: when it is called .gz and is neither packed nor an idx file, or cannot be unpacked.
    """
    content = path.read_bytes()
    plain = content[:3] == b"\0\0\10" or path.suffix != ".gz"
    try:
        return content if plain and content[:2] != b"\x1f\x8b" else gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(path, "a whole gzip file", f"{error}", _remedy(path)) from error


_HARMLESS = {
    *("numpy.ndarray", "numpy.dtype", "_codecs.encode"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles what the CIFAR-10 files hold, arrays and plain containers, and refuses everything else."""

    def find_class(self, module: str, name: str):
        if f"{module}.{name}" in _HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _load_cifar10(root: Path) -> tuple[Dataset, Dataset]:
    sets = []
    for files in ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]):
        images, labels = [], []
        for file in files:
            path = _first_present(root / "cifar-10-batches-py" / file)
            try:
                with path.open("rb") as stream:
                    content = _ArraysOnly(stream, encoding="latin1").load()
                x, y = torch.from_numpy(content["data"]), torch.tensor(content["labels"])
            except Exception as error:
                raise DataError(path, "a CIFAR-10 batch", f"{type(error).__name__}: {error}", _remedy(path)) from error
            right = x.shape == (len(y), 3072) and x.dtype == torch.uint8 and y.dtype == torch.int64
            if not right or not len(y) or not 0 <= int(y.min()) <= int(y.max()) <= 9:
                got = f"{x.dtype} {list(x.shape)} and {len(y)} labels"
                raise DataError(path, "images (bytes, [n, 3072]) and n labels from 0 to 9", got, _remedy(path))
            images.append(x)
            labels.append(y)
        sets.append(Dataset("cifar10", torch.cat(images).float() / 255, torch.cat(labels).long()))
    return sets[0], sets[1]


LOADERS: dict[str, Callable[[Path], tuple[Dataset, Dataset]]] = {
    "digits": _load_digits,
    "mnist": _idx_pair("mnist", "MNIST"),
    "fashion_mnist": _idx_pair("fashion_mnist", "FashionMNIST"),
    "cifar10": _load_cifar10,
}
