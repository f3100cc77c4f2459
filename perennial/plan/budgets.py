"""Budgets as people say them: '8 h on 1 x H200', '3e20 FLOPs', '20B tokens', '$500 at $2.5/h on 8 x H100'.

    AMOUNT [at $PRICE/h] [on [N x] DEVICE]

AMOUNT is time, FLOPs, tokens or money. Time is wall time on all devices together; money buys hours of single devices at
a price that the user has to give, because prices change by the week.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from perennial.core.amounts import Amount, human_seconds, parse
from perennial.core.errors import UserError
from perennial.plan.devices import Device, find

USUAL_DEVICE = "H100"
"""What money is spent on where no device is named."""

_ON = re.compile(r"\s+on\s+(?:(\d+)\s*[x*]\s*)?([A-Za-z][\w .-]*?)\s*(?=\s+at\s|$)")
_AT = re.compile(r"\s+at\s+\$?\s*([\d_,.]+)\s*\$?\s*/\s*(?:h|hour)\s*(?=\s+on\s|$)")
_MONEY = re.compile(r"\$\s*([\d_,.]+)\s*([KkMB]?)|([\d_,.]+)\s*([KkMB]?)\s*(?:\$|USD|dollars?)")
_SCALES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}
_FORMS = "'20B tokens', '3e20 FLOPs', '8 h on 1 x H200' or '$500 at $2.5/h on 8 x H100'"


@dataclass(frozen=True)
class Budget:
    """What may be spent, and on which devices."""

    text: str
    amount: Amount
    """Tokens, FLOPs, or seconds of wall time."""
    device: Device
    count: int
    """Devices that work together."""
    is_device_named: bool
    price_per_hour: float | None = None
    """Of one device, where it was given."""
    money: float | None = None

    @property
    def flops_per_second(self) -> float:
        """Of all devices."""
        return self.count * self.device.flops_per_second

    def flops(self, flops_per_token: float) -> float:
        """The budget in FLOPs, of a model that takes so many per token."""
        if self.amount.unit == "tokens":
            return self.amount.value * flops_per_token
        return self.amount.value * (self.flops_per_second if self.amount.unit == "seconds" else 1.0)

    def notes(self) -> list[str]:
        """How time or money became FLOPs; empty where nothing was converted."""
        if self.amount.unit != "seconds":
            return []
        lines = []
        if self.money is not None:
            hours = self.amount.value * self.count / 3600
            lines.append(
                f"${self.money:g} at ${self.price_per_hour:g}/h: {hours:.4g} device-hours, "
                f"{human_seconds(self.amount.value)} on {self.count} x {self.device.name}"
                + ("" if self.is_device_named else f" (no device was named: {USUAL_DEVICE} is assumed)")
            )
        speed = f"{self.flops_per_second:.3g} FLOPs/s"
        lines.append(
            f"{human_seconds(self.amount.value)} on {self.count} x {self.device.name}: {speed}, "
            f"{self.device.peak_flops:.3g} each ({self.device.source}) x MFU {self.device.mfu:.3g} "
            f"({self.device.mfu_source})"
        )
        return lines


def read_budget(text: str, *, here: Device, mfu: float | None = None) -> Budget:
    """The budget in a text; `here` is what a time is meant for when no device is named. Raises UserError."""
    rest, device_name, count = _taken_device(f"{text.strip()}")
    rest, price = _taken_price(rest)
    money = _MONEY.fullmatch(rest.strip())
    if money is None and price is not None:
        raise UserError(f"--budget {text!r}: a price per hour belongs to money, such as '$500 at $2.5/h'")
    device = find(device_name, mfu) if device_name else here
    if money is None:
        amount = _amount(rest, text)
        return Budget(text, amount, device, count, bool(device_name))
    value = _number(money[1] or money[3], text) * _SCALES[money[2] or money[4] or ""]
    if price is None:
        raise UserError(
            f"--budget {text!r}: what does one device cost per hour? Prices are not assumed; write "
            f"'{rest.strip()} at $2.5/h'"
        )
    if value <= 0 or price <= 0:
        raise UserError(f"--budget {text!r}: money and price must be above 0")
    device = find(device_name or USUAL_DEVICE, mfu)
    seconds = Amount(value / price / count * 3600, "seconds")
    return Budget(text, seconds, device, count, bool(device_name), price, value)


def _taken_device(text: str) -> tuple[str, str | None, int]:
    """The text without its device, the device's name, and how many."""
    found = _ON.search(text)
    if found is None:
        return text, None, 1
    count = int(found[1] or 1)
    if count < 1:
        raise UserError(f"--budget {text!r}: at least 1 device is needed")
    return text[: found.start()] + text[found.end() :], found[2].strip(), count


def _taken_price(text: str) -> tuple[str, float | None]:
    found = _AT.search(text)
    if found is None:
        return text, None
    return text[: found.start()] + text[found.end() :], _number(found[1], text)


def _number(digits: str, text: str) -> float:
    try:
        return float(digits.replace("_", "").replace(",", ""))
    except ValueError:
        raise UserError(f"--budget {text!r}: {digits!r} is not a number; write it like {_FORMS}") from None


def _amount(rest: str, text: str) -> Amount:
    try:
        amount = parse(rest, ("tokens", "flops", "seconds"))
    except ValueError:
        raise UserError(f"--budget {text!r}: not understood; write it like {_FORMS}") from None
    if not (amount.value > 0 and math.isfinite(amount.value)):
        raise UserError(f"--budget {text!r}: must be above 0")
    return amount
