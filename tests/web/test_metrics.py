"""What a monitor is told, of a real rpc-server."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from sdrpc.device import Memory
from sdrpc.web.devices import Devices
from tests.interop.tap import HEADER, Tap
from tests.support.null import NullDevice
from tests.support.process import ServerProcess
from tests.web.process import WebServer

OPTIONS = ("--precision", "exact", "--device", "CPU")


def measured(server: WebServer) -> dict[tuple[str, ...], float]:
    """What is at /metrics: (name, values of its labels in the order of their names) → number."""
    families = text_string_to_metric_families(server.ask("/metrics").body.decode())
    return {
        (each.name, *(value for _, value in sorted(each.labels.items()))): each.value
        for family in families
        for each in family.samples
    }


def test_a_picture_is_measured(tmp_path: Path, models: Path) -> None:
    with (
        ServerProcess(*OPTIONS) as device,
        Tap(f"127.0.0.1:{device.port}") as tap,
        WebServer(tmp_path, "--models-dir", str(models), "--rpc", tap.endpoint) as server,
    ):
        before = measured(server)
        assert before["sdrpc_job_wait_seconds_count",] == 0
        server.until(server.submit(), "completed")
        assert server.ask("/nowhere/at/all").status == 404
        assert server.ask("/sdcpp/v1/jobs/none").status == 404
        assert server.ask("/health", headers={"Host": "evil.example"}).status == 421
        server.ask("/sdcpp/v1/devices")  # waits for the devices
        after = measured(server)
    pictures = after["sdrpc_pictures_total", "tiny", "RPC0"]
    assert (pictures, after["sdrpc_step_seconds_count", "RPC0"], after["sdrpc_job_wait_seconds_count",]) == (1, 1, 1)
    assert 0 <= after["sdrpc_job_wait_seconds_sum",] < 1 << 20
    wire = after["sdrpc_wire_sent_bytes_total", tap.endpoint]
    assert 0 < after["sdrpc_weights_sent_bytes_total", "RPC0"] < wire
    assert wire <= sum(tap.bytes.values()) + HEADER.size * sum(tap.commands.values())
    assert after["sdrpc_wire_received_bytes_total", tap.endpoint] > 64 * 64 * 3  # more than what was drawn
    assert 0 < after["sdrpc_device_memory_free_bytes", "RPC0"] <= after["sdrpc_device_memory_total_bytes", "RPC0"]
    assert after["process_resident_memory_bytes",] > 1 << 20
    assert after["sdrpc_http_requests_total", "/sdcpp/v1/img_gen", "202"] == 1
    assert after["sdrpc_http_requests_total", "/sdcpp/v1/jobs/{id}", "404"] == 1
    assert after["sdrpc_http_requests_total", "", "404"] == 1
    assert after["sdrpc_http_requests_total", "", "421"] == 1
    assert (after["sdrpc_jobs_queued",], after["sdrpc_jobs_generating",]) == (0, 0)


class Busy(NullDevice):
    """Counts how often it was asked."""

    asked = 0

    def memory(self) -> Memory:
        self.asked += 1
        return super().memory()


def test_a_monitor_does_not_wait_for_a_device_that_is_drawn_on() -> None:
    """A thread of its own waits for the device; when that had its turn, its answer is there."""
    device = Busy()
    devices = Devices([device])
    with device.turns:
        assert [devices.known(0.01) for _ in range(3)] == [[], [], []]
        assert device.asked == 0
    devices.said()  # after the thread that waits
    assert [(there.name, memory) for there, memory in devices.known(0.0)] == [(device.name, device.memory())]
