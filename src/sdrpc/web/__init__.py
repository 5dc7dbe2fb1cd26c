"""Pictures for everyone on the network, over HTTP: a durable queue, the APIs that people's tools speak, and a page."""
