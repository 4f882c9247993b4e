"""A training as people run them: PyTorch, a CNN on handwritten digits, DataLoader workers.

    python -m benchmarks.loader --seconds 30

Says "epoch N" at the end of each epoch. Its data ships with scikit-learn.
"""

from __future__ import annotations

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset


class NoisyDigits(Dataset[tuple[Tensor, int]]):
    """Digits of 8 x 8 pixels, turned and blurred anew each time: work for the loader's workers."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        self._images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        self._labels = labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        turn = 0.2 * torch.randn(2, 3) + torch.eye(2, 3)
        grid = functional.affine_grid(turn[None], [1, 1, 8, 8], align_corners=False)
        image = functional.grid_sample(self._images[index : index + 1], grid, align_corners=False)
        return image[0] + 0.05 * torch.randn(1, 8, 8), int(self._labels[index])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="train this long (default 30)")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 16, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())
    loader = DataLoader(
        NoisyDigits(), batch_size=64, shuffle=True, num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )  # fmt: skip
    end_s = time.monotonic() + args.seconds
    epoch = 0
    while time.monotonic() < end_s:
        for images, labels in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if time.monotonic() >= end_s:
                break
        epoch += 1
        print(f"epoch {epoch}", flush=True)


if __name__ == "__main__":
    main()
