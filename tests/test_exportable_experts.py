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
