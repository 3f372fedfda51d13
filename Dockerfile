# The GPU stack: CUDA 13, torch, Transformer Engine, parrot_sys with its CUDA kernels (compute capability 9.0a: Hopper).
#
#   docker build -t parrot_sys .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/runs" parrot_sys parrot info
#
# The image keeps nvcc and headers: Transformer Engine and Triton compile at run time.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:/usr/local/cuda/bin:$PATH

# Versions of packages of the base image's own release: they change with it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ git make ninja-build python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3.12 -m venv /opt/venv

# torch first and alone: what follows is built against it.
ARG TORCH=2.13.0
RUN pip install --no-cache-dir torch==${TORCH} setuptools==84.2.1 ninja==1.13.2 pybind11==3.1.0

WORKDIR /opt/parrot_sys
COPY constraints.txt ./
# Built from source against this torch, before our own files: an edit does not build it again.
ARG MAX_JOBS=8
RUN pip install --no-cache-dir --no-build-isolation -c constraints.txt "transformer-engine[core_cu13,pytorch]>=2.20"

COPY pyproject.toml build_backend.py setup.py MANIFEST.in README.md LICENSE NOTICE THIRD_PARTY_NOTICES.md CHANGELOG.md CITATION.cff ./
COPY csrc csrc
COPY kernels kernels
COPY parrot_sys parrot_sys
ARG PARROT_CUDA_ARCHS=90a
RUN PARROT_CUDA=1 PARROT_SKIP_EXTENSION=0 PARROT_CUDA_ARCHS=${PARROT_CUDA_ARCHS} \
    pip install --no-cache-dir --no-build-isolation -c constraints.txt \
        ".[serve,trackers,parquet,http,s3,gcs]" \
    && rm -rf build
COPY train train

RUN useradd --create-home --uid 1001 parrot
USER 1001
WORKDIR /runs
CMD ["parrot", "info"]
