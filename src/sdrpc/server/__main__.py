"""``python -m sdrpc.server``: the rpc-server command. (An entry stands above all layers: nobody imports it.)"""

from __future__ import annotations

from sdrpc.cli.rpc_server import main

main()
