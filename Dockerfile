# Scopegate in a container. It runs as UID 65532 and writes to its store's folder only.
#
#   docker build -t scopegate:0.4.0 .
#   docker run --network recovery --stop-timeout 35 -p 127.0.0.1:8000:8000 -v scopegate:/var/lib/scopegate \
#     -v "$PWD/secrets:/etc/scopegate/secrets:ro" -e SCOPEGATE_UPSTREAM__URL=http://backend:9000 \
#     --read-only --cap-drop ALL --security-opt no-new-privileges scopegate:0.4.0
#
# `secrets` holds the tokens of callers and the credential of the backend; config/deploy/README.md says how to make it.
# `recovery` is the network that your backend is on, and `backend` its name there. The default of --stop-timeout, 10
# seconds, is shorter than shutdown.drain_seconds (25).
#
# For a repeatable build, pin the base by the digest that
# `docker buildx imagetools inspect python:3.13-slim` prints, as well as its tag:
#   --build-arg BASE=python:3.13-slim@sha256:...
# To label the image with its sources:
#   --label org.opencontainers.image.source=... --label org.opencontainers.image.revision=...
ARG BASE=python:3.13-slim

FROM ${BASE} AS builder
WORKDIR /build
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY sidecar/ sidecar/
# The environment is created at its path in the final image, because its scripts name their interpreter. It has no pip.
# Python does not compare its bytecode with the sources, because they cannot change and copying may change their times.
# (The wheel of cel-expr-python contains the sources of its own build in bazel-project.)
RUN python -m venv --without-pip /opt/scopegate \
    && pip --python /opt/scopegate/bin/python install --no-cache-dir --no-compile -c requirements.lock '.[cel,jwt,otel]' \
    && rm -rf /opt/scopegate/lib/python3*/site-packages/bazel-project \
    && python -m compileall -q --invalidation-mode unchecked-hash /opt/scopegate/lib

FROM ${BASE}
# The base has no bytecode of the standard library, and the root is read-only at run time. Without this step every
# start and every health check would compile the library again. The process may write to the store's folder only; a new
# volume takes over the owner of this folder.
RUN python -m compileall -q --invalidation-mode unchecked-hash -x '/(site-packages|test|idlelib|ensurepip)/' \
    "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && install -d -m 0700 -o 65532 -g 65532 /var/lib/scopegate
COPY --from=builder /opt/scopegate /opt/scopegate
COPY config/container.yaml /etc/scopegate/config/
COPY policies/*.yaml config/deploy/roles.yaml /etc/scopegate/policies/

ARG VERSION=0.4.0
LABEL org.opencontainers.image.title="Scopegate" \
      org.opencontainers.image.description="A sidecar that lets a recovery action through only if it consumes an execution scope." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"

# SQLite sorts large results in a temporary file, and /tmp is read-only.
ENV PATH=/opt/scopegate/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TMPDIR=/var/lib/scopegate
USER 65532:65532
VOLUME /var/lib/scopegate
EXPOSE 8000 9902
STOPSIGNAL SIGTERM
# Kubernetes ignores this, and an image in OCI format loses it. The deployments define their own probes.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=3 \
    CMD ["scopegate", "health", "--config", "/etc/scopegate/config/container.yaml"]
ENTRYPOINT ["scopegate"]
CMD ["run", "--config", "/etc/scopegate/config/container.yaml"]
