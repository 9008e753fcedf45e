"""One small network of each family, with random weights, as a performer: what must hold for all is tested on all."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing

SIDE_PX = 32
CLASSES = 4


class Plain(nn.Module):
    """A residual network of convolutions with one kind of activation."""

    def __init__(self, activation: Callable[[], nn.Module], width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), activation())
        self.one, self.two, self.three = (PlainBlock(activation, width) for _ in range(3))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(self.two(self.one(self.stem(x)))).mean((2, 3)))


class PlainBlock(nn.Module):
    def __init__(self, activation: Callable[[], nn.Module], width: int) -> None:
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(width, width, 3, padding=1), activation()
        self.conv2, self.act2 = nn.Conv2d(width, width, 3, padding=1), activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(x + self.conv2(self.act1(self.conv1(x))))


class ConvNext(nn.Module):
    """Maps whose inner layers are channels last, as in ConvNeXt."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.one, self.two, self.three = (ConvNextBlock(width) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.three(self.two(self.one(self.stem(x)))).mean((2, 3))))


class ConvNextBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.up, self.act, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.down(self.act(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        return x + inner.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """A block of a transformer on (image, token, filter)."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.act = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU()
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Vit(nn.Module):
    """Tokens, of which the first ``extra`` have no place."""

    def __init__(self, width: int = 16, extra: int = 1, patch: int = 8, classes: int = CLASSES) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.extra = nn.Parameter(torch.randn(1, extra, width))
        self.position = nn.Parameter(0.1 * torch.randn(1, extra + (SIDE_PX // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Attention(width) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.extra.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0] if self.extra.shape[1] else self.norm(self.blocks(x)).mean(1))


class Swin(nn.Module):
    """Channels last throughout, with attention in windows and one merging of patches."""

    def __init__(self, width: int = 8, patch: int = 4, classes: int = CLASSES) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, width, patch, patch), nn.LayerNorm(width)
        self.one, self.merge, self.two = Windows(width), nn.Linear(4 * width, 2 * width), Windows(2 * width)
        self.three, self.last, self.head = Windows(2 * width), nn.LayerNorm(2 * width), nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.norm(self.patches(x).permute(0, 2, 3, 1)))
        x = self.merge(torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1))
        return self.head(self.last(self.three(self.two(x))).mean((1, 2)))


class Windows(nn.Module):
    """Attention in windows of 4x4 cells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        rows, cols, width = x.shape[1] // 4, x.shape[2] // 4, x.shape[3]
        x = x.reshape(-1, rows, 4, cols, 4, width).transpose(2, 3).reshape(-1, 16, width)
        return self.inner(x).reshape(-1, rows, cols, 4, 4, width).transpose(2, 3).reshape(-1, 4 * rows, 4 * cols, width)


class Branching(nn.Module):
    """A network that branches on values and answers with a dictionary."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, extra: Tensor | None = None) -> dict[str, Tensor]:
        for each in x:
            if float(each.detach().sum()) == 12345.0 or len(x) == 0:
                raise ValueError("impossible")
        return {"logits": self.inner(x) if extra is None else self.inner(x + extra)}


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: Plain(nn.ReLU),
    "silu": lambda: Plain(nn.SiLU),
    "gelu": lambda: Plain(nn.GELU),
    "convnext": ConvNext,
    "vit": Vit,
    "registers": lambda: Vit(extra=3),
    "vit without class token": lambda: Vit(extra=0),
    "swin": Swin,
}


def network_of(family: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES[family]().eval()


def performer_of(family: str | nn.Module, channels: int = 3) -> Performer:
    module = network_of(family) if isinstance(family, str) else family
    shape = Preprocessing(size_px=(SIDE_PX, SIDE_PX), resize="squash", channels=channels)
    return Performer(module, "net", shape, weights_sha256(module))
