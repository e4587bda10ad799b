"""Two thousand random calls; `python tests/fuzz.py` makes more."""

import pytest
from fuzz import SHARES, findings

CALLS = 2000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SHARES)
def test_random_calls_are_right_or_refused(family, library_warnings):
    found = list(findings(family, CALLS * SHARES[family] // 100, seed=0))
    library_warnings.clear()
    assert not found, "\n".join(f"{number}: {fault}\n    {shown!r:.500}" for number, shown, fault in found[:10])
