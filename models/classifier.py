"""The judge: a small convolutional network that measures samples by its features and decisions. It takes no part in generation.

The layout and the whitening first layer follow Jordan (2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Stage(nn.Module):
    """Two 3x3 convolutions, the first followed by a halving of the sides; batch norm without gain."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs, momentum=0.4) for _ in range(2))
        for norm in self.norms:
            norm.weight.requires_grad_(False)
        for convolution in (self.first, self.second):
            nn.init.dirac_(convolution.weight[:inputs].detach())           # the rest stays random

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.first(x), min(2, x.shape[-1]))
        x = F.gelu(self.norms[0](x))
        return F.gelu(self.norms[1](self.second(x)))


class Classifier(nn.Module):
    """Class of an image, and features in which to compare sets of images.

    Args:
        num_channels: channels of the images.
        num_classes: classes.
        width: channels of the first stage; there are 4 * width features.
    """

    def __init__(self, num_channels: int, num_classes: int, width: int):
        super().__init__()
        self.architecture = dict(num_channels=num_channels, num_classes=num_classes, width=width)
        patch = 4 * num_channels                            # values of 2x2 pixels
        self.whiten = nn.Conv2d(num_channels, 2 * patch, 2)
        self.whiten.weight.requires_grad_(False)
        self.stages = nn.Sequential(Stage(2 * patch, width), Stage(width, 4 * width), Stage(4 * width, 4 * width))
        self.out = nn.Linear(4 * width, num_classes, bias=False)

    @torch.no_grad()
    def set_whitening(self, x: Tensor) -> None:
        """Make the first layer the principal components of 2x2 patches, scaled to unit variance, and their negatives.

        x: images (N, C, H, W) in [-1, 1] of the training split; some thousands are enough.
        """
        patches = F.unfold(x, 2).mT.flatten(0, 1)                           # (N * places, 4 C)
        variances, directions = torch.linalg.eigh(patches.T.cov())
        filters = directions.T / (variances[:, None] + 1e-4).sqrt()
        mean = filters @ patches.mean(0)
        self.whiten.weight.copy_(torch.cat((filters, -filters)).view_as(self.whiten.weight))
        self.whiten.bias.copy_(torch.cat((-mean, mean)))

    def see(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W) in [-1, 1], sides of at least 2. Returns features (B, 4 * width) and logits (B, num_classes).

        The features are the channels' means over the image. The logits come from their maxima, which the recipe trains with,
        but whose heavy tails make a poor measure of sets.
        """
        x = self.stages(F.gelu(self.whiten(x)))
        return x.mean((2, 3)), self.out(x.amax((2, 3))) / 9

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) in [-1, 1]. Returns logits (B, num_classes)."""
        return self.see(x)[1]
