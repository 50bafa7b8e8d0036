# Python, torch with CUDA, what else the commands need, and the repository.
#
#     docker build -t aozora-gpt .
#     docker run --rm --gpus all --stop-timeout 60 -v "$PWD:/repository" aozora-gpt exp001/command.sh
#
# With -v the host's repository takes the place of the image's, so that all results stay when the container goes.
FROM python:3.11.14-slim-bookworm

# g++ for torch.compile, which makes its kernels where it runs; a font for Japanese in pictures.
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install -y --no-install-recommends fonts-noto-cjk g++ \
  && rm -rf /var/lib/apt/lists/*

WORKDIR /repository
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -c constraints.txt
COPY . .
CMD ["exp001/command.sh"]
