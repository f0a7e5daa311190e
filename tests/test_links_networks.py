"""The table on whole captured networks: every link of every op holds on random slices, static and with dynamic sizes."""

import operator
import random

import pytest
import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from graphwright.ir.links import Refusal, Tag, backward, forward, kind, localize
from graphwright.ir.links.probe import check_links

WITHOUT = "needs {0} to build the network: pip install {0}"


pytestmark = pytest.mark.usefixtures("one_thread")


class FirstOutput(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return tree_leaves(self.model(**inputs))[0]


def captured(model, inputs, dynamic_shapes=None):
    with torch.no_grad():
        program = torch.export.export(FirstOutput(model.eval()), (inputs,), dynamic_shapes=dynamic_shapes)
    return program.run_decompositions({})


def values_of(program, inputs):
    """What every node of the program computes: node -> value."""
    values = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            values[node] = super().run_node(node)
            return values[node]

    with torch.no_grad():
        Recorder(program.graph_module).run(*program._graph_module_flat_inputs((inputs,), {}))
    return values


def calls(program):
    """Nodes that compute tensors."""
    for node in program.graph_module.graph.nodes:
        if node.op == "call_function" and any(isinstance(v, torch.Tensor) for v in tree_leaves(node.meta.get("val"))):
            yield node


def llama():
    transformers = pytest.importorskip("transformers", reason=WITHOUT.format("transformers"))
    config = transformers.LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                                      intermediate_size=32, vocab_size=30, use_cache=False)  # fmt: skip
    return transformers.LlamaModel(config), {"input_ids": torch.randint(0, 30, (2, 6))}


def swin():
    transformers = pytest.importorskip("transformers", reason=WITHOUT.format("transformers"))
    config = transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4)
    return transformers.SwinModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def unet():
    diffusers = pytest.importorskip("diffusers", reason=WITHOUT.format("diffusers"))
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(3), "encoder_hidden_states": torch.randn(2, 5, 8)}


@pytest.mark.parametrize("network", [llama, swin, unet])
def test_every_link_of_a_network_holds(network):
    torch.manual_seed(0)
    model, inputs = network()
    program = captured(model, inputs)
    values, rng, slices, rowless = values_of(program, inputs), random.Random(0), 0, set()
    for node in calls(program):
        with torch.no_grad():
            # The networks compute in float32; 1e-5 of the largest value is a few hundred of its rounding steps.
            report = check_links(node, values, rng, tolerance=1e-5, converse=False, contents="empty" not in str(node.target))
        slices += report.slices
        rowless |= {str(node.target) for refusal in report.refusals if refusal.reason == "no-row"}
    assert not rowless
    assert slices > 200


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward with views in both directions. x [B, L, 16]."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x):
        b, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, length, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(b, 1, length, length)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(b, length, 16))
        gate, value = self.up(x.reshape(b * length, 16)).chunk(2, dim=-1)
        return x + self.down(nn.functional.gelu(gate) * value).view(b, length, 16)


def concrete(size, symbols):
    """The value of a size when the symbols have these values."""
    if not isinstance(size, torch.SymInt):
        return size
    return int(size.node.expr.subs(symbols))


@pytest.mark.parametrize("batch, length", [(2, 3), (3, 8), (5, 4)])
def test_one_answer_holds_for_all_values_of_the_symbols(batch, length):
    torch.manual_seed(0)
    b, s = torch.export.Dim("b", min=2, max=64), torch.export.Dim("s", min=2, max=64)
    program = captured(Block().double(), {"x": torch.randn(4, 6, 16, dtype=torch.float64)}, ({"x": {0: b, 1: s}},))
    inputs = {"x": torch.randn(batch, length, 16, dtype=torch.float64)}
    values, rng, compared = values_of(program, inputs), random.Random(0), 0
    (x,) = (
        n for n in program.graph_module.graph.nodes if n.op == "placeholder" and n.meta["val"].shape[-1] == 16 and n.meta["val"].dim() == 3
    )
    symbols = dict(zip((size.node.expr for size in x.meta["val"].shape[:2]), (batch, length)))
    env = x.meta["val"].shape[0].node.shape_env
    guards = len(env.guards)
    for node in calls(program):
        if node.target is operator.getitem or not isinstance(values[node], torch.Tensor):
            continue
        for dim, units in enumerate(node.meta["val"].shape):
            tag = Tag(dim)
            tags = backward(node, tag, units)
            if isinstance(tags, Refusal) or not any(tags.values()):
                continue
            n = concrete(units, symbols)
            start, stop = sorted(rng.sample(range(n + 1), 2))
            local = localize(node, tag, units)
            sliced = {}
            for slot, operand_tag in tags.items():
                if operand_tag is not None:
                    m = concrete(operand_tag.unit, symbols)
                    sliced[slot.node] = values[slot.node].narrow(operand_tag.dim, start * m, (stop - start) * m)
            args, kwargs = fx.node.map_arg((local.args, local.kwargs), lambda n, own=sliced: own.get(n, values.get(n)))
            args = tree_map_only(torch.SymInt, lambda size: concrete(size, symbols), args)
            part = local.target(*args, **kwargs)
            torch.testing.assert_close(part, values[node].narrow(dim, start, stop - start), rtol=0, atol=1e-12, msg=node.format_node())
            compared += 1
    assert compared > 40
    assert len(env.guards) == guards


def test_a_symbolic_token_axis_goes_through_the_block():
    b, s = torch.export.Dim("b", min=2, max=64), torch.export.Dim("s", min=2, max=64)
    program = captured(Block(), {"x": torch.randn(4, 6, 16)}, ({"x": {0: b, 1: s}},))
    attention = next(n for n in calls(program) if "scaled_dot_product" in str(n.target))
    length = attention.meta["val"].shape[2]
    tags = list(backward(attention, Tag(2), length).values())
    assert tags == [Tag(2), None, None, Tag(2)] and kind(attention, Tag(2)) == "query"
    node, tag = attention, Tag(2)
    while len(users := [u for u in node.users if u.op == "call_function"]) == 1 and "linear" not in str(users[0].target):
        node, (tag, previous) = users[0], (forward(users[0], node, tag, length), tag)
        assert tag == Tag(1) or tag == Tag(2), (node, previous, tag)
    assert tag == Tag(1)
