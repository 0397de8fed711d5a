"""The job of `transe_job.py` in Flower's simulation (message API, FedAvg, the Ray backend).

Run by the Python of a virtual environment that holds Flower, since Flower pins another Ray:

    DIR/bin/python benchmarks/flower_job.py '{"triples": "job.npy", ...}'
"""

import logging

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from transe_job import Job, end_round, initial_state, read_job, train_client


def make_client_app(job: Job) -> ClientApp:
    """Make the client: load the model that came, train it, send it back."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(job.num_threads)
        state = message.content["arrays"].to_torch_state_dict()
        update = train_client(job, int(context.node_config["partition-id"]), state)
        content = RecordDict({"arrays": ArrayRecord(update), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content=content, reply_to=message)

    return app


def make_server_app(job: Job) -> ServerApp:
    """Make the server: FedAvg over all clients, no evaluation."""
    app = ServerApp()

    def after_round(round_num: int, arrays: ArrayRecord) -> None:
        if round_num > 0:
            end_round(round_num, job)

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=job.num_clients)
        arrays = ArrayRecord(initial_state(job))
        strategy.start(grid, arrays, num_rounds=job.num_rounds, evaluate_fn=after_round)

    return app


def main() -> None:
    """Run the rounds."""
    job = read_job()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        make_server_app(job),
        make_client_app(job),
        num_supernodes=job.num_clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": job.num_workers, "log_to_driver": False, "logging_level": logging.ERROR},
        },
    )


if __name__ == "__main__":
    main()
