"""Small networks with one way each of making a linear layer's input, for tests of smoothing and quantization."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

K = 32


class AfterLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.q_proj, self.k_proj = nn.LayerNorm(K), nn.Linear(K, 24), nn.Linear(K, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([self.q_proj(y), self.k_proj(y)], -1)


class AfterRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.RMSNorm(K), nn.Linear(K, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x).reshape(-1, K))


class AfterSpelledNorm(nn.Module):
    """RMSNorm as transformers' Llama spells it."""

    def __init__(self):
        super().__init__()
        self.gain, self.fc = nn.Parameter(torch.rand(K) + 0.5), nn.Linear(K, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))


class AfterLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(K, K), nn.Linear(K, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Modulated(nn.Module):
    """adaLN with one linear layer for shift, scale and gate."""

    def __init__(self):
        super().__init__()
        self.norm, self.modulation, self.fc = nn.LayerNorm(K, elementwise_affine=False), nn.Linear(K, 3 * K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(x.mean(1))).chunk(3, -1)
        return x + gate[:, None] * self.fc(self.norm(x) * (1 + scale[:, None]) + shift[:, None])


class ScaledAsAWhole(nn.Module):
    """A shift for each channel beside one scale for all of them: their rows cannot carry the same factors."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale, self.fc = nn.LayerNorm(K, elementwise_affine=False), nn.Linear(K, 1), nn.Linear(K, K)
        self.shift = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        c = F.silu(x.mean(1, keepdim=True))
        return self.fc(self.norm(x) * (1 + self.scale(c).expand(-1, -1, K)) + self.shift(c))


class ScaledByPlace(nn.Module):
    """The scale is one number for each place, broadcast over channels."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale, self.fc = nn.LayerNorm(K, elementwise_affine=False), nn.Linear(K, 1), nn.Linear(K, K)
        self.shift = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x) * (1 + self.scale(x)) + self.shift(x))


class GroupScale(nn.Module):
    """Four scales, each for eight channels, beside a shift for each."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale, self.fc = nn.LayerNorm(K, elementwise_affine=False), nn.Linear(K, 4), nn.Linear(K, K)
        self.shift = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        c = F.silu(x.mean(1, keepdim=True))
        scale = self.scale(c).unsqueeze(-1).expand(-1, -1, 4, 8).flatten(2)
        return self.fc(self.norm(x) * (1 + scale) + self.shift(c))


class GatedScale(nn.Module):
    """The scale is a product: 1 + g s has no form in which s alone carries factors."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale, self.fc = nn.LayerNorm(K, elementwise_affine=False), nn.Linear(K, K), nn.Linear(K, K)
        self.shift = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        c = F.silu(x.mean(1, keepdim=True))
        return self.fc(self.norm(x) * (1 + torch.tanh(c) * self.scale(c)) + self.shift(c))


class SplitTokens(nn.Module):
    """Two parts of a product, by tokens: both show all of its channels."""

    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.first(x).split([2, 4], 1)
        return torch.cat([self.fc(one), other], 1)


class SplitBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.first(x).chunk(2)
        return other + self.fc(one)


class FusedSwiGLU(nn.Module):
    """Gate and up as the two halves of one layer."""

    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(K, 128), nn.Linear(64, K)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class SpelledAttention(nn.Module):
    """Attention as two products and a softmax."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(K, K) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Attention(nn.Module):
    """Four query heads on two heads of keys; the output projection reads attention's values."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(K, K), nn.Linear(K, K // 2), nn.Linear(K, K // 2), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(K, 64), nn.Linear(K, 64), nn.Linear(64, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class AfterGELU(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(K, 64), nn.Linear(64, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ReadTwice(nn.Module):
    """The norm's result is a residual too, so nothing can be folded into it."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.fc(y)


class Joined(nn.Module):
    """A layer that reads a concatenation, as FLUX's single blocks do."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.proj = nn.Linear(K, K), nn.Linear(K, 64), nn.Linear(K + 64, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([self.left(x), F.gelu(self.right(x))], -1))


class SharedContext(nn.Module):
    """Two blocks whose second reads what the first does, beside what the first gave, as cross-attention reads one text."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(K, K) for name in ("q", "context", "out")}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        context = x
        for block in self.blocks:
            x = x + block["out"](F.gelu(block["q"](x) + block["context"](context)))
        return x


class Conv1D(nn.Module):
    """addmm on a weight stored [K, N], as transformers' GPT-2 has it."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(K, 24) / 6), nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, K), self.weight).view(*x.shape[:-1], 24)


FOLDED = {
    AfterLayerNorm: "layer_norm",
    AfterRMSNorm: "rms_norm",
    AfterSpelledNorm: "mul",
    AfterLinear: "linear",
    Modulated: "linear",
    Attention: "linear",
    SwiGLU: "linear",
    FusedSwiGLU: "linear",
    SpelledAttention: "linear",
}
MULTIPLIED = (AfterGELU, ReadTwice, Conv1D, ScaledAsAWhole, ScaledByPlace, GroupScale, GatedScale, SplitTokens, SplitBatch)
ALL = (*FOLDED, *MULTIPLIED, Joined)
ONE_SITE = (AfterLayerNorm, AfterRMSNorm, AfterSpelledNorm, ReadTwice, Conv1D)


def made(network: type[nn.Module], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor], list[tuple[Tensor]]]:
    """The network with random weights, an input with outliers in some channels, and calibration inputs of their kind."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = network().to(dtype).eval()
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, dtype=dtype)
    scale = torch.ones(K, dtype=dtype)
    scale[torch.tensor([3, 17])] = 20

    def draw() -> tuple[Tensor]:
        return (torch.randn(2, 6, K, generator=generator).to(dtype) * scale,)

    return module, draw(), [draw() for _ in range(3)]
