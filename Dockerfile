# syntax=docker/dockerfile:1

FROM rust:1.95-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential cmake pkg-config libclang-dev zlib1g-dev libssl-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# With the cache mounts RocksDB, most of the work, is not compiled again when only Weft has changed.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/target \
    CARGO_TARGET_DIR=/target cargo build --release --locked --bin weft \
 && cp /target/release/weft /usr/local/bin/weft

FROM debian:bookworm-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends libstdc++6 libssl3 ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --home-dir /var/lib/weft --create-home weft \
 && install --directory --owner weft /var/lib/weft/data
COPY --from=build /usr/local/bin/weft /usr/local/bin/weft
USER weft
WORKDIR /var/lib/weft
ENV WEFT_LISTEN=0.0.0.0:8080 WEFT_DATA=/var/lib/weft/data
VOLUME /var/lib/weft/data
EXPOSE 8080
# The image has no HTTP client; bash opens the socket itself.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
  CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8080 && printf 'GET /healthz HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n' >&3 && read -r _ status _ <&3 && [ \"$status\" = 200 ]"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["weft"]
CMD ["serve"]
