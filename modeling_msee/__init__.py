"""M-SEE: weakly supervised semantic segmentation from image-level tags, on the Hugging Face libraries."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation

from .configuration_msee import MSEEConfig
from .encoder_msee import MSEEPreTrainedModel
from .image_processing_msee import MSEEImageProcessor
from .modeling_msee import MSEEForWeaklySupervisedSegmentation, MSEEOutput


__version__ = "0.1.0"

AutoConfig.register("msee", MSEEConfig)
AutoModel.register(MSEEConfig, MSEEForWeaklySupervisedSegmentation)
AutoModelForSemanticSegmentation.register(MSEEConfig, MSEEForWeaklySupervisedSegmentation)
AutoImageProcessor.register(MSEEConfig, image_processor_classes={"torchvision": MSEEImageProcessor})

__all__ = [
    "MSEEConfig",
    "MSEEForWeaklySupervisedSegmentation",
    "MSEEImageProcessor",
    "MSEEOutput",
    "MSEEPreTrainedModel",
]
