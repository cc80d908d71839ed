"""What makes the processes of tests, `support/forked.py`, leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent / "support"


def test_servers_end_with_the_process_that_began_them() -> None:
    """In its development mode Python warns of processes and pipes that nobody has seen the end of."""
    environment = {name: value for name, value in os.environ.items() if name != "FORKED_SERVERS"}
    command = [sys.executable, "-X", "dev", "-c", "import forked; forked.listen()"]
    done = subprocess.run(command, cwd=SUPPORT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
