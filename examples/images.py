"""Images of classes from a folder or from CIFAR-100's pickles, and batches of them for a vision transformer."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from continual_options import Refused
from continual_run import generator
from torch import Tensor

EXTENSIONS = (".jpeg", ".jpg", ".png")
SMALLEST_CROP, RATIO, ATTEMPTS = 0.05, 4 / 3, 10


class Images(NamedTuple):
    """Files, or images [3, H, W] of bytes; the class of each by its place in ``names``."""

    sources: list[Any]
    labels: Tensor
    names: list[str]

    def of(self, classes: list[int]) -> Images:
        rows = torch.isin(self.labels, torch.tensor(classes)).nonzero().flatten().tolist()
        return Images([self.sources[i] for i in rows], self.labels[rows], self.names)

    def few(self, shots: int, seed: int) -> Images:
        """So many of each class, drawn by the seed.

        Raises:
            Refused: a class of which there are fewer.
        """
        rows: list[int] = []
        for label, name in enumerate(self.names):
            of_class = (self.labels == label).nonzero().flatten()
            if len(of_class) < shots:
                raise Refused(f"--shots: got {shots}, but of {name} there are {len(of_class)} images to learn from")
            order = torch.randperm(len(of_class), generator=generator(seed, "shots", name))
            rows += of_class[order[:shots]].sort()[0].tolist()
        return Images([self.sources[i] for i in rows], self.labels[rows], self.names)


def load(folder: Path, test_share: float, seed: int) -> tuple[Images, Images]:
    """Training and test images: of train/CLASS/ and test/CLASS/; of CLASS/, split in this proportion class by class; or
    of the files "train" and "test" of CIFAR-100 for Python.

    Raises:
        Refused: no such folder, no images, train or test without the other, or other classes in one part than in the
            other.
    """
    if not folder.is_dir():
        raise Refused(f"--data: got {folder}, expected a folder")
    if all((folder / part).is_file() for part in ("train", "test")):
        return load_cifar(folder / "train"), load_cifar(folder / "test")
    if all((folder / part).is_dir() for part in ("train", "test")):
        train, test = (files_by_class(folder / part) for part in ("train", "test"))
        if train.keys() != test.keys():
            one_sided = sorted(train.keys() ^ test.keys())
            raise Refused(f"--data: the classes {', '.join(one_sided)} are in one of train and test alone")
    elif there := [part for part in ("train", "test") if (folder / part).exists()]:
        raise Refused(
            f"--data: got {folder} with {' and '.join(there)}, expected the folders train and test, CIFAR-100's files "
            "of these names, or a folder for each class, none of which is called so"
        )
    else:
        train, test = {}, {}
        for name, files in files_by_class(folder).items():
            held_out = max(round(test_share * len(files)), 1)
            if len(files) <= held_out:
                raise Refused(f"--data: {folder / name} holds {len(files)} images, too few to test on {held_out}")
            order = torch.randperm(len(files), generator=generator(seed, "split", name)).tolist()
            test[name] = [files[i] for i in sorted(order[:held_out])]
            train[name] = [files[i] for i in sorted(order[held_out:])]
    return images_of(train), images_of(test)


def files_by_class(folder: Path) -> dict[str, list[Path]]:
    found = {
        sub.name: sorted(f for f in sub.rglob("*") if f.suffix.lower() in EXTENSIONS and f.is_file())
        for sub in sorted(folder.iterdir())
        if sub.is_dir()
    }
    if not any(found.values()):
        raise Refused(f"--data: no images {', '.join(EXTENSIONS)} in the folders of {folder}")
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise Refused(f"--data: no images in {', '.join(str(folder / name) for name in empty)}")
    return found


def images_of(files: dict[str, list[Path]]) -> Images:
    labels = torch.tensor([label for label, name in enumerate(files) for _ in files[name]])
    return Images([file for name in files for file in files[name]], labels, list(files))


# CIFAR-100's pickles, read without running anything of theirs: what stands in the place of NumPy's types only keeps
# bytes and shape.


class _Array:
    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state


class _Dtype:
    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code

    def __setstate__(self, state: tuple) -> None:
        """Byte order and the like, of which bytes have none."""


ALLOWED: dict[tuple[str, str], Callable] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return ALLOWED[module, name]


def load_cifar(file: Path) -> Images:
    """One of CIFAR-100's files.

    Raises:
        Refused: a file of something else; it is not run.
    """
    try:
        content = _Unpickler(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        array, labels = content["data"], torch.tensor(content["fine_labels"])
        if array.dtype.code != "u1" or array.shape != (len(labels), 3072) or array.fortran:
            raise ValueError(f"data {array.shape} of {array.dtype.code}")
        pixels = torch.frombuffer(bytearray(array.data), dtype=torch.uint8).view(-1, 3, 32, 32)
    except Exception as error:  # whatever a broken pickle raises
        raise Refused(f"--data: {file} is none of CIFAR-100's files for Python: {error}") from error
    return Images(list(pixels), labels, [str(c) for c in range(int(labels.max()) + 1)])


# Pixels for the model


class Pixels(NamedTuple):
    """How a model wants its images: pixels a side; mean and standard deviation of each channel of [0, 1]."""

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def training(self, source: Any, random: torch.Generator) -> Tensor:
        """[3, size, size]: a random part of the image, half of the time mirrored."""
        image = open_image(source)
        pixels = self._tensor(image, crop_of(*image.size, random))
        return pixels.flip(-1) if torch.rand((), generator=random) < 0.5 else pixels

    def test(self, source: Any) -> Tensor:
        """[3, size, size]: the middle, 7/8 of the shorter side."""
        image = open_image(source)
        width, height = image.size
        side = min(width, height) * 7 / 8
        left, top = (width - side) / 2, (height - side) / 2
        return self._tensor(image, (left, top, left + side, top + side))

    def _tensor(self, image: Any, box: tuple[float, ...]) -> Tensor:
        from PIL.Image import Resampling

        image = image.resize((self.size, self.size), Resampling.BICUBIC, box)
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = data.view(self.size, self.size, 3).permute(2, 0, 1) / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


def open_image(source: Any) -> Any:
    """A Pillow image, RGB.

    Raises:
        Refused: a file that is no image.
    """
    from PIL import Image

    if isinstance(source, Tensor):
        _, height, width = source.shape
        return Image.frombytes("RGB", (width, height), bytes(source.permute(1, 2, 0).flatten().tolist()))
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's for a broken file
        raise Refused(f"--data: {source} cannot be read as an image: {error}") from error


def crop_of(width: int, height: int, random: torch.Generator) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of 5 % to all of an image, from 3:4 to 4:3 in shape; the whole of it where ten draws do
    not fit into it."""
    for _ in range(ATTEMPTS):
        area, shape, x, y = torch.rand(4, generator=random).tolist()
        area = width * height * (SMALLEST_CROP + (1 - SMALLEST_CROP) * area)
        ratio = RATIO ** (2 * shape - 1)
        w, h = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        if w <= width and h <= height:
            left, top = x * (width - w), y * (height - h)
            return left, top, left + w, top + h
    return 0.0, 0.0, float(width), float(height)


class Batches:
    """``make(i)`` for growing i below ``stop``, prepared by the threads of ``pool`` ahead of their time."""

    def __init__(self, make: Callable[[int], Any], stop: int, pool: ThreadPoolExecutor, ahead: int) -> None:
        self.make, self.stop, self.pool, self.ahead, self.next = make, stop, pool, ahead, 0
        self.futures: dict[int, Future] = {}

    def __getitem__(self, i: int) -> Any:
        for coming in range(max(self.next, i), min(i + self.ahead, self.stop)):
            self.futures[coming] = self.pool.submit(self.make, coming)
            self.next = coming + 1
        return self.futures.pop(i).result()
