"""FID's Inception-V3: torchvision's, with the poolings of the TensorFlow graph that FID was published with.

Three differences: average poolings leave padding out of the mean, the last block takes a maximum, and there are
1,008 classes. Weights: pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import Inception3
from torchvision.models.inception import InceptionA, InceptionC, InceptionE


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class FidA(InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average(x)),
        ]


class FidC(InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        far = self.branch7x7dbl_5(self.branch7x7dbl_4(self.branch7x7dbl_3(self.branch7x7dbl_2(
            self.branch7x7dbl_1(x)))))  # fmt: skip
        near = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        return [self.branch1x1(x), near, far, self.branch_pool(_average(x))]


class FidE(InceptionE):
    largest = False
    """Whether the pooling takes the maximum, as in the last block."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        one = self.branch3x3_1(x)
        two = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, kernel_size=3, stride=1, padding=1) if self.largest else _average(x)
        return [
            self.branch1x1(x),
            torch.cat([self.branch3x3_2a(one), self.branch3x3_2b(one)], 1),
            torch.cat([self.branch3x3dbl_3a(two), self.branch3x3dbl_3b(two)], 1),
            self.branch_pool(pooled),
        ]


class FidLastE(FidE):
    largest = True


class FidInception(Inception3):
    """Pictures `b 3 299 299` in [-1, 1] -> pooled features `b 2048`."""

    def __init__(self) -> None:
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        self.Mixed_5b = FidA(192, pool_features=32)
        self.Mixed_5c = FidA(256, pool_features=64)
        self.Mixed_5d = FidA(288, pool_features=64)
        self.Mixed_6b = FidC(768, channels_7x7=128)
        self.Mixed_6c = FidC(768, channels_7x7=160)
        self.Mixed_6d = FidC(768, channels_7x7=160)
        self.Mixed_6e = FidC(768, channels_7x7=192)
        self.Mixed_7b = FidE(1280)
        self.Mixed_7c = FidLastE(2048)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        for name, block in self.named_children():
            if name not in ("dropout", "fc"):
                x = block(x)
        return x.flatten(1)
