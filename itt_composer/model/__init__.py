"""The model: config, decoder block, routing, thinking layers, causal LM. PyTorch and transformers only."""

from transformers import AutoConfig, AutoModelForCausalLM

from itt_composer.model.block import DecoderBlock
from itt_composer.model.causal_lm import ITTForCausalLM
from itt_composer.model.config import ITTConfig
from itt_composer.model.elastic import checked_ratios, thinking_setting
from itt_composer.model.residual_scale import ResidualScaleLayer
from itt_composer.model.thinking import ITTLayer, LoopLayer, RoutingRecord, thinking_layers

__all__ = [
    'DecoderBlock',
    'ITTConfig',
    'ITTForCausalLM',
    'ITTLayer',
    'LoopLayer',
    'ResidualScaleLayer',
    'RoutingRecord',
    'checked_ratios',
    'thinking_layers',
    'thinking_setting',
]

AutoConfig.register('itt', ITTConfig)
AutoModelForCausalLM.register(ITTConfig, ITTForCausalLM)
