"""ComfyUI's own graphs, with their models on devices of the network.

ComfyUI loads this folder as a module from its ``custom_nodes``; the README beside this file says how to put it there.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
