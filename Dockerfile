# An image of this checkout for one kind of device, from the versions of constraints/, by hash.
#
#     docker build --build-arg EXTRA=tpu --tag REGION-docker.pkg.dev/PROJECT/crab/crab:tpu .
#     docker build --build-arg EXTRA=cuda13 --tag crab:cuda13 .     (or cuda12; several words are several lists)
#     docker build --tag crab:cpu .
#     docker run --rm crab:cpu -m crab_jax.predict --help
#
# JAX brings libtpu or the CUDA libraries itself, so all start from one base. CUDA needs the NVIDIA container toolkit and
# `docker run --gpus all`.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm AS build
ARG EXTRA=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN python -m venv /opt/venv
WORKDIR /opt/crab_jax
# Only the lists, so that a change of the code installs no package again.
COPY constraints constraints
# hadolint ignore=DL3013
RUN tag=py$(python -c 'import sys; print("%d%d" % sys.version_info[:2])') \
    && set -- -r constraints/build.txt -r "constraints/$tag.txt" \
    && for extra in $EXTRA; do set -- "$@" -r "constraints/$tag-$extra.txt"; done \
    && pip install --require-hashes -r constraints/build.txt \
    && pip install --require-hashes --no-build-isolation "$@"
COPY . .
RUN pip install --no-deps --no-build-isolation --editable . && python -m compileall -q crab_jax data_pipelines

FROM python:${PYTHON}-slim-bookworm
# Compiled programs, until JAX_COMPILATION_CACHE_DIR=gs://bucket/xla names a place that hosts and restarts share.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=/home/crab/xla
RUN useradd --uid 10001 --create-home crab && install -d -o crab /home/crab/xla
COPY --from=build /opt /opt
WORKDIR /opt/crab_jax
USER 10001
ENTRYPOINT ["python"]
CMD ["-m", "crab_jax.train", "--help"]
