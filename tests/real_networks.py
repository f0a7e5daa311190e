"""Real architectures at toy size with random weights: name -> a factory of (module, args, kwargs, dynamic_shapes)."""

from collections.abc import Callable
from typing import Any

import torch

Case = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any], Any]


def _tokens(batch: int = 2, length: int = 9, vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


_TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}


def _language(dynamic: bool) -> Any:
    if not dynamic:
        return None
    dims = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=512)}
    return {"input_ids": dims, "use_cache": None}


def _decoder(architecture: str, *, dynamic: bool = False, **config: Any) -> Case:
    import transformers

    settings = _TEXT | {"num_key_value_heads": 2, "pad_token_id": 0} | config
    model = getattr(transformers, f"{architecture}ForCausalLM")(getattr(transformers, f"{architecture}Config")(**settings))
    return model.eval(), (_tokens(),), {"use_cache": False}, _language(dynamic)


def llama() -> Case:
    return _decoder("Llama")


def llama_dynamic() -> Case:
    return _decoder("Llama", dynamic=True)


def qwen3() -> Case:
    return _decoder("Qwen3", head_dim=8)


def gemma() -> Case:
    return _decoder("Gemma2", head_dim=8, sliding_window=4)


def gpt2() -> Case:
    import transformers

    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config).eval(), (_tokens(),), {"use_cache": False}, None


def bert() -> Case:
    import transformers

    model = transformers.BertModel(transformers.BertConfig(**_TEXT)).eval()
    return model, (_tokens(),), {"attention_mask": torch.ones(2, 9, dtype=torch.long)}, None


def t5() -> Case:
    import transformers

    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    return model, (), {"input_ids": _tokens(), "decoder_input_ids": _tokens(length=5), "use_cache": False}, None


def whisper() -> Case:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=20, max_target_positions=16,
        pad_token_id=0, bos_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    return model, (_noise(2, 16, 40),), {"decoder_input_ids": _tokens(length=5), "use_cache": False}, None


def clip() -> Case:
    import transformers

    text = transformers.CLIPTextConfig(**_TEXT, max_position_embeddings=16, projection_dim=24)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8, projection_dim=24
    )
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24))
    return model.eval(), (), {"input_ids": _tokens(), "pixel_values": _noise(2, 3, 32, 32)}, None


def convnext() -> Case:
    import transformers

    config = transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, image_size=32)
    return transformers.ConvNextForImageClassification(config).eval(), (_noise(2, 3, 32, 32),), {}, None


def resnet() -> Case:
    import transformers

    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck")
    model = transformers.ResNetForImageClassification(config).eval()
    return model, (_noise(2, 3, 32, 32),), {}, {"pixel_values": {0: torch.export.Dim("batch", max=32)}}


def unet_2d() -> Case:
    import diffusers

    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        attention_head_dim=8,
    )  # fmt: skip
    return model.eval(), (_noise(2, 4, 16, 16), torch.tensor(3), _noise(2, 7, 32)), {}, None


def unet_motion() -> Case:
    import diffusers

    model = diffusers.UNetMotionModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        motion_num_attention_heads=4, num_attention_heads=4,
    )  # fmt: skip
    return model.eval(), (_noise(1, 4, 4, 16, 16), torch.tensor(3), _noise(4, 7, 32)), {}, None


def unet_svd() -> Case:
    import diffusers

    model = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), layers_per_block=1, cross_attention_dim=32,
        num_attention_heads=(4, 4), addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, num_frames=4,
    )  # fmt: skip
    return model.eval(), (_noise(1, 4, 8, 16, 16), torch.tensor(3), _noise(1, 7, 32), torch.ones(1, 3)), {}, None


def vae() -> Case:
    import diffusers

    model = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    return model.eval(), (_noise(1, 3, 32, 32),), {}, None


def dit() -> Case:
    import diffusers

    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )
    return model.eval(), (_noise(2, 4, 8, 8),), {"timestep": torch.tensor([3, 5]), "class_labels": torch.tensor([1, 2])}, None


def flux() -> Case:
    import diffusers

    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {
        "hidden_states": _noise(1, 16, 4), "encoder_hidden_states": _noise(1, 7, 32), "pooled_projections": _noise(1, 32),
        "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(7, 3),
    }  # fmt: skip
    return model.eval(), (), inputs, None


NETWORKS: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        llama, llama_dynamic, qwen3, gemma, gpt2, bert, t5, whisper, clip, convnext, resnet,
        unet_2d, unet_motion, unet_svd, vae, dit, flux,
    )
}  # fmt: skip
