# Fine-tuning in a container: docker build -t finetune . && docker run --rm -it --gpus all -v "$PWD:/data" finetune
# The build of torch for CUDA comes with all of CUDA but the driver, so the image needs no base of NVIDIA's. For a
# machine without a GPU, a smaller image: docker build --build-arg TORCH=cpu -t finetune .
FROM python:3.12-slim

# g++: DeepSpeed compiles its Adam for offload when it is first used
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /finetune
COPY requirements.txt requirements.lock ./
ARG TORCH=cuda
RUN if [ "$TORCH" = cpu ]; then \
        pip install --no-cache-dir "$(grep '^torch==' requirements.txt)" \
            --index-url https://download.pytorch.org/whl/cpu && \
        pip install --no-cache-dir -r requirements.txt; \
    else \
        pip install --no-cache-dir --require-hashes -r requirements.lock; \
    fi
COPY . .

# Models, converted ones and tokenized data; mount a folder here to keep them
ENV HF_HOME=/data/.cache/huggingface
CMD ["bash"]
