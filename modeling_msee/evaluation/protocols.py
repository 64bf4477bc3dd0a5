"""Named protocols: how a segmentation is predicted before it is scored. docs/protocols.md: which figure is whose."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .crf import TOCO_CRF


CAM_NAMES = ("CAM", "Auxiliary CAM")
SEGMENTATION_NAME = "Seg"
CRF_NAME = "Seg + CRF"
CRF_SUFFIX = "-crf"


@dataclass(frozen=True)
class Protocol:
    """How a segmentation is predicted. The CAM is the same under every protocol, but for `size`.

    Args:
        name: what `--protocol` takes and result files carry.
        description: in words.
        scales: of the image, for the segmentation; none: only the CAM is scored.
        mirror: makes one of the scores of the image and those of its mirror image (mirrored back), elementwise, as
            `torch.add` does; None: no mirror image.
        across_scales: makes one of the scores at two scales, likewise.
        size: height and width in pixels that every image is resized to; None: the size that the checkpoint's
            processor gives, which is each image's own unless the recipe said otherwise.
        crf: dense CRF afterwards.
    """

    name: str
    description: str
    scales: tuple[float, ...] = (1.0,)
    mirror: Callable[..., Tensor] | None = None
    across_scales: Callable[..., Tensor] = torch.maximum
    size: int | None = None
    crf: bool = False

    @property
    def title(self) -> str:
        """Name and description in one line."""
        return f"{self.name} ({self.description})"

    @property
    def row_names(self) -> tuple[str, ...]:
        """What is scored, in the order of the confusion matrices."""
        segmentation = (SEGMENTATION_NAME,) if self.scales else ()
        return (*CAM_NAMES, *segmentation, *((CRF_NAME,) if self.crf else ()))

    @property
    def with_crf(self) -> "Protocol":
        """The same protocol with dense CRF, its name ending in `-crf`."""
        return replace(self, name=self.name + CRF_SUFFIX, description=f"{self.description}; dense CRF", crf=True)

    def settings(self) -> dict[str, Any]:
        """Every setting as JSON holds it."""
        return {
            "scales": list(self.scales),
            "mirror": None if self.mirror is None else self.mirror.__name__,
            "across_scales": self.across_scales.__name__ if len(self.scales) > 1 else None,
            "size": self.size,
            "crf": asdict(TOCO_CRF) if self.crf else None,
        }


MSEE = Protocol("msee", "Seg: one scale, not mirrored; CAM: all scales and mirror images, ground-truth image labels")
TOCO_VOC = Protocol(
    "toco-voc",
    "Seg: scales 1, 1.5, 1.25; image and mirror image summed, maximum over scales",
    scales=(1.0, 1.5, 1.25),
    mirror=torch.add,
)
TOCO_COCO = Protocol(
    "toco-coco",
    "448 x 448; Seg: scales 1, 1.25, 1.5; maximum of image and mirror image, sum over scales",
    scales=(1.0, 1.25, 1.5),
    mirror=torch.maximum,
    across_scales=torch.add,
    size=448,
)
CAM = Protocol("cam", "CAM only: all scales and mirror images, ground-truth image labels", scales=())

SEGMENTATION_PROTOCOLS = {
    protocol.name: protocol for base in (MSEE, TOCO_VOC, TOCO_COCO) for protocol in (base, base.with_crf)
}
PROTOCOLS = {**SEGMENTATION_PROTOCOLS, CAM.name: CAM}


def find_protocol(name: str, crf: bool = False) -> Protocol:
    """The protocol of a name; `crf` asks for its variant with dense CRF, which `name` may also be.

    Raises:
        ValueError: there is none.
    """
    wanted = name + CRF_SUFFIX if crf and not name.endswith(CRF_SUFFIX) else name
    if wanted not in PROTOCOLS:
        raise ValueError(f"expected a protocol out of {', '.join(PROTOCOLS)}, got {wanted!r}.")
    return PROTOCOLS[wanted]
