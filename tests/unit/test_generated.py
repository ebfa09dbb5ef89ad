"""No composition of readings leads to a gated path unjudged, and no parser reads a judged body otherwise.

`python -m tests.long.generated` and `python -m tests.long.generated_bodies` do the same a million times.
"""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tests import deforming, deformingforms, differential, lenient

TARGETS, BODIES, FORMS = 1_200, 3_000, 3_000


def test_no_generated_target_reaches_a_gated_path_unjudged() -> None:
    draw, verdicts = random.Random(1), Counter[str]()
    found = []
    for _ in range(TARGETS):
        verdict, differs = differential.of_request(*deforming.request(draw))
        verdicts[verdict] += 1
        found += [differs] if differs else []
    assert found == []
    # The generator is no use if it makes only what is refused, or only what passes.
    assert verdicts["ambiguous_path"] > TARGETS / 3
    assert verdicts["passes"] > TARGETS / 10
    assert verdicts["override_refused"] > TARGETS / 50
    assert verdicts["judged"] > 0


def test_no_generated_target_reaches_a_path_of_another_kind_of_pattern_unjudged() -> None:
    draw, verdicts = random.Random(1), Counter[str]()
    found = []
    for number in range(TARGETS):
        case = differential.FURTHER[number % len(differential.FURTHER)]
        verdict, differs = differential.of_request(*deforming.request(draw, case.spelled), case)
        verdicts[verdict] += 1
        found += [differs] if differs else []
    assert found == []
    assert verdicts["ambiguous_path"] > TARGETS / 3
    assert verdicts["passes"] > TARGETS / 50
    assert verdicts["override_refused"] > TARGETS / 50
    assert verdicts["judged"] > TARGETS / 50


@given(st.sampled_from(differential.FURTHER), st.randoms(use_true_random=False))
def test_no_target_that_hypothesis_deforms_reaches_another_kind_of_pattern_unjudged(
    case: differential.Case, draw: random.Random
) -> None:
    assert differential.of_request(*deforming.request(draw, case.spelled), case)[1] is None


def test_no_parser_reads_a_generated_body_otherwise_than_it_is_judged() -> None:
    draw, verdicts = random.Random(1), Counter[str]()
    found = []
    for _ in range(BODIES):
        verdict, differs = differential.of_body(deforming.body(draw))
        verdicts[verdict] += 1
        found += differs
    assert found == []
    assert verdicts["judged"] > BODIES / 10
    assert verdicts["invalid_request"] > BODIES / 10


def test_no_backend_reads_a_generated_form_otherwise_than_it_is_judged() -> None:
    draw, verdicts = random.Random(1), Counter[str]()
    found = []
    for _ in range(FORMS):
        verdict, differs = differential.of_form(*deformingforms.form(draw))
        verdicts[verdict] += 1
        found += differs
    assert found == []
    assert verdicts["judged"] > FORMS / 10
    assert verdicts["invalid_request"] > FORMS / 10
    assert verdicts["no strict form"] > FORMS / 20


@given(st.randoms(use_true_random=False))
def test_no_form_that_hypothesis_deforms_is_read_otherwise_than_it_is_judged(draw: random.Random) -> None:
    assert differential.of_form(*deformingforms.form(draw))[1] == []


@given(st.randoms(use_true_random=False))
def test_no_target_that_hypothesis_deforms_reaches_a_gated_path_unjudged(draw: random.Random) -> None:
    assert differential.of_request(*deforming.request(draw))[1] is None


@given(st.randoms(use_true_random=False))
def test_no_body_that_hypothesis_deforms_is_read_otherwise_than_it_is_judged(draw: random.Random) -> None:
    assert differential.of_body(deforming.body(draw))[1] == []


@given(st.text(st.sampled_from("/%2f.;\\+uU05exct \x00\x7f\u200b\uff0f?#")), st.text(max_size=5))
def test_no_text_around_a_gated_path_hides_it(between: str, after: str) -> None:
    for text in (f"/recovery{between}/execute{after}", f"/recovery/exec{between}ute", f"{between}/execute"):
        assert differential.of_request(text.encode("utf-8", "replace"))[1] is None


def test_each_deformation_by_itself_is_undone_by_the_careless_backend() -> None:
    draw = random.Random(1)
    for deform in deforming.DEFORMATIONS:
        reached = sum(lenient.reads_as(deform(draw, deforming.PATH)) is not None for _ in range(60))
        assert reached >= 10, deform
