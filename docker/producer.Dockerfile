# The producer's half without torch: submit, bulk, status, db upgrade. Build it from the repository's root:
#
#   docker build -f docker/producer.Dockerfile -t nightshift-producer .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
RUN python -m venv /opt/nightshift
ENV PATH=/opt/nightshift/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY jobs jobs
COPY migrations migrations
# The distribution is one; without their dependencies these two are only files.
COPY sd_engine sd_engine
COPY worker worker
RUN pip install -c constraints.txt ".[s3,postgres]"

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --create-home nightshift && install -d -o nightshift -g nightshift /data
COPY --from=build /opt/nightshift /opt/nightshift
ENV PATH=/opt/nightshift/bin:$PATH PYTHONUNBUFFERED=1 NIGHTSHIFT_HOME=/data
USER nightshift
VOLUME /data
ENTRYPOINT ["nightshift"]
CMD ["--help"]
