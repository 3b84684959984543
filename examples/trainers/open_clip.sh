#!/bin/sh
# A small CLIP of drawings, trained by open_clip's unmodified trainer with RankCLIP's loss:
#
#     sh examples/trainers/open_clip.sh
#
# Further arguments go to the trainer: sh examples/trainers/open_clip.sh --epochs 10
set -eu
cd "$(dirname "$0")/../.."
FOLDER=${FOLDER:-outputs/sample}

[ -e "$FOLDER/train.csv" ] || python -m rankloss sample --output "$FOLDER"
python -m open_clip_train.main \
    --model "local-dir:$FOLDER/open_clip" \
    --train-data "$FOLDER/train.csv" --val-data "$FOLDER/val.csv" \
    --csv-img-key filepath --csv-caption-key title \
    --loss rankclip \
    --epochs 3 --batch-size 16 --lr 1e-3 --warmup 4 --workers 0 --device cpu --precision fp32 \
    --log-every-n-steps 1 --logs outputs/trainers --name open_clip "$@"
