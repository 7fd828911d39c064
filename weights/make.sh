#!/bin/sh
# From photographs to the weights in this folder:    sh weights/make.sh DIR [OUT]
# DIR holds photographs that anyone may use, with a folder val/ below it. Written for CPU cores, one process a core (PROCESSES=2).
# A training that was stopped goes on when the same command is given again, and one that is finished is left alone. weights/README.md
# says how much of this the shipped files have seen. SHARE=0.01 tries all of it, with a hundredth of the updates.
set -e
data=${1:?name a folder of photographs, with a folder val/ below it}
out=${2:-out/weights}
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

stage() { # its folder, updates, what it starts from, the script, its flags
    folder=$out/$1; updates=$(awk "BEGIN {print int($2 * ${SHARE:-1} + .999)}"); start=$3; script=$4; shift 4
    [ -f "$folder/weights.safetensors" ] && return
    [ -f "$folder/ckpt.pt" ] && start=resume
    torchrun --nproc_per_node "${PROCESSES:-2}" "$script" --out_dir "$folder" --data_dir "$data" --init_from "$start" --max_iters "$updates" \
        --vflip 0.5 --lr_decay linear --always_save_checkpoint "$@"
}

# The clean flow first: begun on blurred and noisy pictures, a network long returns them as they are (LOG.md).
stage clean_flow 32000 scratch train_flow.py --dataset photos --batch_size 6 --optimizer muon --learning_rate 1e-3 --warmup_iters 200 --ema 0.999 --t0_share 0.2
stage real_flow 16000 "$out/clean_flow/weights.safetensors" train_flow.py --dataset photos_real --batch_size 6 --optimizer muon --learning_rate 1e-3 --warmup_iters 50 --ema 0.999 --t0_share 0.2

for kind in clean real; do
    [ $kind = clean ] && task=photos || task=photos_real
    stage ${kind}_distill 2000 teacher distill.py --dataset $task --teacher "$out/${kind}_flow/weights.safetensors" --batch_size 3 --optimizer muon --learning_rate 4e-4 \
        --warmup_iters 50 --ema 0.999 --dt 0.2 --t_min -0.2 --t_max 0.8
    stage ${kind}_student 2000 "$out/${kind}_distill/weights.safetensors" distill.py --dataset $task --loss perceptual --teacher "$out/${kind}_flow/weights.safetensors" \
        --batch_size 5 --learning_rate 1e-4 --warmup_iters 20 --ema 0.99
done

for kind in clean real; do
    [ $kind = clean ] && name=photos_x4 || name=photos_real_x4
    cp "$out/${kind}_student/weights.safetensors" "$out/$name.safetensors"
    cp "$out/${kind}_flow/weights.safetensors" "$out/${name}_flow.safetensors"
    python evaluate.py --ckpt "$out/$name.safetensors" --data_dir "$data" --out_dir "$out/eval_$kind" --json "$out/$name.json"
done
