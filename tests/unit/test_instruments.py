"""Counters, gauges and histograms: a page shows them as it shows those of prometheus-client."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from sidecar.telemetry.instruments import Counter, Gauge, Histogram

BOUNDS = (0.0001, 0.25, 1, 10.0, 120.0)


def page(registry: CollectorRegistry) -> list[str]:
    """The lines of the page, without the times at which the series were made."""
    return [line for line in generate_latest(registry).decode().split("\n") if "_created" not in line]


def both(kind: type[Any], labels: Sequence[str] = (), **options: Any) -> list[tuple[CollectorRegistry, Any]]:
    theirs = getattr(prometheus_client, kind.__name__)
    registries = CollectorRegistry(), CollectorRegistry()
    return [
        (registry, each("one", 'What "it" is \\ \n.', labels, registry=registry, **options))
        for registry, each in zip(registries, (kind, theirs), strict=True)
    ]


def assert_alike(pair: list[tuple[CollectorRegistry, Any]]) -> None:
    (registry, _), (other, _) = pair
    assert page(registry) == page(other)


@given(st.lists(st.sampled_from((*BOUNDS, 0, 0.0, 500.0)) | st.floats(0, 1_000)))
def test_observations_are_shown_alike(values: list[float]) -> None:
    pair = both(Histogram, buckets=BOUNDS)
    for _, histogram in pair:
        for value in values:
            histogram.observe(value)
    assert_alike(pair)


@given(st.lists(st.integers(0, 2**53) | st.floats(0, 1e300)))
def test_counts_are_shown_alike(amounts: list[float]) -> None:
    pair = both(Counter)
    for _, counter in pair:
        counter.inc()
        for amount in amounts:
            counter.inc(amount)
    assert_alike(pair)


@pytest.mark.parametrize("value", [None, True, False, 3, 1.5, -2, 1_796_089_589.158811, math.nan, math.inf])
def test_a_value_is_shown_alike(value: float | None) -> None:
    pair = both(Gauge)
    for _, gauge in pair:
        if value is not None:
            gauge.set(9)
            gauge.set(value)
    assert_alike(pair)


@pytest.mark.parametrize("kind", [Counter, Gauge])
@given(
    st.lists(st.tuples(st.text(st.characters(codec="utf-8")), st.sampled_from(["", 'a"b', "c\\d", "e\nf"])))
)
def test_series_are_shown_alike_in_the_order_of_their_making(
    kind: type[Counter | Gauge], series: list[tuple[str, str]]
) -> None:
    pair = both(kind, ["reason", "action"])
    for _, instrument in pair:
        for number, values in enumerate(series):
            each = instrument.labels(*values)
            each.inc(number) if kind is Counter else each.set(number)
    assert_alike(pair)


def test_each_combination_of_values_is_a_series_of_its_own() -> None:
    counter = Counter("one", "What it is.", ["reason"], registry=CollectorRegistry())
    series = counter.labels("a")
    assert counter.labels("a") is series
    assert counter.labels("b") is not series


@pytest.mark.parametrize("labels", [[], ["reason", "action"]])
def test_other_labels_than_those_of_the_instrument_are_an_error(labels: list[str]) -> None:
    with pytest.raises(ValueError, match="one has the labels"):
        Counter("one", "What it is.", labels, registry=CollectorRegistry()).labels("a")


def test_a_histogram_has_no_labels() -> None:
    with pytest.raises(ValueError, match="one: a histogram has no labels"):
        Histogram("one", "What it is.", ["reason"], buckets=BOUNDS, registry=CollectorRegistry())
