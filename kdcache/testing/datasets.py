"""The contract of datasets: the same samples, keys and labels every time, decoded once into a canvas."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from kdcache.datasets import DATASETS, SPLITS, Images, Source, Split, UsersOwn, source_card
from kdcache.datasets.canvas import canvas_path, load_canvas
from kdcache.errors import UsageError
from kdcache.registry import Registry
from kdcache.testing.components import ComponentContract
from kdcache.views.policy import PRESETS

__all__ = ["DatasetContract"]


class DatasetContract(ComponentContract):
    """The dataset `spec`, whose files are there: nothing is fetched. All of its images are decoded, so take a small copy."""

    registry: ClassVar[Registry[Any]] = DATASETS

    @pytest.fixture
    def images(self, component: Source, tmp_path: Path) -> Images:
        return component.open(tmp_path / "data", fetch=False)

    @pytest.mark.parametrize("split", SPLITS)
    def test_samples_have_unique_keys_and_labels_within_the_classes(self, images: Images, split: Split) -> None:
        names, samples = list(images.class_names()), images.samples(split)
        assert len(set(names)) == len(names) >= 2
        keys = [sample.key for sample in samples]
        assert len(set(keys)) == len(keys) > 0
        assert {sample.label for sample in samples} <= set(range(len(names)))

    def test_listing_twice_gives_the_same_samples_in_the_same_order(self, component: Source, images: Images) -> None:
        names = images.class_names()
        digests = set()
        for split in SPLITS:
            first, again = images.samples(split), images.samples(split)
            assert [(s.key, s.label) for s in first] == [(s.key, s.label) for s in again]
            cards = [source_card(component, names, split, samples) for samples in (first, again, list(first)[::-1])]
            assert cards[0] == cards[1]
            assert cards[0].digest != cards[2].digest  # the order is part of what a sample number means
            assert cards[0].num_samples == len(first)
            assert cards[0].class_names == tuple(names)
            digests.add(cards[0].digest)
        assert len(digests) == len(SPLITS)
        assert images.fingerprint() == images.fingerprint()

    def test_a_card_tells_no_local_path(self, component: Source, images: Images) -> None:
        card = source_card(component, images.class_names(), "test", images.samples("test")).model_dump_json()
        for option in self.registry.to_dict(component).values():
            assert not (isinstance(option, str) and Path(option).is_absolute() and option in card)
        assert json.loads(card)["licence"] == (None if isinstance(component, UsersOwn) else component.licence)

    def test_a_stated_licence_changes_neither_card_nor_canvas(self, component: Source, images: Images, tmp_path: Path) -> None:
        if not isinstance(component, UsersOwn):
            return  # its publishers have stated it
        stated = self.made_with(component, licence="CC0-1.0")
        assert stated.licence == "CC0-1.0"
        assert self.registry.parse(self.registry.spec(stated)) == stated
        cards = [source_card(source, images.class_names(), "test", images.samples("test")) for source in (component, stated)]
        assert cards[0] == cards[1]
        places = {canvas_path(source, "test", 8, tmp_path / "data") for source in (component, stated)}
        assert len(places) == 1
        with pytest.raises(UsageError, match="licence"):
            self.made_with(component, licence="unknown")

    def test_the_recipe_can_be_followed(self, component: Source) -> None:
        recipe = component.recipe
        assert recipe.policy in PRESETS
        assert min(recipe.canvas, recipe.student_epochs) > 0
        assert recipe.teacher_epochs > 0 or recipe.pretrained  # published weights as they are
        assert recipe.student

    @pytest.mark.parametrize("split", SPLITS)
    def test_the_canvas_holds_pillows_pixels_in_the_order_of_the_samples(
        self, component: Source, images: Images, split: Split, tmp_path: Path
    ) -> None:
        canvas = load_canvas(component, split, 8, tmp_path)
        samples = images.samples(split)
        assert canvas.pixels.shape == (len(samples), 3, 8, 8)
        assert canvas.size == 8
        assert canvas.keys == tuple(sample.key for sample in samples)
        assert canvas.labels.tolist() == [sample.label for sample in samples]
        assert canvas.card == source_card(component, images.class_names(), split, samples)
        assert canvas.intact
        for i in {0, 1, len(samples) // 2, len(samples) - 1}:
            with samples[i].load() as image:
                expected = image.convert("RGB").resize((8, 8), Image.Resampling.BILINEAR)
                assert tuple(canvas.sizes[i]) == image.size
            np.testing.assert_array_equal(canvas.pixels[i], np.asarray(expected).transpose(2, 0, 1))

    def test_a_canvas_is_built_once_and_equal_wherever_it_is_built(self, component: Source, tmp_path: Path) -> None:
        first = load_canvas(component, "test", 8, tmp_path / "a")
        written = (first.path / "pixels.npy").stat().st_mtime_ns
        again = load_canvas(component, "test", 8, tmp_path / "a")
        assert again.path == first.path
        assert (again.path / "pixels.npy").stat().st_mtime_ns == written
        elsewhere = load_canvas(component, "test", 8, tmp_path / "b")
        assert elsewhere.digest == first.digest
        assert load_canvas(component, "test", 9, tmp_path / "a").digest != first.digest
        assert not [path for path in (tmp_path / "a").iterdir() if path.name.endswith(".tmp")]
