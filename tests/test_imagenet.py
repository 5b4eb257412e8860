"""The paper's own experiment, on a small folder laid out like ImageNet: digits as JPEG files."""

import csv
import shutil
import urllib.error

import imagenet
import pytest
import torch
from PIL import Image

RUN = ["--size", "64", "--epochs", "1", "--batch-size", "12", "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits):
    path = tmp_path_factory.mktemp("tiny")
    train, test = (digits.train_images, digits.train_labels, 8), (digits.test_images, digits.test_labels, 3)
    for split, (images, labels, count) in {"train": train, "val": test}.items():
        for label in range(3):
            (path / split / f"n{label:08}").mkdir(parents=True)
            for i, image in enumerate(images[labels == label][:count]):
                picture = Image.fromarray(image[0].numpy()).resize((80, 72))
                picture.save(path / split / f"n{label:08}" / f"n{label:08}_{i}.JPEG")
    return path


@pytest.fixture(autouse=True)
def quietly(monkeypatch, one_thread):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def places(path):
    return ["--out", str(path / "out"), "--results", str(path / "results")]


def folders(folder, workers=0):
    return imagenet.ImageFolders(folder, 64, workers, torch.device("cpu"))


def test_resnet18_from_nothing_to_a_row(folder, tmp_path, capsys):
    row = imagenet.main([str(folder), *RUN, "--weights", "none", "--calibrate", "0", *places(tmp_path)])
    with open(tmp_path / "results/imagenet.csv", newline="") as file:
        (kept,) = csv.DictReader(file)
    assert kept == {name: str(value) for name, value in row.items()}
    assert (kept["network"], kept["M"], kept["N"], kept["classes"], kept["images"]) == ("resnet18", "5", "5", "3", "21")
    assert float(kept["fine-tuned top-5"]) == 100  # of three classes
    assert int(kept["packed_bytes"]) < int(kept["float_bytes"]) / 5
    printed = capsys.readouterr().out
    assert "fine-tuned   top-1" in printed and "arXiv" not in printed  # the paper knows nothing of this folder
    assert (tmp_path / f"out/imagenet/{row['run']}.checkpoint").exists()


def test_a_network_of_ones_own_is_calibrated_and_teaches(folder, tmp_path, monkeypatch):
    network, trained = imagenet.float_network("shufflenet_v2_x0_5", "none", 3)
    assert not trained
    torch.save(network.state_dict(), tmp_path / "own.pt")
    teachers = []
    monkeypatch.setattr(imagenet, "finetune", lambda model, data, teacher, **options: teachers.append(teacher) or [])
    options = ["--network", "shufflenet_v2_x0_5", "--weights", str(tmp_path / "own.pt"), "--calibrate", "6"]
    bases = ["--weight-bases", "1", "--activation-bases", "1"]
    row = imagenet.main([str(folder), *RUN, *options, *bases, *places(tmp_path)])
    assert 0 <= row["calibrated top-1"] <= 100 and row["weights"] == "own.pt"
    (teacher,) = teachers
    for name, value in network.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], value), name


def test_another_number_of_classes_gets_a_new_last_layer(tmp_path):
    state = imagenet.float_network("shufflenet_v2_x0_5", "none", 5)[0].state_dict()
    torch.save(state, tmp_path / "five.pt")
    network, trained = imagenet.float_network("shufflenet_v2_x0_5", str(tmp_path / "five.pt"), 3)
    assert network.fc.weight.shape == (3, 1024) and not trained
    assert torch.equal(network.conv1[0].weight, state["conv1.0.weight"])


def test_what_is_random_follows_from_seed_and_epoch_alone(folder):
    """Whichever process reads an image: none, or one of two workers."""
    epochs = []
    for workers, epoch in ((0, 0), (2, 0), (0, 1)):
        loader = folders(folder, workers).train_loader(8, accumulate=2, seed=3)
        loader.batch_sampler.sampler.set_epoch(epoch)
        images, labels = (torch.cat(parts) for parts in zip(*loader))
        assert len(loader) == 4 and images.shape == (16, 3, 64, 64) and labels.max() == 2
        epochs.append(images)
    assert torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], epochs[2])


def test_test_images_are_cut_from_the_middle(folder):
    images, labels = next(iter(folders(folder).test_loader()))
    assert images.shape == (9, 3, 64, 64) and labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert torch.equal(images, next(iter(folders(folder).test_loader()))[0])


def test_what_can_not_be_had_gives_one_sentence(folder, tmp_path, monkeypatch, refused):
    def sentence(path, *options):
        return refused(imagenet.main, path, *RUN, *places(tmp_path), *options)

    def offline(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    assert "train/CLASS/*.JPEG" in sentence(tmp_path)
    assert "--weights none" in sentence(folder)
    assert "is missing" in sentence(folder, "--weights", tmp_path / "nothing.pt")
    assert "choose one of" in sentence(folder, "--network", "resnet17")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    assert "other.pt does not hold the weights of this" in sentence(folder, "--weights", tmp_path / "other.pt")
    (tmp_path / "broken.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:100])
    assert "broken.pt can't be read as" in sentence(folder, "--weights", tmp_path / "broken.pt")
    assert "nothing can be written to" in sentence(folder, "--out", tmp_path / "broken.pt" / "out")
    assert "at most the 21 training images, got 25" in sentence(folder, "--batch-size", "25")
    assert "--device: a device of this computer (cpu:0" in sentence(folder, "--device", "nonsense")
    (tmp_path / "train/n00000000").mkdir(parents=True)
    (tmp_path / "val").mkdir()
    assert "at least one image" in sentence(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(folder, tmp_path, refused, workers):
    shutil.copytree(folder, tmp_path / "copy")
    broken = next((tmp_path / "copy/val").glob("*/*.JPEG"))
    broken.write_bytes(broken.read_bytes()[:200])
    options = [*RUN, "--weights", "none", "--workers", workers, *places(tmp_path)]
    said = refused(imagenet.main, tmp_path / "copy", *options)
    assert f": {broken} can't be read as an image" in said
