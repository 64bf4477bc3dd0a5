"""Upload an image: what the model sees of each class (class activation map), and its segmentation."""

import gradio as gr
import torch
import torch.nn.functional as F
from huggingface_hub import RepoCard
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation


LONGEST_SIDE = 640  # pixels: enough to see, and a few seconds on the CPU of a free Space
MASK_OPACITY = 0.6  # the image stays visible under its segmentation

# The front matter of the Space's own README.md names the model, as the Hub shows it.
MODEL = RepoCard.load("README.md", repo_type="space").data.models[0]
model = AutoModelForSemanticSegmentation.from_pretrained(MODEL, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(MODEL, trust_remote_code=True)
NAMES = list(model.config.id2label.values())  # the background first


def palette(count: int) -> list[str]:
    """The first colours of PASCAL VOC as #rrggbb; the background is black."""
    colours = []
    for value in range(count):
        channels = [sum(((value >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
        colours.append("#{:02x}{:02x}{:02x}".format(*channels))
    return colours


@torch.inference_mode()
def segment(image: Image.Image | None):
    """An image -> scores of the classes, CAM and mask of each class, both as overlays with a legend."""
    if image is None:
        raise gr.Error("Upload an image first.")
    image = ImageOps.exif_transpose(image).convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    size = (image.height, image.width)
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    encoded = model.encode(pixel_values)
    scores = model.class_logits(encoded.features, model.classifier)[0].sigmoid()
    shown = scores >= min(0.5, scores.max().item())  # the best one where none is likely
    maps = model.labelled_activation_maps(encoded.features, shown[None].float())
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0]
    [labels] = processor.post_process_semantic_segmentation(model(pixel_values), target_sizes=[size])
    activation = [(maps[index].numpy(), NAMES[index + 1]) for index in shown.nonzero().flatten().tolist()]
    masks = [
        ((labels == value).numpy() * MASK_OPACITY, NAMES[value]) for value in labels.unique().tolist() if value > 0
    ]
    confidences = dict(zip(NAMES[1:], scores.tolist(), strict=True))
    return confidences, (image, activation), (image, masks)


colours = dict(zip(NAMES, palette(len(NAMES)), strict=True))
with gr.Blocks(title=MODEL) as demo:
    gr.Markdown(f"# {MODEL}\nSegmentation learnt from image-level tags. Classes: {', '.join(NAMES[1:])}.")
    with gr.Row():
        with gr.Column():
            upload = gr.Image(type="pil", label="Image")
            button = gr.Button("Segment", variant="primary")
            classes = gr.Label(num_top_classes=5, label="Is in the image")
        cam = gr.AnnotatedImage(label="Class activation maps", color_map=colours)
        mask = gr.AnnotatedImage(label="Segmentation", color_map=colours)
    button.click(segment, upload, [classes, cam, mask])

if __name__ == "__main__":
    demo.launch()
