"""BibTeX entries of the losses' papers, for model cards."""

from __future__ import annotations

RANKCLIP = """@inproceedings{zhang2025rankclip,
    title = {{RankCLIP}: Ranking-Consistent Language-Image Pretraining},
    author = {Zhang, Yiming and Zhao, Zhuokai and Chen, Zhaorun and Feng, Zhili and Ding, Zenghui and Sun, Yining},
    booktitle = {ICCV},
    year = {2025},
}"""  # noqa: E501
SPREAD = """@inproceedings{wang2020uniformity,
    title = {Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere},
    author = {Wang, Tongzhou and Isola, Phillip},
    booktitle = {ICML},
    year = {2020},
}
@inproceedings{zhang2017spreadout,
    title = {Learning Spread-Out Local Feature Descriptors},
    author = {Zhang, Xu and Yu, Felix X. and Kumar, Sanjiv and Chang, Shih-Fu},
    booktitle = {ICCV},
    year = {2017},
}"""  # noqa: E501
MIMICRY = """@inproceedings{yang2024clipkd,
    title = {{CLIP-KD}: An Empirical Study of {CLIP} Model Distillation},
    author = {Yang, Chuanguang and An, Zhulin and Huang, Libo and Bi, Junyu and Yu, Xinqiang and Yang, Han and Diao, Boyu and Xu, Yongjun},
    booktitle = {CVPR},
    year = {2024},
}"""  # noqa: E501
CLIP_IDS = """@inproceedings{yang2022unicl,
    title = {Unified Contrastive Learning in Image-Text-Label Space},
    author = {Yang, Jianwei and Li, Chunyuan and Zhang, Pengchuan and Xiao, Bin and Liu, Ce and Yuan, Lu and Gao, Jianfeng},
    booktitle = {CVPR},
    year = {2022},
}"""  # noqa: E501
