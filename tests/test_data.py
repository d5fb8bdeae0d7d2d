"""Datasets: what loads, and how missing, truncated and wrong files are named."""

from __future__ import annotations

import gzip
import os
import pickle
import socket
import struct

import numpy as np
import pytest
import torch

from teleport_lite.book import data
from teleport_lite.errors import DataError, TeleportError, UnknownNameError


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def mnist(tmp_path):
    """A folder with a tiny MNIST; one file is not packed."""
    rng, raw = np.random.default_rng(0), tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 12), ("t10k", 5)):
        (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(rng.integers(0, 256, (n, 28, 28)))))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(n) % 10))
    return tmp_path


def test_digits_need_no_network_and_no_global_random_state(monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    state = torch.get_rng_state()
    train, test = data.load()
    assert (len(train), len(test)) == (1437, 360)
    assert train.x.dtype == torch.float32 and train.x.shape == (1437, 64) and train.y.dtype == torch.int64
    assert 0 <= float(train.x.min()) < float(train.x.max()) == 1
    assert sorted(set(test.y.tolist())) == list(range(10))
    assert torch.equal(train.x, data.load()[0].x) and torch.equal(state, torch.get_rng_state())


def test_mnist(mnist):
    train, test = data.load("mnist", root=mnist)
    assert (len(train), len(test)) == (12, 5) and train.x.shape == (12, 784)
    assert train.y.tolist() == [*range(10), 0, 1]
    raw = gzip.decompress((mnist / "MNIST/raw/train-images-idx3-ubyte.gz").read_bytes())[16:]
    assert torch.equal(
        (train.x * 255).round().to(torch.uint8).flatten(), torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    )


def test_the_environment_names_the_folder(mnist, monkeypatch):
    monkeypatch.setenv("TELEPORT_LITE_DATA", str(mnist))
    assert len(data.load("mnist")[0]) == 12


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("suffix", ["", ".gz"], ids=["no suffix", "gz"])
@pytest.mark.parametrize("dot", ["-", "."], ids=["dash", "dot"])
def test_files_are_what_their_bytes_say(mnist, packed, suffix, dot):
    """Browsers unpack and rename what they load; the authors of MNIST wrote a dot where torchvision writes a dash."""
    expected = data.load("mnist", root=mnist)
    for file in [*(mnist / "MNIST" / "raw").iterdir()]:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        name = file.name.removesuffix(".gz").replace("-idx", f"{dot}idx") + suffix
        file.unlink()
        (file.parent / name).write_bytes(gzip.compress(content) if packed else content)
    for a, b in zip(data.load("mnist", root=mnist), expected, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


@pytest.mark.parametrize("way", ["root", "environment"])
def test_a_folder_below_home(mnist, way, monkeypatch):
    monkeypatch.setenv("HOME", str(mnist.parent))
    folder = f"~/{mnist.name}"
    if way == "environment":
        monkeypatch.setenv("TELEPORT_LITE_DATA", folder)
    assert len(data.load("mnist", root=folder if way == "root" else None)[0]) == 12


def test_what_is_there_instead_is_told(mnist):
    raw = mnist / "MNIST" / "raw"
    images = raw / "train-images-idx3-ubyte.gz"
    images.rename(raw / "train-images.zip")
    with pytest.raises(DataError, match=r"in its folder there is .*train-images\.zip"):
        data.load("mnist", root=mnist)
    images.write_bytes(b"PK\3\4 and so on, an archive")
    with pytest.raises(DataError, match="whole gzip file"):
        data.load("mnist", root=mnist)
    images.rename(images.with_suffix(""))
    with pytest.raises(DataError, match=r"0x504b0304 \(b'PK"):
        data.load("mnist", root=mnist)
    with pytest.raises(DataError, match=r"~nobody\d+.*no such folder"):
        data.load("mnist", root="~nobody123456")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-images-idx3-ubyte.gz", None, "expected a file in"),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(np.zeros((12, 28, 28))))[:40],
            "expected a whole gzip file in",
        ),
        ("train-images-idx3-ubyte.gz", b"not gzip", "expected a whole gzip file in"),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(b"")[:10] + b"\xff" * 20,
            "expected a whole gzip file in",
        ),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((12, 28, 28)))[:-1]), "truncated"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((12, 28, 28))) + b"!"), "bytes of data"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((12, 28, 27)))), "expected images of 28 x 28 in"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros(12))), "the idx magic number 0x00000803"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"\0\0\10"), "expected an idx header in"),
        ("t10k-labels-idx1-ubyte", idx(np.arange(4)), "expected 5 labels, one an image, in"),
        ("t10k-labels-idx1-ubyte", idx(np.full(5, 10)), "expected labels from 0 to 9 in"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros(0)), "expected at least one sample in"),
    ],
    ids=[
        *("missing", "cut", "not packed", "damaged", "short", "long", "narrow"),
        *("labels", "no header", "too few", "too large", "empty"),
    ],
)
def test_bad_files_are_named_with_the_remedy(mnist, file, content, message):
    path = mnist / "MNIST" / "raw" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"torchvision\.datasets\.MNIST.*TELEPORT_LITE_DATA") as caught:
        data.load("mnist", root=mnist)
    assert message in str(caught.value) and file in str(caught.value) and caught.value.path == str(path)


@pytest.fixture
def cifar(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {"data": rng.integers(0, 256, (4, 3072)).astype(np.uint8), "labels": [0, 9, 3, 1]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return tmp_path


def test_cifar10(cifar):
    train, test = data.load("cifar10", root=cifar)
    assert train.x.shape == (20, 3072) and len(test) == 4 and float(train.x.max()) <= 1


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        pickle.dumps(os.system),
        pickle.dumps({"data": np.zeros((4, 3072), np.uint8)}),
        pickle.dumps({"data": np.zeros((4, 10), np.uint8), "labels": [0] * 4}),
        pickle.dumps({"data": np.zeros((4, 3072)), "labels": [0] * 4}),
        pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [0.5] * 4}),
        pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 10]}),
    ],
    ids=["missing", "empty", "code", "no labels", "other shape", "floats", "soft labels", "11 classes"],
)
def test_bad_cifar_files_are_named_and_never_run(cifar, content):
    path = cifar / "cifar-10-batches-py" / "data_batch_3"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=r"data_batch_3.*torchvision\.datasets\.CIFAR10"):
        data.load("cifar10", root=cifar)


def test_cifar10_as_python_2_wrote_it(cifar):
    """The published files are pickles of Python 2, with its strings and the old name of numpy's core."""
    images = np.random.default_rng(1).integers(0, 256, (2, 3072)).astype(np.uint8)
    old = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R(K\1K\2M\0\x0c\x86"
    old += b"cnumpy\ndtype\nU\2u1K\0K\1\x87R(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    old += b"\x89T" + struct.pack("<i", images.size) + images.tobytes() + b"tb"
    file = b"\x80\2}(U\4data" + old + b"U\6labels](K\3K\te" + b"U\x0bbatch_labelU\6test 1u."
    (cifar / "cifar-10-batches-py" / "test_batch").write_bytes(file)
    _, test = data.load("cifar10", root=cifar)
    assert test.y.tolist() == [3, 9]
    assert np.array_equal((test.x * 255).round().numpy(), images)


def test_batches_cover_an_epoch_and_batch_draws_without_replacement():
    train, _ = data.load()
    order = [
        torch.cat([y for _, y in train.batches(100, generator=torch.Generator().manual_seed(s))]) for s in (1, 1, 2)
    ]
    assert len(order[0]) == 1400 and torch.equal(order[0], order[1]) and not torch.equal(order[0], order[2])
    epoch = torch.cat([x for x, _ in train[:100].batches(20)])
    assert sorted(epoch.tolist()) == sorted(train.x[:100].tolist()) and not torch.equal(epoch, train.x[:100])
    x, y = train[:10].batch(10)
    assert sorted(zip(x.tolist(), y, strict=True)) == sorted(zip(train.x[:10].tolist(), train.y[:10], strict=True))
    with pytest.raises(TeleportError, match="a batch of 1 to 10 samples, got 11"):
        train[:10].batch(11)
    with pytest.raises(TeleportError, match="batches of 1 to 10 samples, got 11"):
        train[:10].batches(11)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UnknownNameError, match="'digits', 'mnist', 'fashion_mnist', 'cifar10', got 'imagenet'"):
        data.load("imagenet")


def test_dtype_and_repr():
    train, _ = data.load()
    assert train.to(torch.float64).x.dtype == torch.float64 and train.to(torch.float64).y.dtype == torch.int64
    assert repr(train[:3]) == "Dataset(digits: 3 samples of 64 numbers, 10 classes)"


@pytest.mark.skipif("TELEPORT_LITE_DATA" not in os.environ, reason="TELEPORT_LITE_DATA does not name a folder")
def test_real_mnist():
    train, test = data.load("mnist")
    assert (len(train), len(test)) == (60000, 10000)
    assert train.y[:5].tolist() == [5, 0, 4, 1, 9]
