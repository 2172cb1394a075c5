"""`python -m guest_image --output DIR`: what `kata-py guest build` does, for Makefiles and packaging."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from guest_image import ImageError, build


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m guest_image", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for vmlinux and initrd.img")
    parser.add_argument("--arch", default="amd64", help="Debian's name of the guest's architecture")
    parser.add_argument("--suite", help="Debian suite to take packages from, instead of this machine's")
    parser.add_argument("--image", help="also make a root image: ext4 or erofs")
    parser.add_argument(
        "--verity", action="store_true", help="add the hashes for dm-verity to the root image"
    )
    args = parser.parse_args()
    try:
        manifest = build(
            args.output,
            arch=args.arch,
            suite=args.suite,
            image=args.image,
            verity=args.verity,
            progress=lambda line: print(f"guest: {line}", flush=True),  # noqa: T201
        )
    except ImageError as err:
        print(f"guest image: {err}", file=sys.stderr)  # noqa: T201
        return 1
    print(manifest)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
