# An image with everything but data and weights.
#   docker build -t dico .
#   docker run --gpus all --shm-size=16g -v $PWD/data:/work/data -v $PWD/runs:/work/runs -v $PWD/weights:/weights dico \
#       torchrun --nproc-per-node 8 -m dico_t2i train --config configs/dico_xl_t2i.yaml
# Torch's wheels bring CUDA's libraries; the host needs the driver and the NVIDIA container toolkit. gcc is for Triton and
# for the operators of the CPU.
FROM python:3.11-slim-bookworm

RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libc6-dev git && rm -rf /var/lib/apt/lists/*

WORKDIR /work
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 DICO_WEIGHTS=/weights
COPY requirements.lock ./
RUN python -m venv /opt/venv && pip install --no-cache-dir --constraint requirements.lock uv \
    && uv pip install --no-cache --compile-bytecode --requirement requirements.lock
COPY . .
RUN uv pip install --no-cache --no-deps --editable . && dico --help

CMD ["dico", "doctor"]
