# rpc-server in a container: docker build -f deploy/docker/worker.Dockerfile -t sdrpc-worker .
# For an NVIDIA GPU: --build-arg TORCH=cu128, and docker run --gpus all. torch's wheels bring CUDA's libraries along;
# the host has to have NVIDIA's driver and its container toolkit.
FROM python:3.12-slim

# cpu, cu128, rocm6.4 …: which of torch's builds. Their index has not all versions of what torch needs.
ARG TORCH=cpu
WORKDIR /src
COPY constraints.txt ./
# hadolint ignore=DL3013
RUN pip install --no-cache-dir -c constraints.txt torch \
  --index-url https://download.pytorch.org/whl/${TORCH} --extra-index-url https://pypi.org/simple

COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY src src
# hadolint ignore=DL3013
RUN pip install --no-cache-dir -c constraints.txt '.[cache]'

# Keys, the certificate and weights that clients sent: a volume, or a new container is a new server.
ENV SDRPC_STATE=/data/state SDRPC_CACHE=/data/cache
RUN useradd --create-home --uid 10001 sdrpc && install --directory --owner sdrpc --mode 700 /data /data/state /data/cache
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 50052

# Clients that come through a forwarded port seem to come from here: in a container nobody is let in without a key.
# docker exec ID rpc-server keys add laptop   makes one
ENTRYPOINT ["rpc-server"]
CMD ["-H", "0.0.0.0", "-c"]
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import socket; socket.create_connection(('127.0.0.1', 50052), 3).close()"]
