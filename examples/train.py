"""Train one of several classifiers on real data, and say what it is worth on data it never saw.

    python examples/train.py --model cnn
    pepr-profile --metric accuracy='test acc: ([0-9.]+)' -- python examples/train.py --model cnn

The data ships with scikit-learn: `digits` (1797 handwritten digits of 8 x 8 pixels, UCI) and
`breast_cancer` (569 tumours, 30 measurements each, benign or malignant, UCI Wisconsin). With
`--profile` the script marks its phases and logs its curves itself; inside a run of `pepr-profile`
they land there.
"""

from __future__ import annotations

import argparse
import contextlib

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

DATA = {"digits": load_digits, "breast_cancer": load_breast_cancer}
MODELS = ("logistic", "mlp_tiny", "mlp_small", "mlp_large", "resmlp", "resmlp_deep", "cnn")
BATCH = 32


class Residual(nn.Module):
    """x + f(norm(x)): a block that can be stacked deep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def make_model(name: str, *, features: int, classes: int) -> nn.Module:
    if name == "logistic":
        return nn.Linear(features, classes)
    if name in ("mlp_tiny", "mlp_small"):
        width = 16 if name == "mlp_tiny" else 64
        return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, classes))
    if name == "mlp_large":
        return nn.Sequential(
            nn.Linear(features, 512), nn.ReLU(), nn.Dropout(0.3),
            nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.3),
            nn.Linear(512, classes),
        )  # fmt: skip
    if name in ("resmlp", "resmlp_deep"):
        width, blocks = (256, 3) if name == "resmlp" else (384, 8)
        return nn.Sequential(
            nn.Linear(features, width), *(Residual(width) for _ in range(blocks)),
            nn.LayerNorm(width), nn.Linear(width, classes),
        )  # fmt: skip
    side = round(features**0.5)
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Conv2d(48, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(96, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * (side // 4) ** 2, classes),
    )  # fmt: skip


def load(name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """60 % to train, 15 % to watch, 25 % to test; standardised by what is trained on alone."""
    x, y = DATA[name](return_X_y=True)
    x_rest, x_test, y_rest, y_test = train_test_split(
        x, y, test_size=0.25, stratify=y, random_state=0
    )
    x_train, x_val, y_train, y_val = train_test_split(
        x_rest, y_rest, test_size=0.2, stratify=y_rest, random_state=0
    )
    mean, std = x_train.mean(axis=0), x_train.std(axis=0)
    std[std == 0] = 1  # the corner pixels of the digits are always blank
    parts = {"train": (x_train, y_train), "val": (x_val, y_val), "test": (x_test, y_test)}
    return {
        part: (torch.tensor((x - mean) / std, dtype=torch.float32), torch.tensor(y))
        for part, (x, y) in parts.items()
    }


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One pass over the data in random order; the mean loss."""
    model.train()
    total = 0.0
    for batch in torch.randperm(len(x)).split(BATCH):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    return total / len(x)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    return (model(x).argmax(dim=1) == y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--model", choices=MODELS, default="mlp_small", help="cnn: digits only")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--profile", action="store_true", help="mark phases, log the curves")
    args = parser.parse_args()
    if args.model == "cnn" and args.data != "digits":
        parser.error("--model cnn needs images: --data digits")
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")

    run = None
    with contextlib.ExitStack() as stack:
        if args.profile:
            from pepr_profiler import profile

            run = stack.enter_context(profile(args.model))

        def phase(name: str) -> contextlib.AbstractContextManager[object]:
            return run.phase(name) if run else contextlib.nullcontext()

        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        with phase("load"):
            data = load(args.data)
        x, y = data["train"]
        model = make_model(args.model, features=x.shape[1], classes=int(y.max()) + 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{args.model}: {size:,} parameters, {len(x)} samples of {args.data}", flush=True)

        for epoch in range(1, args.epochs + 1):
            with phase("train"):
                loss = train_epoch(model, optimizer, x, y)
                schedule.step()
            with phase("eval"):
                watched = accuracy(model, *data["val"])
            print(f"epoch {epoch:3d}  loss {loss:.4f}  val acc {watched:.4f}", flush=True)
            if run:
                run.log(epoch=epoch, loss=loss, val_accuracy=watched)

        with phase("test"):
            reached = accuracy(model, *data["test"])
        print(f"test acc: {reached:.4f}")
        if run:
            run.log(accuracy=reached, parameters=size)


if __name__ == "__main__":
    main()
