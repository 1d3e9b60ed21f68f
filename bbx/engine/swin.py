"""Run torchvision's Swin blocks a few images at a time, attention in one call: the same sums, fewer passes over memory.

torchvision rolls the map, cuts it into windows by a copy, makes products, bias, mask and softmax as tensors of their
own, and turns it all back, for the whole batch, so that each of them has left the cache when it is read. Here windows
are one gather, and some 1,600 tokens are through the block before the next begin. On a Zen 4 core swin-tiny to stage2
takes 39 ms an image in place of 44, to its end 97 in place of 105, swinv2-tiny to stage2 57 in place of 68; maps of
random weights differ by at most 1.5e-6 of their largest value. Where the second version's temperatures are at their
bound, its attention rounds to 9e-6 in whatever order, and a trial leaves the network as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbx.backbone import Backbone
from bbx.engine.pack import gelu_of
from bbx.taps import keep_marks

# By name: who runs another library's network need not have torchvision's imported.
_MODULE = "torchvision.models.swin_transformer"
_BLOCKS = {
    "SwinTransformerBlock": "ShiftedWindowAttention",
    "SwinTransformerBlockV2": "ShiftedWindowAttentionV2",
}
"""Each kind of block, and its attention."""
_MLP = ["Linear", "GELU", "Dropout", "Linear", "Dropout"]
_LAYERS = (nn.LayerNorm, nn.Linear)
_LARGEST = math.log(100.0)  # of what is learnt of the second version's temperature, in torchvision
_TOKENS = 1568
"""At once, as far as whole images allow: enough for a product to run at full speed, few enough to stay in the cache."""


class Windows(NamedTuple):
    """How an image of `size` (h, w) tokens is cut into `n` windows of `t` tokens."""

    size: tuple[int, int]
    order: Tensor
    """int64 `(n·t,)`: the tokens, one window after the other; `h·w` is padding."""
    back: Tensor
    """int64 `(h·w,)`: where in `order` each token is."""
    bias: Tensor
    """`(n, heads, t, t)`: what is added to the products: by relative position, and -100 across a seam. The largest:
    1.8 MB a shifted block at 224 pixels, 158 at 2048, kept, where torchvision makes as much anew for each image."""


class SwinBlock(nn.Module):
    """In the place of a block of torchvision's, around its layers; without gradients."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = block.norm1, block.attn, block.norm2
        self.expand, self.shrink = block.mlp[0], block.mlp[3]
        self._second = type(block).__name__.endswith("V2")  # normalises afterwards; cosine attention
        self._windows: Windows | None = None
        bias = self.attn.qkv.bias
        if self._second and bias is not None:  # its keys have none, whatever the weights say
            query, key, value = bias.detach().chunk(3)
            zeroed = torch.cat([query, torch.zeros_like(key), value])
            self.attn.qkv._parameters["bias"] = nn.Parameter(zeroed, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """`(b, h, w, c)` → the same shape."""
        windows = self._windows_of(images.shape[1], images.shape[2])
        tokens = images.flatten(1, 2)
        made = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
        some = max(1, _TOKENS // tokens.shape[1])
        for start in range(0, len(tokens), some):
            self._run(tokens[start : start + some], windows, made[start : start + some])
        return made.view(images.shape)

    @property
    def ran(self) -> bool:
        """Whether it has computed anything."""
        return self._windows is not None

    def _run(self, given: Tensor, windows: Windows, out: Tensor) -> None:
        """`given` `(b, h·w, c)` into `out`."""
        if self._second:
            middle = self.norm1(self._attended(given, windows)).add_(given)
            torch.add(self.norm2(self._mlp(middle)), middle, out=out)
        else:
            middle = self._attended(self.norm1(given), windows).add_(given)
            torch.add(self._mlp(self.norm2(middle)), middle, out=out)

    def _mlp(self, given: Tensor) -> Tensor:
        made: Tensor = self.shrink(gelu_of(self.expand, given))
        return made

    def _attended(self, given: Tensor, windows: Windows) -> Tensor:
        """`(b, h·w, c)` → the same shape, each token having looked at its window."""
        if len(windows.order) > given.shape[1]:
            given = F.pad(given, (0, 0, 0, 1))  # the token that stands for padding
        attn, (count, heads, size, _) = self.attn, windows.bias.shape
        parts = attn.qkv(given.index_select(1, windows.order)).view(len(given), count, size, 3, heads, -1)
        made = torch.cat([self._mixed(one.permute(2, 0, 3, 1, 4), windows.bias) for one in parts])
        mixed: Tensor = attn.proj(made.view(len(given), count * size, -1))
        return mixed.index_select(1, windows.back)

    def _mixed(self, parts: Tensor, bias: Tensor) -> Tensor:
        """Of one image's query, key and value `(3, n, heads, t, d)`: `(n, t, heads·d)`."""
        query, key, value = parts
        scale = None  # as usual
        if self._second:
            scale = 1.0
            query = F.normalize(query, dim=-1) * self.attn.logit_scale.clamp(max=_LARGEST).exp()
            key = F.normalize(key, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        return mixed.transpose(1, 2).flatten(2)

    def _windows_of(self, height: int, width: int) -> Windows:
        """Made once, and kept: a run has one size."""
        if self._windows is None or self._windows.size != (height, width):
            with torch.inference_mode(False), torch.no_grad():  # kept, and copied with this module
                self._windows = _cut(self.attn, height, width)
        return self._windows


def fusable(backbone: Backbone) -> bool:
    """Whether `backbone` has such blocks, and nobody asks for a part of one."""
    return any(True for _ in _found(backbone))


def fuse(backbone: Backbone) -> None:
    """Replaces them in place, around the same layers."""
    for path, block in list(_found(backbone)):
        made = SwinBlock(block).eval()
        keep_marks(block, made)
        parent, _, name = path.rpartition(".")
        setattr(backbone.network.get_submodule(parent), name, made)


def ran(backbone: Backbone) -> bool:
    """Whether any of them has run."""
    return any(isinstance(one, SwinBlock) and one.ran for one in backbone.network.modules())


def _found(backbone: Backbone) -> Iterator[tuple[str, nn.Module]]:
    tapped = [f"{tap.module}." for tap in backbone.wanted]
    for path, module in backbone.network.named_modules():
        if _is_block(module) and not any(one.startswith(f"{path}.") and one != f"{path}." for one in tapped):
            yield path, module


def _is_block(module: Any) -> bool:
    """Whether it is one of torchvision's own, as it builds them, and nobody listens."""
    kind = type(module)
    if kind.__module__ != _MODULE or kind.__name__ not in _BLOCKS:
        return False
    if any(one.training or one._forward_hooks or one._forward_pre_hooks for one in module.modules()):
        return False
    mlp = [type(one).__name__ for one in module.mlp]
    if type(module.attn).__name__ != _BLOCKS[kind.__name__] or mlp != _MLP or module.mlp[1].approximate != "none":
        return False
    layers = (module.norm1, module.norm2, module.attn.qkv, module.attn.proj, module.mlp[0], module.mlp[3])
    return all(type(one) in _LAYERS for one in layers)


def _cut(attn: Any, height: int, width: int) -> Windows:
    device = attn.qkv.weight.device
    (rows, columns), shifts = attn.window_size, list(attn.shift_size)
    padded = [-(-side // window) * window for side, window in ((height, rows), (width, columns))]
    for axis, window in enumerate(attn.window_size):
        if window >= padded[axis]:  # one window: nothing to shift
            shifts[axis] = 0

    def by_window(grid: Tensor) -> Tensor:
        """`(padded height, padded width)` → `(n, t)`."""
        cut = grid.view(padded[0] // rows, rows, padded[1] // columns, columns)
        return cut.permute(0, 2, 1, 3).reshape(-1, rows * columns)

    grid = torch.arange(height * width, device=device).view(height, width)
    grid = F.pad(grid, (0, padded[1] - width, 0, padded[0] - height), value=height * width)
    order = by_window(grid.roll((-shifts[0], -shifts[1]), (0, 1))).flatten()
    back = torch.empty(height * width + 1, dtype=torch.long, device=device)
    back[order] = torch.arange(len(order), device=device)
    bias: Tensor = attn.get_relative_position_bias()
    bias = bias.expand(len(order) // (rows * columns), -1, -1, -1)
    if any(shifts):
        across, down = (_parts(padded[axis], attn.window_size[axis], shifts[axis], device) for axis in (0, 1))
        part = by_window(across[:, None] * 3 + down)
        bias = bias + -100.0 * (part[:, None, :, None] != part[:, None, None, :])
    return Windows((height, width), order, back[:-1], bias)


def _parts(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    """int64 `(side,)`: which tokens of a shifted axis were neighbours before: 0, 1 or 2."""
    place = torch.arange(side, device=device)
    return (place >= side - window).long() + (place >= side - shift).long() if shift else torch.zeros_like(place)
