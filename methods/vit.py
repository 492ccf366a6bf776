"""MoCo v3's vision transformers (2104.02057), with timm's key names.

Fixed two-dimensional sine-cosine positions and, optionally, a frozen random patch projection, which makes training
stable (section 4), or a stem of convolutions (2106.14881) in its place. All follow facebookresearch/moco-v3 `vits.py`,
whose ViT-S has 12 heads, and whose transformers with such a stem have one block less.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from methods.norm import Norm
from methods.recompute import Recomputable

PATCH = 16
_STEM_LAYERS = 4  # of stride 2: PATCH in all


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))  # [B, heads, tokens, dim / heads]
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class _Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(Recomputable):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), _Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), _Mlp(dim)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Patches(nn.Module):
    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, tokens, dim]


def _convolutional_stem(dim: int, norm: Norm) -> nn.Sequential:
    """Return 3x3 convolutions of stride 2 to dim / 8, dim / 4, dim / 2 and dim channels, and a 1x1 convolution."""
    layers: list[nn.Module] = []
    n_in = 3
    for layer in range(_STEM_LAYERS):
        n_out = dim * 2**layer // 8
        layers += [nn.Conv2d(n_in, n_out, 3, 2, padding=1, bias=False), norm(n_out), nn.ReLU(inplace=True)]
        n_in = n_out
    return nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))


class VisionTransformer(nn.Module):
    """A ViT without its classifier: images [B, 3, size, size] to the class token [B, `features`].

    stop_grad_conv1: freeze the patch projection as initialized. conv_stem: a stem of convolutions instead, never
    frozen, whose BatchNorm layers `norm` makes.
    """

    transformer = True
    pos_embed: torch.Tensor

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        size: int = 224,
        stop_grad_conv1: bool = True,
        conv_stem: bool = False,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.features, self.size = dim, size
        self.patch_embed = _Patches(_convolutional_stem(dim, norm) if conv_stem else nn.Conv2d(3, dim, PATCH, PATCH))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("pos_embed", sine_cosine_positions(size // PATCH, dim))
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self._initialize()
        self.patch_embed.requires_grad_(conv_stem or not stop_grad_conv1)

    def _initialize(self) -> None:
        """Draw Xavier-uniform weights, query, key and value matrices separately; set biases to 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                rows = module.out_features // (3 if name.endswith("qkv") else 1)
                bound = math.sqrt(6 / (rows + module.in_features))
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)
        if isinstance(projection := self.patch_embed.proj, nn.Conv2d):  # a stem keeps torch's own weights, as there
            bound = math.sqrt(6 / (3 * PATCH**2 + self.features))
            nn.init.uniform_(projection.weight, -bound, bound)
            nn.init.zeros_(projection.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._tokens(x, self.pos_embed)[:, 0]

    def maps(self, x: torch.Tensor) -> torch.Tensor:
        """Return the patches' features [B, `features`, H / 16, W / 16] of images with sides of multiples of 16.

        Positions are interpolated for images of another size than the network's.
        """
        height, width = x.shape[2] // PATCH, x.shape[3] // PATCH
        tokens = self._tokens(x, positions_at(self.pos_embed, height, width))[:, 1:]
        return tokens.transpose(1, 2).reshape(len(x), self.features, height, width)

    def _tokens(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the class token and the patches after the last block, [B, 1 + patches, `features`]."""
        tokens = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1) + positions
        return self.norm(self.blocks(tokens))


def positions_at(positions: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return positions [1, 1 + height * width, dim] from positions [1, 1 + side^2, dim], bicubic as in DeiT."""
    side = math.isqrt(positions.shape[1] - 1)
    if (height, width) == (side, side):
        return positions
    grid = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # [1, dim, side, side]
    grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def sine_cosine_positions(side: int, dim: int) -> torch.Tensor:
    """Return positions of the class token (zeros) and of side x side patches, row by row: [1, 1 + side^2, dim].

    Four quarters: sines and cosines of one coordinate, then of the other, at dim / 4 frequencies from 1 down to nearly
    1/10000. As in moco-v3 the first half belongs to the patch's row.
    """
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    index = torch.arange(side, dtype=torch.float32)
    rows, columns = torch.meshgrid(index, index, indexing="ij")
    angles = [coordinate.flatten()[:, None] * frequency for coordinate in (rows, columns)]  # [side^2, dim / 4]
    positions = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim), positions])[None]


class Shape(NamedTuple):
    """Shape of a transformer."""

    dim: int
    depth: int
    heads: int
    conv_stem: bool = False


VITS = {
    "vit_tiny": Shape(192, 12, 3),
    "vit_small": Shape(384, 12, 12),
    "vit_base": Shape(768, 12, 12),
    "vit_large": Shape(1024, 24, 16),
    "vit_conv_small": Shape(384, 11, 12, conv_stem=True),
    "vit_conv_base": Shape(768, 11, 12, conv_stem=True),
}


def vit(arch: str, *, size: int = 224, stop_grad_conv1: bool = True, norm: Norm = nn.BatchNorm2d) -> VisionTransformer:
    """Return one of `VITS` for images of `size` pixels a side, a multiple of 16 (else ValueError)."""
    if size % PATCH:
        raise ValueError(f"data.size {size}: {arch} has patches of {PATCH} pixels: choose a multiple of {PATCH}")
    dim, depth, heads, conv_stem = VITS[arch]
    return VisionTransformer(
        dim, depth, heads, size=size, stop_grad_conv1=stop_grad_conv1, conv_stem=conv_stem, norm=norm
    )
