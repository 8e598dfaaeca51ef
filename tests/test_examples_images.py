"""Images of the example on vision transformers: splits, CIFAR-100's pickles, crops, batches ahead of their time."""

from __future__ import annotations

import os
import pickle
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def images():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import images

        assert Path(sys.modules["images"].__file__).parent == EXAMPLES
        yield images


class Python2(pickle._Pickler):
    """Writes bytes as Python 2 did its strings."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


WRITERS = {"python 3": pickle.dump, "python 2": lambda content, file, protocol: Python2(file, protocol).dump(content)}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_cifar100_are_read_and_never_run(images, tmp_path, writer, protocol) -> None:
    pixels = torch.randint(0, 256, (6, 3072), dtype=torch.uint8)
    content = {b"data": pixels.numpy(), b"fine_labels": [3, 0, 1, 2, 3, 3], b"filenames": [b"a.png"] * 6}
    for part in ("train", "test"):
        with (tmp_path / part).open("wb") as file:
            WRITERS[writer](content, file, protocol=protocol)
    train, test = images.load(tmp_path, 0.2, 0)
    assert train.labels.tolist() == test.labels.tolist() == [3, 0, 1, 2, 3, 3] and train.names == list("0123")
    assert torch.equal(torch.stack(train.sources).view(6, -1), pixels)
    image = images.open_image(train.sources[1])
    assert image.size == (32, 32) and image.getpixel((5, 2)) == tuple(pixels[1].view(3, 32, 32)[:, 2, 5].tolist())
    ran = tmp_path / "ran"
    wrong = {b"data": pixels.numpy().astype("int32"), b"fine_labels": [0] * 6}
    short = {b"data": pixels.numpy(), b"fine_labels": [0] * 5}
    for bad in (Evil(ran), {b"data": Evil(ran)}, {"data": 1}, wrong, short, [1]):
        (tmp_path / "test").write_bytes(pickle.dumps(bad, protocol))
        with pytest.raises(images.Refused, match=r"test is none of CIFAR-100's files for Python"):
            images.load(tmp_path, 0.2, 0)
    (tmp_path / "test").write_bytes(b"")
    with pytest.raises(images.Refused, match=r"test is none of CIFAR-100's files for Python"):
        images.load(tmp_path, 0.2, 0)
    assert not ran.exists()


def image_file(path: Path, colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (8, 6)) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_folders_of_classes_are_split_class_by_class(images, tmp_path) -> None:
    for name, count in (("b", 10), ("a", 5)):
        for number in range(count):
            image_file(tmp_path / name / f"{number}.png")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    train, test = images.load(tmp_path, 0.2, 7)
    assert train.names == test.names == ["a", "b"]
    assert train.labels.tolist() == [0] * 4 + [1] * 8 and test.labels.tolist() == [0] + [1] * 2
    assert sorted(train.sources + test.sources) == sorted(tmp_path.glob("*/*.png"))
    again, other = images.load(tmp_path, 0.2, 7), images.load(tmp_path, 0.2, 8)
    assert again[1].sources == test.sources != other[1].sources
    assert train.of([1]).sources == [s for s in train.sources if s.parent.name == "b"]
    image_file(tmp_path / "c" / "only.png")
    with pytest.raises(images.Refused, match=r"c holds 1 images, too few to test on 1"):
        images.load(tmp_path, 0.2, 7)


@pytest.mark.parametrize("there", ["train", "test"])
@pytest.mark.parametrize("other", ["val", "TEST", "ape", None])
def test_train_and_test_are_no_classes(images, tmp_path, there, other) -> None:
    """Without the other they would be, of the pictures in all folders below them."""
    for name in filter(None, (f"{there}/ape", f"{there}/bee", other)):
        for number in range(3):
            image_file(tmp_path / name / f"{number}.png")
    told = rf"--data: got .* with {there}, expected the folders train and test, CIFAR-100's files of these names, or a"
    with pytest.raises(images.Refused, match=told):
        images.load(tmp_path, 0.2, 7)
    # A file in the place of a folder is none either.
    (tmp_path / ("test" if there == "train" else "train")).write_text("")
    with pytest.raises(
        images.Refused, match=r"--data: got .* with train and test, expected the folders train and test"
    ):
        images.load(tmp_path, 0.2, 7)


def test_crops_lie_within_the_image_and_cover_5_percent_to_all(images) -> None:
    random = torch.Generator().manual_seed(0)
    areas, ratios = [], []
    for _ in range(500):
        left, top, right, bottom = images.crop_of(120, 90, random)
        assert 0 <= left < right <= 120 and 0 <= top < bottom <= 90
        areas.append((right - left) * (bottom - top) / (120 * 90))
        ratios.append((right - left) / (bottom - top))
    assert (
        0.05 <= min(areas) < 0.1 and 0.9 < max(areas) <= 1 and 0.75 <= min(ratios) < 0.8 and 1.3 < max(ratios) <= 4 / 3
    )
    # Nothing of the wanted shapes that is large enough fits into a line.
    assert images.crop_of(1000, 1, random) == (0, 0, 1000, 1)


def test_pixels_are_normalised_and_the_middle_is_tested(images, tmp_path) -> None:
    from PIL import Image

    pixels = images.Pixels(4, (0.1, 0.2, 0.3), (0.5, 0.25, 0.2))
    flat = image_file(tmp_path / "flat.png", (51, 102, 204))
    expected = torch.tensor([(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.25, (0.8 - 0.3) / 0.2])[:, None, None].expand(3, 4, 4)
    for found in (pixels.test(flat), pixels.training(flat, torch.Generator().manual_seed(0))):
        torch.testing.assert_close(found, expected)
    # 16 wide, 8 high: the middle 7 of either side are white, what is left and right of them is not seen.
    wide = Image.new("RGB", (16, 8))
    wide.paste((255, 255, 255), (4, 0, 12, 8))
    wide.save(tmp_path / "wide.png")
    assert (images.Pixels(4, (0.0,) * 3, (1.0,) * 3).test(tmp_path / "wide.png") == 1).all()


def test_half_of_the_training_images_are_mirrored_and_the_same_again(images) -> None:
    ramp = (torch.arange(32) * 8).expand(3, 32, 32).to(torch.uint8)
    pixels, mirrored = images.Pixels(8), 0
    for seed in range(200):
        found, again = (pixels.training(ramp, torch.Generator().manual_seed(seed)) for _ in range(2))
        assert torch.equal(found, again)
        mirrored += bool(found[0, 0, 0] > found[0, 0, -1])
    assert 70 < mirrored < 130


def test_batches_come_in_order_from_where_one_begins(images) -> None:
    made: list[int] = []

    def make(i: int) -> Any:
        made.append(i)
        if i == 8:
            raise images.Refused("the eighth")
        return i * i

    with ThreadPoolExecutor(2) as pool:
        batches = images.Batches(make, 10, pool, ahead=3)
        assert [batches[i] for i in range(3, 8)] == [9, 16, 25, 36, 49]
        with pytest.raises(images.Refused, match="the eighth"):
            batches[8]
        assert batches[9] == 81
    assert sorted(made) == list(range(3, 10)) and not batches.futures
