"""The stage `shared_expert_gate`: the gate of the shared expert."""
