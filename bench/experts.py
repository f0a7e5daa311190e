"""`regroup-experts` on a CPU against transformers' own implementations: a block of a mixture of experts, router included; cases are named
dtype, experts, experts a token, tokens.

64 experts [512, 256] with 8 a token (Qwen3-MoE's block), 8 experts [512, 1024] with 2 a token and 4 with 2 (Mixtral's), random weights.
Ours is `gw.compile(block, "regroup-experts")`. Peers are the block with `eager` (a loop over the experts that were hit), `grouped_mm` and
`batched_mm`, which copies the weights of each token's experts and so is left out where that is more than 1 GiB; and where tokens choose
half of the experts, `dense`, which runs all on each token. Below 1 is better.

Cases "expert choice" are the block of 64 experts after `expert-choice`, which makes another function of it, beside the block without: as
many pairs of token and expert, and so as many FLOPs. They have their backend in their name.

    python bench/experts.py [--quick] [--json FILE]
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import Bench
from torch import Tensor, nn

import graphwright as gw

PEERS = ("eager", "grouped_mm", "batched_mm", "dense")
SAME = "regroup-experts"  # tokens choose
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
TOKENS = (512, 64, 1)
MANY, FEW, FEWEST = (64, 8, 512, 256), (8, 2, 512, 1024), (4, 2, 512, 1024)  # experts, experts a token, width, width of an expert
CHOOSING = (64, 512, 2048)
COPIES = 2**30  # bytes


def main() -> None:
    bench = Bench("experts", dict.fromkeys([*PEERS, SAME], "transformers"))
    torch.manual_seed(0)
    register_dense()
    with torch.no_grad():
        for dtype in DTYPES:
            for sizes, tokens in _cases(bench.quick):
                measure(bench, dtype, sizes, tokens)
            for tokens in [512] if bench.quick else CHOOSING:
                for backend in ("aten", "tuned"):
                    measure_choice(bench, dtype, tokens, backend)
    bench.finish()


def _cases(quick: bool) -> list[tuple[tuple[int, int, int, int], int]]:
    return [(MANY, 512), (FEW, 1), (FEWEST, 16)] if quick else [(sizes, n) for sizes in (MANY, FEW, FEWEST) for n in TOKENS]


def measure(bench: Bench, dtype: str, sizes: tuple[int, int, int, int], tokens: int) -> None:
    experts, k, width, inner = sizes
    block, config = block_of(*sizes)
    block = block.to(DTYPES[dtype])
    x = torch.randn(1, tokens, width).to(DTYPES[dtype])
    compiled = gw.compile(block, "regroup-experts", example_inputs=(x,))
    (report,) = (each for each in compiled.report().passes if each.spelling == "regroup-experts")
    assert report.data == {"regrouped": 1}, report
    copied = 3 * tokens * k * width * inner * DTYPES[dtype].itemsize
    unfit = {"batched_mm": copied > COPIES, "dense": experts > 2 * k}
    peers = {form: call_of(block, config, form, x) for form in PEERS if not unfit.get(form)}
    bench.time(f"{dtype}, {experts}, {k}, {tokens}", lambda: compiled(x), peers)


def measure_choice(bench: Bench, dtype: str, tokens: int, backend: str) -> None:
    block, _ = block_of(*MANY)
    block = block.to(DTYPES[dtype])
    x = torch.randn(1, tokens, MANY[2]).to(DTYPES[dtype])
    # A block alone has no attention that shows whether it looks both ways.
    choice = gw.ExpertChoice(allow_noncausal=True)
    ours, same = (gw.compile(block, ["regroup-experts", *more], example_inputs=(x,), backend=backend) for more in ([choice], []))
    (figures,) = ours.report().passes[-1].data["expert_choice"]
    assert figures["flops"] == figures["flops_before"], figures
    bench.time(f"expert choice, {backend}, {dtype}, 64, 8, {tokens}", lambda: ours(x), {SAME: lambda: same(x)})


def block_of(experts: int, k: int, width: int, inner: int) -> tuple[nn.Module, Any]:
    """Mixtral's block where there are few experts, else Qwen3-MoE's, and the config by which it chooses its implementation."""
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    if experts <= FEW[0]:
        config: Any = MixtralConfig(hidden_size=width, intermediate_size=inner, num_local_experts=experts, num_experts_per_tok=k)
        block: nn.Module = MixtralSparseMoeBlock(config)
    else:
        config = Qwen3MoeConfig(hidden_size=width, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=k)
        block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        parameter.normal_(0, parameter.size(-1) ** -0.5)
    return block.eval(), config


def dense(layer: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Experts of transformers, each on every token."""
    gates = torch.zeros(len(x), layer.gate_up_proj.size(0), dtype=weight.dtype).scatter(1, index, weight)
    gate, up = torch.matmul(x, layer.gate_up_proj.transpose(1, 2)).chunk(2, -1)
    each = torch.matmul(layer.act_fn(gate) * up, layer.down_proj.transpose(1, 2))
    return (each * gates.t().unsqueeze(-1)).sum(0).to(x.dtype)


def register_dense() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("dense", dense)


def call_of(block: nn.Module, config: Any, form: str, x: Tensor) -> Callable[[], object]:
    def call() -> object:
        config._experts_implementation = form
        return block(x)

    return call


if __name__ == "__main__":
    main()
