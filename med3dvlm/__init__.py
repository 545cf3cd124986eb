"""Med3DVLM: a 3D encoder of decomposed convolutions, contrastive pretraining, and a language model that reads both."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from med3dvlm.configuration_med3dclip import Med3DCLIPConfig
from med3dvlm.configuration_med3dvlm import Med3DVLMConfig
from med3dvlm.modeling_med3dclip import Med3DCLIPModel, Med3DCLIPOutput
from med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration, Med3DVLMOutput
from med3dvlm.processing_med3dclip import Med3DCLIPProcessor
from med3dvlm.processing_med3dvlm import Med3DVLMProcessor

AutoConfig.register("med3dclip", Med3DCLIPConfig)
AutoModel.register(Med3DCLIPConfig, Med3DCLIPModel)
AutoProcessor.register(Med3DCLIPConfig, Med3DCLIPProcessor)
AutoConfig.register("med3dvlm", Med3DVLMConfig)
AutoModelForImageTextToText.register(Med3DVLMConfig, Med3DVLMForConditionalGeneration)
AutoProcessor.register(Med3DVLMConfig, Med3DVLMProcessor)

__all__ = [
    "Med3DCLIPConfig",
    "Med3DCLIPModel",
    "Med3DCLIPOutput",
    "Med3DCLIPProcessor",
    "Med3DVLMConfig",
    "Med3DVLMForConditionalGeneration",
    "Med3DVLMOutput",
    "Med3DVLMProcessor",
]
