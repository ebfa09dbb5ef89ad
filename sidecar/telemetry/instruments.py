"""Counters, gauges and histograms: plain numbers, which a scrape turns into families of prometheus-client.

The classes of prometheus-client take a lock for each change, and try the bounds of a histogram one by one.
These need no lock, because one thread alone changes an instrument and makes its series. Any thread may read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import ClassVar, Self

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector


class _Number(Collector):
    """A number, or one for each combination of values of its labels that was asked for."""

    _family: ClassVar[type[CounterMetricFamily] | type[GaugeMetricFamily]]

    def __init__(
        self,
        family: str,
        meaning: str,
        labels: Sequence[str] = (),
        *,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.value: float = 0
        self._names = family, meaning
        self._labels = tuple(labels)
        self._series: dict[tuple[str, ...], Self] = {}
        if registry is not None:
            registry.register(self)

    def labels(self, *values: str) -> Self:
        """The number for these values of the labels, in the order of the labels."""
        series = self._series.get(values)
        if series is None:
            if not self._labels or len(values) != len(self._labels):
                raise ValueError(f"{self._names[0]} has the labels {self._labels}, not {values}")
            series = self._series[values] = type(self)(*self._names)
        return series

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        family = self._family(*self._names, labels=self._labels)
        for values, number in self._series.copy().items() if self._labels else [((), self)]:
            family.add_metric(values, float(number.value))
        yield family


class Counter(_Number):
    """A count that only grows."""

    _family = CounterMetricFamily

    def inc(self, amount: float = 1) -> None:
        self.value += amount


class Gauge(_Number):
    """A value that goes up and down."""

    _family = GaugeMetricFamily

    def set(self, value: float) -> None:
        self.value = value


class Histogram(Collector):
    """How many observations lie below each bucket's bound, and their sum."""

    def __init__(
        self,
        family: str,
        meaning: str,
        labels: Sequence[str] = (),
        *,
        buckets: tuple[float, ...],
        registry: CollectorRegistry,
    ) -> None:
        if labels:
            raise ValueError(f"{family}: a histogram has no labels")
        self._names = family, meaning
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)  # by bucket; the last one has no bound
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[HistogramMetricFamily]:
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        totals = map(float, accumulate(self._counts))
        buckets = list(zip(bounds, totals, strict=True))
        yield HistogramMetricFamily(*self._names, buckets=buckets, sum_value=self._sum)
