"""Reads the tokens of a call from the arguments of a transformer's `forward`.

Each function gets the module and the arguments by name. Functions of grids return tokens per axis;
those of other tokens return their numbers before and after the grid in the self-attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Transformer = Any  # a module of one of MODELS, which torch's types do not describe
Given = Mapping[str, Any]
Grid = tuple[int, ...]

PADDED = 32  # Z-Image pads image and caption to multiples of so many tokens


def patched_video(model: Transformer, given: Given) -> Grid:
    """Latents are `[B, C, T, Y, X]`."""
    return _patches(given["hidden_states"].shape[2:], model.config.patch_size)


def patched_image(model: Transformer, given: Given) -> Grid:
    """Latents are `[B, C, Y, X]`."""
    patch = model.config.patch_size
    return _patches(given["hidden_states"].shape[2:], (patch, patch))


def hunyuan_video(model: Transformer, given: Given) -> Grid:
    """Latents are `[B, C, T, Y, X]`."""
    patch = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)
    return _patches(given["hidden_states"].shape[2:], patch)


def hunyuan_image(model: Transformer, given: Given) -> Grid:
    """Latents are `[B, C, Y, X]`; those of the refiner have frames."""
    shape = given["hidden_states"].shape
    if len(shape) != 4:
        raise NotImplementedError(
            "hidden_states must have 4 dimensions, as latents of HunyuanImage's refiner, with "
            f"frames, are not supported, got shape {list(shape)}"
        )
    return _patches(shape[2:], model.config.patch_size)


def cogvideox(model: Transformer, given: Given) -> Grid:
    """Latents are `[B, T, C, Y, X]`; CogVideoX 1.0 has no patches in time."""
    _, frames, _, height, width = given["hidden_states"].shape
    patch = (model.config.patch_size_t or 1, model.config.patch_size, model.config.patch_size)
    return _patches((frames, height, width), patch)


def kandinsky5(model: Transformer, given: Given) -> Grid:
    """Latents are `[B, T, Y, X, C]`."""
    if given.get("sparse_params") is not None:
        raise NotImplementedError(
            "sparse_params must be None, because Kandinsky 5's own sparse attention has tokens in "
            "another order, got some; a config with attention_type 'regular' has none"
        )
    return _patches(given["hidden_states"].shape[1:4], model.config.patch_size)


def kandinsky6(model: Transformer, given: Given) -> Grid:
    """Latents are `[B, T, Y, X, C]`; a reference is a frame of them."""
    return _patches(given["hidden_states"].shape[1:4], model.config.patch_size)


def ltx(model: Transformer, given: Given) -> Grid:
    """Latents are packed, `[B, T * Y * X, C]`; their sizes are separate arguments."""
    names = ("num_frames", "height", "width")
    sizes = tuple(given[name] for name in names if given.get(name) is not None)
    if len(sizes) < len(names):
        raise ValueError(
            "num_frames, height and width must be given, because video_coords shows no grid, got "
            f"{len(sizes)} of them; or call enable(..., grid=(frames, height, width))"
        )
    return sizes


def flux(model: Transformer, given: Given) -> Grid:
    """Latents are packed, `[B, Y * X, C]`, so the grid is read from the position ids."""
    ids = given["img_ids"]
    return _first_image("img_ids", ids[0] if ids.ndim == 3 else ids)


def flux2(model: Transformer, given: Given) -> Grid:
    """As in Flux; references whose keys are to be cached are before the image."""
    ids = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    new, _ = _cached_references(given)
    return _first_image("img_ids", ids[new:])


def krea2(model: Transformer, given: Given) -> Grid:
    """As in Flux; the positions of the text are before those of the image."""
    text = given["encoder_hidden_states"].shape[1]
    return _first_image("position_ids", given["position_ids"][text:])


def qwen_image(model: Transformer, given: Given) -> Grid:
    """Latents are packed, `[B, Y * X, C]`; sizes are `[[(1, Y, X), *references]] * B`."""
    shapes = given["img_shapes"]
    images = {tuple(s) if isinstance(s, list) else (s,) for s in shapes}
    image = images.pop() if len(images) == 1 else ()
    if not image or any(size[0] != 1 for size in image):
        raise ValueError(
            "img_shapes must be those of one image and its references, in one size for the batch "
            f"and without layers, got {shapes}"
        )
    return tuple(image[0][1:])


def z_image(model: Transformer, given: Given) -> Grid:
    """Latents are a list of `[C, F, Y, X]`, F one frame."""
    images = given["x"]
    if isinstance(images[0], list):
        raise NotImplementedError(
            "x must be a list of tensors, one image for each prompt of Z-Image, got a list of lists"
        )
    patch, frames = given.get("patch_size", 2), given.get("f_patch_size", 1)
    sizes = {_patches(tuple(image.shape[1:]), (frames, patch, patch)) for image in images}
    if len(sizes) != 1 or (size := sizes.pop())[0] != 1:
        raise ValueError(
            "x must have images of one size and one frame, got "
            f"{[list(image.shape) for image in images]}"
        )
    return size[1:]


def minimax_h3(model: Transformer, given: Given) -> Grid:
    """Rows of all kinds are packed, those of the video to be made at the end. Its positions
    `(t, y, x)` are not whole numbers, but rise along each axis."""
    rows = given["video_indices"].cpu()
    end = given["position_ids"].shape[0]
    count = int((rows.flip(0) == end - 1 - torch.arange(len(rows), device="cpu")).cumprod(0).sum())
    places = given["position_ids"][end - count :].cpu()
    frame = int((places[:, 0] == places[:1, 0]).cumprod(0).sum())
    width = int((places[:frame, 1] == places[:1, 1]).cumprod(0).sum())
    if count and not count % frame and not frame % width:
        grid = count // frame, frame // width, width
        cube = places.unflatten(0, grid)
        axes = cube[:, 0, 0, 0], cube[0, :, 0, 1], cube[0, 0, :, 2]
        product = torch.cartesian_prod(*axes).view_as(places)
        if product.equal(places) and all((axis.diff() > 0).all() for axis in axes):
            return grid
    raise ValueError(
        f"position_ids of the last {count} rows of video_indices must be those of one video, frame "
        "by frame and row by row, got others"
    )


def cosmos3(model: Transformer, given: Given) -> Grid:
    """The tokens of videos are after the text, in the order of `vision_token_shapes`."""
    shapes = given["vision_token_shapes"]
    if len(shapes) != 1:
        raise ValueError(
            f"vision_token_shapes must be those of one image or video of Cosmos 3, got {shapes}"
        )
    grid = tuple(shapes[0])
    rows, first = given["vision_sequence_indexes"].cpu(), given["und_len"]
    if not rows.equal(torch.arange(first, first + math.prod(grid), device="cpu")):
        raise ValueError(
            f"vision_sequence_indexes must be the {math.prod(grid)} rows behind und_len = {first}, "
            f"got {len(rows)} others"
        )
    return grid


def none(model: Transformer, given: Given, grid: Grid | None) -> tuple[int, int]:
    """Text is in cross-attention."""
    return 0, 0


def text_before(model: Transformer, given: Given, grid: Grid | None) -> tuple[int, int]:
    return given["encoder_hidden_states"].shape[1], 0


def text_behind(model: Transformer, given: Given, grid: Grid | None) -> tuple[int, int]:
    return 0, given["encoder_hidden_states"].shape[1]


def text_and_references(model: Transformer, given: Given, grid: Grid | None) -> tuple[int, int]:
    """Text, the image, and the latents of reference images."""
    latents = given["hidden_states"].shape[1]
    references = 0 if grid is None else latents - math.prod(grid)
    return given["encoder_hidden_states"].shape[1], references


def flux2_others(model: Transformer, given: Given, grid: Grid | None) -> tuple[int, ...]:
    """Text, references that are or will be cached, the image, and other references."""
    new, cached = _cached_references(given)
    text, behind = text_and_references(model, given, grid)
    return text + cached, behind - new if grid is not None else 0, cached


def cosmos3_others(model: Transformer, given: Given, grid: Grid | None) -> tuple[int, ...]:
    """Text, whose queries have a causal call of their own; behind the video sound and actions."""
    grid, text = grid or cosmos3(model, given), given["und_len"]
    return text, given["sequence_length"] - text - math.prod(grid), text


def _cached_references(given: Given) -> tuple[int, int]:
    """Tokens of references among those of a call, and all whose keys are there."""
    mode = given.get("kv_cache_mode")
    if mode == "extract":
        return given.get("num_ref_tokens", 0), given.get("num_ref_tokens", 0)
    cache = given.get("kv_cache")
    return 0, cache.num_ref_tokens if mode == "cached" and cache is not None else 0


def two_texts_behind(model: Transformer, given: Given, grid: Grid | None) -> tuple[int, int]:
    texts = [given["encoder_hidden_states"]]
    if model.context_embedder_2 is not None:
        texts.append(given.get("encoder_hidden_states_2"))
    return 0, sum(text.shape[1] for text in texts if text is not None)


def hunyuan_video_15_text(model: Transformer, given: Given, grid: Grid | None) -> tuple[int, int]:
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    return 0, sum(given[name].shape[1] for name in names)


def framepack_others(model: Transformer, given: Given, grid: Grid | None) -> tuple[int, int]:
    """History in three scales before the video, an image and text behind it; of a batch of one the
    text without its padding."""
    names = ("latents_clean", "latents_history_2x", "latents_history_4x")
    history = _history(given, names)
    mask = given["encoder_attention_mask"]
    text = int(mask.sum()) if mask.shape[0] == 1 else mask.shape[1]
    return history, given["image_embeds"].shape[1] + text


def helios_others(model: Transformer, given: Given, grid: Grid | None) -> tuple[int, int]:
    """History in three scales before the video."""
    names = ("latents_history_short", "latents_history_mid", "latents_history_long")
    return _history(given, names), 0


def _history(given: Given, names: tuple[str, ...]) -> int:
    """Tokens of latents of the past, of scale 1, 2 and 4, that have indices."""
    tokens = 0
    for name, scale in zip(names, (1, 2, 4), strict=True):
        if given.get(name) is not None and given.get(f"indices_{name}") is not None:
            frames, height, width = given[name].shape[2:]
            # Each is padded at its end to whole patches, of 1x2x2 times the scale.
            sizes = (frames, scale), (height, 2 * scale), (width, 2 * scale)
            tokens += math.prod(-(-length // patch) for length, patch in sizes)
    return tokens


def z_image_others(model: Transformer, given: Given, grid: Grid | None) -> tuple[int, int]:
    """Behind the image: its padding, which is seen, and the captions with theirs."""
    image = 0 if grid is None else -math.prod(grid) % PADDED
    longest = max(caption.shape[0] for caption in given["cap_feats"])
    return 0, image + longest + -longest % PADDED


def minimax_h3_others(model: Transformer, given: Given, grid: Grid | None) -> tuple[int, int]:
    """Text, keyframes, references and audio, all before the video."""
    grid = minimax_h3(model, given) if grid is None else grid
    return given["position_ids"].shape[0] - math.prod(grid), 0


def _first_image(name: str, ids: Tensor) -> Grid:
    """The grid of the first positions `(time, row, column, ...)` that have one time; positions
    of other times after them are those of references."""
    ids = ids.cpu()
    count = int((ids[:, 0] == ids[0, 0]).long().cumprod(0).sum())
    places = ids[:count, 1:3].long()
    places = places - places.amin(0)
    height, width = (places.amax(0) + 1).tolist()
    expected = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in (height, width)))
    if not expected.equal(places):
        raise ValueError(
            f"{name} must be those of one image, row by row, got {count} tokens that span "
            f"{height}x{width}"
        )
    return height, width


def _patches(sizes: tuple[int, ...], patch: tuple[int, ...]) -> Grid:
    return tuple(size // p for size, p in zip(sizes, patch, strict=True))
