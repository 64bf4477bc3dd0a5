"""From a data set to samples: the contract's errors, broken files, order and epochs."""

import io
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, List, Value, load_dataset
from PIL import Image

from modeling_msee import MSEEImageProcessor
from modeling_msee.data.contract import (
    check_class_names,
    class_names,
    load_split,
    multi_hot,
    read_image,
    read_rgb,
    without_bad_images,
)
from modeling_msee.evaluation.samples import EvaluationSamples
from modeling_msee.training.augmentation import TrainingAugmentation
from modeling_msee.training.samples import EpochSampler, TrainingSamples


pytest_plugins = ["training_fixtures"]

ORIENTATION = 0x0112


def picture(width: int = 20, height: int = 16, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def mask(width: int = 20, height: int = 16, value: int = 1) -> Image.Image:
    return Image.fromarray(np.full((height, width), value, dtype=np.uint8))


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def truncated() -> bytes:
    data = jpeg(picture(64, 64))
    return data[: len(data) // 2]


def augmentation() -> TrainingAugmentation:
    return TrainingAugmentation(16, (0.5, 2.0), 2, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def evaluation(dataset: Dataset) -> EvaluationSamples:
    return EvaluationSamples(dataset, MSEEImageProcessor(patch_size=8))  # type: ignore[call-arg]


# --- Loading --------------------------------------------------------------------------------------


def test_folder_of_parquet(tiny_data: Path) -> None:
    train, validation = (load_split(str(tiny_data), split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (10, 5)
    assert class_names(train) == ["background", "boat", "dog", "kite", "tree", "umbrella"]
    assert set(train[0]["image"]) == {"bytes", "path"}  # not decoded, so that a broken file can be named
    assert validation[0]["segmentation_map"]["bytes"]


def test_folder_of_save_to_disk(write_data, tmp_path: Path) -> None:
    folder = write_data([(picture(), [0])] * 3, [(picture(), [1], mask())])
    assert len(load_split(str(folder), "train")) == 3
    assert load_split(str(folder), "validation")[0]["labels"] == [1]
    load_split(str(folder), "train").save_to_disk(tmp_path / "one")
    assert len(load_split(str(tmp_path / "one"), "train")) == 3


def test_one_saved_split_does_not_pass_for_another(tiny_data: Path, tmp_path: Path) -> None:
    load_dataset(str(tiny_data), split="train").save_to_disk(tmp_path / "one")
    assert len(load_split(str(tmp_path / "one"), "train")) == 10
    with pytest.raises(ValueError, match="expected a split 'validation', found train"):
        load_split(str(tmp_path / "one"), "validation")


def test_unknown_split(tiny_data: Path, write_data) -> None:
    with pytest.raises(ValueError, match=f"{tiny_data}: expected a split 'test', found train, validation"):
        load_split(str(tiny_data), "test")
    saved = write_data([(picture(), [0])])
    with pytest.raises(ValueError, match=f"{saved}: expected a split 'validation', found train"):
        load_split(str(saved), "validation")


@pytest.mark.parametrize("path", ["missing", "a/b/missing", "/missing/photos"])
def test_missing_folder(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = f"^{path}: expected a folder that a builder of datasets_scripts wrote, .* There is no such folder"
    with pytest.raises(FileNotFoundError, match=message):
        load_split(path, "train")


def test_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_split(str(tmp_path), "train")


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"photos.zip: expected a folder or a Hub repository, got a file"):
        load_split(str(tmp_path / "photos.zip"), "train")


@pytest.mark.parametrize("column", ["image_id", "image", "labels"])
def test_missing_column(write_data, tmp_path: Path, column: str) -> None:
    whole = load_split(str(write_data([(picture(), [0])])), "train")
    whole.remove_columns(column).save_to_disk(tmp_path / "part")
    message = rf"part: expected a column '{column}', found .*datasets_scripts.image_tags --help"
    with pytest.raises(ValueError, match=message):
        load_split(str(tmp_path / "part"), "train")


@pytest.mark.parametrize("feature", [List(Value("int64")), Value("string"), ClassLabel(names=["disc"])])
def test_labels_that_are_no_class_labels(tmp_path: Path, feature: object) -> None:
    value = {"List": [0], "Value": "disc", "ClassLabel": 0}[type(feature).__name__]
    features = datasets.Features({"image_id": Value("string"), "image": datasets.Image(), "labels": feature})
    rows = {"image_id": ["a"], "image": [picture()], "labels": [value]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "odd")
    with pytest.raises(ValueError, match="column 'labels': expected a list of ClassLabel, got"):
        load_split(str(tmp_path / "odd"), "train")


def test_class_names_must_agree(write_data) -> None:
    dataset = load_split(str(write_data([(picture(), [0])])), "train")
    check_class_names(dataset, ["background", "disc", "square"], "the model")
    for other in (["background", "square", "disc"], ["background", "disc"]):
        with pytest.raises(ValueError, match=rf"the model has {len(other)} labels .* the data set has 3 "):
            check_class_names(dataset, other, "the model")


# --- Images and labels ----------------------------------------------------------------------------


def test_multi_hot() -> None:
    assert multi_hot([2, 0, 2], 4, "a").tolist() == [1, 0, 1, 0]
    assert multi_hot([], 3, "a").tolist() == [0, 0, 0]


@pytest.mark.parametrize("labels", [[0, 2], [-1], [255]])
def test_label_out_of_range_names_the_image(labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"photo_7: expected labels from 0 to 1, got \[(2|-1|255)\]"):
        multi_hot(labels, 2, "photo_7")


def test_stored_label_out_of_range(write_data) -> None:
    """What the library itself lets through: -1, its sign for an unknown label."""
    rows = [(picture(), [0]), (picture(), [0, -1])]
    samples = TrainingSamples(load_split(str(write_data(rows)), "train"), augmentation(), seed=0)
    assert samples[0]["labels"].tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"photo_1: expected labels from 0 to 1, got \[-1\]"):
        samples[1]


def test_truncated_image_is_named(write_data) -> None:
    rows = [(picture(), [0]), (truncated(), [0]), (b"no image", [0])]
    dataset = load_split(str(write_data(rows)), "train")
    for index in (1, 2):
        message = rf"image photo_{index}.jpg \(image_id photo_{index}\) cannot be read: .*--skip_bad_images"
        with pytest.raises(ValueError, match=message):
            TrainingSamples(dataset, augmentation(), seed=0)[index]


def test_bad_images_are_left_out_and_counted(write_data) -> None:
    rows = [(truncated(), [0]), (picture(), [1]), (b"", [0]), (picture(), [0, 1])]
    good, messages = without_bad_images(load_split(str(write_data(rows)), "train"))
    assert good["image_id"][:] == ["photo_1", "photo_3"]
    assert [message.split()[1] for message in messages] == ["photo_0.jpg", "photo_2.jpg"]


def test_bad_masks_are_left_out_where_they_are_read(write_data) -> None:
    rows = [(picture(), [0], mask()), (picture(), [0], truncated()), (picture(), [0], None)]
    dataset = load_split(str(write_data([(picture(), [0])], rows)), "validation")
    assert len(without_bad_images(dataset)[0]) == 3
    good, messages = without_bad_images(dataset, ["image", "segmentation_map"])
    assert good["image_id"][:] == ["photo_0"]
    assert "segmentation_map photo_1.png" in messages[0] and "found none" in messages[1]


def test_photograph_that_lies_on_its_side(write_data) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # shown turned by 90 degrees clockwise
    stored = Image.new("RGB", (40, 24), "blue")
    stored.paste("red", (0, 0, 20, 24))  # the left half, which is shown on top
    data = jpeg(stored, exif=exif, quality=95)
    folder = write_data([(data, [0])], [(data, [0], mask(24, 40))])
    upright = np.asarray(read_rgb(load_split(str(folder), "train")[0])).astype(int)
    assert upright.shape == (40, 24, 3)
    assert (upright[:18, :, 0] > 200).all() and (upright[22:, :, 2] > 200).all()
    sample = evaluation(load_split(str(folder), "validation"))[0]
    assert sample["pixel_values"].shape == (3, 40, 24) and sample["segmentation_map"].shape == (40, 24)


# --- Training samples -----------------------------------------------------------------------------


def test_training_sample(write_data) -> None:
    rows = [(picture(9, 5, "L"), [1]), (picture(60, 50, "RGBA"), [])]
    samples = TrainingSamples(load_split(str(write_data(rows)), "train"), augmentation(), seed=3)
    assert len(samples) == 2
    for index, labels in ((0, [0, 1]), (1, [0, 0])):
        sample = samples[index]
        assert sample["labels"].tolist() == labels
        assert all(sample[name].shape == (3, 16, 16) for name in ("pixel_values", "global_view", "local_source"))
        assert sample["box"].shape == (4,) and sample["crop_draws"].shape == (2,)


def test_item_is_epoch_and_index(write_data) -> None:
    rows = [(picture(), [0]), (picture(30, 30), [1]), (picture(), [])]
    dataset = load_split(str(write_data(rows)), "train")
    samples = TrainingSamples(dataset, augmentation(), seed=3)
    first, later = samples[1], samples[1 + 3 * 5]
    assert later["labels"].tolist() == first["labels"].tolist() == [0, 1]
    assert not torch.equal(first["pixel_values"], later["pixel_values"])
    again = TrainingSamples(dataset, augmentation(), seed=3)[1 + 3 * 5]
    assert all(torch.equal(again[name], later[name]) for name in later)
    other = TrainingSamples(dataset, augmentation(), seed=4)[1]
    assert not torch.equal(first["pixel_values"], other["pixel_values"])


def test_masks_of_a_training_split_are_never_read(write_data) -> None:
    folder = write_data([(picture(), [0])], [(picture(), [0], b"broken")])
    dataset = load_split(str(folder), "validation")
    assert "segmentation_map" not in TrainingSamples(dataset, augmentation(), seed=0)[0]


def order(length: int, batch: int, seed: int, epoch: int) -> list[int]:
    sampler = EpochSampler(length, batch, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_epoch_is_a_permutation() -> None:
    for epoch in (0, 3):
        items = order(12, 4, 1, epoch)
        assert {divmod(item, 12)[0] for item in items} == {epoch}
        assert sorted(item % 12 for item in items) == list(range(12))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    indices = {key: tuple(item % 40 for item in order(40, 4, *key)) for key in [(1, 0), (1, 1), (2, 0), (2, 1)]}
    assert len(set(indices.values())) == 4
    torch.manual_seed(5)
    np.random.seed(5)
    assert order(40, 4, 1, 1) == order(40, 4, 1, 1)
    assert tuple(item % 40 for item in order(40, 4, 1, 1)) == indices[1, 1]


def test_epoch_has_whole_batches() -> None:
    """The images left over are others in every epoch."""
    seen = [{item % 10 for item in order(10, 4, 0, epoch)} for epoch in range(12)]
    assert len(EpochSampler(10, 4, 0)) == 8 and all(len(epoch) == 8 for epoch in seen)
    assert set.union(*seen) == set(range(10)) and len(set(map(frozenset, seen))) > 5


def test_fewer_images_than_a_batch() -> None:
    assert len(EpochSampler(4, 4, 0)) == 4
    with pytest.raises(ValueError, match=r"at least effective_batch_size = 4 training images, found 3"):
        EpochSampler(3, 4, 0)


# --- Evaluation samples ---------------------------------------------------------------------------


def test_evaluation_sample(write_data) -> None:
    palette = mask(21, 17, 2).convert("P")
    palette.putpalette([0, 0, 0] * 256)
    rows = [(picture(21, 17), [1], palette), (picture(8, 8, "L"), [], mask(8, 8, 255))]
    samples = evaluation(load_split(str(write_data([(picture(), [0])], rows)), "validation"))
    assert len(samples) == 2
    first, second = samples[0], samples[1]
    assert first["pixel_values"].shape == (3, 16, 24)  # whole patches
    assert first["segmentation_map"].shape == (17, 21) and first["segmentation_map"].dtype == torch.int64
    assert (first["segmentation_map"] == 2).all() and first["labels"].tolist() == [0, 1]
    assert (second["segmentation_map"] == 255).all() and second["labels"].tolist() == [0, 0]
    assert samples.image(0).size == (21, 17) and samples.image(1).mode == "RGB"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (mask(16, 20), r"photo_1: .* height and width \(16, 20\), got \(20, 16\)"),
        (picture(), r"photo_1: expected a mask with one channel .* got \(16, 20, 3\)"),
        (mask(value=3), r"photo_1: expected mask values 0 to 2 or 255 \(ignored\), got 3"),
        (truncated(), r"segmentation_map photo_1.png \(image_id photo_1\) cannot be read"),
        (None, "photo_1: expected a file in the column 'segmentation_map', found none"),
    ],
)
def test_wrong_mask_names_the_image(write_data, wrong: object, message: str) -> None:
    rows = [(picture(), [0], mask()), (picture(), [0], wrong)]
    samples = evaluation(load_split(str(write_data([(picture(), [0])], rows)), "validation"))
    assert samples[0]["segmentation_map"].shape == (16, 20)
    with pytest.raises(ValueError, match=message):
        samples[1]


def test_split_without_masks(tiny_data: Path, write_data) -> None:
    """Parquet splits share their columns, so that of the training masks is there, and empty."""
    for folder in (tiny_data, write_data([(picture(), [0])])):
        with pytest.raises(ValueError, match=r"needs a column 'segmentation_map' with masks.*--eval_split none"):
            evaluation(load_split(str(folder), "train"))


def test_image_file_outside_the_data_set(tmp_path: Path) -> None:
    """`load_dataset("imagefolder")` stores paths, not bytes."""
    picture().save(tmp_path / "a.png")
    sample = {"image_id": "a", "image": {"bytes": None, "path": str(tmp_path / "a.png")}}
    assert read_image(sample).size == (20, 16)
    os.remove(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"image .*a.png \(image_id a\) cannot be read: .*No such file"):
        read_image(sample)


# --- Fingerprint ----------------------------------------------------------------------------------


def test_digest_is_of_the_content(write_data, tmp_path: Path) -> None:
    """Embedded or in files of any name the same; another label, mask, image or id is another digest."""
    rows = [(picture(), [0], mask()), (picture(), [1], mask()), (picture(), [0], mask(value=2))]
    data = load_split(str(write_data([(picture(), [0])], rows)), "validation")
    first, second, third = (evaluation(data).read(index).digest for index in range(3))
    assert len({first, second, third}) == 3 and 0 < first < 2**128
    stored = data[0]
    for column in ("image", "segmentation_map"):
        (tmp_path / column).write_bytes(stored[column]["bytes"])
        stored[column] = {"bytes": None, "path": str(tmp_path / column)}
    in_files = Dataset.from_list([stored], features=data.features)
    assert evaluation(in_files).read(0).digest == first
    renamed = Dataset.from_list([data[0] | {"image_id": "other"}], features=data.features)
    assert evaluation(renamed).read(0).digest != first
