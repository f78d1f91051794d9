"""Train one linear classifier on a real data set and record the run.

    python examples/train_model/run.py
    python examples/train_model/run.py --experiment_name iris_svm --model_name linear_svm \
        --n_epochs 30 --learning_rate 0.01
    python examples/train_model/run.py --dataset digits --model_name perceptron
    python ailab.py runs

Works from any directory. The run goes into the lab of DB_PATH (~/.ai-lab/lab.db), its files, named
<model>_metrics_<timestamp>.csv and <model>_model_<timestamp>.joblib, into `checkpoints/` beside
this script.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import math
import os
import sys
import time
from inspect import signature
from pathlib import Path

import joblib
import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import accuracy_score, f1_score, log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout needs no installation
from lab_logger import StoreError, connect, default_db_path, log, log_run

# The loss that SGDClassifier minimises, one binary problem per class (one against the rest).
MODELS = {"logistic_regression": "log_loss", "linear_svm": "hinge", "perceptron": "perceptron"}
# Bundled with scikit-learn, so nothing is downloaded: 150, 178, 569 and 1,797 rows.
DATASETS = {"iris": load_iris, "wine": load_wine,
            "breast_cancer": load_breast_cancer, "digits": load_digits}
CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
IS_SCRIPT = __name__ == "__main__"     # the sweep imports this file and shows its own progress


@log_run
def train_model(test_size: float = 0.25, random_state: int = 0, n_epochs: int = 30,
                learning_rate: float = 0.01, model_name: str = "logistic_regression",
                experiment_name: str = "iris_demo", dataset_id: str = "iris",
                task_name: str = "classification") -> dict:
    """Train for `n_epochs` passes over the data; return the last epoch's metrics and the artifacts.

    Metrics: train_loss and val_loss (see `mean_loss`), accuracy and f1 (macro) on the validation
    part, fractions. Raises ValueError for what `check_arguments` refuses.
    """
    check_arguments(test_size, random_state, n_epochs, learning_rate, model_name, dataset_id)
    features, labels = DATASETS[dataset_id](return_X_y=True)       # (n, d), (n,) from 0 to k - 1
    train_x, val_x, train_y, val_y = train_test_split(
        features, labels, test_size=test_size, stratify=labels, random_state=random_state)
    scaler = StandardScaler().fit(train_x)       # on the training part: validation must stay unseen
    train_x, val_x = scaler.transform(train_x), scaler.transform(val_x)
    model = SGDClassifier(
        loss=MODELS[model_name], learning_rate="constant", eta0=learning_rate,
        # Rosenblatt's perceptron has no penalty; started at zero, its learning rate then scales the
        # weights and changes no prediction.
        penalty=None if model_name == "perceptron" else "l2",
        random_state=np.random.RandomState(random_state))  # an int would repeat one row order
    rows = []
    for epoch in range(1, n_epochs + 1):
        started = time.perf_counter()
        model.partial_fit(train_x, train_y, classes=np.unique(labels))
        guess = model.predict(val_x)
        metrics = {"train_loss": mean_loss(model, train_x, train_y),
                   "val_loss": mean_loss(model, val_x, val_y),
                   "accuracy": float(accuracy_score(val_y, guess)),
                   "f1": float(f1_score(val_y, guess, average="macro"))}
        log(epoch=epoch, **metrics)
        rows.append({"epoch": epoch, **metrics})
        print_progress(rows[-1], n_epochs, time.perf_counter() - started)
    return {**metrics, "artifacts": save(model_name, make_pipeline(scaler, model), rows)}


def mean_loss(model: SGDClassifier, features: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of the model's own loss over the rows, without the penalty.

    log_loss: -log p(label) (Bishop 2006, eq. 4.108), p being the k sigmoids scaled to sum to 1.
    hinge: max(0, 1 - margin) (Crammer and Singer, JMLR 2001); perceptron: max(0, -margin), the
    same without a threshold. The margin is the label's score less the best other one.
    """
    if model.loss == "log_loss":
        return float(log_loss(labels, model.predict_proba(features), labels=model.classes_))
    scores = model.decision_function(features)                      # (n, k), for two classes (n,)
    if scores.ndim == 1:
        margin = np.where(labels == 1, scores, -scores)
    else:
        is_label = labels[:, None] == model.classes_                # (n, k), one True a row
        margin = scores[is_label] - np.where(is_label, -np.inf, scores).max(axis=1)
    threshold = 1.0 if model.loss == "hinge" else 0.0
    return float(np.maximum(0.0, threshold - margin).mean())


def save(model_name: str, pipeline: Pipeline, rows: list[dict]) -> list[str]:
    """Write the metrics CSV and the model, which takes raw features; return the absolute paths."""
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    while True:
        stamp = time.time_ns() // 1000           # microseconds since 1970
        metrics_path = CHECKPOINTS / f"{model_name}_metrics_{stamp}.csv"
        try:
            file = open(metrics_path, "x", newline="", encoding="utf-8")  # noqa: SIM115
            break
        except FileExistsError:                  # a run beside this one had the same microsecond
            continue
    with file:
        writer = csv.DictWriter(file, rows[0])   # epoch, train_loss, val_loss, accuracy, then f1
        writer.writeheader()
        writer.writerows(rows)
    model_path = CHECKPOINTS / f"{model_name}_model_{stamp}.joblib"
    joblib.dump(pipeline, model_path)
    return [str(metrics_path), str(model_path)]


def print_progress(row: dict, n_epochs: int, epoch_s: float) -> None:
    """Print the epoch on one line that a terminal rewrites; elsewhere only the last epoch's."""
    is_last = row["epoch"] == n_epochs
    if IS_SCRIPT and (is_last or sys.stdout.isatty()):
        print(f"epoch {row['epoch']}/{n_epochs}: train_loss {row['train_loss']:.4f}, "
              f"val_loss {row['val_loss']:.4f}, accuracy {row['accuracy']:.1%}, "
              f"{epoch_s * 1000:.1f} ms", end="\n" if is_last else "\r", flush=True)


def check_arguments(test_size: float, random_state: int, n_epochs: int, learning_rate: float,
                    model_name: str, dataset_id: str) -> None:
    """Raise ValueError for the first bad one: a sentence with its value and what is accepted."""
    for name, value, is_good, accepted in (
            ("model_name", model_name, model_name in MODELS, f"one of {', '.join(MODELS)}"),
            ("dataset", dataset_id, dataset_id in DATASETS, f"one of {', '.join(DATASETS)}"),
            ("n_epochs", n_epochs, n_epochs >= 1, "a whole number from 1"),
            ("learning_rate", learning_rate, 0 < learning_rate < math.inf, "a number above 0"),
            ("random_state", random_state, 0 <= random_state < 1 << 32,
             "a whole number from 0 to 4294967295"),
            ("test_size", test_size, 0.1 <= test_size <= 0.9, "a fraction from 0.1 to 0.9")):
        if not is_good:
            raise ValueError(f"{name} is {value!r}; give {accepted}")


def recorded_run_id() -> str | None:
    """Return this process's newest run; None where the lab could not take it in (it has warned)."""
    try:
        conn = connect(default_db_path(), "ro")
    except StoreError:
        return None
    with contextlib.closing(conn):
        row = conn.execute("SELECT run_id FROM runs WHERE pid = ? ORDER BY timestamp DESC LIMIT 1",
                           (os.getpid(),)).fetchone()
    return row[0] if row else None


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; return 0, 2 for bad arguments, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("run.py", description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, parameter in signature(train_model).parameters.items():
        names = ["--dataset", "--dataset_id"] if name == "dataset_id" else [f"--{name}"]
        parser.add_argument(*names, dest=name, type=type(parameter.default),
                            default=parameter.default, help="default: %(default)s")
    options = vars(parser.parse_args(argv))
    try:
        check_arguments(**{name: options[name] for name in signature(check_arguments).parameters})
    except ValueError as error:
        parser.error(str(error))
    try:
        result = train_model(**options)
    except KeyboardInterrupt:
        print("\ninterrupted: the run is recorded as killed", file=sys.stderr)
        return 130
    print(*result["artifacts"], f"run {recorded_run_id() or 'not in the lab yet'}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
