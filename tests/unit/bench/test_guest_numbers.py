"""What the programs in guests print becomes numbers, and what they print in place of numbers is told."""

from __future__ import annotations

import json

import pytest

from bench import network, volumes
from bench.errors import BenchError

PING = "200 packets transmitted, 200 packets received, 0% packet loss\nround-trip min/avg/max = 0.059/0.118/0.420 ms\n"


def test_numbers_of_iperf3_and_ping() -> None:
    said = {"end": {"sum_sent": {"bits_per_second": 9e8}, "sum_received": {"bits_per_second": 8e8}}}
    assert network._number(network._IN, json.dumps(said)) == 800.0
    assert network._number(network._TRIP, PING) == 0.118


@pytest.mark.parametrize(
    ("what", "output"),
    [
        (network._OUT, '{"error": "unable to connect to server: Connection refused"}'),
        (network._OUT, "iperf3: Connection refused"),
        (network._TRIP, "ping: Connection refused"),
    ],
)
def test_what_they_complain_of_is_told(what: str, output: str) -> None:
    with pytest.raises(BenchError, match="Connection refused"):
        network._number(what, output)


def test_speeds_and_rates_of_volumes() -> None:
    large = volumes._large_numbers("512+0 records in\n512+0 records out\n10.00 12.00 12.50\n")
    assert list(large.values()) == pytest.approx([268.435456, 1073.741824])
    assert list(volumes._small_numbers("1.00 2.00 2.50 4.50\n").values()) == pytest.approx([1000, 2000, 500])


@pytest.mark.parametrize("output", ["", "dd: No space left on device\n", "1.0 2.0\n", "1.0 1.0 2.0\n"])
def test_times_that_a_guest_did_not_tell(output: str) -> None:
    with pytest.raises(BenchError, match="times"):
        volumes._large_numbers(output)
