#!/bin/sh
# A small CLIP of emojis whose captions are six classes, so that most pairs of a batch have an equal caption. With
# --loss clip-ids these are no negatives of each other:
#
#     sh examples/trainers/repeated_captions.sh
#
# Further arguments go to the trainer: sh examples/trainers/repeated_captions.sh --epochs 10
set -eu
cd "$(dirname "$0")/../.."
FOLDER=${FOLDER:-outputs/emojis}

[ -e "$FOLDER/pairs.csv" ] || python examples/trainers/emojis.py "$FOLDER"
python -m open_clip_train.main \
    --model local-dir:examples/demo/model \
    --train-data "$FOLDER/pairs.csv" --val-data "$FOLDER/held_out.csv" \
    --csv-img-key filepath --csv-caption-key class \
    --loss clip-ids \
    --epochs 3 --batch-size 32 --lr 1e-3 --warmup 4 --workers 0 --device cpu --precision fp32 \
    --log-every-n-steps 1 --logs outputs/trainers --name repeated_captions "$@"
