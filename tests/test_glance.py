"""The page of all claims: what its lines make of the committed figures, and a figure that misses says so."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.channel_peers import OURS
from benchmarks.fashion import RESULTS
from benchmarks.glance import PROMISES, Promise, glance


def _results(promise: Promise) -> Any:
    return json.loads((RESULTS / f"{promise.benchmark}.json").read_text())


def test_the_page_is_what_the_results_say() -> None:
    assert (RESULTS / "README.md").read_text() == glance(RESULTS), "run python -m benchmarks.glance"


def _promise(benchmark: str) -> Promise:
    return next(promise for promise in PROMISES if promise.benchmark == benchmark)


def test_a_wrong_symmetry_is_a_claim_missed() -> None:
    zoo = {"a": {"verify_error": 1e-13}, "b": {"verify_error": None}}
    assert _promise("zoo").read(zoo) == (True, "1 of 1 verified, largest error 1e-13; 1 captured")
    zoo["a"]["verify_error"] = 1e-3
    assert not _promise("zoo").read(zoo).holds


def test_a_broken_file_is_a_claim_missed() -> None:
    rows = _results(_promise("killed"))
    rows[0]["files"]["m.onnx"]["broken"] = 1
    assert not _promise("killed").read(rows).holds


def test_a_default_call_behind_by_more_than_its_error_is_a_claim_missed() -> None:
    pairs = _results(_promise("solving"))
    pair = next(iter(pairs.values()))
    pair["default"]["accuracy"] = max(pair["edges"]) - 1
    assert not _promise("solving").read(pairs).holds


def test_a_peak_above_its_target_is_a_claim_missed() -> None:
    calls = {"a call": {"peak": 1.4, "target": 1.5}, "another": {"peak": 1.6, "target": 1.5}}
    reading = _promise("peaks").read(calls)
    assert (reading.holds, reading.figures) == (False, "1 of 2 calls; above theirs: another 1.60")
    assert _promise("peaks").read({"a call": calls["a call"]}).holds


def test_a_peer_ahead_by_more_than_the_error_is_a_claim_missed() -> None:
    level = {"ours_alone_right": 100, "peer_alone_right": 110}
    network: dict[str, Any] = {"labels": 10_000, "shares": {"0.5": {OURS: {}, "L2": level}}}
    assert _promise("channel_peers").read({"a": network}) == (
        True, "-0.10 to -0.10 points in 1 cells; ahead by more than the error in 0"
    )  # fmt: skip
    network["shares"] |= {"0.75": {"L2": level | {"peer_alone_right": 130}}}
    assert not _promise("channel_peers").read({"a": network}).holds


def test_changes_that_go_unnoticed_are_a_claim_missed() -> None:
    rows = [{"control": True}] * 19 + [{"control": False}]
    assert _promise("mutations").read(rows).holds
    assert not _promise("mutations").read(rows[1:]).holds
