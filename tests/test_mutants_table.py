"""tests/mutants.py stays in step with the code, and (in full, slow) every mutant in it is caught."""

import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant, mutated

TESTS = Path(__file__).parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_still_changes_one_place_of_valid_code_and_names_tests_that_exist(mutant: Mutant) -> None:
    source = mutated(mutant)  # LookupError when the text is gone, or there twice
    compile(source, mutant.file, "exec")
    assert mutant.old != mutant.new
    assert mutant.tests.split(), "no test is named"
    for test in mutant.tests.split():
        file, _, function = test.partition("::")
        assert f"def {function}(" in (TESTS / file).read_text(encoding="utf-8"), test


def test_each_mutant_has_a_name_of_its_own() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names))


@pytest.mark.torture
@pytest.mark.timeout(6 * 3600)
def test_every_mutant_is_caught() -> None:
    result = subprocess.run([sys.executable, TESTS / "mutants.py"], capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout + result.stderr
