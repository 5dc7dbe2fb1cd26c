"""sd-server's seats in a Ray cluster: each an actor with devices of its own, on a node that reaches them."""
