"""Parity with the public code of DiG, DiS and DiM, through the checker of their golden numbers."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests import forkserver

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden_peers"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the peers' golden numbers (../shared/golden_peers) are not here")
def test_every_golden_number_of_the_peers_is_exact():
    adapter = Path(__file__).with_name("golden_peers_adapter.py")
    command = [sys.executable, str(GOLDEN / "check.py"), "--dir", str(GOLDEN), "--adapter", str(adapter)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = forkserver.run(command, env=environment, capture_output=True, text=True, check=False)
    counts = re.search(r"^(\d+) of (\d+) EXACT$", result.stdout, re.MULTILINE)
    assert counts, result.stdout + result.stderr
    assert counts[1] == counts[2], result.stdout
    assert int(counts[2]) >= 71
