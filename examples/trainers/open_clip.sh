#!/bin/sh
# A small CLIP of emojis, trained by open_clip's unmodified trainer with RankCLIP's loss:
#
#     sh examples/trainers/open_clip.sh
#
# Further arguments go to the trainer: sh examples/trainers/open_clip.sh --epochs 10
set -eu
cd "$(dirname "$0")/../.."
FOLDER=${FOLDER:-outputs/emojis}

[ -e "$FOLDER/pairs.csv" ] || python examples/trainers/emojis.py "$FOLDER"
python -m open_clip_train.main \
    --model local-dir:examples/demo/model \
    --train-data "$FOLDER/pairs.csv" --val-data "$FOLDER/held_out.csv" \
    --csv-img-key filepath --csv-caption-key title \
    --loss rankclip \
    --epochs 3 --batch-size 32 --lr 1e-3 --warmup 4 --workers 0 --device cpu --precision fp32 \
    --log-every-n-steps 1 --logs outputs/trainers --name open_clip "$@"
