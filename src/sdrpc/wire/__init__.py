"""The RPC protocol without IO: bytes in, messages out. Imports neither sockets nor torch.

hello         the first exchange, before there is a dialect: version and capabilities
key_exchange  how a client shows its key, before that
messages      one registry command → (request, response), each a frozen value with a field table
records       rpc_tensor, for names of any length
name_length   finding out how long a client's names are
framing       headers and sizes; readers are generators, so that a socket loop and a test drive the same code
graphs        GRAPH_COMPUTE's payload ↔ Graph
kept_graphs   which graphs a server keeps, as both sides count them
carrying      a tensor's data over several connections
ranges        parts of a buffer, many of them in one message
refusals      why a server refuses, in words and as values
service       what a server announces in the local network
limits        what a peer may announce before anything is read or reserved for it
"""
