"""Train a small SegFormer on pseudo masks, and score it on true ones.

    msee pseudo-label outputs/demo --data outputs/shapes --output outputs/pseudo
    python examples/train_segformer.py outputs/pseudo outputs/shapes --steps 200

Any trainer of segmentation models reads the data set that `msee pseudo-label` writes: `image`, and `label` with 0 the
background and 255 ignored. The SegFormer here starts from random weights; a pretrained one learns faster.
"""

import argparse

import numpy as np
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from modeling_msee.evaluation.confusion import confusion_matrix, scores


def main(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    train = load_dataset(arguments.pseudo, split="train")
    validation = load_dataset(arguments.data, split="validation")
    names = ["background", *train.features["labels"].feature.names]
    side = {"height": arguments.size, "width": arguments.size}
    processor = SegformerImageProcessor(size=side, do_reduce_labels=False)

    def collate(samples: list[dict]) -> dict:
        images = [sample["image"].convert("RGB") for sample in samples]
        masks = [np.asarray(sample["label"]) for sample in samples]
        return processor(images, masks, return_tensors="pt")

    config = SegformerConfig(
        num_labels=len(names),
        hidden_sizes=[16, 32, 64, 128],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=64,
        semantic_loss_ignore_index=255,
    )
    model = SegformerForSemanticSegmentation(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = 0
    while step < arguments.steps:
        for batch in DataLoader(train, batch_size=8, shuffle=True, drop_last=len(train) >= 8, collate_fn=collate):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == 1 or step % 20 == 0:
                print(f"step {step}: loss {loss.item():.3f}", flush=True)
            if step == arguments.steps:
                break

    model.eval()
    total = np.zeros((len(names), len(names)), dtype=np.int64)
    for sample in validation:
        target = np.asarray(sample["segmentation_map"])
        with torch.no_grad():
            outputs = model(**processor(sample["image"].convert("RGB"), return_tensors="pt"))
        found = processor.post_process_semantic_segmentation(outputs, target_sizes=[target.shape])[0]
        total += confusion_matrix(found.numpy(), target, len(names))
    print(f"mIoU on {len(validation)} true masks: {100 * scores(total)['mean_iou']:.1f} %")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pseudo", help="data set that `msee pseudo-label` wrote")
    parser.add_argument("data", help="data set with true masks in its validation split")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=128, help="side of the images in training, in pixels")
    main(parser.parse_args())
