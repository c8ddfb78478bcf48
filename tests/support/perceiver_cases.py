"""The tiny sizes that tests of Perceiver and of its tokenizer share."""

from __future__ import annotations

SIZES = {  # seven latents; the masked language model's heads have one size, so that its attentions can fuse
    "num_latents": 7,
    "d_latents": 64,
    "d_model": 256,
    "num_blocks": 2,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 2,
    "qk_channels": 64,
    "v_channels": 64,
    "self_attention_widening_factor": 3,
    "max_position_embeddings": 67,
    "image_size": 20,
}
