"""Labels from the data and from the network, and categories among its outputs."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from partlens.selection.labels import class_of_category, label_matrix
from torch import nn

from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError
from partlens.network.zoo import load_performer
from partlens.selection import labels

as_performer = runpy.run_path(str(Path(__file__).with_name("made_networks.py")))["as_performer"]


def test_labels_from_the_data_and_from_the_network(images) -> None:
    net = load_performer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    net = dataclasses.replace(net, class_names=("red fox", "Cat", "cow", "emu"))
    found = label_matrix(images, performer=net, classes=("cow", "cat", "emu"))
    assert found.classes == ("cow", "cat")
    assert found.outputs == (2, 1)
    assert found.absent == ("emu",)
    assert found.matrix.sum(0).tolist() == [7, 2]
    assert found.matrix[0].tolist() == [0, 0]
    assert label_matrix(images).classes == ("cat", "cow", "fox")
    logits = np.array([[0, 9, 0, 0], [0, 0, 1, 0], [0, 2, 1, 0]], dtype=np.float32)
    decided = label_matrix(source="predictions", logits=logits, performer=net)
    assert decided.classes == ("Cat", "cow")
    assert decided.outputs == (1, 2)
    assert decided.matrix.tolist() == [[1, 0], [0, 1], [1, 0]]
    assert label_matrix(source="predictions", logits=torch.from_numpy(logits)).classes == ("1", "2")
    with pytest.raises(InputError, match="logits="):
        label_matrix(source="predictions")
    with pytest.raises(InputError, match="images="):
        label_matrix()
    with pytest.raises(ImageError, match="an image of emu"):
        label_matrix(images, classes=("emu",))
    bare = ImageSet.from_arrays(np.zeros((2, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(ImageError, match="a category for every image"):
        label_matrix(bare)


def test_categories_are_found_among_the_outputs() -> None:
    named = as_performer(nn.Conv2d(3, 3, 1), names=("tabby cat", "red_fox", "crane", "crane"))
    assert class_of_category(named, "Red fox") == 1
    assert class_of_category(named, "TABBY_CAT") == 0
    assert class_of_category(named, "2") == 2
    assert class_of_category(named, "4") is None
    assert class_of_category(named, "dog") is None
    assert class_of_category(named, "crane") is None
    assert class_of_category(as_performer(nn.Conv2d(3, 3, 1)), "12") == 12
    assert class_of_category(as_performer(nn.Conv2d(3, 3, 1)), "cat") is None
    assert labels._key(" Red_  fox ") == "red fox"
