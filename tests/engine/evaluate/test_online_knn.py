"""kNN during training: features, queries and bank, data that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.evaluate.online_knn import Knn, RawPixels, features
from methods.encoders import resnet
from pipeline.beton import Beton
from pipeline.prepare import prepare
from pipeline.storage.encode import Settings
from pipeline.storage.in_place import open_data
from pipeline.system.errors import InputError

CPU = torch.device("cpu")


def test_features_have_norm_one_and_leave_the_backbone_as_it_was(drawn: Path) -> None:
    backbone = resnet("resnet18", stem="small", width=0.125).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    ids = np.array([5, 1, 9, 3, 100])
    rows, read_ids = features(backbone, Beton(drawn), indices=ids, size=32, batch=2, device=CPU)
    single, _ = features(backbone, Beton(drawn), indices=ids[3:4], size=32, batch=2, device=CPU)
    assert torch.allclose(rows[3], single[0], atol=1e-5)
    assert read_ids.tolist() == ids.tolist()
    assert torch.allclose(rows.norm(dim=1), torch.ones(5), atol=1e-5)
    assert backbone.training
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_one_file_under_two_names_is_split(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "link.beton").symlink_to(drawn)
    knn = Knn(Beton(drawn), Beton(tmp_path / "link.beton"), k=1, temperature=0.1, device=CPU, size=32, batch=64)
    assert not set(knn._bank_ids.tolist()) & set(knn._test_ids.tolist())


def test_of_one_file_every_tenth_image_of_a_class_is_a_query(drawn: Path) -> None:
    beton = Beton(drawn)
    knn = Knn(beton, beton, k=1, temperature=0.1, device=CPU, size=32, batch=64)
    assert np.bincount(beton.labels[knn._test_ids]).tolist() == [2] * 10
    assert sorted([*knn._bank_ids.tolist(), *knn._test_ids.tolist()]) == list(range(200))
    few = Knn(beton, beton, k=1, temperature=0.1, limit=10, device=CPU, size=32, batch=64)
    for chosen, every in ((few._test_ids, knn._test_ids), (few._bank_ids, knn._bank_ids)):
        assert set(chosen.tolist()) <= set(every.tolist())
        assert (len(chosen), chosen.max() - chosen.min() > 100) == (10, True)


def test_classes_of_one_image_are_refused(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / "images" / f"class{i:02}").mkdir(parents=True)
        Image.new("RGB", (40, 40), (i * 8, 0, 0)).save(tmp_path / "images" / f"class{i:02}" / "a.jpg")
    prepare(str(tmp_path / "images"), tmp_path / "a.beton", workers=1, quiet=True)
    beton = Beton(tmp_path / "a.beton")
    with pytest.raises(InputError, match="several images of each class"):
        Knn(beton, beton, k=1, temperature=0.1, device=CPU, size=32, batch=64)


def test_raw_pixels_find_copies(drawn: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.beton"
    prepare("synthetic:200", copy, Settings(mode="raw"), workers=1, quiet=True)
    knn = Knn(Beton(drawn), Beton(copy), k=1, temperature=0.1, device=CPU, size=32, batch=64)
    assert knn.top1(RawPixels()) == 1.0


def test_images_without_labels_or_of_other_classes_are_refused(drawn: Path, tmp_path: Path) -> None:
    for name, folder in (("flat", ""), ("other", "cats")):
        path = tmp_path / name / folder
        path.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 40), (i * 50, 0, 0)).save(path / f"{i}.jpg")
        prepare(str(tmp_path / name), tmp_path / f"{name}.beton", workers=1, quiet=True)
        with pytest.raises(InputError, match="prepare"):
            Knn(Beton(drawn), Beton(tmp_path / f"{name}.beton"), k=1, temperature=0.1, device=CPU, size=32, batch=64)


def test_folders_of_other_classes_are_refused(tmp_path: Path) -> None:
    """Data read in place have no manifest: a label would be a cat in one, and a dog in the other."""
    for name, label in (("train", "cats"), ("test", "dogs")):
        path = tmp_path / name / label
        path.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 40), (i * 50, 0, 0)).save(path / f"{i}.jpg")
    train, test = (open_data(tmp_path / name) for name in ("train", "test"))
    with pytest.raises(InputError, match="its 1 classes are not the 1 of"):
        Knn(train, test, k=1, temperature=0.1, device=CPU, size=32, batch=64)


def test_neighbors_in_several_betons_are_those_in_one(drawn: Path, tmp_path: Path) -> None:
    for number, (first, count) in enumerate(((0, 30), (30, 170))):
        prepare(f"synthetic:{first}:{count}", tmp_path / f"{number}.beton", workers=1, quiet=True)
    options = {"k": 3, "temperature": 0.1, "device": CPU, "size": 32, "batch": 64}
    knns = [Knn(bank, bank, **options) for bank in (Beton(drawn), open_data(tmp_path / "*.beton"))]  # type: ignore[arg-type]
    assert knns[0]._test_ids.tolist() == knns[1]._test_ids.tolist()
    assert knns[0].top1(RawPixels()) == knns[1].top1(RawPixels())
