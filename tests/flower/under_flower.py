"""The tests' ClientApp under Flower's own simulation runtime: `python -m ... FILE SITES ROUNDS`."""

import sys

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

import fedml.flower  # noqa: F401 - before Flower
from tests.flower.apps import FIRST, stock_app


def main(file: str, sites: int, rounds: int) -> None:
    """Run FedAvg over all sites; leave its model and its last losses in `file`."""
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        # it decides how many to ask by who is there, before it waits for as many
        strategy = FedAvg(
            min_available_nodes=sites, min_train_nodes=sites, min_evaluate_nodes=sites
        )
        result = strategy.start(grid, ArrayRecord(FIRST), num_rounds=rounds)
        losses = [m["eval_loss"] for m in result.evaluate_metrics_clientapp.values()]
        first, second = result.arrays.to_numpy_ndarrays()
        np.savez(file, losses=np.array(losses), first=first, second=second)

    run_simulation(
        server_app=server,
        client_app=stock_app(),
        num_supernodes=sites,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 1, "include_dashboard": False},
        },
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
