"""The model, its training and its rows."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader


class Net(nn.Module):
    """Two convolutions and three layers on pictures of 32 by 32 in colour."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def _pictures(rows: int, seed: int):
    """Draw pictures with a brighter band where their label says; the original downloads some."""
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (rows,), generator=chance)
    pictures = torch.randn(rows, 3, 32, 32, generator=chance)
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        picture[:, 3 * label : 3 * label + 4] += 2.0
    return [{"img": p, "label": n} for p, n in zip(pictures, labels, strict=True)]


cache = {}  # the rows of each site, drawn once


def load_data(partition_id: int, num_partitions: int, batch_size: int):
    """Return the loaders of a site's rows: four fifths to train on, the rest to score on."""
    if partition_id not in cache:
        cache[partition_id] = _pictures(400 // num_partitions, 1 + partition_id)
    rows = cache[partition_id]
    split = 4 * len(rows) // 5
    trainloader = DataLoader(rows[:split], batch_size=batch_size, shuffle=True)
    return trainloader, DataLoader(rows[split:], batch_size=batch_size)


def load_centralized_dataset():
    """Return a loader of the rows that nobody trains on."""
    return DataLoader(_pictures(100, 0), batch_size=128)


def train(net, trainloader, epochs, lr, device):
    """Train in place; return the mean loss."""
    net.to(device)
    criterion = nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for batch in trainloader:
            optimizer.zero_grad()
            loss = criterion(net(batch["img"].to(device)), batch["label"].to(device))
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(trainloader))


def test(net, testloader, device):
    """Return loss and accuracy."""
    net.to(device)
    criterion = nn.CrossEntropyLoss()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for batch in testloader:
            labels = batch["label"].to(device)
            outputs = net(batch["img"].to(device))
            loss += criterion(outputs, labels).item()
            correct += (outputs.argmax(1) == labels).sum().item()
    return loss / len(testloader), correct / len(testloader.dataset)
