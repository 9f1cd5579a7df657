"""The judge: a small residual network whose features and decisions measure samples. Never part of generation."""

from torch import Tensor, nn
from torch.nn import functional as F


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(nn.Module):
    """Class of an image, and features in which to compare sets of images.

    Args:
        num_channels: channels of the images.
        num_classes: classes.
        width: channels after the first layer; the features are the 4 * width means of the last one.
    """

    def __init__(self, num_channels: int, num_classes: int, width: int):
        super().__init__()
        self.architecture = dict(num_channels=num_channels, num_classes=num_classes, width=width)
        self.stem = convolution(num_channels, width)
        self.first = convolution(width, 2 * width)
        self.middle = nn.Sequential(convolution(2 * width, 2 * width), convolution(2 * width, 2 * width))
        self.second = convolution(2 * width, 4 * width)
        self.last = nn.Sequential(convolution(4 * width, 4 * width), convolution(4 * width, 4 * width))
        self.out = nn.Linear(4 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) in [-1, 1], sides of at least 8. Returns (B, 4 * width): means over the image, all at least 0."""
        x = F.max_pool2d(self.first(self.stem(x)), 2)
        x = F.max_pool2d(self.second(x + self.middle(x)), 2)
        return (x + self.last(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) in [-1, 1]. Returns logits (B, num_classes)."""
        return self.out(self.features(x))
