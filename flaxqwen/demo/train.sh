#!/usr/bin/env bash
# train.sh FOLDER: demo and its draft model on 2 CPU cores, in FOLDER/model and FOLDER/draft; data.py makes the data.
set -euo pipefail
python -m flaxqwen.demo.data "$1"
cd "$1"
train() { flaxqwen train "$@" --eval held_out.jsonl --length 128 --warmup-steps 100 --weight-decay 0.1 --beta2 0.98 --log-every 50 --seed 0; }
train start train.jsonl --out model --optim muon --batch-size 48 --steps 3400 --learning-rate 2.5e-3 --save-every 500 --eval-every 500 --plot
train start-draft train.jsonl --out draft --batch-size 32 --steps 4000 --learning-rate 3e-3 --save-every 1000 --eval-every 1000 --plot
