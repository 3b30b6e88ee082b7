# JupyterLab on the notebooks, with the environment of uv.lock.
#
#   docker build --tag ai-radiologist .
#   docker run --rm --init --shm-size=1g -p 127.0.0.1:8888:8888 ai-radiologist
#
# Open the address with the token that it prints. JupyterLab listens on all addresses of the
# container, else nothing outside could reach it. Keep "127.0.0.1:" in -p: it publishes the port to
# your own machine and to nobody else.
# Ranks speak through shared memory, of which a container has 64 MB without --shm-size.
# One run without JupyterLab: docker run ... ai-radiologist python -m chexlib run

FROM python:3.13-slim-trixie AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /home/radiologist/project
COPY . .
RUN make env

# The same Python at the same path, so that the copied environment works; without the compiler.
FROM python:3.13-slim-trixie
RUN useradd --create-home --uid 1000 radiologist
COPY --from=build --chown=1000:1000 /home/radiologist/project /home/radiologist/project
WORKDIR /home/radiologist/project
USER 1000
ENV PATH=/home/radiologist/project/.venv/bin:$PATH \
    JUPYTER_PREFER_ENV_PATH=1 \
    TF_CPP_MIN_LOG_LEVEL=2
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "--notebook-dir=notebooks"]
