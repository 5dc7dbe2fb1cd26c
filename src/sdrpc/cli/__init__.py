"""The commands: rpc-server and sd-cli."""
