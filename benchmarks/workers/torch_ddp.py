"""A rank of PyTorch's training step: DistributedDataParallel over Gloo, channels last.

Serves bench.py as chexlib.scaling.throughput does. Needs torch, so it runs in an environment of its
own (`make peer`); torchvision is not needed.
"""

import json
import os
import sys
import time

import torch
from torch import distributed, nn

STAGES = {"densenet121": (6, 12, 24, 16), "resnet50": (3, 4, 6, 3), "vgg16": (2, 2, 3, 3, 3)}


def normalised(inputs: int, outputs: int, side: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class Grow(nn.Sequential):
    """A dense layer: 32 new channels beside the old ones."""

    def __init__(self, channels: int):
        super().__init__(
            *[
                nn.BatchNorm2d(channels),
                nn.ReLU(True),
                *normalised(channels, 128, 1),
                nn.ReLU(True),
            ],
            nn.Conv2d(128, 32, 3, padding=1, bias=False),
        )

    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)


class Residual(nn.Module):
    def __init__(self, inputs: int, middle: int, stride: int):
        super().__init__()
        outputs = 4 * middle
        parts = [
            *normalised(inputs, middle, 1, stride),
            nn.ReLU(True),
            *normalised(middle, middle, 3),
            nn.ReLU(True),
        ]
        self.branch = nn.Sequential(*parts, *normalised(middle, outputs, 1))
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*normalised(inputs, outputs, 1, stride))
        )

    def forward(self, x):
        return torch.relu(self.branch(x) + self.shortcut(x))


def network(topology: str) -> nn.Module:
    """One of the three, with 14 logits."""
    stem = [*normalised(3, 64, 7, 2), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)]
    layers, channels = ([], 3) if topology == "vgg16" else (stem, 64)
    for stage, repeats in enumerate(STAGES[topology]):
        for i in range(repeats):
            if topology == "densenet121":
                layers.append(Grow(channels))
                channels += 32
            elif topology == "resnet50":
                layers.append(Residual(channels, 64 * 2**stage, 2 if stage and not i else 1))
                channels = 256 * 2**stage
            else:
                layers += [
                    nn.Conv2d(channels, min(512, 64 * 2**stage), 3, padding=1),
                    nn.ReLU(True),
                ]
                channels = min(512, 64 * 2**stage)
        if topology == "vgg16":
            layers.append(nn.MaxPool2d(2))
        elif topology == "densenet121":
            layers += [nn.BatchNorm2d(channels), nn.ReLU(True)]
            if stage < 3:
                layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
                channels //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 14))


def work(rank: int, settings: dict, orders) -> None:
    """Serve the orders, on one rank."""
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    model = network(settings["topology"]).to(memory_format=torch.channels_last)
    if settings["ranks"] > 1:
        store = f"file://{settings['store']}"
        distributed.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=settings["ranks"]
        )
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    size, batch = settings["size"], settings["batch_per_rank"]
    pixels = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels = (torch.rand(batch, 14) > 0.9).float()
    loss = nn.BCEWithLogitsLoss()
    while steps := orders[rank].get():
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            optimizer.zero_grad()
            with torch.autocast(
                "cpu", torch.bfloat16, enabled=settings["precision"] == "mixed_bfloat16"
            ):
                logits = model(pixels)
            loss(logits.float(), labels).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - began)
        if rank == 0:
            print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    settings["store"] = f"{os.environ.get('TMPDIR', '/tmp')}/torch-peer-{os.getpid()}"
    context = torch.multiprocessing.get_context("spawn")
    orders = [context.Queue() for _ in range(settings["ranks"])]
    ranks = [
        context.Process(target=work, args=(i, settings, orders), daemon=True)
        for i in range(settings["ranks"])
    ]
    for rank in ranks:
        rank.start()
    while steps := int(sys.stdin.readline() or 0):
        for order in orders:
            order.put(steps)
