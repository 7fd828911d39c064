#!/bin/sh
# From photographs to a measured dial in an hour on 2 CPU cores:    sh speedrun.sh DIR [OUT]
# DIR holds photographs and, in DIR/val, others to measure. The number to race for is the LPIPS at t = 1, at a PSNR not below
# bicubic's (the last table; README.md has the records). Given again, each stage that was stopped goes on, and one that is done is left.
set -e
data=${1:?name a folder of photographs, with a folder val/ below it}
out=${2:-out/speedrun}
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1
common="--data_dir $data --optimizer muon --lr_decay linear --ema 0.99 --eval_interval 500 --eval_pictures 8"

stage() { # a script and its flags, unless its folder holds finished weights
    script=$1; folder=$2; shift 2
    [ -f "$folder/weights.safetensors" ] && return
    resume=""; [ -f "$folder/ckpt.pt" ] && resume="--init_from resume"
    torchrun --nproc_per_node 2 "$script" --out_dir "$folder" $common "$@" $resume
}

# About 34 minutes: the flow.
stage train_flow.py "$out/flow" --image_size 96 --batch_size 8 --max_iters 2600 --learning_rate 1e-3 --warmup_iters 100 --t0_share 0.2 --vflip 0.5
# About 12: the student. Long steps: a young teacher's many short ones pile up noise (LOG.md).
stage distill.py "$out/distill" --teacher "$out/flow/weights.safetensors" --image_size 96 --batch_size 6 --max_iters 380 --learning_rate 4e-4 --warmup_iters 20 \
    --dt 0.2 --t_min -0.2 --t_max 0.8
# About 10: its ends learn from the photographs.
stage distill.py "$out/perceptual" --loss perceptual --teacher "$out/flow/weights.safetensors" --init_from "$out/distill/weights.safetensors" \
    --image_size 96 --batch_size 4 --max_iters 580 --learning_rate 4e-4 --warmup_iters 20
python evaluate.py --ckpt "$out/perceptual/ckpt.pt" --t 0,0.5,1 --seeds 1 --data_dir "$data" --out_dir "$out/eval" --json "$out/scores.json"
