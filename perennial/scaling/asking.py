"""What is asked of a fitted law, from the texts of a command line: amounts, named inputs, a schedule's rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perennial.core import plugins
from perennial.core.amounts import parse
from perennial.core.errors import UserError, nearest
from perennial.core.settings import override, raise_problems
from perennial.scaling.choosing import Blend
from perennial.scaling.curves import CURVE, STEP, Rates
from perennial.scaling.fitting import Fit
from perennial.scaling.laws.base import Law
from perennial.scaling.schedule_fit import schedule_rates


def law_of(fitted: Fit | Blend) -> Law:
    """The law whose inputs and target stand for the whole: of a blend, the one that reads most."""
    if isinstance(fitted, Fit):
        return fitted.law
    return max((member.fit.law for member in fitted.members), key=lambda law: len(law.inputs))


def build(name: str, assignments: Sequence[str]) -> Law:
    """A law by name with 'setting=value' texts; a list is given with commas. Raises UserError."""
    settings = override({}, list(assignments))
    lists = {key: value.split(",") for key, value in settings.items() if isinstance(value, str) and "," in value}
    law, problems = plugins.build("laws", {"name": name, **settings, **lists})
    raise_problems(problems, f"--form {name}, whose settings are given as --set NAME=VALUE")
    assert isinstance(law, Law), "no problems"
    return law


def check_choice(option: str, value: str, allowed: Sequence[str]) -> None:
    """Raises UserError for a value that is not among those allowed."""
    if value not in allowed:
        raise UserError(f"{option} '{value}' is none of {', '.join(allowed)}.{nearest(value, allowed)}")


def count(option: str, text: str | None) -> float | None:
    """'1.4B', '3e20' or '900B tokens' as a number above 0; None for None. Raises UserError that names the option."""
    if text is None:
        return None
    value = _amount(option, text)
    if value <= 0:
        raise UserError(f"{option} {text!r} must be more than 0")
    return value


def check_read(law: Law, name: str, option: str) -> None:
    """Raises UserError for an option that gives what a law does not read."""
    names = [i.name for i in law.inputs]
    if name not in names:
        raise UserError(f"{option}: this law reads no {name}, but {', '.join(names)}; say --at NAME=VALUE")


def inputs(
    fitted: Fit | Blend,
    shortcuts: Mapping[str, tuple[str, str | None]],
    named: Sequence[str],
    schedule: str | None = None,
    num_updates: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Columns of one row for a prediction. Raises UserError for what the law does not read and for what is missing.

    `shortcuts` are {input: (option, its text)}, `named` texts 'input=value'. A law of the loss curve takes the rates of
    a component of `perennial.schedules`, with its settings, over `num_updates`, and predicts the last update.
    """
    law = law_of(fitted)
    names = [i.name for i in law.inputs]
    values = {}
    for text in named:
        name, equals, amount = text.partition("=")
        if not equals or name not in names:
            raise UserError(f"--at {text!r} must be NAME=VALUE with one of {', '.join(names)}.{nearest(name, names)}")
        if name in values:
            raise UserError(f"--at {text!r}: {name} is given already; say it once")
        values[name] = _amount("--at", amount)
    for name, (option, given) in shortcuts.items():
        if (value := count(option, given)) is not None:
            check_read(law, name, option)
            if name in values:
                raise UserError(f"{option} {given} and --at {name}=... both say {name}; say one of them")
            values[name] = value
    if "unique_tokens" in values and "tokens" in values:
        values["unique_tokens"] = min(values["unique_tokens"], values["tokens"])
    columns = {name: np.array([value]) for name, value in values.items()}
    if STEP.name in names:
        columns |= _curve(schedule, num_updates, settings or {})
    elif schedule is not None:
        raise UserError(f"--schedule: only laws of the loss curve read one; this law reads {', '.join(names)}")
    lacking = [i.name for i in law.inputs if not i.optional and i.name not in columns]
    if lacking:
        options = [shortcuts[name][0] if name in shortcuts else f"--at {name}=VALUE" for name in lacking]
        instead = ", or --flops" if {"parameters", "tokens"} <= set(names) else ""
        raise UserError(f"a prediction by this law needs {', '.join(options)}; say them{instead}, or --table FILE")
    return columns


def _curve(schedule: str | None, num_updates: int | None, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if schedule is None or num_updates is None:
        raise UserError("a law of the loss curve predicts a --schedule over --updates, or the rows of a --table")
    if num_updates < 1:
        raise UserError(f"--updates {num_updates} must be 1 or more")
    label = np.empty(1, dtype=object)
    label[0] = Rates(schedule_rates(schedule, settings, num_updates))
    return {CURVE.name: label, STEP.name: np.array([float(num_updates)])}


def _amount(option: str, text: str) -> float:
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        unit = "" if any(word in text.lower() for word in ("tok", "flop")) else " tokens"
        return float(text) if _is_plain(text) else parse(text + unit, ("tokens", "flops")).value
    except ValueError:
        raise UserError(f"{option} {text!r} must be a number such as 1.4B or 3e20") from None


def _is_plain(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
