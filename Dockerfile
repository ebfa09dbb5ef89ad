# Scopegate in a container. It runs as UID 65532 and writes to its store's folder only.
#
#   docker build -t scopegate:0.4.0 .
#   docker run --network recovery --stop-timeout 35 -p 127.0.0.1:8000:8000 -v scopegate:/var/lib/scopegate \
#     -e SCOPEGATE_UPSTREAM__URL=http://backend:9000 \
#     --read-only --cap-drop ALL --security-opt no-new-privileges scopegate:0.4.0
#
# `recovery` is the network that your backend is on, and `backend` its name there. The default of --stop-timeout, 10
# seconds, is shorter than shutdown.drain_seconds (25).
#
# For a build that can be repeated, pin the base by the digest that
# `docker buildx imagetools inspect python:3.13-slim` prints, as well as its tag:
#   --build-arg BASE=python:3.13-slim@sha256:...
# Where the sources lie is known to whoever builds:
#   --label org.opencontainers.image.source=... --label org.opencontainers.image.revision=...
ARG BASE=python:3.13-slim

FROM ${BASE} AS builder
WORKDIR /build
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY sidecar/ sidecar/
# The environment lies where it will lie in the image, since its scripts name their interpreter, and has no
# pip. Its bytecode is never held against the sources: they cannot change, and copying may touch their times.
# (bazel-project: sources of its own build that the wheel of cel-expr-python carries along.)
RUN python -m venv --without-pip /opt/scopegate \
    && pip --python /opt/scopegate/bin/python install --no-cache-dir --no-compile -c requirements.lock '.[cel,otel]' \
    && rm -rf /opt/scopegate/lib/python3*/site-packages/bazel-project \
    && python -m compileall -q --invalidation-mode unchecked-hash /opt/scopegate/lib

FROM ${BASE}
# The base comes without bytecode of the standard library, and nothing can be written at run time: without
# this every start, and every health check, would compile it again. The store's folder is the one that the
# process may write to; a new volume takes over its owner.
RUN python -m compileall -q --invalidation-mode unchecked-hash -x '/(site-packages|test|idlelib|ensurepip)/' \
    "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && install -d -m 0700 -o 65532 -g 65532 /var/lib/scopegate
COPY --from=builder /opt/scopegate /opt/scopegate
COPY config/container.yaml /etc/scopegate/config/
COPY policies/*.yaml /etc/scopegate/policies/

ARG VERSION=0.4.0
LABEL org.opencontainers.image.title="Scopegate" \
      org.opencontainers.image.description="A sidecar that lets a recovery action through only if it consumes an execution scope." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"

# SQLite sorts what does not fit into memory in a file; /tmp is not to be written to.
ENV PATH=/opt/scopegate/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TMPDIR=/var/lib/scopegate
USER 65532:65532
VOLUME /var/lib/scopegate
EXPOSE 8000 9902
STOPSIGNAL SIGTERM
# Kubernetes does not read this, nor does an image in OCI format carry it; both probe in their own way.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=3 \
    CMD ["scopegate", "health", "--config", "/etc/scopegate/config/container.yaml"]
ENTRYPOINT ["scopegate"]
CMD ["run", "--config", "/etc/scopegate/config/container.yaml"]
