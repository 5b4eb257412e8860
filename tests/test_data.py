"""Data sets: what is in them, and what is said where one can't be had."""

import numpy as np
import pytest
import torch
from data import Data, DataError, hold_out, load_data
from networks import build_network
from PIL import Image


def test_digits_are_real_and_complete(digits):
    counts = [len(getattr(digits, f"{part}_images")) for part in ("train", "validation", "test")]
    assert counts == [1167, 130, 500] and len(digits.classes) == 10
    images, labels = next(digits.test_batches(50))
    assert images.shape == (50, 1, 28, 28) and images.dtype == torch.float32 and labels.max() < 10


@pytest.fixture
def folder(tmp_path):
    """Three pictures a class."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "pets" / split / label).mkdir(parents=True)
            for i in range(3):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / split / label / f"{i}.bmp")
    return tmp_path / "pets"


def test_data_on_a_device_are_a_copy(few_digits):
    there = few_digits.to("meta")
    assert there.device.type == there.mean.device.type == "meta" and few_digits.device.type == "cpu"


def test_a_folder_of_images_is_a_data_set(folder):
    data = load_data(f"folder:{folder}")
    assert list(data.classes) == ["cat", "dog"]
    assert [len(labels) for labels in (data.train_labels, data.validation_labels, data.test_labels)] == [5, 1, 6]
    assert build_network(data)(next(data.test_batches(2))[0]).shape == (2, 2)


def test_what_was_decoded_is_kept_until_an_image_changes(folder):
    first = load_data(f"folder:{folder}").test_images
    kept = folder.with_name("pets.pt")
    time, picture = kept.stat().st_mtime_ns, folder / "test/cat/0.bmp"
    assert torch.equal(load_data(f"folder:{folder}").test_images, first) and kept.stat().st_mtime_ns == time
    Image.new("RGB", (32, 32)).save(picture)  # of the same name and size
    assert torch.equal(load_data(f"folder:{folder}").test_images[0], torch.zeros(3, 32, 32, dtype=torch.uint8))


def test_what_is_wrong_with_a_folder_is_said(folder):
    def sentence(name=f"folder:{folder}"):
        with pytest.raises(DataError) as error:
            load_data(name)
        assert "\n" not in str(error.value)
        return str(error.value)

    picture, kept = folder / "train/cat/0.bmp", folder.with_name("pets.pt")
    pixels = picture.read_bytes()
    assert "is missing" in sentence(f"folder:{picture}")
    for broken in (pixels[:1000], b"", b"no image"):
        picture.write_bytes(broken)
        assert f"{picture} can't be read as an image" in sentence()
    picture.write_bytes(pixels)
    load_data(f"folder:{folder}")
    whole = kept.read_bytes()
    for broken in (whole[:1000], whole[: len(whole) // 2], b"", b"no tensors"):
        kept.write_bytes(broken)
        assert f"{kept} can't be read" in sentence()
    torch.save({"weight": torch.zeros(2)}, kept)  # a network of that name is not overwritten
    assert f"{kept} is not what" in sentence() and torch.load(kept).keys() == {"weight"}
    for picture in (folder / "test/dog").iterdir():
        picture.unlink()
    assert "at least one image" in sentence()
    (folder / "test/dog").rmdir()
    assert "['dog'] are in one alone" in sentence()


def test_a_damaged_file_of_torchvision_is_said(tmp_path):
    (tmp_path / "FashionMNIST/raw").mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"FashionMNIST/raw/{name}-ubyte").write_bytes(b"")
    with pytest.raises(DataError, match="fashion-mnist is not in .* whole"):
        load_data("fashion-mnist", tmp_path)


@pytest.mark.parametrize("name", ["folder:nowhere", "nonsense", "cifar10-jpeg"])
def test_a_data_set_that_can_not_be_had_gives_one_sentence(name, tmp_path):
    with pytest.raises(DataError) as error:
        load_data(name, root=tmp_path)
    assert len(str(error.value)) > 30 and "\n" not in str(error.value).strip()


def test_mean_and_deviation_are_those_of_all_training_images(digits):
    """However they are sorted, and of all there were before a limit; what is held out is none of them."""
    pixels = torch.tensor([[0, 51], [255, 51]], dtype=torch.uint8)  # black, then white; a second channel of one value
    images, labels = pixels.repeat_interleave(10_001, 0)[:, :, None, None], torch.arange(2).repeat_interleave(10_001)
    data = Data("sorted", ["black", "white"], images, labels, images[:1], labels[:1], images[:1], labels[:1])
    torch.testing.assert_close(data.mean, torch.tensor([0.5, 0.2]))
    torch.testing.assert_close(data.std, torch.tensor([0.5, 1.0]))  # so that the second becomes 0, not NaN
    assert data.normalize(images[:1].permute(0, 2, 3, 1)).flatten().tolist() == pytest.approx([-1, 0])
    pixels = digits.train_images.double() / 255
    torch.testing.assert_close(digits.mean, pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(digits.std, pixels.std((0, 2, 3), correction=0).float())
    limited = load_data("digits", limit=10)
    assert torch.equal(limited.mean, digits.mean) and torch.equal(limited.std, digits.std)


@pytest.mark.parametrize("limit", [0, -1, 1168])
def test_a_limit_is_a_number_of_the_images_that_there_are(limit):
    with pytest.raises(DataError, match=f"from 1 to the 1167 training images of digits, got {limit}"):
        load_data("digits", limit=limit)


def test_what_validates_is_held_out_by_a_seeded_draw(digits):
    """The last tenth of a draw, at most 5,000; together with what is trained on it is all there was."""
    again = load_data("digits")
    assert torch.equal(again.validation_images, digits.validation_images)
    whole = load_data("digits", limit=10)
    assert torch.equal(whole.validation_labels, digits.validation_labels) and len(whole.train_labels) == 10
    for count, held in ((2, 1), (11, 2), (60_000, 5_000)):
        kept, places = hold_out(count)
        assert len(places) == held and torch.equal(torch.cat([kept, places]).sort().values, torch.arange(count))
    assert places.max() - places.min() > 50_000  # from everywhere, not the last ones of a sorted set
    with pytest.raises(DataError, match="two training images are the least, .* got 1"):
        hold_out(1)
    (images, labels), *_ = digits.validation_loader(200)
    assert images.shape == (130, 1, 28, 28) and torch.equal(labels, digits.validation_labels)
