"""Tiny random models of any type of transformers, made by shrinking its config's sizes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

VOCABULARY = 97
LAYERS = 4

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    # the same by the names of single families
    "vocab_size_per_layer_input": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "n_heads": 4,
    "n_positions": 128,
    "n_inner": 96,
    "d_model": 64,
    "emb_dim": 64,
    "embed_dim": 64,
    "embedding_size": 64,
    "embedding_dim": 64,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 32,
    "dff": 96,
    "decoder_ffn_dim": 96,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "num_layers": LAYERS,
    "num_heads": 4,
    "attention_heads": 4,
    "kv_channels": 16,
    "kv_n_heads": 2,
    "num_kv_heads": 2,
    "word_embed_proj_dim": 64,
    "attention_head_dim": 16,
    "dim_head": 16,
    "dim_ff": 96,
    "rotary_dim": 8,
    "max_seq_len": 128,
    "n_ctx": 128,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "sliding_window": 6,
    "sliding_window_size": 6,
    "local_attention": 6,
    "window_size": 6,
    "attention_window_size": 6,
    "attention_chunk_size": 6,
    "swa_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "query_pre_attn_scalar": 16,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
    # compressed keys and values
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "o_groups": 2,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    # mixtures
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_end_index": LAYERS - 1,
    "zero_expert_num": 2,
    "router_hidden_size": 16,
    # linear attention, state spaces, convolutions
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_headdim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_dt_rank": 4,
    "n_mamba_heads": 2,
    "ssm_state_size": 16,
    "state_size": 16,
    "n_groups": 1,
    "lru_width": 64,
    "block_multiple_of": 8,
    "layer_group_size": 2,
    "max_window_layers": 2,
    "global_attn_every_n_layers": 2,
    "sliding_window_pattern": 2,
    "no_rope_layer_interval": 2,
    "_sliding_window_pattern": 2,
    "adapter_rank": 8,
}
"""Sizes by the names under which configs have them; `None` in a config stays `None`."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_d_head": 16},
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    # without a cache it attends beyond its window, with one it does not
    "moshi": {"sliding_window": 64},
    "bamba": {"attn_layer_indices": [1, 3]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 2]],
        "attention_layers": ["global", "local"] * 2,
    },
    "zamba": {"attention_head_dim": 32},
    "zamba2": {"attention_head_dim": 32, "n_mamba_heads": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
}
"""What a type needs in addition."""


class CannotBuildError(Exception):
    """A type whose shrunken config makes no model; the message says why."""


def shrunken(config: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments that make the same kind of config with tiny sizes."""
    given = {name: value for name, value in vars(config).items() if value is not None}
    count = next(
        (given[n] for n in ("num_hidden_layers", "n_layer", "n_layers") if n in given), None
    )
    layers = _layers_needed(given, count)
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if name.startswith("_"):
            continue
        if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            settings[name] = layers
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            settings[name] = min(value, SIZES[name]) if value else value
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            settings[name] = min(value, VOCABULARY - 2)
        elif isinstance(value, list | tuple) and count and len(value) == count:
            settings[name] = _fewer(list(value), layers)
    if given.get("num_key_value_heads") == given.get("num_attention_heads"):
        settings["num_key_value_heads"] = settings.get("num_attention_heads")
    rope = given.get("qk_rope_head_dim")
    if rope and given.get("head_dim") in (rope, given.get("qk_head_dim")):
        settings["head_dim"] = 8 if given["head_dim"] == rope else 24
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        if name in given:
            settings[name] = {"pad_token_id": 0, "bos_token_id": 1}.get(name)
    return settings | (overrides or {})


def _layers_needed(given: dict[str, Any], count: int | None) -> int:
    kinds = [
        len(set(value))
        for value in given.values()
        if isinstance(value, list) and count and len(value) == count and _are_names(value)
    ]
    return max([LAYERS, *(2 * kind for kind in kinds)])


def _are_names(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _fewer(values: list[Any], layers: int) -> list[Any]:
    """So many entries; names in turn, so that every kind of layer is there twice."""
    if not _are_names(values):
        smallest = [v if not isinstance(v, int) or v < 2 else min(v, 96) for v in values]
        return smallest[:layers]
    kinds = list(dict.fromkeys(values))
    return [kinds[index % len(kinds)] for index in range(layers)]


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A config of a type with tiny sizes.

    Raises CannotBuildError where the shrunken sizes do not fit together.
    """
    cls = CONFIG_MAPPING[model_type]
    try:
        default = cls()
        settings = shrunken(default, OVERRIDES.get(model_type, {}) | overrides)
        for name in getattr(default, "sub_configs", {}):
            part = getattr(default, name, None)
            if name in ("text_config", "decoder_config", "attn_config", "ffn_config") and part:
                settings[name] = type(part)(**shrunken(part, settings.pop(name, None)))
        return cls(**settings)
    except Exception as error:
        raise CannotBuildError(f"{type(error).__name__}: {error}") from error


def tiny_base(
    model_type: str, *, seed: int = 0, attention: str | None = None, **overrides: Any
) -> Any:
    """A tiny random causal language model of a type, in evaluation mode."""
    config = tiny_config(model_type, **overrides)
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            model = model.eval()
            _vary(model)
            ids = torch.arange(3, 15).view(1, -1)
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
    except Exception as error:
        raise CannotBuildError(f"{type(error).__name__}: {error}") from error
    return model


def _vary(model: torch.nn.Module) -> None:
    """Random values where all are alike: zeros may hide what a trained model would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and bool((parameter == parameter.view(-1)[0]).all()):
                parameter.add_(torch.randn_like(parameter) * 0.1)


VISION_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

BACKBONE = ("stage_names", "out_features", "out_indices")
"""Settings that follow from the number of layers."""

VISION_OVERRIDES: dict[str, dict[str, Any]] = {
    "siglip2_vision_model": {"num_patches": 16, "patch_size": 8, "image_size": 32},
    "dinov3_vit": {"num_register_tokens": 4},
    "dinov3_convnext": {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "image_size": 64},
}
"""What an encoder needs besides small sizes; images keep their own size elsewhere."""


SMALLEST_WEIGHTS = 0.02


def tiny_vision(model_type: str, *, seed: int = 0) -> Any:
    """A tiny random vision encoder of a type, or whole where its sizes cannot be shrunken.

    Raises CannotBuildError where that makes no model either.
    """
    cls = CONFIG_MAPPING[model_type]
    extra = VISION_OVERRIDES.get(model_type, {})
    reason = ""
    for names in (VISION_SIZES, ()):
        try:
            default = cls()
            parts = {n: _smaller_vision(getattr(default, n), names) for n in default.sub_configs}
            given = parts or _smaller_vision(default, names).to_diff_dict()
            config = cls(**{k: v for k, v in given.items() if k not in BACKBONE} | extra)
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = AutoModel.from_config(config).eval()
            _vary(model)
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {error}"
        else:
            return model
    raise CannotBuildError(reason)


def _smaller_vision(config: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            setattr(config, name, min(value, SIZES[name]))
    if (getattr(config, "initializer_range", None) or 1.0) < SMALLEST_WEIGHTS:
        config.initializer_range = SMALLEST_WEIGHTS  # no image shows through SAM's
    return config


def tiny_vision_encoder(seed: int = 1) -> Any:
    """A tiny random SigLIP encoder: four patches of width 32."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "siglip_vision_model",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return AutoModel.from_config(config).eval()
