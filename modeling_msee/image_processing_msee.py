"""Image processor of M-SEE: images of any size and mode to the patch grid, logits to label maps."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, ImageOps
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageInput, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack


IGNORE_INDEX = 255
SIZE_KEYS = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"})


def check_size(size: Any) -> None:
    """Raise ValueError unless `size` is None or a dictionary with one of the sets of `SIZE_KEYS`."""
    sides = dict(size) if isinstance(size, dict | SizeDict) else {}
    valid = set(sides) in SIZE_KEYS and all(isinstance(side, int) and side > 0 for side in sides.values())
    if size is not None and not valid:
        expected = " or ".join(str(sorted(keys)) for keys in SIZE_KEYS)
        raise ValueError(f"size must be None or have the keys {expected} with integers above 0, got {size!r}")


def patch_grid_size(height: int, width: int, size: SizeDict | None, patch_size: int) -> tuple[int, int]:
    """Height and width, multiples of `patch_size`, for an image of `height` x `width`; halves go up."""
    if height < 1 or width < 1:
        raise ValueError(f"expected at least one pixel, got height {height} and width {width}")
    scale = Fraction(1)  # exact, so that halves are halves
    if size is not None and size.shortest_edge:
        scale = Fraction(size.shortest_edge, min(height, width))
        if size.longest_edge:
            scale = min(scale, Fraction(size.longest_edge, max(height, width)))
    elif size is not None:
        height, width = size["height"], size["width"]
    rows, columns = (math.floor(side * scale / patch_size + Fraction(1, 2)) for side in (height, width))
    return max(rows, 1) * patch_size, max(columns, 1) * patch_size


def flat_list(images: Any, axes: int) -> list[Any]:
    """Nested lists, arrays with a batch axis before their `axes` axes and single images as one flat list."""
    if isinstance(images, list | tuple):
        return [image for item in images for image in flat_list(item, axes)]
    if isinstance(images, Image.Image) or images.ndim != axes + 1:
        return [images]
    return list(images)


def upright(image: Image.Image) -> Image.Image:
    """`image` decoded and turned by its EXIF tag; ValueError with the file's name if it is broken."""
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError) as error:  # SyntaxError is what PIL raises for a broken PNG chunk
        name = image.filename if isinstance(image, ImageFile.ImageFile) else ""
        raise ValueError(f"cannot decode the image file {name!r}: {error}") from error


def pil_to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8; grey of more than 8 bits (1, H, W) float32, the 65535 of 16 bits being 255."""
    if image.mode.startswith("I;16"):  # PIL would clip, not scale
        return torch.from_numpy(np.array(image).astype(np.float32) / 257)[None]
    if image.mode in ("I", "F"):
        return torch.from_numpy(np.array(image).astype(np.float32))[None]
    if image.mode == "P":
        image = image.convert("RGBA")  # same colours, without PIL's warning about transparency
    return tvF.pil_to_tensor(image.convert("RGB"))


def array_to_tensor(array: np.ndarray | torch.Tensor, data_format: str | None) -> torch.Tensor:
    """(H, W) or 1 to 4 channels first or last as (channels, H, W), uint8 or float32; True is 255."""
    if isinstance(array, np.ndarray):
        dtype = array.dtype if array.dtype in (np.uint8, np.bool_) else np.float32
        array = torch.from_numpy(np.array(array, dtype=dtype))  # a copy: read-only and flipped arrays too
    image = array.detach() if array.dtype == torch.uint8 else array.detach().float()
    image = image * 255 if array.dtype == torch.bool else image
    image = image[None] if image.ndim == 2 else image
    if array.ndim == 3:
        first, last = array.shape[0], array.shape[2]
        is_last = first != 3 and (last == 3 or first not in (1, 2, 4))  # 3 comes first: (4, 9, 3) is RGB
        if data_format == "channels_last" or (data_format is None and is_last):
            image = image.permute(2, 0, 1)
    if image.ndim != 3 or len(image) not in (1, 2, 3, 4):
        raise ValueError(f"expected (H, W) or 1 to 4 channels first or last, got shape {tuple(array.shape)}")
    return image


def label_map(labels: Any, image: torch.Tensor) -> torch.Tensor:
    """The map of `image` (3, H, W): PIL (palette and grey values kept), array or tensor to (H, W) int64."""
    if isinstance(labels, Image.Image):
        labels = np.array(upright(labels))
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "bui":
        labels = torch.from_numpy(labels.astype(np.int64))
    if labels.ndim != 2 or not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        raise ValueError(f"expected an integer map (H, W), got {labels.dtype} of shape {tuple(labels.shape)}")
    if labels.shape != image.shape[1:]:
        sizes = f"{tuple(image.shape[1:])}, its segmentation map {tuple(labels.shape)} (height, width)"
        raise ValueError(f"expected an image and a segmentation map of one size, the image is {sizes}")
    return labels.to(image.device, torch.int64)


def resize_labels(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(H, W) to `size`, nearest-exact; by indexing, since interpolation rounds large integers to float32."""
    pairs = zip(size, labels.shape, strict=True)
    rows, columns = ((2 * torch.arange(new) + 1) * old // (2 * new) for new, old in pairs)
    return labels[rows][:, columns]


class MSEEImageProcessorKwargs(ImagesKwargs, total=False):
    """`patch_size` (`int`, defaults to `self.patch_size`): side of a patch of the backbone in pixels."""

    patch_size: int


class MSEEImageProcessor(TorchvisionBackend):
    """
    Converts images to RGB, resizes them to whole patches, normalises, pads the batch at the bottom and right.

    PIL images are turned upright by their EXIF tag first. Alpha is dropped, not composited, like
    `convert("RGB")`; 16-bit grey is divided by 257. Arrays and tensors are (H, W) or have 1 to 4 channels,
    first or last, and values in [0, 255].

    Args:
        patch_size (`int`, *optional*, defaults to 16): side of a patch of the backbone in pixels.
        size (`dict[str, int]`, *optional*): None is each image's own size, `{"height", "width"}` one size for
            all, `{"shortest_edge"}` keeps the aspect ratio, `"longest_edge"` is a limit. Each side is then
            rounded to a multiple of `patch_size`, at least one patch; the image is resized to that.
        resample, do_rescale, rescale_factor, do_normalize, image_mean, image_std: as in other processors.
    """

    valid_kwargs = MSEEImageProcessorKwargs
    patch_size = 16
    size = None
    resample = Image.Resampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_convert_rgb = do_resize = do_pad = True  # fixed
    do_rescale = do_normalize = True
    rescale_factor = 1 / 255

    def __init__(self, **kwargs: Unpack[MSEEImageProcessorKwargs]):
        super().__init__(**kwargs)  # type: ignore[misc]  # declared for the library's own keywords only

    def preprocess(
        self, images: ImageInput, segmentation_maps: Any = None, **kwargs: Unpack[MSEEImageProcessorKwargs]
    ) -> BatchFeature:
        """
        `pixel_values` (B, 3, h, w) float32 with the largest h and w of the batch, zeros beyond an image.

        `segmentation_maps`, integers (H, W) of the upright image's size, come back as `segmentation_maps`
        (B, h, w) int64, nearest neighbour, 255 beyond an image. A map is turned by its own EXIF tag only.
        Raises ValueError for images that cannot be used and for maps that do not fit them.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels an image of `height` x `width` is resized to, without batch padding."""
        return patch_grid_size(height, width, self.size, self.patch_size)

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """
        B label maps (H, W) int64 from `outputs.logits` (B, K, h, w) of a batch that this processor made.

        `target_sizes`, a list or (B, 2) tensor: (height, width) of each image before preprocessing. Batch
        padding is cut off and the logits are resized bilinearly before the arg-max; without it, they stay.
        With `return_segmentation_scores` items hold `segmentation` and `segmentation_scores` (K, H, W).
        Raises ValueError if images of these sizes cannot have given these logits.
        """
        scores = outputs.logits
        if target_sizes is not None:
            scores = self._resized_logits(scores, target_sizes)
        if not return_segmentation_scores:
            return [item.argmax(dim=0) for item in scores]
        data = ({"segmentation": item.argmax(dim=0), "segmentation_scores": item} for item in scores)
        return [SemanticSegmentationPostProcessorOutput(data=item) for item in data]

    def _resized_logits(self, logits: torch.Tensor, target_sizes: Any) -> Iterator[torch.Tensor]:
        """The logits of each image, without batch padding, at its target size: (K, H, W) float32."""
        sizes = [(int(height), int(width)) for height, width in target_sizes]
        if len(sizes) != len(logits):
            raise ValueError(f"expected one target size per image, got {len(sizes)} for {len(logits)} images")
        grids = [tuple(side // self.patch_size for side in self.resized_size(*size)) for size in sizes]
        largest = tuple(max(sides) for sides in zip(*grids, strict=True))
        if largest != tuple(logits.shape[-2:]):  # anything else would cut or stretch the wrong region
            found = f"{sizes} fill {largest} patches, the logits are {tuple(logits.shape[-2:])}"
            advice = "pass the sizes before preprocessing, the whole batch, no size or patch_size per call"
            raise ValueError(f"target_sizes must fit the logits, but {found}: {advice}")
        for item, (rows, columns), size in zip(logits, grids, sizes, strict=True):
            valid = item[None, :, :rows, :columns].float()
            yield F.interpolate(valid, size=size, mode="bilinear", align_corners=False)[0]

    def process_image(  # type: ignore[override]
        self, image: Any, input_data_format: str | None = None, device: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """One image of any kind as (3, H, W) in [0, 255], uint8 or float32."""
        is_pil = isinstance(image, Image.Image)
        tensor = pil_to_tensor(upright(image)) if is_pil else array_to_tensor(image, input_data_format)
        if tensor.numel() and not 0 <= tensor.min() <= tensor.max() <= 255:  # NaN fails as well
            low, high = tensor.min().item(), tensor.max().item()
            raise ValueError(f"expected values in [0, 255] and no NaN, got [{low}, {high}]: rescale first")
        return (tensor[:3] if len(tensor) > 2 else tensor[:1].expand(3, -1, -1)).to(device=device)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        check_size(kwargs["size"])
        if not isinstance(kwargs["patch_size"], int) or kwargs["patch_size"] < 1:
            raise ValueError(f"patch_size must be an integer of at least 1, got {kwargs['patch_size']!r}")
        always = ("do_convert_rgb", "do_resize", "do_pad")
        if kwargs["do_center_crop"] or not all(kwargs[name] for name in always):
            raise ValueError(f"{always} cannot be False nor do_center_crop True: leave them out")
        return super()._standardize_kwargs(**kwargs)

    def _validate_preprocess_kwargs(self, do_resize: Any = None, **kwargs: Any) -> None:  # type: ignore[override]
        super()._validate_preprocess_kwargs(**kwargs)  # without do_resize, which would refuse size=None

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self, images: Any, segmentation_maps: Any, **kwargs: Any
    ) -> BatchFeature:
        """Each image by itself, then padding: the values of an image do not depend on its batch."""
        images = flat_list(self.fetch_images(images), axes=3)
        has_maps = segmentation_maps is not None
        maps = flat_list(self.fetch_images(segmentation_maps), axes=2) if has_maps else images
        if not images or len(images) != len(maps):
            raise ValueError(f"expected images and one map for each, got {len(images)} and {len(maps)}")
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        pixel_values, labels = [], []
        for index, (image, segmentation_map) in enumerate(zip(images, maps, strict=True)):
            try:
                tensor = self.process_image(image, kwargs["input_data_format"], kwargs["device"])
                size = patch_grid_size(tensor.shape[1], tensor.shape[2], kwargs["size"], kwargs["patch_size"])
                if has_maps:
                    labels.append(resize_labels(label_map(segmentation_map, tensor), size)[None])
            except ValueError as error:
                raise ValueError(f"image {index}: {error}") from error
            tensor = self.resize(tensor, SizeDict(height=size[0], width=size[1]), kwargs["resample"]).float()
            pixel_values.append(self.rescale_and_normalize(tensor, *(kwargs[name] for name in names)))
        data: dict[str, Any] = {"pixel_values": self.pad(pixel_values)}
        if has_maps:
            data["segmentation_maps"] = [item[0] for item in self.pad(labels, fill_value=IGNORE_INDEX)]
        return BatchFeature(data=data, tensor_type=kwargs["return_tensors"])


MSEEImageProcessor.register_for_auto_class()

__all__ = ["MSEEImageProcessor"]
