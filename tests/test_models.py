"""The zoo: every network runs, is a function of its seed, exports whole, and is the published architecture."""

import dataclasses
import functools

import pytest
import torch
from torch.export import Dim, export
from torch.utils._pytree import tree_map_only

from graphwright import models
from graphwright.ir.errors import InputError
from graphwright.models import decoder, moe_dlm, rat_lm, video_unet, video_unet_svd
from graphwright.models.random_weights import draw_weights

MILLION = 1_000_000

# What a published checkpoint of each holds, in millions: AnimateDiff on Stable Diffusion 1.5, Stable Video Diffusion, DiT-XL/2,
# Llama 3.2 1B, ViT-B/16, LLaDA-MoE 7B-A1B. RAT published no checkpoint: its hybrid of 1.3 billion with the vocabulary that we chose.
BASE_MILLIONS = {"video_unet": 1313, "video_unet_svd": 1525, "dit": 675, "decoder": 1236, "rat": 1292, "vit": 87, "moe_dlm": 7357}


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def cast(tree, dtype):
    """`tree` with its floating-point tensors in `dtype`."""
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def doubled(tree):
    return cast(tree, torch.float64)


@pytest.fixture(params=models.names())
def name(request):
    return request.param


@torch.no_grad()
def test_outputs_are_finite_and_of_the_order_of_one(name):
    module, args, kwargs = models.load(name, "tiny")
    output = module(*args, **kwargs)
    assert output.isfinite().all()
    assert 0.1 < output.std() < 10


def test_modules_come_in_eval_mode(name):
    module, _, _ = models.load(name, "tiny")
    assert not any(part.training for part in module.modules())


@torch.no_grad()
def test_one_seed_gives_one_network_and_another_gives_another(name):
    (first, args, kwargs), (again, again_args, _), (other, _, _) = (models.load(name, "tiny", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(args[0], again_args[0])
    assert torch.equal(first(*args, **kwargs), again(*args, **kwargs))
    assert not torch.equal(first(*args, **kwargs), other(*args, **kwargs))


def test_the_global_random_state_is_left_alone(name):
    before = torch.get_rng_state()
    models.load(name, "tiny", seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_every_parameter_matters(name):
    module, args, kwargs = models.load(name, "tiny")
    # in float64, where the gradient of a parameter without effect is rounding of about 1e-16
    output = module.double()(*doubled(args), **doubled(kwargs))
    output.square().sum().backward()
    without_effect = [key for key, parameter in module.named_parameters() if parameter.grad.abs().max() < 1e-9]
    assert without_effect == []


@torch.no_grad()
def test_double_precision_agrees_with_single(name):
    module, args, kwargs = models.load(name, "tiny")
    single = module(*args, **kwargs)
    double = module.double()(*doubled(args), **doubled(kwargs))
    assert double.dtype == torch.float64
    # some hundred float32 roundings (6e-8 each) of values up to a few units
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(name, dtype):
    module, args, kwargs = models.load(name, "tiny")
    output = module.to(dtype)(*cast(args, dtype), **cast(kwargs, dtype))
    assert output.dtype == dtype
    assert output.isfinite().all()


BATCH = {0: Dim("batch", max=64)}
TOKENS = ({0: Dim("batch", max=64), 1: Dim("length", max=4096)},)
DYNAMIC_SHAPES = {"decoder": TOKENS, "rat": TOKENS, "moe_dlm": (BATCH,), "vit": (BATCH,), "dit": (BATCH,) * 3}


@functools.cache  # an export takes seconds
@torch.no_grad()
def exported(name):
    module, args, kwargs = models.load(name, "tiny", batch=2)
    return export(module, args, kwargs, dynamic_shapes=DYNAMIC_SHAPES.get(name), strict=False).run_decompositions({})


@torch.no_grad()
def test_export_equals_eager(name):
    module, args, kwargs = models.load(name, "tiny", batch=2)
    assert torch.equal(exported(name).module()(*args, **kwargs), module(*args, **kwargs))


def test_export_keeps_composites_whole_and_mutates_nothing(name):
    targets = {str(node.target) for node in exported(name).graph.nodes if node.op == "call_function"}
    assert {"aten.linear.default", "aten.scaled_dot_product_attention.default"} <= targets
    assert targets & {"aten.layer_norm.default", "aten.rms_norm.default"}
    assert not [target for target in targets if target.rpartition(".")[0].endswith("_")], "in-place operations"


@torch.no_grad()
@pytest.mark.parametrize(
    ("network", "other_sizes"),
    [
        ("decoder", {"batch": 5, "length": 23}),
        ("rat", {"batch": 5, "length": 23}),
        ("vit", {"batch": 5}),
        ("dit", {"batch": 5}),
        ("moe_dlm", {"batch": 5}),
    ],
)
def test_dynamic_dims_serve_other_sizes(network, other_sizes):
    module, args, _ = models.load(network, "tiny", **other_sizes)
    # another batch may take another kernel of the same library, so equal up to rounding
    torch.testing.assert_close(exported(network).module()(*args), module(*args), rtol=1e-5, atol=1e-5)


def test_tiny_is_under_a_million_parameters(name):
    assert count_parameters(models.load(name, "tiny")[0]) < MILLION


def test_small_is_tens_of_millions_of_parameters(name):
    with torch.device("meta"):
        module, _, _ = models.load(name, "small")
    assert 10 * MILLION < count_parameters(module) < 50 * MILLION


def test_base_is_the_published_size(name):
    with torch.device("meta"):
        module, args, _ = models.load(name, "base")
    assert args[0].is_meta
    assert round(count_parameters(module) / MILLION) == BASE_MILLIONS[name]


@pytest.mark.parametrize(
    ("network", "sizes", "shape"),
    [
        ("video_unet", {"frames": 6, "height": 4, "width": 10, "batch": 2}, (2, 4, 6, 4, 10)),
        ("video_unet_svd", {"frames": 5, "height": 4, "width": 10, "batch": 2}, (2, 5, 4, 4, 10)),
        ("dit", {"length": 24, "batch": 3}, (3, 8, 8, 12)),
        ("decoder", {"length": 7, "batch": 3}, (3, 7, 256)),
        ("rat", {"length": 7, "batch": 3}, (3, 7, 256)),
        ("vit", {"height": 16, "width": 40, "batch": 3}, (3, 10)),
        ("moe_dlm", {"length": 7, "batch": 3}, (3, 7, 256)),
    ],
)
@torch.no_grad()
def test_input_sizes_can_be_chosen(network, sizes, shape):
    module, args, kwargs = models.load(network, "tiny", **sizes)
    assert module(*args, **kwargs).shape == shape


@torch.no_grad()
@pytest.mark.parametrize("name", ["decoder", "rat"])
def test_a_language_model_looks_at_no_later_token(name):
    module, (ids,), _ = models.load(name, "tiny")
    changed = torch.cat([ids[:, :10], 255 - ids[:, 10:]], dim=1)
    torch.testing.assert_close(module(ids)[:, :10], module(changed)[:, :10])


@torch.no_grad()
def test_a_rat_layer_is_gated_states_of_chunks_and_attention_over_them():
    module, _, _ = models.load("rat", "tiny")
    mixer, chunk, heads, width = module.layers[0].mixer.double(), 4, 4, 16
    x = torch.randn(1, 11, 64, dtype=torch.float64)
    z, v, gate, q, k = (x[0] @ mixer.in_proj.weight.T).split([64, 64, 64, 32, 32], dim=-1)
    turn = decoder.Rotation.of_positions(torch.arange(11).unsqueeze(0) // chunk, width, 10000.0, like=x)
    rotations = [decoder.Rotation(turn.cos[:, t], turn.sin[:, t]) for t in range(11)]
    expected = torch.zeros(11, 64, dtype=torch.float64)
    for head in range(heads):
        own, group = slice(head * width, (head + 1) * width), slice(head % 2 * width, (head % 2 + 1) * width)
        g, keys, values = (gate + mixer.gate_bias)[:, own].sigmoid(), [], []
        for t in range(11):
            if t % chunk == 0:
                key = value = torch.zeros(width, dtype=torch.float64)
            key, value = g[t] * key + (1 - g[t]) * k[t, group], g[t] * value + (1 - g[t]) * v[t, own]
            keys, values = [*keys, rotations[t].apply(key)[0]], [*values, value]
            seen = [*range(chunk - 1, t // chunk * chunk, chunk), t]
            scores = torch.stack([keys[j] for j in seen]) @ rotations[t].apply(q[t, group])[0] * width**-0.5
            expected[t, own] = scores.softmax(0) @ torch.stack([values[j] for j in seen])
    torch.testing.assert_close(mixer(x, turn)[0], (z.sigmoid() * expected) @ mixer.o_proj.weight.T)


@torch.no_grad()
@pytest.mark.parametrize("window", [6, 16])
def test_a_rat_plus_layer_is_attention_to_states_that_end_chunks_or_are_near_or_first(window):
    module, _, _ = models.load("rat", "plus")
    mixer, tokens = module.layers[0].mixer.double(), 16
    mixer.window = window  # 16: all states, which is how it is trained
    x = torch.randn(1, tokens, 64, dtype=torch.float64)
    z, v, gate, q, k = (x[0] @ mixer.in_proj.weight.T).split(64, dim=-1)
    g, key, value, keys, values = gate.sigmoid(), 0.0, 0.0, [], []
    for t in range(tokens):
        key, value = g[t] * key + (1 - g[t]) * k[t], g[t] * value + (1 - g[t]) * v[t]
        keys, values = [*keys, key], [*values, value]
    turn = decoder.Rotation.of_positions(torch.arange(tokens).unsqueeze(0), 16, 10000.0, like=x)
    q, k, v = (each.unflatten(-1, (4, 16)).transpose(0, 1) for each in (q, torch.stack(keys), torch.stack(values)))
    t, j = torch.arange(tokens).unsqueeze(1), torch.arange(tokens)
    seen = (j <= t) & (((j + 1) % 4 == 0) | (t - j <= window) | (j < 2))
    attended = torch.nn.functional.scaled_dot_product_attention(turn.apply(q), turn.apply(k), v, seen)
    expected = (z.sigmoid() * attended.transpose(0, 1).flatten(1)) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x, turn)[0], expected)
    assert bool(seen.tril().eq(torch.ones_like(seen).tril()).all()) == (window == 16)


def test_rat_layers_and_windows_take_turns_and_without_a_window_all_layers_are_rat():
    kinds = [type(layer.mixer) for layer in models.load("rat", "tiny")[0].layers]
    assert kinds == [rat_lm.RatMixer, decoder.Attention]
    pure = rat_lm.RatLM(dataclasses.replace(rat_lm.SIZES["tiny"], window=0))
    assert all(type(layer.mixer) is rat_lm.RatMixer for layer in pure.layers)
    with pytest.raises(ValueError, match="3 heads are no 2 equal groups"):
        dataclasses.replace(rat_lm.SIZES["tiny"], num_heads=3)


@torch.no_grad()
def test_a_decoder_with_fewer_layers_shares_their_weights_and_skips_the_others():
    module, (ids,), _ = models.load("decoder", "text", length=20)
    without = decoder.with_layers(module, [0, 1, 5, 11])
    assert [layer is module.layers[index] for layer, index in zip(without.layers, [0, 1, 5, 11])] == [True] * 4
    assert len(module.layers) == 12 and without.lm_head.weight is module.lm_head.weight
    shortened = without(ids)
    for index in {*range(12)} - {0, 1, 5, 11}:
        module.layers[index].forward = lambda x, rotation: x
    assert torch.equal(shortened, module(ids))


@torch.no_grad()
def test_a_decoder_with_all_its_layers_is_the_same():
    module, (ids,), _ = models.load("decoder", "tiny")
    assert torch.equal(decoder.with_layers(module, range(2))(ids), module(ids))


@pytest.mark.parametrize("index", [-1, 2])
def test_layers_that_a_decoder_does_not_have_are_refused(index):
    with pytest.raises(InputError, match=f"the decoder has no layer {index}: they are 0 .. 1"):
        decoder.with_layers(models.load("decoder", "tiny")[0], [0, index])


@torch.no_grad()
def test_the_masked_diffusion_network_looks_both_ways():
    module, (ids,), _ = models.load("moe_dlm", "tiny")
    for place, seen_from in ((-1, 0), (0, -1)):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 1) % 255
        assert (module(ids) - module(changed))[:, seen_from].abs().max() > 1e-3


@torch.no_grad()
def test_the_masked_diffusion_network_does_not_see_padding():
    module, (ids,), _ = models.load("moe_dlm", "tiny")
    mask = torch.ones(2, 21, dtype=torch.int64)
    mask[:, 16:] = 0
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=ids.dtype)], 1)
    torch.testing.assert_close(module(padded, mask)[:, :16], module(ids))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"name": "resnet"}, "video_unet, video_unet_svd, dit, decoder, rat, vit, moe_dlm"),
        ({"name": "vit", "size": "huge"}, "tiny, small, base"),
        ({"name": "vit", "size": "tiny", "length": 4}, "batch, height, width"),
        ({"name": "vit", "size": "tiny", "height": 33}, "multiples of the patch, 8"),
        ({"name": "video_unet", "size": "tiny", "height": 7}, "multiples of 2"),
        ({"name": "video_unet", "size": "tiny", "frames": 33}, "32 positions"),
        ({"name": "decoder", "size": "tiny", "length": 0}, "positive integer length"),
        ({"name": "decoder", "size": "tiny", "batch": True}, "positive integer batch"),
    ],
)
def test_what_cannot_be_loaded_is_an_input_error_that_says_what_can(call, says):
    with pytest.raises(InputError, match=says):
        models.load(**call)


# The three below load our weights into the reference implementation, by name and strictly, and compare outputs in float64.
# The references form their sinusoidal angles in float32, hence 1e-5 and not 1e-10.


@torch.no_grad()
def assert_agrees(module, reference, args, kwargs, reference_kwargs):
    output = module.double()(*doubled(args), **doubled(kwargs))
    expected = reference.double().eval()(*doubled(args), **doubled(reference_kwargs))[0]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_video_unet_is_animatediff():
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers: pip install diffusers")
    config = video_unet.SIZES["tiny"]
    module, args, kwargs = models.load("video_unet", "tiny")
    reference = diffusers.UNetMotionModel(
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups,
        cross_attention_dim=config.context_dim,
        num_attention_heads=config.num_heads,
        motion_num_attention_heads=config.num_heads,
    )
    reference.load_state_dict(module.state_dict())
    # its pipeline repeats the text once a frame before the call
    per_frame = {"encoder_hidden_states": kwargs["encoder_hidden_states"].repeat_interleave(config.frames, dim=0)}
    assert_agrees(module, reference, args, kwargs, per_frame | {"return_dict": False})


def test_video_unet_svd_is_stable_video_diffusion():
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers: pip install diffusers")
    # the reference is fixed to 32 groups
    config = dataclasses.replace(video_unet_svd.SIZES["tiny"], channels=(32, 64), norm_groups=32)
    _, args, kwargs = models.load("video_unet_svd", "tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = video_unet_svd.VideoUNetSVD(config).eval()
        draw_weights(module)
    reference = diffusers.UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.context_dim,
        num_attention_heads=config.num_heads,
        addition_time_embed_dim=config.time_id_dim,
        projection_class_embeddings_input_dim=3 * config.time_id_dim,
    )
    reference.load_state_dict(module.state_dict())
    assert_agrees(module, reference, args, kwargs, kwargs | {"return_dict": False})


def test_decoder_is_llama():
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install transformers")
    config = decoder.SIZES["tiny"]
    module, args, kwargs = models.load("decoder", "tiny")
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.dim,
            intermediate_size=config.hidden,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        )
    )
    state = {key if key.startswith("lm_head") else f"model.{key}": tensor for key, tensor in module.state_dict().items()}
    reference.load_state_dict(state)
    assert_agrees(module, reference, args, kwargs, {"return_dict": False})


@torch.no_grad()
def test_experts_of_moe_dlm_are_those_of_mixtral():
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = dataclasses.replace(moe_dlm.SIZES["tiny"], norm_topk_prob=True)  # Mixtral's weights have a sum of 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = moe_dlm.MixtureOfExperts(config).eval()
        draw_weights(block)
        x = torch.randn(2, 9, config.dim)
    shape = {"hidden_size": config.dim, "intermediate_size": config.hidden, "num_local_experts": config.experts}
    reference = MixtralSparseMoeBlock(transformers.MixtralConfig(**shape, num_experts_per_tok=config.chosen))
    reference.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x), reference.eval()(x), rtol=1e-5, atol=1e-5)


def test_experts_of_moe_dlm_give_the_same_in_training_as_they_are_exported():
    module, (ids,), _ = models.load("moe_dlm", "tiny")
    exported = module.double()(ids)
    torch.testing.assert_close(module.train()(ids), exported, rtol=1e-10, atol=1e-10)
