"""Which file is read, what is merged over it, and what is said about files that cannot be read."""

import os
from importlib import import_module
from pathlib import Path

import pytest

from config import Config, ConfigError, HostLimits, LoadedConfig, Qemu, load
from config.tree import Report, Tree
from config.validate import adjust_and_validate
from tests.unit.config.config_site import HOST, Site

PATHS = 'src_ctr = "a"\nsrc_path = "/a"\ndst_ctr = "b"\ndst_path = "/b"'


def loaded(explicit: Path | None = None, env: Path | str | None = None, *places: Path) -> LoadedConfig:
    environment = {} if env is None else {"KATA_CONF_FILE": str(env)}
    return load(explicit, env=environment, host=HOST, places=tuple(map(str, places)))


def error(*args: object) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(*args)  # type: ignore[arg-type]
    return str(caught.value)


def write(site: Site, name: str) -> Path:
    file = site.root / name
    file.write_text("[hypervisor.qemu]\n" + site.required())
    return file


def test_the_explicit_file_wins_then_the_environment_then_the_places_in_order(site: Site) -> None:
    a, b, c, d = (write(site, name) for name in "abcd")
    assert loaded(a, b, c, d).path == a
    assert loaded(None, b, c, d).path == b
    assert loaded(None, None, c, d).path == c
    assert loaded(None, "", c, d).path == c
    assert loaded(None, None, site.root / "missing", d).path == d


def test_a_named_file_must_exist_whatever_else_there_is(site: Site) -> None:
    other, missing = write(site, "other"), site.root / "missing"
    assert error(missing, other, other) == f"{missing}: does not exist"
    expected = f"{missing}: does not exist (KATA_CONF_FILE in the environment names it)"
    assert error(None, missing, other) == expected


def test_a_dangling_link_in_a_usual_place_is_an_error(site: Site) -> None:
    place, other = site.root / "link", write(site, "other")
    place.symlink_to("nowhere")
    assert error(None, None, place, other) == f"{place}: does not exist"


def test_a_loop_of_links_is_an_error(site: Site) -> None:
    place = site.root / "link"
    place.symlink_to(place)
    assert error(place).startswith(f"{place}: cannot be read: ")


def test_without_any_file_the_defaults_apply_and_a_warning_says_so(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unchecked(config: Config, _host: HostLimits, _report: Report) -> Config:
        return config

    monkeypatch.setattr(import_module("config.load"), "adjust_and_validate", unchecked)
    result = loaded(None, None, site.root / "a", site.root / "b")
    assert (result.config, result.path, result.drop_ins) == (Config(), None, ())
    places = f"{site.root / 'a'} or {site.root / 'b'}"
    assert result.warnings == (f"no configuration file at {places}: the built-in defaults apply",)


def test_built_in_defaults_are_checked_like_a_file() -> None:
    report = Report(Tree(None, {}))
    lacking = Config(hypervisor=Qemu(kernel="/nonexistent/vmlinux"))
    adjust_and_validate(lacking, HOST, report)
    with pytest.raises(ConfigError) as caught:
        report.raise_any()
    problem = "hypervisor.qemu.kernel: /nonexistent/vmlinux does not exist"
    expected = f"built-in defaults: {problem} (build the guest with: kata-py guest build)"
    assert expected in str(caught.value).splitlines()


def test_a_path_with_a_nul_byte_is_an_error() -> None:
    assert "cannot be read" in error(Path("/etc/kata\0.toml"))


def test_a_directory_is_not_a_configuration(site: Site) -> None:
    assert error(site.root) == f"{site.root}: is not a regular file"


def test_a_fifo_is_not_waited_for(site: Site) -> None:
    os.mkfifo(site.root / "fifo")
    assert error(site.root / "fifo") == f"{site.root / 'fifo'}: is not a regular file"


def test_syntax_errors_of_all_files_come_together_with_line_and_column(site: Site) -> None:
    site.drop_in("10-good.toml", "[runtime]\nenable_debug = true\n")
    broken = site.drop_in("20-broken.toml", "[runtime]\n\nenable_debug = maybe\n")
    latin = site.drop_in("30-latin.toml", "")
    latin.write_bytes(b'policy = "caf\xe9"')
    lines = site.lines("[runtime\n")
    assert [line.split(": ")[0] for line in lines] == [str(site.file), str(broken), str(latin)]
    assert "not valid TOML: " in lines[0]
    assert "(at line 1, column 9)" in lines[0]
    assert "(at line 3, column 16)" in lines[1]
    assert lines[2].endswith("not valid TOML: byte 13 is not UTF-8")


def test_deep_nesting_is_an_error_not_a_crash(site: Site) -> None:
    (line,) = site.lines("a = " + "[" * 100_000)
    assert "not valid TOML" in line


def test_drop_ins_lie_beside_the_file_that_a_link_leads_to(site: Site) -> None:
    file = write(site, "configuration.toml")
    drop_in = site.drop_in("x", "[hypervisor.qemu]\ndefault_memory = 512\n")
    link = site.root / "elsewhere" / "kata.toml"
    link.parent.mkdir()
    link.symlink_to(file)
    (link.parent / "config.d").mkdir()
    (link.parent / "config.d" / "y").write_text("[hypervisor.qemu]\ndefault_memory = 1024\n")
    result = loaded(link)
    assert (result.path, result.drop_ins) == (file, (drop_in,))
    assert result.config.hypervisor.default_memory == 512


def test_drop_ins_are_regular_files_in_byte_order_whatever_their_suffix(site: Site) -> None:
    text = "[hypervisor.qemu]\ndefault_memory = {}\n"
    names = ["10-a", "9.conf", "Z.toml", "a.toml~", "\u00e4.toml"]
    files = [site.drop_in(name, text.format(1000 + number)) for number, name in enumerate(names)]
    (site.root / "config.d" / "zz-folder").mkdir()
    (site.root / "config.d" / "zz-link").symlink_to(files[0])
    result = site.load("[hypervisor.qemu]\n" + site.required())
    assert result.drop_ins == tuple(files)
    assert result.config.hypervisor.default_memory == 1004


def test_tables_join_and_everything_else_replaces(site: Site) -> None:
    base = f"""
        [hypervisor.qemu]
        {site.required()}
        virtio_fs_extra_args = ["--one", "--two"]
        default_memory = 256
        [[runtime.shared_mounts]]
        name = "first"
        {PATHS}
        """
    site.drop_in(
        "1", '[hypervisor.qemu]\nvirtio_fs_extra_args = ["--three"]\n[agent.kata]\nserver_port = 9\n'
    )
    site.drop_in(
        "2", '[[runtime.shared_mounts]]\nname = "second"\n' + PATHS + "\n[agent.kata]\nlog_port = 10\n"
    )
    config = site.load(base).config
    assert config.hypervisor.virtio_fs_extra_args == ("--three",)
    assert config.hypervisor.default_memory == 256
    assert (config.agent.server_port, config.agent.log_port) == (9, 10)
    assert [mount.name for mount in config.runtime.shared_mounts] == ["second"]


def test_a_later_drop_in_repairs_an_earlier_mistake(site: Site) -> None:
    site.drop_in("1", '[hypervisor.qemu]\ndefault_memory = "much"\n')
    site.drop_in("2", "[hypervisor.qemu]\ndefault_memory = 300\n")
    assert site.load("[hypervisor.qemu]\n" + site.required()).config.hypervisor.default_memory == 300


def test_the_file_that_set_a_key_is_named(site: Site) -> None:
    one = site.drop_in("1", '[hypervisor.qemu]\ndefault_vcpus = "2"\n[agent.kata]\nserver_port = 7\n')
    two = site.drop_in("2", "[agent.kata]\nlog_port = true\n[agent.kata.mem_agent]\nmemcg_swap = 1\n")
    lines = site.lines("[hypervisor.qemu]\nkernle = 1\n" + site.required())
    assert lines == [
        f"{site.file}: hypervisor.qemu.kernle: unknown key (did you mean kernel?)",
        f"{one}: hypervisor.qemu.default_vcpus: want number, got '2'",
        f"{two}: agent.kata.log_port: want int 1..4294967294, got true",
        f"{two}: agent.kata.mem_agent.memcg_swap: want bool, got 1",
    ]


def test_a_value_that_replaced_a_table_is_blamed_on_its_file(site: Site) -> None:
    file = site.drop_in("1", "[hypervisor]\nqemu = 3\n")
    assert site.lines("[hypervisor.qemu]\n" + site.required()) == [
        f"{file}: hypervisor.qemu: want a table, got 3"
    ]


def test_config_d_that_is_a_file_is_an_error(site: Site) -> None:
    (site.root / "config.d").touch()
    (line,) = site.lines("")
    assert line == f"{site.root / 'config.d'}: cannot be read: Not a directory"
