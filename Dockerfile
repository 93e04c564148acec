# docker build -t tadsr . && docker run --rm -v "$PWD:/data" --user "$(id -u)" tadsr upscale photo.jpg
# docker run --rm -p 7000:7000 tadsr serve --host 0.0.0.0
# With --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 it runs on CUDA (--gpus all).
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE /src/
COPY tadsr /src/tadsr
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" "/src[serve,heif]" && rm -rf /src
RUN useradd --create-home --uid 1000 tadsr
USER 1000
WORKDIR /data
ENTRYPOINT ["tadsr"]
CMD ["--help"]
