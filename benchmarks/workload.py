"""A training step as a recipe describes it, on generated images and random weights."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_msee import MSEEConfig, MSEEForWeaklySupervisedSegmentation
from modeling_msee.training.arguments import method_fields, read_recipe
from modeling_msee.training.schedule import parameter_groups


CONFIGURATION = Path(__file__).resolve().parents[1] / "configuration"
VIT_SMALL = {
    "model_type": "vit",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
DINOV2_SMALL = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": 14,
}
LABELS_PER_IMAGE = 2


@dataclass(frozen=True)
class Case:
    """What one step works on; `recipe` names a file of configuration/, `encoder` what it downloads otherwise."""

    recipe: str
    encoder: dict[str, Any] = field(hash=False)
    image_size: int
    batch_size: int
    num_classes: int
    scale_factors: tuple[float, ...] = (1.5, 0.5)

    def __str__(self) -> str:
        factors = ", ".join(str(factor) for factor in self.scale_factors) or "none"
        return (
            f"{self.encoder.get('model_type')}-{self.encoder.get('hidden_size')}, {self.image_size} px, "
            f"batch {self.batch_size}, {self.num_classes} classes, scale factors {factors}"
        )


PRESETS = {
    "voc": Case("voc.yaml", {"model_type": "vit", "hidden_size": 768}, image_size=448, batch_size=1, num_classes=20),
    "small": Case("voc.yaml", VIT_SMALL, image_size=224, batch_size=2, num_classes=20),
    "tags": Case("tags.yaml", DINOV2_SMALL, image_size=224, batch_size=8, num_classes=12),
}


def growth(case: Case) -> list[Case]:
    """The case itself, then others that differ in one respect: scale factors, image size, batch, classes."""
    sizes = [size for size in (112, 224, 336, 448) if size != case.image_size]
    batches = [size for size in (1, 2, 4) if size != case.batch_size]
    factors = [(), (1.5,), (1.5, 0.5, 0.75)]
    return [
        case,
        *(replace(case, scale_factors=chosen) for chosen in factors),
        *(replace(case, image_size=size) for size in sizes),
        *(replace(case, batch_size=size) for size in batches),
        *(replace(case, num_classes=count) for count in (80, 200)),
    ]


@dataclass
class Workload:
    """A model, its optimiser and one batch."""

    case: Case
    model: MSEEForWeaklySupervisedSegmentation
    optimizer: torch.optim.Optimizer
    batch: dict[str, Tensor]

    @classmethod
    def build(cls, case: Case) -> "Workload":
        torch.manual_seed(0)
        recipe = read_recipe(str(CONFIGURATION / case.recipe))
        values = {name: recipe[name] for name in method_fields() if name in recipe}
        config = MSEEConfig(**{**values, "backbone_config": case.encoder, "num_labels": case.num_classes + 1})
        model = MSEEForWeaklySupervisedSegmentation(config).train()
        model.freeze_backbone_layers(recipe.get("frozen_backbone_layers", 0))
        groups = parameter_groups(model, recipe["learning_rate"], recipe["head_learning_rate_multiplier"], 0.01)
        # As the Trainer's default, adamw_torch_fused.
        optimizer = torch.optim.AdamW(groups, fused=True)
        return cls(case, model, optimizer, generated_batch(case, config.local_crop_count))

    def varied(self, case: Case) -> "Workload":
        """The same model on another case; a new one where the number of classes differs."""
        if case.num_classes != self.case.num_classes:
            return Workload.build(case)
        return replace(self, case=case, batch=generated_batch(case, self.model.config.local_crop_count))

    def forward(self) -> Tensor:
        """The loss with every term."""
        self.model.config.scale_factors = self.case.scale_factors  # cases share a model
        return self.model(**self.batch).loss

    def update(self) -> None:
        """One optimiser step and the averaged head's, as the Trainer between two batches."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.update_averaged_projection()

    def state_bytes(self) -> int:
        """Bytes of weights, gradients and AdamW's two moments."""
        sizes = ((p.numel() * p.element_size(), p.requires_grad) for p in self.model.parameters())
        return sum(size * (4 if trained else 1) for size, trained in sizes)


def generated_batch(case: Case, crop_count: int) -> dict[str, Tensor]:
    """Smooth noise over the full range of colours, each image with the same number of labels."""
    generator = torch.Generator().manual_seed(0)

    def images() -> Tensor:
        coarse = torch.randn(case.batch_size, 3, 12, 12, generator=generator)
        return F.interpolate(coarse, size=(case.image_size, case.image_size), mode="bicubic")

    labels = torch.zeros(case.batch_size, case.num_classes)
    labels[:, :LABELS_PER_IMAGE] = 1
    return {
        "pixel_values": images(),
        "global_view": images(),
        "local_source": images(),
        "labels": labels,
        "crop_draws": torch.rand(case.batch_size, crop_count, generator=generator),
    }
