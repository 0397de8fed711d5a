"""Compare what fills missing texts and pictures, then ask a client: python examples/compare_imputers.py FOLDER."""

import sys
from pathlib import Path

import fedsim
from fedsim.prediction import predict


def compare(folder: Path, num_rounds: int = 5) -> None:
    """Run MMFedE with several imputers in this process and print their test metrics."""
    for imputer in ("zero", "mean", "diffusion"):
        config = fedsim.load_config(
            overrides={
                "federation.strategy": "fede",
                "federation.num_rounds": num_rounds,
                "model.imputer": imputer,
                "output": str(folder / imputer),
            }
        )
        result = fedsim.run(config)
        print(f"{imputer:9} test MRR {result.test.mrr:.4f}  Hits@10 {result.test.hits_at_10:.4f}")
        for name, quality in result.imputation.items():
            print(f"          {name:15} cosine {quality['cosine']:.3f}  Hits@10 {quality['hits_at_10']:.3f}")


def ask(run: Path) -> None:
    """Print what each client that knows the question answers to (guitar, hypernym, ?)."""
    for client in range(3):
        try:
            answers = predict(run, client, "guitar", "hypernym", "tail", top=3)
        except fedsim.FedSimError as err:
            print(f"client {client}: {err}")
            continue
        print(f"client {client}: " + ", ".join(f"{answer.label} ({answer.score:.2f})" for answer in answers))


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/imputers")
    compare(target)
    ask(target / "diffusion")
