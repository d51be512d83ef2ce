"""One of ten slices of the slow tests, chosen by the date, so that ten days see all of them.

`python -m tests.slice` prints nothing of its own; its exit code is pytest's.
"""

import subprocess
import sys
from datetime import UTC, datetime

SLICES = 10


def main() -> int:
    """Run today's share of the slow tests."""
    collect = [sys.executable, "-m", "pytest", "-m", "slow and not gpu", "--collect-only"]  # addopts say -q
    listed = subprocess.run(collect, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line for line in listed if "::" in line]
    assert names, "pytest listed no slow test"
    today = names[datetime.now(UTC).toordinal() % SLICES :: SLICES]
    print(f"slow tests of today: {len(today)} of {len(names)}", flush=True)
    return subprocess.run([sys.executable, "-m", "pytest", *today], check=False).returncode if today else 0


if __name__ == "__main__":
    sys.exit(main())
