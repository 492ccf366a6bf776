"""kNN against a loop, and features that leave the backbone as it was."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from engine.evaluate.nearest_neighbors import classify
from engine.evaluate.online_knn import Knn, RawPixels, features
from engine.evaluate.splits import held_out, unseen
from methods.encoders import resnet
from pipeline.beton import Beton
from pipeline.prepare import prepare
from pipeline.storage.encode import Settings
from pipeline.storage.in_place import open_data
from pipeline.system.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize(("k", "temperature", "rows"), [(1, 0.1, 7), (5, 0.07, 100), (20, 1.0, 1), (500, 0.1, 16)])
def test_prediction_equals_a_loop_over_neighbors(k: int, temperature: float, rows: int) -> None:
    generator = torch.Generator().manual_seed(k)
    bank = F.normalize(torch.randn(120, 6, generator=generator), dim=1)
    queries = F.normalize(torch.randn(33, 6, generator=generator), dim=1)
    labels = torch.randint(0, 4, (120,), generator=generator)
    found = classify(queries, bank, labels, k=k, temperature=temperature, classes=4, rows=rows)
    for query, predicted in zip(queries, found.tolist(), strict=True):
        similarity = (bank @ query).tolist()
        nearest = sorted(range(120), key=lambda i: -similarity[i])[:k]
        votes = [0.0] * 4
        for i in nearest:
            votes[labels[i]] += math.exp(similarity[i] / temperature)
        assert predicted == max(range(4), key=lambda c: votes[c])


def test_features_are_of_norm_one_in_order_and_leave_the_mode(drawn: Path) -> None:
    backbone = resnet("resnet18", stem="small", width=0.125).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    ids = np.array([5, 1, 9, 3, 100])
    found, read = features(backbone, Beton(drawn), indices=ids, size=32, batch=2, device=CPU)
    one, _ = features(backbone, Beton(drawn), indices=ids[3:4], size=32, batch=2, device=CPU)
    assert torch.allclose(found[3], one[0], atol=1e-5)
    assert read.tolist() == ids.tolist()
    assert torch.allclose(found.norm(dim=1), torch.ones(5), atol=1e-5)
    assert backbone.training
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_one_file_is_known_under_two_names(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "link.beton").symlink_to(drawn)
    knn = Knn(Beton(drawn), Beton(tmp_path / "link.beton"), k=1, temperature=0.1, device=CPU, size=32, batch=64)
    assert not set(knn._bank_ids.tolist()) & set(knn._test_ids.tolist())


def test_of_one_file_every_tenth_image_of_a_class_is_classified_by_the_others(drawn: Path) -> None:
    beton = Beton(drawn)
    knn = Knn(beton, beton, k=1, temperature=0.1, device=CPU, size=32, batch=64)
    assert np.bincount(beton.labels[knn._test_ids]).tolist() == [2] * 10
    assert sorted([*knn._bank_ids.tolist(), *knn._test_ids.tolist()]) == list(range(200))
    few = Knn(beton, beton, k=1, temperature=0.1, limit=10, device=CPU, size=32, batch=64)
    for chosen, whole in ((few._test_ids, knn._test_ids), (few._bank_ids, knn._bank_ids)):
        assert set(chosen.tolist()) <= set(whole.tolist())
        assert (len(chosen), chosen.max() - chosen.min() > 100) == (10, True)


@pytest.mark.parametrize("labels", [np.arange(50), np.repeat(np.arange(10), 5), np.tile(np.arange(7), 9)])
def test_classes_of_few_images_keep_neighbors(labels: np.ndarray) -> None:
    chosen = held_out(labels)
    assert chosen.sum() == -(-len(labels) // 10)
    assert max(np.bincount(labels[chosen])) <= -(-max(np.bincount(labels)) // 10)


def test_classes_that_only_the_test_images_have_are_counted_and_refused_where_there_are_no_others() -> None:
    assert unseen(np.array([0, 1, 1]), np.array([1, 2, 0, 3]), Path("x")) == 2
    assert unseen(np.array([0, 1]), np.array([1, 0]), Path("x")) == 0
    with pytest.raises(InputError, match=r"x.beton: no image to test on is of a class with images to train on"):
        unseen(np.arange(9), np.arange(9, 12), Path("x.beton"))


def test_one_image_a_class_is_nothing_to_hold_out(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / "images" / f"class{i:02}").mkdir(parents=True)
        Image.new("RGB", (40, 40), (i * 8, 0, 0)).save(tmp_path / "images" / f"class{i:02}" / "a.jpg")
    prepare(str(tmp_path / "images"), tmp_path / "a.beton", workers=1, quiet=True)
    beton = Beton(tmp_path / "a.beton")
    with pytest.raises(InputError, match="several images a class"):
        Knn(beton, beton, k=1, temperature=0.1, device=CPU, size=32, batch=64)


def test_raw_pixels_find_the_image_itself(drawn: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.beton"
    prepare("synthetic:200", copy, Settings(mode="raw"), workers=1, quiet=True)
    knn = Knn(Beton(drawn), Beton(copy), k=1, temperature=0.1, device=CPU, size=32, batch=64)
    assert knn.top1(RawPixels()) == 1.0


def test_unlabeled_or_differently_labeled_images_are_refused(drawn: Path, tmp_path: Path) -> None:
    for name, folder in (("flat", ""), ("other", "cats")):
        place = tmp_path / name / folder
        place.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 40), (i * 50, 0, 0)).save(place / f"{i}.jpg")
        prepare(str(tmp_path / name), tmp_path / f"{name}.beton", workers=1, quiet=True)
        with pytest.raises(InputError, match="prepare"):
            Knn(Beton(drawn), Beton(tmp_path / f"{name}.beton"), k=1, temperature=0.1, device=CPU, size=32, batch=64)


def test_folders_of_other_classes_are_refused_too(tmp_path: Path) -> None:
    """Read where they are, they have no manifest; a label would be a cat in one, and a dog in the other."""
    for name, of in (("train", "cats"), ("test", "dogs")):
        place = tmp_path / name / of
        place.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 40), (i * 50, 0, 0)).save(place / f"{i}.jpg")
    train, test = (open_data(tmp_path / name) for name in ("train", "test"))
    with pytest.raises(InputError, match="its 1 classes are not the 1 of"):
        Knn(train, test, k=1, temperature=0.1, device=CPU, size=32, batch=64)
