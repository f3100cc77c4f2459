"""Loss spikes: a loss far above the recent ones, by a robust measure that the spike itself does not move."""

from __future__ import annotations

import statistics

from perennial.train.recipe import SpikeSettings


def is_spike(loss: float, recent: list[float], settings: SpikeSettings) -> bool:
    """True when `loss` is above the recent median by both `rise` nats and `sigmas` robust standard deviations.

    The robust standard deviation is 1.4826 x the median absolute deviation, which equals the standard deviation for
    normal data. With fewer than half a window of losses nothing counts as a spike.
    """
    if settings.action == "off" or len(recent) < settings.window // 2:
        return False
    middle = statistics.median(recent)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in recent)
    return loss > middle + max(settings.rise, settings.sigmas * deviation)
