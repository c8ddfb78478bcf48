"""Flamingo (Alayrac et al., 2022, arXiv:2204.14198): a frozen language model that reads images among its text.

Two graphs: ``encoder`` runs once per image, from pixels to the keys and values of every cross-attention layer;
``decoder`` reads new tokens over GPT's cache and over the images that the caller keeps. ``resampler.py`` and
``gated_cross_attention.py`` have the blocks between the two models, ``flamingo_config.py`` reads config.json.

The paper's models are a NFNet and Chinchilla; here a ViT or CLIP's image tower, and GPT-2, each the module of its own
family. A token sees the latest image before it alone (section 2.3), one without an image before it none. An image here
has one frame; the paper reads videos too.

Shape letters as in gated_cross_attention.py and cache.py; I images that the tokens of a call can see, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transom.models import clip, gpt, vit
from transom.models.cache import cache_inputs, cache_outputs
from transom.models.family import Family, GraphModule
from transom.models.flamingo_config import FlamingoConfig, config_from_source
from transom.models.gated_cross_attention import GatedCrossAttention
from transom.models.resampler import Resampler
from transom.runtime.graph_spec import ARANGE, Axis, Graph
from transom.runtime.graph_spec import Tensor as TensorSpec

VISION, TEXT = "vision_model.", "language_model."  # how the names of the two models' weights begin


class Flamingo(nn.Module):
    """The two models and what joins them. The graphs compute ``encode`` and ``decode``; ``forward`` is for training."""

    def __init__(self, config: FlamingoConfig, task: str) -> None:
        super().__init__()
        vision = config.vision_config
        self.config = config
        self.vision_model: vit.ViT | clip.VisionModel = (
            clip.VisionModel(vision) if isinstance(vision, clip.VisionConfig) else vit.ViT(vision, "feature-extraction")
        )
        self.resampler = Resampler(vision.hidden_size, config.resampler_config)
        self.language_model = gpt.GPT(config.text_config, "text-generation")
        self.cross_attention = nn.ModuleList(
            GatedCrossAttention(config.text_config.n_embd, vision.hidden_size, config.cross_attention_config)
            for _ in config.cross_attention_layers
        )

    def blocks(self) -> Iterator[GatedCrossAttention]:
        """Yield the blocks of cross-attention in order."""
        for block in self.cross_attention:
            assert isinstance(block, GatedCrossAttention)
            yield block

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return what the resampler reads of images, float32 (B, C, height, width): (B, P, width of the images).

        What transformers calls ``last_hidden_state``: of a ViT after its last LayerNorm, of CLIP's tower before it.
        """
        if isinstance(self.vision_model, clip.VisionModel):
            found = self.vision_model.hidden_states(pixel_values)
        else:
            found = self.vision_model(pixel_values)[-1]
        return found if self.config.vision_feature_select_strategy == "full" else found[:, 1:]

    def keys_values(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Project ``latents`` (B, N, width) of images: keys, then values (B, H, 1, N, D), of each layer in turn."""
        return tuple(tensor.unsqueeze(2) for block in self.blocks() for tensor in block.attention.keys_values(latents))

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Encode images, float32 (B, C, height, width): ``keys_values``, and the latents (B, N, width) themselves."""
        latents = self.resampler(self.features(pixel_values))
        return *self.keys_values(latents), latents

    def decode(
        self,
        input_ids: Tensor,
        write_indices: Tensor,
        logits_positions: Tensor,
        image_indices: Tensor,
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute ``logits`` (B, P, V), and GPT's caches with the new keys and values written.

        ``input_ids``, ``write_indices`` and ``logits_positions`` are GPT's. ``image_indices`` int64 (B, S) counts a
        row's images from 1 along I: the one that a token sees, 0 for none. ``states`` are the keys and values of the
        images (G, H, I, N, D) of each cross-attention layer in turn, then GPT's caches.
        """
        images, caches = states[: 2 * len(self.cross_attention)], states[2 * len(self.cross_attention) :]
        mask, sees = image_mask(image_indices, images[0]), (image_indices != 0)[:, :, None]
        every = self.config.cross_attention_every_n_layers

        def before_block(layer: int, x: Tensor) -> Tensor:
            if layer % every:
                return x
            j = layer // every
            keys, values = (tensor.flatten(2, 3) for tensor in images[2 * j : 2 * j + 2])  # (G, H, M, D)
            return self.cross_attention[j](x, keys, values, mask, sees)  # type: ignore[no-any-return]

        return self.language_model.run(input_ids, write_indices, logits_positions, caches, before_block)

    def forward(self, input_ids: Tensor, *images: Tensor) -> Tensor:
        """Compute the logits of every token, (B, S, V), of whole sequences: for training, gradients flow.

        ``input_ids`` int64 (B, S) has ``image_token_id`` where an image stands; ``images`` are the keys and values of
        each row's images in order, as ``rows_of_images`` gives them. Rows with fewer images than I leave the rest.
        """
        B, S = input_ids.shape
        text = self.config.text_config
        shape = B, text.n_head, S, text.n_embd // text.n_head
        caches = [torch.zeros(shape, dtype=images[0].dtype, device=input_ids.device) for _ in range(2 * text.n_layer)]
        start = torch.zeros(B, dtype=torch.int64, device=input_ids.device)
        every_token = torch.arange(S, device=input_ids.device).expand(B, S)
        seen = latest_images(input_ids, self.config.image_token_id)
        return self.decode(input_ids, start, every_token, seen, *images, *caches)[0]


def latest_images(input_ids: Tensor, image_token_id: int) -> Tensor:
    """Return int64 (B, S): which of its row's images each token sees, from 1; 0 before the first. Section 2.3.

    The mark of an image sees that image.
    """
    return (input_ids == image_token_id).cumsum(dim=1)


def rows_of_images(states: Sequence[Tensor], images: int) -> tuple[Tensor, ...]:
    """Join what ``keys_values`` gives of B * I images, a row's side by side: (B * I, H, 1, N, D) -> (B, H, I, N, D)."""
    return tuple(state.reshape(-1, images, *state.shape[1:2], *state.shape[3:]).transpose(1, 2) for state in states)


def image_mask(image_indices: Tensor, keys: Tensor) -> Tensor:
    """Return bool (G, 1, K * S, M), true where a token (B, S) may see a column of ``keys`` (G, H, I, N, D).

    A token without an image sees every column, as softmax needs one; what it reads is thrown away.
    """
    G, _, I, N, _ = keys.shape  # noqa: E741 - the axis of images
    image_of_column = torch.arange(1, I + 1, device=keys.device)[:, None].expand(I, N).reshape(-1)  # (M,)
    of_token = image_indices.reshape(G, 1, -1, 1)  # (G, 1, K * S, 1)
    return (of_token == image_of_column) | (of_token == 0)


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module behind each graph; they share the weights."""
    return {"encoder": GraphModule(model, "encode"), "decoder": GraphModule(model, "decode")}


def rename(name: str, config: FlamingoConfig, task: str) -> str | None:
    """Return the module's name of a stored weight: within the two models as their own families have it."""
    if name.startswith(TEXT):
        found = gpt.rename(name.removeprefix(TEXT), config.text_config, "text-generation")
        return None if found is None else TEXT + found
    if name.startswith(VISION):
        found = vision_name(name.removeprefix(VISION), config)
        return None if found is None else VISION + found
    return name


def vision_name(name: str, config: FlamingoConfig) -> str | None:
    """Return the name within the vision model; None for a pooler and a head, which nothing here reads."""
    if isinstance(config.vision_config, clip.VisionConfig):
        return clip.rename(name.removeprefix(VISION), clip.CLIPConfig(), "")
    found = vit.rename(name, config.vision_config, "feature-extraction")
    return None if found is None or found.startswith("pooler.") else found


def tied_to(name: str, config: FlamingoConfig, task: str) -> str | None:
    """Return the weight that a tied head repeats: the language model's embedding."""
    if not name.startswith(TEXT):
        return None
    original = gpt.tied_to(name.removeprefix(TEXT), config.text_config, "text-generation")
    return None if original is None else TEXT + original


def convert(name: str, stored: Tensor, config: FlamingoConfig) -> Tensor:
    """Resize the positions of patches to the exported image size; keep the rest."""
    vision = config.vision_config
    if isinstance(vision, vit.ViTConfig):
        return vit.convert(name.removeprefix(VISION), stored, vision)
    if name == VISION + "embeddings.position_embedding.weight":
        return clip.vision_positions(stored, vision)
    return stored


def graphs(config: FlamingoConfig, task: str) -> tuple[Graph, ...]:
    """Return encoder and decoder, with transformers' tensor names beside the caches'; the image size is fixed."""
    text, vision, blocks = config.text_config, config.vision_config, config.cross_attention_config
    cache = text.n_layer, text.n_head, text.n_embd // text.n_head
    N, H, D = config.resampler_config.num_latents, blocks.num_heads, blocks.head_dim
    names = [f"image_{kind}.{j}" for j in range(len(config.cross_attention_layers)) for kind in ("key", "value")]
    pixels = TensorSpec("pixel_values", "float32", ("B", vision.num_channels, *vision.image_size))
    made = tuple(TensorSpec(name, "float32", ("B", H, 1, N, D), state=True) for name in names)
    latents = TensorSpec("image_hidden_states", "float32", ("B", N, vision.hidden_size))
    tokens = (
        TensorSpec("input_ids", "int64", ("B", "S"), exclusive_max=text.vocab_size),
        TensorSpec("write_indices", "int64", ("B",), default=0, exclusive_max=text.n_positions),
        TensorSpec("logits_positions", "int64", ("B", "P"), default=ARANGE),
        TensorSpec("image_indices", "int64", ("B", "S"), default=0),
    )
    read = tuple(TensorSpec(name, "float32", ("G", H, "I", N, D), default=0, state=True) for name in names)
    logits = TensorSpec("logits", "float32", ("B", "P", text.vocab_size))
    return (
        Graph("encoder", (pixels,), (*made, latents)),
        Graph("decoder", (*tokens, *read, *cache_inputs(*cache)), (logits, *cache_outputs(*cache))),
    )


def axes(config: FlamingoConfig) -> dict[str, Axis]:
    """Return the bounds of GPT's axes, of I images and of G groups of rows."""
    found = gpt.axes(config.text_config)
    groups = Axis(1, found["B"].opt, found["B"].max, same_as="B", divides="B")
    return {**found, "I": Axis(1, 1, config.max_images), "G": groups}


def options(model: nn.Module) -> dict[str, Any]:
    """Return the image's token, the words around a question, and how far each block's gates opened.

    ``gates`` has the tanh of the attention's and of the MLP's gate of each block; of a vector the mean of the absolute
    values.
    """
    assert isinstance(model, Flamingo)
    config = model.config
    gates = [[opened(block.attention_gate), opened(block.mlp_gate)] for block in model.blocks()]
    return {
        "image_token_id": config.image_token_id,
        "gates": gates,
        "question_template": config.question_template,
        "caption_template": config.caption_template,
        "example_template": f"{config.question_template} {{}}{config.example_separator}",
    }


def opened(gate: Tensor) -> float:
    """Return tanh of a gate; of a vector the mean of the absolute values."""
    factor = torch.tanh(gate)
    return float(factor if factor.numel() == 1 else factor.abs().mean())


FAMILY = Family(
    name="flamingo",
    model_types=("flamingo",),
    prefix="",
    architectures={"FlamingoForConditionalGeneration": "image-text-to-text"},
    tasks=("image-text-to-text",),
    config=config_from_source,
    build=Flamingo,
    rename=rename,
    tied_to=tied_to,
    convert=convert,
    graphs=graphs,
    axes=axes,
    parts=parts,
    options=options,
)
