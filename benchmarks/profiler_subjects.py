"""Ten models for profilers to count: random weights, published sizes, inputs small enough for two cores of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MobileNetV2Config,
    MobileNetV2Model,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

#: A model and the arguments of its call.
Subject = tuple[nn.Module, dict[str, Any]]

_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def _ids(batch: int, length: int, toy: bool) -> Tensor:
    return torch.arange(2 * 9 if toy else batch * length).reshape(2 if toy else batch, -1) % 30 + 2


def _image(toy: bool) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, 64, 64) if toy else torch.randn(1, 3, 224, 224)}


def bert(toy: bool) -> Subject:
    """BERT-base, a sequence of 128 tokens."""
    config = BertConfig(**_SMALL, vocab_size=64) if toy else BertConfig()
    return BertModel._from_config(config, attn_implementation="sdpa"), {"input_ids": _ids(1, 128, toy)}


def gpt2(toy: bool) -> Subject:
    """GPT-2, 124 M parameters, a sequence of 128 tokens."""
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    config = GPT2Config(**small if toy else {}, use_cache=False)
    return GPT2LMHeadModel._from_config(config, attn_implementation="sdpa"), {"input_ids": _ids(1, 128, toy)}


def llama(toy: bool) -> Subject:
    """A Llama of SmolLM2's sizes (135 M parameters; 9 heads share 3 keys), a sequence of 128 tokens."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    chosen = {**_SMALL, "num_key_value_heads": 2} if toy else {**sizes, "num_key_value_heads": 3}
    config = LlamaConfig(**chosen, vocab_size=64 if toy else 49152, use_cache=False)
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa"), {"input_ids": _ids(1, 128, toy)}


def vit(toy: bool) -> Subject:
    """ViT-B/16, an image of 224 x 224."""
    config = ViTConfig(**_SMALL, image_size=64) if toy else ViTConfig()
    return ViTModel._from_config(config, attn_implementation="sdpa"), _image(toy)


def t5(toy: bool) -> Subject:
    """T5-small: 128 tokens for the encoder, 64 for the decoder."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4} if toy else {}
    config = T5Config(**sizes, num_layers=2 if toy else 6, vocab_size=64 if toy else 32128, use_cache=False)
    return T5ForConditionalGeneration(config), {"input_ids": _ids(1, 128, toy), "decoder_input_ids": _ids(1, 64, toy)}


def resnet(toy: bool) -> Subject:
    """ResNet-50, an image of 224 x 224."""
    small = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}
    return ResNetModel(ResNetConfig(**small if toy else {})), _image(toy)


def mobilenet(toy: bool) -> Subject:
    """MobileNetV2, whose middle convolutions have a group for each channel; an image of 224 x 224."""
    return MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.25 if toy else 1.0)), _image(toy)


def mixtral(toy: bool) -> Subject:
    """A small Mixtral: 4 layers, 512 wide, 8 experts of which each token takes 2; a sequence of 128 tokens."""
    sizes = {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 4, "num_attention_heads": 8}
    chosen = {**(_SMALL if toy else sizes), "num_key_value_heads": 2, "num_local_experts": 8}
    config = MixtralConfig(**chosen, vocab_size=64 if toy else 32000, use_cache=False)
    return MixtralForCausalLM._from_config(config, attn_implementation="sdpa"), {"input_ids": _ids(1, 128, toy)}


class UNet(nn.Module):
    """One level of a U-Net as in latent diffusion (Rombach et al. 2022): down, attention, up with a skip; group norms
    and an embedded time."""

    def __init__(self, channels: int, time: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, channels, 3, padding=1), nn.Conv2d(2 * channels, 4, 3, padding=1)
        self.time = nn.Linear(time, channels)
        self.norm, self.middle_norm = nn.GroupNorm(8, channels), nn.GroupNorm(8, 2 * channels)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.project, self.out = nn.Linear(2 * channels, 6 * channels), nn.Linear(2 * channels, 2 * channels)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        """``image``: [batch, 4, height, width], even; ``time``: [batch, size of its embedding]."""
        entered = F.silu(self.norm(self.enter(image)) + self.time(time)[:, :, None, None])
        low = self.down(entered)
        rows = self.middle_norm(low).flatten(2).transpose(1, 2)
        heads = self.project(rows).unflatten(2, (3, 8, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        low = low + self.out(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(low.shape)
        found: Tensor = self.leave(torch.cat([self.up(low), entered], 1))
        return found


def unet(toy: bool) -> Subject:
    """A block of 320 channels over 64 x 64, 640 over 32 x 32."""
    channels, time, side = (16, 8, 8) if toy else (320, 1280, 64)
    return UNet(channels, time), {"image": torch.randn(1, 4, side, side), "time": torch.randn(1, time)}


class Recurrent(nn.Module):
    """A language model of two LSTM layers (Zaremba et al. 2014)."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids``: [batch, length]."""
        found: Tensor = self.head(self.lstm(self.embedding(ids))[0])
        return found


def lstm(toy: bool) -> Subject:
    """Their medium model: 650 wide, 10,000 words; 20 sequences of 35."""
    return Recurrent(64, 32) if toy else Recurrent(10_000, 650), {"ids": _ids(20, 35, toy)}


SUBJECTS: dict[str, Callable[[bool], Subject]] = {
    "bert-base": bert,
    "gpt2": gpt2,
    "llama-135m": llama,
    "vit-b16": vit,
    "t5-small": t5,
    "resnet-50": resnet,
    "unet-block": unet,
    "lstm": lstm,
    "mixtral-small": mixtral,
    "mobilenet-v2": mobilenet,
}
