"""What proves a promise: every case of its tests, and results within their bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from promises import RESULT_KEYS, Session, check_result, read_promises, unproven_by_suite

A, B, OTHER = "t.py::test_a[1]", "t.py::test_a[2]", "t.py::test_ab[1]"


@pytest.mark.parametrize(
    ("session", "said"),
    [
        (Session({A, B, OTHER}, {A, B}), ""),
        (Session({A, B}, {A}, set(), {B: "needs a compiler"}), ""),
        (Session({A, B}, {A}, set(), {B: ""}), "1 of 2 cases did not pass, first t.py::test_a[2]"),
        (Session({A, B}, {A}), "1 of 2 cases did not pass, first t.py::test_a[2]"),
        (Session({A, B}, {A}, {B}), "failed (1 of 2 cases, first t.py::test_a[2])"),
        (Session({A, B}, {A, B}, {B}), "failed (1 of 2 cases"),  # in its end
        (Session({A, B}, set(), set(), {A: "x", B: "x"}), "did not run and pass"),
        (Session({OTHER}, {OTHER}), "did not run and pass"),
        (Session(), "did not run and pass"),
    ],
)
def test_every_case_must_pass_or_be_skipped_with_a_reason(session: Session, said: str) -> None:
    problems = unproven_by_suite("t.py::test_a", session)
    assert [said in problem for problem in problems] == ([True] if said else [])


def test_a_file_is_all_its_tests() -> None:
    assert unproven_by_suite("t.py", Session({A, OTHER}, {A, OTHER})) == []
    assert unproven_by_suite("t.py", Session({A, OTHER}, {A})) != []


RUN = """
import pytest
pytestmark = pytest.mark.parametrize("case", [1, 2, 3])
def test_passes(case): pass
def test_one_fails(case): assert case != 2
def test_one_is_skipped(case):
    if case == 2: pytest.skip("no such machine")
@pytest.mark.xfail
def test_one_is_expected_to_fail(case): assert case != 2
"""


@pytest.mark.parametrize(
    ("typed", "whole"), [(["test_it.py"], False), (["-n", "2", "--dist", "loadfile"], True)]
)
def test_a_real_session_is_counted(tmp_path: Path, typed: list[str], whole: bool) -> None:
    """Without workers and with them, whose options' values are no paths that were typed."""
    tests = Path(__file__).parent
    (tmp_path / "test_it.py").write_text(RUN)
    (tmp_path / "conftest.py").write_text(
        (tests / "conftest.py").read_text().partition("def pytest_sessionfinish")[0]
        .replace("import torch\n", "import types; torch = types.SimpleNamespace("
                 "cuda=types.SimpleNamespace(is_available=lambda: True), set_flush_denormal=bool)\n")
        + "def pytest_sessionfinish(session):\n"
        "    if hasattr(session.config, 'workerinput'): return\n"
        "    print('WHOLE', _whole_suite(session.config))\n"
        "    from promises import unproven_by_suite\n"
        "    for name in ('passes', 'one_fails', 'one_is_skipped', 'one_is_expected_to_fail'):\n"
        "        print('PROVEN', name, unproven_by_suite(f'test_it.py::test_{name}', SESSION))\n"
    )  # fmt: skip

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider",
         "--rootdir", str(tmp_path), *typed],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tests)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    out = done.stdout + done.stderr
    assert f"WHOLE {whole}" in out, out
    said = [line.partition("PROVEN ")[2] for line in out.splitlines() if "PROVEN " in line]
    assert said == [
        "passes []",
        "one_fails ['test_it.py::test_one_fails failed (1 of 3 cases, first "
        "test_it.py::test_one_fails[2])']",
        "one_is_skipped []",
        "one_is_expected_to_fail ['test_it.py::test_one_is_expected_to_fail: 1 of 3 cases did not "
        "pass, first test_it.py::test_one_is_expected_to_fail[2]']",
    ], out


def test_a_result_outside_its_bound_proves_nothing(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    whole = dict.fromkeys(RESULT_KEYS, "x") | {"holds": True, "bounds": {"score": ">= 0.9"}}
    for score, good in ((0.9, True), (0.89, False), (None, False)):
        content = whole | {"figures": {} if score is None else {"score": score}}
        (results / "a.json").write_text(json.dumps(content))
        assert (check_result("a.json", tmp_path) == []) is good
    assert check_result("b.json", tmp_path)
    assert check_result(None, tmp_path)


def test_a_row_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("| promise | proof | measured |\n|---|---|---|\n| p | suite `x` | – |\n")
    with pytest.raises(ValueError, match=r"page\.md:3"):
        read_promises(page)


def test_the_page_can_be_read_and_names_tests_that_exist() -> None:
    """Also where the whole suite is not run, which alone tells whether they pass."""
    root = Path(__file__).parent.parent
    promises = read_promises(root / "docs" / "promises.md")
    assert len(promises) > 100
    for promise in promises:
        if promise.kind == "suite":
            file, _, name = promise.proof.partition("::")
            written = (root / file).read_text(encoding="utf-8")
            assert f"def {name.partition('[')[0]}" in written or not name, promise.proof
