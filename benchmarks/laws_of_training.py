"""Laws of schedules, learning rate, batch, isoFLOP budgets and mixtures against published results, beside their bars.

Run: python -m benchmarks.laws_of_training      (about a minute on one core; tables in ../shared/law_data)
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.law_rows import Row, at_most, data, show, skipped, within
from perennial.scaling import batch, isoflop, sweeps
from perennial.scaling.continual import fit_replay_laws
from perennial.scaling.curves import Rates
from perennial.scaling.laws.base import published
from perennial.scaling.laws.batch_size import BatchSize
from perennial.scaling.laws.learning_rate import LearningRate
from perennial.scaling.laws.multi_power import MultiPower
from perennial.scaling.mixture_fit import fit_mixture_law
from perennial.scaling.schedule_fit import Curve, fit_schedule_law

SIZES = ("25M", "100M", "400M")
TRAINED_ON = ("cosine_24000", "constant_24000", "wsdcon_9")
TESTED_ON = ("cosine_72000", "constant_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18")
SEQUENCE = 2048  # tokens, of the Step Law's batches


def rows() -> Iterator[Row]:
    """R9 to R14 and R16 of the laws' reproductions."""
    yield from schedules()
    yield from learning_rate_and_batch()
    yield from critical_batch()
    yield from isoflop_exponents()
    yield from mixtures()
    yield from replay()


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Schedules


def schedule_curve(folder: Path, size: str, name: str) -> Curve:
    """A measured curve with its rate at every update, rebuilt from the schedule's definition."""
    warmup, peak, final = 2160, 3e-4, 3e-5
    num_updates = 16000 if name.startswith("wsdcon") else int(name.rsplit("_", 1)[1])
    step = np.arange(1, num_updates)
    if name.startswith("cosine"):
        rates = final + (peak - final) * (1 + np.cos(np.pi * (step - warmup) / (num_updates - warmup))) / 2
    elif name.startswith("constant"):
        rates = np.full(len(step), peak)
    elif name.startswith("wsdcon"):
        rates = np.where(step < 8000, peak, int(name.rsplit("_", 1)[1]) * 1e-5)
    else:
        done = np.clip((step - 20000) / 4000, 0, 1)
        rates = peak - (peak - final) * done if name.startswith("wsdld") else peak * (final / peak) ** done
    rates = np.where(step < warmup, peak * step / (warmup - 1), rates)
    points = read(folder / f"{size}_{name}.csv")
    return Curve(Rates(rates), np.array([int(p["step"]) for p in points]), np.array([float(p["loss"]) for p in points]))


def schedules() -> Iterator[Row]:
    """R9: published multi-power coefficients; R10: own fits on three curves, tested on six other schedules."""
    folder = data("multipower_curves")
    if folder is None:
        yield skipped("R9", "multi-power law, published coefficients", "multipower_curves")
        yield skipped("R10", "schedule laws, own fits", "multipower_curves")
        return
    claimed = {"25M": 0.00376, "100M": 0.00435, "400M": 0.00484}
    bars = {"25M": 0.14, "100M": 0.17, "400M": 0.22}
    law = MultiPower()
    for size in SIZES:
        coefficients, _ = published(law, f"luo_2025_{size.lower()}")
        errors = []
        for name in TESTED_ON:
            curve = schedule_curve(folder, size, name)
            labels = np.full(len(curve.steps), curve.rates, dtype=object)
            predicted = law.predict({"curve": labels, "step": curve.steps}, coefficients)
            errors.append(float(np.mean(np.abs(predicted - curve.losses))))
        yield within("R9", f"multi-power {size}, published: MAE", float(np.mean(errors)), claimed[size], 1e-5, "nats")
    for size in SIZES:
        curves = [schedule_curve(folder, size, name) for name in TRAINED_ON]
        for form in ("multi_power", "annealing"):
            fitted = fit_schedule_law(curves, form=form)
            errors, final = [], 0.0
            for name in TESTED_ON:
                curve = schedule_curve(folder, size, name)
                error = 100 * (fitted.predict(curve.rates, curve.steps) / curve.losses - 1)
                errors.append(float(np.abs(error).mean()))
                if name.startswith("wsd_"):
                    final = float(error[-5:].mean())  # of the last five losses recorded: one alone has 0.1% noise
            if form == "multi_power":
                yield at_most("R10", f"{form} {size}, own fit: PredE", float(np.mean(errors)), bars[size], "%")
                note = f"{final:+.3f} %, mean of the last five records"
                yield at_most("R10", f"{form} {size}: final loss of WSD", abs(final), 0.6, "%", note)
            else:
                note = f"final loss of WSD {final:+.3f} %, left-out error {fitted.left_out_error:.3f} %"
                yield Row("R10", f"{form} {size}, own fit: PredE", float(np.mean(errors)), "", "%", None, note)


# Learning rate and batch


def sweep_table(path: Path, size_column: str = "N") -> dict[str, np.ndarray]:
    """The Step Law's runs, batches in tokens."""
    lines = read(path)
    names = {"parameters": size_column, "tokens": "D", "learning_rate": "lr", "batch": "bs", "loss": "smooth loss"}
    table = {ours: np.array([float(line[theirs]) for line in lines]) for ours, theirs in names.items()}
    table["batch"] *= SEQUENCE
    if "moe_name" in lines[0]:
        table["kind"] = np.array([line["moe_name"] for line in lines])
    return table


def excess(table: dict[str, np.ndarray], rate_law: dict[str, float], batch_law: dict[str, float]) -> np.ndarray:
    """Excess loss of two laws on each sweep, %."""
    kinds = table.get("kind", np.zeros(len(table["loss"])))
    result = []
    for kind in np.unique(kinds):
        part = {name: values[kinds == kind] for name, values in table.items()}
        for (parameters, tokens), chosen in sweeps.sweeps(part):
            at = {"parameters": np.array([parameters]), "tokens": np.array([tokens])}
            found = sweeps.excess_loss(
                part["learning_rate"][chosen],
                part["batch"][chosen],
                part["loss"][chosen],
                learning_rate=float(LearningRate().predict(at, rate_law)[0]),
                batch=float(BatchSize(follows="both").predict(at, batch_law)[0]),
            )
            result.append(100 * found)
    return np.array(result)


def learning_rate_and_batch() -> Iterator[Row]:
    """R11: dense sweeps; R12: sweeps of mixtures of experts."""
    dense, moe = data("steplaw_lr_bs/dense_lr_bs_loss.csv"), data("steplaw_lr_bs/moe_lr_bs_loss.csv")
    if dense is None or moe is None:
        yield skipped("R11", "Step Law on dense sweeps", "steplaw_lr_bs")
        yield skipped("R12", "Step Law on sweeps of mixtures of experts", "steplaw_lr_bs")
        return
    table = sweep_table(dense)
    step_law = [published(law, "step_law")[0] for law in (LearningRate(), BatchSize())]
    found = excess(table, *step_law)
    yield at_most("R11", f"Step Law, {len(found)} dense sweeps: mean excess", float(found.mean()), 0.10, "%")
    yield at_most("R11", "Step Law, dense: worst excess", float(found.max()), 0.25, "%")
    own = sweeps.fit_lr_batch(table)
    rate, size = own.learning_rate.coefficients, own.batch.coefficients
    found = excess(table, rate, size)
    note = f"LR = {rate['k']:.3g} N^{rate['a']:.3f} D^{rate['b']:.3f}, B = {size['k']:.3g} D^{size['b']:.3f}"
    yield at_most("R11", "own fit, dense: mean excess", float(found.mean()), 0.10, "%", note)
    yield at_most("R11", "own fit, dense: worst excess", float(found.max()), 0.25, "%")
    deepseek = [published(law, "deepseek")[0] for law in (LearningRate(), BatchSize(follows="both"))]
    found = excess(table, *deepseek)
    yield Row("R11", "DeepSeek's laws, dense: mean excess", float(found.mean()), "", "%", None, "for scale")
    found = excess(sweep_table(moe), *step_law)
    yield at_most("R12", f"Step Law, {len(found)} MoE sweeps, all parameters", float(found.mean()), 0.10, "%")
    found = excess(sweep_table(moe, "Na"), *step_law)
    yield Row("R12", "Step Law, MoE, active parameters", float(found.mean()), "", "%", None, "why all are used")


def critical_batch() -> Iterator[Row]:
    """R13: batch of 20% overhead against size, and how well four sizes predict the fifth."""
    path = data("critical_batch_zhang/steps_to_target.csv")
    if path is None:
        yield skipped("R13", "critical batch of size", "critical_batch_zhang")
        return
    lines = read(path)
    names = {"parameters": "N_millions", "batch": "batch_seqs", "steps": "steps_to_target"}
    table = {ours: np.array([float(line[theirs]) for line in lines]) for ours, theirs in names.items()}
    found = batch.fit_critical_batch(table, reference=256)
    law = found.law.coefficients
    yield within("R13", "critical batch: weight at 1M parameters", law["k"], 93.20, 0.932, "rows")
    yield within("R13", "critical batch: exponent of size", law["a"], 0.47, 0.0047, "", f"rms {found.residual:.3f}")
    misses = []
    for left_out in found.parameters:
        kept = table["parameters"] != left_out
        others = batch.fit_critical_batch({name: values[kept] for name, values in table.items()}, reference=256)
        predicted = others.law.predict({"parameters": np.array([left_out])}).mean[0]
        misses.append(float(abs(predicted / found.batches[found.parameters == left_out][0] - 1)))
    note = "1.2B from the four smaller: " + f"{100 * misses[-1]:.1f} %"
    yield at_most("R13", "critical batch: worst left-out size", 100 * max(misses), 6.0, "%", note)


def isoflop_exponents() -> Iterator[Row]:
    """R14: the exponent of the best size in 15 settings."""
    points, fits = data("porian_resolving/isoflop_points.csv"), data("porian_resolving/published_fits.csv")
    if points is None or fits is None:
        yield skipped("R14", "exponents of the best size", "porian_resolving")
        return
    keys = ("file", "dataset", "hparams", "warmup", "decay", "param_count", "val")
    claimed = {tuple(line[k] for k in keys): float(line["n_exponent"]) for line in read(fits) if line["fit"] == "basic"}
    settings = defaultdict(list)
    for line in read(points):
        if line["loss"]:
            settings[tuple(line[k] for k in keys)].append([float(line[k]) for k in ("flops", "N", "loss")])
    misses = []
    for key, values in settings.items():
        flops, parameters, loss = np.array(values).T
        misses.append(abs(isoflop.fit_isoflop(flops, parameters, loss, bootstrap=0).exponent - claimed[key]))
    close = sum(miss <= 0.02 for miss in misses)
    yield Row("R14", f"exponents within .02 of the published, of {len(misses)}", close, ">= 13", "", close >= 13)
    yield at_most("R14", "worst miss of an exponent", max(misses), 0.035)


def mixtures() -> Iterator[Row]:
    """R16: five training domains, exponential law from 20 mixtures, tested on 6 others."""
    folder = data("mixing_laws")
    if folder is None:
        yield skipped("R16", "mixtures of five domains", "mixing_laws")
        return
    weights = json.loads((folder / "valid_weight.json").read_text(encoding="utf-8"))
    for size in ("70M", "160M", "305M", "410M"):
        shares, losses, domains = mixture_runs(folder / f"5Mix_{size}.csv")
        names = [f"domain{index}" for index in range(shares.shape[1])]
        per_domain, total = [], []
        for test in held_out(len(shares)):
            kept = ~test
            law = fit_mixture_law(
                dict(zip(names, shares[kept].T, strict=True)),
                dict(zip(domains, losses[kept].T, strict=True)),
                weights=weights,
            )
            predicted = law.predict(shares[test])
            per_domain.append(np.mean([np.abs(predicted[d] / losses[test, i] - 1) for i, d in enumerate(domains)]))
            weighted = losses[test] @ np.array([law.weights[d] for d in domains])
            total.append(np.mean(np.abs(law.total(shares[test]) / weighted - 1)))
        note = f"mean of {len(total)} splits; weighted total {100 * np.mean(total):.2f} %, bar <= 1.1"
        met = 100 * np.mean(per_domain) <= 1.6 and 100 * np.mean(total) <= 1.1
        figure = float(100 * np.mean(per_domain))
        yield Row("R16", f"five domains, {size}: error per validation domain", figure, "<= 1.6", "%", bool(met), note)


def replay() -> Iterator[Row]:
    """Not among R1 to R18: the share that keeps the old loss, from a published table of one continuation.

    Source: Que et al. 2024, arXiv 2406.01375, table 5 (chemistry, Qwen 1.5 1.8B, 10B tokens): share of the new domain,
    general loss, domain loss; the general loss before is 2.8602, and 92.4% new data raise it by just under 3%.
    """
    new_share = np.array([0.90, 0.91, 0.92, 0.93, 0.94, 1.0])
    general = np.array([2.9052, 2.9193, 2.9376, 2.9644, 2.9848, 3.4667])
    domain = np.array([1.7321, 1.7312, 1.7311, 1.7279, 1.7265, 1.7220])
    table = {"replay_share": 1 - new_share, "old_loss": general, "new_loss": domain}
    laws = fit_replay_laws(table, bootstrap=0)
    found = laws.critical_share(1.03 * 2.8602)
    assert found is not None
    old, new = laws.losses(0.076)
    note = f"row of 92.4% left out: losses {old[0]:.4f} (2.9445) and {new[0]:.4f} (1.7291)"
    yield within("D-CPT", "largest share of new data at 3% more general loss", 100 * (1 - found), 92.4, 0.3, "%", note)


def held_out(num_runs: int, num_tests: int = 6) -> list[np.ndarray]:
    """Which runs are tested on: the last ones, and four random choices."""
    generator = np.random.default_rng(0)
    order = [np.arange(num_runs)] + [generator.permutation(num_runs) for _ in range(4)]
    return [np.isin(np.arange(num_runs), places[-num_tests:]) for places in order]


def mixture_runs(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Shares (runs, training domains), losses (runs, validation domains) at step 30000, and the latter's names."""
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for line in read(path):
        if line["step"] == "30000":
            table[line["run"]][line["valid_set"]] = float(line["loss"])
    runs = sorted(table, key=lambda run: int(run.split("_")[1].split("-")[0]))
    domains = sorted(table[runs[0]])
    shares = np.array([[float(share) for share in run.split("_")[1].split("-")[1:]] for run in runs])
    return shares, np.array([[table[run][domain] for domain in domains] for run in runs]), domains


if __name__ == "__main__":
    results = show(rows())
    print(f"{sum(r.passed is True for r in results)} met, {sum(r.passed is False for r in results)} missed")
