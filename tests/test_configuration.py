"""The configuration: the paper's defaults, errors that name field, expected and got, and the JSON round trip."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, Dinov2Config, ViTConfig

from modeling_msee import MSEEConfig


# What the paper says (§3, §5.1), and the published baseline where it is silent.
PAPER = {
    "scale_factors": (1.5, 0.5),
    "threshold_mode": "per_class",
    "beta": 2.0,
    "distance": "vector",
    "teacher_gradient": False,
    "classify_scaled_images": False,
    "msee_start_step": 2000,
    "decoder_channels": 512,
    "decoder_dilation": 5,
    "auxiliary_layer": -3,
    "projection_hidden_size": 2048,
    "projection_bottleneck_size": 256,
    "projection_size": 1024,
    "projection_momentum": 0.9,
    "classification_loss_weight": 1.0,
    "auxiliary_classification_loss_weight": 1.0,
    "patch_contrast_loss_weight": 0.2,
    "class_contrast_loss_weight": 0.5,
    "segmentation_loss_weight": 0.1,
    "energy_loss_weight": 0.05,
    "patch_contrast_start_step": 0,
    "class_contrast_start_step": 0,
    "segmentation_start_step": 2000,
    "main_activation_start_step": 0,
    "activation_scale_factors": (1.0, 0.5, 1.5),
    "background_threshold": 0.5,
    "high_threshold": 0.7,
    "low_threshold": 0.25,
    "local_crop_size": 96,
    "local_crop_count": 8,
    "uncertain_share": 0.2,
    "class_contrast_temperature": 0.5,
    "refinement_iterations": 10,
    "refinement_dilations": (1, 2, 4, 8, 12, 24),
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}


@pytest.mark.parametrize("field", PAPER)
def test_defaults_are_the_papers(field):
    assert getattr(MSEEConfig(), field) == PAPER[field]


def test_the_default_encoder_is_vit_base_with_16_pixel_patches():
    config = MSEEConfig()
    assert isinstance(config.backbone_config, ViTConfig)
    assert (config.hidden_size, config.patch_size) == (768, 16)
    assert config.backbone_config.num_hidden_layers == 12


def test_classes_and_labels():
    config = MSEEConfig(id2label={0: "background", 1: "cat", 2: "dog"})
    assert (config.num_labels, config.num_classes) == (3, 2)
    assert config.id2label[1] == "cat"


RANGES = [
    ("beta", 0, "a number above 0"),
    ("beta", -1.0, "a number above 0"),
    ("class_contrast_temperature", 0.0, "a number above 0"),
    ("projection_momentum", 1.5, "a number in [0, 1]"),
    ("background_threshold", -0.1, "a number in [0, 1]"),
    ("high_threshold", 1.1, "a number in [0, 1]"),
    ("low_threshold", 0.9, "at most high_threshold"),
    ("msee_loss_weight", -1, "a number of at least 0"),
    ("msee_loss_weight", float("nan"), "a number of at least 0"),
    ("energy_loss_weight", -0.5, "a number of at least 0"),
    ("msee_start_step", -3, "a number of at least 0"),
    ("segmentation_start_step", -1, "a number of at least 0"),
    ("local_crop_count", 0, "an integer of at least 1"),
    ("local_crop_size", 0, "an integer of at least 1"),
    ("decoder_channels", 0, "an integer of at least 1"),
    ("decoder_dilation", 0, "an integer of at least 1"),
    ("projection_size", -4, "an integer of at least 1"),
    ("scale_factors", (1.5, -0.5), "numbers above 0"),
    ("scale_factors", (1.5, 1.0), "factors other than 1.0, the student's own scale"),
    ("scale_factors", (1.5, 1.5), "no factor twice"),
    ("activation_scale_factors", (0.0,), "numbers above 0"),
    ("activation_scale_factors", (), "at least one number"),
    ("refinement_dilations", (0,), "numbers above 0"),
    ("refinement_dilations", (), "at least one number"),
    ("refinement_iterations", -1, "an integer of at least 0"),
    ("image_mean", (0.5, 0.5), "three numbers, one per colour channel"),
    ("image_std", (1.0,), "three numbers, one per colour channel"),
    ("num_labels", 1, "at least 2 (background and one class)"),
    ("num_labels", 256, "at most 255 (a label map marks ignored pixels with 255)"),
    ("auxiliary_layer", 0, "a block from -4 to -1"),
    ("auxiliary_layer", -5, "a block from -4 to -1"),
]


@pytest.mark.parametrize(("field", "value", "expected"), RANGES)
def test_a_value_out_of_range(tiny_config, field, value, expected):
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        tiny_config(**{field: value})
    assert f"{field}: expected {expected}, got {value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("beta", "2", "float"),
        ("decoder_channels", 1.5, "int"),
        ("scale_factors", 1.5, "tuple"),
        ("scale_factors", ("large",), "float"),
        ("teacher_gradient", "yes", "bool"),
        ("threshold_mode", "per_pixel", "('per_class', 'per_image', 'per_image_max')"),
        ("distance", "cosine", "('vector', 'elementwise')"),
        ("msee_loss_reduction", "max", "('mean', 'sum')"),
    ],
)
def test_a_value_of_the_wrong_type(tiny_config, field, value, expected):
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        tiny_config(**{field: value})
    message = str(error.value)
    got = value[0] if isinstance(value, tuple) else value
    assert field in message
    assert expected in message
    assert str(got) in message or type(got).__name__ in message


def test_an_encoder_that_is_not_supported():
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        MSEEConfig(backbone_config={"model_type": "resnet"})
    message = str(error.value)
    assert "backbone_config.model_type: expected one of vit, deit, dinov2" in message
    assert "got 'resnet'" in message


def test_patches_that_are_not_square():
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        MSEEConfig(backbone_config={"model_type": "vit", "patch_size": (16, 8)})
    assert "backbone_config.patch_size: expected one integer, got (16, 8)" in str(error.value)


@pytest.mark.parametrize(
    ("typo", "field"),
    [
        ("scale_factor", "scale_factors"),
        ("msee_loss_weigth", "msee_loss_weight"),
        ("teacher_gradients", "teacher_gradient"),
        ("segmentation_start_steps", "segmentation_start_step"),
    ],
)
def test_a_typing_error_is_caught(tiny_config, typo, field):
    with pytest.raises(ValueError, match=f"MSEEConfig has no field '{typo}'; did you mean '{field}'"):
        tiny_config(**{typo: 1})


def test_foreign_keys_of_the_library_pass(tiny_config):
    assert tiny_config(output_hidden_states=True).output_hidden_states


def test_the_encoder_from_a_dictionary_and_from_a_configuration():
    fields = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 14}
    by_dictionary = MSEEConfig(backbone_config={"model_type": "dinov2", **fields})
    by_object = MSEEConfig(backbone_config=Dinov2Config(**fields))
    assert isinstance(by_dictionary.backbone_config, Dinov2Config)
    assert by_dictionary.backbone_config.to_dict() == by_object.backbone_config.to_dict()
    assert (by_dictionary.patch_size, by_dictionary.hidden_size) == (14, 32)


@pytest.mark.parametrize("backbone", ["vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit"])
def test_json_round_trip(tiny_config, tmp_path, backbone):
    config = tiny_config(
        backbone,
        scale_factors=[2.0, 1.5, 0.5],
        distance="elementwise",
        msee_start_step=7,
        id2label=dict(enumerate(("background", "a", "b"))),
        num_labels=3,
    )
    config.save_pretrained(tmp_path)
    loaded = MSEEConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.scale_factors == config.scale_factors == (2.0, 1.5, 0.5)
    assert type(loaded.backbone_config) is type(config.backbone_config)
    by_type = AutoConfig.from_pretrained(tmp_path)
    assert type(by_type) is MSEEConfig
    assert {**by_type.to_dict(), "_name_or_path": ""} == config.to_dict()
    again = MSEEConfig(**json.loads(config.to_json_string(use_diff=False)))
    assert again.to_json_string(use_diff=False) == config.to_json_string(use_diff=False)
