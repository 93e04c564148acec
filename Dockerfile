# docker build -t tadsr . && docker run --rm -v "$PWD:/data" tadsr upscale photo.jpg
# With --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 it runs on CUDA (--gpus all).
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE /src/
COPY tadsr /src/tadsr
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" /src && rm -rf /src
RUN useradd --create-home tadsr
USER tadsr
WORKDIR /data
ENTRYPOINT ["tadsr"]
CMD ["--help"]
