"""``python -m sdrpc.server``: the rpc-server command. (An entry stands above all layers: nobody imports it.)"""

from __future__ import annotations

from sdrpc.cli.entry import rpc_server

rpc_server()
