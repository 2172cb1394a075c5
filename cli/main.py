"""The commands of `kata-py` and their help. What they do is in modules that are imported when they run."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

HELP = (
    "Operate kata-py, which boots every pod in its own QEMU microVM.\n\n"
    "containerd does not use this program: it starts `containerd-shim-kata-py-v2`. This one is for you, to"
    " build what the virtual machines boot, and to see why one would not.\n\n"
    "A first session, as root:\n\n"
    "    kata-py guest build      make kernel and initrd out of Debian's packages\n\n"
    "    kata-py check            see what this host has and lacks\n\n"
    "    ctr run --rm --runtime io.containerd.kata-py.v2 IMAGE NAME uname -a"
)

app = typer.Typer(
    name="kata-py",
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
guest_app = typer.Typer(
    help="Build and look at guests: the kernel and initrd that a VM boots.", no_args_is_help=True
)
config_app = typer.Typer(help="Look at configuration files.", no_args_is_help=True)
volume_app = typer.Typer(
    help="Describe volumes that guests mount themselves, as storage drivers (CSI) do.", no_args_is_help=True
)
app.add_typer(guest_app, name="guest")
app.add_typer(config_app, name="config")
app.add_typer(volume_app, name="direct-volume")

ConfigFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[FILE]",
        help="The configuration file. Without one: what KATA_CONF_FILE names, then"
        " /etc/kata-py/configuration.toml, then /usr/share/defaults/kata-py/configuration.toml.",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from shim import VERSION

        typer.echo(f"kata-py {VERSION} (Python {sys.version.split()[0]})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Only here to carry the options that come before a command."""


@app.command("check")
def check(
    file: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE", help="Check for this configuration instead of the installed one."
        ),
    ] = None,
) -> None:
    """Tell whether this host can run containers with kata-py, and what to do when it cannot.

    Looks at the configuration, QEMU, KVM, vsock, network, host devices, virtiofsd, guests, control groups, containerd.
    Changes nothing. Exit status 1 means that something required is missing.
    """
    from cli import host_check, output

    findings = host_check.check(file)
    output.show_findings(findings)
    if host_check.unusable(findings):
        raise typer.Exit(1)


@guest_app.command("build")
def guest_build(
    folder: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            help="Where vmlinux, initrd.img and manifest.json go. Default: /usr/share/kata-py for root, where"
            " the built-in configuration looks, and below XDG_DATA_HOME for others; for another architecture than"
            " the host's a folder of that name in it.",
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="Debian's name of the guest's architecture: amd64, arm64, s390x. Default: this host's."
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="Take packages of this Debian suite. Default: this host's.")
    ] = None,
    image: Annotated[
        Literal["ext4", "erofs"] | None,
        typer.Option(
            help="Also make a root image with this file system: rootfs.img, and image-initrd.img with the drivers."
        ),
    ] = None,
    verity: Annotated[
        bool, typer.Option("--verity", help="Add the hashes with which dm-verity checks the root image.")
    ] = False,
) -> None:
    """Make a guest out of the distribution's packages; needs neither root nor anything installed.

    In another place than the default one, name the two files as `kernel` and `initrd` of the section hypervisor.qemu.
    With --image the lines for a guest that boots from the root image are printed.
    Downloads are kept below XDG_CACHE_HOME, and a guest that is up to date is left alone, so a repetition is cheap.
    """
    from cli import guest

    guest.build(folder, arch=arch, suite=suite, image=image, verity=verity)


@guest_app.command("info")
def guest_info(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that `guest build` wrote to.")],
) -> None:
    """Show what a guest consists of."""
    from cli import guest

    guest.info(folder)


@config_app.command("show")
def config_show(
    file: ConfigFile = None,
    sandbox: Annotated[
        str | None,
        typer.Option(metavar="ID", help="What this running sandbox uses, instead of what a new one would."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="An array of objects: key, value, origin.")] = False,
) -> None:
    """Print the value of every key as it is used, and what set it: a file, a pod's annotation, or the default.

    Exit status 1 means that the configuration cannot be used, or that there is no such sandbox.
    """
    from cli import configuration

    configuration.show(file, sandbox=sandbox, as_json=as_json)


@config_app.command("check")
def config_check(file: ConfigFile = None) -> None:
    """Read a configuration with its drop-ins as the shim would, and list every problem of it.

    Exit status 1 means that the shim would refuse it.
    """
    from cli import output
    from config import ConfigError, load

    try:
        loaded = load(file)
    except ConfigError as error:
        output.show_problems(error)
        raise typer.Exit(1) from None
    output.show_loaded(loaded)


VolumePath = Annotated[
    str, typer.Option("--volume-path", metavar="PATH", help="The path that containers mount the volume from.")
]


@volume_app.command("add")
def direct_volume_add(
    path: VolumePath,
    mount_info: Annotated[
        str,
        typer.Option(
            "--mount-info",
            metavar="JSON",
            help="What is there: volume-type (block), device, fstype, options, and as metadata fsGroup and"
            " fsGroupChangePolicy.",
        ),
    ],
) -> None:
    """Let containers that mount PATH from now on get a block device, whose file system their guest mounts."""
    from cli import direct_volume

    direct_volume.add(path, mount_info)


@volume_app.command("remove")
def direct_volume_remove(path: VolumePath) -> None:
    """Forget what `add` has said of PATH. Containers that have the volume keep it."""
    from cli import direct_volume

    direct_volume.remove(path)


@volume_app.command("stats")
def direct_volume_stats(path: VolumePath) -> None:
    """Tell, as JSON, how much of the volume's file system is used, while a container has it."""
    from cli import direct_volume

    direct_volume.stats(path)


@volume_app.command("resize")
def direct_volume_resize(
    path: VolumePath,
    size: Annotated[
        str, typer.Option("--size", metavar="BYTES", help="What the file system is to have, in bytes.")
    ],
) -> None:
    """Let the volume's file system grow to BYTES while containers have it. Its device has to be so large already."""
    from cli import direct_volume

    direct_volume.resize(path, size)


def main() -> None:
    """Entry point of the installed program."""
    app(prog_name="kata-py")
