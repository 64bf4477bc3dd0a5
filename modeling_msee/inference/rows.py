"""Rows of panels: one image with all steps, with the results of several models, and over the course of training."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..evaluation.confusion import confusion_matrix, scores
from ..image_processing_msee import IGNORE_INDEX
from .explain import Explanation
from .figures import Panel, heat_overlay, region_panel
from .masks import colorize, overlay, voc_palette
from .pictures import Picture


REGION_COLOUR = (255, 64, 64)


def steps_row(picture: Picture, explanation: Explanation) -> list[Panel]:
    """Image, CAM at every scale (Eq. 1), reliable regions (Eq. 3, 4), pseudo label, segmentation, ground truth."""
    image = np.asarray(picture.image)
    panels = [Panel("Image", image)]
    panels += [_activation_panel(image, explanation, scale) for scale in sorted(explanation.activation)]
    panels += [reliable_region_panel(image, scale, region) for scale, region in explanation.regions.items()]
    panels.append(Panel("Pseudo label", overlay(image, explanation.pseudo_label)))
    panels.append(Panel("Segmentation", overlay(image, explanation.segmentation)))
    return [*panels, *_target_panels(picture)]


def results_row(picture: Picture, explanations: Mapping[str, Explanation], num_labels: int) -> list[Panel]:
    """Image, CAM and segmentation of every model by its name, ground truth (Fig. 3, 6 and 7).

    Segmentations are in plain colours, to be held against the ground truth. The mIoU of one in this image is over the
    classes of the ground truth; `num_labels` counts the background.
    """
    image = np.asarray(picture.image)
    panels = [Panel("Image", image, picture.image_id)]
    for name, explanation in explanations.items():
        panels.append(Panel(f"{name} CAM".strip(), heat_overlay(image, explanation.fused_activation)))
        caption = _mean_iou(explanation.segmentation, picture.target, num_labels)
        panels.append(Panel(f"{name} Seg".strip(), colorize(explanation.segmentation, voc_palette()), caption))
    return [*panels, *_target_panels(picture)]


def training_row(picture: Picture, explanation: Explanation, step: int, num_labels: int) -> list[Panel]:
    """One checkpoint: image, segmentation, and the CAM and the reliable region of every scale (Fig. 4 and 5)."""
    image = np.asarray(picture.image)
    caption = _mean_iou(explanation.segmentation, picture.target, num_labels)
    panels = [
        Panel("Image", image, f"step {step}"),
        Panel("Segmentation S", colorize(explanation.segmentation, voc_palette()), caption),
    ]
    for scale, region in explanation.regions.items():
        panels.append(_activation_panel(image, explanation, scale))
        panels.append(reliable_region_panel(image, scale, region, f"{100 * region.mean():.1f} % of the image"))
    return [*panels, *_target_panels(picture)]


def legend(names: Sequence[str], pictures: Iterable[Picture], drawn: Iterable[np.ndarray]) -> dict[int, str]:
    """Names of the values that the pictures are tagged with, their ground truth has or a drawn label map holds."""
    values = {0}
    for picture in pictures:
        values |= {int(label) + 1 for label in picture.labels.nonzero()}
        values |= set() if picture.target is None else set(np.unique(picture.target).tolist())
    for label_map in drawn:
        values |= set(np.unique(label_map).tolist())
    shown = {value: names[value] for value in sorted(values - {IGNORE_INDEX})}
    return shown | ({IGNORE_INDEX: "ignored"} if IGNORE_INDEX in values else {})


def _activation_panel(image: np.ndarray, explanation: Explanation, scale: float) -> Panel:
    return Panel(f"CAM ×{scale:g}", heat_overlay(image, explanation.activation[scale]))


def reliable_region_panel(image: np.ndarray, scale: float, region: np.ndarray, caption: str = "") -> Panel:
    """Bˡ or Bˢ, bool (H, W), over its image; `scale` is the scale factor it comes from."""
    title = f"B{'ˡ' if scale > 1 else 'ˢ'} ×{scale:g}"
    return Panel(title, region_panel(image, region, REGION_COLOUR), caption)


def _target_panels(picture: Picture) -> list[Panel]:
    return [] if picture.target is None else [Panel("Ground truth", colorize(picture.target, voc_palette()))]


def _mean_iou(segmentation: np.ndarray, target: np.ndarray | None, num_labels: int) -> str:
    if target is None:
        return ""
    return f"mIoU {100 * scores(confusion_matrix(segmentation, target, num_labels))['mean_iou']:.1f}"
