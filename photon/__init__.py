"""Photon: a 3D-native multimodal language model whose visual tokens are dropped per question.

Importing this package registers the model with the Auto classes of transformers.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from photon.configuration_photon import PhotonConfig
from photon.modeling_photon import PhotonForConditionalGeneration, PhotonOutput
from photon.processing_photon import PhotonProcessor

AutoConfig.register("photon", PhotonConfig)
AutoModelForImageTextToText.register(PhotonConfig, PhotonForConditionalGeneration)
AutoProcessor.register(PhotonConfig, PhotonProcessor)

__all__ = ["PhotonConfig", "PhotonForConditionalGeneration", "PhotonOutput", "PhotonProcessor"]
