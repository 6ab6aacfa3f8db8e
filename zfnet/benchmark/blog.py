"""The blog's own network and loop: what this program is measured against.

Pools that return indices which nobody uses, NCHW in fp32, each image resized by Pillow in a DataLoader, and
`.item()` after every step. Written after the blog post; it trains the same layers with the same optimizer.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from zfnet.benchmark.turns import time_steps
from zfnet.data import ImageSet


class BlogZFNet(nn.Module):
    """The blog's module for images [N, 3, 224, 224]; its state dict has the names `features.0.weight` …"""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()

        def pool(padding: int) -> nn.Module:
            return nn.MaxPool2d(3, 2, padding, return_indices=True)

        def relu() -> nn.Module:
            return nn.ReLU(inplace=True)

        self.features = nn.Sequential(
            *(nn.Conv2d(3, 96, 7, 2, 1), relu(), pool(1)),
            *(nn.Conv2d(96, 256, 5, 2), relu(), pool(1)),
            *(nn.Conv2d(256, 384, 3, 1, 1), relu()),
            *(nn.Conv2d(384, 384, 3, 1, 1), relu()),
            *(nn.Conv2d(384, 256, 3, 1, 1), relu(), pool(0)),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(9216, 4096), relu(), nn.Dropout()),
            *(nn.Linear(4096, 4096), relu(), nn.Dropout()),
            nn.Linear(4096, num_classes),
        )
        self.feature_outputs: list[Tensor | int] = [0] * len(self.features)
        self.switch_indices: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.features):
            if isinstance(layer, nn.MaxPool2d):
                x, self.switch_indices[i] = layer(x)
            else:
                x = layer(x)
            self.feature_outputs[i] = x
        logits: Tensor = self.classifier(x.view(x.size(0), -1))
        return logits


class PillowImages(Dataset):
    """One image at a time, as a data set of torchvision would give it: Pillow, resize, tensor, normalise."""

    def __init__(self, images: ImageSet, size: int) -> None:
        self.images = images
        self.transform = transforms.Compose(
            [
                transforms.Resize((size, size)),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.images.images[int(self.images.rows[index])]
        return self.transform(Image.fromarray(pixels)), int(self.images.labels[index])


class BlogLoop:
    """The blog's training loop on a set of images."""

    name = "the blog's loop"

    def __init__(self, images: ImageSet, batch_size: int, device: torch.device, workers: int) -> None:
        self.batch_size, self.device = batch_size, device
        self.loader = DataLoader(
            PillowImages(images, 224), batch_size, shuffle=True, num_workers=workers, drop_last=True
        )
        self.net = BlogZFNet(len(images.classes)).to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3)
        self.criterion = nn.CrossEntropyLoss()

    def turn(self, steps: int, warmup: int) -> float:
        return time_steps(self._loop(), steps, warmup, self.device)

    def _loop(self) -> Generator[None, None, None]:
        self.net.train()
        train_loss, train_correct, seen = 0.0, 0.0, 0
        while True:
            for batch_images, batch_labels in self.loader:
                images, labels = batch_images.to(self.device), batch_labels.to(self.device)
                logits = self.net(images)
                loss = self.criterion(logits, labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                seen += len(labels)
                train_loss += loss.item()
                train_correct += (logits.argmax(1) == labels).sum().item()
                yield
