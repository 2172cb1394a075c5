#!/bin/sh
# Installs the Debian packages that building, running and testing need, and nothing when all are there.
# This is the only list of them. Usage: setup.sh [--list] [tests] [bench]. With --list it prints the list and changes
# nothing; "tests" adds what only the tests need, the emulators of other architectures among it, and "bench" what
# measuring needs. Tests point KATA_PY_OS_RELEASE and KATA_PY_POLICY at files of their own.
set -eu

packages() {
    # The virtual machine monitor, and the container runtime that calls the shim.
    echo qemu-system-x86 containerd
    # The interpreter of shim, command line tool and guest, with what a virtual environment needs.
    echo python3 python3-venv ca-certificates
    # runk makes filters of system calls with the first, and lists processes with the second.
    echo libseccomp2 procps
    # What is in the image that demo and tests run.
    echo busybox-static
    # Disks of containers get file systems from it.
    echo e2fsprogs
    # The pods of the tests have networks of their own.
    echo containernetworking-plugins iproute2
    # Debian 12 ships virtiofsd inside its QEMU packages, later releases as a package of its own.
    if [ "$release" != 12 ]; then
        echo virtiofsd
    fi
    if [ "$tests" = yes ]; then
        # Disks of other kinds, and an archive to compare ours with.
        echo xfsprogs mount cpio
        # A whole machine is booted with this host's files: its init, its control groups, its device mapper.
        echo systemd dbus dmsetup
        # Callers of the shim and of runk beside containerd; the command line of Docker is a package of its own since 13.
        echo docker.io podman
        if [ "$release" != 12 ]; then echo docker-cli; fi
        # Guests of other architectures are emulated.
        echo qemu-system-arm
        # In Debian 12 it is one of several that have a package together.
        if [ "$release" = 12 ]; then echo qemu-system-misc; else echo qemu-system-s390x; fi
        # A program that serves disks; Debian 12 has it in QEMU's common package.
        if [ "$release" != 12 ]; then echo qemu-utils; fi
        # containerd's snapshotter erofs makes layers with it; Debian 12 has one that is too old.
        if [ "$release" != 12 ]; then echo erofs-utils; fi
    fi
    # The smallest possible guest program, which measurements are compared with, is written in C.
    if [ "$bench" = yes ]; then
        echo gcc libc6-dev
        # What sends bytes through the network of a guest, and what makes a disk of a file.
        echo iperf3 mount
        # What containers on the host are compared with.
        echo runc crun time
    fi
}

list=no
tests=no
bench=no
for word in "$@"; do
    case $word in
        --list) list=yes ;;
        tests) tests=yes ;;
        bench) bench=yes ;;
        *) echo "setup: unknown word $word; usage: setup.sh [--list] [tests] [bench]" >&2; exit 2 ;;
    esac
done

# Not "." on the real file: it is data, and a subshell keeps its variables away from ours.
identity=$(. "${KATA_PY_OS_RELEASE:-/etc/os-release}" 2>/dev/null && echo "${ID:-unknown} ${VERSION_ID:-newer}") || identity="unknown newer"
release=${identity#* }

if [ "$list" = yes ]; then
    packages | tr ' ' '\n'
    exit 0
fi

if [ "${identity% *}" != debian ]; then
    echo "setup: this is ${identity% *}, not Debian: install the equivalents of the following yourself" >&2
    echo "setup: $(packages | tr '\n' ' ')" >&2
    exit 0
fi

missing=
for package in $(packages); do
    # shellcheck disable=SC2016 # the dollar belongs to dpkg-query's format
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) || status=absent
    if [ "$status" != installed ]; then
        missing="$missing $package"
    fi
done
if [ -z "$missing" ]; then
    exit 0
fi

if [ "$(id -u)" != 0 ]; then
    echo "setup: packages are missing and only root can install them; as root, run:" >&2
    echo "    apt-get install --no-install-recommends$missing" >&2
    exit 1
fi
echo "setup: installing$missing"
export DEBIAN_FRONTEND=noninteractive
# An unreachable third-party source must not stop us: what matters is whether the installation works.
apt-get update -q || echo "setup: apt-get update failed; trying with the package lists at hand" >&2
# A package that starts a service on installation would change the host: containerd here runs privately.
policy=${KATA_PY_POLICY:-/usr/sbin/policy-rc.d}
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi
# shellcheck disable=SC2086 # one word per package
apt-get install -q -y --no-install-recommends $missing
