# lola-vllm for CUDA: vLLM's own image with the plugin installed.
#
#   docker build -t lola-vllm .
#   docker run --gpus all --ipc=host -p 127.0.0.1:8000:8000 -v /path/to/model:/model:ro \
#     lola-vllm /model
FROM vllm/vllm-openai:v0.32.0

LABEL org.opencontainers.image.title="lola-vllm" \
      org.opencontainers.image.description="LoLA attention for vLLM: fixed memory per sequence" \
      org.opencontainers.image.licenses="Apache-2.0"

COPY . /src/lola-vllm
# Built against the torch that is in the image, never against one fetched for the build.
RUN python3 -m pip install --no-cache-dir "setuptools>=77,<81" wheel ninja \
    && python3 -m pip install --no-cache-dir --no-build-isolation "/src/lola-vllm[demo]" \
    && rm -rf /src

# The base image runs as root; a server needs no such rights. A new volume at /states takes owner
# and mode from here: only the server's user reads states.
RUN useradd --create-home --uid 10001 lola && install -d -m 700 -o lola /states
USER lola
WORKDIR /home/lola
# In a container 127.0.0.1 is the container alone; -p above says who reaches the server.
ENV HF_HOME=/home/lola/.cache/huggingface \
    LOLA_VLLM_HOST=0.0.0.0

EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=3 \
    CMD python3 -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"
# `vllm serve` with the routes under /v1/lola, and numbers that fit the GPU; takes the same options.
ENTRYPOINT ["lola-vllm", "serve"]
CMD ["--help"]
