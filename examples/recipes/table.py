"""The table of table.sh: scores of CLIP and RankCLIP, means over seeds, and their paired differences.

``python examples/recipes/table.py results`` reads the JSON files of clip_benchmark in a folder.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from scipy.stats import ttest_1samp

SCORES = {
    "acc1": "top-1",
    "acc5": "top-5",
    **{f"text_retrieval_recall@{k}": f"picture → text R@{k}" for k in (1, 5, 10)},
    **{f"image_retrieval_recall@{k}": f"text → picture R@{k}" for k in (1, 5, 10)},
}


def table(folder):
    """Yield the lines: of every data set and score both means, and the difference with its 95 % interval.

    Of seeds that either loss lacks there is no pair: they are left out.
    """
    found = defaultdict(lambda: {"clip": {}, "rankclip": {}})
    for file in sorted(Path(folder).glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        _, loss, seed = Path(result["pretrained"]).parts[-3].rsplit("-", 2)
        for name in SCORES.keys() & result["metrics"].keys():
            key = result["dataset"].removeprefix("wds/"), name
            found[key][loss][seed] = 100 * result["metrics"][name]
    yield "| data | score | CLIP | RankCLIP | difference | seeds |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for (data, name), of in sorted(found.items(), key=lambda x: (x[0][0], [*SCORES].index(x[0][1]))):
        seeds = sorted(of["clip"].keys() & of["rankclip"].keys())
        clip, rankclip = ([of[loss][seed] for seed in seeds] for loss in ("clip", "rankclip"))
        differences = [b - a for a, b in zip(clip, rankclip, strict=True)]
        low, high = ttest_1samp(differences, 0).confidence_interval()
        means = (
            f"{fmean(clip):.2f} | {fmean(rankclip):.2f} | {fmean(differences):+.2f} ± {(high - low) / 2:.2f}"
        )
        yield f"| {data} | {SCORES[name]} | {means} | {len(seeds)} |"


if __name__ == "__main__":
    print(*table(sys.argv[1]), sep="\n")
