#!/bin/bash
# nestling launch local law-bge.yaml
# One node, this machine. Exit codes: 0 done, 75 stopped and saved: run it again.
set -euo pipefail
exec .venv/bin/python -m launch.node --nodes 1 law-bge.yaml
