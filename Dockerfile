# Everything in one image, for GPUs and without: PyTorch's wheels bring CUDA, the host its driver and NVIDIA's container
# toolkit. Not built by us: no machine of ours has Docker; a test installs the package from just the files named here.
#   docker build -t diffclip .
#   docker run --rm --gpus all --shm-size=16g --user "$(id -u):$(id -g)" -v "$PWD:/work" diffclip \
#       pipeline --output_dir runs/quickstart
#   docker run … --entrypoint torchrun diffclip --nproc-per-node 8 -m diffclip pretrain …
# g++ is for the small extension that DeepSpeed compiles at the first start of several ranks.
FROM python:3.12-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY diffclip diffclip
COPY mllm mllm
COPY stages stages
RUN pip install --no-cache-dir '.[eval,app]'
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["diffclip"]
