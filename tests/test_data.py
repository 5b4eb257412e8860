"""Data sets: what is in them, and what is said where one can't be had."""

import numpy as np
import pytest
import torch
from data import DataError, load_data
from networks import build_network
from PIL import Image


def test_digits_are_real_and_complete(digits):
    assert len(digits.train_images) + len(digits.test_images) == 1797 and len(digits.classes) == 10
    images, labels = next(digits.test_batches(50))
    assert images.shape == (50, 1, 28, 28) and images.dtype == torch.float32 and labels.max() < 10


def test_a_folder_of_images_is_a_data_set(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(3):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.png")
    data = load_data(f"folder:{tmp_path}")
    assert list(data.classes) == ["cat", "dog"] and len(data.train_images) == len(data.test_images) == 6
    assert build_network(data)(next(data.test_batches(2))[0]).shape == (2, 2)


@pytest.mark.parametrize("name", ["folder:nowhere", "nonsense", "cifar10-jpeg"])
def test_a_data_set_that_can_not_be_had_gives_one_sentence(name, tmp_path):
    with pytest.raises(DataError) as error:
        load_data(name, root=tmp_path)
    assert len(str(error.value)) > 30 and "\n" not in str(error.value).strip()
