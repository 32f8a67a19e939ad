"""A tiny random model of every family of transformers that bupo.policy serves."""

import transformers
from torch import nn

VOCAB, WIDTH, DEPTH = 61, 32, 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GPT2 = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": 64}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
HYBRID = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
HYBRID |= {f"linear_num_{what}_heads": 2 for what in ("key", "value")}
HYBRID |= {f"linear_{what}_head_dim": 8 for what in ("key", "value")}
NO_DROPOUT = {"attention_dropout": 0.0, "dropout": 0.0, "hidden_dropout": 0.0, "resid_pdrop": 0.0}
NO_DROPOUT |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0}

# name: (class prefix, what differs from SIZES)
FAMILIES: dict[str, tuple[str, dict]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": 4}),
    "gemma": ("Gemma", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 8,
            "sliding_window": 4,
            "final_logit_softcapping": 0.5,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "gpt2": ("GPT2", GPT2 | {"tie_word_embeddings": True}),
    "gpt_neox-parallel": ("GPTNeoX", {"use_parallel_residual": True}),
    "gpt_neox-sequential": ("GPTNeoX", {"use_parallel_residual": False}),
    "bloom": ("Bloom", {"n_layer": DEPTH, "n_head": 4, "tie_word_embeddings": True}),
    "falcon-parallel": ("Falcon", {"parallel_attn": True, "alibi": False}),
    "falcon-sequential": ("Falcon", {"parallel_attn": False, "alibi": True, "multi_query": False}),
    "falcon-new": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "cohere": ("Cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
    "cohere2": ("Cohere2", {"logit_scale": 0.25, "sliding_window": 4, "head_dim": 8}),
    "granite": ("Granite", {"logits_scaling": 8.0}),
    "hyperclovax": ("HyperCLOVAX", {"logits_scaling": 8.0}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": WIDTH, "layerdrop": 0.0}),
    "mixtral": ("Mixtral", MOE),
    "phimoe": ("Phimoe", MOE),
    "qwen3_moe": ("Qwen3Moe", MOE | {"head_dim": 8}),
    "qwen3_next": ("Qwen3Next", MOE | HYBRID | {"head_dim": 8}),
}


def build(family: str, **changes: object) -> nn.Module:
    prefix, differences = FAMILIES[family]
    sizes = SIZES | NO_DROPOUT | differences | changes
    if prefix in ("GPT2", "Falcon", "Bloom"):  # their configs refuse or derive some of these
        for name in ("num_key_value_heads", "intermediate_size"):
            sizes.pop(name)
    config = getattr(transformers, prefix + ("TextConfig" if prefix == "Gemma3" else "Config"))
    config = config(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for (
        name,
        parameter,
    ) in model.named_parameters():  # norms with weight 1 and no bias hide mistakes
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.8, 0.3)
        elif "embed" not in name:
            nn.init.normal_(parameter, 0.0, 0.15)
    return model.eval()
