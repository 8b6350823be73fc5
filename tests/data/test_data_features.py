"""The feature store: what is saved comes back under its name."""

from __future__ import annotations

import pytest
import torch

from llavakd.data.pictures import FeatureStore, save_features

NAMES = ["a.png", "folder/é b.png", "z.jpg"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_under_their_names_in_the_order_asked(tmp_path, dtype):
    features = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    path = tmp_path / "features" / "tower.safetensors"
    save_features(path, NAMES, features.transpose(0, 1).contiguous().transpose(0, 1))
    store = FeatureStore(path)
    got = store.get(["z.jpg", "a.png", "z.jpg"])
    assert got.dtype == dtype
    assert torch.equal(got, features[[2, 0, 2]])
    assert torch.equal(store.get(["folder/é b.png"]), features[1:2])
    assert [file.name for file in path.parent.iterdir()] == ["tower.safetensors"], "nothing half-written stays"


def test_a_second_save_replaces_the_first(tmp_path):
    path = tmp_path / "tower.safetensors"
    save_features(path, NAMES, torch.zeros(3, 2, 2))
    save_features(path, NAMES[:1], torch.ones(1, 2, 2))
    store = FeatureStore(path)
    assert store.get(["a.png"]).min() == 1


def test_a_name_that_was_never_saved_is_not_answered(tmp_path):
    path = tmp_path / "tower.safetensors"
    save_features(path, NAMES, torch.zeros(3, 2, 2))
    with pytest.raises(KeyError, match=r"b\.png"):
        FeatureStore(path).get(["a.png", "b.png"])
