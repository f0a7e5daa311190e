"""Mixtures of experts at toy size with random weights: name -> a factory of a module of one dtype. `LAYERS` each.

Those of transformers are decoders, called with tokens and `use_cache=False`; those written by hand take tokens alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS = 2
VOCABULARY = 64
EXPERTS, CHOSEN, INNER, WIDTH = 4, 2, 24, 32
_TEXT = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": CHOSEN, "intermediate_size": INNER,
}  # fmt: skip


def _transformers(architecture: str, **settings: Any) -> Callable[..., nn.Module]:
    def make(dtype: torch.dtype = torch.float32, form: str | None = None) -> nn.Module:
        import transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = getattr(transformers, f"{architecture}Config")(**(_TEXT | settings))
            model = getattr(transformers, f"{architecture}ForCausalLM")(config)
        if form is not None:
            model.set_experts_implementation(form)
        return model.eval().to(dtype)

    return make


_QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "head_dim": 8}
TRANSFORMERS: dict[str, Callable[..., nn.Module]] = {
    "mixtral": _transformers("Mixtral", num_local_experts=EXPERTS),
    "qwen3": _transformers("Qwen3Moe", **_QWEN, norm_topk_prob=True),
    "qwen3 without renorm": _transformers("Qwen3Moe", **_QWEN, norm_topk_prob=False),
    "olmoe": _transformers("Olmoe", num_experts=EXPERTS),
}


class Dense(nn.Module):
    """Every expert on every token, weighted with what was scattered from the chosen ones."""

    def __init__(self, product: str = "matmul"):
        super().__init__()
        self.product = product
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / INNER**0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        probabilities = F.linear(tokens.float(), self.router.weight.float()).softmax(-1)
        weight, index = probabilities.topk(CHOSEN, -1)
        gates = torch.zeros_like(probabilities).scatter(1, index, weight)  # [T, E]
        if self.product == "bmm":
            both = torch.bmm(tokens.expand(EXPERTS, -1, -1), self.gate_up.transpose(1, 2))
            gate, up = both[..., :INNER], both[..., INNER:]
        else:
            gate, up = torch.matmul(tokens.unsqueeze(0), self.gate_up.transpose(1, 2)).chunk(2, -1)
        each = torch.matmul(F.silu(gate) * up, self.down.transpose(1, 2))  # [E, T, D]
        return (each * gates.t().unsqueeze(-1)).sum(0).to(x.dtype).reshape(x.shape)


class Listed(nn.Module):
    """Experts as modules in a list, each run on the tokens that chose it, as models of transformers 4 have them."""

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Listed.Expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        weight, index = self.router(tokens).softmax(-1).topk(CHOSEN, -1)
        hits = F.one_hot(index, EXPERTS).permute(2, 1, 0)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            choice, rows = torch.where(hits[number])
            y.index_add_(0, rows, expert(tokens[rows]) * weight[rows, choice, None])
        return y.reshape(x.shape)


class Written(nn.Module):
    """A network of residual blocks around mixtures."""

    def __init__(self, block: Callable[[], nn.Module], dtype: torch.dtype):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
            self.blocks = nn.ModuleList(block() for _ in range(LAYERS))
        self.eval().to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return x


WRITTEN: dict[str, Callable[..., nn.Module]] = {
    product: lambda dtype=torch.float32, product=product: Written(lambda: Dense(product), dtype) for product in ("matmul", "bmm")
}


def tokens_of(rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
