# The package in a container, installed from its wheel.
#
#   docker build -t exaonepath .                                       # CPU
#   docker build -t exaonepath:cuda --build-arg FLAVOUR=cuda .         # with the CUDA half of the extension
#   docker run --rm --gpus all -v /slides:/slides:ro -v /results:/results exaonepath:cuda \
#       encode /slides --out /results --device cuda
ARG FLAVOUR=cpu
ARG PYTHON=3.12
ARG CUDA=13.0.1

FROM python:${PYTHON}-slim AS base-cpu
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS base-cuda
ENV TORCH_INDEX=https://pypi.org/simple
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*

FROM base-${FLAVOUR} AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
COPY . /source
# An image without the extension would be slow in silence.
RUN python3 -m venv /build && EXAONEPATH_REQUIRE_EXTENSION=1 /build/bin/pip wheel --no-cache-dir --no-deps \
        --wheel-dir /wheels /source

FROM python:${PYTHON}-slim AS run-cpu
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu

# torch's wheels bring the CUDA libraries that they need; Triton needs a C compiler for its launchers.
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04 AS run-cuda
ENV TORCH_INDEX=https://pypi.org/simple
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv gcc \
    && rm -rf /var/lib/apt/lists/*

FROM run-${FLAVOUR}
COPY --from=build /wheels /wheels
COPY constraints.txt /wheels/
RUN python3 -m venv /opt/exaonepath \
    && /opt/exaonepath/bin/pip install --no-cache-dir torch --index-url "$TORCH_INDEX" \
    && /opt/exaonepath/bin/pip install --no-cache-dir "$(ls /wheels/*.whl)[viz]" \
    && /opt/exaonepath/bin/exaonepath doctor
RUN useradd --create-home runner
USER runner
ENV PATH=/opt/exaonepath/bin:$PATH HF_HOME=/home/runner/.cache/huggingface
WORKDIR /home/runner
ENTRYPOINT ["exaonepath"]
CMD ["--help"]
