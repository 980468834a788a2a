"""The model: config, decoder block, routing, thinking layers, causal LM. PyTorch and transformers only."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from itt_composer.model.block import DecoderBlock
from itt_composer.model.blocks import InnerLayer, layer_name
from itt_composer.model.causal_lm import ITTForCausalLM
from itt_composer.model.config import ITTConfig
from itt_composer.model.decoder import ITTModel
from itt_composer.model.residual_scale import ResidualScaleLayer
from itt_composer.model.routing_state import RoutingRecord, RoutingState, routing_state
from itt_composer.model.thinking import ITTLayer, LoopLayer, thinking_layers
from itt_composer.model.thinking_setting import checked_ratios, thinking_setting

__all__ = [
    'DecoderBlock',
    'ITTConfig',
    'ITTForCausalLM',
    'ITTLayer',
    'ITTModel',
    'InnerLayer',
    'LoopLayer',
    'ResidualScaleLayer',
    'RoutingRecord',
    'RoutingState',
    'checked_ratios',
    'layer_name',
    'routing_state',
    'thinking_layers',
    'thinking_setting',
]

AutoConfig.register('itt', ITTConfig)
AutoModel.register(ITTConfig, ITTModel)
AutoModelForCausalLM.register(ITTConfig, ITTForCausalLM)
