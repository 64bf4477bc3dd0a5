"""The tiny network of the reference figures."""

from pathlib import Path

from modeling_msee import MSEEForWeaklySupervisedSegmentation
from modeling_msee.hub.convert import convert_toco_checkpoint


def reference_network(path: Path, **fields) -> MSEEForWeaklySupervisedSegmentation:
    """From its `net_state.npz`; `fields` are of MSEEConfig."""
    return convert_toco_checkpoint(path, num_attention_heads=4, **fields)
