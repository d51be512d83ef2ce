#!/bin/bash
# nestling launch env law-bge.yaml --nodes 4 train.micro_batch_tokens=16384 train.graph_memory=auto 'loss.dims=[768,512,256,128]'
# Run this on each node, in a checkout; it ends with 75 where it is to be run again.
# docs/launch/env.md says what services set by themselves; what they do not, set here:
#   NESTLING_NODE_RANK  0 to nodes - 1
#   NESTLING_HEAD       address of the node whose rank is 0
#   NESTLING_JOB        the same on all nodes of one job, another for each job
set -euo pipefail
exec .venv/bin/python -m launch.node --nodes 4 --accelerate configs/accelerate/fsdp2.yaml \
  law-bge.yaml \
  train.micro_batch_tokens=16384 \
  train.graph_memory=auto \
  'loss.dims=[768,512,256,128]'
