"""Protects what third parties rely on: a sound component passes the contract of its kind, and a broken one is found by it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

# The tests that a broken component of each kind must fail: what it was made to do wrong.
FOUND_BY = {
    "Method": "test_the_order_of_rows_and_the_order_of_classes_do_not_matter",
    "Control": "test_the_same_targets_come_out_every_time",
    "Codec": "test_large_values_are_stored_within_the_bound_or_refused_and_never_clipped",
    "Layout": "test_any_range_of_positions_reads_what_was_written",
    "Dataset": "test_listing_twice_gives_the_same_samples_in_the_same_order",
}


@pytest.fixture(scope="module")
def outcomes() -> set[tuple[str, str, str]]:
    """Outcome, class and test of everything in broken.py."""
    command = [sys.executable, "-m", "pytest", "-n0", "-rA", "--tb=no", "-q", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [*command, Path(__file__).with_name("broken.py")], capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 1, finished.stdout + finished.stderr
    return set(re.findall(r"^(PASSED|FAILED|ERROR) \S+::(\w+)::(\w+)", finished.stdout, flags=re.MULTILINE))


@pytest.mark.exhaustive
def test_a_layout_that_opens_nothing_keeps_the_contract_too(outcomes: set[tuple[str, str, str]]) -> None:
    mine = {(outcome, test) for outcome, name, test in outcomes if name == "TestPlainLayout"}
    assert ("PASSED", "test_a_shard_in_anothers_place_is_refused") in mine
    assert {outcome for outcome, _ in mine} == {"PASSED"}, mine


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", FOUND_BY)
def test_a_sound_component_keeps_its_contract(outcomes: set[tuple[str, str, str]], kind: str) -> None:
    mine = {(outcome, test) for outcome, name, test in outcomes if name == f"TestSound{kind}"}
    assert len(mine) >= 10
    assert {outcome for outcome, _ in mine} == {"PASSED"}, mine


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", FOUND_BY)
def test_a_broken_component_is_found_by_the_test_of_what_it_does_wrong(outcomes: set[tuple[str, str, str]], kind: str) -> None:
    mine = {(outcome, test) for outcome, name, test in outcomes if name == f"TestBroken{kind}"}
    assert ("FAILED", FOUND_BY[kind]) in mine, mine
    assert ("PASSED", "test_it_survives_json") in mine  # the contract finds what is wrong, and only that
    assert not {test for outcome, test in mine if outcome == "ERROR"}


def test_contract_tests_are_loaded_one_kind_at_a_time() -> None:
    code = "import kdcache.testing, sys; assert 'pytest' not in sys.modules; kdcache.testing.CodecContract; print(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "torch" not in finished.stdout.split()
