#!/usr/bin/env bash
# The paper's comparison on CC3M: CLIP and RankCLIP with three seeds each, and the table of their scores. README.md has
# the programs, the data and the hours that it takes.
#
#   bash table.sh data         downloads the pairs of Train_GCC-training.tsv
#   bash table.sh train 8      six trainings on eight GPUs of this machine, or on 1; repeated, it goes on
#   bash table.sh evaluate     zero-shot classification and retrieval of the six last checkpoints; repeated, it goes on
#   bash table.sh table        the table, in Markdown
#
# Further arguments of `train` go to the trainer.
set -euo pipefail

HERE=$(dirname "$0")
RECIPE=${RECIPE:-cc3m-rn50}
MODEL=${MODEL:-RN50-quickgelu}
EPOCHS=${EPOCHS:-64}
SEEDS=${SEEDS:-0 1 2}
DATA=${DATA:-cc3m}                             # the folder of the shards
TESTS=${TESTS:-tests/wds_{dataset_cleaned\}}  # of the test sets, in clip_benchmark's format; a folder or an address
RESULTS=${RESULTS:-results}

each() { # calls a function with every loss, seed and name
  for seed in $SEEDS; do
    for loss in clip rankclip; do "$1" "$loss" "$seed" "$RECIPE-$loss-$seed"; done
  done
}

train() {
  local without=()
  [ "$1" = rankclip ] || without=(-e '/^  --loss /d' -e '/^  --loss-agreement-every /d')
  [ -e "logs/$3/checkpoints/epoch_$EPOCHS.pt" ] ||
    DATA="$DATA/{00000..$last}.tar" bash <(sed -e '' "${without[@]}" "$HERE/$RECIPE.sh") "$gpus" \
      --dataset-type webdataset --train-num-samples "$pairs" --epochs "$EPOCHS" --seed "$2" --name "$3" --resume latest \
      "${more[@]}"
}

evaluate() {
  clip_benchmark eval --model "$MODEL" --pretrained "logs/$3/checkpoints/epoch_$EPOCHS.pt" \
    --dataset wds/imagenet1k wds/imagenetv2 wds/imagenet_sketch wds/imagenet-a wds/imagenet-r wds/flickr30k wds/mscoco_captions \
    --dataset_root "$TESTS" --recall_k 1 5 10 --batch_size 256 --output "$RESULTS/$3-{dataset}.json" --skip_existing
}

case ${1:-} in
  data)
    sed '1s/^/caption\turl\n/' Train_GCC-training.tsv > cc3m.tsv
    exec img2dataset --url_list cc3m.tsv --input_format tsv --url_col url --caption_col caption --output_folder "$DATA" \
      --output_format webdataset --image_size 256 --resize_mode keep_ratio --resize_only_if_bigger True \
      --processes_count 16 --thread_count 64
    ;;
  train)
    gpus=${2:-8} more=("${@:3}")
    shards=("$DATA"/*.tar)
    last=$(basename "${shards[-1]}" .tar)
    pairs=$(grep -ho '"successes": [0-9]*' "$DATA"/*_stats.json | awk '{n += $2} END {print n}')
    each train
    ;;
  evaluate)
    mkdir -p "$RESULTS"
    each evaluate
    ;;
  table)
    exec python "$HERE/table.py" "$RESULTS"
    ;;
  *)
    echo "usage: $0 data|train|evaluate|table" >&2
    exit 2
    ;;
esac
