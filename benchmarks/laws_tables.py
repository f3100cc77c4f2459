"""Published tables of runs as columns, and the seventeen splits on which extrapolation is measured."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.law_rows import data

Table = dict[str, np.ndarray]
LONG_RUNS = {"7B-4T": 3.945066e12, "13B-5T": 5.0e12}
"""Tokens of the two large models of the OLMo ladder."""


@dataclass(frozen=True)
class Task:
    """Runs to fit and runs to predict, which nothing may look at before."""

    name: str
    fitted: Table
    tested: Table


def read(name: str) -> list[dict[str, str]]:
    """Rows of a published CSV table; empty when it is absent."""
    path = data(name)
    if path is None:
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]], **columns: str | Callable[[dict[str, str]], float]) -> Table:
    """Columns of numbers by name, from a column of the rows or computed for each."""
    return {
        name: np.array([float(r[source]) if isinstance(source, str) else source(r) for r in rows])
        for name, source in columns.items()
    }


def where(columns: Table, mask: np.ndarray) -> Table:
    """The rows in a mask."""
    return {name: values[mask] for name, values in columns.items()}


def chinchilla() -> Table:
    """The 240 points of Hoffmann et al. that the replication keeps: all but the five highest losses."""
    rows = sorted(read("chinchilla_epoch/svg_extracted_data.csv"), key=lambda r: float(r["loss"]))[:-5]
    return table(
        rows,
        parameters="Model Size",
        tokens=lambda r: float(r["Training FLOP"]) / 6 / float(r["Model Size"]),
        loss="loss",
    )


def gadre(dataset: str, loss: str = "loss_c4_val") -> Table:
    """Models of Gadre et al. on one training set, with tokens per parameter as 'multiple'."""
    rows = [r for r in read("overtrain_gadre/runs_104.csv") if r["dataset"] == dataset and r[loss]]
    return table(rows, parameters="N", tokens="D", multiple="tok_mult", loss=loss, error="err_avg17")


def repeated() -> Table:
    """The 182 runs of Muennighoff et al. with their unique tokens."""
    rows = read("data_constrained_datablations/runs_fit182.csv")
    return table(rows, parameters="N", tokens="D", unique_tokens="U", loss="loss")


def gemstones(name: str) -> Table:
    """Checkpoints of the Gemstones models."""
    rows = read(f"gemstones/wandb_df_for_fitting_{name}.csv")
    return table(rows, parameters="params_active_precise", tokens="tokens", loss="final_loss")


def ladder_sizes() -> dict[str, float]:
    """Parameters of the OLMo ladder's models by the first word of a run's name."""
    path = data("olmo_ladder/config_final.json")
    config = json.loads(path.read_text(encoding="utf-8")) if path else {}
    sizes = {name: float(entry["n"]) for name, entry in config.items()}
    return sizes | {"1B": sizes.get("1.3B", 0.0), "3B": 3_169_537_280.0}  # 3B is not in the file


def ladder_rows() -> list[dict[str, str]]:
    """The runs of the OLMo ladder."""
    return read("olmo_ladder/final_rows.csv")


def step_law_best() -> Table:
    """The best run of each (size, tokens) sweep of Step Law."""
    best: dict[tuple[str, str], dict[str, str]] = {}
    for row in read("steplaw_lr_bs/dense_lr_bs_loss.csv"):
        key = row["N"], row["D"]
        if key not in best or float(row["smooth loss"]) < float(best[key]["smooth loss"]):
            best[key] = row
    return table([best[k] for k in sorted(best)], parameters="N", tokens="D", loss="smooth loss")


def isoflop(experiment: str) -> Table:
    """Points of one isoFLOP experiment without its flagged outliers."""
    rows = read("isoflops_openathena/transform_isoflops.csv")
    rows = [r for r in rows if r["experiment"] == experiment and r["outlier"] == "False"]
    return table(rows, parameters="params", tokens="tokens", budget="budget", loss="loss")


def llama_8192() -> Table:
    """Llama isoFLOP runs at context 8192 that finished; 'group' is the budget's number, 13 the largest."""
    rows = []
    for r in read("xlstm_isoflop/runs.csv"):
        is_whole = all(r[name] for name in ("N", "D", "val_loss", "val_step", "steps"))
        if not is_whole or r["source_file"] != "isoflop_llama_ctx8192_wandb_data":
            continue
        if float(r["val_loss"]) <= 5 and float(r["val_step"]) >= 0.98 * float(r["steps"]):
            rows.append(r)
    return table(
        rows, parameters="N", tokens="D", loss="val_loss", group=lambda r: float(r["group"].rpartition("iso")[2])
    )


def ladder(loss: str = "eval/c4_en-validation/CrossEntropyLoss", size: str = "") -> Table:
    """Finished runs of the OLMo ladder at 1, 2, 5 and 10 times 20 tokens per parameter, without repeats."""
    sizes = ladder_sizes()
    rows = [r for r in ladder_rows() if re.fullmatch(rf"{size or '[0-9]+[BM]'}-(1|2|5|10)xC", r["run"]) and r[loss]]
    return table(rows, parameters=lambda r: sizes[r["run"].split("-")[0]], tokens="throughput/total_tokens", loss=loss)


def tasks() -> Iterator[Task]:
    """The seventeen splits: small or cheap runs to fit, larger or dearer ones to predict."""
    for name, columns, tested in _splits():
        if len(columns["loss"]):
            mask = tested(columns)
            keep = {k: columns[k] for k in ("parameters", "tokens", "loss")}
            yield Task(name, where(keep, ~mask), where(keep, mask))


def _splits() -> Iterator[tuple[str, Table, Callable[[Table], np.ndarray]]]:
    yield "Chinchilla, C < 6e20", chinchilla(), lambda t: 6 * t["parameters"] * t["tokens"] >= 6e20
    for name, label in (("c4_original", "C4"), ("rpj", "RPJ"), ("rw_original", "RW")):
        columns = gadre(name)
        usual = where(columns, columns["multiple"] >= 10)
        yield f"Gadre {label}, N <= 411M", usual, lambda t: t["parameters"] > 4.2e8
    for name, label in (("hot_100bplus", "hot"), ("cool_end", "cooled")):
        yield f"Gemstones {label}, N < 1B", gemstones(name), lambda t: t["parameters"] >= 1e9
        yield f"Gemstones {label}, D <= 100B", gemstones(name), lambda t: t["tokens"] > 1e11
    yield "OLMo ladder, N <= 1.3B", ladder(), lambda t: t["parameters"] > 2e9
    yield "Step Law, N <= 430M", step_law_best(), lambda t: t["parameters"] > 4.3e8
    for experiment, label in (
        ("epochai_chinchilla__massivetext__chinchilla", "Chinchilla"),
        ("llama_3__exp_loss", "Llama 3 exp"),
        ("llama_3__raw_loss", "Llama 3 raw"),
        ("marin_202603__comma__llama_2", "Comma"),
        ("marin_202603__dclm__llama_2", "DCLM"),
        ("marin_202603__nemotron__llama_2", "Nemotron"),
    ):
        yield f"isoFLOP {label}, to the top two", isoflop(experiment), _top_two
    yield "Llama 8192, to the top budget", llama_8192(), lambda t: t["group"] == 13


def _top_two(columns: Table) -> np.ndarray:
    return columns["budget"] >= np.unique(columns["budget"])[-2]
