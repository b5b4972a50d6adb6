# The worker: engine, jobs, S3 and PostgreSQL clients. Build it from the repository's root:
#
#   docker build -f docker/worker.Dockerfile -t nightshift-worker .
#
# CPU or CUDA is a build argument. Without TORCH_INDEX_URL pip takes torch from its default index, which on x86-64
# Linux is the CUDA build; give the index of PyTorch's CPU builds for an image of a fraction of the size.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX_URL=""
WORKDIR /src
RUN python -m venv /opt/nightshift
ENV PATH=/opt/nightshift/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# torch first and alone: the largest layer changes least.
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -c constraints.txt "$TORCH"
COPY pyproject.toml README.md LICENSE ./
COPY jobs jobs
COPY migrations migrations
COPY sd_engine sd_engine
COPY worker worker
RUN pip install -c constraints.txt ".[worker,s3,postgres]"

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --create-home nightshift && install -d -o nightshift -g nightshift /data
COPY --from=build /opt/nightshift /opt/nightshift
# The two NVIDIA variables are read by NVIDIA's container runtime; without it they do nothing.
ENV PATH=/opt/nightshift/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    NIGHTSHIFT_HOME=/data \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER nightshift
VOLUME /data
# No HEALTHCHECK: a worker opens no port. Its own supervisor starts again what died or hangs, and one that stops beating
# loses its leases to the others by itself.
ENTRYPOINT ["nightshift"]
CMD ["worker", "--json"]
