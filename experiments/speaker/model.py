"""A speaker embedding on a Whisper encoder, its loss, and the ways to adapt the encoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssvd_kernels as sk

HEAD_LR = 3e-4  # chosen as Method.lr was
TARGETS = ["q_proj", "k_proj"]  # as in SpectralFT's experiment


def statistics(hidden: Tensor, frames: Tensor) -> Tensor:
    """Mean and standard deviation (B, 2 d) of hidden (B, T, d) over the first frames (B,) of each row."""
    mask = (torch.arange(hidden.shape[1], device=hidden.device) < frames[:, None]).unsqueeze(-1)
    mean = (hidden * mask).sum(1) / frames[:, None]
    variance = ((hidden - mean[:, None]).square() * mask).sum(1) / frames[:, None]
    return torch.cat([mean, (variance + 1e-6).sqrt()], dim=-1)


class SpeakerEncoder(nn.Module):
    """Weighted sum of all layers (softmax weights, at first equal) -> mean and deviation over time -> 2 d numbers.

    The 2 d statistics are standardised by those of training speech in the encoder as it came (`calibrate`) and then
    projected, at first by the identity: training starts from the untrained statistics.
    """

    def __init__(self, encoder: nn.Module, layers: int, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.layer_weights = nn.Parameter(torch.zeros(layers))
        self.projection = nn.Linear(2 * width, 2 * width, bias=False)
        nn.init.eye_(self.projection.weight)
        self.center: Tensor
        self.spread: Tensor
        self.register_buffer("center", torch.zeros(2 * width))
        self.register_buffer("spread", torch.ones(2 * width))

    def pooled(self, features: Tensor, frames: Tensor) -> Tensor:
        """The statistics (B, 2 d) before the projection; features (B, mels, 2 T) log-mel, frames (B,) up to T."""
        hidden = self.encoder(features, output_hidden_states=True).hidden_states
        weighted = torch.stack(hidden, dim=-1) @ self.layer_weights.softmax(0)
        return self.standardised(statistics(weighted, frames))

    def standardised(self, pooled: Tensor) -> Tensor:
        """Statistics (..., 2 d) as `calibrate` wants them: unchanged before it was called."""
        return (pooled - self.center) / self.spread

    def calibrate(self, pooled: Tensor) -> None:
        """From now on subtracts the mean of pooled (N, 2 d), N > 1, and divides by its standard deviation."""
        self.center.copy_(pooled.mean(0))
        self.spread.copy_(pooled.std(0) + 1e-3)

    def forward(self, features: Tensor, frames: Tensor) -> Tensor:
        """Embeddings (B, 2 d), compared by their cosine."""
        return self.projection(self.pooled(features, frames))


class AAMSoftmax(nn.Module):
    """Additive angular margin (ArcFace, arXiv 1801.07698): cross-entropy of scale * cos(angle), the own angle + margin.

    Where angle + margin would pass pi, cos(angle) - margin * sin(margin) goes on falling in its place.
    centroids (classes, n): the classes' first directions, those of their mean embeddings before training.
    """

    def __init__(self, centroids: Tensor, margin: float = 0.2, scale: float = 30.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(centroids.clone())
        self.margin, self.scale = margin, scale

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(embeddings), F.normalize(self.weight))
        own = cosine.gather(1, labels[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
        further = (own.acos() + self.margin).cos()
        beyond = own < -math.cos(self.margin)
        shifted = torch.where(beyond, own - self.margin * math.sin(self.margin), further)
        return F.cross_entropy(self.scale * cosine.scatter(1, labels[:, None], shifted), labels)


@dataclass(frozen=True)
class Method:
    """How the encoder is adapted: `adapt` freezes it and makes its adapter trainable.

    lr: the adapter's learning rate (for "head" the head's, which all methods share), of those that `--tune` tries the
    one with the lowest EER on validation trials; see results/tune.csv.
    """

    title: str
    adapt: Callable[[nn.Module], object]
    lr: float


def _head_only(encoder: nn.Module) -> None:
    encoder.requires_grad_(False)


def _lora(encoder: nn.Module) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    encoder.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=27, lora_alpha=54, target_modules=TARGETS), encoder)


def _ssvd(encoder: nn.Module) -> None:
    sk.inject(encoder, sk.SSVDConfig(rank=202, targets=TARGETS), progress=False)


def _spectralft(encoder: nn.Module) -> None:
    sk.inject(encoder, sk.SpectralFTConfig(top=256, rank=16, targets=TARGETS), progress=False)


# ranks for as many parameters as SpectralFT's in a 384 x 384 layer: 2 (384 + 256) 16 = 20480
METHODS = {
    "head": Method("head only", _head_only, HEAD_LR),
    "spectralft": Method("SpectralFT, p = 256, r = 16", _spectralft, 1e-4),
    "ssvd": Method("SSVD, k = 202", _ssvd, 3e-5),
    "lora": Method("LoRA, r = 27", _lora, 3e-5),
}
