# syntax=docker/dockerfile:1
# A static binary and nothing else: docker build -t kube-relay .
#
#   docker run --rm --network host -v "$PWD/manifests:/etc/kube-relay:ro" kube-relay
#
# With the host's network the listeners are the host's. Mount a folder, not a single file: only in a
# folder does an edit by rename reach the container.
FROM rust:1-alpine AS build
# The linker's other half, and a C compiler for crates that bring C code.
RUN apk add --no-cache gcc musl-dev
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY src src
# Not built, but Cargo looks for the file of each target that Cargo.toml names.
COPY benches benches
COPY examples examples
COPY tests tests
# The image has no use for symbols; release builds elsewhere keep them for perf.
ENV CARGO_PROFILE_RELEASE_STRIP=symbols
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin kube-relay && cp target/release/kube-relay /kube-relay

FROM scratch
COPY --from=build /kube-relay /kube-relay
COPY LICENSE /LICENSE
# Any user does: manifests are only read. Ports below 1024 need `--cap-add NET_BIND_SERVICE` and user 0.
USER 65532:65532
ENTRYPOINT ["/kube-relay"]
CMD ["run", "-f", "/etc/kube-relay"]
