"""Writes scikit-learn's handwritten digits as an image folder that mmpretrain's ``CustomDataset`` reads."""

import argparse
from pathlib import Path

from mmaselect.files import atomic_path


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', nargs='?', default='data/digits', help='folder to write train/ and test/ into')
    args = parser.parse_args()
    import cv2
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # 8x8 scans with ink from 0 to 16.
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    indices = np.arange(len(images))
    train, test = train_test_split(indices, test_size=597, random_state=0, stratify=digits.target)
    for split, members in (('train', train), ('test', test)):
        for index in members:
            with atomic_path(Path(args.out) / split / str(digits.target[index]) / f'{index:04d}.png') as path:
                cv2.imwrite(str(path), images[index])
    print(f'{len(train)} training and {len(test)} test images of 10 digits in {args.out}')


if __name__ == '__main__':
    main()
