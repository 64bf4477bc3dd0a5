"""What stands on the encoder: the segmentation decoder and the projection head of the class-token contrast (§5.1)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_msee import MSEEConfig


class MSEEDecoder(nn.Module):
    """DeepLab-LargeFOV decoder (§5.1): two dilated 3x3 convolutions and a 1x1 prediction, without bias."""

    def __init__(self, config: MSEEConfig):
        super().__init__()
        channels, dilation = config.decoder_channels, config.decoder_dilation
        dilated: dict[str, Any] = {"kernel_size": 3, "padding": dilation, "dilation": dilation, "bias": False}
        self.conv1 = nn.Conv2d(config.hidden_size, channels, **dilated)
        self.conv2 = nn.Conv2d(channels, channels, **dilated)
        self.classifier = nn.Conv2d(channels, len(config.label_names), kernel_size=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, K, h, w)."""
        hidden = F.relu(self.conv1(features))
        hidden = F.relu(self.conv2(hidden))
        return self.classifier(hidden)


class MSEEProjectionHead(nn.Module):
    """Projection head of the class-token contrast: three layers, L2 norm, one layer with unit-norm rows."""

    def __init__(self, config: MSEEConfig):
        super().__init__()
        hidden, bottleneck = config.projection_hidden_size, config.projection_bottleneck_size
        self.layer1 = nn.Linear(config.hidden_size, hidden)
        self.layer2 = nn.Linear(hidden, hidden)
        self.layer3 = nn.Linear(hidden, bottleneck)
        self.last_layer = nn.Linear(bottleneck, config.projection_size, bias=False)

    def forward(self, class_token: Tensor) -> Tensor:
        """(N, D) -> (N, projection_size)."""
        hidden = F.gelu(self.layer1(class_token))
        hidden = F.gelu(self.layer2(hidden))
        bottleneck = F.normalize(self.layer3(hidden), dim=-1)
        return F.linear(bottleneck, F.normalize(self.last_layer.weight, dim=-1))


__all__ = ["MSEEDecoder", "MSEEProjectionHead"]
