"""`python -P -m shim`: the same program as `containerd-shim-kata-py-v2`."""

from shim.cli import main

if __name__ == "__main__":
    main()
