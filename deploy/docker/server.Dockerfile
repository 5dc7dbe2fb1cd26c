# sd-server in a container: docker build -f deploy/docker/server.Dockerfile -t sdrpc-server .
# With --rpc it needs no GPU: --build-arg TORCH=cpu, the default. To draw on this machine's own GPU: TORCH=cu128.
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
RUN pip install --no-cache-dir -c constraints.txt '.[server]'

# The queue and its pictures, and the keys of rpc-servers.
ENV SDRPC_STATE=/data/state SDRPC_CACHE=/data/cache
RUN useradd --create-home --uid 10001 sdrpc && install --directory --owner sdrpc --mode 700 /data /data/state /data/cache
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 1234

# The first start makes a key for who draws: docker exec ID cat /data/keys.txt
ENTRYPOINT ["sd-server"]
CMD ["--listen-ip", "0.0.0.0", "--api-key-file", "/data/keys.txt"]
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1234/health', timeout=3).close()"]
