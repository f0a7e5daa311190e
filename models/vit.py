"""ViT, the vision transformer (Dosovitskiy et al. 2021): a convolution makes patches, a class token reads them, pre-norm."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """A size of the network and of its example inputs. The learned positions fix the image's size."""

    dim: int
    depth: int
    num_heads: int
    patch: int
    num_classes: int
    height: int
    width: int
    batch: int = 1

    INPUT_SIZES = ("batch", "height", "width")

    def __post_init__(self):
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(f"height={self.height} and width={self.width} must be multiples of the patch, {self.patch}")


SIZES = {
    "tiny": Config(dim=64, depth=2, num_heads=4, patch=8, num_classes=10, height=32, width=32),
    "small": Config(dim=384, depth=12, num_heads=6, patch=16, num_classes=1000, height=224, width=224),  # ViT-S/16
    "base": Config(dim=768, depth=12, num_heads=12, patch=16, num_classes=1000, height=224, width=224),  # ViT-B/16
}


class Attention(nn.Module):
    """Self-attention: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, heads, D]
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), four times wider inside: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each: [B, 3, H, W] -> [B, (H / patch) * (W / patch), dim]."""

    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Classifies an image.

    forward(image):
        image: [B, 3, H, W], normalised colours.
    Returns: [B, num_classes], logits.
    """

    def __init__(self, config: Config):
        super().__init__()
        num_patches = (config.height // config.patch) * (config.width // config.patch)
        self.patch_embed = PatchEmbed(config.dim, config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, config.dim))
        self.blocks = nn.ModuleList(Block(config.dim, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.num_classes)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def example_inputs(config: Config) -> tuple[tuple, dict]:
    return (torch.randn(config.batch, 3, config.height, config.width),), {}
