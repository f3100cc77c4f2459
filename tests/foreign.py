"""Tiny random models of architectures that are not native, made and stored by transformers itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY, CONTEXT = 128, 64


@dataclass(frozen=True)
class Made:
    """One architecture, and what must be found out about it."""

    model_type: str
    entries: dict[str, Any] = field(default_factory=dict)
    is_plain: bool = True
    """Whether its logits are one product with the last hidden states."""


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
GPT_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "n_inner": 48}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

ARCHITECTURES = {
    "gemma2: capped logits": Made(
        "gemma2",
        {**SIZES, "head_dim": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0, "sliding_window": 8},
        is_plain=False,
    ),
    "phi: a bias in the head": Made("phi", {**SIZES, "num_key_value_heads": 4, "resid_pdrop": 0.5}, is_plain=False),
    "granite: scaled logits": Made("granite", {**SIZES, "logits_scaling": 8.0, "residual_multiplier": 0.5}, False),
    "mixtral: experts": Made("mixtral", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe: shared experts": Made(
        "qwen2_moe", {**SIZES, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24}
    ),
    "deepseek_v3: latent attention, a buffer": Made(
        "deepseek_v3",
        {
            **SIZES,
            **EXPERTS,
            **dict.fromkeys(("num_key_value_heads", "n_routed_experts"), 4),
            **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
            **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
            **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
        },
    ),
    "bloom: relative positions": Made("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.5}),
    "opt: learned positions": Made(
        "opt", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.5, "attention_dropout": 0.5}
    ),
    "gpt_bigcode: one key head": Made("gpt_bigcode", {**GPT_SIZES, "resid_pdrop": 0.5, "attn_pdrop": 0.5}),
    "stablelm: partial rotary": Made("stablelm", {**SIZES, "partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "starcoder2: biases": Made("starcoder2", {**SIZES, "sliding_window": 8, "residual_dropout": 0.5}),
    "mamba: no attention": Made("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "llama: scaling that is not native": Made(
        "llama",
        {
            **SIZES,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        },
    ),
}


def made(name: str, vocabulary: int = VOCABULARY) -> Any:
    """The model in transformers, in evaluation mode, none of its weights 0 or 1, so that a forgotten one shows."""
    import torch
    import transformers

    wanted = ARCHITECTURES[name]
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(wanted.model_type, vocab_size=vocabulary, **{**wanted.entries, **ids})
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for name, buffer in network.named_buffers():
            if name.endswith("correction_bias"):  # what a router adds to its scores
                buffer += 0.05 * torch.randn_like(buffer)
    return network


def stored(network: Any, folder: Path, dtype: Any = None) -> Path:
    """The network as transformers stores it, in the type given; returns the folder."""
    import copy

    import transformers

    transformers.utils.logging.disable_progress_bar()
    copied = copy.deepcopy(network)
    (copied.to(dtype) if dtype is not None else copied).save_pretrained(folder)
    return folder
