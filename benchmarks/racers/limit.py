"""The limit of W1: a bare PyTorch loop in worker processes of one thread, and nothing else.

The global model lies in shared memory; each worker trains its share of the cohort and adds up
weighted changes; the parent adds the workers' sums. No seeds, checks, receipts or decisions.
"""

from __future__ import annotations

import random
import sys
from multiprocessing.connection import Connection

import torch
from torch import Tensor, multiprocessing, nn
from torch.nn.functional import cross_entropy

from benchmarks.race import Gate
from benchmarks.workloads import WORKLOADS, Workload, accuracy


def main() -> None:
    """Race until told to stop."""
    address, name, workers, precision = sys.argv[1:]
    gate, workload, crew = Gate(address), WORKLOADS[name], int(workers)
    x, y = workload.data()
    torch.manual_seed(0)
    model = workload.model()
    shared = nn.utils.parameters_to_vector(model.parameters()).detach().share_memory_()
    sums = torch.zeros(crew, len(shared)).share_memory_()
    context = multiprocessing.get_context("fork")
    pipes = []
    for number in range(crew):
        here, there = context.Pipe()
        arguments = (there, workload, x, y, shared, sums[number], precision)
        context.Process(target=_work, args=arguments, daemon=True).start()
        pipes.append(here)
    chance = random.Random(0)
    while (asked := gate.wait()) != "stop":
        if asked == "score":
            nn.utils.vector_to_parameters(shared, model.parameters())
            gate.tell(accuracy(model, workload))
            continue
        cohort = chance.sample(range(workload.users), workload.cohort)
        for number, pipe in enumerate(pipes):
            pipe.send(cohort[number::crew])
        for pipe in pipes:
            pipe.recv()
        shared.add_(sums.sum(0), alpha=1 / (workload.cohort * workload.samples))
        gate.tell(0.0)


def _work(
    pipe: Connection,
    workload: Workload,
    x: Tensor,
    y: Tensor,
    shared: Tensor,
    total: Tensor,
    precision: str,
) -> None:
    torch.set_num_threads(1)
    model = workload.model()
    parameters = list(model.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    while True:
        total.zero_()
        for user in pipe.recv():
            for parameter, start in zip(parameters, shared.split(sizes), strict=True):
                parameter.data.copy_(start.view_as(parameter))
            _train(model, parameters, x[user], y[user], workload, precision)
            pieces = zip(parameters, shared.split(sizes), total.split(sizes), strict=True)
            for parameter, start, piece in pieces:
                piece.add_(parameter.data.view(-1) - start, alpha=workload.samples)
        pipe.send(None)


def _train(
    model: nn.Module,
    parameters: list[nn.Parameter],
    x: Tensor,
    y: Tensor,
    workload: Workload,
    precision: str,
) -> None:
    for batch in torch.randperm(len(x)).split(workload.batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(x[batch])
        grads = torch.autograd.grad(cross_entropy(output.float(), y[batch]), parameters)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.data.sub_(grad, alpha=workload.lr)


if __name__ == "__main__":
    main()
