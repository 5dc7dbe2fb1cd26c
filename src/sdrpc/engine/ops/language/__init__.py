"""Operations that only clients with language models send (llama.cpp and its like), never our own compiler:
recurrences (Mamba, RWKV, gated attention), DeepSeek's sparse attention, and training."""
