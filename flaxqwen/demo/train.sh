#!/usr/bin/env bash
# train.sh FOLDER: the demo model from the data of data.py, on 2 CPU cores: FOLDER/run is what belongs into model/.
set -euo pipefail
python -m flaxqwen.demo.data "$1"
cd "$1"
flaxqwen train start train.jsonl --out run --eval held_out.jsonl --length 128 --batch-size 32 --steps 8500 \
  --learning-rate 1.2e-3 --warmup-steps 100 --weight-decay 0.1 --beta2 0.98 \
  --save-every 500 --eval-every 1000 --log-every 50 --seed 0 --plot
