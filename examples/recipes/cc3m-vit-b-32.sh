#!/usr/bin/env bash
# RankCLIP with a ViT-B/32 on CC3M. What each option stands for is in README.md.
#
#   bash cc3m-vit-b-32.sh 1             one GPU
#   bash cc3m-vit-b-32.sh 8             eight GPUs of this machine
#   sbatch cc3m-vit-b-32.sh slurm       eight GPUs of a Slurm cluster; restarted, it goes on from its last checkpoint
#
# Further arguments go to the trainer and win over those below.
#
# Before the first step the log has to say "Loss: rankclip (rankloss …)". The command that cannot train without it
# is the same with rankloss_open_clip in place of open_clip_train.main: it fails where rankloss is missing.

#SBATCH --job-name=cc3m-vit-b-32
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=9
#SBATCH --requeue
set -euo pipefail

# A CSV file with the columns image (a path) and caption.
DATA=${DATA:-/data/cc3m/train.csv}

recipe=(
  --model ViT-B-32-quickgelu
  --train-data "$DATA"
  --dataset-type csv
  --csv-separator ,
  --csv-img-key image
  --csv-caption-key caption
  --workers 8
  --aug-cfg use_timm=True "scale=(1.0,1.0)" "ratio=(1.0,1.0)"
  --epochs 64
  --lr 5e-4
  --warmup 10000
  --wd 0.1
  --beta1 0.9
  --beta2 0.999
  --eps 1e-8
  --precision fp32
  --seed 0
  --loss rankclip
  --loss-agreement-every 100
  --report-to tensorboard
  --log-every-n-steps 100
  --logs logs
  --name cc3m-vit-b-32
)

case ${1:-} in
  1)
    exec python -m open_clip_train.main "${recipe[@]}" \
      --batch-size 512 "${@:2}"
    ;;
  8)
    # The `--` keeps torchrun from taking the trainer's --logs for an abbreviation of its own options.
    exec torchrun --standalone --nproc-per-node 8 -m -- open_clip_train.main "${recipe[@]}" \
      --batch-size 64 --local-loss --gather-with-grad "${@:2}"
    ;;
  slurm)
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
    exec srun --cpus-per-task "$SLURM_CPUS_PER_TASK" python -u -m open_clip_train.main "${recipe[@]}" \
      --batch-size 64 --local-loss --gather-with-grad --resume latest "${@:2}"
    ;;
  *)
    echo "usage: $0 1|8|slurm [arguments of open_clip_train.main]" >&2
    exit 2
    ;;
esac
