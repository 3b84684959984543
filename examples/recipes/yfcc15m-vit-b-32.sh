#!/usr/bin/env bash
# RankCLIP with a ViT-B/32 on YFCC15M. What each option stands for is in README.md.
#
#   bash yfcc15m-vit-b-32.sh 1             one GPU
#   bash yfcc15m-vit-b-32.sh 8             eight GPUs of this machine
#   sbatch yfcc15m-vit-b-32.sh slurm       eight GPUs of a Slurm cluster; restarted, it goes on from its last checkpoint
#
# Further arguments go to the trainer and win over those below.
#
# Before the first step the log has to say "Loss: rankclip (rankloss …)". The command that cannot train without it
# is the same with rankloss_open_clip in place of open_clip_train.main: it fails where rankloss is missing.

#SBATCH --job-name=yfcc15m-vit-b-32
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=9
#SBATCH --requeue
set -euo pipefail

# Shards of a webdataset, of jpg and txt, and how many pairs they hold; --warmup is a tenth of all steps.
DATA=${DATA:-'/data/yfcc15m/{00000..01506}.tar'}
PAIRS=${PAIRS:-15061515}

recipe=(
  --model ViT-B-32
  --train-data "$DATA"
  --train-num-samples "$PAIRS"
  --dataset-type webdataset
  --workers 8
  --aug-cfg use_timm=True "scale=(0.7,1.0)" "ratio=(0.8,1.25)"
  --image-interpolation bilinear
  --epochs 32
  --lr 1e-3
  --warmup 11766
  --wd 0.2
  --beta1 0.9
  --beta2 0.98
  --eps 1e-8
  --grad-clip-norm 1
  --grad-checkpointing
  --precision amp
  --seed 0
  --loss rankclip
  --loss-agreement-every 100
  --report-to tensorboard
  --log-every-n-steps 100
  --logs logs
  --name yfcc15m-vit-b-32
)

case ${1:-} in
  1)
    exec python -m open_clip_train.main "${recipe[@]}" \
      --batch-size 512 --accum-freq 8 "${@:2}"
    ;;
  8)
    # The `--` keeps torchrun from taking the trainer's --logs for an abbreviation of its own options.
    exec torchrun --standalone --nproc-per-node 8 -m -- open_clip_train.main "${recipe[@]}" \
      --batch-size 512 --local-loss --gather-with-grad "${@:2}"
    ;;
  slurm)
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
    exec srun --cpus-per-task "$SLURM_CPUS_PER_TASK" python -u -m open_clip_train.main "${recipe[@]}" \
      --batch-size 512 --local-loss --gather-with-grad --resume latest "${@:2}"
    ;;
  *)
    echo "usage: $0 1|8|slurm [arguments of open_clip_train.main]" >&2
    exit 2
    ;;
esac
