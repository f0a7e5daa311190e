"""Capture of mixtures of experts of transformers: in whatever form they run, with the user's model as it was afterwards."""

import pytest
import torch

import graphwright as gw
from graphwright.ir.exportable_experts import exportable_experts
from graphwright.ir.float64 import to_float64
from graphwright.ir.run import run
from graphwright.tests import moe_models
from graphwright.tests.moe_models import tokens_of

TOKENS = tokens_of()
OPTIONS = {"use_cache": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["eager", "grouped_mm", "batched_mm"])
def test_a_model_is_captured_whatever_the_form_of_its_experts(form, dtype):
    model = moe_models.TRANSFORMERS["qwen3"](dtype, form)
    program = gw.capture(model, (TOKENS,), OPTIONS)
    assert model.config._experts_implementation == form
    assert ("grouped_mm" in str(program)) == (form != "batched_mm")
    # The forms multiply the same numbers; bfloat16 is rounded at 8 bits in each of two layers.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(run(program, [TOKENS, False])[0][0], model(TOKENS, **OPTIONS).logits, atol=tolerance, rtol=tolerance)
    wide = run(to_float64(program), [TOKENS, False])[0][0]
    model.set_experts_implementation("eager")  # torch's grouped products have no float64
    torch.testing.assert_close(wide, model.double()(TOKENS, **OPTIONS).logits, atol=tolerance, rtol=tolerance)


def test_eager_experts_whose_rows_are_not_aligned_are_captured_as_batched_products():
    block = moe_models.TRANSFORMERS["mixtral"](torch.bfloat16, "eager").model.layers[0].mlp
    block.experts.gate_up_proj = torch.nn.Parameter(torch.randn(4, 42, 32, dtype=torch.bfloat16) / 5)
    block.experts.down_proj = torch.nn.Parameter(torch.randn(4, 32, 21, dtype=torch.bfloat16) / 5)
    x = torch.randn(1, 5, 32, dtype=torch.bfloat16)
    program = gw.capture(block, (x,))
    assert "aten.bmm" in str(program)
    torch.testing.assert_close(run(program, [x])[0][0], block(x), atol=2e-2, rtol=2e-2)


def test_configs_are_restored_after_an_error_and_those_inside_others_keep_their_own_form():
    class Config:
        sub_configs = {"text": None}

        def __init__(self, form, text=None):
            self.form, self.text = form, text

        @property
        def _experts_implementation(self):
            return self.form

        @_experts_implementation.setter
        def _experts_implementation(self, form):  # as transformers' own, it sets what it holds too
            self.form = form
            if self.text is not None:
                self.text._experts_implementation = form

    model = torch.nn.Module()
    model.config = Config("eager", Config("batched_mm"))
    with pytest.raises(KeyError), exportable_experts(model):
        assert model.config.form == "grouped_mm"
        raise KeyError
    assert (model.config.form, model.config.text.form) == ("eager", "batched_mm")


def test_a_model_without_experts_is_left_alone():
    model = torch.nn.Linear(3, 3)
    with exportable_experts(model):
        assert not hasattr(model, "config")


# --- loops that no export takes --------------------------------------------------------------------------------------------


class Loop(torch.nn.Module):
    """Experts one by one, on the tokens that chose them; `asks` says whether there are any of one, in the way of its name."""

    def __init__(self, asks, attribute="experts"):
        super().__init__()
        self.asks, self.attribute = asks, attribute
        self.router = torch.nn.Linear(8, 4)
        setattr(self, attribute, torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4)))

    def forward(self, x):
        weight, index = self.router(x).softmax(-1).topk(2)
        experts, y = getattr(self, self.attribute), torch.zeros_like(x)
        for expert in self.hit(index):
            rows, choice = torch.where(index == expert)
            if self.asks == "rows" and len(rows) == 0:
                continue
            y = y.index_add(0, rows, experts[expert](x[rows]) * weight[rows, choice, None])
        return y

    def hit(self, index):
        if self.asks == "list":
            return index.unique().tolist()
        return [expert for expert in range(4) if self.asks != "any" or bool((index == expert).any())]


class Stacked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(torch.randn(4, 8, 8)) for _ in range(2))

    def forward(self, x):
        index = x.argmax(-1) % 4
        for expert in index.unique().tolist():
            x = x + (index == expert).unsqueeze(-1) * (x @ self.first[expert] @ self.second[expert])
        return x


class NamedExperts(torch.nn.ModuleDict):
    """As SwitchTransformers has them."""

    def __init__(self):
        super().__init__({f"expert_{number}": torch.nn.Linear(8, 8) for number in range(4)})

    def forward(self, x):
        index = x.argmax(-1) % 4
        for expert in index.unique().tolist():
            x = x + (index == expert).unsqueeze(-1) * self[f"expert_{expert}"](x)
        return x


@pytest.mark.parametrize(
    "model",
    [Loop("rows"), Loop("any"), Loop("list"), Stacked(), NamedExperts()],
    ids=["rows", "any", "list", "stacked", "named"],
)
def test_loops_over_experts_that_data_decides_are_told_what_to_do(model):
    with pytest.raises(gw.CaptureError) as raised:
        gw.capture(model, (torch.randn(6, 8),))
    text = str(raised.value)
    assert "test_exportable_experts.py:" in text
    assert f"{type(model).__name__} decides by data which of its experts run: run them all" in text and "torch.bmm" in text


def test_what_they_are_told_to_do_is_captured():
    model, x = Loop("nothing").eval(), torch.randn(6, 8)
    torch.testing.assert_close(run(gw.capture(model, (x,)), [x])[0][0], model(x), rtol=1e-6, atol=1e-6)


def test_a_router_that_is_converted_in_forward_is_named():
    class Converted(torch.nn.Module):
        """As SwitchTransformers and NllbMoe have it."""

        def __init__(self):
            super().__init__()
            self.router = torch.nn.Linear(8, 4)

        def forward(self, x):
            self.router = self.router.to(torch.float64)
            return self.router(x.double())

    with pytest.raises(gw.CaptureError, match="a layer is converted to another dtype or device in forward: convert it before"):
        gw.capture(Converted(), (torch.randn(6, 8),))


def test_loops_over_other_layers_are_told_what_all_control_flow_is_told():
    with pytest.raises(gw.CaptureError, match="control flow depends on tensor values: use torch.where, or make the value an input"):
        gw.capture(Loop("rows", attribute="layers"), (torch.randn(6, 8),))


def test_experts_of_transformers_in_a_form_of_the_users_own_are_told_of_the_others():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def one_by_one(self, hidden, index, weight):
        y = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            y = y + hidden * self.down_proj[expert].sum()
        return y

    ALL_EXPERTS_FUNCTIONS.register("one_by_one", one_by_one)
    model = moe_models.TRANSFORMERS["mixtral"](torch.float32, "one_by_one")
    with pytest.raises(gw.CaptureError, match=r"in a form of its own: choose one .* model.set_experts_implementation\('grouped_mm'\)"):
        gw.capture(model, (TOKENS,), OPTIONS)


def test_rows_of_as_many_experts_as_data_says_are_named():
    import transformers

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "kv_channels": 8,
        "intermediate_size": 24,
        "vocab_size": 64,
    }
    config = transformers.JetMoeConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(
        gw.CaptureError, match="a size depends on tensor values in a way that cannot be followed, as numbers of rows that exp"
    ):
        gw.capture(transformers.JetMoeForCausalLM(config).eval(), (TOKENS,), OPTIONS)
