# syntax=docker/dockerfile:1
# nestling on NVIDIA GPUs; the host needs the NVIDIA container toolkit and a driver for CUDA 13.
#
#   docker build --tag nestling .
#   docker run --rm --init --gpus all --ipc=host --user "$(id -u):$(id -g)" \
#     --volume "$PWD/data:/app/data" --volume "$PWD/runs:/app/runs" --volume "$PWD/cache:/app/cache" \
#     nestling configs/recipes/bge-base-en-v1.5.yaml
#
# The entry point is the node entry, as on every platform: it takes all GPUs that it sees, and what follows the image's
# name are its arguments (RUN.yaml section.key=value ...). Other commands:
# `docker run ... --entrypoint nestling nestling check RUN.yaml`. Tokens (HF_TOKEN, WANDB_API_KEY) are given when
# the container runs (--env HF_TOKEN), never when it is built. --ipc=host because NCCL and loader workers share
# memory; --init so that Ctrl-C reaches the processes. Create data, runs and cache before: Docker would as root.
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04

# Ubuntu 24.04 has Python 3.12; constraints.txt was tested with 3.11, which deadsnakes builds. Its packages carry
# security fixes only, and an archive drops old versions: pinning them would break the build, not make it safer.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates software-properties-common \
    && add-apt-repository --yes ppa:deadsnakes/ppa \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3.11 python3.11-venv \
    && apt-get purge --yes --auto-remove software-properties-common \
    && rm -rf /var/lib/apt/lists/*

# Any --user works: these folders are open to all, and HOME, where libraries keep their caches, is one of them.
RUN python3.11 -m venv /opt/venv \
    && useradd --uid 10001 --create-home nestling \
    && mkdir -p /app/data /app/runs /app/cache \
    && chmod 1777 /app/data /app/runs /app/cache
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/app/cache \
    HF_HOME=/app/cache/huggingface \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /app

# Dependencies first, with empty packages in the place of ours: a change of code does not install torch again.
# Another torch wheel: --build-arg PIP_FLAGS="--extra-index-url ADDRESS", as in the README.
ARG PIP_FLAGS=""
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p launch data_tools trainer/export \
    && touch launch/__init__.py data_tools/__init__.py trainer/__init__.py trainer/export/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt ${PIP_FLAGS} --editable ".[train]"

COPY launch launch
COPY data_tools data_tools
COPY trainer trainer
COPY configs configs
COPY train.py ./

USER 10001
# Without arguments it prints its usage. The exit code is the run's: 75 = stopped and saved, run it again.
ENTRYPOINT ["python", "-m", "launch.node"]
