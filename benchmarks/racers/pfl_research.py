"""Apple's pfl-research by its public interface, one process a worker under torchrun."""

from __future__ import annotations

import os
import sys

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.race import Gate
from benchmarks.workloads import WORKLOADS, Workload, accuracy


class _Model(nn.Module):
    """The workload's model with the two methods that pfl asks for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's output."""
        output: Tensor = self.inner(x)
        return output

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return cross_entropy(self(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """Return nothing worth a forward pass: pfl would take one before and after training."""
        return {"rows": Weighted(len(x), 1)}


class _Gate(TrainingProcessCallback):  # type: ignore[misc]
    """Holds every round until the race goes on; the first process speaks for all."""

    def __init__(self, gate: Gate | None, workload: Workload) -> None:
        self.gate, self.workload = gate, workload

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Report a round, and wait for the next."""
        if self.gate is not None:
            self.gate.tell(0.0)
            while (asked := self.gate.wait()) == "score":
                self.gate.tell(accuracy(model.pytorch_model, self.workload))
            if asked == "stop":
                os._exit(0)
        return False, Metrics()


def main() -> None:
    """Race until told to stop."""
    address, name, _, precision = sys.argv[1:]
    assert precision == "fp32"
    torch.set_num_threads(1)
    first = int(os.environ.get("RANK", "0")) == 0
    gate, workload = Gate(address) if first else None, WORKLOADS[name]
    x, y = workload.data()
    np.random.seed(0)
    torch.manual_seed(0)
    inner = _Model(workload.model())
    model = PyTorchModel(
        inner, torch.optim.SGD, central_optimizer=torch.optim.SGD(inner.parameters(), lr=1.0)
    )
    users = FederatedDataset(
        lambda user: Dataset([x[user], y[user]], user_id=user),
        get_user_sampler("random", list(range(workload.users))),
    )
    if gate is not None:
        gate.wait()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=10_000,
            evaluation_frequency=10_000,
            train_cohort_size=workload.cohort,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=users, val_data=users),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=workload.lr, local_batch_size=workload.batch
        ),
        model_eval_params=None,
        callbacks=[_Gate(gate, workload)],
        send_metrics_to_platform=False,
    )


if __name__ == "__main__":
    main()
